"""What the builder reads of the weights, and when."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_run import one_device, toy_config

from minillm_jax.build import Builder
from minillm_jax.models import hf, weights


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
