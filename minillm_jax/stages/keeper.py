"""What a training stage writes down and warns of, and which of its models it keeps."""

import math
import time

from minillm_jax import modelfiles
from minillm_jax.modelfiles import Model
from minillm_jax.reporting.progress import Progress
from minillm_jax.reporting.watch import Watch
from minillm_jax.stages.skipped import keep_batch


class Keeper:
    """The hooks of one training stage, and the little that they remember."""

    def __init__(self, run, stage, start, validate, keep, headline, checkpoints, section):
        self.run, self.stage, self.start = run, stage, start
        self.validate, self.keep, self.checkpoints = validate, keep, checkpoints
        self.ties = f"valid_{headline}"  # decides between models that `keep` finds equal
        self.tokens, self.best = 0, None
        self.rows = 0  # of the metrics
        self.watch, self.warnings = Watch(section), 0
        self.bar: Progress | None = None
        self.began = time.monotonic()

    def resume(self, restored) -> bool:
        """Take up what a checkpoint remembers; returns whether its state has been evaluated."""
        extra = {"evaluated": True, "rows": None} | restored.extra  # format 1 has neither
        self.tokens, self.best, self.rows = extra["tokens"], extra["best"], extra["rows"]
        if self.rows is None:
            rows = self.run.metrics.rows(self.stage)
            self.rows = sum(row["step"] <= restored.step for row in rows)
        for row in self.run.metrics.rows(self.stage)[: self.rows]:  # what was warned of already
            self.warnings += len(self.watch.add(row["step"], row))
        if not self.run.model(self.stage).exists():  # cut off on its way into a bucket
            self.best = None
        return extra["evaluated"]

    def write(self, step, values, times=None):
        """Add a row to the metrics."""
        self.rows += 1
        seconds = time.monotonic() - self.began
        self.run.metrics.write(self.stage, step, seconds, values, times)

    def log(self, step, values, times):
        """Take the metrics of an update, and its times."""
        self.tokens += int(values["tokens"])
        self.write(step, values, times)
        if self.bar:
            self.bar.update(step, tokens=values["tokens"], metrics=values)
        self.look_at(step, values)

    def look_at(self, step, values):
        """Warn of what metrics or scores show."""
        for warning in self.watch.add(step, values):
            self.warnings += 1
            if self.bar:
                self.bar.log(f"warning: {self.stage}, {warning}")

    def evaluate(self, step, state):
        """Validate the model of a state and keep it if it is the best so far; its scores."""
        model = Model(self.start.config, state.params, self.start.hf_config)
        found = self.validate(model)
        scores = {f"valid_{name}": value for name, value in found.items()}
        self.write(step, scores)
        self.look_at(step, scores)
        # The first model is kept whatever its score, so that there always is one.
        if self.best is None or self._better(scores, self.best):
            self.best = {"step": step, **{name: scores[name] for name in (self.keep, self.ties)}}
            modelfiles.save_model(self.run.model(self.stage), model, self.run.build.tokenizer)
        return found

    def _better(self, scores, best):
        if math.isnan(best[self.keep]):
            return True
        sign = -1 if self.keep == "valid_rouge_l" else 1
        if scores[self.keep] != best[self.keep]:
            return sign * scores[self.keep] < sign * best[self.keep]
        # A stage that an older version began remembers no score for ties.
        tie = best.get(self.ties, -math.inf)
        return scores[self.ties] < (math.inf if math.isnan(tie) else tie)

    def save(self, step, state, rollout, evaluated):
        """Write a checkpoint, with what `resume` reads."""
        extra = {"tokens": self.tokens, "best": self.best}
        extra |= {"rows": self.rows, "evaluated": evaluated}
        self.run.keep()  # the rows and the model of which this checkpoint will speak
        self.checkpoints.save(step, state, extra, buffer=rollout)

    def keep_skipped(self, step, batch):
        """Keep the batch of an update that was skipped, and say how to look at it."""
        folder = self.run.folder(self.stage) / "skipped"
        keep_batch(folder, step, batch)
        if self.bar:
            self.bar.log(
                f"{self.stage}: update {step} is skipped, its loss or gradient is not finite;"
                f" the same command with --replay={folder / f'{step}.npz'} says where"
            )
