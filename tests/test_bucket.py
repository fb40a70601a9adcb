"""A work directory in a bucket: what is whole, the lock, refusals."""

import importlib.util
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from fsspec.config import conf

from minillm_jax import bucket
from minillm_jax.bucket import Bucket
from minillm_jax.checkpoint import Checkpoints
from minillm_jax.types import InputError
from tests.gcs_server import Server
from tests.toy_run import command, one_device, write_config

if importlib.util.find_spec("gcsfs") is None:  # not imported before the variables are set
    pytest.skip("needs pip install gcsfs", allow_module_level=True)

# How ml_collections imports a config file.
pytestmark = pytest.mark.filterwarnings("ignore:.*(load_module|exec_module):DeprecationWarning")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The toy experiment."""
    folder = tmp_path_factory.mktemp("toy")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def storage():
    """The bucket of this module, for this process and those it starts."""
    with Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environ().items():
            patch.setenv(name, value)
        patch.setitem(conf, "gcs", {"token": "anon"})
        yield server


@pytest.fixture
def url(storage, request, monkeypatch, tmp_path):
    """A place of its own for each test; `tmp_path` is the disk."""
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    yield f"gs://bucket/{request.node.name}"
    storage.refused.clear()


def names(storage: Server, url: str) -> list[str]:
    start = url.removeprefix("gs://bucket/") + "/"
    return [name.removeprefix(start) for name in storage.names(start)]


def state(value):
    return {"x": jnp.full((8,), value, jnp.float32)}


@pytest.mark.usefixtures("storage")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_in_a_bucket_are_whole_or_set_aside_or_not_there(url, storage):
    abstract = {"x": jax.ShapeDtypeStruct((8,), jnp.float32)}
    start = f"{url.removeprefix('gs://bucket/')}/c/"
    Bucket(url)  # no listing is kept
    with Checkpoints(f"{url}/c", {}) as checkpoints:
        assert checkpoints.restore(abstract) is None
        for step in (1, 2, 3):
            checkpoints.save(step, state(step))
    assert {name.split("/")[1] for name in names(storage, url)} == {"2", "3"}
    del storage.objects[f"{start}3/commit_success.txt"]  # as a kill before the end leaves it
    with Checkpoints(f"{url}/c", {}) as checkpoints:
        assert (found := checkpoints.restore(abstract)) and found.step == 2
        storage.refused.add("POST")
        with pytest.raises(
            InputError, match=r"cannot write a checkpoint in gs://.*(no permission|Forbidden)"
        ):
            checkpoints.save(3, state(4))
            checkpoints.wait()
        storage.refused.clear()
        checkpoints.save(3, state(4))
        checkpoints.wait()
        data = next(name for name in storage.names(f"{start}3/state/") if "/d/" in name)
        storage.write(data, storage.objects[data][0][:-9])
    with Checkpoints(f"{url}/c", {}) as checkpoints:
        restored = checkpoints.restore(abstract)
        assert restored and restored.step == 2 and (restored.state["x"] == 2).all()
        assert {"unreadable-3", "2"} == {name.split("/")[1] for name in names(storage, url)}


def fill(image: Path, **files: str) -> None:
    """Write files: `a__b` is a/b."""
    for name, text in files.items():
        path = image / name.replace("__", "/").replace("_JSON", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_says_that_others_are_whole_comes_last_and_goes_first(url, storage, tmp_path):
    here, there = Bucket(url, tmp_path / "a"), Bucket(url, tmp_path / "b")
    model = "stages/s/model/"
    fill(here.image, stages__s__done_JSON="1", stages__s__model__config_JSON="1")
    fill(here.image, stages__s__model__weights="1", stages__s__rows="1", lock="", z="1")
    fill(here.image, stages__s__model_old="no")
    (here.image / "stages/s/model_old").rename(here.image / "half.tmp")
    begin = len(storage.calls)

    def calls():
        start = len(url) - len("gs://bucket/") + 1
        return [(verb, name[start:]) for verb, name in storage.calls[begin:]]

    here.push()
    order = [name for _, name in calls()]
    assert order[-2:] == [f"{model}config.json", "stages/s/done.json"]
    assert sorted(order[:-2]) == [f"{model}weights", "stages/s/rows", "z"]
    there.pull()
    assert sorted(there._here()) == sorted(order)

    begin = len(storage.calls)
    (here.image / "stages/s/done.json").unlink()
    (here.image / "z").unlink()
    fill(here.image, stages__s__model__weights="22")
    storage.refused.add("POST")  # as a kill after the first of two steps
    with pytest.raises(InputError, match=r"cannot be written \(.*no permission.*check its name"):
        here.push()
    first, *rest = calls()
    assert first == ("delete", "stages/s/done.json")
    assert sorted(rest) == [("delete", f"{model}config.json"), ("delete", "z")]
    there.pull()
    assert not (there.image / model).exists() and (there.image / "stages/s/rows").exists()
    storage.refused.clear()
    here.push()
    there.pull()
    assert (there.image / model / "weights").read_text() == "22"
    assert (there.image / model / "config.json").exists()
    begin = len(storage.calls)
    here.push()
    assert not calls()


def put_lock(storage: Server, url: str, **holder) -> None:
    storage.write(f"{url.removeprefix('gs://bucket/')}/lock", json.dumps(holder).encode())


def test_a_bucket_has_one_run_at_a_time(url, storage, monkeypatch, capsys):
    monkeypatch.setattr(bucket, "SILENCE", 0.6)
    monkeypatch.setattr(bucket, "_BEAT", 0.1)
    with Bucket(url).claimed():
        monkeypatch.setattr("socket.gethostname", lambda: "another")
        with pytest.raises(InputError, match=r"is in use by process \d+ on .*: wait for that run"):
            with Bucket(url).claimed():
                pass
    assert names(storage, url) == []
    put_lock(storage, url, host="elsewhere", pid=7)
    with Bucket(url).claimed():
        assert "is its run on elsewhere over?" in capsys.readouterr().err
        ended: list[int] = []
        monkeypatch.setattr("os._exit", ended.append)
        put_lock(storage, url, host="elsewhere", pid=7)
        while not ended:
            time.sleep(0.05)
    assert ended[0] == 2 and "was taken over by another run" in capsys.readouterr().err


def test_the_lock_of_a_dead_process_of_this_host_is_none(url, storage):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    put_lock(storage, url, host=socket.gethostname(), pid=process.pid)
    began = time.monotonic()
    with Bucket(url).claimed():
        assert names(storage, url) == ["lock"]
    assert time.monotonic() - began < bucket.SILENCE / 2


REFUSED = {
    "no permission": ("gs://bucket/run", {"POST"}, "gs://bucket/run cannot be written (Forbidden"),
    "no reading": ("gs://bucket/run", {"GET"}, "gs://bucket/run cannot be read (Forbidden"),
    "no bucket": ("gs://other/run", set(), "gs://other/run cannot be written ("),
    "no path": ("gs://bucket", set(), "--workdir=gs://bucket: give a folder, or gs://BUCKET/PATH"),
    "no such kind": ("s3://bucket/run", set(), "give a folder, or gs://BUCKET/PATH"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bucket_that_cannot_be_used_is_a_line(case, url, storage, folder, monkeypatch, capsys):
    del url  # but the disk it gives
    where, storage.refused, says = REFUSED[case]
    one_device(monkeypatch)
    begin = len(storage.calls)
    code = command(monkeypatch, "main", f"--config={folder / 'toy.py'}", "--workdir", where)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert code == 2 and not out and line.startswith("error: ") and says in line
    storage.refused.clear()
    # Where only reading is forbidden the lock was made, and is gone again.
    assert {name for _, name in storage.calls[begin:]} <= {"run/lock"}
    assert not storage.names("run/")


def test_what_buckets_cannot_is_said(url, folder, monkeypatch, capsys):
    config = f"--config={folder / 'toy.py'}"
    for name, words, says in (
        ("main", ["--workdir", url, "--fork", "runs/x"], "gcloud storage cp -r gs://BUCKET/PATH"),
        (
            "main",
            ["--workdir", "runs/y", "--fork", url],
            "--fork and its --workdir must be of folders",
        ),
        ("main", ["--workdir", url, "--replay", "x.npz"], "--replay and its --workdir must be"),
        (
            "compare",
            ["--workdir", url, "--methods=sft"],
            f"--workdir={url}: compare needs a folder",
        ),
    ):
        assert command(monkeypatch, name, config, *words) == 2
        assert says in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    sys.modules["fsspec.registry"]._registry.pop("gcs", None)
    assert command(monkeypatch, "main", config, "--workdir", url) == 2
    assert "needs gcsfs: pip install gcsfs" in capsys.readouterr().err


def test_a_dry_run_tells_what_is_done_and_writes_nothing(
    url, storage, folder, tmp_path, monkeypatch, capsys
):
    done = {"inputs": {}, "finished": "then", "tokens": 1, "updates": 0, "seconds": 1.0}
    start = url.removeprefix("gs://bucket/")
    storage.write(f"{start}/stages/teacher_answers/done.json", json.dumps(done).encode())
    begin = len(storage.calls)
    one_device(monkeypatch)
    words = [f"--config={folder / 'toy.py'}", "--workdir", url, "--dry_run"]
    assert command(monkeypatch, "main", *words) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["workdir"] == url
    states = {one["stage"]: one["state"] for one in described["stages"]}
    assert (states["teacher_answers"], states["student_sft"]) == ("done", "to do")
    assert len(storage.calls) == begin and not (tmp_path / "runs").exists()
