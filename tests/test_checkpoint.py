"""Checkpoints: round trip, what is kept, torn files, other settings, and a disk that refuses."""

import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from minillm_jax import record
from minillm_jax.checkpoint import Checkpoints, Restored
from minillm_jax.sharding import make_mesh
from minillm_jax.types import InputError

# When one shard cannot be read, Orbax drops the reads of the others: they end after their loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SETTINGS = {"distill": {"alpha": 0.2, "kept": (0, 1)}, "seed": 3}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    key: jax.Array


def _state(value, spec=("fsdp",)):
    sharding = NamedSharding(make_mesh(2, 4), PartitionSpec(*spec))
    x = jax.device_put(jnp.arange(32, dtype=jnp.float32).reshape(8, 4) + value, sharding)
    low = jnp.full((4,), value, jnp.bfloat16)
    return State(step=jnp.int32(value), params={"x": x, "low": low}, key=jax.random.key(value))


def _abstract(spec=("fsdp",)):
    def describe(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(describe, _state(0, spec))


def _same(a, b):
    def equal(x, y):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)

    jax.tree.map(equal, a, b)


def _save(directory, *steps, **kwargs):
    with Checkpoints(directory, SETTINGS, **kwargs) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, _state(step), {"position": step})


def _restore(checkpoints, abstract, **kwargs) -> Restored:
    restored = checkpoints.restore(abstract, **kwargs)
    assert restored is not None
    return restored


def _names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def test_round_trip_with_keys_shardings_and_extra(tmp_path):
    _save(tmp_path / "a" / "b", 1, 2)
    with Checkpoints(tmp_path / "a" / "b", SETTINGS) as checkpoints:
        assert checkpoints.latest_step() == 2
        restored = _restore(checkpoints, _abstract())
        assert (restored.step, restored.extra, restored.buffer) == (2, {"position": 2}, None)
        _same(restored.state, _state(2))
        _same(_restore(checkpoints, _abstract(), step=1).state, _state(1))
        with pytest.raises(InputError, match=r"no checkpoint 7: choose one of \[1, 2\]"):
            _restore(checkpoints, _abstract(), step=7)


def test_restores_into_another_sharding(tmp_path):
    _save(tmp_path, 1)
    other = (None, "fsdp")
    _same(_restore(Checkpoints(tmp_path, SETTINGS), _abstract(other)).state, _state(1, other))


def test_opening_writes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", SETTINGS)
    assert checkpoints.latest_step() is None and checkpoints.best_step() is None
    assert checkpoints.restore(_abstract()) is None
    checkpoints.wait()
    checkpoints.close()
    assert not (tmp_path / "new").exists()


def test_buffer_may_be_there_or_not(tmp_path):
    buffer = {"tokens": jnp.arange(6).reshape(2, 3)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), buffer)
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(1, _state(1), buffer=buffer)
        checkpoints.save(2, _state(2))
        found = _restore(checkpoints, _abstract(), buffer=abstract, step=1).buffer
        np.testing.assert_array_equal(found["tokens"], buffer["tokens"])
        assert _restore(checkpoints, _abstract(), buffer=abstract, step=2).buffer is None
        assert _restore(checkpoints, _abstract(), step=1).buffer is None


def test_donating_the_state_after_save_does_not_change_what_is_saved(tmp_path):
    step = jax.jit(lambda x: x * 0.0 - 1.0, donate_argnums=0)
    x = jnp.arange(4_000_000, dtype=jnp.float32)
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(1, {"x": x})
        step(x).block_until_ready()
        abstract = {"x": jax.ShapeDtypeStruct((4_000_000,), jnp.float32)}
        restored = _restore(checkpoints, abstract).state["x"]
    np.testing.assert_array_equal(restored, np.arange(4_000_000, dtype=np.float32))


def test_a_save_that_is_not_in_the_background_has_ended(tmp_path):
    with Checkpoints(tmp_path / "c", SETTINGS, background=False) as checkpoints:
        checkpoints.save(1, _state(1))
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


def test_keeps_the_last_and_the_best(tmp_path):
    scores = {1: 0.9, 2: 0.3, 3: 0.5, 4: float("nan"), 5: None, 6: 0.4}
    with Checkpoints(tmp_path, SETTINGS, keep=2) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, _state(step), score=score)
        assert checkpoints.best_step() == 2
    assert _names(tmp_path) == ["2", "5", "6"]
    assert Checkpoints(tmp_path, SETTINGS).best_step() == 2


