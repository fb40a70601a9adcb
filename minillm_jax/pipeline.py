"""Which stages of an experiment run: in order, each once, and none that is done.

workdir/config.json                the settings; another config is refused
        metrics.jsonl              every number of every update
        stages/STAGE/              outputs of a stage; started.json, and done.json at its end
        evaluate/                  held-out figures and answers
        summary.json report.html   what came out
"""

import datetime
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from minillm_jax import hosts, memory, recipe, record, stopping
from minillm_jax.bucket import Bucket
from minillm_jax.build import Builder
from minillm_jax.geometry import geometry
from minillm_jax.modelfiles import recover
from minillm_jax.models import abstract_params
from minillm_jax.reporting import watch
from minillm_jax.reporting.progress import print_table
from minillm_jax.reporting.report import write_report
from minillm_jax.reporting.writers import (
    MetricsWriter,
    read_json,
    read_rows,
    summary_writer,
    write_json,
)
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.plan import Plan, Stage, plan
from minillm_jax.trainer import TrainingStopped
from minillm_jax.types import InputError
from minillm_jax.workdir import claimed, fork, refuse_another, refuse_busy


def report(run: Run) -> Outcome:
    """Write `summary.json` and `report.html` from what the other stages left."""
    done = {name: read_done(run.workdir, name) for name in planned(run.build).stages}
    summarise(run.build, run.workdir, {n: o for n, o in done.items() if o and n != "report"})
    return {"tokens": 0, "updates": 0}


def summarise(build: Builder, folder: Path, done: Mapping[str, Outcome] | None = None) -> None:
    """Write the summary and the report of a folder that `evaluate` or a run has filled."""
    figures = folder / "evaluate" / "figures.json"
    summary = {
        "format": 1,
        "config": build.config.name,
        "seed": build.seed,
        "environment": environment(),
        "stages": dict(done or {}),
        "warnings": warnings(build, folder),
        "models": read_json(figures) if figures.exists() else {},
    }
    write_json(folder / "summary.json", summary)
    hosts.barrier("summary")
    if hosts.is_main():
        write_report(folder)
        print_table(summary)


def warnings(build: Builder, workdir: Path) -> list[dict[str, Any]]:
    """What was warned of so far, as stage, step and text: from the metrics and the checkpoints."""
    stages = planned(build).stages
    sections = {name: stage.section for name, stage in stages.items() if stage.section}
    found = watch.of_run(read_rows(workdir / "metrics.jsonl"), sections)
    for path in sorted(workdir.glob("stages/*/checkpoints/unreadable-*")):
        text = f"{path.relative_to(workdir)}: this checkpoint was damaged, the one before was used"
        step = int(path.name.partition("-")[2])
        found.append({"stage": path.parts[-3], "step": step, "text": f"{text}; check the disk"})
    return found


def planned(build: Builder) -> Plan:
    """The stages of the experiment."""
    return plan(build.outline, report)


def read_done(workdir: Path, stage: str) -> dict[str, Any] | None:
    """What a stage said when it was complete, None if it is not."""
    path = workdir / "stages" / stage / "done.json"
    return read_json(path) if path.exists() else None


def is_done(workdir: Path, stages: Mapping[str, Stage], stage: str) -> bool:
    """Whether a stage is complete, and so from the inputs that are there now."""
    done = read_done(workdir, stage)
    return (
        done is not None
        and done["inputs"] == _inputs(workdir, stages[stage])
        and all(is_done(workdir, stages, name) for name in done["inputs"])
    )


def _inputs(workdir: Path, stage: Stage) -> dict[str, str]:
    found = {name: read_done(workdir, name) for name in stage.inputs}
    return {name: done["finished"] for name, done in found.items() if done}


def execute(
    config: Any,
    workdir: Path,
    names: Sequence[str] | None = None,
    source: Path | None = None,
    remote: Bucket | None = None,
) -> None:
    """Run the stages `names` (all if None) that are not done; those of a fork of `source`.

    With `remote`, a bucket that is held, `workdir` is its image.
    Nothing else is written before all that the run reads has been looked at.

    Raises:
        InputError: an unknown stage, a missing input, a work directory of another config, no
            space, or a training that cannot go on.
        Stopped: the run was asked to end.
    """
    build = Builder(config, workdir)
    if source:
        with claimed(workdir):
            fork(source, workdir, config, build.config)
    refuse_another(workdir, config)
    refuse_busy(workdir)
    stages = planned(build).stages
    chosen = chosen_stages(stages, names)
    if list(chosen) == ["report"] and not (workdir / "config.json").exists():
        raise InputError(f"{workdir} holds no run to report of: give its --workdir")
    to_do = [stage for stage in chosen if not is_done(workdir, stages, stage)]
    check_inputs(workdir, stages, to_do)
    tuned = workdir / "stages" / "teacher_sft" / "model"
    if "teacher_sft" in stages and is_done(workdir, stages, "teacher_sft"):
        build.follow(tuned)
    stopping.check()
    if config.tensorboard and hosts.is_main():  # which alone writes them
        summary_writer()  # before models are fetched
    if set(to_do) - {"report"}:
        build.preflight(to_do)
    hosts.barrier("preflight")  # else one may write what another is still looking at
    with claimed(workdir), MetricsWriter(workdir, tensorboard=bool(config.tensorboard)) as metrics:
        refuse_another(workdir, config)  # which may have been made meanwhile
        run = Run(build, workdir, metrics, remote)
        if not (workdir / "config.json").exists():
            write_json(workdir / "config.json", config.to_dict())
        trains = {stage: stages[stage].section for stage in to_do}
        check_space(run, {stage: section for stage, section in trains.items() if section})
        for stage in chosen:
            if is_done(workdir, stages, stage) and stage != "report":
                print(f"{stage}: done, in {run.folder(stage)}", file=hosts.log())
                continue
            stopping.check(f"{stage} comes next")
            run_stage(run, stage, stages[stage])
            if stage == "teacher_sft":
                build.follow(tuned)
    if "report" in chosen:
        print(f"report: {(remote.url if remote else workdir)}/report.html", file=hosts.log())


