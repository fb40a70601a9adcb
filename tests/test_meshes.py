"""SFT and MiniLLM on eight devices, whatever the mesh: the tokens and losses of one device."""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from minillm_jax.axes import AXIS_RULES, TENSOR_RULES
from minillm_jax.methods import minillm, sft
from minillm_jax.methods.accumulate import lengths
from minillm_jax.models import (
    DecoderConfig,
    abstract_params,
    heads_together,
    init_cache,
    logical_axes,
)
from minillm_jax.objectives.policy import PRESETS
from minillm_jax.rollout import Mixing
from minillm_jax.sharding import batch_sharding, make_mesh, place, tree_shardings
from minillm_jax.train_state import abstract_state, init_state, state_shardings
from minillm_jax.types import Sequences

VOCAB, P, N, ROWS = 61, 5, 12, 8
WINDOW = 10
GPT2 = DecoderConfig(
    vocab_size=64, layers=2, width=32, heads=8, mlp_width=64, max_positions=20, norm="layer",
    activation="gelu_new", positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
GPTJ = DecoderConfig(
    vocab_size=72, layers=2, width=32, heads=8, mlp_width=64, max_positions=20, norm="layer",
    activation="gelu_new", positions="rope", rope_dim=2, rope_interleaved=True, mlp_bias=True,
    parallel_residual=True, tied_head=False, head_bias=True,
)  # fmt: skip
# Grouped heads, fewer than the tensor axis of 1x1x8; a single one is fewer than that of three.
LLAMA = DecoderConfig(
    vocab_size=61, layers=2, width=32, heads=8, kv_heads=2, mlp_width=48, max_positions=20,
    gated=True, tied_head=False,
)  # fmt: skip
MULTI_QUERY = dataclasses.replace(LLAMA, kv_heads=1)
FAMILIES = {"gpt2": GPT2, "gptj": GPTJ, "llama": LLAMA, "multi-query": MULTI_QUERY}
# Of its own, for a program that is traced once is kept.
MODELS = FAMILIES | {"as on a TPU": dataclasses.replace(GPT2, max_positions=21)}
MESHES = ((8, 1, 1), (2, 2, 2), (2, 4, 1), (1, 4, 2), (1, 1, 8))


def _params(config, seed):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, abstract_params(config))


def _batch():
    rng = np.random.default_rng(3)
    length, answer = rng.integers(1, P + 1, ROWS), rng.integers(1, N + 1, ROWS)
    return Sequences(
        prompt=rng.integers(3, VOCAB, (ROWS, P), np.int32),
        prompt_mask=np.arange(P)[None] >= P - length[:, None],
        response=rng.integers(3, VOCAB, (ROWS, N), np.int32),
        response_mask=np.arange(N)[None] < answer[:, None],
    )


def _shardings(config, mesh, rules=AXIS_RULES):
    return tree_shardings(
        abstract_params(config), logical_axes(config), mesh, rules, units=config.axis_units
    )


def _methods(family, mesh, windows=()):
    """SFT, MiniLLM, the state of the student without its arrays, and the teacher's config."""
    student = MODELS[family]
    teacher = FAMILIES["gpt2"] if family == "gptj" else student
    # Rounding noise of a gradient that is 0 must not become a step.
    optimizer = optax.adam(1e-3, eps=1e-3)
    abstract = abstract_state(abstract_params(student), _shardings(student, mesh), optimizer, mesh)
    options = {
        "shardings": state_shardings(abstract),
        "micro_batches": min(2, ROWS // mesh.shape["data"]),
        "windows": windows,
    }
    mixing = Mixing(slots=N, alpha=0.4, chunk=3, eos_id=2, pad_id=0, vocab=VOCAB)
    both = optimizer, lambda step: 1e-3
    supervised = sft.method(student, *both, vocab=VOCAB, **options)
    distilled = minillm.method(
        student, teacher, *both, policy=PRESETS["corrected"], mixing=mixing, **options
    )
    return supervised, distilled, abstract, optimizer, teacher


@functools.cache
def _run(family, *sizes, windows=(), rules=AXIS_RULES):
    """Two updates of SFT, a collection, two of MiniLLM: metrics, rollout and state."""
    mesh = make_mesh(*sizes) if sizes else make_mesh(devices=jax.devices()[:1])
    supervised, distilled, abstract, optimizer, teacher = _methods(family, mesh, windows)
    student, found = MODELS[family], {}
    with jax.set_mesh(mesh):
        batch = place(_batch(), batch_sharding(mesh))
        frozen = place(_params(teacher, 1), _shardings(teacher, mesh, rules))
        params = place(_params(student, 2), _shardings(student, mesh))
        state = init_state(params, optimizer, abstract)
        for step in range(2):
            state, found[f"sft {step}"] = supervised.update(state, None, batch)
        assert distilled.collect
        rollout = distilled.collect(state.params, frozen, batch, jax.random.key(5))
        for step in range(2):
            state, found[f"minillm {step}"] = distilled.update(state, frozen, rollout)
    return found, rollout, state


def _same(found, expected):
    """Assert equal tokens, and all numbers to 1e-5, of what `_run` returned."""
    (found, written, _), (expected, drawn, _) = jax.device_get((found, expected))
    assert drawn.response_mask.sum(1).min() < N  # some end early
    np.testing.assert_array_equal(written.response, drawn.response)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), written, drawn)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mesh_changes_neither_tokens_nor_losses(family, mesh, capfd):
    _same(_run(family, *mesh), _run(family))
    assert_no_resharding(capfd.readouterr().err)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_heads_that_lie_side_by_side_change_neither(mesh, monkeypatch, capfd):
    expected = _run("as on a TPU")
    monkeypatch.setattr("minillm_jax.models.cache.platform", lambda: "tpu")
    with jax.set_mesh(make_mesh(*mesh)):
        assert heads_together(MODELS["as on a TPU"]) == 4  # of the four on each device
    _same(_run("as on a TPU", *mesh), expected)
    assert_no_resharding(capfd.readouterr().err)


