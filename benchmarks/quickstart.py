"""The quickstart over several seeds, against the same time of further SFT.

    python -m benchmarks.quickstart --workdir runs/seeds --seeds 0,1,2 --json runs/seeds/table.json

Per seed: `configs/quickstart.py` as a user runs it; then the SFT student that MiniLLM started from
is fine-tuned further on the teacher's answers for as many seconds as the MiniLLM stage took,
compilation and validation included in both, with its own cosine schedule and its own choice by
validation loss. What is done already is not done again; the table is made of what is there.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from minillm_jax.reporting.writers import MetricsWriter, read_json, write_json

COLUMNS = (
    "reverse_kl",
    "nll",
    "rouge_l",
    "length",
    "finished",
    "distinct_4",
    "repetition",
    "greedy_repetition",
    "greedy_loops",
)
MODELS = ("teacher", "start", "sft", "further_sft", "minillm")


def main() -> None:
    """Run the seeds that are not done and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/seeds", help="one folder per seed in here")
    parser.add_argument("--seeds", default="0,1,2", help="which to run")
    parser.add_argument("--json", default="", help="write the table here, too")
    asked = parser.parse_args()
    root = Path(asked.workdir)
    for seed in map(int, asked.seeds.split(",")):
        workdir = root / f"seed{seed}"
        command = [sys.executable, "-m", "minillm_jax.main", "--config", "configs/quickstart.py"]
        subprocess.run([*command, f"--config.seed={seed}", f"--workdir={workdir}"], check=True)
        if not (workdir / "further_sft.json").exists():
            further_sft(seed, workdir)
    found = [
        read_json(path.parent / "summary.json")["models"]
        | {"further_sft": read_json(path)["figures"]}
        for path in sorted(root.glob("seed*/further_sft.json"))
    ]
    table = tabulate(found)
    print(as_text(table))
    if asked.json:
        write_json(asked.json, table)


def further_sft(seed: int, workdir: Path) -> None:
    """The baseline of one seed, into `workdir/further_sft.json`."""
    from configs.quickstart import get_config
    from minillm_jax.build import Builder
    from minillm_jax.stages import Run
    from minillm_jax.stages.evaluation import held_out
    from minillm_jax.stages.training import fine_tune, student

    done = read_json(workdir / "summary.json")["stages"]
    seconds = done["distill"]["seconds"]
    config = get_config()
    # A new order of the answers, and a schedule that ends when the time does.
    config.seed = seed + 1000
    config.sft.steps = round(
        seconds * done["student_sft"]["updates"] / done["student_sft"]["seconds"]
    )
    config.sft.evaluate_every = max(config.sft.steps // 6, 1)
    config.sft.save_every = 10**9
    with MetricsWriter(workdir) as metrics:
        run = Run(Builder(config, workdir), workdir, metrics)
        start = student(run.build, run.model("student_sft"))
        outcome = fine_tune(run, "further_sft", start, seconds=seconds)
        run.build.seed = seed  # the samples of the other models
        figures, _ = held_out(run, run.build.student(run.model("further_sft")))
    write_json(workdir / "further_sft.json", {"figures": figures, "outcome": outcome})


def tabulate(seeds: list[dict]) -> dict:
    """Mean and standard deviation over seeds, and MiniLLM's reverse KL against both baselines."""
    table: dict = {"seeds": len(seeds), "models": {}, "reduction": {}}
    for model in MODELS:
        table["models"][model] = {
            column: spread(
                [run[model][column] for run in seeds if run[model].get(column) is not None]
            )
            for column in COLUMNS
        }
    for base in ("sft", "further_sft"):
        ratios = [1 - run["minillm"]["reverse_kl"] / run[base]["reverse_kl"] for run in seeds]
        table["reduction"][base] = spread(ratios) | {"each": ratios}
    return table


def spread(values: list[float]) -> dict:
    """Mean and sample standard deviation; empty without values."""
    if not values:
        return {}
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def as_text(table: dict) -> str:
    """The table for a terminal and, as it stands, for Markdown."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for model, row in table["models"].items():
        cells = [f"{c['mean']:.3f} ± {c['std']:.3f}" if c else "" for c in row.values()]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    for base, value in table["reduction"].items():
        each = ", ".join(f"{100 * one:.1f} %" for one in value["each"])
        lines.append(
            f"reverse KL of minillm below {base}: {100 * value['mean']:.1f} ± "
            f"{100 * value['std']:.1f} % (seeds: {each})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
