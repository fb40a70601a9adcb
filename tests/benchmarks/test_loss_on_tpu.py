"""The blocks that a TPU reads are those that its compiler expects fewer cycles of."""

from importlib.util import find_spec

import pytest

from benchmarks import loss_on_tpu
from minillm_jax.planning.targets import target


@pytest.mark.skipif(
    find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)
def test_larger_blocks_move_less_in_fewer_cycles():
    chip = target("v5e:1x1")
    small, large = (
        loss_on_tpu.measured(chip, 32_000, [1024, 1024], 2048, block) for block in (256, 1024)
    )
    head = 32_000 * 1024 * 4  # its gradient, read and written in each of 8 blocks, or of 2
    assert small["bytes"] - large["bytes"] > 6 * head
    assert 0 < large["cycles"] < 0.8 * small["cycles"]
    assert head < large["temporary"] < 1e9
