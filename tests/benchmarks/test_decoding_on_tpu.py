"""What is compiled for a TPU reads its cache once, and by products rather than sums across rows."""

import dataclasses
from importlib.util import find_spec

import pytest

from benchmarks import decoding_on_tpu
from minillm_jax.models import DecoderConfig
from minillm_jax.planning.targets import target

CONFIG = DecoderConfig(
    vocab_size=512, layers=2, width=256, heads=4, mlp_width=512, max_positions=2048, norm="layer",
    positions="learned",
)  # fmt: skip


@pytest.mark.skipif(
    find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_step_moves_what_it_must_in_the_cycles_of_products(head_dim):
    config = dataclasses.replace(CONFIG, head_dim=head_dim)  # each head with a query of its own
    rows, prompt, slots = 512, 16, 1008
    found = decoding_on_tpu.measured(config, target("v5e:1x1"), rows, prompt, slots)
    cache = 2 * 2 * rows * 4 * head_dim * (prompt + slots) * 2
    assert found["cache"] == cache > 1e9
    assert 0.5e6 < found["needed"] - cache * (prompt + slots / 2) / (prompt + slots) < 5e6
    assert 0.9 * cache < found["temporary"] < 1.3 * cache  # the prompts are short
    assert 0.9 * cache < found["bytes"] < 1.1 * cache
    assert 0 < found["cycles"] < 5e-3 * cache  # twice that were each head apart
