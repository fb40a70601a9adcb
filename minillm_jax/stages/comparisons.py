"""What takes passes of its own beside a model's answers: exposure bias and calibration."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minillm_jax import hosts
from minillm_jax.data import loader
from minillm_jax.dataset import Labelled
from minillm_jax.evaluation import calibration, divergence, exposure
from minillm_jax.modelfiles import Model
from minillm_jax.sharding import batch_sharding, place
from minillm_jax.stages import Run
from minillm_jax.stages.answers import Answered, Answers, Measure, sample
from minillm_jax.stages.held_out import SEEDS_APART, TestSet
from minillm_jax.stages.measures import measure, measuring

Samples = Sequence[Sequence[Answered]]  # by sample, the batches of all prompts
Measured = dict[str, np.ndarray]


class ExposureBias:
    """ExAccErr of students on one test set; the teacher's answers serve all of them."""

    def __init__(self, run: Run, test: TestSet, keep: Path | None = None):
        """`keep` is a folder where the teacher's answers are, or are left for another time."""
        self._run, self._test, self._keep = run, test, keep

    def _answers(
        self, model: Model, first: int = 0, keep: Path | None = None, measure: Measure | None = None
    ) -> list[Answers]:
        """The `first` and further answers of a model to every prompt, without any ban."""
        run, found = self._run, []
        for number in range(first, run.build.config.evaluate.exposure_samples):
            file = keep / f"exposure-{number}.jsonl" if keep else None
            seed = run.build.seed + SEEDS_APART * number
            asked = run, model, self._test.examples, seed
            found.append(sample(*asked, file=file, measure=measure))
        return found

    @functools.cached_property
    def _given(self) -> Samples:
        return [one.sampled for one in self._answers(self._run.build.teacher, keep=self._keep)]

    def curve(
        self, model: Model, sampled: Sequence[Answered], measured: Measured
    ) -> dict[str, Any]:
        """The curve of a student, as `exposure.curve`.

        `sampled` and `measured` are its answers with the first seed and what `measure` says of
        them: the first of its samples here.
        """
        more = self._answers(model, first=1, measure=measuring(self._run, model))
        theirs = [sampled, *(one.sampled for one in more)]
        own = _forward_kl(theirs, [measured, *(one.measured or {} for one in more)])
        read = [measure(self._run, model, batches) for batches in self._given]
        given = _forward_kl(self._given, read)
        return exposure.curve(own, given, self._run.build.seed)


def _forward_kl(samples: Samples, measured: Sequence[Measured]) -> tuple[np.ndarray, np.ndarray]:
    """KL[p || q] at every position of samples and their mask, [R, S, N] each."""
    kl = [rows["forward_kl_at"] for rows in measured]
    masks = [np.concatenate([b.response_mask[:real] for b, real in one]) for one in samples]
    return np.stack(kl, axis=1), np.stack(masks, axis=1)


def calibrated(run: Run, model: Model, data: Labelled) -> dict[str, Any]:
    """ECE, accuracy, the bins of the reliability diagram, and how many rows were read of how many.

    A label's probability is that of its words after the prompt, among the labels.
    """
    build = run.build
    nll = []
    slots = {
        f"{name}_slots": max(len(getattr(e, name)) for rows in data.examples for e in rows)
        for name in ("prompt", "response")
    }
    size = -(-min(build.config.evaluate.batch_size, len(data.labels)) // build.ways) * build.ways
    for examples in data.examples:
        padding = build.data.padding([]) | slots
        parts = []
        for batch, real in loader.ordered(examples, size, **padding):
            found = divergence.answer_nll(
                model.config,
                model.params,
                place(batch, batch_sharding(build.mesh)),
                build.vocab,
                build.arithmetic(model),
            )
            parts.append(hosts.fetch(found)[:real])
        nll.append(np.concatenate(parts))
    probabilities = calibration.label_probabilities(np.stack(nll, axis=1))
    return {
        "rows": len(data.labels),
        "given": data.given,
        **calibration.figures(probabilities, data.labels),
        "bins": calibration.reliability(probabilities, data.labels),
    }
