"""Warnings of spikes and of collapse: when, what they say, and that they are not repeated."""

import pytest

from minillm_jax.reporting.watch import QUIET, Watch, of_run

USUAL = {"grad_norm": 1.0, "response_length": 40.0, "entropy": 2.0, "ess": 0.9, "repetition": 0.1}


def watched(updates, **usual):
    watch = Watch("distill")
    return [
        (step, warning)
        for step, changes in enumerate(updates, 1)
        for warning in watch.add(step, USUAL | usual | changes)
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grad_norm": 11.0}, "gradient norm 11, usually 1; lower config.distill.clip_norm or"),
        ({"response_length": 9.0}, "answers have shrunk: response_length 9, 40 at first; lower"),
        ({"response_length": 161.0}, "answers have grown: response_length 161, 40 at first"),
        ({"entropy": 0.1}, "sure of every token: entropy 0.1, 2 at first; lower config.distill.le"),
        ({"repetition": 0.6}, "answers repeat themselves: repetition 0.6; "),
        ({"repetition": 0.6}, "or raise config.distill.alpha"),
        ({"ess": 0.2}, "carry the importance weights: ess 0.2; lower config.distill.alpha, or"),
    ],
)
def test_a_sign_is_said_with_what_to_change_and_not_at_every_update(change, says):
    quiet = [{}] * 12
    assert watched(quiet * 5) == []
    ((step, warning),) = [w for w in watched([*quiet, change, change, *quiet])]
    assert step == 13 and warning.startswith("update 13: ") and says in warning
    again = watched([*quiet, change, *[{}] * (QUIET - 1), change])
    assert [step for step, _ in again] == [13, 13 + QUIET]


def test_what_is_short_of_the_limits_says_nothing():
    near = {"grad_norm": 9.0, "response_length": 11.0, "entropy": 0.21, "ess": 0.31}
    assert watched([*[{}] * 12, near | {"repetition": 0.5}, {"response_length": 159.0}]) == []


def test_what_is_no_number_is_left_out_and_a_run_has_to_begin_first():
    nothing = {name: None for name in USUAL}
    assert watched([nothing, {"grad_norm": float("nan")}, {}, {"grad_norm": 1e9}]) == []


def test_what_was_said_in_a_run_is_told_again_by_stage_with_the_skipped_updates():
    def row(stage, step, **changes):
        return {"stage": stage, "step": step, "skipped": 0} | USUAL | changes

    rows = [row("distill", step) for step in range(1, 13)]
    rows += [row("distill", step, grad_norm=None, skipped=1) for step in (13, 14, 16)]
    rows += [row("distill", 17, ess=0.1), row("student_sft", 1, skipped=1), row("other", 1, ess=0)]
    rows += [{"stage": "distill", "step": 17, "valid_reverse_kl": 1.0}]
    told = of_run(rows, {"student_sft": "sft", "distill": "distill"})
    assert [(one["stage"], one["step"]) for one in told] == [
        ("student_sft", 1), ("distill", 13), ("distill", 16), ("distill", 17)
    ]  # fmt: skip
    texts = [one["text"].partition(":")[0] for one in told]
    assert texts == ["update 1", "updates 13 to 14", "update 16", "update 17"]
    assert "skipped" in told[1]["text"] and "lower config.distill.alpha" in told[3]["text"]
