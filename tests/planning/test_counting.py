"""Operations, bytes and collectives of compiled programs against counts by hand."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from minillm_jax.planning.counting import counter

pytestmark = pytest.mark.optimized
LAYERS, ROWS, WIDTH = 7, 8, 16


def compiled(function, *arguments) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def total(work, what):
    return sum(one.times * getattr(one, what) for one in work)


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


X, W = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))


def test_a_loop_counts_as_often_as_it_runs():
    program = compiled(scanned, X, W)
    once = 2 * ROWS * WIDTH * WIDTH
    assert total(counter(program.as_text()).work(), "flops") == LAYERS * once
    # What the compiler says is of one turn, which is why this module is there.
    assert program.cost_analysis()["flops"] < 2 * once


def test_the_gradient_of_a_loop_counts_both_loops():
    program = compiled(jax.grad(lambda x, w: scanned(x, w).sum(), (0, 1)), X, W)
    assert total(counter(program.as_text()).work(), "flops") == 3 * LAYERS * 2 * ROWS * WIDTH**2


def test_loops_within_loops_multiply():
    def twice(x, w):
        return jax.lax.fori_loop(0, 5, lambda i, x: scanned(x, w), x)

    program = counter(compiled(twice, X, W).as_text())
    assert total(program.work(), "flops") == 5 * LAYERS * 2 * ROWS * WIDTH**2
    assert program.unknown == []


def test_of_branches_the_dearest_counts():
    def either(x, w):
        dear = lambda x: jnp.tanh(x @ w[0] @ w[1])  # noqa: E731
        return jax.lax.switch(x.sum().astype(int), [jnp.tanh, dear, lambda x: x @ w[2]], x)

    program = compiled(either, X, W)
    assert " conditional(" in program.as_text()
    assert total(counter(program.as_text()).work(), "flops") == 2 * 2 * ROWS * WIDTH**2


def test_a_loop_that_depends_on_data_takes_what_is_assumed():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w, x)

    program = counter(compiled(until, X, W[0]).as_text())
    seen = []
    work = program.work(lambda where, depth: seen.append((where, depth)) or 2.5)
    assert total(work, "flops") == 2.5 * 2 * ROWS * WIDTH**2
    assert len(seen) == 1 and seen[0][1] == 0 and "while" in seen[0][0]
    assert len(program.unknown) == 1


def test_of_a_stack_of_weights_a_turn_reads_its_own():
    wide, deep = 256, 64
    program = compiled(scanned, jnp.ones((8, wide)), jnp.ones((deep, wide, wide)))
    read = total(counter(program.as_text()).work(), "bytes")
    whole = deep * wide * wide * 4
    assert whole <= read < 4 * whole  # and not deep times the whole


def mapped(function, n):
    mesh = Mesh(jax.devices()[:n], ("x",))
    return jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"))


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize(
    ("function", "kind", "size"),
    [
        (lambda x: jax.lax.psum(x, "x"), "all-reduce", lambda n: 1024 * 4),
        (lambda x: jax.lax.all_gather(x, "x").sum(0), "all-gather", lambda n: n * 1024 * 4),
        (
            lambda x: jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]),
            "collective-permute",
            lambda n: 1024 * 4,
        ),
    ],
)
def test_a_collective_is_its_bytes_and_its_devices(devices, function, kind, size):
    program = compiled(mapped(function, devices), jnp.ones((devices, 1024)))
    work = counter(program.as_text(), devices).work()
    found = [one for one in work if one.collective]
    assert [one.collective for one in found] == [kind]
    assert found[0].moved == size(devices)
    everyone = (tuple(range(devices)),)
    assert found[0].groups == (((0, 1), (1, 0)) if kind == "collective-permute" else everyone)


def test_a_collective_inside_a_loop_counts_every_turn():
    def add(x):
        return jax.lax.fori_loop(0, 9, lambda i, x: jax.lax.psum(x, "x") / 2 + x, x)

    program = compiled(mapped(add, 4), jnp.ones((4, 1024)))
    assert total(counter(program.as_text(), 4).work(), "moved") == 9 * 1024 * 4


@pytest.mark.parametrize(
    ("groups", "count", "last"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 2, (4, 5, 6, 7)),
        ("[2,16]<=[32]", 2, tuple(range(16, 32))),
        ("[8,4]<=[4,8]T(1,0)", 8, (7, 15, 23, 31)),
        ("[4,8]<=[2,4,4]T(1,0,2)", 4, (12, 13, 14, 15, 28, 29, 30, 31)),
        ("mesh['axis_0'=2,'axis_1'=8,'axis_2'=2] {'axis_0','axis_2'}", 8, (14, 15, 30, 31)),
        ("{}", 1, tuple(range(32))),
    ],
)
def test_groups_are_read_in_every_notation(groups, count, last):
    text = f"""
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    (one,) = counter(text, 32).work()
    assert (one.collective, len(one.groups), one.moved) == ("all-reduce", count, 32.0)
    assert one.groups[-1] == last and sorted(sum(one.groups, ())) == list(range(len(last) * count))