def run_stage(run: Run, stage: str, this: Stage) -> None:
    """Run a stage of that name, from its last checkpoint if it was cut short on the same inputs.

    Raises:
        InputError: the training cannot go on, or there is no space for it.
    """
    folder, inputs = run.folder(stage), _inputs(run.workdir, this)
    mark = folder / "started.json"
    same = (inputs, None)  # None: a fork goes on from other inputs
    if not (mark.exists() and read_json(mark)["inputs"] in same):
        hosts.barrier(f"{stage} is new")
        if hosts.is_main():  # of other inputs: no checkpoint to go on from
            run.clear(stage)
    if this.section:
        if hosts.is_main():
            recover(run.model(stage))
        check_space(run, {stage: this.section})
    write_json(mark, {"inputs": inputs})
    if hosts.is_main():
        (folder / "done.json").unlink(missing_ok=True)
    run.share(f"{stage} begins")
    began = time.monotonic()
    try:
        with jax.set_mesh(run.build.mesh):
            outcome = this.function(run)
    except TrainingStopped as error:
        steps = record.steps(run.checkpoints(stage))
        last = run.checkpoints(stage) / str(max(steps, default=0))
        kept = f"the last good checkpoint is {last}" if steps else "there is no checkpoint yet"
        raise InputError(f"{stage} stopped: {error}; {kept}") from error
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if hosts.lost(error):
            after = "another process is gone; the last checkpoint is whole"
            if stopping.asked():
                raise stopping.Stopped(f"{stage}, {after}") from error
            raise InputError(f"{stage}: {after}, and the same command goes on from it") from error
        if not memory.exhausted(error):
            raise
        line = memory.explain(run.build.config, run.workdir, stage)
        raise InputError(f"{line}; then the same command goes on") from error
    except stopping.Stopped as error:
        none = this.section and not record.steps(run.checkpoints(stage))
        saved = str(error) or ("before its first checkpoint" if none else "at the last checkpoint")
        raise stopping.Stopped(f"{stage}, {saved}") from error
    outcome["seconds"] = round(time.monotonic() - began, 2)
    now = datetime.datetime.now(datetime.UTC).isoformat()
    outcome |= {"inputs": _inputs(run.workdir, this), "finished": now}
    hosts.barrier(f"{stage} ends")  # and all of it is written
    write_json(folder / "done.json", outcome)
    run.share(f"{stage} is done")


def check_inputs(workdir: Path, stages: Mapping[str, Stage], to_do: Sequence[str]) -> None:
    """Refuse a stage whose inputs neither are there nor come first.

    Raises:
        InputError: naming the stage to add.
    """
    for stage in to_do:
        for name in stages[stage].inputs:
            if name in stages[stage].optional:
                continue
            if name not in to_do and read_done(workdir, name) is None:
                raise InputError(
                    f"stage {stage} needs the output of {name}: add it, --stages={name},{stage}"
                )


def check_space(run: Run, sections: Mapping[str, str]) -> None:
    """Refuse training stages, each with its section, for which the disk is too small.

    Beside the chosen student its successor is written, and beside two checkpoints (parameters and
    two moments) the next one, if not in a bucket.

    Raises:
        InputError: with what is needed and what there is.
    """
    need = have = 0
    for stage, section in sections.items():
        schedule = run.build.schedule(section)
        build = run.build
        held = build.teacher_checkpoint if stage == "teacher_sft" else build.student_checkpoint
        leaves = jax.tree.leaves(abstract_params(held.config))
        model = 4 * sum(leaf.size for leaf in leaves)
        states = 0 if run.remote else min(3, (schedule.steps - 1) // schedule.save_every)
        need += model * (2 + 3 * states)
        there = run.folder(stage).rglob("*")
        have += sum(path.stat().st_size for path in there if path.is_file())
    free = shutil.disk_usage(run.workdir).free
    if need > have + free:
        raise InputError(
            f"no space for {' and '.join(sections)} in {run.workdir}: it takes about "
            f"{need / 1e6:.0f} MB, {(have + free) / 1e6:.0f} MB are free; free some or give "
            "another --workdir"
        )


def chosen_stages(stages: Mapping[str, Stage], names: Sequence[str] | None) -> list[str]:
    """The stages to run, in their order.

    Raises:
        InputError: naming those that the experiment has.
    """
    unknown = [name for name in names or () if name not in stages]
    if unknown:
        raise InputError(f"no stage {unknown[0]!r}: choose from {', '.join(stages)}")
    return [name for name in stages if names is None or name in names]


def describe(config: Any, workdir: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """What `--dry_run` prints: config, stages, batch geometry and devices; writes nothing."""
    build = Builder(config, workdir)
    refuse_another(workdir, config)
    order = planned(build)
    stages = order.stages
    listed = [
        {"stage": name, "state": "done" if is_done(workdir, stages, name) else "to do"}
        for name in chosen_stages(stages, names)
    ]
    if names is None:
        left_out = [
            {"stage": name, "state": f"skipped: {why}"} for name, why in order.skipped.items()
        ]
        listed = left_out + listed
    return {
        "config": json.loads(json.dumps(recipe.in_full(build.config))),
        "workdir": str(workdir),
        "stages": listed,
        "geometry": geometry(build, (s.section for s in stages.values() if s.section)),
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
