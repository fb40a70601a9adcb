"""Readers of safetensors and GGUF on foreign bytes: a line, no crash, no hang, no memory."""

import json
import struct
import tracemalloc
from datetime import timedelta

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm_jax.data import gguf_vocabulary
from minillm_jax.models import gguf, shards
from minillm_jax.types import InputError

MOST = 20e6  # bytes that a reader of a file of a few hundred may take
quick = settings(
    max_examples=60,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def refused_or_read(reader, path, data):
    """Read `data`; what is read is read to the end, with what a tensor raises for its caller."""
    path.write_bytes(data)
    tracemalloc.start()  # and stopped at once: making examples under it takes many times as long
    try:
        _read(reader, path, len(data))
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def _read(reader, path, size):
    try:
        found = reader(path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error).strip()
        found = {}
    for tensor in found.values():
        if tensor.dtype not in shards._FLOATS or np.prod(tensor.shape, dtype=float) > size:
            continue
        try:
            tensor.read()
        except (InputError, ValueError, OSError, IndexError, TypeError):
            pass


numbers = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1, 10**30]),
    st.booleans(), st.floats(), st.none(), st.text(max_size=3),
)  # fmt: skip
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F99", 3, None]),
        "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
        "data_offsets": st.one_of(st.lists(numbers, max_size=3), numbers),
    },
)


@quick
@given(
    header=st.one_of(
        st.dictionaries(st.text(max_size=4), st.one_of(entries, numbers), max_size=4),
        st.lists(entries, max_size=2),
    ),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    body=st.binary(max_size=64),
)
def test_safetensors(tmp_path, header, length, body):
    text = json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    refused_or_read(shards._safetensors, tmp_path / "a.safetensors", size + text + body)


@quick
@given(data=st.binary(max_size=200))
def test_safetensors_of_any_bytes(tmp_path, data):
    refused_or_read(shards._safetensors, tmp_path / "a.safetensors", data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A small GGUF file, of settings, lists and a tensor."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    writer.add_token_list(["a", "b", "c"])
    writer.add_array("list", [1, 2, 3])
    writer.add_tensor("token_embd.weight", np.ones((3, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def reader(path):
    """Both readers: that of the tensors and that of the tokenizer."""
    try:
        gguf_vocabulary.metadata(path)
    except InputError as error:
        assert str(path) in str(error)
    return gguf.read(path)[1]


@quick
@given(
    places=st.lists(st.tuples(st.integers(0, 500), st.sampled_from([1, 4, 8])), max_size=4),
    values=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 20), min_size=4, max_size=4),
    cut=st.integers(0, 800),
)
def test_gguf(tmp_path, whole, places, values, cut):
    data = bytearray(whole[: len(whole) - cut if cut < 400 else None])
    for (place, size), value in zip(places, values, strict=False):
        number = (value % 2 ** (8 * size)).to_bytes(size, "little")
        data[place % len(data) : place % len(data) + size] = number
    refused_or_read(reader, tmp_path / "a.gguf", bytes(data))


@quick
@given(counts=st.tuples(*[st.integers(0, 2**64 - 1)] * 2), data=st.binary(max_size=200))
def test_gguf_of_any_bytes(tmp_path, counts, data):
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts)
    refused_or_read(reader, tmp_path / "a.gguf", head + data)
