"""Barriers that order nothing are told from the others by the paths between them."""

from __future__ import annotations

import pytest
from gpu.tools.barriers import idle_barriers


def ptx(body):
    return f""".version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 .ptr .global k_a)
{{
.reg .pred %p<4>;
.reg .b32 %r<9>;
.reg .b64 %rd<4>;
ld.param.u64 %rd1, [k_a];
{body}
ret;
}}"""


BAR = "bar.sync 0;"
LOAD, STORE = "ld.global.b32 %r1, [%rd1];", "st.global.b32 [%rd1], %r1;"
PUT, GET = "st.shared.b32 [smem], %r1;", "ld.shared.b32 %r2, [smem];"


@pytest.mark.parametrize(
    ("body", "idle"),
    [
        ([LOAD, BAR, PUT, BAR, GET], {0}),  # shared memory is touched for the first time
        ([PUT, BAR, GET], set()),
        ([GET, BAR, PUT], set()),
        ([PUT, BAR, PUT], set()),
        ([GET, BAR, GET], {0}),
        ([LOAD, BAR, STORE], set()),
        ([STORE, BAR, LOAD], set()),
        ([STORE, BAR, PUT], {0}),
        ([BAR, PUT, STORE], {0}),
        ([PUT, STORE, BAR], {0}),
        ([PUT, BAR, BAR, GET], {0, 1}),  # either may go
        ([STORE, BAR, "atom.global.acq_rel.gpu.add.u32 %r3, [%rd1], 1;"], set()),
        ([PUT, BAR, "ld.b32 %r3, [%rd1];"], set()),  # a generic address may be shared
        ([PUT, BAR, "ld.param.u64 %rd2, [k_a];"], {0}),
        ([PUT, BAR, "fence.acq_rel.gpu;"], set()),
        ([PUT, BAR, "shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;"], {0}),
        ([PUT, BAR, "ret;", GET], {0}),
        ([PUT, BAR, "@%p1 ret;", GET], set()),
        # around a loop the second barrier's far side is the first one's near side
        ([LOAD, "top:", BAR, PUT, BAR, GET, "@%p1 bra top;", STORE], set()),
        ([LOAD, "top:", BAR, PUT, "@%p1 bra top;", BAR, GET], set()),
        (["@%p1 bra over;", PUT, "over:", BAR, GET], set()),
        (["bra.uni over;", "before:", PUT, "bra.uni last;", "over:", BAR, GET, "last:"], {0}),
    ],
)
def test_a_barrier_is_idle_when_nothing_on_its_sides_can_meet(body, idle):
    assert idle_barriers(ptx("\n".join(body))) == idle
