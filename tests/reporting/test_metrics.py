import math

import numpy as np

from minillm_jax.reporting.metrics import Ema, MovingAverage, Rate, smooth


def test_moving_average_forgets_and_skips_nan():
    average = MovingAverage(2)
    assert math.isnan(average.value)
    assert [average.add(x) for x in (1, 3, math.nan, 5)] == [1, 2, 2, 4]


def test_ema_starts_without_bias():
    ema = Ema(0.5)
    assert math.isnan(ema.value)
    assert ema.add(4.0) == 4.0
    # (0.5 * 0.5 * 4 + 0.5 * 1) / 0.75
    assert ema.add(1.0) == 2.0
    assert ema.add(math.inf) == 2.0


def test_rate_drops_the_compilation():
    now = [0.0]
    rate = Rate(window=2, clock=lambda: now[0])
    assert math.isnan(rate.value)
    now[0] = 100.0
    assert rate.add(50) == 0.5
    now[0] = 110.0
    assert rate.add(50) == 5.0  # the first hundred seconds no longer count
    now[0] = 115.0
    assert rate.add(100) == 10.0
    now[0] = 116.0
    assert rate.add(20) == 20.0  # a window of two


def test_smooth_by_hand():
    np.testing.assert_allclose(smooth([0, 3, 6, 3], 3), [1.5, 3, 4, 4.5])
    np.testing.assert_allclose(smooth([1, math.nan, 3], 3), [1, 2, 3])
    np.testing.assert_array_equal(smooth([math.nan] * 2, 3), [math.nan] * 2)
    assert smooth([], 5).shape == (0,)
