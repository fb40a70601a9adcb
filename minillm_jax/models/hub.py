"""Models of the Hugging Face Hub: fetched once into the Hub's own cache, used from there after.

Only what a model is made of is fetched: its config, its tokenizer, and its weights as safetensors,
or as pickles of torch where the repository has no others. No code of a repository.
"""

import errno
import json
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from minillm_jax.models import torchfiles
from minillm_jax.models.shards import read_json
from minillm_jax.types import InputError

ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*(@[\w./-]+)?")
_OTHERWISE = "or give a local folder"
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
_SMALL = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|"
    r"tokenizer[\w.]*|chat_template[\w.]*|spiece\.model"
)
# In the order of preference: an index, the shards that it names, or one file.
_WEIGHTS = (
    ("model.safetensors.index.json", re.compile(r"model-\d+-of-\d+\.safetensors")),
    ("model.safetensors", None),
    ("pytorch_model.bin.index.json", re.compile(r"pytorch_model-\d+-of-\d+\.bin")),
    ("pytorch_model.bin", None),
)


def fetch(spec: str) -> Path:
    """Return the folder of `OWNER/NAME` or `OWNER/NAME@REVISION`, a branch, tag or commit.

    What the cache holds whole is used without asking the Hub again. Raises `InputError` for no
    network, no such model or revision, no access, no weights, and no space.
    """
    repository, _, revision = spec.partition("@")
    held = _cached(repository, revision or None)
    if held:
        return held
    import huggingface_hub
    from huggingface_hub import errors

    print(f"fetching {spec} from the Hugging Face Hub, once", file=sys.stderr, flush=True)
    try:
        info = huggingface_hub.HfApi().model_info(
            repository, revision=revision or None, files_metadata=True
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        small, weights = _choose(spec, sizes)
        if weights[0].startswith("pytorch_model"):
            torchfiles.check_installed(f"{spec} on the Hub")  # said before, not after gigabytes
        _check_space(spec, sum(sizes[name] for name in weights))
        # The weights come last: where they are, all is.
        for names in (small, weights):
            folder = huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=names
            )
        return Path(folder)
    except InputError:
        raise
    except Exception as error:  # whatever comes out of a network; its text may hold a token
        raise InputError(_explain(spec, error, errors)) from error


def config(spec: str) -> dict[str, Any]:
    """Return the `config.json` of `OWNER/NAME[@REVISION]`, and fetch nothing else.

    From the Hub's cache; else as published, where it is one of the models known here; else from
    the Hub. Raises `InputError` as `fetch` does.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = spec.partition("@")
    where = {"repo_id": repository, "filename": "config.json", "revision": revision or None}
    try:
        return read_json(Path(huggingface_hub.hf_hub_download(**where, local_files_only=True)))
    except errors.LocalEntryNotFoundError:
        pass
    known = json.loads(files("minillm_jax").joinpath("models/published.json").read_text("utf-8"))
    if repository in known and not revision:
        return known[repository]
    try:
        return read_json(Path(huggingface_hub.hf_hub_download(**where)))
    except Exception as error:  # whatever comes out of a network; its text may hold a token
        reason = _explain(spec, error, errors)
        raise InputError(f"{reason}; a folder with its config.json alone will do here") from error


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the folder in the cache if everything that a model needs is in it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                local_files_only=True,
                allow_patterns=["config.json"],
            )
        )
    except LocalEntryNotFoundError:
        return None
    here = {path.name for path in folder.iterdir() if path.exists()}  # a link may dangle
    if "config.json" not in here or here.isdisjoint(_TOKENIZERS):
        return None
    for name, shard in _WEIGHTS:
        if name in here:
            return folder if shard is None or _shards_are_there(folder / name, here) else None
    return None


def _shards_are_there(index: Path, here: Collection[str]) -> bool:
    return set(re.findall(r'"([^"/]+\.(?:safetensors|bin))"', index.read_text())) <= set(here)


def _choose(spec: str, sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Return the names of the small files and of the weights that a model is made of."""
    small = [name for name in sizes if _SMALL.fullmatch(name)]
    for name, shard in _WEIGHTS:
        if name in sizes:
            return small, [name, *(n for n in sizes if shard and shard.fullmatch(n))]
    raise InputError(
        f"{spec} on the Hub has neither safetensors nor pytorch_model.bin; choose another model, "
        f"{_OTHERWISE}"
    )


def _check_space(spec: str, size: int):
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < size:
        raise OSError(errno.ENOSPC, f"it needs {size / 1e9:.1f} GB, {free / 1e9:.1f} are free")


def _explain(spec: str, error: BaseException, errors) -> str:
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # the library looked into the cache for want of an answer
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "accept its licence on its page, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"{spec} is gated, and this account has no access to it; {login}, {_OTHERWISE}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{spec}: the model has no such revision; correct what follows the @"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"{spec} is neither a path here nor a model on the Hub, or a private one; correct it, "
            f"or {login}"
        )
    if status is not None:
        return f"the Hub answers {status} for {spec}; try again later, {_OTHERWISE}"
    if isinstance(error, OSError) and error.errno is not None and _local(error.errno):
        from huggingface_hub import constants

        cure = "free some space there" if error.errno == errno.ENOSPC else "make it writable"
        return (
            f"cannot keep {spec} in {constants.HF_HUB_CACHE} ({error.strerror}); {cure}, "
            "or name another folder with HF_HOME"
        )
    return (
        f"{spec} is neither a path here nor in the cache, and the Hub is out of reach "
        f"({type(error).__name__}); check the path, or the network and HF_HUB_OFFLINE"
    )


def _local(number: int) -> bool:
    """Whether an error number is one of disks, not of networks."""
    names = ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EIO", "EEXIST", "ENOTDIR", "EISDIR")
    return number in {getattr(errno, name) for name in names if hasattr(errno, name)}