def assert_no_resharding(said):
    """XLA warns where it can only get from one sharding to another by copying all of an array."""
    assert "rematerialization" not in said and "spmd" not in said.lower(), said


def test_a_teacher_may_lie_whole_along_fsdp():
    _same(_run("llama", 2, 2, 2, rules=TENSOR_RULES), _run("llama"))


@pytest.mark.parametrize("mesh", [(1, 4, 2), (4, 1, 2)], ids=str)
def test_windows_on_a_mesh_change_no_loss(mesh):
    expected, _, _ = jax.device_get(_run("llama"))
    longest = lengths(_batch()).reshape(ROWS // 2, 2).max(0)  # of the micro-batches of SFT
    assert longest.min() <= WINDOW < longest.max()
    found, _, _ = jax.device_get(_run("llama", *mesh, windows=(WINDOW, P + N)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, expected)


def test_what_a_run_makes_stays_split():
    _, rollout, state = _run("llama", 2, 2, 2)
    for name, leaf in vars(rollout).items():
        assert leaf.sharding.spec[0] == ("data", "fsdp"), name
    up = state.params["layers"]["mlp"]["up"]["kernel"]
    moments = optax.tree.get(state.opt_state, "mu")["layers"]["mlp"]["up"]["kernel"]
    assert up.sharding.spec == moments.sharding.spec == Spec(None, "fsdp", "tensor")


@pytest.mark.parametrize(("sizes", "heads"), [((2, 2, 2), "tensor"), ((1, 2, 4), None)])
def test_the_cache_is_split_over_rows_and_where_they_divide_over_heads(sizes, heads):
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: init_cache(LLAMA, ROWS, N))()
    wanted = NamedSharding(mesh, Spec(("data", "fsdp"), heads))
    assert all(x.sharding.is_equivalent_to(wanted, 4) for x in (*cache.keys, *cache.values))


def _collectives(compiled):
    """(operation, shape, scope) of every collective in the text of a program."""
    pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)[-(]"
    for line in compiled.as_text().splitlines():
        if found := re.search(pattern, line):
            scope = re.search('op_name="([^"]*)"', line)
            yield found[2], found[1], scope[1] if scope else ""


@pytest.mark.optimized
@pytest.mark.parametrize("windows", [(), (WINDOW, P + N)], ids=["slots", "windows"])
def test_collectives_of_the_compiled_programs(windows, capfd):
    """Kernels are gathered once per collection, and in an update layer by layer; logits never."""
    mesh = make_mesh(2, 2, 2)
    _, distilled, abstract, _, teacher = _methods("llama", mesh, windows)

    def described(tree, shardings):
        shardings = jax.tree.broadcast(shardings, tree)
        on = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(on, tree, shardings)

    rows = batch_sharding(mesh)
    frozen = described(abstract_params(teacher), _shardings(teacher, mesh))
    asked = abstract.params, frozen, described(_batch(), rows), jax.random.key(0)
    assert distilled.collect
    with jax.set_mesh(mesh):
        collect = jax.jit(distilled.collect).lower(*asked).compile()
        rollout = described(jax.eval_shape(distilled.collect, *asked), rows)
        update = distilled.update.lower(abstract, frozen, rollout).compile()

    found = list(_collectives(collect))
    gathers = [scope for name, _, scope in found if name == "all-gather"]
    assert gathers and not any("while" in scope for scope in gathers)
    reduced = {scope.rpartition("/Block/")[2] for name, _, scope in found if name == "all-reduce"}
    assert {"attention/attn/o/dot_general", "mlp/down/dot_general"} <= reduced

    found = list(_collectives(update))
    gathers = [(shape, scope) for name, shape, scope in found if name == "all-gather"]
    in_layers = collections.Counter(
        shape.partition("{")[0] for shape, scope in gathers if "/layers/while/" in scope
    )
    # Each kernel in the forward pass and in the backward pass, whole but for its tensor half; in
    # the pass of every window.
    q, kv, o, up, down = "32,16", "32,4", "16,32", "32,24", "24,32"
    times = {q: 2, kv: 4, o: 2, up: 4, down: 2}
    passes = max(1, len(windows))
    assert in_layers == {f"f32[{shape}]": passes * count for shape, count in times.items()}
    assert not any("/vocabulary/" in scope or "jvp(vocabulary)" in scope for _, scope in gathers)
    assert any(name == "all-reduce" and "transpose(jvp(Decoder))" in at for name, _, at in found)
    assert not {"all-to-all", "collective-permute"} & {name for name, _, _ in found}
    assert_no_resharding(capfd.readouterr().err)