TPU = """
HloModule jit_f, is_scheduled=true

%fused (p.0: bf16[2,32,512,128], p.1: bf16[2,32,512,128]) -> f32[2,32,512,512] {
  %p.0 = bf16[2,32,512,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[2,32,512,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = f32[2,32,512,512]{2,3,1,0:T(8,128)} convolution(%p.0, %p.1), WINDOW, dim_labels=01bf_01oi->01bf, metadata={op_name="jit(f)/attention/dot_general"}
}

ENTRY %main (a: bf16[2,32,512,128], b: bf16[2,32,512,128]) -> f32[2,32,512,512] {
  %a = bf16[2,32,512,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[2,32,512,128]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %f = f32[2,32,512,512]{2,3,1,0:T(8,128)} fusion(%a, /*index=1*/%b), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/attention/dot_general"}
}
"""  # noqa: E501


def test_a_product_written_as_a_dilated_convolution_counts_no_holes():
    """64 products of [512, 128] and [128, 512], as the TPU compiler writes them."""
    text = TPU.replace("WINDOW", "window={size=2x32 stride=1x31 lhs_dilate=2x32}")
    (one,) = counter(text).work()
    assert one.flops == 64 * 2 * 512 * 512 * 128
    assert one.where == "jit(f)/attention/dot_general"


def test_a_plain_convolution_counts_no_padding():
    x, kernel = jnp.ones((1, 3, 10)), jnp.ones((5, 3, 4))
    program = compiled(lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), [(1, 1)]), x, kernel)
    text = program.as_text()
    if not re.search(r" convolution\(", text):  # the CPU's compiler may choose otherwise
        text = """
ENTRY %main (x: f32[1,3,10], k: f32[5,3,4]) -> f32[1,5,9] {
  %x = f32[1,3,10]{2,1,0} parameter(0)
  %k = f32[5,3,4]{2,1,0} parameter(1)
  ROOT %c = f32[1,5,9]{2,1,0} convolution(%x, %k), window={size=4 pad=1_1}, dim_labels=bf0_oi0->bf0
}
"""
    inside = 9 * 4 - 2  # of nine windows of four, the outermost two stick out by one
    assert total(counter(text).work(), "flops") == 2 * inside * 3 * 5


def test_what_lies_in_the_memory_of_the_core_is_not_read_from_that_of_the_chip():
    text = TPU.replace("WINDOW", "window={size=2x32 stride=1x31 lhs_dilate=2x32}")
    (near,) = counter(text).work()
    (far,) = counter(text.replace("S(1)", "")).work()
    assert near.bytes == 64 * 512 * 512 * 4 + 64 * 512 * 128 * 2
    assert far.bytes == near.bytes + 64 * 512 * 128 * 2


@pytest.mark.parametrize("to, read", [("S(1)", 1), ("", 2)])
def test_a_slice_that_is_fetched_ahead_is_read_alone(to, read):
    """As the TPU compiler fetches a quarter of a cache: into the memory of the core, or not."""
    text = """
ENTRY %main (k: bf16[32,2,512,128]) -> bf16[8,2,512,128] {
  %k = bf16[32,2,512,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %start = ((bf16[32,2,512,128]{3,2,1,0:T(8,128)(2,1)}), bf16[8,2,512,128]{3,2,1,0:T(8,128)(2,1)TO}, s32[]{:S(2)}) slice-start(%k), slice={[0:8], [0:2], [0:512], [0:128]}
  ROOT %done = bf16[8,2,512,128]{3,2,1,0:T(8,128)(2,1)TO} slice-done(%start)
}
"""  # noqa: E501
    (one,) = counter(text.replace("TO", to)).work()
    assert one.bytes == read * 8 * 2 * 512 * 128 * 2


