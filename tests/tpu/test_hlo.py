"""How bytes are counted in the text of a program: each rule, in numbers."""

import pytest
from hlo import Instruction, everywhere, parse, traffic

TEXT = """
HloModule jit_step

%region (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  ROOT %b = bf16[]{:T(256)} parameter(1)
}

%writes (pool: bf16[100,16,128], at: s32[4], new: bf16[4,128]) -> bf16[100,16,128] {
  %new = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %pool = bf16[100,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[4]{0:T(128)} parameter(1)
  ROOT %scatter.1 = bf16[100,16,128]{2,1,0:T(8,128)(2,1)} scatter(%pool, %at, %new), to_apply=%region
}

%reads (pool.1: bf16[100,16,128], at.1: s32[4]) -> f32[4,16,128] {
  %pool.1 = bf16[100,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %at.1 = s32[4]{0:T(128)} parameter(1)
  %g = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} gather(%pool.1, %at.1), slice_sizes={1,16,128}
  ROOT %wide = f32[4,16,128]{2,1,0:T(8,128)} convert(%g)
}

%body (carried: (s32[], bf16[100,16,128], s32[4])) -> (s32[], bf16[100,16,128], s32[4]) {
  %carried = (s32[]{:T(128)}, bf16[100,16,128]{2,1,0:T(8,128)(2,1)}, s32[4]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carried), index=0
  %p = bf16[100,16,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carried), index=1
  %n = s32[4]{0:T(128)} get-tuple-element(%carried), index=2
  %block = f32[4,16,128]{2,1,0:T(8,128)} fusion(%p, %n), kind=kLoop, calls=%reads
  ROOT %again = (s32[]{:T(128)}, bf16[100,16,128]{2,1,0:T(8,128)(2,1)}, /*index=2*/s32[4]{0:T(128)}) tuple(%i, %p, %n)
}

%goes (carried.1: (s32[], bf16[100,16,128], s32[4])) -> pred[] {
  %carried.1 = (s32[]{:T(128)}, bf16[100,16,128]{2,1,0:T(8,128)(2,1)}, s32[4]{0:T(128)}) parameter(0)
  ROOT %yes = pred[]{:T(512)S(1)} constant(true)
}

ENTRY %main (w: bf16[256,128], pool.2: bf16[100,16,128], at.2: s32[4], zero: s32[]) -> f32[4,16,128] {
  %w = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %pool.2 = bf16[100,16,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %at.2 = s32[4]{0:T(128)} parameter(2)
  %zero = s32[]{:T(128)} parameter(3)
  %fetch = (bf16[256,128]{1,0:T(8,128)(2,1)S(1)}, bf16[256,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %here = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%fetch)
  %rows = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} fusion(%here), kind=kOutput, calls=%inner
  %wrote = bf16[100,16,128]{2,1,0:T(8,128)(2,1)} fusion(%pool.2, %at.2, %rows), kind=kCustom, calls=%writes
  %begin = (s32[]{:T(128)}, bf16[100,16,128]{2,1,0:T(8,128)(2,1)}, s32[4]{0:T(128)}) tuple(%zero, %wrote, %at.2)
  %loop = (s32[]{:T(128)}, bf16[100,16,128]{2,1,0:T(8,128)(2,1)}, s32[4]{0:T(128)}) while(%begin), condition=%goes, body=%body
  ROOT %mine = f32[4,16,128]{2,1,0:T(8,128)} custom-call(%at.2, %wrote), custom_call_target="tpu_custom_call"
}

%inner (x: bf16[256,128]) -> bf16[4,128] {
  %x = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %s = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} slice(%x), slice={[0:4], [0:128]}
}
"""  # noqa: E501


@pytest.mark.parametrize("turns", [1, 7])
def test_bytes_are_counted_where_they_cross(turns):
    module = parse(TEXT)
    assert sum(1 for _ in everywhere(module)) == 31
    weight = 256 * 128 * 2  # fetched once; used where it then lies
    written = 4 * 128 * 2 + 4 * 4  # the rows, and where they go: not the pool
    block = 4 * 16 * 128 * (2 + 4) + 4 * 4  # the pages read, made wide and written; which they are
    assert traffic(module, lambda _: turns, lambda _: 1000) == weight + written + turns * block + 1000


def test_a_kernel_is_known_by_its_call():
    asked: list[Instruction] = []
    traffic(parse(TEXT), lambda _: 1, lambda each: asked.append(each) or 0)
    assert [each.name for each in asked] == ["mine"]
