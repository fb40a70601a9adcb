"""`python -m minillm_jax.plan --config FILE.py[:ARGUMENT] --topology v5p:4x4x4`: does it fit?

Compiles the programs of an experiment for a machine that is not here and prints what they need:
memory, operations, collectives, time and cost. Reads no weights and no data. `--search` tries other
meshes, micro-batches and remat. docs/plan.md says what is counted and what is assumed.
"""

import os
import sys
import tempfile
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from minillm_jax import program
from minillm_jax.types import InputError

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, FILE.py[:argument].", flag_values=FLAGS
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice such as v5p:4x4x4, GPUs such as h100:8, or cpu.", flag_values=FLAGS
)
JSON = flags.DEFINE_string("json", None, "Write the figures to this file.", flag_values=FLAGS)
SEARCH = flags.DEFINE_integer(
    "search", 0, "Compile up to so many other settings and rank them.", 0, flag_values=FLAGS
)
QUICK = flags.DEFINE_bool(
    "quick", False, "Compile with less effort: faster, figures some percent too high.",
    flag_values=FLAGS,
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Plan the experiment that the flags describe."""
    if len(argv) > 1:
        raise InputError(f"{argv[1]!r} is no flag: write --flag=value")
    if CONFIG.value is None:
        raise InputError("no experiment given: add --config configs/quickstart.py")
    if not TOPOLOGY.value:
        raise InputError("no machine given: add --topology, such as v5p:4x4x4, h100:8 or cpu")
    _on_cpu()
    _simulate(TOPOLOGY.value)
    from minillm_jax.planning import estimate, search, table, targets, verdict
    from minillm_jax.reporting.writers import write_json

    if JSON.value:
        _refuse_unwritable(Path(JSON.value))
    if QUICK.value:
        estimate.hurry()
    config, target = CONFIG.value, targets.target(TOPOLOGY.value)
    with tempfile.TemporaryDirectory() as made:
        workdir = Path(made)
        found = verdict.plan(config, workdir, target)
        cures = verdict.cures(config, found)
        figures = table.as_json(found, cures)
        table.show(found, cures, config.name, sys.stdout)
        if SEARCH.value:
            ranked = search.search(config, workdir, target, SEARCH.value)
            table.show_ranking(ranked, sys.stdout)
            figures["search"] = [
                {"flags": verdict.flags(changes), **table.as_json(one, [])}
                for changes, one in ranked
            ]
    if JSON.value:
        write_json(Path(JSON.value), figures)


def _refuse_unwritable(file: Path) -> None:
    """Refuse a file that cannot be written before minutes of compilation rather than after."""
    there = next((path for path in file.absolute().parents if path.exists()), file)
    if file.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--json={file} cannot be written: choose another file")


def _on_cpu() -> None:
    """Nothing is run here, whatever the machine has: before a device is touched."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _simulate(topology: str) -> None:
    """Make as many CPU devices as there are GPUs in `h100:8`, before jax starts."""
    name, _, count = topology.partition(":")
    from minillm_jax.planning.chips import GPUS

    if name in GPUS and count.isdecimal() and int(count) > 0:
        import jax

        jax.config.update("jax_num_cpu_devices", int(count))


if __name__ == "__main__":
    # Programs for machines that are not here can be written but not be read again.
    program.run(main, FLAGS, keep=False)
