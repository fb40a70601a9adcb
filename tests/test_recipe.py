"""Updates, micro-batches and stages, as they follow from settings."""

import numpy as np
import pytest

from configs.quickstart import get_config
from minillm_jax import recipe
from minillm_jax.methods import registry
from minillm_jax.recipe import Outline, micro_batches, schedule, windows
from minillm_jax.stages.plan import plan
from minillm_jax.types import InputError

SIZES = {"steps": 7, "epochs": 0.0, "batch_size": 32, "evaluate_every": 0, "save_every": 0}


@pytest.mark.parametrize(
    ("rows", "most", "ways", "parts"),
    [
        (64, 0, 1, 1),
        (64, 64, 1, 1),
        (64, 100, 1, 1),
        (64, 4, 1, 16),
        (64, 4, 16, 1),  # the reference's 16 devices of 4 rows
        (64, 2, 16, 2),
        (64, 3, 1, 32),  # 3 rows do not divide 64, so 2
        (12, 5, 2, 2),
        (7, 3, 1, 7),
        (8, 1, 8, 1),
    ],
)
def test_micro_batches_are_the_fewest_that_fit(rows, most, ways, parts):
    assert micro_batches(rows, most, ways) == parts
    assert rows % (parts * ways) == 0 and rows // parts // ways <= (most or rows)


def test_a_batch_that_does_not_split_over_the_devices_is_refused():
    with pytest.raises(InputError, match="batch_size=12 does not split over 8 devices: make it a"):
        micro_batches(12, 0, 8)


@pytest.mark.parametrize(
    ("most", "found"),
    [
        (140, (140,)), (170, (170,)), (256, (128, 256)), (512, (128, 256, 512)),
        (1100, (320, 576, 1100)),
    ],
)  # fmt: skip
def test_windows_are_a_quarter_a_half_and_all_of_what_is_wide(most, found):
    assert windows(most) == found


def test_steps_count_where_there_are_no_epochs():
    found = schedule(SIZES, 1000)
    assert (found.steps, found.evaluate_every, found.save_every) == (7, 7, 7)
    found = schedule(SIZES | {"evaluate_every": 3, "save_every": 2}, 1000)
    assert (found.evaluate_every, found.save_every) == (3, 2)


def test_epochs_become_updates_and_each_is_looked_at():
    found = schedule(SIZES | {"epochs": 3.0}, 100)  # three whole batches per epoch
    assert (found.steps, found.evaluate_every, found.save_every) == (9, 3, 3)
    half = schedule(SIZES | {"epochs": 0.5}, 128)
    assert (half.steps, half.evaluate_every) == (2, 2)
    few = schedule(SIZES | {"epochs": 2.0}, 5)
    assert (few.steps, few.evaluate_every) == (2, 1)


def test_the_rate_of_a_stage_ends_with_its_epochs():
    section = SIZES | {
        "learning_rate": 1.0, "warmup": 0, "schedule": "cosine", "weight_decay": 0.0, "b2": 0.9,
        "clip_norm": 1.0,
    }  # fmt: skip
    _, rate = recipe.optimizer(section, 10)
    np.testing.assert_allclose([np.asarray(rate(t)) for t in (0, 5, 10)], [1, 0.5, 0])


def stages(method="minillm", answers="data", tunes=True, teacher="", student="", own=False):
    given = "teacher" if method.startswith("seqkd") else answers
    outline = Outline(method, answers, tunes, teacher, student, own, given, False, True)
    found = plan(outline, lambda run: {})
    return {name: stage.inputs for name, stage in found.stages.items()}, dict(found.skipped)


def test_the_quickstart_has_the_stages_that_it_had():
    found, skipped = stages(answers="teacher", tunes=False, own=True)
    assert found == {
        "teacher_answers": (),
        "student_sft": ("teacher_answers",),
        "distill": ("student_sft",),
        "evaluate": ("teacher_answers", "student_sft", "distill"),
        "report": ("evaluate",),
    }
    assert not skipped


def test_the_stages_of_the_paper_read_what_they_need():
    found, _ = stages()
    assert found["student_sft"] == ()  # the data's answers, whoever the teacher is
    assert found["distill"] == ("student_sft", "teacher_sft")
    found, _ = stages(own=True)
    assert found["student_sft"] == ("teacher_sft",)  # made of the tuned teacher's layers
    found, _ = stages("seqkd")
    assert found["teacher_answers"] == ("teacher_sft",)
    assert found["distill"] == ("teacher_sft", "teacher_answers")
    assert "student_sft" not in found
    assert list(stages("sft")[0]) == ["teacher_sft", "student_sft", "evaluate", "report"]


def test_a_stage_is_skipped_where_its_model_is_given():
    found, skipped = stages(teacher="/t", student="/s")
    assert list(found) == ["distill", "evaluate", "report"] and found["distill"] == ()
    assert skipped == {
        "teacher_sft": "config.teacher.fine_tuned=/t",
        "student_sft": "config.student.fine_tuned=/s",
    }


def test_settings_in_full_are_those_that_run():
    found = {}
    for name in ("minillm", "gkd", "minillm_no_mixing"):
        config = get_config()
        config.method = name
        found[name] = recipe.in_full(registry.resolved(config))["distill"]
    assert found["gkd"]["on_policy"] == 0.5
    assert (found["minillm"]["alpha"], found["minillm_no_mixing"]["alpha"]) == (0.2, 0)
    # Of the estimator's preset, where the config is silent, and of the config, where it is not.
    assert (found["minillm"]["length_norm"], found["minillm"]["gamma"]) == (True, 1.0)
