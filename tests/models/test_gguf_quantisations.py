"""Every common quantisation of a GGUF file, through a file, against a scalar reading of its blocks.

The `gguf` package cannot quantise the K formats: their blocks are made up here, and decoded here
once more, a number at a time, by the layout of the format.
"""

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from test_gguf import refused, tiny, write

from minillm_jax.models import hf

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "attention_bias": None,
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("kind", "error"),  # the widest of half a step in a block of numbers up to 5
    [
        ("F32", 0.0),
        ("F16", 2e-3),
        ("BF16", 2e-2),
        ("Q8_0", 0.025),
        ("Q5_1", 0.17),
        ("Q5_0", 0.32),
        ("Q4_1", 0.34),
        ("Q4_0", 0.63),
    ],
)
def test_a_quantised_model_is_near_the_one_it_was_made_from(tmp_path, architecture, kind, error):
    config, params, family = tiny(**SIZES, model_type=architecture, head_dim=64)
    kind = GGMLQuantizationType[kind]
    checkpoint = hf.load(write(tmp_path / "tiny.gguf", config, params, family, kind))
    assert checkpoint.config == config

    def near(found, wanted):
        assert np.abs(found - wanted).max() <= error
        scale = wanted.std()
        assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99 or scale == 0

    jax.tree.map(near, checkpoint.params, params)


def half(block, start):
    return float(np.frombuffer(bytes(block[start : start + 2]), np.float16)[0])


def scale_and_offset(packed, i):
    """The i-th 6-bit scale and offset of a K block's 12 bytes."""
    if i < 4:
        return packed[i] & 63, packed[i + 4] & 63
    low, high = packed[i + 4], packed[i - 4] >> 6
    return (low & 15) | high << 4, low >> 4 | (packed[i] >> 6) << 4


def read_q4_or_q5_k(block, five):
    """256 numbers: d, dmin, 12 bytes of scales, (32 of fifth bits), 128 of nibbles."""
    block = [int(byte) for byte in block]
    d, dmin, packed = half(block, 0), half(block, 2), block[4:16]
    fifth, nibbles = (block[16:48], block[48:]) if five else (None, block[16:])
    numbers = []
    for part in range(8):
        scale, offset = scale_and_offset(packed, part)
        for i in range(32):
            byte = nibbles[32 * (part // 2) + i]
            value = byte >> 4 if part % 2 else byte & 15
            if fifth is not None:
                value += 16 * (fifth[i] >> part & 1)
            numbers.append(d * scale * value - dmin * offset)
    return numbers


def read_q6_k(block):
    """256 numbers: 128 bytes of low nibbles, 64 of high pairs of bits, 16 scales, d."""
    low, high = [int(b) for b in block[:128]], [int(b) for b in block[128:192]]
    scales, d = np.frombuffer(bytes(block[192:208]), np.int8), half(block, 208)
    numbers = []
    for i in range(256):
        section, within = divmod(i, 128)
        quarter, column = divmod(within, 32)
        byte = low[64 * section + 32 * (quarter % 2) + column]
        value = byte >> 4 if quarter >= 2 else byte & 15
        value |= (high[32 * section + column] >> 2 * quarter & 3) << 4
        numbers.append(d * int(scales[i // 16]) * (value - 32))
    return numbers


BLOCKS = {  # bytes, where the float16 factors are, and how to read one
    "Q4_K": (144, (0, 2), lambda block: read_q4_or_q5_k(block, five=False)),
    "Q5_K": (176, (0, 2), lambda block: read_q4_or_q5_k(block, five=True)),
    "Q6_K": (210, (208,), read_q6_k),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_made_up_blocks_are_read_as_the_format_lays_them_out(tmp_path, kind):
    size, factors, reader = BLOCKS[kind]
    rng = np.random.default_rng(0)
    made = {}

    def make_up(array, _):
        blocks = rng.integers(0, 256, (array.shape[0], size), np.uint8)
        for start in factors:
            d = rng.uniform(0.001, 0.01, (array.shape[0], 1)).astype(np.float16)
            blocks[:, start : start + 2] = d.view(np.uint8)
        made[array.tobytes()] = blocks
        return blocks

    config, params, family = tiny(**SIZES, model_type="qwen2")
    path = tmp_path / "tiny.gguf"
    write(path, config, params, family, GGMLQuantizationType[kind], quantise=make_up)
    found = hf.load(path).params

    def check(found, original, turned):
        blocks = made[np.ascontiguousarray(original.T if turned else original).tobytes()]
        some = [0, 1, len(blocks) - 1]
        wanted = np.array([reader(block) for block in blocks[some]])
        rows = (found.T if turned else found)[some]
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(rows, wanted, rtol=1e-5, atol=1e-6)

    check(found["embed"]["tokens"], params["embed"]["tokens"], turned=False)
    for path in (("mlp", "down"), ("attn", "q")):
        pair = [tree["layers"][path[0]][path[1]]["kernel"][0] for tree in (found, params)]
        check(*pair, turned=True)


@pytest.mark.parametrize("kind", ["IQ4_XS", "Q2_K", "TQ1_0"])
def test_what_else_the_package_knows_is_read_too(tmp_path, kind):
    """Zero bytes are zeros, minus an offset of zero, in each."""
    from gguf import GGML_QUANT_SIZES

    kind = GGMLQuantizationType[kind]
    size = GGML_QUANT_SIZES[kind][1]
    config, params, family = tiny(**SIZES, model_type="qwen2")

    def zeros(array, _):
        return np.zeros((array.shape[0], size), np.uint8)

    path = write(tmp_path / "tiny.gguf", config, params, family, kind, quantise=zeros)
    assert not hf.load(path).params["layers"]["mlp"]["up"]["kernel"].any()


def test_integers_are_refused(tmp_path):
    config, params, family = tiny(**SIZES, model_type="qwen2")

    class Writer(GGUFWriter):
        def add_tensor(self, name, tensor, **given):
            tensor = tensor.astype(np.int32) if name == "output_norm.weight" else tensor
            super().add_tensor(name, tensor, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_gguf.GGUFWriter", Writer)
        path = write(tmp_path / "tiny.gguf", config, params, family)
    refused(path, "model.norm.weight is of I32, not of floats")
