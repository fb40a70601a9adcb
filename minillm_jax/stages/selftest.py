"""What can be known of the teacher before it teaches: that it agrees with itself.

One batch is scored twice, its rows in another order the second time: what differs is the noise of
the arithmetic. KL[teacher || teacher] by the code that measures students must be within it.
"""

from collections.abc import Sequence

import jax
import numpy as np

from minillm_jax import hosts
from minillm_jax.data.examples import Example
from minillm_jax.stages import Outcome, Run
from minillm_jax.stages.measures import measure
from minillm_jax.types import InputError

ROWS = 4  # a teacher that is wrong is so everywhere
ROUNDING = 1e-4  # nats per token that sums over a vocabulary in float32 may be off


def self_test(run: Run, examples: Sequence[Example]) -> Outcome:
    """Noise and KL[teacher || teacher] on the first answers, in nats per token, for `done.json`.

    Raises:
        InputError: a teacher that is not finite, or that differs from itself by more than noise.
    """
    teacher = run.build.teacher
    batch, real = run.build.data.ordered(examples[:ROWS], ROWS)[0]
    turned = jax.tree.map(lambda x: x[::-1], batch)
    rows = len(batch.prompt)
    first = measure(run, teacher, [(batch, rows)])
    second = measure(run, teacher, [(turned, rows)])
    tokens = np.maximum(first["tokens"], 1)[:real]
    log_p = first["log_p"][:real]
    noise = float(np.max(np.abs(log_p - second["log_p"][::-1][:real]) / tokens))
    distance = float(np.max(np.abs(first["reverse_kl"][:real]) / tokens))
    where = run.build.teacher_checkpoint.path
    if not np.isfinite([noise, distance]).all():
        raise InputError(
            f"the teacher {where} gives numbers that are not finite: try "
            "--config.teacher.dtype=float32, or another teacher"
        )
    if distance > noise + ROUNDING:
        raise InputError(
            f"the teacher {where} is {distance:.2g} nats per token from itself, with a noise of "
            f"{noise:.2g}: try --config.attention=xla and --config.teacher.dtype=float32"
        )
    print(
        f"self-test: KL[teacher || teacher] {distance:.1e}, noise {noise:.1e} nats per token",
        file=hosts.log(),
    )
    return {"self_test": {"noise": noise, "teacher_to_teacher": distance}}
