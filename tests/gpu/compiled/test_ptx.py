"""The PTX machine runs what Triton compiles, and finds what was planted in the machine code."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from gpu.tools.driver import install
from gpu.tools.ptx import PTX
from gpu.tools.ptx_memory import traffic

ARCHS = [80, 90, 100, 120]


@triton.jit
def logprob_kernel(x_ptr, id_ptr, out_ptr, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(x - new), 0)
        top = new
    picked = tl.load(x_ptr + tl.load(id_ptr + row)).to(tl.float32)
    tl.store(out_ptr + row, picked - (top + tl.log2(total)) * 0.6931471805599453)


def logprobs(driver, V, N=3, dtype=torch.bfloat16, pad=0, block=2048, warps=4):
    x, ids = (torch.randn(N, V + pad) * 3).to(dtype)[:, :V], torch.randint(0, V, (N,))
    out = torch.empty(N)
    logprob_kernel[(N,)](x, ids, out, x.stride(0), V, BLOCK=block, num_warps=warps)
    truth = x.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return driver.launches[-1], (out - truth).abs().max(), x


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_reduction_with_aligned_and_odd_rows(arch, dtype):
    with install(arch) as driver:
        for V, pad in ((4096, 0), (5003, 0), (5003, 13)):
            result, error, x = logprobs(driver, V, dtype=dtype, pad=pad)
            assert result.findings == []
            assert error < 5e-6
            assert result.load_bytes >= x.nbytes


def test_traffic_is_counted_in_sectors():
    with install(90) as driver:
        result, _, x = logprobs(driver, 4096, N=8)
    minimum = x.nbytes + 8 * 8 + 8 * 4
    assert minimum <= result.dram_read + result.dram_written <= minimum + 3 * 32
    assert traffic([result]) == result.dram_read + result.dram_written
    assert traffic([result, result]) == traffic([result])
    assert result.by_op["ex2.approx"] * 32 >= 8 * 4096
    assert result.load_width[128] >= x.nbytes
    with install(90) as driver:
        odd, _, x = logprobs(driver, 5003, N=8)
    assert odd.load_width[16] >= x.nbytes > odd.load_width[128]


@triton.jit
def affine(c1, d1, c2, d2):
    return c1 * c2, d2 + c2 * d1


@triton.jit
def scan_kernel(c_ptr, d_ptr, out_ptr, T, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    c = tl.load(c_ptr + row * T + i, mask=i < T, other=1.0)
    d = tl.load(d_ptr + row * T + i, mask=i < T, other=0.0)
    _, y = tl.associative_scan((c, d), 0, affine, reverse=True)
    tl.store(out_ptr + row * T + i, y, mask=i < T)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("T", [1, 100, 1000])
def test_a_reverse_scan_of_pairs(arch, T):
    c, d = torch.rand(3, T), torch.randn(3, T)
    with install(arch) as driver:
        out = torch.empty(3, T)
        scan_kernel[(3,)](c, d, out, T, BLOCK=max(16, triton.next_power_of_2(T)))
    expected = torch.zeros(3, T + 1, dtype=torch.float64)
    for t in range(T - 1, -1, -1):
        expected[:, t] = d[:, t] + c[:, t] * expected[:, t + 1]
    assert driver.launches[-1].findings == []
    assert (out - expected[:, :T]).abs().max() < 1e-5


@triton.jit
def axpy_kernel(x_ptr, y_ptr, out_ptr, count_ptr, n, a, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    on = i < n
    x = tl.load(x_ptr + i, mask=on, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + i, mask=on, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (x * a + y).to(out_ptr.dtype.element_ty), mask=on)
    tl.atomic_add(count_ptr, tl.sum(on.to(tl.int32), 0))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_casts_round_to_the_bit_and_atomics_count(arch, dtype):
    x, y, count = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype), torch.zeros(1, dtype=torch.int32)
    with install(arch) as driver:
        out = torch.empty(1000, dtype=dtype)
        axpy_kernel[(4,)](x, y, out, count, 1000, 1.5, BLOCK=256)
    assert driver.launches[-1].findings == [] and count.item() == 1000
    assert torch.equal(out, (x.double() * 1.5 + y.double()).float().to(dtype))  # one rounding: a fused multiply-add


# ---- planted bugs


def without(text, pattern, which=0):
    """The PTX without one match of the pattern."""
    found = list(re.finditer(pattern, text))
    assert len(found) > which
    return text[: found[which].start()] + text[found[which].end() :]


def compiled(arch, call):
    with install(arch, execute=False) as driver:
        call()
    return next(iter(driver.compiled.values()))


def test_without_any_one_of_its_barriers_a_kernel_is_caught_though_its_numbers_are_right():
    V = 6144
    x, ids = torch.randn(2, V).bfloat16(), torch.randint(0, V, (2,))
    kernel = compiled(90, lambda: logprob_kernel[(2,)](x, ids, torch.empty(2), V, V, BLOCK=2048, num_warps=4))
    text = str(kernel.asm["ptx"])
    pattern = r"bar\.sync\s+0;"
    barriers = len(re.findall(pattern, text))
    assert barriers >= 3
    truth = x.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    for which in [None, *range(barriers)]:
        out = torch.zeros(2)
        damaged = text if which is None else without(text, pattern, which)
        result = PTX(damaged).launch((2,), (128,), [x, ids, out, V, V], kernel.shared)
        assert (out - truth).abs().max() < 5e-6
        assert any("shared-memory race" in f for f in result.findings) == (which is not None)
        assert which is not None or result.findings == []


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + shift, mask=i < n, other=0.0) if MASKED else tl.load(x_ptr + i + shift)
    tl.store(out_ptr + i, x, mask=i < n)


def findings(call, arch=90):
    with install(arch) as driver:
        call()
    return [finding for result in driver.launches for finding in result.findings]


def test_out_of_bounds_and_between_rows():
    whole = torch.arange(1000.0)
    call = lambda x, n, **k: copy_kernel[(4,)](
        x, torch.empty(1000), n, k.get("shift", 0), BLOCK=256, MASKED=k.get("masked", True)
    )
    assert findings(lambda: call(whole, 1000)) == []
    assert "out of bounds global load" in findings(lambda: call(whole, 1000, shift=1))[0]
    assert "out of bounds global load" in findings(lambda: call(whole, 1000, masked=False))[0]
    assert "1 lanes, -4 bytes into x_ptr of 4000" in findings(lambda: call(whole, 1000, shift=-1))[0]
    rows = torch.randn(4, 128)[:, :100]

    def row_sums(V):
        ids, out = torch.zeros(4, dtype=torch.long), torch.empty(4)
        logprob_kernel[(4,)](rows, ids, out, 128, V, BLOCK=128)

    assert findings(lambda: row_sums(100)) == []
    assert "between the rows" in findings(lambda: row_sums(101))[0]


def test_a_wrong_promise_of_alignment_is_caught():
    @triton.jit
    def hinted_kernel(x_ptr, out_ptr, shift):
        i = tl.multiple_of(tl.program_id(0) + shift, 16) + tl.arange(0, 512)
        tl.store(out_ptr + tl.arange(0, 512), tl.load(x_ptr + i))

    x = torch.randn(1024)
    assert findings(lambda: hinted_kernel[(1,)](x, torch.empty(512), 32)) == []
    assert "misaligned 16-byte global load" in findings(lambda: hinted_kernel[(1,)](x, torch.empty(512), 33))[0]


def test_races_between_blocks():
    @triton.jit
    def shift_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, tl.load(x_ptr + i + 1, mask=i + 1 < n, other=0.0), mask=i < n)

    @triton.jit
    def ranges_kernel(out_ptr, step, BLOCK: tl.constexpr):
        i = tl.program_id(0) * step + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, i)

    x = torch.zeros(512)
    assert findings(lambda: shift_kernel[(4,)](x, torch.empty(512), 512, BLOCK=128)) == []
    assert "race between blocks on x_ptr" in findings(lambda: shift_kernel[(4,)](x, x, 512, BLOCK=128))[0]
    ints = torch.zeros(512, dtype=torch.int32)
    assert findings(lambda: ranges_kernel[(4,)](ints, 128, BLOCK=128)) == []
    assert "race between blocks on out_ptr" in findings(lambda: ranges_kernel[(4,)](ints, 127, BLOCK=128))[0]


@triton.jit
def last_block_kernel(x_ptr, part_ptr, count_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr, HOW: tl.constexpr):
    p = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    tl.store(part_ptr + p * BLOCK + i, tl.load(x_ptr + p * BLOCK + i) * 2.0)
    if HOW != "no barrier":
        tl.debug_barrier()
    if HOW == "relaxed":
        arrived = tl.atomic_add(count_ptr, 1, sem="relaxed")
    else:
        arrived = tl.atomic_add(count_ptr, 1)
    if arrived == N - 1:
        j = tl.arange(0, N * BLOCK)
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + j), 0))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("how", ["right", "relaxed"])
def test_the_last_block_may_read_what_an_atomic_released(arch, how):
    x, out, count = torch.randn(512), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    found = findings(lambda: last_block_kernel[(4,)](x, torch.empty(512), count, out, N=4, BLOCK=128, HOW=how), arch)
    assert (out - 2 * x.sum()).abs() < 1e-4 and count.item() == 4
    assert [f[:39] for f in found] == ([] if how == "right" else ["global race between blocks on part_ptr:"])


def test_the_barrier_before_the_releasing_atomic_is_needed():
    x, count = torch.randn(512), torch.zeros(1, dtype=torch.int32)
    call = lambda: last_block_kernel[(4,)](x, torch.empty(512), count, torch.zeros(1), N=4, BLOCK=128, HOW="right")
    kernel = compiled(90, call)
    text = str(kernel.asm["ptx"])
    before = text[: text.index("atom.")]

    def run(text):
        args = [x, torch.empty(512), torch.zeros(1, dtype=torch.int32), torch.zeros(1)]
        return PTX(text).launch((4,), (128,), args, kernel.shared).findings

    assert run(text) == []
    before = re.sub(r"bar\.sync\s+0;", "", before)
    assert any("global race between blocks on" in f for f in run(before + text[text.index("atom.") :]))


@triton.jit
def meeting_kernel(counters_ptr, out_ptr, N: tl.constexpr):
    """The first half counts, the second waits for it; who is of which half is decided by the order of starting."""
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    if ticket < N:
        tl.atomic_add(counters_ptr + 1, ticket + 1, sem="release")
    else:
        seen = tl.atomic_add(counters_ptr + 1, 0, sem="acquire")
        while seen < N * (N + 1) // 2:
            seen = tl.atomic_add(counters_ptr + 1, 0, sem="acquire")
        tl.store(out_ptr + ticket - N, seen)


@pytest.mark.parametrize("arch", [80, 90])
def test_a_block_that_waits_for_another_lets_it_run(arch):
    out = torch.zeros(6, dtype=torch.int32)
    call = lambda blocks: meeting_kernel[(blocks,)](torch.zeros(2, dtype=torch.int32), out, N=6)
    assert findings(lambda: call(12), arch) == []
    assert out.tolist() == [21] * 6


def test_a_block_that_waits_for_what_never_comes_is_stopped():
    counters = torch.zeros(2, dtype=torch.int32)
    call = lambda: meeting_kernel[(12,)](counters, torch.zeros(6, dtype=torch.int32), N=6)
    kernel = compiled(90, call)
    text = str(kernel.asm["ptx"])
    args = [torch.full((2,), 6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)]
    assert PTX(text).launch((2,), (128,), args, kernel.shared, limit=2000).findings == [
        "no end after 2000 instructions"
    ]


HAND_WRITTEN = """
.version 8.7
.target sm_90
.address_size 64
.visible .entry k(.param .u64 k_param_0)
{
  .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<4>;
  .shared .align 16 .b8 area[256];
  ld.param.u64 %rd1, [k_param_0];
  mov.u32 %r1, %tid.x;
  shl.b32 %r2, %r1, 2;
  mov.u32 %r3, area;
  add.s32 %r4, %r3, %r2;
  BODY
  ret;
}
"""


OWN = "mul.wide.u32 %rd2, %r2, 1; add.s64 %rd3, %rd1, %rd2; "


def hand_written(body, **options):
    out = torch.zeros(64, dtype=torch.int32)
    return PTX(HAND_WRITTEN.replace("BODY", body)).launch((1,), (64,), [out], **options).findings


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("st.shared.b32 [%r4], %r1; bar.sync 0; ld.shared.b32 %r5, [area+4];", None),
        ("st.shared.b32 [%r4], %r1; ld.shared.b32 %r5, [area+4];", "shared-memory race between warps"),
        ("st.shared.b32 [area], %r1;", "shared-memory race between warps"),
        (
            "st.shared.b32 [%r4], %r1; bar.sync 0; ld.shared.b32 %r5, [area]; st.shared.b32 [%r4], %r1;",
            "shared-memory race",
        ),
        ("ld.shared.b32 %r5, [%r4];", "uninitialised shared read"),
        ("st.shared.b32 [%r4+4], %r1;", "out of bounds shared access at 256 of 256"),
        ("st.shared.b32 [%r4+-4], %r1;", "out of bounds shared access at -4 of 256"),
        ("st.shared.b32 [%r4+2], %r1;", "misaligned shared access"),
        ("setp.lt.s32 %p1, %r1, 32; @%p1 bar.sync 0;", "threads of the block had already ended"),
        (
            "setp.lt.s32 %p1, %r1, 32; @%p1 bra $L_a; bar.sync 0; bra $L_b; $L_a: bar.sync 0; $L_b: mov.b32 %r5, 0;",
            "wait at different barriers",
        ),
        ("setp.lt.s32 %p1, %r1, 99; @!%p1 trap;", None),
        ("trap;", "trap reached"),
        (OWN + "st.global.b32 [%rd3], %r1;", None),
        (
            OWN + "st.global.b32 [%rd3+256], %r1;",
            "out of bounds global store, 64 lanes",
        ),
        (
            OWN + "atom.global.add.u32 %r5, [%rd3+4], %r1;",
            "out of bounds global atomic, 1 lanes",
        ),
        # The address of the thread in %rd3: its own, the first one, or one that another warp has as well.
        (OWN + "st.global.b32 [%rd3], %r1; ld.global.b32 %r5, [%rd3]; st.global.b32 [%rd3], %r1;", None),
        (OWN + "st.global.b32 [%rd3], %r1; bar.sync 0; ld.global.b32 %r5, [%rd1];", None),
        (OWN + "st.global.b32 [%rd3], %r1; ld.global.b32 %r5, [%rd1];", "global race between warps"),
        (OWN + "ld.global.b32 %r5, [%rd1]; bar.sync 0; st.global.b32 [%rd3], %r1;", None),
        (OWN + "ld.global.b32 %r5, [%rd1]; st.global.b32 [%rd3], %r1;", "global race between warps"),
        # All read it and one reads it again before it writes.
        (
            OWN + "ld.global.b32 %r5, [%rd1]; ld.global.b32 %r6, [%rd3]; st.global.b32 [%rd3], %r1;",
            "global race between warps",
        ),
        (OWN + "ld.global.b32 %r5, [%rd3]; st.global.b32 [%rd3], %r1;", None),
        ("st.global.b32 [%rd1], %r1;", "global race between warps"),
        (
            "setp.lt.s32 %p1, %r1, 32; @%p1 st.global.b32 [%rd1], %r1; @!%p1 st.global.b32 [%rd1], %r1;",
            "race between warps",
        ),
    ],
)
def test_shared_memory_barriers_and_bounds(body, expected):
    found = hand_written(body)
    assert (expected is None) == (found == [])
    assert expected is None or any(expected in f for f in found), found


def test_an_asynchronous_copy_is_there_after_its_wait():
    copy = "mul.wide.u32 %rd2, %r2, 1; add.s64 %rd3, %rd1, %rd2; cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group;"
    assert hand_written(f"{copy} cp.async.wait_group 0; ld.shared.b32 %r5, [%r4];") == []
    assert "uninitialised shared read" in hand_written(f"{copy} cp.async.wait_group 1; ld.shared.b32 %r5, [%r4];")[0]
    assert "uninitialised shared read" in hand_written(f"{copy} ld.shared.b32 %r5, [%r4];")[0]


@pytest.mark.parametrize("mods", ["", ".trans"])
def test_matrices_go_to_shared_memory_and_back(mods):
    body = """
      mul.wide.u32 %rd2, %r2, 1; add.s64 %rd3, %rd1, %rd2;
      and.b32 %r5, %r1, 31;
      shl.b32 %r6, %r5, 16; add.s32 %r6, %r6, %r5; add.s32 %r6, %r6, 65536;
      and.b32 %r7, %r5, 7; shl.b32 %r7, %r7, 4; add.s32 %r7, %r7, %r3;
      and.b32 %r8, %r1, 32; shl.b32 %r8, %r8, 2; add.s32 %r7, %r7, %r8;
      stmatrix.sync.aligned.m8n8.x1MODS.shared.b16 [%r7], {%r6};
      bar.sync 0;
      ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r7];
      st.global.b32 [%rd3], %r5;
    """
    out = torch.zeros(64, dtype=torch.int32)
    found = PTX(HAND_WRITTEN.replace("BODY", body.replace("MODS", mods))).launch((1,), (64,), [out])
    assert found.findings == []
    lane = torch.arange(32, dtype=torch.int32)
    matrix = torch.stack([lane, lane + 1], 1).reshape(8, 8)  # row t // 4, columns 2 (t % 4) and the next
    matrix = matrix.T.contiguous() if mods else matrix
    expected = matrix.reshape(32, 2)
    got = torch.stack([out[:32] & 0xFFFF, out[:32] >> 16], 1)
    assert torch.equal(got, expected) and torch.equal(out[:32], out[32:])


def test_a_product_of_half_a_warp_is_found():
    body = """
      setp.lt.s32 %p1, %r1, 16;
      @%p1 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r5,%r6,%r7,%r8}, {%r1,%r1,%r1,%r1}, {%r1,%r1}, {%r2,%r2,%r2,%r2};
    """
    assert "without some lanes" in hand_written(body)[0]


FENCED = """
.version 8.7
.target sm_90
.address_size 64
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1, .param .u64 k_param_2)
{
  .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
  ld.param.u64 %rd1, [k_param_0];
  ld.param.u64 %rd2, [k_param_1];
  ld.param.u64 %rd3, [k_param_2];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  setp.ne.s32 %p1, %r1, 0;
  @%p1 ret;
  mul.wide.u32 %rd4, %r2, 4;
  add.s64 %rd5, %rd1, %rd4;
  st.global.b32 [%rd5], %r2;
  FENCE
  atom.global.add.u32 %r3, [%rd2], 1;
  FENCE
  setp.ne.s32 %p2, %r3, 1;
  @%p2 ret;
  ld.global.b32 %r4, [%rd1];
  ld.global.b32 %r5, [%rd1+4];
  add.s32 %r6, %r4, %r5;
  st.global.b32 [%rd3], %r6;
  ret;
}
"""


@pytest.mark.parametrize(
    ("fence", "clean"), [("membar.gl;", True), ("fence.acq_rel.gpu;", True), ("", False), ("membar.cta;", False)]
)
def test_a_relaxed_atomic_orders_with_fences(fence, clean):
    out = torch.zeros(1, dtype=torch.int32)
    args = [torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), out]
    found = PTX(FENCED.replace("FENCE", fence)).launch((2,), (32,), args).findings
    assert out.item() == 1 and (found == []) == clean


def test_structures_and_numbers_as_parameters():
    text = """
