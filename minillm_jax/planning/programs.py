"""What an experiment compiles, described without an array: shapes, shardings and assumptions.

The programs are those that training runs, their rows as long as they can be: `collect` of MiniLLM,
and `update` of every stage that trains. `Program.lower` gives one with the layers of the models, or
with fewer, which is how a program that unrolls its layers is compiled in a minute.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax import assemble
from minillm_jax.build import SECTIONS
from minillm_jax.models import DecoderConfig, abstract_params, heads_together, native
from minillm_jax.planning.shapes import Shapes
from minillm_jax.rollout.mixed import Mixing, Rollout, collect, longest_chunk, scored_at_once
from minillm_jax.sharding import batch_sharding, replicated
from minillm_jax.types import Sequences

Layers = tuple[int, int]  # of the student and of the teacher


@dataclass(frozen=True)
class Program:
    """One program of a run, per device in bytes and over all devices in operations."""

    name: str
    lower: Callable[[Layers | None], Any]
    parts: dict[str, float]  # of its arguments: parameters, teacher, optimizer, batch
    held: float  # on the devices meanwhile without being an argument
    needed: float  # operations of the method's own products, nothing computed twice
    times: int = 1  # runs per rollout or per update
    layers: Layers | None = None  # where it unrolls them
    slots: frozenset[tuple[int, int]] = frozenset()  # (slots, width) of the two caches
    trips: Callable[[str, int], float] | None = field(default=None, compare=False)


def bytes_of(tree: Any) -> float:
    """Bytes of a tree of arrays with shardings on one device."""

    def size(leaf):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return float(sum(size(leaf) for leaf in jax.tree.leaves(tree)))


def programs(build: Shapes) -> list[Program]:
    """The programs of the stages that train, in order."""
    outline = build.outline
    found = []
    if outline.tunes_teacher and not outline.fine_tuned_teacher:
        found.append(_sft(build, "teacher_sft", build.teacher_checkpoint.config))
    kind, student = outline.entry.kind, build.student_checkpoint.config
    if "sft" in (outline.entry.start, kind) and not outline.fine_tuned_student:
        found.append(_sft(build, "student_sft", student))
    if kind == "minillm":
        found += [_collect(build), _minillm(build)]
    elif kind != "sft":
        taught = outline.needs_teacher
        found.append(_taught(build) if taught else _sft(build, "distill", student))
    return found


def mean_run(alpha: float, chunk: int) -> float:
    """Expected tokens between two turns of the teacher.

    A run ends with the coin of the next token, of probability `alpha`, or after `chunk` tokens:
    E[min(Geometric(alpha), chunk)] = sum_{i < chunk} (1 - alpha)^i.
    """
    return math.fsum((1 - alpha) ** i for i in range(chunk))


# Shapes.


def _with_layers(config: DecoderConfig, layers: int) -> DecoderConfig:
    windows = config.windows and config.windows[:layers]
    return replace(config, layers=layers, windows=windows)


def _params(build: Shapes, config: DecoderConfig, dtype: str = "float32", fsdp: bool = True) -> Any:
    shapes = abstract_params(config, np.dtype(dtype))
    places = build.shardings(config, fsdp)
    return jax.tree.map(lambda x, where: _array(x.shape, x.dtype, where), shapes, places)


def _teacher(build: Shapes, config: DecoderConfig | None = None) -> Any:
    """The parameters that the teacher is read with."""
    c = build.config.teacher
    return _params(build, config or build.teacher_config, c.dtype, c.fsdp)


def _array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _rows(build: Shapes, rows: int) -> Any:
    """How the rows of a batch lie."""
    return batch_sharding(build.mesh) if rows % build.ways == 0 else replicated(build.mesh)


def _sequences(build: Shapes, rows: int, answers: int) -> Sequences:
    prompts, where = build.config.data.max_prompt, _rows(build, rows)
    return Sequences(
        prompt=_array((rows, prompts), jnp.int32, where),
        prompt_mask=_array((rows, prompts), bool, where),
        response=_array((rows, answers), jnp.int32, where),
        response_mask=_array((rows, answers), bool, where),
    )


def _rollout(build: Shapes, rows: int) -> Rollout:
    slots, where = build.config.data.max_response, _rows(build, rows)
    given = _sequences(build, rows, slots)
    teacher, dtype = build.teacher_config, np.dtype(build.config.teacher.dtype)
    return Rollout(
        **{name: getattr(given, name) for name in given.__dataclass_fields__},
        **{n: _array((rows, slots), jnp.float32, where) for n in ("log_q", "log_p", "log_mix")},
        teacher_hidden=_array((rows, slots, teacher.embed_width), dtype, where),
    )


# Operations that the method needs.


def _forward(config: DecoderConfig, rows: int, tokens: int) -> float:
    """Operations of the layers on rows of so many tokens; each token sees half of the others."""
    layers = sum(
        leaf.size for leaf in jax.tree.leaves(abstract_params(config)["layers"]) if leaf.ndim > 2
    )
    attention = 2.0 * config.layers * config.heads * config.head_dim * tokens
    return rows * tokens * (2.0 * layers + attention)


def _head(config: DecoderConfig, tokens: int) -> float:
    return 2.0 * tokens * config.vocab_size * config.embed_width


# The programs.


def _lowered(build: Shapes, function: Any, arguments: tuple) -> Any:
    # As in training; nothing may be computed under the mesh here. And without calls of our own, of
    # which the compiler knows nothing.
    with jax.set_mesh(build.mesh), native.without():
        return function.lower(*arguments)


def _sft(build: Shapes, name: str, model: DecoderConfig) -> Program:
    section = SECTIONS[name]
    rows, answers = build.section(section)["batch_size"], build.answer_slots()
    state, batch = build.abstract_state(model, section), _sequences(build, rows, answers)
    method = assemble.supervised(build, model, section)
    tokens = build.data.max_tokens  # a row is read from its first token on
    return Program(
        f"{name} update",
        lambda layers: _lowered(build, method.update, (state, None, batch)),
        _parts(state, None, batch),
        held=0.0,
        needed=3 * (_forward(model, rows, tokens) + _head(model, rows * answers)),
    )


def _parts(state: Any, teacher: Any, batch: Any) -> dict[str, float]:
    return {
        "parameters": bytes_of(state.params),
        "teacher": bytes_of(teacher),
        "optimizer": bytes_of(state.opt_state),
        "batch": bytes_of(batch),
    }


def _taught(build: Shapes) -> Program:
    """An update on given answers, or on those that the student writes in it."""
    student, teacher = build.student_checkpoint.config, build.teacher_config
    rows, answers = build.config.distill.batch_size, build.answer_slots()
    method = assemble.distill(build)
    state = build.abstract_state(student, "distill", method.memory)
    batch, frozen = _sequences(build, rows, answers), _teacher(build)
    tokens = build.data.max_tokens  # a row is read from its first token on
    own, c = _forward(student, rows, tokens) + _head(student, rows * answers), build.config.distill
    writes = build.outline.entry.kind == "divergence" and bool(c.on_policy or c.replay)
    slots = build.config.data.max_response
    return Program(
        "distill update",
        lambda layers: _lowered(build, method.update, (state, frozen, batch)),
        _parts(state, frozen, batch),
        held=0.0,
        # Writing is one more forward pass, counted as if the student wrote in every update.
        needed=(3 + writes) * own
        + _forward(teacher, rows, tokens)
        + _head(teacher, rows * answers),
        trips=(lambda where, depth: float(slots)) if writes else None,
    )


def _minillm(build: Shapes) -> Program:
    student, teacher = build.student_checkpoint.config, build.teacher_config
    c, data = build.config.distill, build.config.data
    rows, tokens = c.batch_size, data.max_prompt + data.max_response
    state = build.abstract_state(student, "distill")
    frozen = _teacher(build)
    batch: Any = _rollout(build, rows)
    written = rows * data.max_response
    needed = 3 * (_forward(student, rows, tokens) + _head(student, written))
    needed += _head(teacher, written)
    corpus = build.config.corpus
    if corpus.files and corpus.coefficient:
        batch = batch, _array((rows, tokens), jnp.int32, _rows(build, rows))
        needed += 3 * (_forward(student, rows, tokens) + _head(student, rows * tokens))
        if corpus.kd_ratio:
            needed += _forward(teacher, rows, tokens) + _head(teacher, rows * tokens)
    method = assemble.policy_gradient(build)
    return Program(
        "distill update",
        lambda layers: _lowered(build, method.update, (state, frozen, batch)),
        _parts(state, frozen, batch),
        held=bytes_of(_rollout(build, c.rollouts)),
        needed=needed,
    )


def _collect(build: Shapes) -> Program:
    student, teacher = build.student_checkpoint.config, build.teacher_config
    c, data = build.config.distill, build.config.data
    rows = min(c.collect_batch or c.rollouts, c.rollouts)
    mixing = assemble.mixing(build)
    prompts = _sequences(build, rows, 1)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def lower(layers: Layers | None) -> Any:
        few = layers or (student.layers, teacher.layers)
        q, p = _with_layers(student, few[0]), _with_layers(teacher, few[1])
        models = (q, p, _params(build, q), _teacher(build, p))
        return _lowered(build, collect, (*models, prompts.prompt, prompts.prompt_mask, key, mixing))

    state = build.abstract_state(student, "distill")
    parts = _parts(state, _teacher(build), _sequences(build, rows, 1))
    optimizer = parts.pop("optimizer")
    written, slots = bytes_of(_rollout(build, c.rollouts)), data.max_prompt + mixing.slots
    done = written * (1 - rows / c.rollouts)
    with jax.set_mesh(build.mesh):
        cached = [heads_together(model) * model.head_dim for model in (student, teacher)]
        chunk, scored = longest_chunk(mixing, rows), scored_at_once(mixing.slots, rows)
    needed = sum(
        _forward(model, rows, slots) + _head(model, rows * mixing.slots)
        for model in (student, teacher)
    )
    return Program(
        "collect",
        lower,
        parts,
        held=optimizer + done,
        needed=needed,
        times=c.rollouts // rows,
        layers=(student.layers, teacher.layers),
        slots=frozenset({(slots, cached[0]), (slots + chunk, cached[1])}),
        trips=_trips(mixing, chunk, scored),
    )


def _trips(mixing: Mixing, chunk: int, scored: int) -> Callable[[str, int], float]:
    """Every response is as long as its buffer, and the teacher's turns are as many as expected."""
    run = mean_run(mixing.alpha, chunk)

    def trips(where: str, depth: int) -> float:
        if "teacher_log_probs" in where:
            return math.ceil(mixing.slots / scored)
        return run if depth else mixing.slots / run

    return trips


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Ways to arrange so many devices."""
    for tensor in (1, 2, 4, 8, 16):
        if devices % tensor == 0:
            rest = devices // tensor
            for fsdp in (rest >> shift for shift in range(rest.bit_length())):
                if fsdp and rest % fsdp == 0:
                    yield {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}
