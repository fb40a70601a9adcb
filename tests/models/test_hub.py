"""The real client of the Hub against a server on this machine, and against none."""

import errno
import http.server
import json
import sys
import threading
import urllib.parse

import huggingface_hub
import numpy as np
import pytest
from golden import make
from huggingface_hub import constants

from minillm_jax.models import fetch, hf, hub
from minillm_jax.types import InputError

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secretsecretsecret"


class Server(http.server.ThreadingHTTPServer):
    """Models by id, each a folder; what was asked for is in `asked`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.asked = {}, []
        self.closed = {}  # id -> (status, error code) of its files
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        folder = self.server.models.get(f"{owner}/{name}")
        if folder is None:  # as the Hub does for whoever is not logged in
            return self.answer(401, X_Error_Message="Invalid username or password.")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "half", SHA):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        if api and rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": str(hash(body))}
                for name, body in files.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        if api:
            about = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
            about = {"id": f"{owner}/{name}", "sha": SHA, "siblings": about}
            return self.answer(200, json.dumps(about).encode())
        if f"{owner}/{name}" in self.server.closed:
            status, code = self.server.closed[f"{owner}/{name}"]
            return self.answer(status, X_Error_Code=code, X_Error_Message=f"no, {TOKEN}")
        body = files[rest[2]]
        self.answer(200, body, ETag=f'"{abs(hash(body)):x}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    huggingface_hub.close_session()
    folder = tmp_path / "served"
    make.write_folder("gpt2", folder)
    (folder / "tokenizer.json").write_text("{}")
    server.models["someone/tiny-gpt2"] = folder
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


def refused(spec, *said):
    with pytest.raises(InputError) as caught:
        fetch.resolve(spec)
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message
    for words in said:
        assert words in message


@pytest.mark.parametrize("spec", ["someone/tiny-gpt2", "hf:someone/tiny-gpt2@half"])
def test_a_model_is_fetched_once_and_then_used_without_the_hub(server, spec, tmp_path, monkeypatch):
    folder = server.models["someone/tiny-gpt2"]
    for name in ("README.md", "modeling.py", "flax_model.msgpack", "pytorch_model.bin", "a.json"):
        (folder / name).write_text("not asked for")
    found = fetch.resolve(spec)
    assert found.is_relative_to(tmp_path / "cache")
    names = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {file.name for file in found.iterdir()} == names
    wanted, held = hf.load(folder), hf.load(found)
    np.testing.assert_array_equal(held.params["embed"]["tokens"], wanted.params["embed"]["tokens"])
    server.asked.clear()
    assert fetch.resolve(spec) == found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch.resolve(spec) == found
    assert not server.asked


def shards(folder, suffix, whole):
    """Put two files and their index in the place of the weights."""
    (folder / "model.safetensors").unlink()
    stem = whole.removesuffix(f".{suffix}")
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for file in files:
        (folder / file).write_text(file)
    index = {"weight_map": {"a": files[0], "b": files[1]}}
    (folder / f"{whole}.index.json").write_text(json.dumps(index))
    return {*files, f"{whole}.index.json", "config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("suffix", "whole"), [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")]
)
def test_shards_come_with_their_index(server, suffix, whole, monkeypatch):
    monkeypatch.setattr(hub.torchfiles, "check_installed", lambda what: None)
    names = shards(server.models["someone/tiny-gpt2"], suffix, whole)
    found = fetch.resolve("someone/tiny-gpt2")
    assert {file.name for file in found.iterdir()} == names
    (found / f"{whole.removesuffix(f'.{suffix}')}-00002-of-00002.{suffix}").unlink()
    server.asked.clear()
    assert fetch.resolve("someone/tiny-gpt2") == found  # a download that was broken off goes on
    assert server.asked and {file.name for file in found.iterdir()} == names


def test_pickles_are_not_fetched_where_nothing_can_read_them(server, monkeypatch):
    shards(server.models["someone/tiny-gpt2"], "bin", "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused("someone/tiny-gpt2", "someone/tiny-gpt2 on the Hub was pickled", "`pip install torch")
    assert not [path for path in server.asked if "/resolve/" in path]


def test_a_cache_without_a_tokenizer_is_completed(server):
    found = fetch.resolve("someone/tiny-gpt2")
    (found / "tokenizer.json").unlink()
    assert (fetch.resolve("someone/tiny-gpt2") / "tokenizer.json").exists()


def test_a_path_that_exists_wins_unless_the_spec_says_hub(server, tmp_path):
    local = tmp_path / "someone/tiny-gpt2"
    local.mkdir(parents=True)
    assert not fetch.is_remote("someone/tiny-gpt2")
    assert fetch.resolve("someone/tiny-gpt2").resolve() == local
    assert not server.asked
    assert fetch.resolve("hf:someone/tiny-gpt2").is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize(
    ("spec", "remote"),
    [
        ("openai-community/gpt2-xl", True),
        ("EleutherAI/gpt-j-6b@float16", True),
        ("Qwen/Qwen2.5-7B@refs/pr/1", True),
        ("hf:gpt2", True),
        ("pip:a==1", True),
        ("gpt2", False),
        ("./models/gpt2", False),
        ("../gpt2", False),
        ("~/models", False),
        ("/models/gpt2", False),
        ("a/b/c", False),
        ("runs/", False),
    ],
)
def test_what_is_an_id_and_what_a_path(spec, remote, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fetch.is_remote(spec) == remote


@pytest.mark.parametrize("spec", ["hf:", "hf:a/b/c", "hf:../x", "hf:a b", "hf:a/b@", "hf:u:p@x/y"])
def test_what_is_no_id_is_refused(server, spec):
    refused(spec, "not of the form hf:OWNER/NAME")
    assert not server.asked


def test_no_such_model(server):
    refused("someone/nothing", "someone/nothing is neither a path here nor a model on the Hub")


def test_no_such_revision(server):
    refused("someone/tiny-gpt2@v9", "someone/tiny-gpt2@v9", "no such revision", "follows the @")


@pytest.mark.parametrize("answer", [(401, "GatedRepo"), (403, "GatedRepo"), (403, "Forbidden")])
def test_no_access_to_a_gated_model(server, answer):
    server.closed["someone/tiny-gpt2"] = answer
    refused("someone/tiny-gpt2", "is gated", "accept its licence", "hf auth login", "HF_TOKEN")


def test_a_hub_that_is_broken(server):
    server.closed["someone/tiny-gpt2"] = (418, "Teapot")
    refused("someone/tiny-gpt2", "the Hub answers 418", "someone/tiny-gpt2", "try again")


def test_no_weights(server):
    (server.models["someone/tiny-gpt2"] / "model.safetensors").unlink()
    refused("someone/tiny-gpt2", "neither safetensors nor pytorch_model.bin")


def test_no_network_and_nothing_in_the_cache(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    refused("someone/tiny-gpt2", "nor in the cache", "out of reach (ConnectError)", "the network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("someone/tiny-gpt2", "nor in the cache", "out of reach", "HF_HUB_OFFLINE")


def test_a_model_larger_than_the_disk_is_not_begun(server, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5}))
    refused("someone/tiny-gpt2", "cache (it needs 0.0 GB", "free some space", "HF_HOME")
    assert not [path for path in server.asked if "/resolve/" in path]


def test_a_disk_that_fills_up_or_cannot_be_written(server, monkeypatch):
    for number, cure in ((errno.ENOSPC, "free some space"), (errno.EACCES, "make it writable")):

        def full(*args, **kwargs):
            if not kwargs.get("local_files_only"):
                raise OSError(number, "said by the system")  # noqa: B023
            raise huggingface_hub.errors.LocalEntryNotFoundError("not held")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
        refused("someone/tiny-gpt2", "cannot keep", "said by the system", cure, "HF_HOME")
