"""Answering and chatting from the command line, on a toy model."""

import io
import shutil
import types

import jax
import numpy as np
import pytest
from gguf import GGUFWriter

from minillm_jax import rollout
from minillm_jax.data.templates import alpaca
from minillm_jax.data.tokenizer import load_tokenizer
from minillm_jax.models import gguf, head, hf, hidden_states, logits
from minillm_jax.models.weights import disassemble, family_of
from tests.toy_run import command, compilation_cache, write_teacher

NAMES = {theirs: ours for ours, theirs in gguf._NAMES.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "compiled"
    with compilation_cache(cache):
        yield write_teacher(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def say(model, monkeypatch, capsys):
    """Run generate and return the lines it prints."""

    def run(*words, model=model, stdin=None):
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = command(monkeypatch, "generate", f"--model={model}", "--max_tokens=8", *words)
        out, err = capsys.readouterr()
        assert code == 0, err
        return out.splitlines()

    return run


@pytest.fixture
def heard(monkeypatch, model):
    """The prompts as the model would get them, as text; it answers `yes` to all of them."""
    tokenizer, found = load_tokenizer(model), []

    def generate(config, params, prompt, mask, key, *, slots, **_):
        assert prompt.shape[1] + slots <= config.max_positions
        found.append(prompt[0][mask[0]].tolist())
        answer = np.zeros((1, slots), np.int32)
        answer[0, 0] = tokenizer.encode("yes")[0]
        return types.SimpleNamespace(tokens=answer, mask=np.arange(slots)[None] < 1)

    monkeypatch.setattr(rollout, "generate", generate)
    return found


def test_temperature_0_takes_the_most_likely_token(say, model):
    checkpoint, tokenizer = hf.load(model), load_tokenizer(model)
    params = jax.device_put(checkpoint.params)

    @jax.jit
    def best(tokens, length):
        mask = np.arange(tokens.shape[1])[None] < length
        hidden = hidden_states(checkpoint.config, params, tokens, mask)
        return logits(head(checkpoint.config, params), hidden[0, length - 1]).argmax()

    ids = tokenizer.encode("the red cat")
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(ids)] = ids
    found = []
    for length in range(len(ids), len(ids) + 8):
        found.append(int(best(tokens, length)))
        tokens[0, length] = found[-1]
    assert tokenizer.eos_id not in found
    words = ["--prompt=the red cat", "--template=none", "--temperature=0"]
    assert say(*words) == [tokenizer.decode(found)]
    assert say(*words, "--seed=1") == [tokenizer.decode(found)]


def test_the_seed_decides_the_draw_and_the_nucleus_narrows_it(say):
    hot = ["--prompt=the red cat", "--template=none", "--temperature=3"]
    first = say(*hot)
    assert say(*hot) == first
    assert say(*hot, "--seed=1") != first
    greedy = say("--prompt=the red cat", "--template=none", "--temperature=0")
    assert first != greedy
    assert say(*hot, "--top_k=1") == greedy
    assert say(*hot, "--top_p=0.0001") == greedy


def test_no_ngram_comes_twice(say):
    words = ["--prompt=the red cat", "--template=none", "--temperature=0", "--max_tokens=24"]
    free = say(*words)[0].split()
    assert len(set(free)) < len(free)
    banned = say(*words, "--no_repeat_ngram=1")[0].split()
    assert len(set(banned)) == len(banned)
    assert not {"the", "red", "cat"} & set(banned)


def test_the_templates(say, heard, model):
    tokenizer = load_tokenizer(model)
    assert say("--prompt=what is red", "--template=none") == ["yes"]
    say("--prompt=what is red", "--template=alpaca")
    say("--prompt=name two", "--input=red blue", "--template=alpaca")
    say("--prompt=what is red")
    say("--prompt=name two", "--input=red blue")
    assert heard == [
        tokenizer.encode("what is red"),
        tokenizer.encode(alpaca("what is red")),
        tokenizer.encode(alpaca("name two", "red blue")),
        tokenizer.chat_prompt("what is red"),
        tokenizer.chat_prompt("name two\n\nred blue"),
    ]


def test_lines_of_a_pipe_are_turns_and_an_empty_one_begins_anew(say, heard, model):
    tokenizer = load_tokenizer(model)
    assert say(stdin="what is red\nwhy\n\nname two\n") == ["yes"] * 3
    turns = [("user", "what is red"), ("assistant", "yes"), ("user", "why")]
    second = [{"role": role, "content": text} for role, text in turns]
    assert heard == [
        tokenizer.chat_prompt("what is red"),
        tokenizer.chat_prompt(second),
        tokenizer.chat_prompt("name two"),
    ]


def test_a_chat_that_outgrows_the_model_forgets_its_oldest_turns(say, heard, model):
    tokenizer = load_tokenizer(model)
    line = "red blue " * 25  # 50 tokens; the model has 128 positions
    assert say(stdin=f"{line}\n" * 4) == ["yes"] * 4
    assert [len(ids) > len(heard[0]) for ids in heard] == [False, True, True, True]
    assert heard[3] == heard[2] == heard[1] != heard[0] == tokenizer.chat_prompt(line)


def test_a_work_directory_means_its_newest_student(say, heard, model, tmp_path, monkeypatch):
    opened = []
    load = hf.load
    monkeypatch.setattr(hf, "load", lambda path: opened.append(path) or load(path))
    for stage in ("student_sft", "distill"):
        shutil.copytree(model, tmp_path / "stages" / stage / "model")
        for folder in (tmp_path, tmp_path / "stages" / stage):
            say("--prompt=why", model=folder)
            assert opened.pop() == tmp_path / "stages" / stage / "model"


def write_gguf(path, folder):
    """The toy model as llama.cpp would have converted it, with a vocabulary of whole words."""
    checkpoint, tokenizer = hf.load(folder), load_tokenizer(folder)
    config, family = checkpoint.config, family_of(checkpoint.hf_config)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word.replace(".", "x") for word in tokenizer.token_strings()])
    writer.add_token_types([1] * tokenizer.vocab_size)
    writer.add_token_merges([])
    writer.add_eos_token_id(1)
    for name, array in disassemble(config, checkpoint.params, family):
        parts = name.removeprefix("model.layers.").split(".")
        stem, suffix = name.rsplit(".", 1)
        ours = NAMES.get(stem)
        if parts[0].isdigit():
            ours = f"blk.{parts[0]}.{NAMES['.'.join(parts[1:-1])]}"
        if stem.endswith(("q_proj", "k_proj")):
            heads = config.heads if stem.endswith("q_proj") else config.kv_heads
            pairs = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{ours}.{suffix}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_answers_as_its_folder(say, model, tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "toy.gguf", model)
    ids = load_tokenizer(model).encode("the red cat")
    # The vocabularies of the two kinds split words differently: the same ids for both.
    monkeypatch.setattr("minillm_jax.data.tokenizer.Tokenizer.encode", lambda *_: ids)
    monkeypatch.setattr(
        "minillm_jax.data.tokenizer.Tokenizer.decode", lambda _, found: " ".join(map(str, found))
    )
    words = ["--prompt=x", "--template=none", "--temperature=0"]
    assert say(*words, model=file) == say(*words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model="], "no model given: add --model DIR"),
        (["--model=/no/where"], "/no/where: no such file or folder; give one that holds a model"),
        (["--model=pip:nothing"], "is not of the form pip:NAME==VERSION"),
        (["--prompt= "], "the prompt is empty: write something after --prompt"),
        (["--temperature=-1"], "--temperature=-1.0: give a number that is at least 0"),
        (["--top_p=0"], "--top_p=0.0: give a number that is above 0 and at most 1"),
        (["--top_k=-1"], "--top_k=-1: give a number that is at least 0"),
        (["--top_k=x"], "--top_k=x: give a whole number, such as 0"),
        (["--max_tokens=0"], "--max_tokens=0: give a number that is at least 1"),
        (["--no_repeat_ngram=-2"], "--no_repeat_ngram=-2: give a number that is at least 0"),
        (["--template=mine"], "--template=mine: "),
        (["--promt=x"], "no flag --promt: did you mean --prompt?"),
        (["what"], "write --prompt='what'"),
        (["--prompt=" + "red " * 200], "tokens: the model takes 128 with the answer; shorten it"),
        (["--prompt=x", "--max_tokens=128"], "lower --max_tokens=128"),
    ],
)
def test_a_wrong_word(model, monkeypatch, capsys, words, says):
    assert command(monkeypatch, "generate", f"--model={model}", *words) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("error: ") and err.count("\n") == 1 and not out


def test_folders_that_hold_no_model(tmp_path, monkeypatch, capsys):
    for file, says in (
        ("other.txt", "config.json"),
        ("metrics.jsonl", "is a work directory without a student yet: run student_sft first"),
    ):
        (tmp_path / file).touch()
        assert command(monkeypatch, "generate", f"--model={tmp_path}", "--prompt=x") == 2
        err = capsys.readouterr().err
        assert says in err and str(tmp_path) in err and err.count("\n") == 1


def test_a_checkpoint_of_training_says_where_the_model_is(tmp_path, monkeypatch, capsys):
    step = tmp_path / "stages/distill/checkpoints/20"
    (step / "state").mkdir(parents=True)
    assert command(monkeypatch, "generate", f"--model={step}", "--prompt=x") == 2
    err = capsys.readouterr().err
    says = (
        f"{step} is a checkpoint of training; its stage's model is {tmp_path}/stages/distill/model"
    )
    assert says in err and err.count("\n") == 1
