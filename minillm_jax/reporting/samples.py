"""Sample answers of the report, with log(p / q) of every token as a colour."""

import math
from collections.abc import Mapping
from typing import Any

from minillm_jax.reporting import results
from minillm_jax.reporting.formats import is_number

END = "\N{END OF PROOF}"  # shown for the end of sequence, which has no text
# Nats at which the colour is next: at 0.7 one model gives a token twice what the other does.
_STEPS = (0.35, 0.7, 1.4, 2.8)


def sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `answers.jsonl` for the template: `answers` greedy, `sampled` by token.

    Both are lists of (model, label, x); a token is (text, CSS class, log(p / q) as text).
    """
    answers, sampled = row.get("answers") or {}, row.get("samples") or {}
    return {
        "instruction": str(row.get("instruction") or ""),
        "input": str(row.get("input") or ""),
        "reference": str(row.get("reference") or ""),
        "answers": [
            (m, results.label(m), str(answers[m] or "").strip()) for m in results.ordered(answers)
        ],
        "sampled": [(m, results.label(m), tokens(sampled[m])) for m in results.ordered(sampled)],
    }


def tokens(found: Any) -> list[tuple[str, str, str]]:
    """Text, colour and log(p / q) of each token; without ratios no colour."""
    if not isinstance(found, Mapping):
        return []
    pieces = [str(piece) for piece in found.get("pieces") or []]
    if pieces and not pieces[-1]:
        pieces[-1] = END
    ratios = list(found.get("log_ratio") or [])
    ratios += [None] * (len(pieces) - len(ratios))
    return [
        (piece, shade(ratio), f"{ratio:+.2f}" if is_number(ratio) else "")
        for piece, ratio in zip(pieces, ratios, strict=False)
    ]


def shade(ratio: Any) -> str:
    """The CSS class: `p1` to `p4` where the teacher likes the token more, `q1` to `q4` less."""
    if ratio == -math.inf:
        return f"q{len(_STEPS)}"
    if not is_number(ratio):
        return ""
    depth = sum(abs(ratio) >= step for step in _STEPS)
    return f"{'p' if ratio > 0 else 'q'}{depth}" if depth else ""
