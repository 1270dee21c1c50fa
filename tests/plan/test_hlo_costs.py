"""Counting in the text of compiled programs, against programs whose work is known by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vr_jax.errors import UserError
from vr_jax.plan.hlo_costs import convolution_flops, program_costs
from vr_jax.plan.hlo_text import parse

MESH = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:8])


def costs(function, *arguments):
    return program_costs(jax.jit(function).lower(*arguments).compile().as_text())


def on(spec, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))


def per_shard(function, *specs, out):
    return jax.shard_map(function, mesh=MESH, in_specs=specs, out_specs=out, check_vma=False)


def test_a_loop_counts_as_often_as_it_runs():
    weights = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32)
    rows = jax.ShapeDtypeStruct((16, 32), jnp.float32)

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    found = costs(run, rows, weights)
    assert found.flops == 7 * 2 * 16 * 32 * 32
    # Each round reads its own matrix, not the whole stack of seven.
    assert 7 * 32 * 32 * 4 <= found.hbm_bytes < 2 * 7 * 7 * 32 * 32 * 4


def test_nested_loops_multiply():
    def run(x, w):
        inner = lambda x: jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(y @ w), x)  # noqa: E731
        return jax.lax.fori_loop(2, 8, lambda _, y: inner(y) + 1, x)

    square = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    assert costs(run, square, square).flops == 6 * 5 * 2 * 32**3


def test_of_branches_the_most_expensive_counts():
    def run(which, x):
        return jax.lax.cond(which, lambda: x @ x @ x, lambda: x + 1)

    square = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    assert costs(run, jax.ShapeDtypeStruct((), jnp.bool_), square).flops == 2 * 2 * 32**3


def test_memory_of_an_elementwise_program_is_what_it_reads_and_writes():
    rows = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    found = costs(lambda x, y: jnp.tanh(x) * y, rows, rows)
    assert found.hbm_bytes == 3 * 1024 * 256 * 4
    assert found.flops == 0


@pytest.mark.parametrize(
    ("function", "out", "kind", "group", "sent"),
    [
        # Per chip a block of 8 x 16 float32 = 512 bytes.
        (lambda x: jax.lax.psum(x, "b"), P("a", None), "all-reduce", 4, 2 * 512 * 3 / 4),
        (lambda x: jax.lax.all_gather(x, "b", tiled=True), P("a", None), "all-gather", 4, 512 * 3),
        (lambda x: jax.lax.psum_scatter(x, "b", tiled=True), P("a", None), "reduce-scatter", 4, 512 * 3 / 4),
        (lambda x: jax.lax.all_to_all(x, "b", 0, 1, tiled=True), P("a", "b"), "all-to-all", 4, 512 * 3 / 4),
        (lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), P("a", "b"), "collective-permute", 2, 512),
    ],
)
def test_bytes_between_chips(function, out, kind, group, sent):
    found = costs(per_shard(function, P("a", "b"), out=out), on(P("a", "b"), 16, 64))
    assert dict(found.collectives) == {(kind, group): sent}


def test_a_collective_in_a_loop_counts_each_time():
    def run(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jax.lax.psum(y, ("a", "b")) * 0.5, x)

    found = costs(per_shard(run, P("a", "b"), out=P("a", "b")), on(P("a", "b"), 16, 64))
    assert dict(found.collectives) == {("all-reduce", 8): 3 * 2 * 512 * 7 / 8}


@pytest.mark.parametrize(
    ("function", "out", "kind", "within", "across"),
    [
        # Per chip a block of 512 bytes, on two slices of four chips: a sum sends a quarter of it to the other slice.
        (lambda x: jax.lax.psum(x, ("a", "b")), P(None, None), "all-reduce", 2 * 512 * 3 / 4, 2 * 128 / 2),
        (lambda x: jax.lax.all_gather(x, ("a", "b"), tiled=True), P(None, None), "all-gather", 2 * 512 * 3, 512),
        (lambda x: jax.lax.psum_scatter(x, ("a", "b"), tiled=True), P("a"), "reduce-scatter", 512 * 3 / 4, 128 / 2),
        (lambda x: jax.lax.psum(x, "a"), P(None, "b"), "all-reduce", 0, 2 * 512 / 2),
        (lambda x: jax.lax.psum(x, "b"), P("a", None), "all-reduce", 2 * 512 * 3 / 4, 0),
        (lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), P("a", "b"), "collective-permute", 0, 512),
    ],
)
def test_bytes_that_cross_slices_are_counted_apart(function, out, kind, within, across):
    text = jax.jit(per_shard(function, P("a", "b"), out=out)).lower(on(P("a", "b"), 16, 64)).compile().as_text()
    found = program_costs(text, (0,) * 4 + (1,) * 4)
    assert dict(found.collectives) == ({(kind, 4): within} if within else {})
    assert dict(found.across) == ({(kind, 2): across} if across else {})


def brute(left, right, out, strides, pads, before, after):
    """Products of a 2-d convolution in bf_io->bf order with dilated input, counted one by one."""
    count = 0
    for at in np.ndindex(*out[2:]):
        for tap in np.ndindex(*right[2:]):
            where = [a * s + t * r - p for a, t, s, p, r in zip(at, tap, strides, pads, after, strict=True)]
            count += all(0 <= w <= (n - 1) * d and w % d == 0 for w, n, d in zip(where, left[2:], before, strict=True))
    return 2.0 * count * right[0] * out[0] * out[1]


@pytest.mark.parametrize(
    ("window", "arguments"),
    [
        ("size=3x3 pad=1_1x1_1", ((1, 1), (1, 1), (1, 1), (1, 1))),
        ("size=3x3 stride=2x1 pad=1_1x1_1 rhs_dilate=1x2", ((2, 1), (1, 1), (1, 1), (1, 2))),
        # How a TPU writes a batched product of matrices.
        ("size=5x3 stride=4x2 lhs_dilate=5x3", ((4, 2), (0, 0), (5, 3), (1, 1))),
    ],
)
def test_convolutions_without_padding_and_gaps(window, arguments):
    strides, pads, before, after = arguments
    left, right = (2, 4, 5, 3), (4, 6, *((5, 3) if "5x3" in window else (3, 3)))
    reach = [(n - 1) * d + 1 + 2 * p for n, d, p in zip(left[2:], before, pads, strict=True)]
    taps = [(k - 1) * r + 1 for k, r in zip(right[2:], after, strict=True)]
    out = (2, 6, *((a - t) // s + 1 for a, t, s in zip(reach, taps, strides, strict=True)))
    text = f", window={{{window}}}, dim_labels=bf01_io01->bf01"
    assert convolution_flops(left, right, out, text) == brute(left, right, out, *arguments)


def test_a_batched_product_written_as_a_convolution():
    """From a program for v5e: (21, 576, 16, 64) by (21, 576, 16, 64), batch and heads being spatial axes."""
    text = ", window={size=21x16 stride=20x15 lhs_dilate=21x16}, dim_labels=0b1f_0o1i->01bf"
    found = convolution_flops((21, 576, 16, 64), (21, 576, 16, 64), (21, 16, 576, 576), text)
    assert found == 2 * 21 * 16 * 576 * 576 * 64


TPU = """HloModule jit_step, is_scheduled=true, num_partitions=4

