"""A short soak: stops by both signals, and the same bytes as a run that nobody stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_run_that_is_stopped_again_and_again_leaves_the_same_bytes(tmp_path):
    words = ["--stops", "6", "--phases", "4", "--seed", "5", "--json", str(tmp_path / "soak.json")]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.soak", *words]
    env = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["stops"] >= 6 and not found["problems"]
    assert set(found["by_signal"]) == {"SIGTERM", "SIGKILL"} and len(found["by_phase"]) >= 4
    assert 1 <= found["runs_equal"] == found["runs"] and found["bytes_compared"] > 100_000
