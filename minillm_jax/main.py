"""`python -m minillm_jax.main --config configs/quickstart.py`: run an experiment.

Flags and the last word on errors; what happens is in `pipeline`.
"""

import json
import os
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from minillm_jax import program
from minillm_jax.types import InputError

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, FILE.py[:argument].")
WORKDIR = flags.DEFINE_string("workdir", None, "Outputs; by default runs/NAME of the config.")
STAGES = flags.DEFINE_list("stages", None, "Run these stages alone, such as distill,evaluate.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print config, stages and geometry, and end.")


def main(argv: list[str]) -> None:
    """Run the experiment that the flags describe."""
    if len(argv) > 1:
        raise InputError(f"{argv[1]!r} is no flag: write --flag=value")
    if CONFIG.value is None:
        raise InputError("no experiment given: add --config configs/quickstart.py")
    from minillm_jax import pipeline  # imports jax, which --help does not need

    config = CONFIG.value
    workdir = Path(WORKDIR.value or os.path.join("runs", config.name))
    if DRY_RUN.value:
        print(json.dumps(pipeline.describe(config, workdir, STAGES.value), indent=2))
    else:
        pipeline.execute(config, workdir, STAGES.value)


if __name__ == "__main__":
    program.run(main)
