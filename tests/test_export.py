"""Exports: what transformers makes of them, their types, and what is refused."""

import errno

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from minillm_jax.data.tokenizer import Tokenizer, load_tokenizer
from minillm_jax.models import head, hf, hidden_states, logits
from tests.toy_run import command, write_teacher


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A work directory with two students that differ."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").touch()
    write_teacher(folder / "stages" / "student_sft" / "model", seed=1)
    write_teacher(folder / "stages" / "distill" / "model", seed=2)
    return folder


@pytest.fixture
def export(monkeypatch, capsys):
    """Run export; returns what it printed, or the one line with which it refused."""

    def call(*words, code=0):
        assert command(monkeypatch, "export", *words) == code
        out, err = capsys.readouterr()
        if code:
            assert err.startswith("error: ") and err.count("\n") == 1 and not out
        return err if code else out

    return call


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [None, "student_sft"])
def test_transformers_computes_the_same_logits(run, export, tmp_path, stage):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    words = [f"--stage={stage}"] if stage else []
    assert export(f"--model={run}", f"--output={out}", *words) == f"{out}\n"
    source = hf.load(run / "stages" / (stage or "distill") / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "the red cat is not small"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == load_tokenizer(run / "stages" / "distill" / "model").encode(text)
    tokens = jnp.array([ids])
    params = jax.device_put(source.params)
    hidden = hidden_states(source.config, params, tokens, jnp.ones_like(tokens, bool))
    ours = logits(head(source.config, params), hidden)
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits.numpy()
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(ours / scale, wanted / scale, atol=1e-5)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why"}], add_generation_prompt=True, return_dict=False
    )
    assert chat == load_tokenizer(out).chat_prompt("why")


def test_the_type_of_the_weights(run, export, tmp_path):
    for name, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        out = tmp_path / name
        export(f"--model={run}", f"--output={out}", f"--dtype={name}")
        tensors = load_file(out / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}
        assert f'"torch_dtype": "{name}"' in (out / "config.json").read_text()
    small, large = hf.load(tmp_path / "bfloat16"), hf.load(tmp_path / "float32")
    assert jax.tree.structure(small.params) == jax.tree.structure(large.params)
    for a, b in zip(jax.tree.leaves(small.params), jax.tree.leaves(large.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-8)


def test_a_folder_in_use_is_refused_and_left_alone(run, export, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    words = [f"--model={run}", f"--output={tmp_path}"]
    assert f"{tmp_path} is there already and not empty" in export(*words, code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    words = [f"--model={run}", f"--output={tmp_path / 'mine.txt'}"]
    assert "remove it or choose another" in export(*words, code=2)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(f"--model={run}", f"--output={tmp_path / 'empty'}")


def test_what_is_missing_or_wrong_is_named(run, export, tmp_path):
    out = f"--output={tmp_path / 'out'}"
    for words, says in (
        ([f"--model={run}"], "--output is missing"),
        ([out], "--model is missing"),
        (["--model=/no/where", out], "/no/where: no such file or folder"),
        ([f"--model={run}", out, "--dtype=int8"], "--dtype=int8"),
        ([f"--model={run}", out, "--stage=evaluate"], "--stage=evaluate"),
        ([f"--model={tmp_path}", out, "--stage=distill"], "is not there: run that stage first"),
        ([f"--model={tmp_path}", out], str(tmp_path)),
        ([f"--model={run}", out, "more"], "'more' is no flag"),
    ):
        assert says in export(*words, code=2)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_be_finished_leaves_nothing(run, export, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "tokenizer.json")

    monkeypatch.setattr(Tokenizer, "save", full)
    line = export(f"--model={run}", f"--output={tmp_path / 'out'}", code=2)
    assert "No space left on device; free some space or choose another folder" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_export_can_be_exported_again(run, export, tmp_path):
    export(f"--model={run}", f"--output={tmp_path / 'a'}")
    export(f"--model={tmp_path / 'a'}", f"--output={tmp_path / 'b'}")
    first, second = (hf.load(tmp_path / name) for name in "ab")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
