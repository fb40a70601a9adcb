"""A work directory in a bucket, for hosts that share no disk: `gs://BUCKET/PATH`.

    gs://BUCKET/PATH/...                          the run, file by file as it would be in a folder
                    /stages/STAGE/checkpoints     Orbax reads and writes these there, every process
                    /lock                         while a run is on: its host, process and start
    $MINILLM_CACHE/runs/NAME/RANK/...             the image of all the rest, one for each process

Stages read and write the image. `push` brings what process 0 has written to the bucket, `pull`
makes the image of a process equal to it. Objects are replaced whole, but several not at once, so
their order tells what is whole: `done.json` is removed first and written last; a model loses its
`config.json` before a file of it changes and gets it back after all of them, and without one it is
none. What a checkpoint vouches for (rows of metrics, the best model) is pushed before it is saved.

Objects go through gcsfs and not through etils, which tells no generations and writes over any.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import jax
from fsspec.config import conf

from minillm_jax import hosts, stopping
from minillm_jax.models import fetch
from minillm_jax.types import InputError

SILENCE = 60.0  # seconds after which the run of another host is taken for dead
_BEAT = 10.0  # seconds between two signs of life
_CURE = "check its name, your credentials and your role on it (storage.objectUser)"


class Bucket:
    """The run at `url`, and `image`, the folder in which it is read and written.

    Raises `InputError` for another kind of URL, or where gcsfs is missing; asks nothing yet.
    """

    def __init__(self, url: str, image: Path | None = None):
        if not re.fullmatch(r"gs://[^/]+(/[^/]+)+/?", url):
            raise InputError(f"--workdir={url}: give a folder, or gs://BUCKET/PATH")
        self.url = url.rstrip("/")
        self._root = self.url.removeprefix("gs://")
        self._objects = _file_system()
        rank = str(jax.process_index())
        self.image = image or fetch.cache() / "runs" / quote(self._root, safe="") / rank
        self._pulled: dict[str, str] = {}  # generations of what is in the image
        self._pushed: dict[str, tuple[int, int]] = {}  # sizes and times of what is in the bucket
        self._last = 0.0

    def pull(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Make the image equal to the bucket, as far as names are `wanted`.

        Raises:
            InputError: the bucket cannot be read, or the image not written.
        """
        with self._one_line("read"):
            found = {name: x for name, x in self._listed().items() if wanted(name)}
            for name in self._here().keys() - found.keys():
                (self.image / name).unlink()
                _remove_empty((self.image / name).parent)
            for name, generation in found.items():
                path = self.image / name
                if self._pulled.get(name) != generation:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    part = path.with_name(f".{path.name}.tmp")
                    self._objects.get_file(f"{self._root}/{name}", str(part))
                    part.replace(path)
        self._pulled, self._pushed = found, self._here()

    def push(self) -> None:
        """Bring what is new in the image of process 0 to the bucket, and remove what is gone.

        Raises:
            InputError: the bucket cannot be written; what is there is whole, or known not to be.
        """
        if not hosts.is_main():
            return
        here, there = self._here(), self._pushed
        changed = {name for name in here.keys() | there.keys() if here.get(name) != there.get(name)}
        gone = (changed - here.keys()) | ({_config_of(name) for name in changed} & there.keys())
        with self._one_line("written"):
            for name in sorted(gone, key=_vouches, reverse=True):
                self._objects.rm_file(f"{self._root}/{name}")
                del there[name]
            for name in sorted(here, key=_vouches):
                if there.get(name) != here[name]:
                    self._objects.put_file(str(self.image / name), f"{self._root}/{name}")
                    there[name] = here[name]
        self._last = time.monotonic()

    def push_after(self, seconds: float) -> None:
        """`push` if the last time is so long ago; a failure is said, and does no harm yet."""
        if hosts.is_main() and time.monotonic() - self._last >= seconds:
            try:
                self.push()
            except InputError as error:
                self._last = time.monotonic()
                print(f"warning: {error}; tried again later", file=hosts.log())

    def share(self) -> None:
        """Let every process have what process 0 has written; all must call it.

        Raises:
            InputError: one of them cannot reach the bucket.
        """
        _together(self.push)
        _together(lambda: None if hosts.is_main() else self.pull())

    def remove(self, folder: str) -> None:
        """Remove a folder that is only in the bucket, if it is there."""
        with self._one_line("written"), contextlib.suppress(FileNotFoundError):
            self._objects.rm(f"{self._root}/{folder}", recursive=True)

    def _listed(self) -> dict[str, str]:
        """The generation of every object that belongs into an image."""
        listed: Any = self._objects.find(self._root, detail=True)
        found = {
            path.removeprefix(f"{self._root}/"): str(about["generation"])
            for path, about in listed.items()
            if "/checkpoints/" not in path and not path.endswith("/")
        }
        found.pop("lock", None)
        return {name: x for name, x in found.items() if _config_of(name) in ("", *found)}

    def _here(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file of the image, those that are being written left out."""
        found = {}
        for folder, folders, names in os.walk(self.image):
            folders[:] = [name for name in folders if _is_whole(name)]
            for path in (Path(folder, name) for name in names if _is_whole(name)):
                about = path.stat()
                name = path.relative_to(self.image).as_posix()
                found[name] = about.st_size, about.st_mtime_ns
        found.pop("lock", None)
        return found

    @contextlib.contextmanager
    def _one_line(self, done: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # gcsfs, aiohttp and google.auth have no class in common
            reason = re.sub(r"\s+", " ", str(error)).strip()[:200] or type(error).__name__
            raise InputError(f"{self.url} cannot be {done} ({reason}): {_CURE}") from error

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the bucket for this run; that it can be written is seen on the way.

        A run whose object `lock` does not change for a minute is over, and so is one of a dead
        process of this host. A run that finds another one's lock in place of its own ends.

        Raises:
            InputError: another run holds it, or it cannot be written.
        """
        path = f"{self._root}/lock"
        here: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        mine = json.dumps(here | {"start": time.time()}).encode()
        while True:
            with self._one_line("written"), contextlib.suppress(FileExistsError):
                self._objects.pipe_file(path, mine, mode="create")  # of two one succeeds
                break
            if holder := self._alive(path, here):
                raise InputError(
                    f"{self.url} is in use by process {holder.get('pid')} on {holder.get('host')}: "
                    "wait for that run, end it, or give another --workdir"
                )
            self._unlock(path)
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(path, mine, ended), daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            with contextlib.suppress(InputError):
                self._unlock(path)

    def _unlock(self, path: str) -> None:
        """Remove the lock, asking for no listing: where reading is forbidden it goes as well."""
        with self._one_line("written"), contextlib.suppress(FileNotFoundError):
            self._objects.rm_file(path)

    def _alive(self, path: str, here: dict[str, Any]) -> dict[str, Any]:
        """What the lock says of its run, nothing if that is over."""
        until, first = time.monotonic() + SILENCE, None
        with self._one_line("read"), contextlib.suppress(FileNotFoundError):
            while time.monotonic() < until:
                about = self._objects.info(path)["generation"]
                holder = json.loads(self._objects.cat_file(path))
                if holder["host"] == here["host"] and _is_over(holder["pid"]):
                    return {}
                if first is None:
                    print(f"{self.url}: is its run on {holder['host']} over?", file=hosts.log())
                    first = about
                if about != first:
                    return holder
                time.sleep(min(1.0, SILENCE / 10))
        return {}

    def _beat(self, path: str, mine: bytes, ended: threading.Event) -> None:
        while not ended.wait(_BEAT):
            with contextlib.suppress(Exception):  # the next one may come through
                if self._objects.cat_file(path) == mine:
                    self._objects.pipe_file(path, mine)
                else:
                    print(f"error: {self.url} was taken over by another run", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(2)


@contextlib.contextmanager
def attached(url: str) -> Iterator[Bucket]:
    """The bucket, held, with an image in each process; in the end what is left is pushed.

    All processes must call it. Messages name the bucket where they would name the image.

    Raises:
        InputError: it cannot be reached, or another run holds it.
    """
    bucket = Bucket(url)
    with contextlib.ExitStack() as held:
        if hosts.is_main():
            _together(lambda: held.enter_context(bucket.claimed()))
            shutil.rmtree(bucket.image, ignore_errors=True)
        else:
            _together(lambda: shutil.rmtree(bucket.image, ignore_errors=True))
        _together(bucket.pull)
        try:
            yield bucket
        except BaseException as error:
            with contextlib.suppress(InputError):
                bucket.push()
            if not isinstance(error, InputError | stopping.Stopped):
                raise
            text = str(error).replace(str(bucket.image), bucket.url)
            raise type(error)(text) from error
        bucket.push()


@contextlib.contextmanager
def looked_at(url: str) -> Iterator[Path]:
    """A folder with what tells how far a run is; nothing is written into the bucket."""
    with tempfile.TemporaryDirectory() as folder:
        bucket = Bucket(url, Path(folder))
        bucket.pull(lambda name: name == "config.json" or name.endswith("/done.json"))
        yield bucket.image


def _together(work: Callable[[], Any]) -> None:
    """Do this in every process; if one cannot, all of them refuse."""
    refusal = None
    try:
        work()
    except InputError as error:
        refusal = error
    if not hosts.agree(refusal is None):
        raise refusal or InputError("another process cannot use the bucket: see its line")


def _file_system() -> Any:
    # What another process has written must not be hidden by a listing that is kept; Orbax comes
    # here through etils, so it is a setting of all.
    conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the traceback of each refusal
    try:
        return fsspec.filesystem("gcs")
    except ImportError as error:
        raise InputError("a work directory in a bucket needs gcsfs: pip install gcsfs") from error
    except Exception as error:  # of google.auth: no credentials
        raise InputError(f"no access to Cloud Storage ({error}): {_CURE}") from error


def _config_of(name: str) -> str:
    """The file that makes a model whole, for a file of one; else nothing."""
    folder, found, _ = f"/{name}".rpartition("/model/")
    return f"{folder}{found}config.json"[1:] if found else ""


def _vouches(name: str) -> int:
    """What is written later: a file that says that others are whole."""
    return 2 if name.endswith("done.json") else int(name == _config_of(name))


def _is_whole(name: str) -> bool:
    return not name.startswith(".") and not name.endswith((".tmp", ".part", ".old"))


def _is_over(pid: int) -> bool:
    """Whether a process of this host has ended; one of this number was an earlier start."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        while True:
            folder.rmdir()
            folder = folder.parent
