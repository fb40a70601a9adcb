import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.objectives import policy as mini
from minillm_jax.objectives import reduce
from minillm_jax.types import InputError

CORRECTED, PAPER, LMOPS = (mini.PRESETS[name] for name in ("corrected", "paper", "lmops"))
LENGTHS = np.array([5, 1, 8, 3, 6, 8, 2, 4])


def batch(seed=0, positions=8, lengths=LENGTHS):
    """log_q, log_q_old, log_p, log_mix, reverse_kl and the mask of a rollout [B, N]."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), 8)
    log_q_old, log_p = (np.log(rng.uniform(0.05, 0.9, shape)) for _ in range(2))
    log_q = log_q_old + 0.1 * rng.normal(size=shape)
    arrays = [log_q, log_q_old, log_p, np.log(0.8 * np.exp(log_q_old) + 0.2 * np.exp(log_p))]
    arrays.append(rng.uniform(0, 1, shape))
    pad = ((0, 0), (0, positions - 8))
    mask = np.arange(positions)[None] < lengths[:, None]
    return [jnp.asarray(np.pad(a, pad), jnp.float32) for a in arrays] + [jnp.asarray(mask)]


def loss_and_grad(policy, arrays, parts=1, fill=None):
    """Mean loss and its gradient to log_q and reverse_kl, from `parts` micro-batches."""
    return _loss_and_grad(policy, arrays, parts, fill)


@partial(jax.jit, static_argnums=(0, 2, 3))
def _loss_and_grad(policy, arrays, parts, fill):
    log_q, log_q_old, log_p, log_mix, reverse_kl, mask = arrays
    if fill is not None:
        log_q, log_q_old, log_p, log_mix, reverse_kl = (
            jnp.where(mask, x, fill) for x in arrays[:-1]
        )
    targets = mini.prepare(policy, log_p, log_q_old, log_mix, mask)

    def pair(log_q, reverse_kl, targets, mask):
        values = mini.losses(policy, log_q, reverse_kl, targets, mask)["loss"]
        out = reduce.total(values, mask, policy.reduction)
        return out.sum, out

    sums, grads = reduce.Pair(jnp.zeros(()), jnp.zeros(())), []
    for rows in np.split(np.arange(mask.shape[0]), parts):
        micro = jax.tree.map(lambda x, rows=rows: x[rows], (log_q, reverse_kl, targets, mask))
        grad, out = jax.grad(pair, argnums=(0, 1), has_aux=True)(*micro)
        sums, grads = reduce.add(sums, out), [*grads, grad]
    grads = [jnp.concatenate(parts) / sums.count for parts in zip(*grads, strict=True)]
    return reduce.mean(sums), grads


@pytest.mark.parametrize("policy", [CORRECTED, PAPER], ids=["corrected", "paper"])
def test_padding_and_split_change_nothing(policy):
    loss, grads = loss_and_grad(policy, batch())
    for arrays, parts in ((batch(positions=19), 1), (batch(), 4), (batch(positions=31), 8)):
        other, changed = loss_and_grad(policy, arrays, parts)
        np.testing.assert_allclose(other, loss, atol=1e-6)
        for a, b in zip(changed, grads, strict=True):
            np.testing.assert_allclose(a[:, :8], b, atol=1e-6)
            assert not np.any(a[:, 8:])


def test_padding_does_change_the_reference():
    assert abs(loss_and_grad(LMOPS, batch())[0] - loss_and_grad(LMOPS, batch(0, 31))[0]) > 1e-3


@pytest.mark.parametrize("policy", mini.PRESETS.values(), ids=mini.PRESETS)
@pytest.mark.parametrize("fill", [jnp.nan, -jnp.inf, 7.0])
def test_garbage_in_padding_changes_nothing(policy, fill):
    loss, grads = loss_and_grad(policy, batch())
    other, changed = loss_and_grad(policy, batch(), fill=fill)
    np.testing.assert_array_equal(other, loss)
    for a, b in zip(changed, grads, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fill", [jnp.nan, -jnp.inf])
def test_targets_are_neutral_in_padding(fill):
    mask = batch()[-1]
    logs = [jnp.where(mask, x, fill) for x in batch()[1:4]]
    targets = mini.prepare(CORRECTED, logs[1], logs[0], logs[2], mask)
    assert not np.any(targets.advantage[~mask]) and np.all(targets.weight[~mask] == 1)


def test_the_paper_averages_over_answers_and_the_others_over_tokens():
    arrays = batch()
    mask = arrays[-1]
    targets = mini.prepare(PAPER, arrays[2], arrays[1], arrays[3], mask)
    summed = mini.losses(PAPER, arrays[0], arrays[4], targets, mask)["loss"].sum()
    np.testing.assert_allclose(loss_and_grad(PAPER, arrays)[0], summed / 8, rtol=1e-6)
    mean = reduce.mean(reduce.total(arrays[4], mask, CORRECTED.reduction))
    np.testing.assert_allclose(mean, arrays[4][mask].sum() / LENGTHS.sum(), rtol=1e-6)


def test_devices_change_nothing():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one, many = (loss_and_grad(CORRECTED, x) for x in (batch(), jax.device_put(batch(), rows)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def one_row(rewards, **changes):
    reward = jnp.asarray([rewards], jnp.float32)
    policy = dataclasses.replace(mini.Policy(gamma=0.5), **changes)
    run = jax.jit(partial(mini.returns, policy))
    return run(reward, jnp.ones_like(reward), jnp.ones(reward.shape, bool))[0]


def test_returns_by_hand():
    r = [1.0, 2.0, 4.0]
    np.testing.assert_allclose(one_row(r), [(2 + 0.5 * 4) / 1.5, 4, 0])
    np.testing.assert_allclose(one_row(r, length_norm=False), [4, 4, 0])
    np.testing.assert_allclose(one_row(r, estimator="paper", gamma=1.0), [6 / 2, 4, 0])
    np.testing.assert_allclose(one_row(r, estimator="lmops"), [3 / 3, 4 / 2, 4])
    np.testing.assert_allclose(one_row(r, gamma=0.0), [2, 4, 0])


def test_whitening_by_hand():
    advantage = jnp.asarray([[1.0, 3.0, 0.0], [5.0, 0.0, 0.0]])
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0]], bool)
    spread = np.sqrt(8 / 3)
    full = mini.whitened(CORRECTED, advantage, mask)
    np.testing.assert_allclose(full, [[-2 / spread, 0, 0], [2 / spread, 0, 0]], atol=1e-6)
    center = mini.whitened(dataclasses.replace(CORRECTED, whiten="center"), advantage, mask)
    np.testing.assert_allclose(center, [[-2, 0, 0], [2, 0, 0]], atol=1e-6)
    none = mini.whitened(PAPER, advantage, mask)
    np.testing.assert_array_equal(none, advantage)
    padded = mini.whitened(LMOPS, advantage, mask)
    np.testing.assert_allclose(padded[0, 2], -1.5 / np.sqrt(35 / 6 - 2.25), atol=1e-6)


@pytest.mark.parametrize(
    ("clip_weight", "want", "clipped"), [(True, [-1.1, 0.8], [0, 1]), (False, [-0.75, 0.5], [1, 0])]
)
def test_clip_by_hand(clip_weight, want, clipped):
    """rho 1.1 with w 0.625 and A 1; rho 0.5 with w 0.5 and A -1; epsilon 0.2."""
    policy = dataclasses.replace(PAPER, clip_weight=clip_weight)
    zero, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    targets = mini.Targets(jnp.asarray([[1.0, -1.0]]), jnp.asarray([[0.625, 0.5]]), zero, zero)
    log_q = jnp.log(jnp.asarray([[1.1, 0.5]]))
    values = mini.losses(policy, log_q, zero, targets, mask)
    np.testing.assert_allclose(values["policy"][0], want, rtol=1e-6)
    np.testing.assert_array_equal(values["clipped"][0], clipped)
    grad = jax.grad(lambda x: mini.losses(policy, x, zero, targets, mask)["loss"].sum())(log_q)
    np.testing.assert_array_equal(grad[0] == 0, np.asarray(clipped, bool))


def test_w_multiplies_both_terms():
    log_q, log_q_old, log_p, log_mix, reverse_kl, mask = batch()
    targets = mini.prepare(CORRECTED, log_p, log_q_old, log_mix, mask)
    w = np.where(mask, np.exp(log_q_old - log_mix), 0)
    values = mini.losses(CORRECTED, log_q_old, reverse_kl, targets, mask)
    np.testing.assert_allclose(values["single_step"], w * reverse_kl, rtol=1e-5)
    np.testing.assert_allclose(values["ratio"], w, rtol=1e-5)
    unweighted = mini.losses(LMOPS, log_q, reverse_kl, targets, mask)
    np.testing.assert_allclose(unweighted["single_step"], np.where(mask, reverse_kl, 0))


def test_without_single_step_it_is_reported_and_not_summed():
    log_q, log_q_old, log_p, log_mix, reverse_kl, mask = batch()
    policy = dataclasses.replace(CORRECTED, single_step=False)
    targets = mini.prepare(policy, log_p, log_q_old, log_mix, mask)
    values = mini.losses(policy, log_q, reverse_kl, targets, mask)
    np.testing.assert_array_equal(values["loss"], values["policy"])
    assert values["single_step"].max() > 0


def test_teacher_equal_to_student_has_no_loss():
    _, log_q_old, _, _, _, mask = batch()
    targets = mini.prepare(CORRECTED, log_q_old, log_q_old, log_q_old, mask)
    values = mini.losses(CORRECTED, log_q_old, jnp.zeros_like(log_q_old), targets, mask)
    assert not np.any(values["loss"]) and not np.any(targets.reward)
    np.testing.assert_array_equal(targets.weight, np.ones(mask.shape))


def test_the_end_token_counts_where_it_is_also_the_pad():
    """A mask built from ids would drop the first end token (TRL #7024, #6357)."""
    log_q, log_q_old, log_p, log_mix, reverse_kl, mask = batch()
    dropped = mask & ~((jnp.arange(8)[None] == 4) & (jnp.arange(8)[:, None] == 0))
    with_end = mini.prepare(PAPER, log_p, log_q_old, log_mix, mask)
    without = mini.prepare(PAPER, log_p, log_q_old, log_mix, dropped)
    assert with_end.reward[0, 4] != 0 and without.reward[0, 4] == 0
    assert np.all(np.abs(with_end.advantage - without.advantage)[0, :4] > 1e-3)
    _, grads = loss_and_grad(PAPER, (log_q, log_q_old, log_p, log_mix, reverse_kl, mask))
    assert grads[1][0, 4] > 0


def test_discount_counts_from_the_token_and_not_from_the_start():
    """gamma^t of the absolute position underflows on a long answer (TRL #6626)."""
    rewards = np.random.default_rng(0).normal(size=4096)
    values = one_row(rewards)
    np.testing.assert_allclose(values[4000:], one_row(rewards[4000:]), rtol=1e-5)
    want = sum(rewards[101 + k] * 0.5**k for k in range(60)) / 2
    np.testing.assert_allclose(values[100], want, rtol=1e-5)


def test_no_gradient_through_targets():
    _, log_q_old, log_p, log_mix, _, mask = batch()

    def size(log_p, log_q_old, log_mix):
        targets = mini.prepare(CORRECTED, log_p, log_q_old, log_mix, mask)
        return sum(jnp.sum(x) for x in jax.tree.leaves(targets))

    for grad in jax.grad(size, argnums=(0, 1, 2))(log_p, log_q_old, log_mix):
        assert not np.any(grad)


def test_a_token_that_only_the_teacher_draws_has_weight_zero():
    """The reference asserts here (top-p with a teacher mixture)."""
    log_q, log_q_old, log_p, _, reverse_kl, mask = batch()
    log_q_old = log_q_old.at[2, 3].set(-jnp.inf)
    log_mix = mini.log_mixture(log_q_old, log_p, 0.2)
    targets = mini.prepare(CORRECTED, log_p, log_q_old, log_mix, mask)
    assert targets.weight[2, 3] == 0 and targets.reward[2, 3] == 100
    values = mini.losses(CORRECTED, log_q, reverse_kl, targets, mask)
    assert np.all(np.isfinite(values["loss"]))


def test_log_mixture():
    log_q, log_p = jnp.log(jnp.asarray([0.5, 0.1])), jnp.log(jnp.asarray([0.25, 0.9]))
    np.testing.assert_allclose(
        jnp.exp(mini.log_mixture(log_q, log_p, 0.2)), [0.45, 0.26], rtol=1e-6
    )
    for alpha in (-1.0, 0.0, None):
        np.testing.assert_array_equal(mini.log_mixture(log_q, log_p, alpha), log_q)
    np.testing.assert_array_equal(mini.log_mixture(log_q, log_p, 1.0), log_p)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"estimator": "trl"}, "estimator='trl'"),
        ({"whiten": "yes"}, "whiten='yes'"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"cliprange": 0.0}, "cliprange=0.0"),
        ({"reward_scaling": None}, "reward_scaling=None"),
        ({"estimator": "lmops", "prefix_weights": True}, "prefix_weights"),
    ],
)
def test_bad_choices_are_named(changes, culprit):
    with pytest.raises(InputError, match=culprit):
        mini.Policy(**changes)
