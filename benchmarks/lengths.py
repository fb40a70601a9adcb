"""What an update costs on rows as long as dolly's: in windows, and in all slots.

    python -m benchmarks.lengths --layers 0,1,2,27,28,29 --json lengths.json

Made-up rows with the lengths of databricks-dolly-15k's prompts and answers, in `--prompt` and
`--slots` slots, 256 each by default. Updates of SFT and of MiniLLM in micro-batches: of rows as
they come, read in all slots; and of rows of like length, read in the windows that training takes
(`recipe.windows`). Losses of both are compared, too.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import pair as models
from benchmarks.timing import in_turn, machine, ratio
from minillm_jax import optim, recipe
from minillm_jax.methods import Method, minillm, sft
from minillm_jax.methods.accumulate import lengths, spread
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.reporting.writers import write_json
from minillm_jax.rollout import Mixing, Rollout
from minillm_jax.types import Sequences


def main() -> None:
    """Measure both updates and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    models.add_options(parser)
    parser.set_defaults(prompt=256, slots=256)
    parser.add_argument("--batch", type=int, default=16, help="rows of an update")
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--remat", default="dots", help="none, dots or full")
    asked = parser.parse_args()
    pair = models.load(asked)
    given = rows(pair.vocab, asked)
    windows, tokens = recipe.windows(asked.prompt + asked.slots), np.asarray(lengths(given))
    share = tokens.sum() / (asked.batch * (asked.prompt + asked.slots))
    print(f"{100 * share:.0f} % of the slots hold tokens; windows {windows}")
    print("| update | all slots s | windows s | faster | losses differ |\n|---|---|---|---|---|")
    found = []
    for name in ("sft", "minillm"):
        one = measure(name, pair, given, windows, asked)
        found.append(one)
        print(
            f"| {name} | {one['slots']:.2f} | {one['windows']:.2f} | {one['faster']:.2f}"
            f" | {one['differ']:.1e} |",
            flush=True,
        )
    if asked.json:
        write_json(asked.json, machine() | {"share": float(share), "updates": found})


def measure(
    name: str, pair: models.Pair, given: Sequences, windows: Any, asked: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of one kind of update both ways, in turn."""
    rate = optim.schedule("constant", 0.0)  # every update is the first one again
    optimizer = optim.adamw(rate)
    batch, frozen = given, None
    if name == "minillm":
        batch, frozen = rollout(pair, given, asked.dtype), pair.teacher_params
    order = spread(np.asarray(lengths(given)), asked.micro_batches)
    arranged = jax.tree.map(lambda x: jnp.asarray(x[order]), batch)
    state = models.state(pair.student, jax.tree.map(jnp.copy, pair.params), optimizer)
    kept, losses = {"state": state}, {}

    def call(how: str, method: Method, batch: Any) -> Any:
        kept["state"], metrics = method.update(kept["state"], frozen, batch)
        losses[how] = metrics["loss"]
        return metrics

    slots, narrow = (made(name, pair, w, optimizer, rate, asked) for w in ((), windows))
    calls = {
        "slots": lambda: call("slots", slots, batch),
        "windows": lambda: call("windows", narrow, arranged),
    }
    seconds = in_turn(calls, asked.repeats)
    return {
        "update": name,
        "slots": float(np.median(seconds["slots"])),
        "windows": float(np.median(seconds["windows"])),
        "faster": ratio(seconds["slots"], seconds["windows"]),
        "differ": abs(float(losses["slots"] - losses["windows"])),
    }


def made(
    name: str, pair: models.Pair, windows: Any, optimizer: Any, rate: Any, asked: argparse.Namespace
) -> Method:
    """The method that reads in such windows."""
    common: dict[str, Any] = {
        "dtype": asked.dtype,
        "remat": asked.remat,
        "micro_batches": asked.micro_batches,
        "windows": windows,
    }
    if name == "sft":
        return sft.method(pair.student, optimizer, rate, vocab=pair.vocab, **common)
    mixing = Mixing(
        slots=asked.slots, alpha=0.2, eos_id=0, pad_id=0, vocab=pair.vocab,
        dtype=asked.dtype,
    )  # fmt: skip
    pairs = pair.student, pair.teacher, optimizer, rate
    return minillm.method(*pairs, policy=PRESETS["corrected"], mixing=mixing, **common)


def rows(vocab: int, asked: argparse.Namespace) -> Sequences:
    """Made-up prompts and answers of dolly's lengths, drawn apart from each other."""
    rng = np.random.default_rng(0)

    def side(quantiles: tuple[int, ...], slots: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = rng.permutation(models.like(quantiles, asked.batch, slots))
        return rng.integers(1, vocab, (asked.batch, slots), np.int32), sizes[:, None]

    prompt, before = side(models.DOLLY_PROMPTS, asked.prompt)
    answer, after = side(models.DOLLY_ANSWERS, asked.slots)
    return Sequences(
        prompt=prompt,
        prompt_mask=np.arange(asked.prompt)[None] >= asked.prompt - before,
        response=answer,
        response_mask=np.arange(asked.slots)[None] < after,
    )


def rollout(pair: models.Pair, given: Sequences, dtype: str) -> Rollout:
    """Given rows as if they had been collected."""
    guess = jnp.full(given.response.shape, -3.0)
    shape = (*given.response.shape, pair.teacher.embed_width)
    hidden = jax.random.normal(jax.random.key(4), shape, dtype)
    own = {name: getattr(given, name) for name in given.__dataclass_fields__}
    return Rollout(**own, log_q=guess, log_p=guess, log_mix=guess, teacher_hidden=hidden)


if __name__ == "__main__":
    main()
