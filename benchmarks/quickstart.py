"""The quickstart over several seeds, against the same time of further SFT.

    python -m benchmarks.quickstart --workdir runs/seeds --seeds 0,1,2 --json runs/seeds/table.json

Per seed: `configs/quickstart.py` as a user runs it, and two controls made of the SFT student that
MiniLLM started from. `further_sft` is fine-tuned further on the teacher's answers for as many
updates as are expected to take the seconds of the MiniLLM stage, loading, compilation and
validation by the loss included in both, with its own cosine schedule and the best of three
validations by the reverse KL; where the machine is shared and seconds mean little,
`--further_steps` is the number of updates. `sharpened_sft` has
its logits multiplied by the number that gives the lowest reverse KL on the validation prompts: what
a change of temperature alone does. What is done already is not done again; the table is of what is
there.
"""

import argparse
import dataclasses
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

from minillm_jax.reporting import comparison
from minillm_jax.reporting.writers import MetricsWriter, read_json, read_rows, write_json

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
MODELS = ("teacher", "start", "sft", "sharpened_sft", "further_sft", "minillm")
CONTROLS = ("further_sft", "sharpened_sft")
SCALES = (1.25, 1.5, 2.0)  # of the logits; 1 is `sft`


def main() -> None:
    """Run the seeds that are not done and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workdir", default="runs/seeds", help="one folder per seed in here")
    parser.add_argument("--seeds", default="0,1,2", help="which to run")
    parser.add_argument("--json", default="", help="write the table here, too")
    parser.add_argument(
        "--further_steps", type=int, default=0, help="updates of further SFT; 0: by time"
    )
    asked = parser.parse_args()
    root = Path(asked.workdir)
    for seed in map(int, asked.seeds.split(",")):
        workdir = root / f"seed{seed}"
        command = [sys.executable, "-m", "minillm_jax.main", "--config", "configs/quickstart.py"]
        subprocess.run([*command, f"--config.seed={seed}", f"--workdir={workdir}"], check=True)
        if not (workdir / "further_sft.json").exists():
            control = further_sft(seed, workdir, asked.further_steps)
            write_json(workdir / "further_sft.json", control)
        if not (workdir / "sharpened_sft.json").exists():
            write_json(workdir / "sharpened_sft.json", sharpened_sft(seed, workdir))
    found = []
    for seed in sorted(root.glob("seed*")):
        if all((seed / f"{name}.json").exists() for name in CONTROLS):
            made = {name: read_json(seed / f"{name}.json")["figures"] for name in CONTROLS}
            found.append(read_json(seed / "summary.json")["models"] | made)
    table = tabulate(found)
    print(as_text(table))
    if asked.json:
        write_json(asked.json, table)


def further_sft(seed: int, workdir: Path, steps: int) -> dict:
    """The SFT student after `steps` more updates, or (0) as many more seconds as MiniLLM took."""
    from minillm_jax.stages.held_out import held_out
    from minillm_jax.stages.training import fine_tune, student

    done = read_json(workdir / "summary.json")["stages"]
    sft, wanted = done["student_sft"], done["distill"]["seconds"]
    rows = read_rows(workdir / "timing.jsonl")
    updates = [r for r in rows if r["stage"] == "student_sft" and "tokens_per_second" in r]
    times = [row["seconds"] for row in updates]
    each = statistics.median(after - before for before, after in itertools.pairwise(times))
    rest = sft["seconds"] - each * sft["updates"]  # loading, compilation, validation
    with MetricsWriter(workdir) as metrics:
        run = _run(workdir, metrics)
        # A new order of the answers, and a schedule that ends when the time does.
        run.build.data.seed = seed + 1000
        run.build.config.sft.steps = steps or round((wanted - rest) / each)
        # Chosen as MiniLLM's student is; by the validation loss it may be the start itself.
        run.build.config.sft.evaluate_every = max(run.build.config.sft.steps // 3, 1)
        run.build.config.sft.keep = "reverse_kl"
        run.build.config.sft.save_every = 10**9
        began = time.monotonic()
        start = student(run.build, run.model("student_sft"))
        outcome = fine_tune(run, "further_sft", start)
        outcome |= {"seconds": time.monotonic() - began, "seconds_of_minillm": wanted}
        run.build.seed = seed  # the samples of the other models
        figures = held_out(run, run.build.student(run.model("further_sft"))).figures
    return {"figures": figures, "outcome": outcome}


def sharpened_sft(seed: int, workdir: Path) -> dict:
    """The SFT student at the temperature that is best on the validation prompts."""
    from minillm_jax.stages.held_out import held_out
    from minillm_jax.stages.measures import validation

    with MetricsWriter(workdir) as metrics:
        run = _run(workdir, metrics)
        run.build.seed = seed
        model = run.build.student(run.model("student_sft"))

        def at(scale: float):
            return dataclasses.replace(
                model, config=dataclasses.replace(model.config, logit_scale=scale)
            )

        scores = {
            scale: validation(run, at(scale), {"reverse_kl"})["reverse_kl"] for scale in SCALES
        }
        best = min(scores, key=scores.__getitem__)
        figures = held_out(run, at(best)).figures
    return {"figures": figures, "outcome": {"scale": best, "validation": list(scores.items())}}


def _run(workdir: Path, metrics: MetricsWriter):
    from configs.quickstart import get_config
    from minillm_jax.build import Builder
    from minillm_jax.stages import Run

    return Run(Builder(get_config(), workdir), workdir, metrics)


def tabulate(seeds: list[dict]) -> dict:
    """Mean and standard deviation over seeds, and MiniLLM's reverse KL against both baselines."""
    figures = [{model: run[model] for model in MODELS} for run in seeds]
    models = comparison.tabulate(figures, COLUMNS)
    table: dict = {"seeds": len(seeds), "models": models, "reduction": {}}
    for base in ("sft", *CONTROLS):
        ratios = [1 - run["minillm"]["reverse_kl"] / run[base]["reverse_kl"] for run in seeds]
        table["reduction"][base] = comparison.spread(ratios)
    return table


def as_text(table: dict) -> str:
    """The table for a terminal and, as it stands, for Markdown."""
    lines = [comparison.as_text(table["models"], COLUMNS)]
    for base, value in table["reduction"].items():
        each = ", ".join(f"{100 * one:.1f} %" for one in value["values"])
        spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
        mean = f"{100 * value['mean']:.1f}{spread}"
        lines.append(f"reverse KL of minillm below {base}: {mean} % (seeds: {each})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
