"""Data sets of the Hugging Face Hub, through the `datasets` package.

The package takes seconds to import, so that happens only when a data set is asked for. It runs no
code of a data set. What it has downloaded it keeps in its own cache.
"""

from collections.abc import Iterator
from typing import Any

from minillm_jax.types import InputError

PREFIX = "hub:"
SITE = "https://huggingface.co/datasets"


def is_hub(source: object) -> bool:
    """Whether a source is named `hub:OWNER/NAME[@REVISION]`."""
    return str(source).startswith(PREFIX)


def records(
    source: str, *, instead: str, streaming: bool = False, split: str = "train"
) -> Iterator[dict[str, Any]]:
    """The rows of a split of `hub:OWNER/NAME[@REVISION]`, fields that are null left out.

    A folder in the layout of such a data set may stand in the place of OWNER/NAME.

    Args:
        instead: how to give a local file, the cure in messages.
        streaming: read while downloading and keep nothing, for what is large.

    Raises:
        InputError: no network, no such data set or revision, no access, no such split.
    """
    name, _, revision = source.removeprefix(PREFIX).partition("@")
    try:
        from datasets import exceptions, load_dataset
    except ImportError as error:
        raise InputError(
            f"{source}: the package `datasets` is missing: pip install datasets; or {instead}"
        ) from error
    options: dict[str, Any] = {"revision": revision or None, "streaming": streaming}
    try:
        # An error may come while streaming, too.
        for fields in load_dataset(name, split=split, **options):
            yield {key: value for key, value in dict(fields).items() if value is not None}
    except exceptions.DatasetNotFoundError as error:
        raise InputError(
            f"{source}: {_first_line(error)}; correct the name or the revision, or run "
            f"`hf auth login` if it needs access; or {instead}"
        ) from error
    except OSError as error:  # that of the network, which `datasets` raises as ConnectionError
        # Its text may hold a signed address, so only its kind is named.
        raise InputError(
            f"{source}: not in the cache, and the Hub cannot be read ({type(error).__name__}); "
            f"download it from {SITE}/{name} where there is a network, and {instead}"
        ) from error
    except RuntimeError as error:  # data sets that are a program, which `datasets` does not run
        raise InputError(
            f"{source}: {_first_line(error)}; try {PREFIX}{name}@refs/convert/parquet, or {instead}"
        ) from error
    except (ValueError, exceptions.DatasetsError) as error:
        raise InputError(f"{source}: {_first_line(error)}; correct it, or {instead}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
