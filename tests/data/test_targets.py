"""Kept targets: what is written comes back, and what is torn or of other rows does not."""

import ml_dtypes
import numpy as np
import pytest

from minillm_jax.data.examples import Example
from minillm_jax.data.targets import Given, Targets
from minillm_jax.types import InputError, Sequences

EXAMPLES = [Example((1, 2), (3,) * (1 + row % 3), 10 * row) for row in range(5)]


def states(example, dtype=np.float32):
    return (np.arange(2 * len(example.response)).reshape(-1, 2) + example.row).astype(dtype)


def written(folder, dtype=np.float32):
    targets = Targets(folder / "states", EXAMPLES, 2, "teacher float32")
    for index in targets.missing():
        targets.write(index, [states(row, dtype) for row in targets.shards()[index]])
    return targets


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_batches_get_the_states_of_their_rows(tmp_path, dtype):
    class Batches:
        def examples(self, i):
            return [EXAMPLES[4], EXAMPLES[i]]

        def __getitem__(self, i):
            zeros = np.zeros((2, 4), np.int32)
            return Sequences(zeros, zeros > 0, zeros, zeros > 0)

    def wrap(batch, kept):
        return kept.view(dtype)

    hidden = Given(Batches(), written(tmp_path, dtype).read(), wrap)[2]
    assert hidden.shape == (2, 4, 2) and hidden.dtype == dtype
    for found, example in zip(hidden, (EXAMPLES[4], EXAMPLES[2]), strict=True):
        want = np.zeros((4, 2), dtype)
        want[: len(example.response)] = states(example, dtype)
        np.testing.assert_array_equal(found, want)


def test_records_come_back_by_field(tmp_path):
    kind = np.dtype([("ids", np.int32, (2,)), ("log_p", np.float32, (3,))])
    targets = Targets(tmp_path / "states", EXAMPLES[:2], 2, "teacher")
    records = [np.zeros(len(example.response), kind) for example in EXAMPLES[:2]]
    records[1]["ids"], records[1]["log_p"] = [[4, 5], [6, 7]], [[-1, -2, -3], [-4, -5, -np.inf]]
    targets.write(0, records)
    found = targets.read()
    assert set(found) == {0, 10} and found[10].dtype == kind
    for name in kind.names or ():
        np.testing.assert_array_equal(found[10][name], records[1][name])


def test_only_what_is_missing_is_written_again(tmp_path):
    targets = written(tmp_path)
    assert targets.missing() == []
    (targets.folder / "00001.json").unlink()  # as after a kill between the two files
    data = (targets.folder / "00002.npy").read_bytes()
    (targets.folder / "00002.npy").write_bytes(data[:-1] + b"x")
    assert targets.missing() == [1, 2]
    with pytest.raises(InputError, match="00001.npy: not there; delete .* and run again"):
        targets.read()
    stamp = (targets.folder / "00000.npy").stat().st_mtime_ns
    assert written(tmp_path).missing() == []
    assert (targets.folder / "00000.npy").stat().st_mtime_ns == stamp


def test_other_answers_or_another_teacher_are_noticed(tmp_path):
    targets = written(tmp_path)
    for examples, teacher in (
        ([*EXAMPLES[:-1], Example((1, 2), (9,), 40)], "teacher float32"),
        (EXAMPLES, "teacher bfloat16"),
    ):
        other = Targets(targets.folder, examples, 2, teacher)
        assert other.missing() == ([2] if teacher == targets.teacher else [0, 1, 2])
        with pytest.raises(InputError, match="made of other answers, or of another teacher"):
            Targets(targets.folder, examples[-1:] + examples[1:], 2, teacher).read()
    (targets.folder / "00002.npy").write_bytes(b"")
    with pytest.raises(InputError, match="00002.npy: it is not what was written"):
        targets.read()
