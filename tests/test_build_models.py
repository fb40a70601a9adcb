"""What the builder reads of the weights, and when."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec
from toy_run import one_device, toy_config

from minillm_jax import assemble
from minillm_jax.build import Builder
from minillm_jax.geometry import geometry
from minillm_jax.models import hf, weights
from minillm_jax.reporting.writers import MetricsWriter
from minillm_jax.rollout import score
from minillm_jax.stages import Run
from minillm_jax.stages.measures import answer_loss
from minillm_jax.types import InputError


@pytest.fixture
def builder(tmp_path, monkeypatch):
    one_device(monkeypatch)
    return Builder(toy_config(tmp_path))


@pytest.fixture
def opened(monkeypatch):
    """The names of the tensors that were read, in order."""
    names, read = [], weights._read
    monkeypatch.setattr(weights, "_read", lambda name, t: names.append(name) or read(name, t))
    return names


def assert_equal_trees(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_configs_and_checks_read_no_weight(builder, opened):
    builder.preflight(("distill",))
    assert (builder.teacher_checkpoint.config.layers, builder.student_checkpoint.config.layers) == (
        2,
        1,
    )
    assert not opened


def test_the_teacher_is_read_once_and_its_student_not_at_all(builder, opened):
    teacher = builder.teacher
    once = len(opened)
    assert once == len(set(opened)) == len(builder.teacher_checkpoint.tensors)
    student = builder.student()
    assert builder.teacher is teacher and len(opened) == once
    wanted = hf.load(builder.config.teacher.path, keep=[0])
    assert student.config == wanted.config and student.hf_config == wanted.hf_config
    assert_equal_trees(student.params, wanted.params)
    jax.tree.map(lambda leaf: leaf.delete(), student.params)  # as training does, which donates them
    assert_equal_trees(builder.student().params, wanted.params)
    assert_equal_trees(teacher.params, hf.load(builder.config.teacher.path).params)


@pytest.mark.parametrize("fsdp", [True, False])
def test_the_teacher_may_be_split_over_the_tensor_axis_alone(tmp_path, monkeypatch, fsdp):
    one_device(monkeypatch, 4)
    config = toy_config(tmp_path)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 2, 2
    config.teacher.fsdp = fsdp
    builder = Builder(config)
    kernels = [
        model.params["layers"]["mlp"]["up"]["kernel"]
        for model in (builder.teacher, builder.student())
    ]
    specs = [kernel.sharding.spec for kernel in kernels]
    assert specs == [Spec(None, "fsdp" if fsdp else None, "tensor"), Spec(None, "fsdp", "tensor")]


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_read(
    tmp_path, monkeypatch, opened
):
    one_device(monkeypatch, 8)
    config = toy_config(tmp_path)
    config.mesh.data, config.mesh.tensor = 1, 8  # and four heads
    with pytest.raises(InputError, match=r"'heads' of .* has 4 .*set --config.mesh.tensor=4"):
        Builder(config).preflight(("distill",))
    assert not opened


def test_given_answers_may_be_longer_than_sampled_ones(tmp_path, monkeypatch):
    one_device(monkeypatch)
    config = toy_config(tmp_path)
    config.data.max_prompt, config.data.max_response, config.data.max_answer = 12, 4, 10
    answer, file = "red cat " * 6, tmp_path / "train.jsonl"
    lines = [json.loads(line) | {"output": answer} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    builder = Builder(config)
    assert "answer_slots" not in geometry(builder, ())  # the teacher writes them all
    data = builder.data
    gold, asked = data.gold("train"), data.prompts("train")
    assert {len(e.response) for e in gold} == {min(10, 16 - len(e.prompt)) for e in gold}
    assert data.batches(gold, 2)[0].response.shape == (2, 10)
    assert data.batches(asked, 2)[0].response.shape == (2, 4)
    cut = [dataclasses.replace(e, response=e.response[:4]) for e in gold]
    assert data.ordered(cut)[0][0].response.shape == (8, 4)
    config.answers.source = "data"
    assert geometry(Builder(config), ())["answer_slots"] == 10


def test_models_read_no_more_of_a_row_than_prompt_and_answer_have(tmp_path, monkeypatch):
    """However long an answer may be: they are cut together."""
    one_device(monkeypatch)
    config = toy_config(tmp_path)
    config.answers.source = "data"
    config.data.max_prompt, config.data.max_response, config.data.max_answer = 12, 4, 120
    for split in ("train", "validation", "test"):
        file = tmp_path / f"{split}.jsonl"
        lines = [
            json.loads(line) | {"output": "cat " * 20} for line in file.read_text().splitlines()
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.distill.kd_ratio, config.distill.divergence = 0.5, "cross_entropy"
    config.distill.on_policy, config.distill.replay = 0.0, 0
    builder = Builder(config)
    builder.preflight(())  # 12 + 120 are more than the models have positions
    batch = builder.data.batches(builder.data.gold("train"), 8)[0]
    assert batch.response.shape == (8, 16)
    widths, read = [], score.hidden_states

    def recorded(config, params, tokens, mask, **options):
        widths.append(tokens.shape[1])
        return read(config, params, tokens, mask, **options)

    monkeypatch.setattr(score, "hidden_states", recorded)
    state = builder.abstract_state(builder.student_checkpoint.config, "sft")
    jax.eval_shape(assemble.supervised(builder).update, state, None, batch)
    jax.eval_shape(assemble.by_divergence(builder).update, state, builder.teacher.params, batch)
    with MetricsWriter(tmp_path) as metrics:
        run = Run(builder, tmp_path, metrics)
        answer_loss(run, builder.data.gold("validation"), builder.student())
    assert len(widths) >= 4 and set(widths) == {16}


def test_the_temperature_is_the_teachers_alone(builder):
    builder.config.teacher.temperature = 0.5
    plain = builder.teacher_checkpoint.config
    tempered = dataclasses.replace(plain, logit_scale=2.0)
    assert builder.teacher.config == tempered and assemble._models(builder)[1] == tempered
    assert_equal_trees(builder.teacher.params, hf.load(builder.config.teacher.path).params)
    # Its own fine-tuning is not at that temperature, nor is a student made of its layers.
    assert builder.untuned_teacher().config == plain
    assert builder.student().config == assemble._models(builder)[0]
    assert builder.student().config == dataclasses.replace(plain, layers=1)


def test_without_the_teacher_only_the_kept_layers_are_read(builder, opened):
    student = builder.student()
    assert opened and not [name for name in opened if ".layers.1." in name]
    assert_equal_trees(student.params, hf.load(builder.config.teacher.path, keep=[0]).params)


def test_a_student_of_its_own_is_read_from_its_own_files(builder, tmp_path, opened):
    checkpoint = hf.load(builder.config.teacher.path)
    params = jax.tree.map(lambda leaf: leaf + 1, checkpoint.params)
    hf.save(tmp_path / "other", checkpoint.config, params, checkpoint.hf_config)
    config = builder.config.copy_and_resolve_references()
    config.student.path = str(tmp_path / "other")
    both = Builder(config)
    assert both.teacher.parameters > both.student().parameters
    wanted = dataclasses.replace(checkpoint, params=params)
    assert_equal_trees(both.student().params, hf.keep_layers(wanted, [0]).params)
