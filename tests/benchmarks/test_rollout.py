import pytest

from benchmarks import rollout
from minillm_jax.rollout import Mixing
from minillm_jax.rollout.mixed import throw_coins


@pytest.mark.parametrize(("slots", "expected"), [(64, 13), (256, 51)])
def test_the_teacher_draws_as_often_as_expected(slots, expected):
    mixing = Mixing(slots=slots, alpha=0.2, eos_id=0, pad_id=0, vocab=7)
    assert throw_coins(rollout.usual_key(mixing), mixing).sum() == expected
