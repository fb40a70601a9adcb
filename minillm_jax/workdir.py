"""A work directory belongs to one config, and to one run at a time; a fork is a new one.

workdir/config.json   the settings; another config is refused
        lock          while a run is on: its host and process
        fork.json     of a forked run: where it came from, and which settings differ
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm_jax import hosts, record
from minillm_jax.modelfiles import recover
from minillm_jax.reporting.writers import read_json, write_json
from minillm_jax.stages import FREE_SETTINGS, own_settings
from minillm_jax.types import InputError

SILENCE = 60.0  # seconds after which the run of another host is taken for dead
_BEAT = 10.0  # seconds between two signs of life


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Hold the work directory, which is made if need be, while the block runs.

    The lock is the system's on the file `lock`, so it ends with the process, however that ends.
    Where hosts do not see each other's locks the file's time tells: a run touches it every ten
    seconds, and one of another host that has not done so for a minute is over.

    Raises:
        InputError: another run holds it, naming its host and process.
    """
    made = not workdir.exists()
    lock = _locked(workdir)
    try:
        yield
    finally:
        if lock:
            lock.release()
            if made and not any(workdir.iterdir()):  # nothing came of it
                workdir.rmdir()


def refuse_busy(workdir: Path):
    """Say at once that another run holds the directory, where nothing is to be written yet."""
    if workdir.exists() and (lock := _locked(workdir)):
        lock.release()


def _locked(workdir: Path) -> "_Lock | None":
    """The lock in process 0; all processes are refused together."""
    error, lock = None, None
    if hosts.is_main():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = _Lock(workdir / "lock")
        except (InputError, OSError) as refusal:
            error = refusal
    if not hosts.agree(error is None):
        raise error or InputError(f"process 0 cannot have {workdir}: see its line")
    return lock


