"""How every command of the package starts and fails: one line and exit code 2 for bad input.

A command has flags of its own, not absl's global ones: then several commands fit in one process,
and `--help` lists what belongs to the command and nothing else.
"""

import difflib
import errno
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging

from minillm_jax import stopping
from minillm_jax.types import InputError

_NO_PAIR = ("common", "paper")  # of configs: what the others are made of
CACHE_BYTES = 4 * 2**30  # of programs that are kept; those not used for longest go first


def run(main: Callable[[list[str]], None], known: flags.FlagValues, keep: bool = True) -> NoReturn:
    """Run `main` with the command line of this process, and exit.

    `keep`: have jax keep the programs that it compiles.
    """
    if keep and not _asks_for_help(sys.argv):
        keep_programs()
    try:
        code = call(main, known, sys.argv)
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        from minillm_jax import hosts  # imports jax, which --help does not need

        hosts.leave(code)
    raise SystemExit(code)


def call(main: Callable[[list[str]], None], known: flags.FlagValues, argv: Sequence[str]) -> int:
    """Parse `argv` into the flags `known`, call `main` with what is left, return the exit code.

    0: done, or stopped by SIGTERM and saved. 2: bad input, said in one line on standard error.
    130: interrupted by the user.
    """
    logging.set_verbosity(logging.WARNING)  # jax reports the backends that are not there
    if _asks_for_help(argv):
        print(f"{sys.modules[main.__module__].__doc__}\n{known.get_help()}")
        return 0
    try:
        main(_parse(known, argv))
    except InputError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name == "minillm_jax":
            raise
        return _fail(f"the package {name} is missing: pip install -r requirements.txt")
    except OSError as error:
        if error.errno is None:
            raise
        cures = {
            errno.ENOSPC: "free some space or choose another folder",
            errno.EFBIG: "raise the limit on the size of files or choose another folder",
        }
        cure = cures.get(error.errno, "correct the path or its permissions")
        return _fail(f"{error.filename or 'cannot write'}: {error.strerror}; {cure}")
    except stopping.Stopped as error:
        from minillm_jax import hosts

        if hosts.is_main():
            stopping.say(str(error))
        return hosts.stop_code()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _asks_for_help(argv: Sequence[str]) -> bool:
    return bool({"--help", "-help", "-h"} & set(argv[1:]))


def keep_programs() -> None:
    """Have jax keep programs that took a second to compile, for the next start.

    In `$MINILLM_CACHE`, by default `~/.cache/minillm_jax`; where jax was given a folder already,
    there. The name of a program has the hardware in it, a CPU's instructions, too. Nothing is kept
    where nothing can be written.
    """
    import jax  # which --help does not need

    from minillm_jax.models import fetch

    settings: Any = jax.config  # whose attributes are made at run time
    if settings.jax_compilation_cache_dir is not None:
        return
    try:
        folder = fetch.cache() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    if os.access(folder, os.W_OK):
        settings.update("jax_compilation_cache_dir", str(folder))
        settings.update("jax_compilation_cache_max_size", CACHE_BYTES)


def _fail(message: str) -> int:
    print(f"error: {_one_line(message)}", file=sys.stderr, flush=True)
    return 2


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _parse(known: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """What is left of `argv` after the flags.

    Raises:
        InputError: no such flag, file or setting, or a value of the wrong kind.
    """
    spec = _experiment(argv)
    if spec.startswith("-"):
        raise InputError(f"--config has no value before {spec}: write --config=FILE.py")
    path = Path(spec.partition(":")[0])
    if spec and not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.py") if p.stem not in _NO_PAIR)
        there = f"choose from {', '.join(beside)}" if beside else "correct the path"
        raise InputError(f"no experiment {path}: {there}")
    try:
        return known(list(argv))
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            raise InputError(f"--{error.flagname} needs --config FILE.py before it") from error
        close = difflib.get_close_matches(error.flagname, list(known), 1)
        cure = f"did you mean --{close[0]}?" if close else "--help lists those there are"
        raise InputError(f"no flag --{error.flagname}: {cure}") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # What ml_collections raises for a wrong key, a wrong type, or a file it cannot run.
        if wrong := spec and _wrong_override(spec, argv):
            raise InputError(wrong) from error
        if spec and isinstance(error, KeyError):  # whose text is the key alone
            raise InputError(f"{path} cannot be run: KeyError: {error}; correct it") from error
        raise InputError(_reason(error, known)) from error
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path} needs the module {error.name}: start in the folder that has it, or pip "
            "install it"
        ) from error
    except Exception as error:  # whatever the file may raise
        if not spec:
            raise
        raise InputError(
            f"{path} cannot be run: {type(error).__name__}: {error}; correct it"
        ) from error


def _experiment(argv: Sequence[str]) -> str:
    """The value of `--config`, empty if there is none."""
    for index, word in enumerate(argv):
        if word in ("--config", "-config"):
            return argv[index + 1] if index + 1 < len(argv) else ""
        if found := re.match("--?config=", word):
            return word[found.end() :]
    return ""


def _wrong_override(spec: str, argv: Sequence[str]) -> str | None:
    """What is wrong with the name of an override; None if the config itself cannot be made."""
    path, _, argument = spec.partition(":")
    try:
        config = runpy.run_path(path)["get_config"](*([argument] if argument else []))
    except Exception:  # then that is the error, and it has been raised already
        return None
    leaves = list(_leaves(config.to_dict()))
    for word in argv:
        found = re.match(r"--?(?:no)?config\.([\w.]+)", word)
        if not found or found[1] in leaves:
            continue
        name = found[1]
        inside = [leaf for leaf in leaves if leaf.startswith(f"{name}.")]
        if inside:
            return f"--config.{name} is a group of settings: name one, such as {inside[0]}"
        last = name.rpartition(".")[2]
        same = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
        close = difflib.get_close_matches(name, leaves, 1, 0.6) or same[:1]
        cure = f"did you mean --config.{close[0]}?" if close else "configs/common.py lists them all"
        return f"no setting config.{name}: {cure}"
    return None


def _leaves(tree: dict[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _reason(error: BaseException, known: flags.FlagValues) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Traceback (most recent call last)" in text:  # how ml_collections hands on an exception
        last = [line for line in text.splitlines() if line.strip()][-1]
        return re.sub(r"^[\w.]*(Error|Exception): ", "", last.strip())
    value = re.match(r"flag --([\w.]+)=(.*?): (.*)", _one_line(text))
    if value and value[1] in known:
        flag = known[value[1]]
        kind = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        wanted = kind.get(flag.flag_type(), value[3])
        example = "" if flag.default is None else f", such as {flag.default}"
        return f"--{value[1]}={value[2]}: give {wanted}{example}"
    return _one_line(text) or type(error).__name__
