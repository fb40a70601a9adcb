"""A skipped update once more: `main --replay=FILE`, with FILE in `stages/STAGE/skipped`.

Nothing is trained. The method's own update runs on the batch that was kept, with the parameters of
the nearest checkpoint, and says what it would have told the optimizer: which arrays of the batch,
which values of its tokens, which terms of the loss and which gradients are not finite, by name.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax import assemble, hosts, pipeline, recipe, record
from minillm_jax.build import SECTIONS, Builder
from minillm_jax.checkpoint import Checkpoints
from minillm_jax.models import head
from minillm_jax.named import by_name
from minillm_jax.objectives import policy, vocab
from minillm_jax.rollout import Rollout, response_states, teacher_states
from minillm_jax.sharding import batch_sharding, place
from minillm_jax.stages import own_settings
from minillm_jax.stages.skipped import read_batch
from minillm_jax.stages.training import Start, student
from minillm_jax.train_state import TrainState, init_state
from minillm_jax.types import InputError
from minillm_jax.workdir import claimed, refuse_another

SHOWN = 8  # arrays of one part that are named


@flax.struct.dataclass
class Gradients(TrainState):
    """A state whose update gives the gradients in the place of the parameters."""

    def apply_gradients(self, optimizer, grads, loss):
        """Return them, and nothing to log."""
        return dataclasses.replace(self, params=grads), {}


class _Builder(Builder):
    """Makes methods that update `Gradients`."""

    def abstract_state(self, *args, **options):
        state = super().abstract_state(*args, **options)
        return Gradients(**{f.name: getattr(state, f.name) for f in dataclasses.fields(state)})


def execute(config: Any, workdir: Path, file: Path) -> None:
    """Print what is not finite in the update that was kept as `file`.

    Raises:
        InputError: no such batch, or a work directory of another config.
    """
    stage, step = _place(workdir, file)
    with claimed(workdir):  # no run goes on meanwhile
        refuse_another(workdir, config)
        lines = replay(config, workdir, file, stage, step)
    if hosts.is_main():
        print("\n".join(lines))


def replay(config: Any, workdir: Path, file: Path, stage: str, step: int) -> list[str]:
    """The lines on that update of that stage; every process must call it."""
    build = _Builder(config, workdir)
    stages = pipeline.planned(build).stages
    if stage not in stages:
        raise InputError(f"{file}: this experiment has no stage {stage}; give the config of that")
    if "teacher_sft" in stages and pipeline.is_done(workdir, stages, "teacher_sft"):
        build.follow(workdir / "stages" / "teacher_sft" / "model")
    batch = place(read_batch(file), batch_sharding(build.mesh))
    after_sft = stage == "distill" and "student_sft" in stages
    start = _start(
        build, stage, workdir / "stages" / "student_sft" / "model" if after_sft else None
    )
    learns, section = stage == "distill", SECTIONS[stage]
    method = (
        assemble.distill(build) if learns else assemble.supervised(build, start.config, section)
    )
    frozen = build.teacher.params if learns and build.outline.needs_teacher else None
    with jax.set_mesh(build.mesh):
        state, where = _state(build, workdir, stage, step, method.memory, start)
        parts = {"batch": batch, "tokens": _tokens(build, start, state.params, frozen, batch)}
        state, metrics = method.update(state, frozen, batch)  # which consumes the old state
        terms = {name: value for name, value in metrics.items() if name != "learning_rate"}
        parts |= {"loss": terms, "gradient": state.params}
        found = {name: _not_finite(part) for name, part in parts.items()}
        rate = float(metrics["learning_rate"])
    said = [f"update {step} of {stage} again, with the parameters {where}, rate {rate:.3g}"]
    said += [line for name, complaints in found.items() for line in _lines(name, complaints)]
    return said + [_verdict(found)]


def _place(workdir: Path, file: Path) -> tuple[str, int]:
    """Stage and number of the update that a file was kept of."""
    kept = sorted(workdir.glob("stages/*/skipped/*.npz"))
    if not file.is_file():
        there = ", ".join(map(str, kept)) or "nothing was skipped, or this is another --workdir"
        raise InputError(f"no batch {file}: {there if not kept else f'choose from {there}'}")
    if file.resolve() not in [path.resolve() for path in kept]:
        raise InputError(f"{file} is none of {workdir}/stages/STAGE/skipped: give its --workdir")
    return file.resolve().parts[-3], int(file.stem)


def _start(build: Builder, stage: str, after_sft: Path | None) -> Start:
    """What the stage began with, as in `stages.training`."""
    if stage == "teacher_sft":
        stored = build.teacher_checkpoint
        return Start(stored.config, stored.hf_config, lambda: build.untuned_teacher().params)
    return student(build, after_sft)


def _state(
    build: Builder, workdir: Path, stage: str, step: int, memory: Any, start: Start
) -> tuple[TrainState, str]:
    """The state of the last checkpoint before the update, else the next one, else the first one.

    Its number is that of the update, from which its random keys follow.
    """
    section, folder = SECTIONS[stage], workdir / "stages" / stage / "checkpoints"
    abstract = build.abstract_state(start.config, section, memory)
    there = record.steps(folder)
    nearest = max((n for n in there if n < step), default=min(there, default=None))
    settings = {"stage": stage, "config": own_settings(build.config.to_dict())}
    with Checkpoints(folder, settings) as checkpoints:
        restored = checkpoints.restore(abstract, step=nearest) if there else None
    if restored:
        state, where = restored.state, f"after update {nearest}"
    else:
        optimizer, _ = build.optimizer(section)
        first = init_state(start.load(), optimizer, abstract, memory)
        names = [f.name for f in dataclasses.fields(first)]
        state = Gradients(**{name: getattr(first, name) for name in names})
        where = "that the stage began with"
    number = place(np.int32(step - 1), abstract.step.sharding)
    return dataclasses.replace(state, step=number), where


def _tokens(build: Builder, start: Start, params: Any, frozen: Any, batch: Any) -> dict[str, Any]:
    """[B, N] of the drawn or given tokens: log q now, log p, and what MiniLLM makes of those."""
    rows = batch[0] if isinstance(batch, tuple) else batch
    teacher = build.teacher_config if frozen is not None else None
    own = {"max_tokens": None if isinstance(rows, Rollout) else build.data.max_tokens}

    @jax.jit
    def read(params, frozen, rows):
        hidden = response_states(
            start.config, params, rows, dtype=build.config.student.dtype, **own
        )
        q, p, states = head(start.config, params, hidden.dtype), None, None
        if teacher:
            states = getattr(rows, "teacher_hidden", None)  # of a collection
            if states is None:
                dtype = build.config.teacher.dtype
                states = teacher_states(teacher, frozen, rows, dtype=dtype, **own)
            p = head(teacher, frozen, states.dtype)
        found = vocab.scores(
            hidden,
            q.weight,
            q.bias,
            states,
            p.weight if p else None,
            p.bias if p else None,
            rows.response,
            rows.response_mask,
            vocab_size=build.vocab,
        )
        if isinstance(rows, Rollout):
            settings = recipe.policy(build.section("distill"))
            made = policy.prepare(
                settings, rows.log_p, rows.log_q, rows.log_mix, rows.response_mask
            )
            found |= {"w": made.weight, "reward": made.reward, "advantage": made.advantage}
        return found

    return read(params, frozen, rows)


def _not_finite(tree: Any) -> dict[str, str]:
    """By name, how much of every array is not finite, and where that begins."""
    leaves = {
        name: leaf
        for name, leaf in by_name(tree).items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    found = {name: "" for name in leaves}
    for name, (number, first) in jax.device_get(_counts(leaves)).items():
        if number:
            size, shape = leaves[name].size, leaves[name].shape
            at = ", ".join(str(int(i)) for i in np.unravel_index(first, shape))
            found[name] = f"{number} of {size}, the first at [{at}]" if shape else "not finite"
    return found


@jax.jit
def _counts(leaves: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    wrong = {name: ~jnp.isfinite(leaf).reshape(-1) for name, leaf in leaves.items()}
    return {name: (bad.sum(), jnp.argmax(bad)) for name, bad in wrong.items()}


def _lines(part: str, found: Mapping[str, str]) -> list[str]:
    wrong = [f"{name}: {said}" for name, said in found.items() if said]
    head = f"{part}: {len(wrong)} of {len(found)} not finite"
    more = [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    return [head, *(f"  {line}" for line in wrong[:SHOWN]), *more]


def _verdict(found: Mapping[str, Mapping[str, str]]) -> str:
    for part, says in (
        ("batch", "it came with the batch: look at its rows, or at what wrote them"),
        ("tokens", "the models make it of a batch that is finite"),
        ("loss", "the loss makes it of tokens that are finite"),
        ("gradient", "the loss is finite, and its gradient is not"),
    ):
        if any(found[part].values()):
            return f"begins in the {part}: {says}"
    return "all is finite: it was the parameters of that moment, not the batch"
