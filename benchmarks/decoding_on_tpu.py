"""What a decoding step moves on a TPU, as it is compiled, against what it must: no TPU is needed.

    JAX_PLATFORMS=cpu python -m benchmarks.decoding_on_tpu --json decoding.json

Compiles `generate` for one chip (`pip install libtpu`) and counts the bytes between its memory and
its core in one turn of the loop, as `minillm_jax.plan` does. A step must read the weights and the
slots of the cache that are filled, on average all of the prompt and half of the response; what is
compiled reads all slots. But what stays in the core from turn to turn is not counted, so that less
may be moved than must be read. Arrays are counted without the padding of their tiles, temporary
memory with it. The cycles are what the compiler expects of the instructions of a step, one after
another: to compare programs by, not a measured time. Nothing is run.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import machine
from benchmarks.tpu import cycles
from minillm_jax.models import DecoderConfig, abstract_params, hub, logical_axes, native
from minillm_jax.models.weights import read_config
from minillm_jax.planning.counting import counter
from minillm_jax.planning.targets import Target, target
from minillm_jax.reporting.writers import write_json
from minillm_jax.rollout import Warp, generate
from minillm_jax.sharding import batch_sharding, make_mesh, replicated, tree_shardings

DTYPE = jnp.bfloat16


def main() -> None:
    """Compile for every number of rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model",
        default="openai-community/gpt2-medium",
        help="of the Hub; its weights are not read",
    )
    parser.add_argument("--topologies", default="v5e:1x1,v5p:1x1x1,v6e:1x1", help="of one chip")
    parser.add_argument("--rows", default="8,32,128", help="batch sizes")
    parser.add_argument("--prompt", type=int, default=256, help="slots of the prompts")
    parser.add_argument("--slots", type=int, default=256, help="of the responses")
    parser.add_argument("--json", default="", help="write the figures here, too")
    asked = parser.parse_args()
    config = read_config(hub.config(asked.model), Path(asked.model))[1]
    cases = []
    print(
        "| chip | rows | compilation s | temporary MB, of it cache | MB a step | must | of that"
        " | thousand cycles |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for topology in asked.topologies.split(","):
        chip = target(topology)
        for rows in map(int, asked.rows.split(",")):
            one = measured(config, chip, rows, asked.prompt, asked.slots)
            cases.append({"topology": topology, "rows": rows, **one})
            print(
                f"| {topology.partition(':')[0]} | {rows} | {one['compile_seconds']:.0f}"
                f" | {one['temporary'] / 1e6:.0f}, {one['cache'] / 1e6:.0f}"
                f" | {one['bytes'] / 1e6:.0f} | {one['needed'] / 1e6:.0f}"
                f" | {one['bytes'] / one['needed']:.2f} | {one['cycles'] / 1e3:.0f} |",
                flush=True,
            )
    if asked.json:
        write_json(asked.json, machine() | {"model": asked.model, "cases": cases})


def measured(
    config: DecoderConfig, chip: Target, rows: int, prompt: int, slots: int
) -> dict[str, Any]:
    """Bytes and cycles of a step as it is compiled, bytes that it must move, and what else."""
    program, seconds, weights = compiled(config, chip, rows, prompt, slots)
    counts = counter(program.as_text() or "")
    # The one loop whose trips are not known is that of the tokens.
    once, twice = (
        sum(work.times * work.bytes for work in counts.work(lambda where, depth, n=n: n))
        for n in (1.0, 2.0)
    )
    cache = 2 * config.layers * rows * config.kv_heads * config.head_dim * DTYPE.dtype.itemsize
    memory = program.memory_analysis()
    return {
        "compile_seconds": seconds,
        "temporary": memory.temp_size_in_bytes,
        "cache": cache * (prompt + slots),
        "bytes": twice - once,
        "cycles": cycles(counts),
        "needed": weights + cache * (prompt + slots / 2),
    }


def compiled(
    config: DecoderConfig, chip: Target, rows: int, prompt: int, slots: int
) -> tuple[Any, float, int]:
    """`generate` for one chip, the seconds of its compilation, and the bytes that a step reads of
    its parameters: all but a table of which it looks rows up."""
    mesh = make_mesh(devices=chip.devices[:1])
    shapes = abstract_params(config, DTYPE)
    homes = tree_shardings(shapes, logical_axes(config), mesh, units=config.axis_units)
    params = jax.tree.map(lambda x, home: x.update(sharding=home), shapes, homes)
    key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=replicated(mesh))
    tokens, mask = (
        jax.ShapeDtypeStruct((rows, prompt), kind, sharding=batch_sharding(mesh))
        for kind in (jnp.int32, bool)
    )
    start = time.perf_counter()
    with jax.set_mesh(mesh), native.without():
        program = generate.lower(
            config, params, tokens, mask, key, slots=slots, warp=Warp(), eos_id=0, pad_id=0,
            vocab=config.vocab_size,
        ).compile()  # fmt: skip
    seconds = time.perf_counter() - start
    read = dict(params)
    if not config.tied_head:
        del read["embed"]
    sizes = {
        jax.tree_util.keystr(path): leaf.size * leaf.dtype.itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path(read)
    }
    return program, seconds, sum(n for name, n in sizes.items() if "positions" not in name)


if __name__ == "__main__":
    main()
