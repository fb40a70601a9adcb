"""The reader of the configuration: from a ConfigDict to models, data, schedules.

`check` says which settings cannot be right, `recipe` and `dataset` are the parts for training
sections and for data, `assemble` makes the methods. Below these files there are frozen dataclasses
and keyword arguments.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optax

from minillm_jax import hosts, recipe, scratch
from minillm_jax.axes import AXIS_RULES, TENSOR_RULES
from minillm_jax.check import check, check_ids, check_slots
from minillm_jax.data.tokenizer import Tokenizer, compare_vocabularies, load_tokenizer
from minillm_jax.dataset import SPLITS, Data
from minillm_jax.methods import registry
from minillm_jax.modelfiles import Model
from minillm_jax.models import DecoderConfig, abstract_params, logical_axes
from minillm_jax.models.fetch import resolve
from minillm_jax.models.hf import Stored, open_model
from minillm_jax.models.placing import take_layers
from minillm_jax.rollout import Warp
from minillm_jax.sharding import make_mesh, tree_shardings
from minillm_jax.train_state import TrainState, abstract_state
from minillm_jax.trainer import Schedule

SECTIONS = {"teacher_sft": "teacher_sft", "student_sft": "sft", "distill": "distill"}  # of stages


class Builder:
    """Makes what the stages need, each thing once, when it is first asked for."""

    def __init__(self, config: Any, workdir: Path = Path("."), devices: Any = None):
        """Take the config and look at the settings that can be judged without a model.

        `workdir` is for models and texts made from scratch; `devices` are, by default, all here.
        """
        self.config = config = registry.resolved(config)
        self.seed = int(config.seed)
        self.workdir = workdir
        self.mesh = make_mesh(**config.mesh, devices=devices)
        self._made: dict[str, Any] = {}
        self._tuned_teacher: Path | None = None
        check(config, self.ways)
        self.outline = recipe.outline(config)
        # What these refuse is said now, and not when their stage begins.
        for name in ("teacher_sft", "sft", "distill"):
            if name != "teacher_sft" or self.outline.tunes_teacher:
                recipe.judge(name, self.section(name), self.ways)

    def _once(self, name: str, make: Any) -> Any:
        return self._made[name] if name in self._made else self._made.setdefault(name, make())

    @property
    def ways(self) -> int:
        """Devices over which the rows of a batch are split."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def follow(self, teacher: Path) -> None:
        """Take the model in this folder for the teacher from now on: a stage has fine-tuned it."""
        made_of_it = ("student_checkpoint",) if self.outline.student_of_teacher else ()
        for name in ("teacher", "teacher_checkpoint", *made_of_it):
            self._made.pop(name, None)
        self._tuned_teacher = teacher

    def _locate(self, who: str) -> Path:
        """Where the teacher or the student is, a fine-tuned one first."""
        c = self.config[who]
        spec = c.fine_tuned or c.path
        checked = {"sha256": c.sha256} if who == "teacher" and not c.fine_tuned else {}
        with hosts.main_first(f"{who} is there"):
            if spec.startswith(scratch.PREFIX):
                return scratch.model(spec, self.workdir / "scratch")
            return resolve(spec, **checked)

    def open(self, path: Path) -> Stored:
        """Look at a model, which will be read with `config.attention`."""
        return self._read_with_kernel(open_model(path))

    def _read_with_kernel(self, stored: Stored) -> Stored:
        model = dataclasses.replace(stored.config, attention=self.config.attention)
        return dataclasses.replace(stored, config=model)

    def _open(self, who: str) -> Stored:
        tuned = self._tuned_teacher if who == "teacher" else None
        return self.open(tuned or self._locate(who))

    @property
    def teacher_checkpoint(self) -> Stored:
        """The teacher on disk, its weights unread."""
        return self._once("teacher_checkpoint", lambda: self._open("teacher"))

    @property
    def teacher_config(self) -> DecoderConfig:
        """The teacher as it is distilled: p is its softmax at `config.teacher.temperature`."""
        scale = 1.0 / self.config.teacher.temperature
        return dataclasses.replace(self.teacher_checkpoint.config, logit_scale=scale)

    @property
    def student_checkpoint(self) -> Stored:
        """The student before any training here, its weights unread."""

        def make():
            c = self.config.student
            own = c.fine_tuned or c.path
            start = self._open("student") if own else self.teacher_checkpoint
            return start.keep(c.keep_layers) if c.keep_layers and not c.fine_tuned else start

        return self._once("student_checkpoint", make)

    @property
    def teacher(self) -> Model:
        """The teacher on the devices."""

        def make():
            c = self.config.teacher
            model = self.on_devices(self.teacher_checkpoint, c.dtype, fsdp=c.fsdp)
            return dataclasses.replace(model, config=self.teacher_config)

        return self._once("teacher", make)

    def untuned_teacher(self) -> Model:
        """The teacher in float32 for its own training, which consumes the arrays."""
        return self.on_devices(self.teacher_checkpoint)

    def student(self, folder: Any = None) -> Model:
        """The student from `folder`, or as it is before training; its arrays are its own."""
        start = self.open(folder) if folder else self.student_checkpoint
        c = self.config
        own = folder or c.student.path or c.student.fine_tuned
        if own or "teacher" not in self._made or c.teacher.dtype != "float32":
            return self.on_devices(start)
        # Copied from the teacher, which is there already.
        shardings = self.shardings(start.config)
        params = take_layers(self.teacher.params, c.student.keep_layers, shardings)
        return Model(start.config, params, start.hf_config)

    def on_devices(self, stored: Stored, dtype: str = "float32", fsdp: bool = True) -> Model:
        """Read a model straight to the shardings of its logical axes, those of `fsdp` or not."""
        params = stored.read(np.dtype(dtype), self.shardings(stored.config, fsdp))
        return Model(stored.config, params, stored.hf_config)

    def shardings(self, config: DecoderConfig, fsdp: bool = True) -> Any:
        """Where the parameters of a model lie; `InputError` for an axis that does not divide."""
        rules = AXIS_RULES if fsdp else TENSOR_RULES
        shapes, axes = abstract_params(config), logical_axes(config)
        return tree_shardings(shapes, axes, self.mesh, rules, config.axis_units)

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer, after it was found to agree with the teacher's."""

        def make():
            c = self.config.student
            teacher = load_tokenizer(self._locate("teacher"))
            if not (c.path or c.fine_tuned):
                return teacher
            student = load_tokenizer(self._locate("student"))
            compare_vocabularies(teacher, student)
            return student

        return self._once("tokenizer", make)

    @property
    def vocab(self) -> int:
        """Number of ids that are true in both models."""
        models = (self.teacher_checkpoint.config, self.student_checkpoint.config)
        return min(self.tokenizer.vocab_size, *(model.vocab_size for model in models))

    def preflight(self, stages: Collection[str]) -> None:
        """Read all that these stages read, so that what is bad is found before anything is written.

        Raises:
            InputError: rows, prompts, vocabularies or weights that do not fit.
        """
        o = self.outline
        for split in SPLITS:
            if o.answers == "data" or (o.tunes_teacher and split != "test"):
                self.data.gold(split)
        if o.given == "data" and not o.policy_gradient and "distill" in stages:
            self.data.gold("train")
        self.data.more_tests()
        self.data.labelled()
        ids = (max(prompt.prompt) for split in SPLITS for prompt in self.data.prompts(split))
        largest = max(self.tokenizer.eos_id, *ids)
        checkpoints = {"teacher": self.teacher_checkpoint, "student": self.student_checkpoint}
        for who, checkpoint in checkpoints.items():
            model = checkpoint.config
            check_slots(self.config, who, model.max_positions)
            self.shardings(model)
            check_ids(who, checkpoint.path, model.vocab_size, largest)
        for stage, name in SECTIONS.items():
            if stage in stages:  # with the updates that its epochs are
                exact = {"steps": self.schedule(name).steps, "epochs": 0.0}
                recipe.judge(name, {**self.section(name), **exact}, self.ways)
        # Last, for it may take long, and keeps what it has read.
        if self.outline.policy_gradient and "distill" in stages:
            self.data.corpus()

    @functools.cached_property
    def data(self) -> Data:
        """Rows, prompts, answers and batches."""
        return Data(self.config, lambda: self.tokenizer, self.seed, self.workdir, self.ways)

    def section(self, name: str) -> Mapping[str, Any]:
        """The settings of a training stage; the teacher's SFT has what it lacks from `sft`."""
        own = dict(self.config[name])
        return dict(self.config.sft) | own if name == "teacher_sft" else own

    def schedule(self, name: str, examples: int | None = None) -> Schedule:
        """Sizes and intervals of a training stage, for that many examples if given."""
        section = self.section(name)
        if examples is None:
            examples = self._learns_from(name) if section["epochs"] else 0
        on_policy = name == "distill" and self.outline.policy_gradient
        return recipe.schedule(section, examples, on_policy=on_policy)

    def _learns_from(self, name: str) -> int:
        source = self.outline.given if name == "distill" else self.outline.answers
        if name == "teacher_sft" or source == "data":
            return len(self.data.gold("train"))
        asked = len(self.data.prompts("train"))
        return min(asked, self.config.answers.limit or asked)

    def answer_slots(self) -> int:
        """Response slots of the answers that `distill` is given."""
        if self.outline.given == "teacher":
            return self.config.data.max_response
        return self.data.padding(self.data.gold("train"))["response_slots"]

    def micro_batches(self, name: str) -> int:
        """Parts of an update, so that no device takes more than `micro_batch` rows at once."""
        section = self.section(name)
        return recipe.micro_batches(section["batch_size"], section["micro_batch"], self.ways)

    @property
    def ragged(self) -> bool:
        """Whether each distinct token is read once: on one CPU. Elsewhere it is not measured."""
        return self.mesh.size == 1 and self.mesh.devices.item().platform == "cpu"

    @property
    def windows(self) -> tuple[int, ...]:
        """Widths in which the rows of an update are read."""
        return recipe.windows(self.data.max_tokens)

    def optimizer(self, name: str) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """AdamW of a stage and its learning rate by update."""
        return recipe.optimizer(self.section(name), self.schedule(name).steps)

    def abstract_state(self, model: DecoderConfig, name: str, memory: Any = ()) -> TrainState:
        """The state of training `model` in a section: shapes, dtypes and shardings, no arrays.

        `memory` is what the method remembers.
        """
        optimizer, _ = self.optimizer(name)
        shapes, places = abstract_params(model), self.shardings(model)
        return abstract_state(shapes, places, optimizer, self.mesh, memory)

    def arithmetic(self, model: Model) -> str:
        """The dtype in which a model reads and writes."""
        is_teacher = model is self._made.get("teacher")
        return self.config.teacher.dtype if is_teacher else self.config.student.dtype

    def generation(self, warp: Warp) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        return {
            "slots": self.config.data.max_response,
            "warp": warp,
            "eos_id": self.tokenizer.eos_id,
            "pad_id": self.tokenizer.pad_id,
            "vocab": self.vocab,
        }
