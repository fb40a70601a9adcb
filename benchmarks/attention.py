"""What the TPU compiler says of attention by XLA and by Splash; docs/architecture.md has the table.

    JAX_PLATFORMS=cpu python -m benchmarks.attention --json attention.json

Compiles the gradient of four layers for chips that are not here (`pip install libtpu`); nothing is
run. Temporary memory and bytes accessed of one device; the compiler counts loop bodies once.
"""

import argparse
import os
from typing import Any

from minillm_jax.reporting.writers import write_json

CASES = (
    ("v5e:2x2", 256, 128),
    ("v5e:2x2", 512, 64),
    ("v5e:2x2", 512, 128),
    ("v5e:2x2", 1024, 128),
    ("v5p:2x2x1", 512, 64),
    ("v5p:2x2x1", 512, 128),
)  # slice, slots, head width
ROWS_PER_DEVICE = 4


def measure(topology: str, slots: int, width: int, attention: Any) -> dict:
    """Temporary memory in MB and bytes accessed in GB of the gradient, for one device."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from minillm_jax.models import DecoderConfig, abstract_params, hidden_states, logical_axes
    from minillm_jax.sharding import batch_sharding, make_mesh, tree_shardings

    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = make_mesh(devices=devices)
    config = DecoderConfig(
        vocab_size=512, layers=4, width=1024, heads=16, kv_heads=8, head_dim=width,
        mlp_width=1024, max_positions=2048, gated=True, attention=attention,
    )  # fmt: skip
    shapes = abstract_params(config)
    homes = tree_shardings(shapes, logical_axes(config), mesh, units=config.axis_units)
    params = jax.tree.map(lambda x, home: x.update(sharding=home), shapes, homes)
    shape, rows = (ROWS_PER_DEVICE * len(devices), slots), batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    mask = jax.ShapeDtypeStruct(shape, bool, sharding=rows)

    def loss(params, tokens, mask):
        hidden = hidden_states(config, params, tokens, mask, dtype=jnp.bfloat16, remat="full")
        return jnp.sum(jnp.where(mask[..., None], hidden.astype(jnp.float32), 0) ** 2)

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(params, tokens, mask).compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None and costs is not None
    return {"temp_mb": memory.temp_size_in_bytes / 1e6, "read_gb": costs["bytes accessed"] / 1e9}


def main() -> None:
    """Compile every case both ways and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", default="", help="write the figures here, too")
    asked = parser.parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it only compiles
    found = []
    print("| | slots | head width | XLA | Splash |\n|---|---|---|---|---|")
    for topology, slots, width in CASES:
        both = {name: measure(topology, slots, width, name) for name in ("xla", "splash")}
        cells = [f"{one['temp_mb']:.0f} MB, {one['read_gb']:.1f} GB" for one in both.values()]
        print(f"| {topology[:3]} | {slots} | {width} | {' | '.join(cells)} |", flush=True)
        found.append({"topology": topology, "slots": slots, "head_width": width, **both})
    if asked.json:
        write_json(asked.json, {"rows_per_device": ROWS_PER_DEVICE, "cases": found})


if __name__ == "__main__":
    main()
