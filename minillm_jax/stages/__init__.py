"""What each stage of an experiment does; `pipeline` decides which of them run.

A stage reads the outputs of earlier stages from the work directory and writes its own there, so
that it can be run alone. It returns what `done.json` says of it: seconds, tokens, updates.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm_jax.build import Builder
from minillm_jax.reporting.writers import MetricsWriter

Outcome = dict[str, Any]

# May differ between two starts in one work directory: logging, and the devices, which change no
# result but for rounding. Whatever else decides a state may not.
FREE_SETTINGS = ("mesh", "tensorboard")


def own_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the meaning of a checkpoint."""
    return {name: value for name, value in config.items() if name not in FREE_SETTINGS}


@dataclass(frozen=True)
class Run:
    """One experiment in its work directory."""

    build: Builder
    workdir: Path
    metrics: MetricsWriter

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its outputs."""
        return self.workdir / "stages" / stage

    def model(self, stage: str) -> Path:
        """The student that a training stage has chosen, in the Hugging Face layout."""
        return self.folder(stage) / "model"
