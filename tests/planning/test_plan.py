"""Plans of tiny pairs: what fits, what does not, what is refused, and what the command prints."""

import dataclasses
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from configs.opt_13b_to_opt import get_config
from minillm_jax import plan as command_line
from minillm_jax import program
from minillm_jax.models import fetch
from minillm_jax.planning import estimate, programs, search, table, targets, verdict
from minillm_jax.planning.chips import GIB, GPUS, TPUS
from minillm_jax.planning.shapes import Shapes
from minillm_jax.planning.targets import Target, target
from minillm_jax.types import InputError
from tests.toy_run import HF_CONFIG

needs_compiler = pytest.mark.skipif(
    find_spec("libtpu") is None, reason=f"no TPU compiler here: {targets.PIP}"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*(load_module|exec_module):DeprecationWarning")


def pair(folder, layers=2, **mesh):
    """A pair of folders that have a config.json and no weights."""
    config = get_config("tiny")
    for who, width in (("teacher", 32), ("student", 16)):
        path = folder / f"{who}-{layers}"
        path.mkdir(exist_ok=True)
        small = {"hidden_size": width, "num_hidden_layers": layers}
        (path / "config.json").write_text(json.dumps({**HF_CONFIG, **small}))
        config[who].path = str(path)
    config.data.max_prompt = config.data.max_response = 8
    config.data.max_answer = 0
    config.corpus.files = ()
    config.distill.batch_size = config.distill.rollouts = 8
    config.distill.collect_batch = 4
    for name, size in mesh.items():
        config.mesh[name] = size
    return config


def only(plan, name):
    return next(f for f in plan.figures if f.name == name)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan of a tiny pair for four GPUs."""
    folder = tmp_path_factory.mktemp("pair")
    config = pair(folder, data=2, fsdp=2)
    return config, verdict.plan(config, folder, target("h100:4"))


def test_every_program_of_the_experiment_is_in_the_plan(planned):
    _, plan = planned
    names = [f.name for f in plan.figures]
    assert names == ["teacher_sft update", "student_sft update", "collect", "distill update"]
    assert plan.fits and plan.chip_hours > 0 and plan.mesh == {"data": 2, "fsdp": 2, "tensor": 1}


def test_bytes_are_those_of_one_device(planned):
    config, plan = planned
    build = Shapes(config, Path("."), target("h100:4").devices)
    whole = sum(x.size for x in jax.tree.leaves(build.abstract_state(
        build.student_checkpoint.config, "distill").params)) * 4  # fmt: skip
    update, collect = only(plan, "distill update"), only(plan, "collect")
    assert whole / 2 <= update.parts["parameters"] < 0.55 * whole  # norms are whole everywhere
    moments = update.parts["optimizer"]
    assert moments == pytest.approx(2 * update.parts["parameters"], rel=0.01)
    # Two caches [2 rows, 2 heads, slots, head] of two layers in float32, keys and values; the
    # teacher may read a whole response of 8 tokens at once.
    student, teacher = 16 * 4, (16 + 8) * 8
    rows = config.distill.collect_batch // 4
    assert collect.cache == rows * 2 * 2 * 2 * 4 * (student + teacher)
    assert collect.held > moments  # and the responses that are written already


def test_the_operations_are_those_of_the_method(planned):
    """Nothing is computed twice without remat, and little beside the products of the method."""
    _, plan = planned
    update = only(plan, "student_sft update")
    assert 1.0 <= update.flops / update.needed < 1.6


def test_seconds_are_a_roofline(planned):
    _, plan = planned
    for f in plan.figures:
        chip = plan.target.chip
        assert f.compute_seconds >= f.flops / chip.flops
        assert f.best <= f.seconds == f.times * (f.compute_seconds + f.network_seconds)
        assert 0 < f.utilisation(plan.target) < 1
    rounds = math.ceil(plan.updates / plan.updates_per_rollout)
    a_round, an_update = only(plan, "collect"), only(plan, "distill update")
    assert a_round.times == 2
    total = rounds * a_round.seconds + plan.updates * an_update.seconds
    assert plan.seconds == pytest.approx(total)
    assert plan.chip_hours == pytest.approx(total * 4 / 3600)


def test_few_layers_extrapolated_are_all_layers_compiled(tmp_path):
    here = target("h100:2")
    build = Shapes(pair(tmp_path, layers=6, data=1, fsdp=2), tmp_path, here.devices)
    collect = next(p for p in programs.programs(build) if p.name == "collect")
    guessed = estimate.measure(collect, here)
    counted = estimate.measure(dataclasses.replace(collect, layers=None), here)
    assert guessed.extrapolated and not counted.extrapolated
    assert guessed.flops == pytest.approx(counted.flops, rel=1e-3)
    assert guessed.cache == counted.cache > 0
    assert guessed.peak == pytest.approx(counted.peak, rel=0.05)
    assert guessed.network_seconds == pytest.approx(counted.network_seconds, rel=0.05)
    assert guessed.compute_seconds == pytest.approx(counted.compute_seconds, rel=0.05)


def test_longer_answers_are_cut_to_what_prompts_leave(tmp_path):
    config = pair(tmp_path, data=1, fsdp=2)
    needed = []
    for config.data.max_answer in (0, 12, 500):  # prompt and answer have 16 slots together
        build = Shapes(config, tmp_path, target("h100:2").devices)
        needed.append(next(p for p in programs.programs(build) if "student_sft" in p.name).needed)
    # Only the head reads more answers, 16 at most instead of 8: less than twice the whole.
    assert needed[0] < needed[1] < needed[2] < 2 * needed[0]


@pytest.mark.parametrize(
    ("alpha", "chunk", "expected"),
    [(0.0, 6, 6.0), (1e-17, 6, 6.0), (1.0, 6, 1.0), (0.5, 2, 1.5), (0.2, 6, (1 - 0.8**6) / 0.2)],
)
def test_the_turns_of_the_teacher(alpha, chunk, expected):
    assert programs.mean_run(alpha, chunk) == pytest.approx(expected)


def test_a_model_that_is_too_large_is_told_so_with_a_cure(tmp_path):
    """GPT-J with its moments on one device, from its published shape."""
    config = pair(tmp_path)
    config.teacher.path = config.student.path = "hf:EleutherAI/gpt-j-6b"
    found = verdict.plan(config, tmp_path, target("a100:1"), only=("distill update",))
    (update,) = found.figures
    assert not found.fits and math.isnan(update.flops)  # known without a compilation
    assert update.peak > 6.05e9 * (4 + 8 + 4)
    (said,) = verdict.cures(config, found)
    least = math.ceil(update.peak / found.target.chip.memory)
    assert f"take at least {least} such chips" in said and "distill update needs" in said
    assert verdict.cures(
        config, dataclasses.replace(found, mesh={"data": 1, "fsdp": 1, "tensor": 1})
    ) == [said]
    # On several it says whether they suffice, from what the split arguments really take.
    for memory, enough in ((50 * GIB, True), (30 * GIB, False)):
        config = pair(tmp_path, data=-1)
        config.teacher.path = config.student.path = "hf:EleutherAI/gpt-j-6b"
        chip = dataclasses.replace(GPUS["a100"], memory=memory)
        here, only = dataclasses.replace(target("a100:2"), chip=chip), ("distill update",)
        (said,) = verdict.cures(config, verdict.plan(config, tmp_path, here, only=only))
        split = Shapes(
            verdict.changed(config, {"mesh": {"data": 1, "fsdp": -1}}), tmp_path, here.devices
        )
        program = next(one for one in programs.programs(split) if one.name == only[0])
        words = r"split the models: --config.mesh.data=1 .* about ([\d.]+) GiB of parameters"
        number = float(re.search(words, said)[1])  # type: ignore[index]
        assert number * GIB == pytest.approx(sum(program.parts.values()), rel=0.02)
        more = re.search(r"; and take at least (\d+) such chips", said)
        least = math.ceil(sum(program.parts.values()) * 2 / memory)
        assert more is None if enough else more and int(more[1]) == least


@pytest.mark.parametrize(
    ("name", "changes", "cure"),
    [
        ("distill update", {"remat": "dots"}, "--config.distill.remat=full"),
        ("distill update", {"remat": "full"}, "--config.distill.micro_batch=2"),
        ("collect", {"collect_batch": 8}, "--config.distill.collect_batch=4"),
    ],
)
def test_what_would_help_is_a_flag(planned, tmp_path, name, changes, cure):
    config, plan = planned
    config = verdict.changed(config, {"distill": {"micro_batch": 4, "batch_size": 16} | changes})
    large = dataclasses.replace(only(plan, name), fits=False, peak=100 * GIB)
    found = dataclasses.replace(plan, figures=(large,))
    (said,) = verdict.cures(config, found)
    assert said.startswith(f"{name} needs 100.0 GiB") and cure in said


def test_kernels_that_a_collection_gathers_are_to_be_shared(planned, tmp_path):
    """With `tensor` and not with `fsdp`, over which every device has them whole in the loops."""
    config, plan = planned  # data=2, fsdp=2
    found = only(plan, "collect")
    kernels = 2 * (found.parts["teacher"] + found.parts["parameters"])
    fixed = sum(found.parts.values()) + found.held

    def said(peak, memory):
        chip = dataclasses.replace(plan.target.chip, memory=memory)
        large = dataclasses.replace(found, fits=False, peak=peak)
        here = dataclasses.replace(plan.target, chip=chip)
        cures = verdict.cures(config, dataclasses.replace(plan, figures=(large,), target=here))
        return cures[0]

    peak = fixed + kernels + 1000
    assert "try --config.mesh.fsdp=1 --config.mesh.tensor=2, then" in said(peak, peak - kernels / 2)
    assert "mesh.fsdp" not in said(peak, peak - kernels / 2 - 1)  # half of them is too little

    # A search does not lower the rows where no number of them would help, but goes to another mesh.
    def after(memory):
        chip = dataclasses.replace(plan.target.chip, memory=memory)
        large = dataclasses.replace(found, fits=False, peak=peak)
        here = dataclasses.replace(plan.target, chip=chip)
        unfit = dataclasses.replace(plan, figures=(large,), target=here)
        return search.squeezed(config, {"mesh": plan.mesh}, unfit)

    assert after(fixed + kernels - 1) is None
    assert after(fixed + kernels + 1) is None  # four rows, and as many devices to split them
    config = verdict.changed(config, {"distill": {"collect_batch": 8}})
    assert after(fixed + kernels - 1) is None
    assert after(fixed + kernels + 1) == {"mesh": plan.mesh, "distill": {"collect_batch": 4}}


def test_a_mesh_that_does_not_multiply_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data=3, fsdp=1.*does not fit the 4 devices.*set --conf"):
        verdict.builder(pair(tmp_path, data=3), tmp_path, target("h100:4"))


def test_a_mesh_that_cuts_through_a_head_is_refused(tmp_path):
    config = pair(tmp_path, data=1, fsdp=1, tensor=8)  # 4 heads
    with pytest.raises(
        InputError, match="'heads' of .* has 4 .*tensor=8: set --config.mesh.tensor=4"
    ):
        verdict.builder(config, tmp_path, target("h100:8"))


def test_a_mesh_that_is_left_to_the_devices_gets_one_that_divides(tmp_path):
    config = pair(tmp_path, data=1, fsdp=-1)
    config.teacher_sft.batch_size = 4  # rows do not split over 8
    build, notes = verdict.builder(config, tmp_path, target("h100:8"))
    assert dict(build.mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert "--config.mesh.fsdp=4 --config.mesh.tensor=2" in notes[0]
    assert "batch_size=4 does not split over 8" in notes[0]
    config.mesh.fsdp = 8  # asked for
    with pytest.raises(InputError, match="batch_size=4 does not split over 8"):
        verdict.builder(config, tmp_path, target("h100:8"))


def test_a_search_ranks_what_fits_first(tmp_path, capsys):
    config = pair(tmp_path)
    small = dataclasses.replace(GPUS["h100"], memory=5e5)
    here = dataclasses.replace(target("h100:2"), chip=small)
    ranked = search.search(config, tmp_path, here, 4)
    assert len(ranked) == 4
    assert len({tuple(changes["mesh"].items()) for changes, _ in ranked}) >= 2
    assert {plan.fits for _, plan in ranked} == {True, False}
    fitting = [plan.seconds for _, plan in ranked if plan.fits]
    assert fitting == sorted(fitting)
    assert [plan.fits for _, plan in ranked] == sorted(
        (plan.fits for _, plan in ranked), reverse=True
    )
    assert "1 of up to 4: --config.mesh.data=" in capsys.readouterr().err


def made_up(name, peak, parts, memory):
    """Figures of a program of so many bytes, those of its arguments and all."""
    return estimate.Figures(
        name, {"parameters": parts}, held=0.0, cache=0.0, work_space=peak - parts, flops=1.0,
        collectives={}, compute_seconds=1.0, network_seconds=0.0, needed=1.0, times=1,
        fits=peak <= memory, peak=peak, extrapolated=False, assumed=(),
    )  # fmt: skip


def test_a_search_gives_every_stage_what_it_needs(tmp_path, monkeypatch):
    """Also the teacher's SFT, and none of the others anything; nothing is compiled twice."""
    config, here, seen = pair(tmp_path), target("h100:2"), []
    memory = here.chip.memory
    config.teacher_sft.steps = 2
    config.teacher_sft.batch_size = 8

    def measured(program, _):
        c = config_of(program)
        rows = current.get("distill", {}).get("collect_batch")
        own = rows if program.name == "collect" else tuple(c.items())
        seen.append((program.name, tuple(current["mesh"].items()), own))
        # Rows at once, and remat, decide what the teacher's SFT needs; only four of "full" do.
        need = 0.1
        if program.name == "teacher_sft update":
            need = {"dots": 1.0, "full": 0.18}[c["remat"]] * (c["micro_batch"] + 1)
        return made_up(program.name, need * memory, 0.05 * memory, memory)

    monkeypatch.setattr(search, "measure", measured)
    current = {}

    def config_of(program):
        return current.get(search.SECTION_OF.get(program.name), {})

    inner = search.changed

    def changed(config, changes):
        current.clear()
        current.update(changes)
        return inner(config, changes)

    monkeypatch.setattr(search, "changed", changed)
    ranked = search.search(config, tmp_path, here, 9)
    fitting = [changes for changes, plan in ranked if plan.fits]
    assert len({tuple(changes["mesh"].items()) for changes in fitting}) == 3  # every mesh
    assert len(ranked) > 3 and len(seen) == len(set(seen))
    assert fitting[0]["teacher_sft"] == {"micro_batch": 4, "remat": "full"}
    assert fitting[0]["distill"] == fitting[0]["sft"] == {"micro_batch": 4, "remat": "dots"}
    names = [f.name for f in ranked[0][1].figures]
    assert names == ["teacher_sft update", "student_sft update", "collect", "distill update"]


def test_links_of_a_slice_close_to_rings():
    """A collective of all devices uses every axis; an axis of a ring has two directions."""
    chip = TPUS["v5p"]
    devices = tuple(range(64))
    cube = Target("v5p:4x4x4", chip, devices, (4, 4, 4))
    assert (cube.link([range(64)]), cube.link([range(16)])) == (6 * chip.link, 2 * chip.link)
    assert cube.link([(0, 1), (1, 2)], ring=False) == chip.link
    small = Target("v5p:2x2x1", chip, devices[:4], (2, 2, 1))
    assert (small.link([range(4)]), small.link([range(2)])) == (2 * chip.link, chip.link)


def test_gpus_of_several_nodes_talk_over_the_network():
    """However few they are: it is which, and not how many."""
    chip = GPUS["h100"]
    nodes = Target("h100:16", chip, tuple(range(16)))
    assert chip.network == nodes.link([range(16)]) == nodes.link([(0, 8), (1, 9)])
    assert chip.network == nodes.link([(0, 1), (7, 8)], ring=False)  # the slowest decides
    assert chip.link == nodes.link([range(8)]) == nodes.link([(0, 1), (8, 15)]) > chip.network


@pytest.mark.parametrize(
    "name", ["v9:2x2", "h100", "h100:0", "h100:²", "v5p", "v5p:4xx4", "v5p:²x1", "tpu", ""]
)
def test_an_unknown_topology_is_refused_with_those_there_are(name):
    with pytest.raises(InputError, match=r"no topology .*v5p:\{.*4x4x4.*h100:N, .*cpu"):
        target(name)


def test_a_missing_compiler_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="the TPU compiler is missing: pip install"):
        target("v5e:2x2")


