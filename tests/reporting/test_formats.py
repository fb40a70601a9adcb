import math

import pytest

from minillm_jax.reporting import formats


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3900, "1 h 05 min"),
    ],
)
def test_duration(seconds, text):
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23 k"), (12345, "12.3 k"), (999_700, "1.00 M")]
    + [(134_515_008, "135 M"), (1.5e9, "1.50 G")],
)
def test_count(number, text):
    assert formats.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.53312, "0.533"), (12.345, "12.3"), (1234.5, "1234"), (0.0, "0.00"), (-0.5, "-0.500")]
    + [(2e-5, "2.00e-05"), (3.2e7, "3.20e+07")],
)
def test_significant(number, text):
    assert formats.significant(number) == text


@pytest.mark.parametrize("show", [formats.fixed, formats.percent, formats.significant])
@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_missing_is_a_dash(show, missing):
    assert show(missing) == formats.count(missing) == formats.duration(missing) == "–"
