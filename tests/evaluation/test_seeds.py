import math

import numpy as np

from minillm_jax.evaluation.seeds import deviation, over_seeds


def test_mean_and_deviation_over_seeds():
    runs = [{"rouge_l": 0.2}, {"rouge_l": 0.3}, {"rouge_l": 0.7}]
    found = over_seeds(runs)
    np.testing.assert_allclose(found["rouge_l"], 0.4)
    np.testing.assert_allclose(found["rouge_l_deviation"], np.std([0.2, 0.3, 0.7], ddof=1))


def test_one_seed_has_no_deviation():
    assert over_seeds([{"rouge_l": 0.2}]) == {"rouge_l": 0.2}
    assert math.isnan(deviation([0.2]))
