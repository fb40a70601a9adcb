"""Three families through their whole pipeline at toy size, by different methods."""

import importlib
import json

import jax
import pytest

from minillm_jax import pipeline, trainer
from minillm_jax.data.tokenizer import load_tokenizer
from minillm_jax.models import hf
from minillm_jax.reporting.panels import PANELS
from tests.toy_run import one_device


def run(name, argument, workdir, monkeypatch, devices=1, **settings):
    """Run a config with `:tiny`, on one device, with smaller buffers still."""
    one_device(monkeypatch, devices)
    config = importlib.import_module(f"configs.{name}").get_config(f"{argument},tiny")
    config.data.max_response = 4
    config.data.max_prompt = 64
    config.answers.limit = config.evaluate.prompts = config.evaluate.validation_prompts = 4
    for section in (config.teacher_sft, config.sft, config.distill):
        section.batch_size, section.micro_batch = 4, 2
    for key, value in settings.items():
        section, _, last = key.rpartition("__")
        (config[section] if section else config)[last] = value
    pipeline.execute(config, workdir)
    return json.loads((workdir / "summary.json").read_text())


def rows(workdir, stage, name):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["stage"] == stage]
    return [row[name] for row in found if name in row]


def decoder(folder):
    return hf.open_model(folder).config


def test_gptj_into_gpt2_by_minillm_on_the_answers_of_the_data(tmp_path, monkeypatch, shared):
    monkeypatch.setenv("MINILLM_SHARED", str(shared))
    keep = {"teacher_sft__keep": "loss", "distill__chunk": 2}
    summary = run("gptj_to_gpt2", "student=gpt2-xl", tmp_path / "run", monkeypatch, **keep)
    stages = ["teacher_sft", "student_sft", "distill", "evaluate"]
    assert list(summary["stages"]) == stages
    assert list(summary["models"]) == ["teacher", "start", "sft", "minillm"]
    teacher = decoder(tmp_path / "run" / "scratch" / "gptj-2x64")
    assert (teacher.vocab_size, teacher.rope_dim, teacher.parallel_residual) == (50400, 8, True)
    student = decoder(tmp_path / "run" / "stages" / "distill" / "model")
    assert (student.vocab_size, student.positions, student.layers) == (50257, "learned", 2)
    tuned = hf.load(tmp_path / "run" / "stages" / "teacher_sft" / "model")
    raw = hf.load(tmp_path / "run" / "scratch" / "gptj-2x64")
    assert (tuned.params["embed"]["tokens"] != raw.params["embed"]["tokens"]).any()
    workdir = tmp_path / "run"
    assert len(rows(workdir, "distill", "corpus_loss")) == 4
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    measured = {name for line in lines for name in json.loads(line)}
    assert {series.metric for panel in PANELS for series in panel.series} <= measured
    for score in ("valid_reverse_kl", "valid_rouge_l"):
        assert rows(workdir, "distill", score)


@pytest.mark.parametrize(("name", "devices"), [("opt_13b_to_opt", 2), ("qwen2_5_7b_to_1_5b", 1)])
def test_a_pair_by_minillm_where_no_real_data_is_at_hand(name, devices, tmp_path, monkeypatch):
    """With two devices parameters and batches are split over both."""
    monkeypatch.setenv("MINILLM_SHARED", str(tmp_path / "nothing"))
    split, fit = [], trainer.fit

    def observed(method, state, frozen, batches, *rest, put, **options):
        for tree in (state.params, put(batches[0]), frozen):
            leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
            split.append(any(not leaf.is_fully_replicated for leaf in leaves) or not leaves)
        return fit(method, state, frozen, batches, *rest, put=put, **options)

    monkeypatch.setattr(trainer, "fit", observed)
    settings = {"mesh__data": 1, "mesh__fsdp": devices, "distill__chunk": 2}
    summary = run(name, "", tmp_path / "run", monkeypatch, devices, **settings)
    assert list(summary["stages"]) == ["teacher_sft", "student_sft", "distill", "evaluate"]
    assert list(summary["models"]) == ["teacher", "start", "sft", "minillm"]
    assert len(rows(tmp_path / "run", "distill", "corpus_loss")) == 4
    assert len(list((tmp_path / "run").glob("corpus-*.npy"))) == 1
    assert len(split) == 9 and (devices == 1 or all(split))  # three stages that train


def test_opt_by_seqkd_where_no_real_data_is_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_SHARED", str(tmp_path / "nothing"))
    argument = "student=opt-1.3b,method=seqkd"
    summary = run("opt_13b_to_opt", argument, tmp_path / "run", monkeypatch)
    assert list(summary["stages"]) == ["teacher_sft", "teacher_answers", "distill", "evaluate"]
    assert list(summary["models"]) == ["teacher", "start", "seqkd"]
    student = decoder(tmp_path / "run" / "stages" / "distill" / "model")
    assert (student.norm_first, student.embed_width, student.width) == (False, 16, 32)
    made = load_tokenizer(tmp_path / "run" / "scratch" / "tokenizer")
    assert student.vocab_size == made.vocab_size + 7
    answers = tmp_path / "run" / "stages" / "teacher_answers" / "answers.jsonl"
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {row["split"] for row in written} == {"train"} and len(written) == 4
    judged = (tmp_path / "run" / "evaluate" / "answers.jsonl").read_text().splitlines()
    assert json.loads(judged[0])["reference"].startswith("The answer is ")


def test_qwen3_by_kd_with_a_teacher_that_is_fine_tuned_already(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_SHARED", str(tmp_path / "nothing"))
    tests = tmp_path / "more.jsonl"
    tests.write_text('{"instruction": "Name a bird.", "output": ["A crow.", "A robin."]}\n')
    teacher = "scratch:qwen3-2x64"
    summary = run(
        "qwen3_8b_to_0_6b", "method=kd", tmp_path / "run", monkeypatch,
        teacher__fine_tuned=teacher, data__more_tests=(f"birds={tests}",),
    )  # fmt: skip
    assert list(summary["stages"]) == ["distill", "evaluate"]
    assert list(summary["models"]) == ["teacher", "start", "kd"]
    assert all("rouge_l_birds" in model for model in summary["models"].values())
    student = decoder(tmp_path / "run" / "stages" / "distill" / "model")
    assert student.qk_norm and (student.heads, student.kv_heads, student.head_dim) == (4, 2, 16)
    sizes = {decoder(tmp_path / "run" / "scratch" / f"qwen3-2x{w}").vocab_size for w in (64, 32)}
    true = load_tokenizer(tmp_path / "run" / "scratch" / "tokenizer").vocab_size
    assert len(sizes) == 2 and min(sizes) > true  # padded, and not alike
    assert len(rows(tmp_path / "run", "distill", "loss")) == 2


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neo", "opt_350m", "llama", "qwen2"])
def test_models_from_scratch_are_written_once_and_load(family, tmp_path, monkeypatch):
    from minillm_jax import scratch

    monkeypatch.setenv("MINILLM_SHARED", str(tmp_path / "nothing"))
    folder = scratch.model(f"scratch:{family}-3x32", tmp_path)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert scratch.model(f"scratch:{family}-3x32", tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    found = hf.load(folder)
    assert (found.config.layers, found.config.width) == (3, 32)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size <= found.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("Name two birds.")) == "Name two birds."
    if family == "gpt_neo":
        assert found.config.windows == (None, 16, None)