@needs_compiler
def test_a_slice_that_its_compiler_does_not_know_is_refused():
    with pytest.raises(InputError, match="does not know v5p:3x3x3 .*choose from v4"):
        target("v5p:3x3x3")


@needs_compiler
@pytest.mark.parametrize(
    "name", [f"{name}:{shape}" for name in TPUS for shape in TPUS[name].shapes]
)
def test_every_slice_that_is_named_is_one(name):
    sides = name.partition(":")[2].split("x")
    assert len(target(name).devices) == math.prod(map(int, sides))  # one per chip


@needs_compiler
def test_the_plan_of_a_tiny_pair_on_a_tpu(tmp_path):
    config = pair(tmp_path, data=2, fsdp=2)
    for who in ("teacher", "student"):  # a query for each head, so that they lie side by side
        path = Path(config[who].path, "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_key_value_heads": 4}))
    found = verdict.plan(config, tmp_path, target("v5e:2x2"), only=("collect", "distill update"))
    collect, update = found.figures
    assert found.fits and 0 < update.peak < 0.1 * GIB
    assert update.flops >= update.needed > 0 and update.collectives
    # Keys and values of two layers, in float32: a row on each device, four heads of 4 and of 8.
    student, teacher = 16 * 4 * 4, (16 + 8) * 4 * 8
    assert collect.cache == 2 * 2 * 4 * (student + teacher)
    assert len(collect.assumed) == 3


