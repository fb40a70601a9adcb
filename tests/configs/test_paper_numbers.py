"""Every config of a pair against the paper's hyper-parameters, written down here a second time."""

import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest

from configs import paper
from configs.common import base
from minillm_jax import pipeline, recipe
from minillm_jax.build import Builder
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.recipe import schedule
from tests.toy_run import one_device

# config: (teacher's SFT rate and epochs, MiniLLM's schedule, {student: SFT rate, full epochs})
PAIRS = {
    "gpt2_xl_to_gpt2": (
        (5e-5, 10),
        "constant",
        {"gpt2": (5e-4, 20), "gpt2-medium": (1e-4, 20), "gpt2-large": (1e-4, 10)},
    ),
    "gptj_to_gpt2": (
        (1e-5, 10),
        "constant",
        {"gpt2-large": (1e-4, 10), "gpt2-xl": (5e-5, 10), "gpt-neo-2.7B": (5e-5, 10)},
    ),
    "opt_13b_to_opt": (
        (1e-5, 10),
        "constant",
        {"opt-1.3b": (5e-5, 10), "opt-2.7b": (5e-5, 10), "opt-6.7b": (1e-5, 10)},
    ),
    "llama_13b_to_7b": ((1e-5, 10), "cosine", {"llama-7b": (1e-5, 10)}),
    "qwen2_5_7b_to_1_5b": ((1e-5, 10), "cosine", {"qwen2.5-1.5b": (1e-5, 10)}),
    "qwen3_8b_to_0_6b": ((1e-5, 10), "cosine", {"qwen3-0.6b": (1e-5, 10)}),
}
TEACHERS = {
    "gpt2_xl_to_gpt2": "openai-community/gpt2-xl",
    "gptj_to_gpt2": "EleutherAI/gpt-j-6b",
    "opt_13b_to_opt": "facebook/opt-13b",
    "llama_13b_to_7b": "huggyllama/llama-13b",
    "qwen2_5_7b_to_1_5b": "Qwen/Qwen2.5-7B",
    "qwen3_8b_to_0_6b": "Qwen/Qwen3-8B-Base",
}
HUB = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "gpt-neo-2.7B": "EleutherAI/gpt-neo-2.7B",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "llama-7b": "huggyllama/llama-7b",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
}
STUDENTS = [(name, student) for name, (_, _, students) in PAIRS.items() for student in students]
ADAM = {"weight_decay": 1e-2, "b2": 0.999, "clip_norm": 1.0, "schedule": "cosine", "warmup": 0}
MINILLM = {
    "steps": 5000, "epochs": 0.0, "batch_size": 64, "rollouts": 256, "inner_epochs": 4,
    "learning_rate": 5e-6, "warmup": 100, "weight_decay": 1e-6, "b2": 0.95, "clip_norm": 1.0,
    "alpha": 0.2, "collect_batch": 64, "evaluate_every": 100, "save_every": 500, "keep": "rouge_l",
}  # fmt: skip
FULL = ["teacher_sft", "student_sft", "distill", "evaluate", "report"]
STAGES = {
    "minillm": FULL,
    "sft": ["teacher_sft", "student_sft", "evaluate", "report"],
    "kd": ["teacher_sft", "distill", "evaluate", "report"],
    "seqkd": ["teacher_sft", "teacher_answers", "distill", "evaluate", "report"],
}


def config_of(name, argument=""):
    return importlib.import_module(f"configs.{name}").get_config(argument)


def section(config, name):
    return Builder(config).section(name)


def has(section, **numbers):
    return {name: section[name] for name in numbers} == numbers


