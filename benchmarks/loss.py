"""The losses over the vocabulary, in blocks, against plain XLA: time and memory.

    python -m benchmarks.loss --json loss.json
    python -m benchmarks.loss --vocab 128256 --tokens 8192 --width 2048 --teacher_width 4096 \\
        --dtype bfloat16

The gradient of a summed loss with respect to the student's hidden states and head, by
`objectives.vocab.loss_sum` and by jax's own derivative of the formula on whole logits. Memory is
what the compiled program needs beyond its arguments: temporary arrays, and those with the result.
The second line is for an accelerator.
"""

import argparse
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.timing import in_turn, machine, matmul_rate, ratio
from minillm_jax.objectives import vocab
from minillm_jax.reporting.writers import write_json

LOSSES = {
    "cross-entropy": lambda scores, extras, mask: -scores["log_q"],
    "reverse KL": lambda scores, extras, mask: scores["reverse_kl"],
}


def plain(name: str, hidden_q, weight_q, hidden_p, weight_p, labels) -> jax.Array:
    """The same sum from the whole logits [B, N, V]."""

    def log_softmax(hidden, weight):
        z = jnp.einsum("bnd,vd->bnv", hidden, weight, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(z)

    log_q = log_softmax(hidden_q, weight_q)
    if name == "cross-entropy":
        return -jnp.take_along_axis(log_q, labels[..., None], axis=-1).sum()
    log_p = log_softmax(hidden_p, weight_p)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p))


def blocked(
    name: str, hidden_q, weight_q, hidden_p, weight_p, labels, block: int | None = None
) -> jax.Array:
    """The sum by `loss_sum`."""
    teacher = (None, None) if name == "cross-entropy" else (hidden_p, weight_p)
    mask = jnp.ones(labels.shape, bool)
    student = (hidden_q, weight_q, None)
    return vocab.loss_sum(LOSSES[name], *student, *teacher, None, labels, mask, block=block)[0]


def measure(name: str, size: int, asked: argparse.Namespace) -> dict:
    """Both ways on the same made-up arrays: seconds, memory, and how far their gradients are."""
    keys = jax.random.split(jax.random.key(0), 5)
    rows = 8
    shape = (rows, asked.tokens // rows)
    hidden = [
        jax.random.normal(key, (*shape, width), asked.dtype)
        for key, width in zip(keys[:2], (asked.width, asked.teacher_width), strict=True)
    ]
    weight = [
        jax.random.normal(key, (size, x.shape[-1]), asked.dtype) * x.shape[-1] ** -0.5
        for key, x in zip(keys[2:4], hidden, strict=True)
    ]
    labels = jax.random.randint(keys[4], shape, 0, size)

    def program(way: Callable):
        def total(hidden_q, weight_q, hidden_p, weight_p):
            return way(name, hidden_q, weight_q, hidden_p, weight_p, labels)

        grad = jax.jit(jax.value_and_grad(total, (0, 1)))
        return grad.lower(hidden[0], weight[0], hidden[1], weight[1]).compile()

    args = (hidden[0], weight[0], hidden[1], weight[1])
    programs = {"blocks": program(blocked), "plain": program(plain)}
    seconds = in_turn({k: lambda f=f: f(*args) for k, f in programs.items()}, asked.repeats)
    out = {"loss": name, "vocab": size, "tokens": asked.tokens}
    for way, one in programs.items():
        memory = one.memory_analysis()
        assert memory is not None
        temp = memory.temp_size_in_bytes
        out[way] = {
            "seconds": statistics.median(seconds[way]),
            "temp_bytes": temp,
            "bytes": temp + memory.output_size_in_bytes,
        }
    grads = [one(*args)[1][0].astype(jnp.float32) for one in programs.values()]
    out["time_ratio"] = ratio(seconds["blocks"], seconds["plain"])
    out["temp_ratio"] = out["blocks"]["temp_bytes"] / out["plain"]["temp_bytes"]
    out["memory_ratio"] = out["blocks"]["bytes"] / out["plain"]["bytes"]
    out["difference"] = float(jnp.abs(grads[0] - grads[1]).max() / jnp.abs(grads[1]).max())
    products = {"cross-entropy": 3, "reverse KL": 3}[name] * asked.width
    products += asked.teacher_width if name == "reverse KL" else 0
    out["flops"] = 2 * asked.tokens * size * products
    out["matmul_share"] = out["flops"] / out["blocks"]["seconds"] / asked.rate
    return out


def main() -> None:
    """Measure every loss at every vocabulary and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", default="49152,128256", help="sizes, comma-separated")
    parser.add_argument("--tokens", type=int, default=1024, help="a multiple of 8")
    parser.add_argument("--width", type=int, default=576, help="of the student's hidden states")
    parser.add_argument("--teacher_width", type=int, default=576)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="", help="write the figures here, too")
    asked = parser.parse_args()
    asked.rate = matmul_rate(jnp.dtype(asked.dtype))
    columns = ("loss", "V", "seconds, blocks / plain", "time", "temporary MB, blocks / plain")
    columns += ("with result", "gradients differ", "of the matmul rate")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    cases = []
    for name in LOSSES:
        for size in map(int, asked.vocab.split(",")):
            one = measure(name, size, asked)
            cases.append(one)
            ours, theirs = one["blocks"], one["plain"]
            print(
                f"| {name} | {size:,} | {ours['seconds']:.3g} / {theirs['seconds']:.3g}"
                f" | {one['time_ratio']:.2f}"
                f" | {ours['temp_bytes'] / 1e6:.0f} / {theirs['temp_bytes'] / 1e6:.0f}"
                f" = 1/{1 / one['temp_ratio']:.1f} | 1/{1 / one['memory_ratio']:.1f}"
                f" | {one['difference']:.1e} | {100 * one['matmul_share']:.0f} % |",
                flush=True,
            )
    if asked.json:
        rate = {"matmul_flops_per_s": asked.rate}
        write_json(asked.json, machine() | rate | {"cases": cases})


if __name__ == "__main__":
    main()
