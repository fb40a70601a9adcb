"""Stop a tiny run again and again, by SIGTERM and SIGKILL, and compare what it leaves in the end.

    python -m benchmarks.soak --stops 32 --json soak.json

An undisturbed run comes first. Then runs of the same command are stopped: once in every phase of
`PHASES` with both signals, then at random moments, until there were so many stops; each start is a
process of its own and goes on where the last one ended. Every run that is complete is compared
with the undisturbed one: `metrics.jsonl`, all answers, all figures and the checksums of the last
parameters and moments byte by byte, all students tensor by tensor.
Exit code 1 if anything differs, or if SIGTERM was not followed by exit code 0 in 20 seconds.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import load_file

from configs.common import base
from minillm_jax import checkpoint, pipeline, record, stopping, trainer
from minillm_jax.build import Builder
from minillm_jax.reporting.writers import write_json
from minillm_jax.stages import answers, keeper

WITHIN = 20.0  # seconds from SIGTERM to the end
SENT, STOPPED = "soak: a signal", "; the same command goes on"


def config() -> Any:
    """Two random layers, eight prompts, all stages, two collections of two inner epochs."""
    config: Any = base()
    config.name = "soak"
    config.teacher.path = "scratch:llama-2x32"
    config.student.keep_layers = (0,)
    config.data.template, config.data.long_prompts = "alpaca", "drop"
    config.data.max_prompt, config.data.max_response, config.data.limit = 64, 8, 8
    config.evaluate.prompts = config.evaluate.validation_prompts = 4
    config.answers.batch_size, config.evaluate.batch_size = 4, 2
    for stage, steps in ((config.sft, 5), (config.distill, 8)):
        stage.steps, stage.batch_size = steps, 4
        stage.learning_rate = 1e-2
        stage.evaluate_every, stage.save_every = 3, 2
    config.distill.rollouts, config.distill.inner_epochs = 8, 2
    return config


# Where a phase is: an object, its function, and whether a call is the one.
Place = tuple[Any, str, Callable[..., bool]]


def _step(stage: str, step: int) -> Place:
    return keeper.Keeper, "log", lambda self, at, *_: (self.stage, at) == (stage, step)


def _writing(self) -> bool:
    return "_manager" in self.__dict__ and self._manager.is_saving_in_progress()


PHASES: dict[str, Place] = {
    "data preparation": (Builder, "preflight", lambda *_: True),
    "teacher answers": (answers, "answer", lambda run, model, *_, **__: model is run.build.teacher),
    "SFT": _step("student_sft", 4),
    "collect": (trainer, "_repetition", lambda *_: True),
    "inner epoch 1": _step("distill", 5),
    "inner epoch 2": _step("distill", 7),
    "validation": (keeper.Keeper, "evaluate", lambda self, at, _: at == 3),
    "checkpoint write": (checkpoint.Checkpoints, "wait", _writing),
    "evaluation": (answers, "answer", lambda *_, with_greedy=False, **__: with_greedy),
    "report": (pipeline, "write_report", lambda *_: True),
}


def stop_in(phase: str, number: int):
    """Send this process the signal the first time that it is in the phase."""
    place, name, is_it = PHASES[phase]
    call, sent = getattr(place, name), []

    def stopped(*args, **options):
        if not sent and is_it(*args, **options):
            sent.append(phase)
            print(f"{SENT} in {phase}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # until the thread that listens has heard it
        return call(*args, **options)

    setattr(place, name, stopped)


def keep_final_sums(workdir: Path):
    """Write the sums of the last state of every training stage, which is kept nowhere else."""
    fit = trainer.fit

    def kept(method, state, frozen, batches, schedule, hooks, **options):
        state = fit(method, state, frozen, batches, schedule, hooks, **options)
        stage = hooks.log.__self__.stage
        write_json(workdir / "stages" / stage / "final.json", record.sums(state))
        return state

    trainer.fit = kept


def start(workdir: Path, log: Path, phase: str = "", number: int = 0) -> int:
    """A process that runs the experiment, stopped in `phase` if one is given; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        stopping.listen()
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        keep_final_sums(workdir)
        if phase:
            stop_in(phase, number)
        pipeline.execute(config(), workdir)
        code = 0
    except stopping.Stopped as error:
        stopping.say(str(error))
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.stderr.flush()
    os._exit(code)