.visible .entry k(.param .align 8 .b8 k_param_0[16], .param .f32 k_param_1, .param .u64 k_param_2)
{
  .reg .b32 %r<9>; .reg .f32 %f<4>; .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [k_param_0];
  mov.b64 %rd2, k_param_0;
  add.s64 %rd3, %rd2, 8;
  ld.param.u32 %r1, [%rd3];
  ld.param.f32 %f1, [k_param_1];
  cvt.rn.f32.s32 %f2, %r1;
  add.f32 %f3, %f1, %f2;
  st.global.f32 [%rd1], %f3;
  ret;
}
"""
    out = torch.zeros(1)
    block = out.data_ptr().to_bytes(8, "little") + (41).to_bytes(8, "little")
    result = PTX(text).launch((1,), (32,), [block, 1], regions={"out": out})
    assert out.item() == 42.0 and result.findings == []
    with pytest.raises(ValueError, match="a structure of 16 bytes got 3"):
        PTX(text).launch((1,), (32,), [b"123", 1.0])
    with pytest.raises(ValueError, match="expected whole warps"):
        PTX(text).launch((1,), (33,), [block, 1.0])


def test_unwritten_results_hold_poison():
    with install(90):
        out, ints = torch.empty(8), torch.empty(8, dtype=torch.int64)
        copy_kernel[(1,)](torch.ones(4), out, 4, 0, BLOCK=16, MASKED=True)
    assert out.isnan().tolist() == [False] * 4 + [True] * 4
    assert (ints == 0x5A5A5A5A5A5A5A5A).all()


def test_kernels_are_recompiled_for_every_target_and_the_driver_is_put_back():
    before = triton.runtime.driver._active
    texts = {}
    for arch in (80, 90, "gfx942"):
        with install(arch) as driver:
            copy_kernel[(1,)](torch.ones(4), torch.empty(4), 4, 0, BLOCK=16, MASKED=True)
            (kernel,) = driver.compiled.values()
        texts[arch] = kernel.asm["ptx" if arch != "gfx942" else "amdgcn"]
        assert len(driver.launches) == (arch != "gfx942")
        assert kernel.name == "test_ptx.copy_kernel"
        assert kernel.constants["BLOCK"] == 16 and kernel.signature["x_ptr"] == "*fp32D"
    assert "sm_80" in texts[80] and "sm_90" in texts[90] and "gfx942" in texts["gfx942"]
    assert triton.runtime.driver._active is before
