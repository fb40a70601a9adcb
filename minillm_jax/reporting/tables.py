"""Tables of the report beside the main one: test sets and decodings, calibration, the judge."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minillm_jax.reporting import formats, results
from minillm_jax.reporting.formats import is_number

_DECODING = {"plain": "", "ban": "n-gram ban"}
_MAIN = "held out"  # what people are shown for the set named `test`


@dataclass(frozen=True)
class Table:
    """Headings as (label, unit), rows as (model, label, cells), and a line of explanation."""

    name: str
    title: str
    note: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, str, Sequence[str]]]


def test_sets(tests: Mapping[str, Any]) -> Table | None:
    """Rouge-L and exact match on every test set, plain and with the n-gram ban.

    None where there is one set and one decoding: the main table has that already.
    """
    keys = [
        (test, decoding)
        for test, models in tests.items()
        for decoding in _DECODING
        if any(decoding in found for found in models.values())
    ]
    if len(keys) < 2:
        return None
    columns = []
    for test, decoding in keys:
        found = next(f[decoding] for f in tests[test].values() if decoding in f)
        what = ", ".join(filter(None, (_MAIN if test == "test" else test, _DECODING[decoding])))
        columns += [(what, f"Rouge-L, {found['count']} prompts"), ("", "exact match")]
    names = results.ordered(dict.fromkeys(m for models in tests.values() for m in models))
    rows = []
    for model in names:
        cells = []
        for test, decoding in keys:
            found = (tests[test].get(model) or {}).get(decoding) or {}
            cells += [_cell(found, "rouge_l", 100), _cell(found, "exact_match", 100, " %")]
        rows.append((model, results.label(model), cells))
    note = "F1 × 100, best of several references"
    return Table("tests", "Test sets", note, columns, rows)


def judged(found: Mapping[str, Any]) -> Table | None:
    """What a judge said, from `judge_MODE.json`."""
    tests = found.get("tests") or {}
    if not tests:
        return None
    alone = found.get("mode") == "single"
    columns = []
    for test, models in tests.items():
        counted = max(m.get("judged", 0) for m in models.values())
        name = _MAIN if test == "test" else test
        columns.append((name, f"{'1 to 10' if alone else 'score ratio'}, {counted} answers"))
        columns += [] if alone else [("", "won · tied · lost")]
    names = results.ordered(dict.fromkeys(m for models in tests.values() for m in models))
    rows = []
    for model in names:
        cells = []
        for models in tests.values():
            m = models.get(model) or {}
            if alone:
                cells.append(_cell(m, "score", 1))
                continue
            cells.append(_cell(m, "ratio", 100, " %"))
            parts = [formats.percent(m.get(key), 0) for key in ("wins", "ties", "losses")]
            cells.append(" · ".join(parts) if m.get("judged") else formats.MISSING)
        rows.append((model, results.label(model), cells))
    against = {
        "reference": "sum of scores over that of the reference answers",
        "pairwise": f"against {results.label(str(found.get('baseline') or ''))}",
        "single": "each answer alone",
    }
    note = f"{found.get('judge') or 'a judge'}: {against.get(str(found.get('mode')), '')}"
    if not alone:
        note += ", both orders asked"
    return Table(f"judge-{found.get('mode')}", "Judge", note, columns, rows)


def _cell(found: Mapping[str, Any], key: str, times: float, unit: str = "") -> str:
    number, spread = (found.get(name, math.nan) for name in (key, key + results.DEVIATION))
    if not is_number(number):
        return formats.MISSING
    after = f" ± {times * spread:.1f}" if is_number(spread) else ""
    return f"{times * number:.1f}{after}{unit}"
