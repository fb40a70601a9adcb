"""Losses over the vocabulary on a TPU, as they are compiled, by the tokens of a block.

    JAX_PLATFORMS=cpu python -m benchmarks.loss_on_tpu --json loss_on_tpu.json

Compiles the gradient of the reverse KL that `benchmarks.loss` measures, in bfloat16, for one chip
(`pip install libtpu`). Bytes are those between its memory and its core, counted as
`minillm_jax.plan` does; the cycles are what the compiler expects of all blocks, one after another:
to compare programs by, not a measured time. Nothing is run.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.loss import blocked
from benchmarks.timing import machine
from benchmarks.tpu import cycles
from minillm_jax.planning.counting import counter
from minillm_jax.planning.targets import Target, target
from minillm_jax.reporting.writers import write_json
from minillm_jax.sharding import make_mesh, replicated

# V, width of the student, of the teacher: GPT-2 XL to GPT-2, LLaMA 13B to 7B, Qwen2.5 7B to 1.5B.
SHAPES = "50257:768:1600,32000:4096:5120,151936:1536:3584"
ROWS = 8


def main() -> None:
    """Compile for every size of a block and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--topologies", default="v5e:1x1,v5p:1x1x1,v6e:1x1", help="of one chip")
    parser.add_argument("--shapes", default=SHAPES, help="V:STUDENT:TEACHER, comma-separated")
    parser.add_argument("--tokens", type=int, default=4096, help=f"a multiple of {ROWS}")
    parser.add_argument("--blocks", default="256,512,1024,2048", help="tokens of a block")
    parser.add_argument("--json", default="", help="write the figures here, too")
    asked = parser.parse_args()
    columns = ("chip", "V", "widths", "block", "compilation s", "temporary MB", "GB moved")
    columns += ("million cycles",)
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    cases = []
    for topology in asked.topologies.split(","):
        chip = target(topology)
        for shape in asked.shapes.split(","):
            size, *widths = map(int, shape.split(":"))
            for block in map(int, asked.blocks.split(",")):
                one = measured(chip, size, widths, asked.tokens, block)
                cases.append({"topology": topology, "vocab": size, "widths": widths, **one})
                print(
                    f"| {topology.partition(':')[0]} | {size:,} | {widths[0]}, {widths[1]}"
                    f" | {block} | {one['compile_seconds']:.0f} | {one['temporary'] / 1e6:.0f}"
                    f" | {one['bytes'] / 1e9:.1f} | {one['cycles'] / 1e6:.1f} |",
                    flush=True,
                )
    if asked.json:
        write_json(asked.json, machine() | {"tokens": asked.tokens, "cases": cases})


def measured(chip: Target, size: int, widths: list[int], tokens: int, block: int) -> dict[str, Any]:
    """Temporary memory, bytes and cycles of loss and gradient."""
    mesh = make_mesh(devices=chip.devices[:1])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    hidden = [array(ROWS, tokens // ROWS, width) for width in widths]
    weight = [array(size, width) for width in widths]
    labels = array(ROWS, tokens // ROWS, dtype=jnp.int32)

    def total(hidden_q, weight_q, hidden_p, weight_p, labels):
        models = hidden_q, weight_q, hidden_p, weight_p
        return blocked("reverse KL", *models, labels, block)

    start = time.perf_counter()
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.value_and_grad(total, (0, 1)))
        program = grad.lower(hidden[0], weight[0], hidden[1], weight[1], labels).compile()
    memory = program.memory_analysis()
    assert memory is not None
    counts = counter(program.as_text() or "")
    return {
        "block": block,
        "compile_seconds": time.perf_counter() - start,
        "temporary": memory.temp_size_in_bytes,
        "bytes": sum(work.times * work.bytes for work in counts.work()),
        "cycles": cycles(counts) * -(-tokens // block),
    }


if __name__ == "__main__":
    main()
