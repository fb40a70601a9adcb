"""Checkpoints of a stage: state, position, settings and an optional buffer, saved in one piece.

    directory/STEP/state    the training state, a pytree of arrays and typed random keys
                  /run      JSON: `record`, with the settings and whatever the caller adds
                  /buffer   a second pytree (the rollout in use), where there is one

Orbax writes a checkpoint under another name while training goes on and renames it when it is
whole, so a killed run leaves none by halves. Only this file knows Orbax.
"""

import contextlib
import errno
import functools
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint import args as ocp_args
from orbax.checkpoint import checkpoint_managers as policies

from minillm_jax import hosts, record
from minillm_jax.named import arrays_by_name, settings_by_name
from minillm_jax.types import InputError

_PARTIAL = ".orbax-checkpoint-tmp"  # in the name of what is being written


class Restored(NamedTuple):
    """What `Checkpoints.restore` found; `buffer` is None where none was asked for or saved."""

    step: int
    state: Any
    extra: dict[str, Any]
    buffer: Any


class Checkpoints:
    """The checkpoints of one directory: the last `keep`, and the best by `score`.

    `settings` is JSON that must be the same whenever the directory is used: what decides the
    meaning of a state. Opening reads and writes nothing; the directory is made by the first save.
    Without `background` a save ends before training goes on, so that no copy of the state lies
    beside the next update.
    """

    def __init__(
        self, directory: Any, settings: dict[str, Any], *, keep: int = 2, background: bool = True
    ):
        self.directory = epath.Path(directory)
        self._in_bucket = "://" in os.fspath(self.directory)
        self._settings = json.loads(json.dumps(settings))
        self._keep = keep
        self._background = background
        self._clean = False
        # Each thread of a failed save logs its traceback; the user gets one line from here.
        absl_logging.get_absl_logger().addFilter(_not_from_orbax)

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        recent = policies.LatestN(self._keep)
        best = policies.BestN(
            get_metric_fn=_score, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            best_mode="min",
            preservation_policy=policies.preservation_policy.AnyPreservationPolicy([recent, best]),
            create=False,
            save_root_metadata=False,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "run": ocp.JsonCheckpointHandler(),
            "buffer": ocp.StandardCheckpointHandler(),
        }
        where = self.directory if self._in_bucket else self.directory.resolve()
        return ocp.CheckpointManager(where, options=options, item_handlers=handlers)

    def save(
        self,
        step: int,
        state: Any,
        extra: dict[str, Any] | None = None,
        *,
        buffer: Any = None,
        score: float | None = None,
    ) -> bool:
        """Start to write `state` of `step` and return; False if that step is saved already.

        The arrays may be donated as soon as this returns. `extra` is JSON; the lowest `score` is
        the best, None or a number that is not finite counts as none. `InputError` if the disk is
        full or the directory cannot be written, in this save or in the one before: then nothing
        of the failed checkpoint stays, and the earlier ones are untouched.
        """
        self.wait()
        with self._one_line():
            self.directory.mkdir(parents=True, exist_ok=True)
            if not self._clean:  # what a killed run left
                self._remove_partial()
                self._clean = True
        latest = self.latest_step()
        if latest is not None and step <= latest:
            if step in self._manager.all_steps():
                return False
            raise ValueError(f"step {step} is behind the latest checkpoint {latest}")
        with self._one_line():
            self._check_space([state, buffer])
        trees = {"state": state} | ({} if buffer is None else {"buffer": buffer})
        run = record.record(self._settings, extra or {}, trees)
        items: dict[str, Any] = {name: ocp_args.StandardSave(x) for name, x in trees.items()}
        items["run"] = ocp_args.JsonSave(run)
        metrics = None
        if score is not None and math.isfinite(score):
            metrics = {"score": float(score)}
        with self._one_line():
            args = ocp_args.Composite(**items)
            saved = self._manager.save(step, args=args, metrics=metrics, force=True)
        if not self._background:
            self.wait()
        return saved

    def restore(
        self, state: Any, *, buffer: Any = None, step: int | None = None
    ) -> Restored | None:
        """Read the newest checkpoint, or that of `step`; None if there is none at all.

        `state` and `buffer` are trees of `jax.ShapeDtypeStruct` with the wanted shardings. A
        newest checkpoint that cannot be read is set aside as `unreadable-STEP` once an older one
        could be. `InputError` if settings or arrays differ, or if no checkpoint can be read.
        """
        self.wait()
        steps = self._steps()
        if step is not None and step not in steps:
            raise InputError(f"{self.directory} has no checkpoint {step}: choose one of {steps}")
        damaged = {}
        for candidate in [step] if step is not None else reversed(steps):
            found, failure = None, None
            try:
                found = self._read(candidate, state, buffer)
            except InputError:
                raise
            except Exception as error:  # Orbax raises plain Exception for truncated files
                failure = error
            if not hosts.agree(failure is None) or found is None:
                damaged[candidate] = failure or OSError("another process cannot read it")
                continue
            run, trees = found
            try:
                record.verify(run, trees)  # the same on every process
            except record.Damaged as error:
                damaged[candidate] = error
                continue
            for newer, error in damaged.items():
                self._set_aside(newer, error)
            return Restored(candidate, trees["state"], run["extra"], trees.get("buffer"))
        if not damaged:
            return None
        newest, error = next(iter(damaged.items()))
        raise InputError(
            f"{self.directory / str(newest)} cannot be read ({_first_line(error)}):"
            " remove that folder, or start with another --workdir"
        ) from error

    def latest_step(self) -> int | None:
        """Return the newest step saved or being saved, None if there is none."""
        return max(self._steps(), default=None)

    def best_step(self) -> int | None:
        """Return the step with the lowest score, None if no checkpoint has one."""
        self.wait()
        return self._manager.best_step() if self._steps() else None

    def wait(self) -> None:
        """Wait until the last save is on disk; `InputError` as in `save`."""
        if "_manager" in self.__dict__:
            with self._one_line():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save and end Orbax's threads."""
        self.wait()
        if "_manager" in self.__dict__:
            self._manager.close()
            del self._manager

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        # An error on its way out matters more than what the last save has to say.
        with contextlib.suppress(*([] if kind is None else [InputError])):
            self.close()

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps()) if self.directory.exists() else []

    def _read(self, step: int, state: Any, buffer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        run = self._manager.restore(step, args=ocp_args.Composite(run=ocp_args.JsonRestore()))
        run = record.check(run["run"], os.fspath(self.directory / str(step)))
        self._check_same(step, settings_by_name(run["settings"]), settings_by_name(self._settings))
        saved = run.get("arrays") or self._arrays_of_format_1(step)
        wanted = {"state": state}
        if buffer is not None and "buffer" in saved:
            wanted["buffer"] = buffer
        for name, tree in wanted.items():
            self._check_same(step, saved[name], arrays_by_name(tree))
        items = {name: ocp_args.StandardRestore(tree) for name, tree in wanted.items()}
        found = self._manager.restore(step, args=ocp_args.Composite(**items))
        return run, {name: found[name] for name in wanted}

    def _arrays_of_format_1(self, step: int) -> dict[str, dict[str, str]]:
        saved, folder = self._manager.item_metadata(step), self.directory / str(step)
        there = [name for name in ("state", "buffer") if (folder / name).exists()]
        return {name: arrays_by_name(saved[name].tree) for name in there}

    def _check_same(self, step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name in sorted(saved.keys() | wanted.keys()):
            was, now = saved.get(name, "nothing"), wanted.get(name, "nothing")
            if was != now:
                raise InputError(
                    f"{self.directory / str(step)} was made with {name}={was}, this run has"
                    f" {name}={now}: set it back or use another --workdir"
                )

    def _check_space(self, tree: Any) -> None:
        if self._in_bucket:
            return
        if not os.access(self.directory, os.W_OK):  # before Orbax has begun anything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        need = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.directory).free
        if need > free:
            raise InputError(
                f"no space for a checkpoint in {self.directory}: it takes {need / 1e6:.0f} MB,"
                f" {free / 1e6:.0f} MB are free; free some or use another --workdir"
            )

    def _set_aside(self, step: int, error: Exception) -> None:
        absl_logging.warning(
            "checkpoint %s cannot be read (%s): set aside, an older one is used",
            self.directory / str(step),
            _first_line(error),
        )
        if hosts.is_main():
            (self.directory / str(step)).rename(self.directory / f"unreadable-{step}")
        hosts.barrier("set aside")
        self._manager.reload()

    def _remove_partial(self) -> None:
        if not hosts.is_main() or not self.directory.exists():
            return
        for path in self.directory.iterdir():
            if _PARTIAL in path.name:
                path.rmtree(missing_ok=True)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turn a refusal of the file system into an `InputError`, with nothing left by halves."""
        try:
            yield
        except Exception as error:
            reason = _refusal(error, self._in_bucket)
            if reason is None:
                raise
            self._abandon()
            raise InputError(
                f"cannot write a checkpoint in {self.directory} ({reason}):"
                " free space or permissions there, or use another --workdir"
            ) from error

    def _abandon(self) -> None:
        """Forget the manager of a failed save, which would raise again, and remove the remains."""
        self.__dict__.pop("_manager", None)
        for _ in range(20):  # writers of other arrays may not have ended yet
            try:
                return self._remove_partial()
            except OSError:
                time.sleep(0.1)


def _refusal(error: Exception, in_bucket: bool) -> str | None:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    # TensorStore raises ValueError with the number of the system's error in its text.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code.group(1)))
    # A bucket has no such numbers: gcsfs raises OSError, TensorStore ValueError with the status.
    refused = in_bucket and (isinstance(error, OSError) or re.match("[A-Z_]+: ", str(error)))
    return _first_line(error) if refused else None


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0][:200]
    return text or type(error).__name__


def _local_bytes(leaf: Any) -> int:
    if not isinstance(leaf, jax.Array):
        return getattr(leaf, "nbytes", 8)
    return sum(part.data.nbytes for part in leaf.addressable_shards if part.replica_id == 0)
