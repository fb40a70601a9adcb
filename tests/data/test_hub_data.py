"""Data sets through the `datasets` package: a folder, a server that refuses, and no network."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizer import write_toy_tokenizer

from minillm_jax.data import corpus, hub, sources
from minillm_jax.data.sources import Row
from minillm_jax.data.tokenizer import load_tokenizer
from minillm_jax.types import InputError

ROWS = [
    {"instruction": "a", "context": "", "response": "b", "category": "open_qa"},
    {"instruction": "c", "context": "d", "response": "e", "category": "closed_qa"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config, disable_progress_bars

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    disable_progress_bars()


def folder(path: Path, rows: list[dict], split: str = "train") -> str:
    """A data set as a repository of the Hub holds it."""
    (path / "data").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "data" / f"{split}.jsonl").write_text(text)
    return f"hub:{path}"


def test_rows_of_dolly(tmp_path: Path):
    source = folder(tmp_path / "dolly", ROWS)
    assert sources.read(source, need_output=True) == [
        Row("a", "", ("b",), f"{source} row 1"),
        Row("c", "d", ("e",), f"{source} row 2"),
    ]


def test_null_is_a_field_that_is_not_given(tmp_path: Path):
    source = folder(
        tmp_path / "prompts", [{"instruction": "a"}, {"instruction": "c", "input": "d"}]
    )
    assert [(row.instruction, row.input) for row in sources.read(source)] == [("a", ""), ("c", "d")]
    with pytest.raises(InputError, match="prompts row 1: output is missing or empty; fill it"):
        sources.read(source, need_output=True)


def test_a_file_is_read_as_before(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[1]))
    assert sources.read(path) == sources.read(str(path)) == [Row("c", "d", ("e",), f"{path}:1")]


def test_a_corpus_is_read_as_far_as_it_is_needed(tmp_path: Path):
    toy = load_tokenizer(write_toy_tokenizer(tmp_path / "toy"))
    source = folder(tmp_path / "text", [{"text": "one two three"}, {"text": "cat dog"}] * 300)
    sizes: dict[str, Any] = {"batch_size": 2, "length": 7, "seed": 0}
    made = corpus.batches([source], toy, **sizes)
    block = [*toy.encode("one two three"), toy.eos_id, *toy.encode("cat dog"), toy.eos_id]
    assert made.blocks.tolist() == [block] * 300
    assert len(corpus.batches([source], toy, **sizes, most_blocks=3).blocks) == 3
    other = folder(tmp_path / "other", [{"body": "one"}])
    with pytest.raises(InputError, match="other row 1: no field `text`; choose another data set"):
        corpus.batches([other], toy, **sizes)


def test_a_data_set_without_training_rows_is_refused(tmp_path: Path):
    source = folder(tmp_path / "dolly", ROWS, split="test")
    with pytest.raises(
        InputError, match=r'dolly: .*"train".*; correct it, or give the file: --conf'
    ):
        sources.read(source)


def at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let the Hub be there, and no waiting between tries."""
    import huggingface_hub
    from datasets import config

    monkeypatch.setattr(config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


class Refusal(BaseHTTPRequestHandler):
    """Answers as the Hub does for what is not there, or not for everybody."""

    def do_GET(self):
        code = "GatedRepo" if "/gated/" in self.path else "RepoNotFound"
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/none", r"hub:owner/none: .*doesn't exist.*; correct the name"),
        (
            "gated/text@v1",
            r"hub:gated/text@v1: .*gated.*Visit .*/gated/text to ask.*`hf auth login`",
        ),
        ("a b", r"hub:a b: .*; correct it, or give the file: --config\.data\.train=FILE\.jsonl"),
    ],
)
def test_what_the_hub_refuses_is_named(refusing: None, name: str, words: str):
    with pytest.raises(InputError, match=words) as error:
        sources.read(f"hub:{name}")
    assert "\n" not in str(error.value)
    assert "--config.data.train=FILE.jsonl" in str(error.value)


def test_without_a_network_it_says_what_to_download(monkeypatch: pytest.MonkeyPatch):
    at(monkeypatch, "http://127.0.0.1:9")
    for instead, read in (
        ("give the file: --config.data.train=FILE.jsonl", sources.read),
        ("words", lambda source: list(hub.records(source, instead="words", streaming=True))),
    ):
        with pytest.raises(InputError) as error:
            read("hub:databricks/databricks-dolly-15k")
        message = str(error.value)
        assert message.startswith("hub:databricks/databricks-dolly-15k: not in the cache, and the")
        cure = "download it from https://huggingface.co/datasets/databricks/databricks-dolly-15k"
        assert cure in message and message.endswith(instead) and "\n" not in message


def test_the_package_may_be_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="`datasets` is missing: pip install datasets; or give"):
        sources.read("hub:owner/name")
