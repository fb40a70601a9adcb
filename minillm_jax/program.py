"""How every command of the package starts and fails: one line and exit code 2 for bad input."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from minillm_jax.types import InputError


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Parse the flags and call `main` with what is left of the command line."""
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)
    raise SystemExit(0)  # app.run exits itself


def _guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # jax reports the backends that are not there
    try:
        main(argv)
    except InputError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        fail(f"the package {name} is missing: pip install -r requirements.txt")
    except OSError as error:
        if error.errno is None:
            raise
        fail(f"{error.filename or 'system'}: {error.strerror}")


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        fail(_first_line(error))
    except (AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        # What ml_collections raises for a wrong key, a wrong type, or a file it cannot run.
        fail(_first_line(error))


def _first_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return re.sub(r"\s+", " ", text).strip() or type(error).__name__


def fail(message: str) -> NoReturn:
    """Print one line to standard error and exit with code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)
