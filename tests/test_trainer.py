"""The loop: what a step reads, who is called when, and runs that stop and go on, bit for bit."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.checkpoint import Checkpoints
from minillm_jax.methods import Method, minillm
from minillm_jax.models import abstract_params, logical_axes
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.optim import adamw
from minillm_jax.rollout import Mixing
from minillm_jax.sharding import batch_sharding, make_mesh, tree_shardings
from minillm_jax.train_state import TrainState, abstract_state, init_state, state_shardings
from minillm_jax.trainer import MAX_SKIPPED, Hooks, Schedule, TrainingStopped, fit
from minillm_jax.types import Sequences
from tests.toy_models import prompts, toy

VOCAB = 7
SCHEDULE = Schedule(
    steps=9, batch_size=2, evaluate_every=4, save_every=1, rollouts=4, inner_epochs=2
)


def test_rows_of_an_inner_epoch_are_each_used_once_in_a_new_order():
    schedule = Schedule(1000, 4, 1, 1, rollouts=32, inner_epochs=3)
    assert schedule.updates_per_round == 24
    assert [schedule.place(step) for step in (0, 23, 24, 49)] == [(0, 0), (0, 23), (1, 0), (2, 1)]

    def epoch(index, seed=0):
        return np.concatenate([schedule.rows(8 * index + i, seed) for i in range(8)])

    # Three epochs, the first of the next round, and other seeds.
    orders = [epoch(0), epoch(1), epoch(2), epoch(3), epoch(0, seed=1), epoch(3, seed=1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(32))
    assert len({tuple(order) for order in orders}) == len(orders)
    np.testing.assert_array_equal(epoch(2), epoch(2))


def counters(step=0):
    zero = jnp.int32(0)
    return TrainState(jnp.int32(step), {"w": jnp.float32(0)}, (), zero, zero)


class Recorder:
    """A method, batches and hooks that do nothing but write down what they are given."""

    def __init__(self, skipped=()):
        self.skipped, self.rows, self.collected = skipped, [], []
        self.blocks = []
        self.logged, self.timed, self.evaluated, self.saved = [], [], [], []
        self.not_finite = []
        self.hooks = Hooks(self.log, self.evaluate, self.save, self.skip)

    def __getitem__(self, index):
        rows = 100 * index + np.arange(4, dtype=np.int32)[:, None]
        return Sequences(rows, np.ones((4, 1), bool), rows, np.ones((4, 1), bool))

    def update(self, state, frozen, batch):
        assert frozen == "teacher"
        if isinstance(batch, tuple):
            batch, text = batch
            self.blocks.append(text.tolist())
        self.rows.append(np.asarray(batch.response)[:, 0].tolist())
        skip = int(int(state.step) in self.skipped)
        in_a_row = (state.consecutive_skipped + 1) * skip
        state = state.replace(step=state.step + 1, consecutive_skipped=in_a_row)
        return state, {"skipped": jnp.int32(skip)}

    def collect(self, params, frozen, batch, key):
        assert frozen == "teacher"
        self.collected.append((int(batch.prompt[0, 0]) // 100, jax.random.key_data(key).tolist()))
        return jax.tree.map(jnp.asarray, batch)

    def log(self, step, values, times):
        self.logged.append((step, values))
        self.timed.append((step, times))

    def skip(self, step, batch):
        self.not_finite.append((step, np.asarray(batch.response)[:, 0].tolist()))

    def evaluate(self, step, state):
        assert int(state.step) == step
        self.evaluated.append(step)
        return {}

    def save(self, step, state, rollout, evaluated):
        assert int(state.step) == step and evaluated
        self.saved.append((step, rollout is not None))

    def fit(self, schedule, *, collects, step=0, **options: Any):
        method = Method(self.update, self.collect if collects else None)
        options = {"seed": 5} | options
        return fit(method, counters(step), "teacher", self, schedule, self.hooks, **options)


def test_method_that_reads_gets_the_batch_of_its_step():
    seen = Recorder()
    state = seen.fit(Schedule(8, 4, evaluate_every=3, save_every=2), collects=False, step=1)
    assert int(state.step) == 8
    assert seen.rows == [[100 * step + row for row in range(4)] for step in range(1, 8)]
    assert [step for step, _ in seen.logged] == [2, 3, 4, 5, 6, 7, 8]
    assert all(values["tokens"] == 8 and values["skipped"] == 0 for _, values in seen.logged)
    assert seen.evaluated == [3, 6, 8]
    assert seen.saved == [(2, False), (4, False), (6, False)]  # the last is the caller's


def test_method_that_collects_reads_its_collection_until_it_is_used_up():
    seen = Recorder()
    seen.fit(SCHEDULE, collects=True)
    keys = [jax.random.fold_in(jax.random.key(5), round_) for round_ in range(3)]
    expected = [(i, jax.random.key_data(key).tolist()) for i, key in enumerate(keys)]
    assert seen.collected == expected
    rows = [(100 * (step // 4) + SCHEDULE.rows(step, 5)).tolist() for step in range(9)]
    assert seen.rows == rows
    assert seen.evaluated == [4, 8, 9]
    # Nothing of a used-up collection is worth its disk.
    assert seen.saved == [(step, step % 4 != 0) for step in range(1, 9)]
    with_collection = [step for step, times in seen.timed if "collect_seconds" in times]
    assert with_collection == [1, 5, 9]


@pytest.mark.parametrize("collects", [True, False])
def test_rows_of_an_update_are_arranged_by_their_tokens(collects):
    class Uneven(Recorder):
        def __getitem__(self, index):
            given = super().__getitem__(index)
            answer = np.arange(5)[None] < np.array([[2], [5], [1], [4]])
            rows = np.repeat(given.response, 5, axis=1)
            return Sequences(given.prompt, given.prompt_mask, rows, answer)

    seen, told = Uneven(), []

    def arrange(tokens):
        told.append(tokens.tolist())
        return np.argsort(-tokens)

    seen.fit(SCHEDULE, collects=collects, arrange=arrange)
    if collects:
        each = [SCHEDULE.rows(step, 5) for step in range(9)]
        assert told == [[(3, 6, 2, 5)[row] for row in rows] for rows in each]
        by_length = [sorted(rows, key=[1, 3, 0, 2].index) for rows in each]
        assert seen.rows == [
            [100 * (i // 4) + row for row in rows] for i, rows in enumerate(by_length)
        ]
    else:
        assert told == [[3, 6, 2, 5]] * 9
        assert seen.rows == [[100 * step + row for row in (1, 3, 0, 2)] for step in range(9)]


class Corpus:
    def __getitem__(self, index):
        blocks = np.full((2, 3), index, np.int32)
        blocks[0, 2] = -1  # padding
        return blocks


@pytest.mark.parametrize("collects", [True, False])
def test_blocks_of_the_corpus_follow_from_the_step(collects):
    """After a restart, too."""
    straight, first, second = Recorder(), Recorder(), Recorder()
    straight.fit(SCHEDULE, collects=collects, corpus=Corpus())
    assert straight.blocks == [[[step, step, -1], [step] * 3] for step in range(9)]
    assert all(values["tokens"] == (4 if collects else 8) + 5 for _, values in straight.logged)
    first.fit(dataclasses.replace(SCHEDULE, steps=4), collects=collects, corpus=Corpus())
    second.fit(SCHEDULE, collects=collects, corpus=Corpus(), step=4)
    assert first.blocks + second.blocks == straight.blocks
    assert first.rows + second.rows == straight.rows


def test_too_many_skipped_updates_in_a_row_end_the_run():
    good, steps = MAX_SKIPPED - 1, 3 * MAX_SKIPPED
    seen = Recorder(skipped=set(range(steps)) - {good})
    with pytest.raises(TrainingStopped, match=f"last at step {2 * MAX_SKIPPED};"):
        seen.fit(Schedule(steps, 4, 100, 100), collects=False)
    assert seen.not_finite[0] == (1, [0, 1, 2, 3]) and len(seen.not_finite) == 2 * MAX_SKIPPED - 1
    assert seen.logged[-1][0] == 2 * MAX_SKIPPED  # what went wrong is in the log


def test_no_update_starts_when_all_tokens_are_read():
    seen = Recorder()
    assert int(seen.fit(SCHEDULE, collects=True, step=2, tokens=5, spent=5).step) == 2
    assert not seen.rows
    # Eight tokens an update: the second reaches the nine, and is the last.
    assert int(seen.fit(SCHEDULE, collects=False, tokens=9).step) == 2
    assert seen.evaluated == [2] and not seen.saved[1:]


# MiniLLM itself, on one device of a mesh, as the stages run it.
STUDENT, Q = toy(0, vocab=VOCAB + 2)
TEACHER, P = toy(1, vocab=VOCAB + 1, layers=1, width=24)
MESH = make_mesh(1, devices=jax.devices()[:1])
OPTIMIZER = adamw(0.01)
SHAPES = abstract_params(STUDENT)
ABSTRACT = abstract_state(
    SHAPES, tree_shardings(SHAPES, logical_axes(STUDENT), MESH), OPTIMIZER, MESH
)
RUN = Schedule(steps=6, batch_size=4, evaluate_every=6, save_every=3, rollouts=8, inner_epochs=2)
METHOD: Any = minillm.method(
    STUDENT,
    TEACHER,
    OPTIMIZER,
    lambda count: 0.01,
    policy=PRESETS["corrected"],
    mixing=Mixing(slots=8, alpha=0.3, chunk=3, eos_id=0, pad_id=0, vocab=VOCAB),
)


class Prompts:
    """Other prompts for every collection."""

    def __getitem__(self, index):
        none = np.zeros((RUN.rollouts, 1), np.int32)
        return Sequences(*prompts(RUN.rollouts, 5, VOCAB, seed=index), none, none == 1)


class Killed(Exception):
    pass


def begin():
    params = jax.tree.map(jnp.copy, Q)
    return init_state(jax.device_put(params, state_shardings(ABSTRACT).params), OPTIMIZER, ABSTRACT)


def train(state, rollout=None, *, save: Any = lambda *_: None, schedule=RUN, killed_at=None):
    """The last state on the host, and what the updates logged, without the times."""
    log = {}

    def write(step, values, times):
        log[step] = values
        if step == killed_at:
            raise Killed

    hooks = Hooks(write, lambda *_: {}, save, lambda *_: None)
    state = fit(METHOD, state, P, Prompts(), schedule, hooks, seed=3, rollout=rollout)
    return jax.tree.map(np.array, state), log


@pytest.fixture(scope="module")
def straight():
    """Six updates, and after each of them what a checkpoint would hold."""
    saved = {}

    def save(step, state, rollout, evaluated):
        saved[step] = jax.tree.map(np.array, (state, rollout))

    every = Schedule(6, 4, 6, save_every=1, rollouts=8, inner_epochs=2)
    return *train(begin(), save=save, schedule=every), saved


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_resumed_run_goes_on_as_if_it_had_never_stopped(straight, step):
    last, log, saved = straight
    state, rollout = saved[step]
    assert (rollout is None) == (step == 4)  # between two collections
    resumed, more = train(jax.device_put(state, state_shardings(ABSTRACT)), rollout)
    chex.assert_trees_all_equal(resumed, last)
    assert more == {after: log[after] for after in range(step + 1, 7)}
    assert int(last.step) == 6 and int(last.skipped) == 0


def test_run_killed_between_checkpoints_resumes_from_disk(straight, tmp_path):
    last, log, _ = straight
    with Checkpoints(tmp_path / "c", {"seed": 3}) as checkpoints, pytest.raises(Killed):
        train(
            begin(),
            save=lambda step, state, rollout, evaluated: checkpoints.save(
                step, state, buffer=rollout
            ),
            killed_at=5,
        )
    found = jax.eval_shape(METHOD.collect, Q, P, Prompts()[0], jax.random.key(0))
    rows = batch_sharding(MESH)
    buffer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), found)
    with Checkpoints(tmp_path / "c", {"seed": 3}) as checkpoints:
        restored = checkpoints.restore(ABSTRACT, buffer=buffer)
    assert restored is not None and restored.step == 3
    resumed, more = train(restored.state, restored.buffer)
    chex.assert_trees_all_equal(resumed, last)
    assert more == {step: log[step] for step in (4, 5, 6)}


def test_second_run_compiles_nothing(straight):
    compiled = []

    def listen(event, duration_secs, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    state = begin()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(state)
        assert not compiled
        jax.jit(lambda x: x * 17.25 + 3)(1.0)
        assert compiled  # the listener hears
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
