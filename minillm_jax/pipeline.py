"""Which stages of an experiment run: in order, each once, and none that is done.

    workdir/config.json                the settings; another config is refused
            metrics.jsonl              every number of every update
            stages/STAGE/              outputs of a stage; done.json when it is complete
            evaluate/                  held-out figures and answers
            summary.json report.html   what came out
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from minillm_jax.build import SPLITS, Builder
from minillm_jax.reporting.progress import print_table
from minillm_jax.reporting.report import write_report
from minillm_jax.reporting.writers import MetricsWriter, read_json, write_json
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.answers import teacher_answers
from minillm_jax.stages.evaluation import evaluate
from minillm_jax.stages.training import distill, student_sft
from minillm_jax.types import InputError

# May differ between two starts in one work directory: they change no result.
FREE_SETTINGS = ("tensorboard",)


def report(run: Run) -> Outcome:
    """Write `summary.json` and `report.html` from what the other stages left."""
    figures = run.workdir / "evaluate" / "figures.json"
    done = {name: read_done(run, name) for name in STAGES if name != "report"}
    summary = {
        "format": 1,
        "config": run.build.config.name,
        "seed": run.build.seed,
        "environment": environment(),
        "stages": {name: outcome for name, outcome in done.items() if outcome},
        "models": read_json(figures) if figures.exists() else {},
    }
    write_json(run.workdir / "summary.json", summary)
    write_report(run.workdir)
    print_table(summary)
    return {"tokens": 0, "updates": 0}


# In order; each with the stages whose output it reads.
STAGES: dict[str, tuple[Callable[[Run], Outcome], tuple[str, ...]]] = {
    "teacher_answers": (teacher_answers, ()),
    "student_sft": (student_sft, ("teacher_answers",)),
    "distill": (distill, ("student_sft",)),
    "evaluate": (evaluate, ("teacher_answers", "student_sft", "distill")),
    "report": (report, ("evaluate",)),
}
OPTIONAL_INPUTS = {"evaluate": ("student_sft", "distill"), "report": ("evaluate",)}


def read_done(run: Run, stage: str) -> dict[str, Any] | None:
    """What a stage said when it was complete, None if it is not."""
    path = run.folder(stage) / "done.json"
    return read_json(path) if path.exists() else None


def is_done(run: Run, stage: str) -> bool:
    """Whether a stage is complete, and so from the inputs that are there now."""
    done = read_done(run, stage)
    return done is not None and done["inputs"] == _inputs(run, stage)


def _inputs(run: Run, stage: str) -> dict[str, str]:
    found = {name: read_done(run, name) for name in STAGES[stage][1]}
    return {name: done["finished"] for name, done in found.items() if done}


def execute(config: Any, workdir: Path, names: Sequence[str] | None = None) -> None:
    """Run the stages `names` (all if None) that are not done.

    Raises:
        InputError: an unknown stage, a missing input, or a work directory of another config.
    """
    chosen = chosen_stages(names)
    build = Builder(config)
    claim(workdir, config)
    with MetricsWriter(workdir, tensorboard=bool(config.tensorboard)) as metrics:
        run = Run(build, workdir, metrics)
        for stage in chosen:
            if is_done(run, stage) and stage != "report":
                print(f"{stage}: done, in {run.folder(stage)}", file=sys.stderr)
                continue
            needed = set(STAGES[stage][1]) - set(OPTIONAL_INPUTS.get(stage, ()))
            for name in needed:
                if read_done(run, name) is None:
                    raise InputError(
                        f"stage {stage} needs the output of {name}: add it, --stages {name},{stage}"
                    )
            (run.folder(stage) / "done.json").unlink(missing_ok=True)
            began = time.monotonic()
            outcome = STAGES[stage][0](run)
            outcome["seconds"] = round(time.monotonic() - began, 2)
            outcome |= {"inputs": _inputs(run, stage), "finished": _now()}
            write_json(run.folder(stage) / "done.json", outcome)
    if "report" in chosen:
        print(f"report: {workdir / 'report.html'}", file=sys.stderr)


def chosen_stages(names: Sequence[str] | None) -> list[str]:
    """The stages to run, in their order.

    Raises:
        InputError: naming those that exist.
    """
    unknown = [name for name in names or () if name not in STAGES]
    if unknown:
        raise InputError(f"no stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    return [name for name in STAGES if names is None or name in names]


def claim(workdir: Path, config: Any) -> None:
    """Make the work directory this config's, or check that it is.

    Raises:
        InputError: with the first settings that differ.
    """
    path, mine = workdir / "config.json", flatten(config.to_dict())
    if path.exists():
        theirs = flatten(read_json(path))
        different = [
            name
            for name in sorted(mine.keys() | theirs.keys())
            if name not in FREE_SETTINGS and mine.get(name) != theirs.get(name)
        ]
        if different:
            shown = "; ".join(
                f"{name}: {theirs.get(name)} there, {mine.get(name)} now" for name in different[:3]
            )
            raise InputError(
                f"{workdir} holds a run of another config ({shown}): give another --workdir, "
                "or the settings of that run"
            )
    else:
        write_json(path, config.to_dict())


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted name, in JSON's types."""
    if not isinstance(tree, dict):
        return {prefix: json.loads(json.dumps(tree))}
    parts = (flatten(v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items())
    return {name: value for part in parts for name, value in part.items()}


def describe(config: Any, workdir: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """What `--dry_run` prints: config, stages, batch geometry and devices; writes nothing."""
    build = Builder(config)
    if (workdir / "config.json").exists():
        claim(workdir, config)
    run = Run(build, workdir, metrics=None)  # type: ignore[arg-type]  # no stage runs
    d, s = build.schedule("distill"), build.schedule("sft")
    return {
        "config": json.loads(json.dumps(config.to_dict())),
        "workdir": str(workdir),
        "stages": [
            {"stage": name, "state": "done" if is_done(run, name) else "to do"}
            for name in chosen_stages(names)
        ],
        "geometry": {
            "prompts": {split: len(build.rows(split)) for split in SPLITS},
            "prompt_slots": config.data.max_prompt,
            "response_slots": config.data.max_response,
            "sft": {
                "batch": s.batch_size,
                "micro_batches": config.sft.accumulate,
                "updates": s.steps,
            },
            "distill": {
                "rollouts": d.rollouts,
                "batch": d.batch_size,
                "micro_batches": config.distill.accumulate,
                "inner_epochs": d.inner_epochs,
                "updates_per_collection": d.updates_per_round,
                "collections": -(-d.steps // d.updates_per_round),
                "updates": d.steps,
            },
        },
        "devices": {
            "platform": jax.default_backend(),
            "count": jax.device_count(),
            "kind": jax.devices()[0].device_kind,
            "mesh": dict(build.mesh.shape),
        },
    }


def environment() -> dict[str, Any]:
    """Versions and devices, for the record."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
        "platform": jax.default_backend(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "system": f"{platform.system()} {platform.machine()}",
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