@pytest.mark.parametrize(("name", "student"), STUDENTS)
@pytest.mark.parametrize("method", STAGES)
def test_a_pair_has_the_numbers_of_the_paper(name, student, method, monkeypatch):
    one_device(monkeypatch)
    (teacher_rate, teacher_epochs), kind, students = PAIRS[name]
    rate, epochs = students[student]
    config = config_of(name, f"student={student},method={method}")
    assert (config.teacher.path, config.student.path) == (TEACHERS[name], HUB[student])
    assert (config.teacher.dtype, config.student.dtype) == ("bfloat16", "bfloat16")
    assert config.data.template == ("alpaca_qwen" if "qwen" in name else "alpaca")
    assert config.dropout is True and config.seed == 10
    assert (config.mesh.data, config.mesh.fsdp) == ((-1, 1) if name[:4] == "gpt2" else (1, -1))
    assert (config.data.max_prompt, config.data.max_response) == (256, 256)
    assert config.data.max_answer == 480  # with its prompt, an answer has up to 512 tokens
    assert config.teacher.temperature == 1.0
    assert (config.answers.source, config.evaluate.validation_prompts) == ("data", 1000)
    full = {"batch_size": 32, "keep": "rouge_l", "remat": "dots" if name[:4] == "gpt2" else "full"}
    teacher = section(config, "teacher_sft")
    assert has(teacher, **ADAM, **full, learning_rate=teacher_rate, epochs=teacher_epochs)
    if method == "minillm":
        start = section(config, "sft")
        assert has(start, **ADAM, learning_rate=rate, epochs=3, batch_size=32, keep="loss")
        assert has(section(config, "distill"), **MINILLM, schedule=kind)
        assert (config.corpus.coefficient, config.corpus.kd_ratio) == (1.0, 0.0)
        assert config.corpus.files == (paper.CORPUS,)
        assert recipe.policy(section(config, "distill")) == replace(
            PRESETS["corrected"], reward_scaling=0.5
        )
    else:
        trained = section(config, "sft" if method == "sft" else "distill")
        assert has(trained, **ADAM, **full, learning_rate=rate, epochs=epochs)
    if method == "kd":
        assert Builder(config).config.distill.kd_ratio == 0.5
    assert list(pipeline.planned(Builder(config)).stages) == STAGES[method]


def test_the_geometry_of_the_paper_follows():
    config = config_of("gpt2_xl_to_gpt2")
    minillm = schedule(dict(config.distill), 11_435, on_policy=True)
    assert minillm.updates_per_round == 16
    assert math.ceil(minillm.steps / 16) * 256 == pytest.approx(80_000, rel=0.01)  # prompts
    sft = schedule(dict(config.teacher_sft) | {"save_every": 0}, 11_435)
    assert (sft.evaluate_every, sft.steps) == (357, 3570)  # as the reference counts them


def test_a_dry_run_says_what_is_left_out_and_how_batches_are_cut(monkeypatch, tmp_path):
    one_device(monkeypatch)
    config = config_of("gpt2_xl_to_gpt2", "student=gpt2-medium")
    config.teacher.fine_tuned = config.student.fine_tuned = str(tmp_path)
    found = pipeline.describe(config, tmp_path / "run")
    assert [(s["stage"], s["state"]) for s in found["stages"]] == [
        ("teacher_sft", f"skipped: config.teacher.fine_tuned={tmp_path}"),
        ("student_sft", f"skipped: config.student.fine_tuned={tmp_path}"),
        ("distill", "to do"),
        ("evaluate", "to do"),
        ("report", "to do"),
    ]
    cut = found["geometry"]["distill"]
    assert (cut["batch"], cut["micro_batches"], cut["updates"]) == (64, 32, 5000)
    assert "sft" not in found["geometry"] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("student=gpt3", "no student `gpt3`: choose from gpt2, gpt2-medium, gpt2-large"),
        ("method=dpo", "no method `dpo`: choose from minillm, sft, kd, seqkd"),
        ("small", "no argument `small`: choose from student=NAME, method=NAME, tiny"),
        ("tiny=yes", "no argument `tiny=yes`"),
        ("student", "no argument `student`"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_choices(argument, says):
    with pytest.raises(ValueError) as error:
        config_of("gpt2_xl_to_gpt2", argument)
    assert says in str(error.value)


def test_arguments_may_come_in_any_order():
    students = ("a", "b")
    assert paper.arguments("", students) == ("a", "minillm", False)
    assert paper.arguments("tiny,method=kd,student=b", students) == ("b", "kd", True)


EXPERIMENTS = sorted(
    file.stem
    for file in Path(paper.__file__).parent.glob("*.py")
    if file.stem not in ("common", "paper", "__init__")
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_tiny(name, monkeypatch, tmp_path):
    one_device(monkeypatch)
    found = pipeline.describe(config_of(name, "tiny"), tmp_path / "run")
    assert found["config"]["teacher"]["path"].startswith("scratch:")
    assert {"distill", "evaluate"} <= {stage["stage"] for stage in found["stages"]}
    assert len(PAIRS) + 3 == len(EXPERIMENTS)


def test_there_are_not_too_many_settings():
    def leaves(tree):
        return sum(leaves(v) if isinstance(v, dict) else 1 for v in tree.values())

    assert leaves(base().to_dict()) <= 100