def test_a_step_is_saved_once_and_never_behind_the_latest(tmp_path):
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        assert checkpoints.save(3, _state(3))
        assert not checkpoints.save(3, _state(4))
        with pytest.raises(ValueError, match="step 2 is behind the latest checkpoint 3"):
            checkpoints.save(2, _state(2))
        _same(_restore(checkpoints, _abstract()).state, _state(3))


@pytest.fixture
def settled():
    """Let what a failed read left behind end, and complain, in the test that caused it."""
    yield
    time.sleep(0.2)
    gc.collect()


def _truncate(folder):
    for path in (folder / "state").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)


TEARS = {
    "data": _truncate,
    "metadata": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "manifest": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "state": lambda folder: shutil.rmtree(folder / "state"),
    "run": lambda folder: next((folder / "run").glob("metadata")).write_text(""),
    "all": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS.keys())
def test_torn_newest_checkpoint_is_set_aside(tmp_path, tear):
    _save(tmp_path, 1, 2)
    tear(tmp_path / "2")
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        restored = _restore(checkpoints, _abstract())
        assert restored.step == 1
        _same(restored.state, _state(1))
        assert _names(tmp_path) == ["1", "unreadable-2"]
        assert checkpoints.latest_step() == 1
        assert checkpoints.save(2, _state(2))
        _same(_restore(checkpoints, _abstract()).state, _state(2))


@pytest.mark.usefixtures("settled")
def test_only_checkpoint_torn_is_one_line_and_stays(tmp_path):
    _save(tmp_path, 1)
    _truncate(tmp_path / "1")
    with pytest.raises(InputError, match=r"1 cannot be read .*remove that folder") as error:
        _restore(Checkpoints(tmp_path, SETTINGS), _abstract())
    assert "\n" not in str(error.value)
    assert _names(tmp_path) == ["1"]


@pytest.mark.parametrize(
    ("step", "params", "culprit"),
    [
        (jax.ShapeDtypeStruct((2,), jnp.int32), {}, "step=int32[], this run has step=int32[2]"),
        (jax.ShapeDtypeStruct((), jnp.uint32), {}, "step=int32[], this run has step=uint32[]"),
        (None, {"new": jax.random.key(0)}, "nothing, this run has params.new=uint32[2]"),
        (None, {"low": {}}, "params.low=bfloat16[4], this run has params.low=nothing"),
    ],
)
def test_another_tree_is_refused_by_name_and_nothing_set_aside(tmp_path, step, params, culprit):
    _save(tmp_path, 1, 2)
    wrong = _abstract()
    wrong = wrong.replace(step=wrong.step if step is None else step, params=wrong.params | params)
    with pytest.raises(InputError, match=re.escape(culprit)):
        Checkpoints(tmp_path, SETTINGS).restore(wrong)
    assert _names(tmp_path) == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"seed": 4}, "seed=3, this run has seed=4"),
        ({"distill": {"alpha": 0.2, "kept": [0, 2]}}, r"distill.kept=\[0, 1\], .*=\[0, 2\]"),
        ({"new": 1}, "new=nothing, this run has new=1"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, change, culprit):
    _save(tmp_path, 1)
    with pytest.raises(InputError, match=culprit):
        Checkpoints(tmp_path, SETTINGS | change).restore(_abstract())


def test_newer_format_is_refused_with_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FORMAT", record.FORMAT + 1)
    _save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(InputError, match="is of format 3, .* reads formats up to 2: go on with"):
        _restore(Checkpoints(tmp_path, SETTINGS), _abstract())


def test_format_1_is_read(tmp_path, monkeypatch):
    first = {"format": 1, "settings": SETTINGS, "extra": {"position": 1}}
    monkeypatch.setattr(record, "record", lambda *_: first)
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(1, _state(1), buffer=_state(2))
    monkeypatch.undo()
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        restored = _restore(checkpoints, _abstract(), buffer=_abstract())
    assert restored.extra == {"position": 1}
    _same((restored.state, restored.buffer), (_state(1), _state(2)))


def test_every_changed_bit_and_every_swap_changes_the_sum_on_any_mesh():
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    wanted = record.sums({"x": jnp.asarray(x)})
    for spec in (("fsdp",), (None, "fsdp")):
        assert record.sums({"x": _state(0, spec).params["x"]}) == wanted
    for word in (0, 1, 17, 31):
        for bit in range(32):
            other = x.copy()
            other.view(np.uint32).reshape(-1)[word] ^= np.uint32(1 << bit)
            assert record.sums({"x": jnp.asarray(other)}) != wanted
    assert record.sums({"x": jnp.asarray(x[:, ::-1])}) != wanted
    kinds = (jnp.bfloat16, jnp.float16, bool, jnp.int8, jnp.uint32)
    for kind in kinds:
        assert record.sums({"x": jnp.ones(3, kind)}) != record.sums({"x": jnp.zeros(3, kind)})


