"""What every command does before it starts: programs are kept, where there is a place for them."""

import runpy
import sys

import jax
import pytest

from minillm_jax import program


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "home"))
    found = {}
    monkeypatch.setattr(
        type(jax.config), "update", lambda _, name, value: found.update({name: value})
    )
    return found


def test_programs_are_kept_within_a_size(kept, tmp_path):
    program.keep_programs()
    assert kept["jax_compilation_cache_dir"] == str(tmp_path / "home" / "compiled")
    assert (tmp_path / "home" / "compiled").is_dir()
    assert kept["jax_compilation_cache_max_size"] == program.CACHE_BYTES > 0


def test_nothing_is_kept_where_nothing_can_be_written(kept, tmp_path):
    (tmp_path / "home").write_text("a file in the way")
    program.keep_programs()
    assert not kept


def test_a_folder_that_jax_has_already_stays(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "mine")
    program.keep_programs()
    assert not kept and not (tmp_path / "home").exists()


@pytest.mark.parametrize(("command", "keeps"), [("plan", False), ("export", True)])
def test_programs_for_other_machines_are_not_kept(command, keeps, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command, "--no_such_flag"])
    monkeypatch.delitem(sys.modules, f"minillm_jax.{command}", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module(f"minillm_jax.{command}", run_name="__main__")
    assert bool(kept) == keeps
