"""The only reader of the configuration: from a ConfigDict to models, data, methods, schedules.

Below this file there are frozen dataclasses and keyword arguments; `check` says which settings
cannot be right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax

from minillm_jax import optim
from minillm_jax.check import check
from minillm_jax.data import examples as examples_lib
from minillm_jax.data import loader, sources
from minillm_jax.data.examples import Example
from minillm_jax.data.sources import Row
from minillm_jax.data.tokenizer import Tokenizer, compare_vocabularies, load_tokenizer
from minillm_jax.methods import Method, minillm, sft
from minillm_jax.models import DecoderConfig, abstract_params, logical_axes
from minillm_jax.models.fetch import resolve
from minillm_jax.models.hf import Stored, open_model
from minillm_jax.models.placing import take_layers
from minillm_jax.objectives.policy import PRESETS, Policy
from minillm_jax.rollout import Mixing, Warp
from minillm_jax.sharding import make_mesh, tree_shardings
from minillm_jax.trainer import Schedule
from minillm_jax.types import InputError, Params, Sequences

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Model:
    """A decoder with its parameters on the devices; `hf_config` is what an export needs."""

    config: DecoderConfig
    params: Params
    hf_config: dict[str, Any]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))


class Builder:
    """Makes what the stages need, each thing once, when it is first asked for."""

    def __init__(self, config: Any):
        """Take the config and look at the settings that can be judged without a model."""
        self.config = config
        self.seed = int(config.seed)
        self.mesh = make_mesh(**config.mesh)
        self._made: dict[str, Any] = {}
        check(config)
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if config.distill.rollouts % ways:
            raise InputError(
                f"config.distill.rollouts={config.distill.rollouts} does not split over {ways} "
                f"devices: make it a multiple of {ways}"
            )
        # What these refuse is said now, and not when their stage begins.
        for section in ("sft", "distill"):
            try:
                self.optimizer(section)
            except InputError as error:
                raise InputError(f"config.{section}.{error}") from error
        self.policy()

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    # Models and vocabulary.

    @property
    def teacher_checkpoint(self) -> Stored:
        """The teacher on disk, its weights unread."""
        c = self.config.teacher
        return self._once("teacher_checkpoint", lambda: open_model(resolve(c.path, c.sha256)))

    @property
    def student_checkpoint(self) -> Stored:
        """The student before any training, its weights unread."""

        def make():
            c = self.config.student
            start = open_model(resolve(c.path)) if c.path else self.teacher_checkpoint
            return start.keep(c.keep_layers) if c.keep_layers else start

        return self._once("student_checkpoint", make)

    @property
    def teacher(self) -> Model:
        """The teacher on the devices."""
        return self._once("teacher", lambda: self.on_devices(self.teacher_checkpoint))

    def student(self, folder: Any = None) -> Model:
        """The student from `folder`, or as it is before training; its arrays are its own."""
        start = open_model(folder) if folder else self.student_checkpoint
        if folder or self.config.student.path or "teacher" not in self._made:
            return self.on_devices(start)
        kept = self.config.student.keep_layers  # copied from the teacher, which is there already
        params = take_layers(self.teacher.params, kept, self._shardings(start.config))
        return Model(start.config, params, start.hf_config)

    def on_devices(self, stored: Stored) -> Model:
        """Read a model straight to the shardings of its logical axes."""
        params = stored.read(np.float32, self._shardings(stored.config))
        return Model(stored.config, params, stored.hf_config)

    def _shardings(self, config: DecoderConfig) -> Any:
        return tree_shardings(abstract_params(config), logical_axes(config), self.mesh)

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer, after it was found to agree with the teacher's."""

        def make():
            c = self.config
            teacher = load_tokenizer(resolve(c.teacher.path, c.teacher.sha256))
            if not c.student.path:
                return teacher
            student = load_tokenizer(resolve(c.student.path))
            compare_vocabularies(teacher, student)
            return student

        return self._once("tokenizer", make)

    @property
    def vocab(self) -> int:
        """Number of ids that are true in both models."""
        models = (self.teacher_checkpoint.config, self.student_checkpoint.config)
        return min(self.tokenizer.vocab_size, *(model.vocab_size for model in models))

    def preflight(self) -> None:
        """Read all that a run reads, so that what is bad is found before anything is written.

        Raises:
            InputError: rows, prompts, vocabularies or weights that do not fit.
        """
        c = self.config.data
        ids = (max(prompt.prompt) for split in SPLITS for prompt in self.prompts(split))
        largest = max(self.tokenizer.eos_id, *ids)
        for who, checkpoint in (
            ("teacher", self.teacher_checkpoint),
            ("student", self.student_checkpoint),
        ):
            model = checkpoint.config
            if c.max_prompt + c.max_response > model.max_positions:
                raise InputError(
                    f"config.data.max_prompt={c.max_prompt} and max_response={c.max_response} make "
                    f"more than the {model.max_positions} positions of the {who}: lower one of them"
                )
            if largest >= model.vocab_size:
                raise InputError(
                    f"the tokenizer makes the id {largest}, the {who} has {model.vocab_size} ids: "
                    f"{checkpoint.path} and its tokenizer do not belong together"
                )

    # Data.

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, from the config's file or the packaged prompts."""
        c = self.config.data
        rows = sources.read_jsonl(c[split]) if c[split] else sources.packaged_prompts(split)
        evaluate = self.config.evaluate
        limits = {"validation": evaluate.validation_prompts, "test": evaluate.prompts}
        limit = limits.get(split, c.limit)
        return rows[:limit] if limit else rows

    def prompts(self, split: str) -> list[Example]:
        """The prompts of a split as ids, without answers."""
        c = self.config.data

        def make():
            return examples_lib.make_examples(
                self.tokenizer,
                self.rows(split),
                template=c.template,
                max_prompt=c.max_prompt,
                max_response=c.max_response,
                answers=False,
            )

        return self._once(f"prompts/{split}", make)

    def padding(self) -> dict[str, int]:
        """The geometry of a batch, for `pad` and the loaders."""
        c = self.config.data
        return {
            "prompt_slots": c.max_prompt,
            "response_slots": c.max_response,
            "pad_id": self.tokenizer.pad_id,
        }

    def batches(self, examples: Sequence[Example], batch_size: int) -> loader.Batches:
        """Endless shuffled batches."""
        return loader.batches(examples, batch_size, self.seed, **self.padding())

    def ordered(self, examples: Sequence[Example]) -> list[tuple[Sequences, int]]:
        """The examples once, in order, in batches of evaluation."""
        size = min(self.config.evaluate.batch_size, len(examples))
        return list(loader.ordered(examples, size, **self.padding()))

    # Training.

    def schedule(self, stage: str) -> Schedule:
        """Sizes and intervals of a training stage."""
        c = self.config[stage]
        on_policy = {}
        if stage == "distill":
            on_policy = {"rollouts": c.rollouts, "inner_epochs": c.inner_epochs}
        return Schedule(
            steps=c.steps,
            batch_size=c.batch_size,
            evaluate_every=c.evaluate_every,
            save_every=c.save_every,
            **on_policy,
        )

    def optimizer(self, stage: str) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """AdamW of a stage and its learning rate by update."""
        c = self.config[stage]
        rate = optim.schedule(c.schedule, c.learning_rate, warmup=c.warmup, steps=c.steps)
        decay = {"weight_decay": c.weight_decay, "decay_mask": optim.matrices}
        return optim.adamw(rate, b2=c.b2, clip_norm=c.clip_norm, **decay), rate

    def sft(self) -> Method:
        """Supervised fine-tuning."""
        optimizer, rate = self.optimizer("sft")
        return sft.method(
            self.student_checkpoint.config,
            optimizer,
            rate,
            vocab=self.vocab,
            micro_batches=self.config.sft.accumulate,
            dtype=self.config.student.dtype,
        )

    def minillm(self) -> Method:
        """MiniLLM."""
        c = self.config.distill
        optimizer, rate = self.optimizer("distill")
        return minillm.method(
            self.student_checkpoint.config,
            self.teacher_checkpoint.config,
            optimizer,
            rate,
            policy=self.policy(),
            mixing=self.mixing(),
            micro_batches=c.accumulate,
            dtype=self.config.student.dtype,
        )

    def policy(self) -> Policy:
        """The estimator's preset, with the switches that the config sets."""
        c = self.config.distill
        names = ("gamma", "reward_scaling", "reward_clip", "cliprange", "length_norm", "whiten")
        given = {name: c[name] for name in (*names, "single_step") if c[name] is not None}
        for name in ("reward_clip", "cliprange"):
            if given.get(name) == 0:
                given[name] = None
        if c.estimator not in PRESETS:
            raise InputError(
                f"config.distill.estimator={c.estimator!r}: choose from {', '.join(PRESETS)}"
            )
        try:
            return replace(PRESETS[c.estimator], **given)
        except InputError as error:
            raise InputError(f"config.distill.{error}") from error

    def mixing(self) -> Mixing:
        """Teacher-mixed sampling."""
        c = self.config.distill
        return Mixing(
            slots=self.config.data.max_response,
            alpha=c.alpha,
            chunk=min(c.chunk, self.config.data.max_response),
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            vocab=self.vocab,
        )

    def generation(self, warp: Warp) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        return {
            "slots": self.config.data.max_response,
            "warp": warp,
            "eos_id": self.tokenizer.eos_id,
            "pad_id": self.tokenizer.pad_id,
            "vocab": self.vocab,
        }
