"""What a compiled program sends, read off texts whose answer is known."""

from shortcut_jax.collectives import Collective, by_kind, collectives

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = f32[8,4]{1,0} all-reduce(%g), channel_id=1, to_apply=%add
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %r)
}

%condition.1 (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%fused (p: bf16[4]) -> bf16[8] {
  ROOT %a = bf16[8]{0} all-gather(%p), dimensions={0}
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


def test_every_operation_counts_as_often_as_it_runs():
    assert sorted(collectives(PROGRAM)) == [
        Collective("all-gather", 16, 1),  # in a fusion
        Collective("all-gather", 256, 1),  # what was received alone
        Collective("all-reduce", 52, 1),
        Collective("all-reduce", 128, 12 + 1 + 28),  # three loops, one of unknown length
        Collective("collective-permute", 20, 1),
    ]
    assert by_kind(collectives(PROGRAM)) == {
        "all-gather": (2, 272),
        "all-reduce": (42, 52 + 41 * 128),
        "collective-permute": (1, 20),
    }


def test_a_program_of_one_device_sends_nothing():
    assert collectives("HloModule m\n\nENTRY %main (p: f32[]) -> f32[] {\n}\n") == []