def ended(child: int) -> int | None:
    """The exit code of a process, negative after a signal; None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(child: int, seconds: float) -> int | None:
    """The exit code, None if it runs longer than that."""
    until = time.monotonic() + seconds
    while (code := ended(child)) is None and time.monotonic() < until:
        time.sleep(0.01)
    return code


def left(workdir: Path) -> dict[str, bytes]:
    """What must be the same, by file."""
    wanted = (
        "metrics.jsonl",
        "answers.jsonl",
        "figures.json",
        "final.json",
        "evaluate/*.jsonl",
    )
    found = {
        str(path.relative_to(workdir)): path.read_bytes()
        for ending in wanted
        for path in workdir.rglob(f"*{ending}" if "/" not in ending else ending)
    }
    for path in workdir.glob("stages/*/model/model.safetensors"):
        # By tensor: the library writes the metadata of a file in an order of its own each time.
        for tensor, values in load_file(path).items():
            found[f"{path.relative_to(workdir)}:{tensor}"] = values.tobytes()
    for path in workdir.glob("stages/*/done.json"):
        done = json.loads(path.read_text())
        clock = {name: done.pop(name) for name in ("seconds", "finished", "inputs")}
        found[str(path.relative_to(workdir))] = json.dumps([done, sorted(clock)]).encode()
    return {name: data for name, data in found.items() if not name.startswith("scratch/")}


def soak(folder: Path, stops: int, seed: int, phases: int) -> dict[str, Any]:
    """Stop runs in `folder` and compare; `phases` of the pairs of phase and signal come first."""
    draw = random.Random(seed)
    began = time.monotonic()
    if wait(start(folder / "whole", folder / "whole.log"), 1e6) != 0:
        raise SystemExit(f"the undisturbed run failed:\n{(folder / 'whole.log').read_text()}")
    whole, seconds = left(folder / "whole"), time.monotonic() - began
    signals = (signal.SIGTERM, signal.SIGKILL)
    planned = list(itertools.product(PHASES, signals))
    draw.shuffle(planned)
    planned = planned[:phases]
    by_signal, by_phase, problems = Counter(), Counter(), []
    slowest, resumes, runs, equal = 0.0, 0, 0, 0
    longest = seconds / 4  # of a start, which compiles nothing any more
    workdir, log = folder / "run", folder / "run.log"
    while sum(by_signal.values()) < stops or workdir.exists():
        more = sum(by_signal.values()) < stops
        phase, number = planned.pop() if more and planned else ("", draw.choice(signals))
        resumes += workdir.exists()
        before = log.stat().st_size if log.exists() else 0
        child, code = start(workdir, log, phase, number), None
        since = time.monotonic()
        if more and not phase:
            code = wait(child, draw.uniform(0.1, 0.9) * longest)
            if code is None:
                os.kill(child, number)
                sent = time.monotonic()
                code = wait(child, WITHIN + 5)
                slowest = max(slowest, time.monotonic() - sent)
        code = wait(child, 1e6) if code is None else code
        if code == 0:
            longest = min(max(longest, time.monotonic() - since), seconds)
        said = log.read_bytes()[before:].decode(errors="replace") if log.exists() else ""
        name = signal.Signals(number).name
        if code == -signal.SIGKILL or STOPPED in said or SENT in said:
            by_signal[name] += 1
            by_phase[phase or "at random"] += 1
        if phase and SENT not in said:
            planned.insert(0, (phase, number))  # this run is past it: in the next one
        if code not in (0, -signal.SIGKILL):
            problems.append(f"exit code {code} {phase or 'at random'} after {name}: {said[-300:]}")
            break
        if (workdir / "report.html").exists() and code == 0 and STOPPED not in said:
            runs += 1
            found = left(workdir)
            wrong = [n for n in whole.keys() | found.keys() if whole.get(n) != found.get(n)]
            equal += not wrong
            problems += [f"run {runs}: {name} differs" for name in sorted(wrong)]
            shutil.rmtree(workdir)
    if slowest > WITHIN:
        problems.append(f"{slowest:.1f} s from SIGTERM to the end")
    return {
        "stops": sum(by_signal.values()),
        "by_signal": dict(by_signal),
        "by_phase": dict(by_phase),
        "resumes": resumes,
        "runs": runs,
        "runs_equal": equal,
        "parts_compared": len(whole),
        "bytes_compared": sum(map(len, whole.values())),
        "slowest_stop_seconds": round(slowest, 2),
        "seconds": round(time.monotonic() - began, 1),
        "problems": problems,
    }


def main():
    """Run the soak and print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stops", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", type=int, default=2 * len(PHASES), help="stops within a phase")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--folder", help="keep the work directories there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(asked.folder or made)
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_disable_most_optimizations", True)  # what runs for milliseconds
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        figures = soak(folder, asked.stops, asked.seed, asked.phases)
    print(json.dumps(figures, indent=2))
    if asked.json:
        write_json(asked.json, figures)
    raise SystemExit(bool(figures["problems"]))


if __name__ == "__main__":
    main()
