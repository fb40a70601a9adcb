"""What takes passes of its own beside a model's answers: exposure bias and calibration."""

import functools
from typing import Any

import numpy as np

from minillm_jax import hosts
from minillm_jax.data import loader
from minillm_jax.dataset import Labelled
from minillm_jax.evaluation import calibration, divergence, exposure
from minillm_jax.modelfiles import Model
from minillm_jax.sharding import batch_sharding, place
from minillm_jax.stages import Run
from minillm_jax.stages.answers import Answered, respond
from minillm_jax.stages.held_out import SEEDS_APART, TestSet
from minillm_jax.stages.measures import SAMPLED, measure


class ExposureBias:
    """ExAccErr of students on one test set; the teacher's answers serve all of them."""

    def __init__(self, run: Run, test: TestSet):
        self._run, self._test = run, test

    def _answers(self, model: Model) -> list[list[Answered]]:
        """Several answers of a model to every prompt, without any ban."""
        run = self._run
        count = run.build.config.evaluate.exposure_samples
        return [
            list(
                respond(run, model, self._test.examples, SAMPLED, run.build.seed + SEEDS_APART * i)
            )
            for i in range(count)
        ]

    @functools.cached_property
    def _given(self) -> list[list[Answered]]:
        return self._answers(self._run.build.teacher)

    def _forward_kl(self, model: Model, samples: list[list[Answered]]) -> tuple[Any, Any]:
        """KL[p || q] at every position of samples and their mask, [R, S, N] each."""
        kl = [measure(self._run, model, batches)["forward_kl_at"] for batches in samples]
        masks = [np.concatenate([b.response_mask[:real] for b, real in one]) for one in samples]
        return np.stack(kl, axis=1), np.stack(masks, axis=1)

    def curve(self, model: Model) -> dict[str, list[float]]:
        """The curve of a student, as `exposure.curve`."""
        own = self._forward_kl(model, self._answers(model))
        given = self._forward_kl(model, self._given)
        return exposure.curve(own, given, self._run.build.seed)


def calibrated(run: Run, model: Model, data: Labelled) -> dict[str, Any]:
    """ECE, accuracy, the bins of the reliability diagram, and how many rows were read of how many.

    A label's probability is that of its words after the prompt, among the labels.
    """
    build = run.build
    nll = []
    slots = max(len(e.response) for examples in data.examples for e in examples)
    size = -(-min(build.config.evaluate.batch_size, len(data.labels)) // build.ways) * build.ways
    for examples in data.examples:
        padding = build.data.padding([]) | {"response_slots": slots}
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
