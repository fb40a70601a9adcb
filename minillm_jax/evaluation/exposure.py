"""Exposure bias: what errs because a model reads its own words instead of the teacher's.

Source: the paper, section 3.3, after Arora et al. 2022 (arXiv 2204.01171).

    R(l)       = sum_{t <= l} E_{y_<t ~ q} KL[p || q](. | y_<t)          regret on own prefixes
    eps(l)     = 1/l sum_{t <= l} E_{y_<t ~ p} KL[p || q](. | y_<t)      error on the teacher's
    ExAccErr(l) = 100 % (R(l) - l eps(l)) / (l eps(l))

An answer that has ended has no prefix of length t: the expectation is over those that still run, a
mean over the samples of a prompt and then over the prompts that have one. The reference counts an
ended answer as 0, which flattens its curves, and leaves out the first position.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 200  # of prompts, for the band
LEAST_ALIVE = 0.05  # of the answers, at the last position that one should draw


def by_prompt(divergence: ArrayLike, mask: ArrayLike) -> np.ndarray:
    """Mean over the running samples of each prompt, [R, N]; NaN where none runs any more.

    `divergence` and `mask` are [R, S, N]: prompts, samples of each, positions.
    """
    mask = np.asarray(mask, bool)
    alive = mask.sum(axis=1)
    total = np.where(mask, np.asarray(divergence, np.float64), 0.0).sum(axis=1)
    return np.where(alive > 0, total / np.maximum(alive, 1), np.nan)


def excess_error(own: np.ndarray, given: np.ndarray) -> np.ndarray:
    """ExAccErr(l) in percent for l = 1 ... N, [N]; NaN from where all answers of a side have ended.

    `own` and `given` [R, N] are `by_prompt` of KL[p || q] on the student's and the teacher's
    samples.
    """
    regret, error = (np.cumsum(_expected(side)) for side in (own, given))
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100.0 * (regret - error) / error


def _expected(side: np.ndarray) -> np.ndarray:
    """Mean over the prompts that have a running sample, NaN without one, [N]."""
    real = ~np.isnan(side)
    count = real.sum(axis=0)
    return np.where(count > 0, np.where(real, side, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


def curve(
    own: tuple[ArrayLike, ArrayLike], given: tuple[ArrayLike, ArrayLike], seed: int = 0
) -> dict[str, Any]:
    """ExAccErr by position, with what one may draw of it.

    Args:
        own: KL[p || q] and the mask on the student's samples, [R, S, N] each.
        given: the same on the teacher's.
        seed: of the bootstrap over prompts.

    Returns:
        Lists over l = 1 ... N: `excess` in percent, `deviation` of it between draws of the prompts
        (NaN for one prompt), and `alive`, the smaller share of answers that still run; and `reach`,
        the positions that `LEAST_ALIVE` of the answers come to.
    """
    sides = by_prompt(*own), by_prompt(*given)
    prompts = len(sides[0])
    rng = np.random.default_rng(seed)
    drawn = [
        excess_error(*(side[rows] for side in sides))
        for rows in rng.integers(0, prompts, (DRAWS, prompts))
    ]
    excess = excess_error(*sides)
    spread = np.full_like(excess, np.nan)
    if prompts > 1:
        # In a draw all of the rest may have ended: its curve is shorter.
        real = np.isfinite(drawn).sum(axis=0) > 1
        spread[real] = np.nanstd(np.array(drawn)[:, real], axis=0, ddof=1)
    alive = np.minimum(*(np.asarray(mask, bool).mean(axis=(0, 1)) for _, mask in (own, given)))
    drawn_to = np.isfinite(excess) & (alive >= LEAST_ALIVE)
    return {
        "excess": excess.tolist(),
        "deviation": spread.tolist(),
        "alive": alive.tolist(),
        "reach": int(drawn_to.sum()),
    }


def last(found: Mapping[str, Any]) -> float:
    """ExAccErr in percent at the last position within reach; NaN without one."""
    return found["excess"][found["reach"] - 1] if found["reach"] else math.nan