def test_a_weight_is_read_through_a_change_of_shape_and_of_a_stack_a_slice_alone():
    """As the TPU compiler nests them: the product's operands are fusions of their own."""
    text = """
%shape (i: bf16[64,32]) -> bf16[64,32] {
  %i = bf16[64,32]{1,0} parameter(0)
  ROOT %b = bf16[64,32]{1,0} bitcast(%i)
}

%layer (s: bf16[9,16,64], n: s32[]) -> bf16[16,64] {
  %s = bf16[9,16,64]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %d = bf16[1,16,64]{2,1,0} dynamic-slice(%s, %n, %zero, %zero), dynamic_slice_sizes={1,16,64}
  ROOT %c = bf16[16,64]{1,0} bitcast(%d)
}

%product (p.0: bf16[9,16,64], p.1: bf16[64,32], p.2: s32[]) -> f32[16,32] {
  %p.0 = bf16[9,16,64]{2,1,0} parameter(0)
  %p.1 = bf16[64,32]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %x = bf16[16,64]{1,0} fusion(%p.0, %p.2), kind=kLoop, calls=%layer
  %w = bf16[64,32]{1,0} fusion(%p.1), kind=kLoop, calls=%shape
  ROOT %y = f32[16,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

ENTRY %main (a: bf16[9,16,64], b: bf16[64,32], n: s32[]) -> f32[16,32] {
  %a = bf16[9,16,64]{2,1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %f = f32[16,32]{1,0} fusion(%a, %b, %n), kind=kOutput, calls=%product
}
"""
    (one,) = counter(text).work()
    assert one.flops == 2 * 16 * 64 * 32
    assert one.bytes == 16 * 64 * 2 + 64 * 32 * 2 + 16 * 32 * 4


@pytest.mark.parametrize(
    ("name", "result", "grid", "products"),
    [
        ("splash_mha_fwd_residuals.2", "bf16[4,8,1536,64]{3,2,1,0}", "3,3", 2),
        ("splash_mha_dkv_no_residuals", "bf16[4,2,1536,64]{3,2,1,0}", "3,3", 4),
        ("splash_mha_dkv_no_residuals.1", "bf16[4,3,8,1536,64]{4,3,2,1,0}", "3,3", 5),
        ("splash_mha_dq_no_residuals.1", "bf16[4,8,1536,64]{3,2,1,0}", "3,3", 3),
        ("splash_mha_fwd_residuals.2.remat", "bf16[4,8,1536,64]{3,2,1,0}", "3,1", 2),
        ("splash_mha_dkv_no_residuals.1.clone", "bf16[4,2,1536,64]{3,2,1,0}", "1,3", 4),
        ("splash_mha_fwd_residuals.7", "bf16[4,8,1536,64]{3,2,1,0}", "3,2", 2),
        ("splash_mha_dkv_no_residuals.7", "bf16[4,2,1536,64]{3,2,1,0}", "2,3", 4),
        ("another_kernel.2", "bf16[4,8,1536,64]{3,2,1,0}", "3,3", 0),
    ],
)
def test_a_splash_kernel_counts_its_blocks_up_to_the_diagonal(name, result, grid, products):
    """Lines as the TPU compiler writes them, but for the operands that are not looked at."""
    text = f"""
ENTRY %main () -> bf16[4,8,1536,64] {{
  %next = s8[1,{grid}]{{2,1,0}} constant(0)
  %q = bf16[4,8,1536,64]{{3,2,1,0}} constant(0)
  ROOT %{name} = (f32[4,512,64]{{2,1,0}}, {result}) custom-call(%next, %next, %q, %q, %q), \
custom_call_target="tpu_custom_call"
}}
"""
    # Of 9 pairs of blocks, in rows of at most 3, 2 and 1.
    computed = {"3,3": 6, "3,2": 5, "2,3": 5, "3,1": 3, "1,3": 3}[grid]
    one = max(counter(text).work(), key=lambda work: work.bytes)
    assert one.flops == products * 2 * 4 * 8 * computed * 512**2 * 64
    assert one.bytes > 4 * 2 * 4 * 8 * 1536 * 64 * 0.8  # q, k, v and what comes of them