def test_a_folder_needs_no_weights_and_an_unknown_model_is_one_line(tmp_path, monkeypatch):
    pair(tmp_path)
    assert fetch.config(str(tmp_path / "teacher-2")) == {
        **HF_CONFIG, "hidden_size": 32, "num_hidden_layers": 2
    }  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    published = fetch.config("facebook/opt-13b")
    assert isinstance(published, dict) and published["ffn_dim"] == 20480
    with pytest.raises(InputError, match="out of reach.*config.json alone will do") as error:
        fetch.config("no/such-model")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="is not here yet"):
        fetch.config("pip:no-such-model==1.0")


def test_json_has_what_the_table_has(planned, tmp_path, capsys):
    config, plan = planned
    written = table.as_json(plan, ["a cure"])
    assert json.loads(json.dumps(written))["programs"][3]["name"] == "distill update"
    assert written["programs"][2]["bytes"]["cache"] == only(plan, "collect").cache
    assert {label for label, _ in table.rows(plan)} >= {"optimizer, GiB", "MFU, no overlap"}
    assert table.verdict(plan, [])[0].startswith("fits: 4 updates take at least")
    unfit = dataclasses.replace(only(plan, "collect"), fits=False)
    refused = dataclasses.replace(plan, figures=(unfit,))
    assert table.verdict(refused, ["a cure"]) == ["does not fit", "a cure"]


