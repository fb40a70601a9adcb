"""Numbers as people read them: durations, counts, percentages; a dash for what is missing."""

import math

MISSING = "–"


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float, which `None`, NaN and bool are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fixed(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` decimals."""
    return f"{value:.{digits}f}" if value is not None and is_number(value) else MISSING


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.{digits}f} %" if value is not None and is_number(value) else MISSING


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits, in scientific notation when far from 1."""
    if value is None or not is_number(value):
        return MISSING
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{max(decimals, 0)}f}"


def count(value: float | None) -> str:
    """A count with a thousand suffix: 950, 12.3 k, 135 M."""
    if value is None or not is_number(value):
        return MISSING
    if abs(value) < 999.5:
        return f"{value:.0f}"
    for suffix in ("k", "M", "G"):
        value /= 1000
        if abs(value) < 999.5:
            return (
                f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {suffix}"
            )
    return f"{value / 1000:.3g} T"


def duration(seconds: float | None) -> str:
    """Seconds as `0.4 s`, `45 s`, `3 min 20 s` or `1 h 05 min`."""
    if seconds is None or not is_number(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
