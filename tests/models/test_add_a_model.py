"""The worked example of docs/add_a_model.md, run as it stands there."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from golden import make
from test_families import assert_same, live, our_logits

from minillm_jax.models import families, hf
from minillm_jax.types import InputError

DOC = Path(__file__).parents[2] / "docs/add_a_model.md"
NAME = "starcoder2"


@pytest.fixture
def example(monkeypatch):
    """The family of the document, among those that are shipped for as long as a test takes."""
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    (source,) = [block for block in blocks if "FAMILY = Family(" in block]
    module = types.ModuleType("starcoder2")
    monkeypatch.setitem(sys.modules, "starcoder2", module)
    exec(compile(source, str(DOC), "exec"), module.__dict__)
    assert NAME not in families.FAMILIES
    monkeypatch.setitem(families.FAMILIES, NAME, module.FAMILY)
    return source


def test_it_keeps_the_rules_of_a_family(example):
    from test_layering import _complaints

    assert not _complaints(f"minillm_jax/models/families/{NAME}.py", example)


def test_its_logits_equal_the_golden_ones(example, tmp_path):
    golden = make.write_folder(NAME, tmp_path)
    logits = our_logits(hf.load(tmp_path), golden["tokens"], golden["mask"])
    assert_same(logits, golden["logits"], golden["mask"])


def test_without_it_the_model_is_refused(tmp_path):
    make.write_folder(NAME, tmp_path)
    with pytest.raises(InputError, match="'starcoder2' is not supported; choose one of gpt2, "):
        hf.load(tmp_path)


@live
def test_its_logits_equal_those_of_torch_there_and_back(example, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = make.build(NAME, seed=7)
    make.save(model, tmp_path / "theirs")
    tokens, mask = make.batch()
    wanted = make.torch_logits(model, tokens, mask)
    checkpoint = hf.load(tmp_path / "theirs")
    assert_same(our_logits(checkpoint, tokens, mask), wanted, mask)
    hf.save(tmp_path / "ours", checkpoint.config, checkpoint.params, checkpoint.hf_config)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(make.torch_logits(again, tokens, mask)[mask], wanted[mask])
