"""ECE and its bins against hand values; label probabilities against a plain softmax."""

import numpy as np
import pytest

from minillm_jax.evaluation import calibration


def test_ece_by_hand():
    # Confidences 0.6 and 0.58 (bin 6: right, wrong), 0.9 (bin 9: right), 1.0 (bin 10: wrong).
    p = np.array([[0.6, 0.4], [0.42, 0.58], [0.1, 0.9], [1.0, 0.0]])
    found = calibration.figures(p, [0, 0, 1, 1])
    assert found["ece"] == pytest.approx((2 * abs(0.5 - 0.59) + 0.1 + 1.0) / 4)
    assert found["accuracy"] == 0.5 and found["confidence"] == pytest.approx(0.77)
    bins = calibration.reliability(p, [0, 0, 1, 1])
    assert [(b["low"], b["high"], b["count"]) for b in bins] == [
        (0.5, 0.6, 2),
        (0.8, 0.9, 1),
        (0.9, 1.0, 1),
    ]
    assert [b["accuracy"] for b in bins] == [0.5, 1.0, 0.0]


def test_ece_of_brute_force():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 500)
    labels = rng.integers(0, 3, 500)
    total = 0.0
    for b in range(7):
        rows = [i for i in range(500) if b / 7 < p[i].max() <= (b + 1) / 7]
        if rows:
            right = np.mean([p[i].argmax() == labels[i] for i in rows])
            total += len(rows) / 500 * abs(right - np.mean([p[i].max() for i in rows]))
    assert calibration.figures(p, labels, bins=7)["ece"] == pytest.approx(total)


def test_a_model_that_is_as_right_as_it_says_has_no_error():
    p = np.tile([0.75, 0.25], (4, 1))
    assert calibration.figures(p, [0, 0, 0, 1])["ece"] == pytest.approx(0)


def test_label_probabilities_are_a_softmax_over_the_labels_alone():
    nll = np.array([[1.0, 2.0], [1000.0, 1001.0]])
    np.testing.assert_allclose(
        calibration.label_probabilities(nll), np.tile([1, np.exp(-1)], (2, 1)) / (1 + np.exp(-1))
    )
