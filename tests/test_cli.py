"""The command line: flags, exit codes, one line for what fails; `test_bad_input` has the table."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minillm_jax import pipeline, program
from minillm_jax.types import InputError
from tests.toy_run import command, one_device, write_config

ROOT = Path(__file__).parents[1]
# How ml_collections imports a config file.
pytestmark = pytest.mark.filterwarnings("ignore:.*(load_module|exec_module):DeprecationWarning")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A config file with its teacher and prompts."""
    return write_config(tmp_path_factory.mktemp("toy"))


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


def test_batches_that_do_not_split_over_the_devices(toy, tmp_path, monkeypatch, capsys):
    words = [f"--config={toy}", f"--workdir={tmp_path / 'run'}", "--config.sft.batch_size=12"]
    assert command(monkeypatch, "main", *words) == 2
    says = "config.sft.batch_size=12 does not split over 8 devices: make it a multiple of 8"
    assert says in capsys.readouterr().err


@contextlib.contextmanager
def small_files():
    """The system refuses files above 1 KiB, as a full disk would: also the log of pytest itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_and_no_file_is_left_by_halves(toy, tmp_path, monkeypatch, capsys):
    one_device(monkeypatch)
    workdir = tmp_path / "run"
    (tmp_path / "warm").mkdir()
    with small_files():
        code = command(monkeypatch, "main", f"--config={toy}", f"--workdir={workdir}")
    err = capsys.readouterr().err
    assert code == 2 and err.splitlines()[-1].startswith("error: cannot write ")
    assert "free some space" in err and "Traceback" not in err
    left = sorted(p.name for p in workdir.rglob("*") if p.is_file())
    assert left == ["metrics.jsonl", "timing.jsonl"]


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
    config, workdir, stages, source = calls[0]
    assert source is None
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
                f"configs/{p.name}"
                for p in (ROOT / "configs").glob("*.py")
                if p.stem not in ("common", "paper")
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
