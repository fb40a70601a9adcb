"""`python -m minillm_jax.compare --config configs/quickstart.py --methods sft,kd,gkd --seeds 3`.

Trains several methods (minillm_jax/methods/registry.py) for as many tokens from the same students
on the same data, judges them alike, and prints and draws one table with mean and deviation over
the seeds. Any setting can be changed: `--config.distill.learning_rate=1e-5`, for all methods. A
start with the same command goes on where the last one ended; further methods and seeds are added.
"""

import os
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from minillm_jax import program
from minillm_jax.types import InputError

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, FILE.py[:argument].", flag_values=FLAGS
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Outputs; by default runs/compare-NAME of the config.", flag_values=FLAGS
)
METHODS = flags.DEFINE_list(
    "methods", ["sft", "kd", "seqkd", "minillm"], "Which to compare.", flag_values=FLAGS
)
SEEDS = flags.DEFINE_integer(
    "seeds", 3, "How many, counted from config.seed.", flag_values=FLAGS, lower_bound=1
)
TOKENS = flags.DEFINE_integer(
    "tokens",
    0,
    "Tokens that each student is trained on; 0: those of the config's own SFT and distillation.",
    flag_values=FLAGS,
    lower_bound=0,
)


def main(argv: list[str]) -> None:
    """Compare the methods that the flags name."""
    if len(argv) > 1:
        raise InputError(f"{argv[1]!r} is no flag: write --flag=value")
    if CONFIG.value is None:
        raise InputError("no experiment given: add --config configs/quickstart.py")
    if "://" in (WORKDIR.value or ""):
        raise InputError(f"--workdir={WORKDIR.value}: compare needs a folder")
    from minillm_jax import comparison, hosts  # import jax, which --help does not need

    hosts.connect()
    config = CONFIG.value
    workdir = Path(WORKDIR.value or os.path.join("runs", f"compare-{config.name}"))
    comparison.compare(config, workdir, METHODS.value, SEEDS.value, TOKENS.value)


if __name__ == "__main__":
    program.run(main, FLAGS)