%start (p: f32[8,128]) -> (f32[8,128], f32[32,128], u32[]) {
  %p = f32[8,128]{1,0} parameter(0)
  %ag = f32[32,128]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %c1 = (f32[8,128], f32[32,128]{1,0}, u32[]{:S(2)}) custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%step (q: f32[8,128]) -> f32[32,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %again = f32[32,128]{1,0} all-gather(%q), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}, execution_thread="sparsecore"

%cond (c: (u32[], f32[8,128])) -> pred[] {
  %limit = u32[] constant(8)
  %c = (u32[], f32[8,128]{1,0}) parameter(0)
  %counter = u32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%counter, %limit), direction=LT
}

%body (b: (u32[], f32[8,128])) -> (u32[], f32[8,128]) {
  %b = (u32[], f32[8,128]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%b), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %kernel = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={m={
"text":"over
}} lines"}
  %copy = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%kernel)
  %there = f32[8,128]{1,0:S(1)} copy-done(%copy)
  %y = f32[8,128]{1,0:S(1)} add(%there, %there)
  ROOT %out = (u32[], f32[8,128]{1,0}) tuple(%next, %kernel)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %s = (f32[8,128]{1,0:S(1)}, f32[32,128]{1,0:S(1)}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %t = f32[32,128]{1,0:S(1)} fusion(%a), kind=kCustom, calls=%step
  %init = (u32[], f32[8,128]{1,0}) tuple(%zero, %a)
  %loop = (u32[], f32[8,128]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %r = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_what_is_particular_to_tpu_programs():
    """A loop that counts in twos, text over several lines, memory that is not HBM, a collective cut into steps."""
    found = program_costs(TPU)
    assert dict(found.kernels) == {"tpu_custom_call": 4}
    assert dict(found.collectives) == {("all-gather", 4): 3 * 8 * 128 * 4}
    block = 8 * 128 * 4
    counter = 3 * 4 + 2 * 4 + 1  # the sum in the body reads and writes scalars; the condition is free
    in_loop = 2 * block + block  # the kernel's operand and result; the copy's source
    assert found.hbm_bytes == pytest.approx(4 * in_loop + 2 * block, abs=8 * counter)


GPU = """HloModule jit_step, is_scheduled=true, num_partitions=1

%updated (stack: f32[64,8,128], at: s32[], row: f32[8,128]) -> f32[64,8,128] {
  %stack = f32[64,8,128]{2,1,0} parameter(0)
  %row = f32[8,128]{1,0} parameter(2)
  %one = f32[1,8,128]{2,1,0} bitcast(%row)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %dus = f32[64,8,128]{2,1,0} dynamic-update-slice(%stack, %one, %at, %zero, %zero)
}

ENTRY %main (s: f32[64,8,128], i: s32[], r: f32[8,128]) -> f32[64,8,128] {
  %s = f32[64,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %r = f32[8,128]{1,0} parameter(2)
  %begun = ((f32[64,8,128], s32[], f32[8,128]), f32[64,8,128], u32[]) fusion-start(%s, %i, %r), calls=%updated
  ROOT %ended = f32[64,8,128]{2,1,0} fusion-done(%begun)
}
"""


def test_an_asynchronous_fusion_that_updates_in_place():
    """Of the 64 blocks, one is read and one written; the counter is 4 bytes."""
    assert program_costs(GPU).hbm_bytes == 2 * 8 * 128 * 4 + 4


def test_texts_that_are_no_programs():
    with pytest.raises(UserError, match="no ENTRY computation"):
        parse("module {\n}\n")


def test_pairs_of_axes_are_independent():
    for size, kernel in itertools.product((3, 4), (1, 2)):
        one = convolution_flops(
            (1, 1, size),
            (1, 1, kernel),
            (1, 1, size),
            f", window={{size={kernel} pad=0_{kernel - 1}}}, dim_labels=bf0_io0->bf0",
        )
        assert one == 2 * (size * kernel - sum(range(kernel)))
