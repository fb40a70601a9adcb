"""The only reader of the configuration: from a ConfigDict to models, data, methods, schedules.

Below this file there are frozen dataclasses and keyword arguments. A section of the config is
splatted into one signature where names allow it, so that a key without a reader cannot survive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from minillm_jax import optim
from minillm_jax.data import examples as examples_lib
from minillm_jax.data import loader, sources
from minillm_jax.data.examples import Example
from minillm_jax.data.sources import Row
from minillm_jax.data.tokenizer import Tokenizer, compare_vocabularies, load_tokenizer
from minillm_jax.methods import Method, minillm, sft
from minillm_jax.models import DecoderConfig, logical_axes
from minillm_jax.models.fetch import resolve
from minillm_jax.models.hf import load
from minillm_jax.models.weights import Checkpoint, keep_layers
from minillm_jax.objectives.policy import Policy
from minillm_jax.rollout import Mixing, Warp
from minillm_jax.sharding import make_mesh, place, tree_shardings
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

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    # Models and vocabulary.

    @property
    def teacher_checkpoint(self) -> Checkpoint:
        """The teacher on the host."""
        c = self.config.teacher
        return self._once("teacher_checkpoint", lambda: load(resolve(c.path, c.sha256)))

    @property
    def student_checkpoint(self) -> Checkpoint:
        """The student before any training, on the host."""

        def make():
            c = self.config.student
            start = load(resolve(c.path)) if c.path else self.teacher_checkpoint
            return keep_layers(start, c.keep_layers) if c.keep_layers else start

        return self._once("student_checkpoint", make)

    @property
    def teacher(self) -> Model:
        """The teacher on the devices."""
        return self._once("teacher", lambda: self.on_devices(self.teacher_checkpoint))

    def student(self, folder: Any = None) -> Model:
        """The student from `folder`, or as it is before training."""
        return self.on_devices(load(folder) if folder else self.student_checkpoint)

    def on_devices(self, checkpoint: Checkpoint) -> Model:
        """Place a checkpoint with the shardings of its logical axes."""
        axes = logical_axes(checkpoint.config)
        params = place(checkpoint.params, tree_shardings(checkpoint.params, axes, self.mesh))
        return Model(checkpoint.config, params, checkpoint.hf_config)

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
        sizes = [self.teacher_checkpoint.config.vocab_size, self.student_checkpoint.config.vocab_size]
        return min(self.tokenizer.vocab_size, *sizes)

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
        on_policy = {} if stage == "sft" else {"rollouts": c.rollouts, "inner_epochs": c.inner_epochs}
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
        """The estimator and its switches."""
        c = self.config.distill
        return Policy(
            estimator=c.estimator,
            gamma=c.gamma,
            reward_scaling=c.reward_scaling,
            reward_clip=c.reward_clip,
            cliprange=c.cliprange,
            length_norm=c.length_norm,
            whiten=c.whiten,
            single_step=c.single_step,
        )

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


def check(config: Any) -> None:
    """Refuse what cannot run or cannot learn, before anything is loaded.

    Raises:
        InputError: naming the setting and the cure.
    """
    d = config.distill
    if d.rollouts % d.batch_size:
        raise InputError(
            f"config.distill.rollouts={d.rollouts} is not a multiple of "
            f"config.distill.batch_size={d.batch_size}: change one of them"
        )
    if not 0.0 <= d.alpha <= 1.0:
        raise InputError(f"config.distill.alpha={d.alpha}: the teacher's share is between 0 and 1")
    for stage in ("sft", "distill"):
        c = config[stage]
        for name in ("steps", "batch_size", "accumulate", "evaluate_every", "save_every"):
            if c[name] < 1:
                raise InputError(f"config.{stage}.{name}={c[name]}: give a number of at least 1")
        if c.batch_size % c.accumulate:
            raise InputError(
                f"config.{stage}.accumulate={c.accumulate} does not divide "
                f"config.{stage}.batch_size={c.batch_size}: change one of them"
            )
    for name in ("max_prompt", "max_response"):
        if config.data[name] < 1:
            raise InputError(f"config.data.{name}={config.data[name]}: give at least 1 token")


__all__ = ["Builder", "Model", "check"]
