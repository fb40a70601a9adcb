"""The paper's pairs of models: its pipeline and hyper-parameters, and the argument of its configs.

    --config configs/gpt2_xl_to_gpt2.py:student=gpt2-medium,method=kd,tiny

`student` and `method` choose, `tiny` shrinks the experiment to random models of the same families
and a few rows. Numbers are those of the paper and its scripts as of its release (June 2023); all
sizes are global, over all devices.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.common import METHODS, base
from minillm_jax import recipe
from minillm_jax.methods import registry

DOLLY = "hub:databricks/databricks-dolly-15k"
# The paper's corpus for GPT-2. That of OPT and LLaMA was never released as text; its authors say
# that the mixture hardly matters, and less than one epoch of it is used.
# The branch is the Hub's own conversion of a data set that is a program.
CORPUS = "hub:Skylion007/openwebtext@refs/convert/parquet"


@dataclass(frozen=True)
class Side:
    """One model of a pair: where it is, how it is fine-tuned, and what is like it but tiny.

    `micro_batch` is the reference's number of rows per device (or tensor-parallel group).
    """

    path: str
    learning_rate: float  # of SFT, KD and SeqKD
    epochs: int  # of full SFT, KD and SeqKD
    micro_batch: int
    tiny: str  # a family of minillm_jax.scratch


def arguments(arg: str, students: tuple[str, ...]) -> tuple[str, str, bool]:
    """The student, the method and whether to be tiny, of `student=NAME,method=NAME,tiny`.

    Raises:
        ValueError: an argument or a value that is not there, with those that are.
    """
    given = {"student": students[0], "method": METHODS[0], "tiny": ""}
    choices = {"student": students, "method": METHODS}
    for word in filter(None, arg.split(",")):
        name, has_value, value = word.partition("=")
        if name not in given or bool(has_value) == (name == "tiny"):
            raise ValueError(f"no argument `{word}`: choose from student=NAME, method=NAME, tiny")
        if name == "tiny":
            value = "tiny"
        elif value not in choices[name]:
            raise ValueError(f"no {name} `{value}`: choose from {', '.join(choices[name])}")
        given[name] = value
    return given["student"], given["method"], bool(given["tiny"])


def pair(
    arg: str,
    name: str,
    teacher: Side,
    students: dict[str, Side],
    *,
    schedule: str = "constant",
    template: str = "alpaca",
    sharded: bool = True,
    remat: str = "full",
) -> Any:
    """The settings of `teacher` into the student that `arg` names, by the method that it names.

    `sharded` splits parameters over all devices: a model of 6B with its moments fits none alone.
    `remat` "full" is the reference's gradient checkpointing, which it has for all but GPT-2; no
    figure depends on it but time and memory.
    """
    chosen, method, small = arguments(arg, tuple(students))
    student = students[chosen]
    config: Any = base()
    parts = (name, chosen if len(students) > 1 else "", method if method != METHODS[0] else "")
    config.name = "-".join(filter(None, parts))
    config.method = method
    config.seed = 10  # the reference's for training
    config.dropout = True  # GPT-2 and OPT have 0.1, the others 0: in SFT and KD, not in MiniLLM
    config.teacher.path, config.student.path = teacher.path, student.path
    config.teacher.dtype = config.student.dtype = "bfloat16"  # the reference: fp16

    # The paper's split by `data.splits.paper_split`: 1,000 rows to choose models by, 500 to test.
    config.data.train = config.data.validation = config.data.test = DOLLY
    config.data.template = template
    config.data.max_prompt = config.data.max_response = 256  # 512 together
    config.data.max_answer = 480  # what the shortest prompts leave of 512
    config.data.long_prompts = "drop"
    config.answers.source = "data"  # but for seqkd: one answer per prompt at temperature 1
    config.evaluate.validation_prompts = 1000

    # SFT as in the reference: AdamW (0.9, 0.999), cosine without warm-up, decay 1e-2.
    for stage, side in ((config.teacher_sft, teacher), (config.sft, student)):
        fine_tuning(stage, side)
    if registry.find(method).start == "sft":  # 3 epochs before it, and of those the lowest loss
        config.sft.epochs, config.sft.keep = 3.0, "loss"
    if registry.find(method).kind == "divergence":  # the rates and epochs of SFT
        fine_tuning(config.distill, student)
    else:
        minillm(config.distill, student, schedule)
        config.corpus.files = (CORPUS,)
        config.corpus.kd_ratio = 0.0  # the paper's L_PT; the reference has 0.5
    for stage in (config.teacher_sft, config.sft, config.distill):
        stage.remat = remat
    if sharded:
        config.mesh.data, config.mesh.fsdp = 1, -1
    if small:
        tiny(config, teacher.tiny, student.tiny)
    return config


def fine_tuning(stage: Any, side: Side) -> None:
    """SFT, KD and SeqKD of one model (the reference's scripts; global batch 32)."""
    stage.learning_rate = side.learning_rate
    stage.epochs = float(side.epochs)
    stage.batch_size = 32
    stage.micro_batch = side.micro_batch
    stage.evaluate_every = 0  # each epoch
    stage.keep = "rouge_l"  # the loss rises while Rouge-L still improves
    if "schedule" in stage:
        stage.schedule = "cosine"
        stage.weight_decay = 1e-2
        stage.b2 = 0.999


def minillm(stage: Any, side: Side, schedule: str) -> None:
    """MiniLLM in the paper's geometry: 16 updates per collection, about 7 passes over dolly."""
    stage.steps = 5000
    stage.batch_size = 64
    stage.micro_batch = side.micro_batch
    stage.rollouts = 256
    stage.collect_batch = 64  # the two caches of 256 responses are 4 times as large
    stage.inner_epochs = 4
    stage.learning_rate = 5e-6
    stage.warmup = 100
    stage.schedule = schedule
    stage.weight_decay = 1e-6
    stage.b2 = 0.95
    stage.clip_norm = 1.0
    stage.alpha = 0.2  # the paper: works in every family
    # The reference's numbers, in the estimator that does not depend on padding or batch split.
    stage.estimator = "corrected"
    stage.gamma = 0.95
    stage.reward_scaling = 0.5  # no matter: the advantages are whitened
    stage.reward_clip = 100.0
    stage.cliprange = 0.2
    stage.length_norm = stage.single_step = True
    stage.whiten = "full"
    stage.evaluate_every = 100
    stage.save_every = 500
    stage.keep = "rouge_l"  # on the validation set, sampled at temperature 1


def shared() -> Path:
    """Where real data may lie: `$MINILLM_SHARED`, or `shared` beside the checkout."""
    return Path(os.environ.get("MINILLM_SHARED") or Path(__file__).parents[2] / "shared")


def dolly() -> tuple[str, str, str]:
    """Where dolly's training, validation and test rows are: in `shared()`, or on the Hub."""
    data = shared() / "data"
    if not (data / "dolly" / "train.jsonl.gz").is_file():
        return DOLLY, DOLLY, DOLLY
    train, validation = data / "dolly" / "train.jsonl.gz", data / "dolly" / "dev.jsonl"
    return str(train), str(validation), str(data / "eval" / "dolly.jsonl")


def tiny(config: Any, teacher: str, student: str) -> None:
    """Shrink any experiment to random models of these families, a few rows and a few updates."""
    config.name += "-tiny"
    config.teacher.path, config.student.path = f"scratch:{teacher}-2x64", f"scratch:{student}-2x32"
    config.teacher.sha256 = config.teacher.fine_tuned = config.student.fine_tuned = ""
    config.student.keep_layers = ()
    config.teacher.dtype = config.student.dtype = "float32"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
    data, text = shared() / "data" / "dolly", shared() / "data" / "text"
    real = (data / "train.jsonl.gz").is_file()
    config.data.train = str(data / "train.jsonl.gz") if real else "scratch:answers"
    config.data.validation = str(data / "dev.jsonl") if real else "scratch:answers"
    config.data.test = config.data.validation
    config.data.long_prompts = "drop"
    config.data.max_prompt, config.data.max_response, config.data.limit = 96, 8, 24
    config.data.max_answer = 12 if config.data.max_answer else 0
    config.answers.batch_size = config.evaluate.batch_size = 8
    config.answers.limit = config.evaluate.prompts = config.evaluate.validation_prompts = 8
    for stage in (config.teacher_sft, config.sft, config.distill):
        stage.learning_rate = 1e-3
        stage.steps, stage.epochs, stage.batch_size, stage.micro_batch = 2, 0.0, 8, 4
        stage.evaluate_every = 2
    config.teacher_sft.epochs = 1.0
    config.sft.warmup, config.distill.warmup, config.distill.save_every = 0, 1, 2
    if registry.find(config.method).kind == "minillm":
        config.distill.steps, config.distill.rollouts, config.distill.inner_epochs = 4, 16, 1
        config.distill.collect_batch = 8
    if config.corpus.files and not recipe.learns_from_answers(config.corpus.files):
        file = text / "wikitext2_valid.txt.gz"
        config.corpus.files = (str(file) if file.is_file() else "scratch:text",)
