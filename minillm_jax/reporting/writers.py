"""Files of a run: `metrics.jsonl` and other rows, appended; and JSON written whole or not at all.

Everything is strict JSON: a non-finite number is written as null.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from minillm_jax import hosts
from minillm_jax.types import InputError

_PLACE = ("stage", "step", "seconds")


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types: non-finite floats become None, arrays lists, paths strings."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and jax, scalars and arrays, without importing either
        return jsonable(value.tolist())
    return value


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(jsonable(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _encode(text: str) -> bytes:
    # Half a surrogate pair, which a decoder can produce, becomes \udXXX: still valid JSON.
    return text.encode("utf-8", "backslashreplace")


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write {path}: {error.strerror}; free some space or choose another --workdir"
    )


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text` atomically, as `write_bytes`."""
    write_bytes(path, _encode(text))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data` atomically: a reader sees the old file or the new one.

    Of several processes the first writes, and the others do nothing.

    Raises InputError when the disk is full or the folder cannot be written.
    """
    if not hosts.is_main():
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented strict JSON, atomically."""
    write_text(path, _dumps(value, indent=2) + "\n")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole JSONL file, atomically."""
    write_text(path, "".join(_dumps(row) + "\n" for row in rows))


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in `path`; InputError when it is not one."""
    try:
        value = json.loads(Path(path).read_bytes(), parse_constant=lambda _: None)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); delete it and run again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; delete it and run again")
    return value


def read_rows(path: str | Path, *, until_damage: bool = False) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none if it is absent.

    A last line that is not an object was torn by a kill and is dropped; any other one is an
    InputError that names file and line, or with `until_damage` the end of what is returned.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_constant=lambda _: None)
            if not isinstance(row, dict):
                raise ValueError
        except ValueError as error:
            if until_damage or number == len(lines):
                break
            raise InputError(f"{path}:{number}: not a JSON object; delete this line") from error
        rows.append(row)
    return rows


class RowLog:
    """Rows appended to a JSONL file and flushed at once, so that a killed run keeps them.

    An existing file is continued; a last line torn by a kill is dropped. Of several processes the
    first writes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not _is_whole(self.path):
            write_rows(self.path, read_rows(self.path))
        self._file = self._open()

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write these rows at the end."""
        try:
            self._file.write(_encode("".join(_dumps(row) + "\n" for row in rows)))
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def filter(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the rows that are not wanted; each is asked about once, in order."""
        self._file.close()
        rows = read_rows(self.path)
        kept = [row for row in rows if wanted(row)]
        if len(kept) < len(rows):
            write_rows(self.path, kept)
        self._file = self._open()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "RowLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return open(self.path if hosts.is_main() else os.devnull, "ab")
        except OSError as error:
            raise _cannot_write(self.path, error) from error


class MetricsWriter:
    """Rows `{"stage", "step", <metric>...}` of `metrics.jsonl`, and their times in `timing.jsonl`.

    What the clock says, `{"stage", "step", "seconds", ...}`, is a file of its own, so that
    `metrics.jsonl` is the same byte for byte however often a run was stopped. Both have a row
    for each `write`. With `tensorboard`, the scalars of both go to `workdir/tensorboard/<stage>`.
    """

    def __init__(self, workdir: str | Path, tensorboard: bool = False):
        self.path = Path(workdir) / "metrics.jsonl"
        self._summary_writer = summary_writer() if tensorboard and hosts.is_main() else None
        self._boards: dict[str, Any] = {}
        self._metrics, self._times = RowLog(self.path), RowLog(self.path.with_name("timing.jsonl"))

    def write(
        self,
        stage: str,
        step: int,
        seconds: float,
        metrics: Mapping[str, Any],
        times: Mapping[str, float] | None = None,
    ) -> None:
        """Append a row; `seconds` since the stage began, `times` by the clock, too."""
        taken = [name for name in _PLACE if name in metrics]
        if taken:
            raise ValueError(f"metric names {taken} are the row's own")
        place = {"stage": stage, "step": int(step)}
        times = times or {}
        self._metrics.append({**place, **metrics})
        self._times.append({**place, "seconds": float(seconds), **times})
        if self._summary_writer:
            board = self._board(stage)
            for name, value in jsonable({**metrics, **times}).items():
                if isinstance(value, int | float):
                    board.add_scalar(name, value, step)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The rows of a stage, without their times."""
        return [row for row in read_rows(self.path) if row.get("stage") == stage]

    def truncate(self, stage: str, rows: int, step: int = 0) -> None:
        """Keep the first `rows` rows of a stage, so that one that goes on writes none twice.

        TensorBoard drops what comes after `step`.
        """
        for log in (self._metrics, self._times):
            left = iter(range(rows))
            log.filter(
                lambda row, left=left: row.get("stage") != stage or next(left, None) is not None
            )
        if self._summary_writer:
            self._board(stage, purge_step=step + 1)

    def close(self) -> None:
        """Close the files and the TensorBoard logs."""
        self._metrics.close()
        self._times.close()
        for board in self._boards.values():
            board.close()
        self._boards.clear()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _board(self, stage: str, purge_step: int | None = None) -> Any:
        # One log per stage: TensorBoard drops the steps from `purge_step` on in the whole log.
        if purge_step is not None and stage in self._boards:
            self._boards.pop(stage).close()
        if stage not in self._boards:
            folder = str(self.path.parent / "tensorboard" / stage)
            assert self._summary_writer is not None
            # The files are named by the second, and a second one would overwrite the first.
            self._boards[stage] = self._summary_writer(
                folder, purge_step=purge_step, filename_suffix=f".{time.time_ns()}"
            )
        return self._boards[stage]


def _is_whole(path: Path) -> bool:
    """Whether the file ends in a complete row; a cheap look at its end only."""
    data = path.read_bytes()
    if not data:
        return True
    try:
        return data.endswith(b"\n") and isinstance(json.loads(data.splitlines()[-1]), dict)
    except ValueError:
        return False


def summary_writer() -> Any:
    """Return tensorboardX's class; `InputError` with the pip line where it is missing."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            "TensorBoard logs need tensorboardX: pip install tensorboardX, or leave them off"
        ) from error
    return SummaryWriter