class _Lock:
    """The locked file `path`, with a thread that touches it."""

    def __init__(self, path: Path):
        self._path = path
        self._ended = threading.Event()
        self._here = socket.gethostname()  # whose runs the lock of the system tells of
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise self._refusal() from error
            except OSError:  # a file system without locks: the file's time is left
                self._here = "none"
            # Whoever held it may have removed it between the two calls.
            if path.exists() and os.path.samestat(os.fstat(self._file), path.stat()):
                break
            os.close(self._file)
        self._wait_for_the_dead()
        os.ftruncate(self._file, 0)
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        os.pwrite(self._file, mine.encode(), 0)
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self):
        """Give the directory back."""
        self._ended.set()
        self._path.unlink(missing_ok=True)
        os.close(self._file)

    def _holder(self) -> dict[str, Any]:
        try:
            return json.loads(os.pread(self._file, 4096, 0))
        except ValueError:  # it ended between making the file and writing into it
            return {}

    def _refusal(self) -> InputError:
        holder = self._holder()
        os.close(self._file)
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'this host')}"
        return InputError(
            f"{self._path.parent} is in use by {who}: wait for that run, end it, or give another "
            "--workdir"
        )

    def _wait_for_the_dead(self):
        """Return when the run that has left its name is over; refuse if it shows signs of life."""
        host = self._holder().get("host")
        if host in (None, self._here):
            return
        first = os.fstat(self._file).st_mtime
        print(f"{self._path.parent}: is its run on {host} over?", file=hosts.log())
        until = time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(min(1.0, SILENCE / 10))
            if os.fstat(self._file).st_mtime != first:
                raise self._refusal()

    def _beat(self):
        while not self._ended.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def refuse_another(workdir: Path, config: Any):
    """Check that the work directory is new, or this config's.

    Raises:
        InputError: with the first settings that differ.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    different = differences(read_json(path), config.to_dict())
    if different:
        shown = "; ".join(
            f"{name}: {was} there, {now} now" for name, (was, now) in list(different.items())[:3]
        )
        more = f"; {len(different) - 3} more" if len(different) > 3 else ""
        raise InputError(
            f"{workdir} holds a run of another config ({shown}{more}): give another --workdir "
            f"(and --fork={workdir} to go on from there), or the settings of that run"
        )


def differences(theirs: Any, mine: Any) -> dict[str, tuple[Any, Any]]:
    """Settings that two configs do not share, but for `FREE_SETTINGS`, by dotted name."""
    was, now = flatten(theirs), flatten(mine)
    return {
        name: (was.get(name), now.get(name))
        for name in sorted(was.keys() | now.keys())
        if name.partition(".")[0] not in FREE_SETTINGS and was.get(name) != now.get(name)
    }


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted name, in JSON's types."""
    if not isinstance(tree, dict):
        return {prefix: json.loads(json.dumps(tree))}
    parts = (flatten(v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items())
    return {name: value for part in parts for name, value in part.items()}


def fork(source: Path, workdir: Path, config: Any, resolved: Any):
    """Begin `workdir` with what `source` has, up to the last checkpoint, under another config.

    The stage of that checkpoint is to go on, whatever its inputs now are; stages before it are
    done, those after it are not taken over. What differs is printed and kept in `fork.json`. If
    `workdir` is that fork already nothing is done, so that the same command goes on. The caller
    holds `workdir`. `resolved` is the config with the method's settings filled in, as checkpoints
    have it.

    Raises:
        InputError: there is no checkpoint to go on from, or `workdir` is another run.
    """
    if (workdir / "config.json").exists():
        made = workdir / "fork.json"
        if made.exists() and read_json(made)["from"] == str(source.resolve()):
            return
        raise InputError(f"{workdir} holds a run: give a new --workdir for a fork of {source}")
    if not (source / "config.json").exists():
        raise InputError(f"{source} holds no run: give its work directory to --fork")
    begun = {p.parent.name: p.parent for p in source.glob("stages/*/checkpoints")}
    found = {name: record.steps(folder / "checkpoints") for name, folder in begun.items()}
    order = ("teacher_sft", "student_sft", "distill")
    stage = next((name for name in reversed(order) if found.get(name)), None)
    if stage is None:
        raise InputError(f"{source} has no checkpoint: give a run that has one to --fork")
    earlier = order[: order.index(stage)]
    theirs, mine = read_json(source / "config.json"), config.to_dict()
    changed = differences(theirs, mine)
    if hosts.is_main():
        for folder in sorted((source / "stages").iterdir()):
            done = folder.name in ("teacher_answers", *earlier)
            # What was kept of the teacher is looked at again: other settings may ask for more.
            again = [stage] + ["teacher_targets"] * bool(resolved.distill.cache_teacher)
            if done or folder.name in again:
                _copy(folder, workdir / "stages" / folder.name, done=done)
        write_json(workdir / "stages" / stage / "started.json", {"inputs": None})
        for file in ("metrics.jsonl", "timing.jsonl"):
            if (source / file).exists():
                shutil.copyfile(source / file, workdir / file)
        settings = {"stage": stage, "config": own_settings(resolved.to_dict())}
        record.adopt(workdir / "stages" / stage / "checkpoints", settings)
        what = {name: {"was": was, "now": now} for name, (was, now) in changed.items()}
        step = max(found[stage])
        made = {"from": str(source.resolve()), "stage": stage, "step": step, "changed": what}
        write_json(workdir / "fork.json", made)
        write_json(workdir / "config.json", mine)
        said = ", ".join(f"{name} {was} -> {now}" for name, (was, now) in changed.items())
        print(
            f"forked {source} at update {step} of {stage}: {said or 'the same settings'}",
            file=hosts.log(),
        )
    hosts.barrier("forked")


def _copy(folder: Path, target: Path, *, done: bool):
    shutil.rmtree(target, ignore_errors=True)  # of a fork that was killed
    ignored = () if done else ("done.json",)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*ignored))
    recover(target / "model")