def test_whole_files_with_other_numbers_are_noticed_by_their_sums(tmp_path):
    _save(tmp_path / "a", 1, 2)
    with Checkpoints(tmp_path / "b", SETTINGS) as checkpoints:
        checkpoints.save(2, _state(3), {"position": 2})
    shutil.rmtree(tmp_path / "a" / "2" / "state")
    shutil.copytree(tmp_path / "b" / "2" / "state", tmp_path / "a" / "2" / "state")
    with Checkpoints(tmp_path / "a", SETTINGS) as checkpoints:
        assert _restore(checkpoints, _abstract()).step == 1
    assert _names(tmp_path / "a") == ["1", "unreadable-2"]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("part", range(4))
def test_a_flipped_bit_anywhere_gives_the_previous_checkpoint_or_the_right_one(tmp_path, part):
    _save(tmp_path, 1, 2)
    files = sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file())
    rng = np.random.default_rng(part)
    for file in files[part::4]:
        whole = file.read_bytes()
        if not whole:
            continue
        for place in rng.integers(len(whole), size=3):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(rng.integers(8))
            copy = tmp_path.with_name(f"{tmp_path.name}-{file.name}-{place}")
            shutil.copytree(tmp_path, copy)
            (copy / file.relative_to(tmp_path)).write_bytes(flipped)
            with Checkpoints(copy, SETTINGS) as checkpoints:
                restored = _restore(checkpoints, _abstract())
            assert restored.step in (1, 2) and restored.extra == {"position": restored.step}
            _same(restored.state, _state(restored.step))


def test_remains_of_a_killed_save_are_ignored_and_removed_by_the_next(tmp_path):
    _save(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "9.orbax-checkpoint-tmp")
    _truncate(tmp_path / "9.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        assert _restore(checkpoints, _abstract()).step == 1
        assert "9.orbax-checkpoint-tmp" in _names(tmp_path)
        checkpoints.save(2, _state(2))
    assert _names(tmp_path) == ["1", "2"]


KILLED = """
import os, signal, sys, threading, time
import jax.numpy as jnp
from minillm_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], {})
checkpoints.save(1, {"x": jnp.ones(3_000_000)})
checkpoints.wait()
checkpoints.save(2, {"x": jnp.ones(3_000_000)})
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_run_killed_while_saving_restores_a_whole_checkpoint(tmp_path, delay):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(delay)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], timeout=60)
    assert done.returncode == -signal.SIGKILL
    abstract = {"x": jax.ShapeDtypeStruct((3_000_000,), jnp.float32)}
    restored = _restore(Checkpoints(tmp_path, {}), abstract)
    assert restored.step in (1, 2) and (restored.state["x"] == 1.0).all()


@pytest.fixture
def small_files():
    """The system refuses files above 64 KiB, as a full disk would, but for one process only.

    What it gives lifts that: pytest writes its own log before the fixture ends.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_refused_write_is_one_line_and_leaves_the_earlier_checkpoint(tmp_path, small_files, caplog):
    key = jax.random.key(0)
    big = {"x": jax.random.normal(key, (200_000,))}
    with Checkpoints(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(1, _state(1))
        checkpoints.wait()
        with pytest.raises(InputError, match=r"cannot write .*\(File too large\)") as error:
            checkpoints.save(2, big)
            checkpoints.wait()
        assert "\n" not in str(error.value)
        assert _names(tmp_path) == ["1"]
        _same(_restore(checkpoints, _abstract()).state, _state(1))
        small_files()
        assert checkpoints.save(2, _state(2))
    assert _names(tmp_path) == ["1", "2"]
    assert not caplog.records


def test_error_in_flight_is_not_hidden_by_that_of_the_last_save(tmp_path, small_files):
    big = {"x": jax.random.normal(jax.random.key(0), (200_000,))}
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(1, big)
        raise ZeroDivisionError
    small_files()


def test_no_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(100, 90, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="no space for a checkpoint"):
        Checkpoints(tmp_path, SETTINGS).save(1, _state(1))
    assert _names(tmp_path) == []


def test_path_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*\(Not a directory\)"):
        Checkpoints(tmp_path / "file" / "checkpoints", SETTINGS).save(1, _state(1))


def test_directory_without_permission_is_refused(tmp_path, monkeypatch):
    _save(tmp_path, 1)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InputError, match=r"cannot write .*\(Permission denied\)"):
        Checkpoints(tmp_path, SETTINGS).save(2, _state(2))
    assert _names(tmp_path) == ["1"]
