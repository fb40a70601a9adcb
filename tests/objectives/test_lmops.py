"""`lmops` and the corpus loss against the arrays that the reference code gave."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from minillm_jax.objectives import policy as mini
from minillm_jax.objectives import reduce, token

Case = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def cases(request) -> dict[str, Case]:
    folder = os.environ.get("LMOPS_FIXTURES")
    if folder is None:
        folder = request.getfixturevalue("shared") / "fixtures" / "lmops_estimator"
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        pytest.skip(f"no .npz of the reference estimator in {folder}; set LMOPS_FIXTURES")
    return {path.stem: dict(np.load(path)) for path in paths}


def compare(name: str, case: Case, got: dict[str, jax.Array]):
    for key, value in got.items():
        np.testing.assert_allclose(
            value,
            case[key],
            rtol=0,
            atol=1e-6 if key.startswith("grad") else 1e-5,
            err_msg=f"{name}: {key}",
        )


def update(policy: mini.Policy, case: Case) -> dict[str, jax.Array]:
    """What the reference computes of one rollout, by its names in the file."""
    slots = slice(case["query_ids"].shape[1] - 1, -1)
    tokens, mask, heat = case["response_ids"], case["response_mask"], float(case["temperature"])
    teacher = case["teacher_logits"][:, slots]

    @jax.jit
    def run(student, student_old):
        log_q_old = token.log_prob_of(student_old[:, slots] / heat, tokens)
        log_p = token.log_prob_of(teacher, tokens)
        log_mix = mini.log_mixture(log_q_old, log_p, float(case["alpha"]))
        targets = mini.prepare(policy, log_p, log_q_old, log_mix, mask)

        def loss(student):
            logits = student[:, slots] / heat
            log_q, reverse_kl = token.log_prob_of(logits, tokens), token.reverse_kl(logits, teacher)
            values = mini.losses(policy, log_q, reverse_kl, targets, mask)
            pairs = {k: reduce.total(v, mask, policy.reduction) for k, v in values.items()}
            return reduce.mean(pairs["loss"]), reduce.mean(pairs)

        grad, means = jax.grad(loss, has_aux=True)(student)
        return {
            "student_logprob_old": reduce.keep(log_q_old, mask),
            "teacher_logprob": reduce.keep(log_p, mask),
            "importance_weight": targets.weight,
            "reward": targets.reward,
            "return_length_normalized": mini.returns(policy, targets.reward, targets.weight, mask),
            "advantage_whitened": targets.advantage,
            "pg_loss": means["policy"],
            "reg_loss": means["single_step"],
            "rl_loss": means["loss"],
            "grad_rl_loss_wrt_student_logits": grad,
        }

    return run(case["student_logits"], case["student_logits_old"])


def corpus(case: Case) -> dict[str, jax.Array]:
    mask, ratio = case["lm_labels"] >= 0, float(case["kd_ratio"])
    labels, teacher = np.where(mask, case["lm_labels"], 0), case["lm_teacher_logits"]

    def mean(values):
        return reduce.mean(reduce.total(values, mask))

    @jax.jit
    def run(student):
        value, grad = jax.value_and_grad(
            lambda student: mean(token.corpus(student, teacher, labels, ratio))
        )(student)
        return {
            "lm_loss": mean(token.cross_entropy(student, labels)),
            "ds_loss": mean(token.soft_cross_entropy(student, teacher)),
            "pt_loss": value,
            "grad_pt_loss_wrt_lm_student_logits": grad,
        }

    return run(case["lm_student_logits"])


def test_every_array_of_the_reference(cases):
    for name, case in cases.items():
        policy = dataclasses.replace(
            mini.PRESETS["lmops"],
            gamma=float(case["gamma"]),
            reward_scaling=float(case["reward_scaling"]),
            reward_clip=float(case["reward_clip"]),
            cliprange=float(case["cliprange"]),
            single_step=bool(case["single_step"]),
        )
        compare(name, case, update(policy, case))


def test_corpus_loss_of_the_reference(cases):
    for name, case in cases.items():
        compare(name, case, corpus(case))
