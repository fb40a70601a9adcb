"""What each stage of an experiment does; `pipeline` decides which of them run.

A stage reads the outputs of earlier stages from the work directory and writes its own there, so
that it can be run alone. It returns what `done.json` says of it: seconds, tokens, updates.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from minillm_jax import hosts
from minillm_jax.bucket import Bucket
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
    """One experiment in its work directory, which may be the image of `remote`."""

    build: Builder
    workdir: Path
    metrics: MetricsWriter
    remote: Bucket | None = None

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its outputs."""
        return self.workdir / "stages" / stage

    def model(self, stage: str) -> Path:
        """The student that a training stage has chosen, in the Hugging Face layout."""
        return self.folder(stage) / "model"

    def checkpoints(self, stage: str) -> epath.Path:
        """Where Orbax keeps the states of a training stage."""
        root = self.remote.url if self.remote else self.workdir
        return epath.Path(root) / "stages" / stage / "checkpoints"

    def clear(self, stage: str) -> None:
        """Remove all that a stage has left."""
        shutil.rmtree(self.folder(stage), ignore_errors=True)
        if self.remote:
            self.remote.remove(f"stages/{stage}/checkpoints")

    def share(self, name: str) -> None:
        """A barrier of this name, after which all find what process 0 wrote before it."""
        hosts.barrier(name)
        if self.remote:
            self.remote.share()

    def keep(self, every: float = 0.0) -> None:
        """Bring what is new to where it outlives this host; with `every` at most so often, in s.

        Raises:
            InputError: it cannot be, and `every` is 0.
        """
        if self.remote and every:
            self.remote.push_after(every)
        elif self.remote:
            self.remote.push()
