"""`python -m minillm_jax.main --config configs/quickstart.py`: run an experiment.

Any setting of `configs/common.py` can be changed on the way: `--config.distill.steps=100`. A start
with the same command goes on where the last one ended. Exit code 0 when all is done; 2, with one
line on standard error, for bad input or a training that cannot go on. The work is in `pipeline`.
"""

import json
import os
from contextlib import nullcontext
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from minillm_jax import program, stopping
from minillm_jax.types import InputError

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, FILE.py[:argument].", flag_values=FLAGS
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Outputs, a folder or gs://BUCKET/PATH; by default runs/NAME of the config.",
    flag_values=FLAGS,
)
STAGES = flags.DEFINE_list(
    "stages", None, "Run these stages alone, such as distill,evaluate.", flag_values=FLAGS
)
FORK = flags.DEFINE_string(
    "fork", None, "Begin with the last checkpoint of this work directory.", flag_values=FLAGS
)
REPLAY = flags.DEFINE_string(
    "replay", None, "Say what is not finite in this batch of a skipped update.", flag_values=FLAGS
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print config, stages and geometry, and end.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Run the experiment that the flags describe."""
    if len(argv) > 1:
        raise InputError(f"{argv[1]!r} is no flag: write --flag=value")
    if CONFIG.value is None:
        raise InputError("no experiment given: add --config configs/quickstart.py")
    in_bucket = "://" in (WORKDIR.value or "")
    given = FORK.value or REPLAY.value
    if given and (in_bucket or "://" in given):
        raise InputError(
            f"--{'fork' if FORK.value else 'replay'} and its --workdir must be of folders: copy a "
            "run out of its bucket first, gcloud storage cp -r gs://BUCKET/PATH DIR"
        )
    from minillm_jax import bucket, hosts, pipeline  # import jax, which --help does not need

    hosts.connect()
    config = CONFIG.value
    if not (WORKDIR.value or config.name):
        raise InputError("config.name is empty: set it, or give --workdir")
    where = WORKDIR.value or os.path.join("runs", config.name)
    if REPLAY.value:
        from minillm_jax import replay

        replay.execute(config, Path(where), Path(REPLAY.value))
    elif DRY_RUN.value:
        with bucket.looked_at(where) if in_bucket else nullcontext(Path(where)) as workdir:
            described = pipeline.describe(config, workdir, STAGES.value)
        if hosts.is_main():
            print(json.dumps(described | {"workdir": where}, indent=2))
    elif in_bucket:
        with bucket.attached(where) as remote:
            pipeline.execute(config, remote.image, STAGES.value, remote=remote)
    else:
        source = Path(FORK.value) if FORK.value else None
        pipeline.execute(config, Path(where), STAGES.value, source)


if __name__ == "__main__":
    stopping.listen()
    program.run(main, FLAGS)