def run(*words):
    flags = command_line.FLAGS
    flags.unparse_flags()
    for name in flags:
        flags[name].unparse()
    return program.call(command_line.main, flags, ["plan", *map(str, words)])


def test_the_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "_simulate", lambda topology: None)  # jax runs already
    file = tmp_path / "plan.json"
    words = ("--config=configs/opt_13b_to_opt.py:tiny,method=kd", "--topology=h100:4")
    assert run(*words, f"--json={file}") == 0
    out = capsys.readouterr().out
    assert "opt-1.3b-kd-tiny on h100:4 (4 x H100 80 GB)" in out and "fits:" in out
    assert json.loads(file.read_text())["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}


def test_this_machine_is_planned_for_too(tmp_path, capsys):
    file = tmp_path / "new" / "plan.json"
    words = ("--config=configs/opt_13b_to_opt.py:tiny,method=kd", "--topology=cpu")
    assert run(*words, f"--json={file}") == 0
    out = capsys.readouterr().out
    assert "on cpu (1 x this CPU," in out and "speed measured just now" in out
    found = json.loads(file.read_text())
    assert found["fits"] and found["memory_bytes"] == 0.9 * targets.host_memory()
    assert all(one["seconds"] > 0 for one in found["programs"])


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("0::/a/b\n", "a/memory.max"),  # of the group above
        ("0::/outside/of/it\n", "memory.max"),
        ("5:cpu:/a\n3:memory:/a\n", "memory/a/memory.limit_in_bytes"),
    ],
)
def test_a_container_has_the_memory_that_it_was_given(tmp_path, group, file):
    groups = tmp_path / "sys/fs/cgroup"
    (groups / "a/b").mkdir(parents=True)
    (groups / "a/b/memory.max").write_text("max\n")
    (groups / file).parent.mkdir(parents=True, exist_ok=True)
    (groups / file).write_text("123456\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group)
    assert targets.host_memory(tmp_path) == 123456
    (groups / file).write_text("max\n")
    assert targets.host_memory(tmp_path) == targets.host_memory(tmp_path / "none") > 1e8


def test_a_quick_plan_asks_for_the_least_effort_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "_simulate", lambda topology: None)
    asked, file = [], tmp_path / "plan.json"

    def measured(program, target):
        asked.append(getattr(jax.config, estimate.EFFORT))
        return estimate._too_large(program, 1e15, 1)

    monkeypatch.setattr(verdict.plan, "__kwdefaults__", {"only": (), "measured": measured})
    words = ("--config=configs/opt_13b_to_opt.py:tiny,method=kd", "--topology=h100:4")
    usual = getattr(jax.config, estimate.EFFORT)
    try:
        for quick, effort in (("--noquick", usual), ("--quick", "O0")):
            assert run(*words, f"--json={file}", quick) == 0
            assert asked[-1] == effort
            said = any("--quick" in note for note in json.loads(file.read_text())["notes"])
            assert said == (effort == "O0")
    finally:
        jax.config.update(estimate.EFFORT, usual)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no experiment given"),
        (("--config=configs/opt_13b_to_opt.py:tiny",), "no machine given: add --topology"),
        (("--config=configs/opt_13b_to_opt.py:tiny", "--topology=v9:2x2"), "no topology 'v9:2x2'"),
        (("--topology=cpu", "stray"), "'stray' is no flag"),
        (
            ("--config=configs/opt_13b_to_opt.py:tiny", "--topology=cpu", "--json=/"),
            "--json=/ cannot be written: choose another file",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(words, said, capsys):
    assert run(*words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
