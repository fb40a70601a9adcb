"""Rows of instruction data: JSON-lines files, the Hub, and the prompts shipped with the package."""

import gzip
import importlib.resources
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm_jax.data import hub
from minillm_jax.types import InputError

MOST = 4 << 20  # bytes of a line


@dataclass(frozen=True)
class Row:
    """One instruction; `output` holds its reference answers, `where` its `file:line`."""

    instruction: str
    input: str = ""
    output: tuple[str, ...] = ()
    where: str = ""


def read(source: str | Path, *, need_output: bool = False) -> list[Row]:
    """The rows of a JSONL file, or of `hub:OWNER/NAME[@REVISION]`, with the fields of `read_jsonl`.

    `hub:databricks/databricks-dolly-15k` is the paper's data; `splits.paper_split` divides it.

    Raises:
        InputError: as `read_jsonl` and `hub.records`.
    """
    if not hub.is_hub(source):
        return read_jsonl(source, need_output=need_output)
    source = str(source)
    instead = "give the file: --config.data.train=FILE.jsonl"
    rows = [
        _row(fields, f"{source} row {number}", need_output)
        for number, fields in enumerate(hub.records(source, instead=instead), 1)
    ]
    if not rows:
        raise InputError(f"{source}: no rows; choose another data set, or {instead}")
    return rows


def read_jsonl(path: str | Path, *, need_output: bool = False) -> list[Row]:
    """Read `instruction`, `input` (optional) and `output` (a string, or a list of references).

    `context` and `response`, the names of databricks-dolly-15k, are read as `input` and `output`.
    A `.gz` file, a byte-order mark, CRLF and blank lines are accepted; other fields are ignored.

    Raises:
        InputError: `file:line: what; cure` for a missing or broken file, invalid UTF-8 or JSON, a
            missing, empty or wrongly typed field, a field given twice or under both names, a NUL,
            a line of more than `MOST` bytes, no rows.
    """
    rows = [_row(fields, where, need_output) for where, fields in objects(path)]
    if not rows:
        raise InputError(f"{path}: no rows; give a file with one JSON object per line")
    return rows


def objects(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file, each with its `file:line`.

    Raises:
        InputError: a missing or broken file, invalid UTF-8 or JSON, a field given twice, a line of
            more than `MOST` bytes.
    """
    path = Path(path)
    for number, line in enumerate(lines(path, MOST), 1):
        where = f"{path}:{number}"
        if len(line) > MOST:
            raise InputError(
                f"{where}: a line of more than {MOST >> 20} MiB; one row per line, none that long"
            )
        text = decoded(line, where, first=number == 1)
        if not text.strip():
            continue
        try:
            fields = json.loads(text, object_pairs_hook=_unique)
        except _Twice as error:
            raise InputError(f"{where}: {error} is given twice; keep one of them") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: invalid JSON ({error}); one object per line") from error
        yield where, fields


def packaged_prompts(split: str) -> list[Row]:
    """The prompts that ship with the package, without answers: `train`, `validation`, `test`."""
    folder = importlib.resources.files("minillm_jax.data") / "prompts"
    resource = folder / f"{split}.jsonl"
    if not resource.is_file():
        raise InputError(f"no packaged prompts {split!r}; choose train, validation or test")
    with importlib.resources.as_file(resource) as path:
        return read_jsonl(path)


class _Twice(Exception):
    """A key of a JSON object that occurs twice: which one is meant is not known."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


def lines(path: Path, most: int = -1) -> Iterator[bytes]:
    """The lines of a file, which may be a `.gz`; one that cannot be read is an InputError.

    Of a line of more than `most` bytes come the first `most` + 1, and no line after it.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            while line := file.readline(most + 1 if most >= 0 else -1):
                yield line
                if 0 <= most < len(line):
                    return
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; correct the path") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); correct or replace it") from error


def decoded(line: bytes, where: str, *, first: bool = False) -> str:
    """A line as text, the first one without its byte-order mark; invalid UTF-8: InputError."""
    try:
        return line.removeprefix(b"\xef\xbb\xbf" if first else b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: invalid UTF-8 at byte {error.start}; save the file as UTF-8"
        ) from error


def _row(fields: Any, where: str, need_output: bool) -> Row:
    if not isinstance(fields, dict):
        raise InputError(f"{where}: {_kind(fields)}, not a JSON object; one object per line")
    instruction = _text(fields.get("instruction"), "instruction", where)
    input_name = _name_in(fields, "input", "context", where)
    given = fields.get(input_name, "")
    output_name = _name_in(fields, "output", "response", where)
    output = fields.get(output_name)
    if output is None and not need_output:
        references: tuple[str, ...] = ()
    elif isinstance(output, list) and output:
        references = tuple(_text(o, f"{output_name}[{i}]", where) for i, o in enumerate(output))
    else:
        references = (_text(output, output_name, where),)
    return Row(
        instruction=instruction,
        input=_text(given, input_name, where) if given not in ("", None) else "",
        output=references,
        where=where,
    )


def _name_in(fields: dict[str, Any], name: str, dolly_name: str, where: str) -> str:
    """The name under which a row has a field: ours, or else the one of databricks-dolly-15k."""
    if name in fields and dolly_name in fields:
        raise InputError(f"{where}: both {name} and {dolly_name} are given; keep one of them")
    return dolly_name if dolly_name in fields else name


def _text(value: Any, name: str, where: str) -> str:
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{where}: {name} is missing or empty; fill it or remove the row")
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is {_kind(value)}, not a string; put it in quotes")
    if "\0" in value:
        raise InputError(f"{where}: {name} has a NUL character; remove it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{where}: {name} has half a surrogate pair; write the whole character")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")
