"""What a compiled program sends, read off texts whose answer is known."""

import pytest

from shortcut_jax.planning.collectives import Collective, by_kind, collectives

PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = f32[8,4]{1,0} all-reduce(%g), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %r)
}

%condition.1 (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%fused (p: bf16[4]) -> bf16[8] {
  ROOT %a = bf16[8]{0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}
}

%below.2 (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  ROOT %less.2 = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main.1 (p0: f32[8,4], p1: bf16[4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"12"}}
  %u = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition.1, body=%body.1
  %v = (s32[], f32[8,4]{1,0}) while(%start), condition=%below.2, body=%body.1
  %f = bf16[8]{0} fusion(%p1), kind=kCustom, calls=%fused
  %s = (f32[3,4]{1,0}, s32[]) all-reduce-start(%x, %y), channel_id=2, to_apply=%add
  %d = (f32[3,4]{1,0}, s32[]) all-reduce-done(%s)
  %gs = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%x), dimensions={0}
  %gd = f32[16,4]{1,0} all-gather-done(%gs)
  %ps = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%y)
}
"""

# What a TPU makes of it: a loop that counts by 2, one gather in three fusions, one of them in the
# loop, and a sum that is cut.
TPU = """\
HloModule jit_step, num_partitions=4

%start (p: bf16[8]) -> (bf16[8], bf16[32], u32[]) {
  %g.0 = bf16[32]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, \
metadata={op_name="jit(train_step)/DiT/qkv/dot_general"}
  ROOT %c = (bf16[8], bf16[32], u32[]) custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}

%on_the_way (p: bf16[8]) -> bf16[32] {
  ROOT %g.1 = bf16[32]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}
}

%all-reduce-scatter.3 (p: f32[16]) -> f32[4] {
  %r = f32[16]{0} all-reduce(%p), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %cut = f32[4]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={4}
}

%cond (p: (f32[6], u32[])) -> pred[] {
  %six = u32[]{:T(128)} constant(6)
  %n = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%n, %six), direction=LT
}

%body (p: (f32[6], u32[])) -> (f32[6], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %one = u32[]{:T(128)} constant(1)
  %a = f32[6]{0} get-tuple-element(%p), index=0
  %b = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=9
  %m = u32[]{:T(128)} get-tuple-element(%p), index=1
  %more = u32[]{:T(128)} add(%m, %two)
  %f.1 = bf16[32]{0} fusion(%x), kind=kOutput, calls=%on_the_way
  ROOT %t = (f32[6]{0}, /*index=1*/u32[]) tuple(%b.done, /*index=1*/%more)
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %f.0 = (bf16[8], bf16[32], u32[]) fusion(%p0), kind=kCustom, calls=%start
  %w = (f32[6]{0}, u32[]) while(%init), condition=%cond, body=%body
  %f.2 = bf16[32]{0} fusion(%f.0), kind=kCustom, calls=%on_the_way
  %f.3 = f32[4]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3, \
metadata={op_name="jit(train_step)/transpose(jvp(DiT))/output/dot_general"}
}
"""


def test_every_operation_counts_as_often_as_it_runs():
    assert sorted(collectives(PROGRAM)) == [
        Collective("all-gather", 16, 1, 2),  # in a fusion
        Collective("all-gather", 256, 1, 8),  # what was received alone
        Collective("all-reduce", 52, 1, 8),
        Collective("all-reduce", 128, 12 + 1 + 28, 8),  # three loops, one of unknown length
        Collective("collective-permute", 20, 1, 8),
    ]
    assert by_kind(collectives(PROGRAM)) == {
        "all-gather": (2, 272),
        "all-reduce": (42, 52 + 41 * 128),
        "collective-permute": (1, 20),
    }


def test_what_a_tpu_spreads_over_fusions_counts_once():
    assert sorted(collectives(TPU)) == [
        Collective("all-gather", 64, 1, 4, "jit(train_step)/DiT/qkv/dot_general"),
        Collective("collective-permute", 24, 3, 4),
        Collective(
            "reduce-scatter", 16, 1, 4, "jit(train_step)/transpose(jvp(DiT))/output/dot_general"
        ),
    ]


def test_a_program_of_one_device_sends_nothing():
    assert collectives("HloModule m\n\nENTRY %main (p: f32[]) -> f32[] {\n}\n") == []


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", 2),
        ("mesh['a'=8] {'a':(1)2}", 2),
        ("{}", 6),
    ],
)
def test_every_way_to_write_groups(groups, size):
    text = "HloModule m, num_partitions=6\n\nENTRY %main (p: f32[2]) -> f32[2] {\n"
    text += f"  %r = f32[2]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add\n}}\n"
    assert collectives(text) == [Collective("all-reduce", 8, 1, size)]


@pytest.mark.parametrize(
    ("kind", "size", "received"),
    # 4 devices with an array of 16 bytes between them, or each with one of 16 bytes.
    [
        ("all-gather", 16, 12),  # three quarters from the others
        ("reduce-scatter", 4, 12),  # its own quarter of the three others
        ("all-reduce", 16, 24),  # the one, then the other
        ("all-to-all", 16, 12),
        ("collective-permute", 16, 16),
    ],
)
def test_bytes_that_a_device_receives(kind, size, received):
    assert Collective(kind, size, 2, 4).received == 2 * received
