"""Who talks to whom in a collective: XLA's notations of groups, and libtpu's transfers between slices."""

from __future__ import annotations

import pytest

from vr_jax.plan.hlo_costs import program_costs
from vr_jax.plan.hlo_groups import first_group, group_size, slice_transfer, slices_within

HALVES = (0,) * 8 + (1,) * 8


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x=1", (0, 1, 2, 3)),
        ("replica_groups=[2,8]<=[16]", tuple(range(8))),
        ("replica_groups=[4,4]<=[4,4]T(1,0)", (0, 4, 8, 12)),
        ("replica_groups=[8,2]<=[2,2,4]T(2,1,0)", (0, 8)),
        ("replica_groups=mesh['replica'=2,'fsdp'=16,'tensor'=2] {'fsdp'}, use", tuple(range(0, 32, 2))),
        ("replica_groups=mesh['replica'=2,'fsdp'=16,'tensor'=2] {'replica','tensor'}", (0, 1, 32, 33)),
        ("replica_groups=mesh['axis_0'=16] {'axis_0':(1)4}", (0, 4, 8, 12)),
        ("replica_groups=mesh['axis_0'=16] {'axis_0':(4)4}", (0, 1, 2, 3)),
        ("replica_groups={}", None),
    ],
)
def test_notations_of_groups(text, group):
    text = " channel_id=1, " + text
    assert first_group(text) == group
    assert group_size(text, "all-reduce") == (group and len(group))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("replica_groups=[2,8]<=[16]", 1),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", 2),
        ("replica_groups={}", 2),
        ("source_target_pairs={{0,1},{1,0}}", 1),
        ("source_target_pairs={{0,1},{3,8}}", 2),
    ],
)
def test_slices_that_a_group_spans(text, count):
    assert slices_within(text, HALVES) == count


# As libtpu 0.0.50 writes them for two and for four slices of v5e:4x4.
TARGETS = {
    "ALL_REDUCE": '"{1,2}x{0:15}"',
    "ALL_GATHER": '"{1,2,3,4}x{0:15}"',
    "REDUCE_SCATTER": '"{1,2,3,4}x{0:15}"',
    "ALL_TO_ALL": "{{100000,200000},{100001,200001},{100002,200002}}",
    "ONE_TO_ONE": "{{100000->200000},{200000->100000},{100001->200001}}",
}


def send(kind: str) -> str:
    """A send of 2,048 float32, which are 8,192 bytes, as one chip writes it, and its receive."""
    attributes = (
        "channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target={TARGETS[kind]},_xla_megascale_transfer_type="{kind}"}}'
    )
    pair = "(f32[2,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[])"
    return f"""HloModule jit_step, is_scheduled=true, num_partitions=32

ENTRY %main (a: f32[2,8,128]) -> f32[2,8,128] {{
  %a = f32[2,8,128]{{2,1,0:T(8,128)}} parameter(0)
  %after-all = token[] after-all()
  %send = {pair} send(%a, %after-all), {attributes}
  %recv = {pair} recv(%after-all), {attributes}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (f32[2,8,128]{{2,1,0:T(8,128)}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %r = f32[2,8,128]{{2,1,0:T(8,128)}} get-tuple-element(%recv-done), index=0
}}
"""


@pytest.mark.parametrize(
    ("written", "kind", "slices", "sent"),
    [
        ("ALL_REDUCE", "all-reduce", 2, 2 * 8192 / 2),
        ("ALL_GATHER", "all-gather", 4, 3 * 8192),
        ("REDUCE_SCATTER", "reduce-scatter", 4, 8192 * 3 / 4),
        ("ALL_TO_ALL", "all-to-all", 2, 8192 / 2),
        ("ONE_TO_ONE", "collective-permute", 2, 8192),
    ],
)
def test_what_libtpu_sends_to_other_slices(written, kind, slices, sent):
    found = program_costs(send(written))
    assert dict(found.across) == {(kind, slices): sent}
    assert not found.collectives
    assert found.hbm_bytes == 2 * 8192  # It is read once and written once.


def test_a_transfer_to_the_own_host_crosses_nothing():
    assert slice_transfer('is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="x"}') is None
