"""The table of docs/plan.md: every pair of the README on one slice of each TPU.

    python benchmarks/plan_table.py --folder plans

A plan takes minutes for a large model. Each is kept in the folder as JSON, so that the command
goes on where it ended; at the end it prints the table of those that are there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

PAIRS = (
    ("gpt2_xl_to_gpt2", "gpt2"),
    ("gpt2_xl_to_gpt2", "gpt2-medium"),
    ("gpt2_xl_to_gpt2", "gpt2-large"),
    ("gptj_to_gpt2", "gpt2-large"),
    ("gptj_to_gpt2", "gpt2-xl"),
    ("gptj_to_gpt2", "gpt-neo-2.7B"),
    ("opt_13b_to_opt", "opt-1.3b"),
    ("opt_13b_to_opt", "opt-2.7b"),
    ("opt_13b_to_opt", "opt-6.7b"),
    ("llama_13b_to_7b", "llama-7b"),
    ("qwen2_5_7b_to_1_5b", "qwen2.5-1.5b"),
    ("qwen3_8b_to_0_6b", "qwen3-0.6b"),
)
SMALL = ("v5e:2x4", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1")
LARGE = ("v5p:2x2x4", "v6e:4x4", "v4:2x4x4", "v5e:4x8")
COLUMNS = (
    "pair", "slice", "mesh", "stage that needs most", "GiB of", "s per update", "s per rollout",
    "MFU of updates", "chip-hours", "fits",
)  # fmt: skip


def command(config: str, student: str, topology: str) -> list[str]:
    """The words after `python -m minillm_jax.plan`."""
    return [f"--config=configs/{config}.py:student={student}", f"--topology={topology}"]


def row(config: str, student: str, plan: dict) -> list[str]:
    """One line of the table."""
    programs = {one["name"]: one for one in plan["programs"]}
    most = max(plan["programs"], key=lambda one: one["peak_bytes"])
    update, collect = programs["distill update"], programs["collect"]

    def number(value):
        return "-" if value is None else f"{value:.3g}"

    mfu = update["mfu"]
    over = "over " if most["bytes"]["activations"] is None else ""
    return [
        f"{config.split('_to_')[0]} → {student}",
        plan["topology"],
        " x ".join(str(size) for size in plan["mesh"].values()),
        most["name"],
        f"{over}{most['peak_bytes'] / 2**30:.1f} of {plan['memory_bytes'] / 2**30:.1f}",
        number(update["seconds"]),
        number(collect["seconds"]),
        "-" if mfu is None else f"{100 * mfu:.0f} %",
        number(plan["chip_hours"]),
        "yes" if plan["fits"] else "no",
    ]


def main() -> None:
    """Make what is missing and print what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of the plans")
    parser.add_argument("--print", action="store_true", help="make none")
    parser.add_argument("--quick", action="store_true", help="as for minillm_jax.plan")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for config, student in PAIRS:
        for topology in SMALL if config.startswith("gpt2") else LARGE:
            file = options.folder / f"{config}-{student}-{topology.replace(':', '-')}.json"
            words = [sys.executable, "-m", "minillm_jax.plan", *command(config, student, topology)]
            if not file.exists() and not options.print:
                more = [f"--json={file}", *["--quick"] * options.quick]
                subprocess.run([*words, *more], check=False, stdout=sys.stderr)
            if file.exists():
                lines.append(row(config, student, json.loads(file.read_text(encoding="utf-8"))))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
