"""The PTX machine computes what the instructions are documented to compute, one thread per element."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu.tools.numerics import bf16_to_f32, f32_to_bf16
from gpu.tools.ptx import PTX, Unsupported

TYPES = {"8": torch.uint8, "16": torch.int16, "32": torch.int32, "64": torch.int64}

TEMPLATE = """
.version 8.7
.target sm_90
.address_size 64
.visible .entry k({params})
{{
  .reg .pred %p<9>;
  .reg .b16 %rs<9>; .reg .b32 %r<20>; .reg .b64 %rd<40>; .reg .f32 %f<9>;
  {registers}
  mov.u32 %r10, %tid.x;
  mov.u32 %r11, %ctaid.x;
  mov.u32 %r12, %ntid.x;
  mad.lo.s32 %r13, %r11, %r12, %r10;
  {loads}
  {body}
  {stores}
  ret;
}}
"""


def execute(body, inputs, outputs, threads=32, blocks=1, **options):
    """body: PTX over registers %x0.. (inputs, one element per thread) and %y0.. (outputs); arrays in, arrays out."""
    arrays = [np.ascontiguousarray(x) for x in inputs]
    results = [np.zeros(threads * blocks, dtype) for dtype in outputs]
    registers, loads, stores, params = [], [], [], []
    for letter, group in (("x", arrays), ("y", results)):
        for i, array in enumerate(group):
            bits = 8 * array.itemsize
            number = len(params)
            params.append(f".param .u64 k_param_{number}")
            registers.append(f".reg .b{bits} %{letter}{i};")
            address = f"ld.param.u64 %rd{number}, [k_param_{number}];\n mul.wide.s32 %rd30, %r13, {array.itemsize};\n"
            address += f" add.s64 %rd{number}, %rd{number}, %rd30;\n"
            loads.append(address)
            if letter == "x":
                loads.append(f"ld.global.b{bits} %x{i}, [%rd{number}];")
            else:
                stores.append(f"st.global.b{bits} [%rd{number}], %y{i};")
    text = TEMPLATE.format(
        params=", ".join(params),
        registers="\n  ".join(registers),
        loads="\n  ".join(loads),
        body=body,
        stores="\n  ".join(stores),
    )
    held = [
        torch.from_numpy(a.view(f"i{a.itemsize}") if a.itemsize > 1 else a.view(np.uint8)) for a in [*arrays, *results]
    ]
    result = PTX(text).launch((blocks,), (threads,), held, **options)
    return results, result


def values(dtype, seed=0, n=32):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        x = (rng.normal(size=n) * 10 ** rng.uniform(-3, 3, n)).astype(dtype)
        x[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0]
        return rng.permutation(x)
    info = np.iinfo(dtype)
    x = rng.integers(info.min, info.max, n, dtype=dtype, endpoint=True)
    x[:4] = [0, 1, info.min, info.max]
    return rng.permutation(x)


def expect(body, inputs, expected):
    (got,), result = execute(body, inputs, [expected.dtype])
    assert result.findings == []
    np.testing.assert_array_equal(
        got.view(f"u{got.itemsize}") if got.dtype.kind != "f" else got,
        expected.view(f"u{got.itemsize}") if got.dtype.kind != "f" else expected,
    )


A, B, C = (values(np.int32, s) for s in (1, 2, 3))
U, V = (values(np.uint32, s) for s in (4, 5))
L, M = (values(np.int64, s) for s in (6, 7))
SMALL = np.arange(32, dtype=np.uint32) % 40


def exact(function, *arrays, bits):
    """Python integers, wrapped to so many bits."""
    out = [function(*(int(x) for x in row)) & ((1 << bits) - 1) for row in zip(*arrays, strict=True)]
    return np.array(out, f"u{bits // 8}")


def field(a, position, length):
    return (a >> min(position, 63)) & ((1 << length) - 1)


def signed_field(a, position, length):
    x = (a >> min(position, 63)) & ((1 << length) - 1)
    return x - (1 << length) if length and x >> (length - 1) & 1 else x


def trunc_div(a, b):
    return -1 if b == 0 else int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize(
    ("body", "inputs", "expected"),
    [
        ("add.s32 %y0, %x0, %x1;", (A, B), exact(lambda a, b: a + b, A, B, bits=32)),
        ("sub.u32 %y0, %x0, %x1;", (U, V), exact(lambda a, b: a - b, U, V, bits=32)),
        ("mul.lo.s32 %y0, %x0, %x1;", (A, B), exact(lambda a, b: a * b, A, B, bits=32)),
        ("mul.hi.s32 %y0, %x0, %x1;", (A, B), exact(lambda a, b: (a * b) >> 32, A, B, bits=32)),
        ("mul.hi.u32 %y0, %x0, %x1;", (U, V), exact(lambda a, b: (a * b) >> 32, U, V, bits=32)),
        ("mul.hi.s64 %y0, %x0, %x1;", (L, M), exact(lambda a, b: (a * b) >> 64, L, M, bits=64)),
        (
            "mul.hi.u64 %y0, %x0, %x1;",
            (L.view(np.uint64), M.view(np.uint64)),
            exact(lambda a, b: (a * b) >> 64, L.view(np.uint64), M.view(np.uint64), bits=64),
        ),
        ("mul.wide.s32 %y0, %x0, %x1;", (A, B), exact(lambda a, b: a * b, A, B, bits=64)),
        ("mul.wide.u32 %y0, %x0, %x1;", (U, V), exact(lambda a, b: a * b, U, V, bits=64)),
        ("mad.lo.s32 %y0, %x0, %x1, %x2;", (A, B, C), exact(lambda a, b, c: a * b + c, A, B, C, bits=32)),
        ("mad.wide.s32 %y0, %x0, %x1, %x2;", (A, B, L), exact(lambda a, b, c: a * b + c, A, B, L, bits=64)),
        ("div.s32 %y0, %x0, %x1;", (A, B), exact(trunc_div, A, B, bits=32)),
        ("div.u32 %y0, %x0, 7;", (U,), exact(lambda a: a // 7, U, bits=32)),
        ("rem.s32 %y0, %x0, 7;", (A,), exact(lambda a: a - trunc_div(a, 7) * 7, A, bits=32)),
        ("min.s32 %y0, %x0, %x1;", (A, B), exact(min, A, B, bits=32)),
        ("max.u32 %y0, %x0, %x1;", (U, V), exact(max, U, V, bits=32)),
        ("neg.s32 %y0, %x0;", (A,), exact(lambda a: -a, A, bits=32)),
        ("and.b32 %y0, %x0, 0xF0F0;", (U,), exact(lambda a: a & 0xF0F0, U, bits=32)),
        ("not.b32 %y0, %x0;", (U,), exact(lambda a: ~a, U, bits=32)),
        ("shl.b32 %y0, %x0, %x1;", (U, SMALL), exact(lambda a, n: a << n, U, SMALL, bits=32)),
        ("shr.u32 %y0, %x0, %x1;", (U, SMALL), exact(lambda a, n: a >> n, U, SMALL, bits=32)),
        ("shr.s32 %y0, %x0, %x1;", (A, SMALL), exact(lambda a, n: a >> n, A, SMALL, bits=32)),
        (
            "shf.l.wrap.b32 %y0, %x0, %x1, %x2;",
            (U, V, SMALL),
            exact(lambda a, b, n: ((b << 32 | a) << (n & 31)) >> 32, U, V, SMALL, bits=32),
        ),
        (
            "shf.r.clamp.b32 %y0, %x0, %x1, %x2;",
            (U, V, SMALL),
            exact(lambda a, b, n: (b << 32 | a) >> min(n, 32), U, V, SMALL, bits=32),
        ),
        ("bfe.u32 %y0, %x0, %x1, 5;", (U, SMALL), exact(lambda a, n: field(a, n, 5), U, SMALL, bits=32)),
        (
            "bfe.s32 %y0, %x0, 3, %x1;",
            (A, SMALL % 30),
            exact(lambda a, n: signed_field(a, 3, n), A, SMALL % 30, bits=32),
        ),
        ("bfi.b32 %y0, %x0, %x1, 8, 12;", (U, V), exact(lambda a, b: (b & ~0xFFF00) | (a & 0xFFF) << 8, U, V, bits=32)),
        (
            "lop3.b32 %y0, %x0, %x1, %x2, 0xE8;",
            (A, B, C),
            exact(lambda a, b, c: (a & b) | (a & c) | (b & c), A, B, C, bits=32),
        ),
        (
            "prmt.b32 %y0, %x0, %x1, 0x7531;",
            (U, V),
            exact(
                lambda a, b: sum((((b << 32 | a) >> 8 * k) & 255) << 8 * i for i, k in enumerate((1, 3, 5, 7))),
                U,
                V,
                bits=32,
            ),
        ),
        (
            "prmt.b32 %y0, %x0, %x1, 0xBB3;",
            (U, V),
            exact(lambda a, b: (a >> 24) | (0xFFFF00 if a >> 31 else 0) | (a & 255) << 24, U, V, bits=32),
        ),
        ("popc.b32 %y0, %x0;", (U,), exact(lambda a: a.bit_count(), U, bits=32)),
        ("clz.b32 %y0, %x0;", (U,), exact(lambda a: 32 - a.bit_length(), U, bits=32)),
        ("brev.b32 %y0, %x0;", (U,), exact(lambda a: int(f"{a:032b}"[::-1], 2), U, bits=32)),
        ("cvt.s64.s32 %y0, %x0;", (A,), exact(lambda a: a, A, bits=64)),
        ("cvt.u64.u32 %y0, %x0;", (U,), exact(lambda a: a, U, bits=64)),
        ("cvt.s32.s8 %y0, %x0;", (A,), exact(lambda a: (a & 255) - 256 * (a >> 7 & 1), A, bits=32)),
        ("cvt.u16.u32 %y0, %x0;", (U,), exact(lambda a: a, U, bits=16)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_integers(body, inputs, expected):
    expect(body, inputs, expected)


F, G, H = (values(np.float32, s) for s in (8, 9, 10))
D = values(np.float64, 11)
FINITE = np.where(np.isfinite(F), F, np.float32(2.5))
with np.errstate(all="ignore"):
    FLOATS = [
        ("add.f32 %y0, %x0, %x1;", (F, G), F + G),
        ("sub.rn.f32 %y0, %x0, %x1;", (F, G), F - G),
        ("mul.f32 %y0, %x0, %x1;", (F, G), F * G),
        ("mul.f32 %y0, %x0, 0f3FB8AA3B;", (F,), F * np.float32(1.4426950216293335)),
        ("fma.rn.f32 %y0, %x0, %x1, %x2;", (F, G, H), (F.astype(np.float64) * G + H).astype(np.float32)),
        ("div.full.f32 %y0, %x0, %x1;", (F, G), F / G),
        ("min.f32 %y0, %x0, %x1;", (F, G), np.fmin(F, G)),
        ("max.NaN.f32 %y0, %x0, %x1;", (F, G), np.maximum(F, G)),
        ("max.f32 %y0, %x0, %x1, %x2;", (F, G, H), np.fmax(np.fmax(F, G), H)),
        ("abs.f32 %y0, %x0;", (F,), np.abs(F)),
        ("neg.f32 %y0, %x0;", (F,), -F),
        ("ex2.approx.ftz.f32 %y0, %x0;", (F,), np.exp2(F)),
        ("lg2.approx.f32 %y0, %x0;", (F,), np.log2(F)),
        ("sqrt.rn.f32 %y0, %x0;", (F,), np.sqrt(F)),
        ("rcp.approx.f32 %y0, %x0;", (F,), 1 / F),
        ("copysign.f32 %y0, %x0, %x1;", (F, G), np.copysign(G, F)),
        ("add.sat.f32 %y0, %x0, %x1;", (F, G), np.fmin(np.fmax(F + G, 0), 1)),
        ("add.f64 %y0, %x0, %x0;", (D,), D + D),
        ("cvt.rn.f32.f64 %y0, %x0;", (D,), D.astype(np.float32)),
        ("cvt.f64.f32 %y0, %x0;", (F,), F.astype(np.float64)),
        ("cvt.rn.f16.f32 %y0, %x0;", (F,), F.astype(np.float16)),
        ("cvt.rn.f32.s32 %y0, %x0;", (A,), A.astype(np.float32)),
        ("cvt.rn.f32.u64 %y0, %x0;", (L.view(np.uint64),), L.view(np.uint64).astype(np.float32)),
        ("cvt.rmi.f32.f32 %y0, %x0;", (F,), np.floor(F)),
        ("cvt.rni.s32.f32 %y0, %x0;", (FINITE % 1000,), np.rint(FINITE % 1000).astype(np.int32)),
        ("cvt.rzi.u32.f32 %y0, %x0;", (np.float32([3.7, -2.0, 5e9, np.nan] * 8),), np.uint32([3, 0, 2**32 - 1, 0] * 8)),
        (
            "cvt.rzi.s64.f32 %y0, %x0;",
            (np.float32([3.7, -2.9, 1e30, -np.inf] * 8),),
            np.int64([3, -2, 2**63 - 1, -(2**63)] * 8),
        ),
        ("setp.lt.f32 %p1, %x0, %x1; selp.b32 %y0, 1, 2, %p1;", (F, G), np.where(F < G, 1, 2).astype(np.int32)),
        ("setp.geu.f32 %p1, %x0, %x1; selp.b32 %y0, 1, 2, %p1;", (F, G), np.where(~(F < G), 1, 2).astype(np.int32)),
        ("setp.neu.f32 %p1, %x0, %x0; selp.b32 %y0, 1, 2, %p1;", (F,), np.where(np.isnan(F), 1, 2).astype(np.int32)),
        ("setp.ne.f32 %p1, %x0, %x0; selp.b32 %y0, 1, 2, %p1;", (F,), np.full(32, 2, np.int32)),
        (
            "setp.nan.f32 %p1|%p2, %x0, %x1; selp.b32 %y0, 1, 2, %p2;",
            (F, G),
            np.where(np.isnan(F) | np.isnan(G), 2, 1).astype(np.int32),
        ),
        (
            "setp.gt.s32 %p1, %x0, %x1; setp.lt.and.u32 %p2, %x0, %x1, !%p1; selp.b32 %y0, 1, 2, %p2;",
            (A, B),
            np.where((A.view(np.uint32) < B.view(np.uint32)) & ~(A > B), 1, 2).astype(np.int32),
        ),
        (
            "mov.b64 {%r1, %r2}, %x0; mov.b64 %y0, {%r2, %r1};",
            (L,),
            exact(lambda a: (a & 0xFFFFFFFF) << 32 | (a >> 32) & 0xFFFFFFFF, L, bits=64),
        ),
        (
            "mov.b32 {%rs1, %rs2}, %x0; mov.b32 %y0, {%rs2, %rs1};",
            (U,),
            exact(lambda a: (a & 0xFFFF) << 16 | a >> 16, U, bits=32),
        ),
    ]


@pytest.mark.parametrize(("body", "inputs", "expected"), FLOATS, ids=lambda v: v if isinstance(v, str) else "")
def test_floats(body, inputs, expected):
    expect(body, inputs, expected)


def test_every_bf16_and_fp16_value_widens_exactly_and_fp32_rounds_to_the_nearest_even():
    every = np.arange(65536, dtype=np.uint16)
    (wide,), _ = execute("cvt.f32.bf16 %y0, %x0;", [every], [np.float32], 32, 2048)
    truth = torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(wide, truth)
    (half,), _ = execute("cvt.f32.f16 %y0, %x0;", [every], [np.float32], 32, 2048)
    np.testing.assert_array_equal(half, every.view(np.float16).astype(np.float32))
    # Every bf16 value, its neighbours in fp32, and the ties between two of them.
    near = (every.astype(np.uint32) << 16)[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = near.reshape(-1).view(np.float32)
    (narrow,), _ = execute("cvt.rn.bf16.f32 %y0, %x0;", [x], [np.uint16], 32, x.size // 32)
    expected = torch.from_numpy(x).bfloat16()
    got = torch.from_numpy(narrow.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit()[~got.isnan()], expected.signbit()[~got.isnan()])
    np.testing.assert_array_equal(f32_to_bf16(x), narrow)
    np.testing.assert_array_equal(bf16_to_f32(every), truth)


@pytest.mark.parametrize("narrow", ["f16", "bf16"])
def test_mixed_precision_widens_all_but_the_last_operand(narrow):
    g = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(32, generator=g) for _ in range(3))
    dtype = torch.float16 if narrow == "f16" else torch.bfloat16
    raw = [x.to(dtype).view(torch.int16).numpy().view(np.uint16) for x in (a, b)]
    a, b = (x.to(dtype).float() for x in (a, b))
    for body, inputs, expected in (
        (f"add.rn.f32.{narrow} %y0, %x0, %x1;", [raw[0], c.numpy()], a + c),
        (f"sub.rn.f32.{narrow} %y0, %x0, %x1;", [raw[0], c.numpy()], a - c),
        (f"fma.rn.f32.{narrow} %y0, %x0, %x1, %x2;", [*raw, c.numpy()], (a.double() * b + c).float()),
    ):
        (got,), _ = execute(body, inputs, [np.float32])
        assert np.array_equal(got, expected.numpy()), body


def test_pairs_compute_both_halves():
    x, y = values(np.float32, 12, 64).reshape(32, 2), values(np.float32, 13, 64).reshape(32, 2)
    with np.errstate(all="ignore"):
        for body, expected in (
            ("add.rn.f32x2 %y0, %x0, %x1;", x + y),
            ("fma.rn.f32x2 %y0, %x0, %x1, %x0;", (x.astype(np.float64) * y + x).astype(np.float32)),
        ):
            (got,), _ = execute(body, [x.view(np.uint64)[:, 0], y.view(np.uint64)[:, 0]], [np.uint64])
            np.testing.assert_array_equal(got.view(np.float32).reshape(32, 2), expected)
    low, high = x[:, 0].copy(), x[:, 1].copy()
    (got,), _ = execute("cvt.rn.bf16x2.f32 %y0, %x1, %x0;", [low, high], [np.uint32])
    np.testing.assert_array_equal(got.view(np.uint16).reshape(32, 2), f32_to_bf16(x))
    packed = f32_to_bf16(x).view(np.uint32)[:, 0]
    (got,), _ = execute("max.bf16x2 %y0, %x0, %x1;", [packed, f32_to_bf16(y).view(np.uint32)[:, 0]], [np.uint32])
    expected = np.fmax(bf16_to_f32(f32_to_bf16(x)), bf16_to_f32(f32_to_bf16(y)))
    np.testing.assert_array_equal(bf16_to_f32(got.view(np.uint16).reshape(32, 2)), expected)


LANE = np.arange(32)


@pytest.mark.parametrize(
    ("body", "source"),
    [
        ("shfl.sync.bfly.b32 %y0, %x0, 16, 31, -1;", LANE ^ 16),
        ("shfl.sync.bfly.b32 %y0, %x0, 3, 31, 0xffffffff;", LANE ^ 3),
        ("shfl.sync.down.b32 %y0, %x0, 4, 31, -1;", np.where(LANE + 4 < 32, LANE + 4, LANE)),
        ("shfl.sync.up.b32 %y0, %x0, 4, 0, -1;", np.where(LANE >= 4, LANE - 4, LANE)),
        ("shfl.sync.idx.b32 %y0, %x0, 5, 31, -1;", np.full(32, 5)),
        ("shfl.sync.idx.b32 %y0, %x0, 5, 0x181f, -1;", LANE // 8 * 8 + 5),
        ("shfl.sync.down.b32 %y0, %x0, 2, 0x181f, -1;", np.where(LANE % 8 < 6, LANE + 2, LANE)),
    ],
)
def test_shuffles(body, source):
    expect(body, (U,), U[source])


def test_votes_and_reductions_of_a_warp():
    expect(
        "setp.gt.s32 %p1, %x0, 0; vote.sync.ballot.b32 %y0, %p1, -1;",
        (A,),
        np.full(32, sum(1 << i for i in range(32) if A[i] > 0), np.uint32),
    )
    expect(
        "setp.gt.s32 %p1, %x0, 0; vote.sync.any.pred %p2, %p1, -1; selp.b32 %y0, 1, 0, %p2;",
        (A,),
        np.ones(32, np.int32),
    )
    expect(
        "setp.gt.s32 %p1, %x0, 0; vote.sync.all.pred %p2, %p1, -1; selp.b32 %y0, 1, 0, %p2;",
        (A,),
        np.zeros(32, np.int32),
    )
    expect("redux.sync.max.s32 %y0, %x0, -1;", (A,), np.full(32, A.max()))
    expect("redux.sync.add.s32 %y0, %x0, -1;", (A,), np.full(32, A.sum(dtype=np.int32)))


def test_a_collective_of_lanes_that_are_elsewhere_is_found():
    body = """
      setp.lt.s32 %p1, %r10, 16;
      mov.b32 %y0, 0;
      @!%p1 bra $L_end;
      activemask.b32 %r1;
      shfl.sync.idx.b32 %y0, %x0, 0, 31, MASK;
      $L_end:
    """
    _, clean = execute(body.replace("MASK", "0xffff"), [U], [np.uint32])
    assert clean.findings == []
    _, wrong = execute(body.replace("MASK", "-1"), [U], [np.uint32])
    assert "whose mask names lanes that are elsewhere" in wrong.findings[0]


def test_divergent_branches_meet_again():
    body = """
      mov.b32 %r1, 0;
      mov.b32 %y0, 0;
      $L_loop:
      add.s32 %y0, %y0, %r1;
      add.s32 %r1, %r1, 1;
      setp.le.s32 %p1, %r1, %r10;
      @%p1 bra $L_loop;
      shfl.sync.bfly.b32 %y0, %y0, 1, 31, -1;
    """
    (got,), result = execute(body, [U], [np.int32])
    assert result.findings == [] and np.array_equal(got, ((LANE ^ 1) * ((LANE ^ 1) + 1)) // 2)


def test_a_loop_without_end_is_stopped():
    _, result = execute("$L_loop: mov.b32 %y0, 1; bra $L_loop;", [U], [np.int32], limit=1000)
    assert result.findings == ["no end after 1000 instructions"]


@pytest.mark.parametrize(
    "body",
    [
        "wgmma.fence.sync.aligned;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "ld.local.b32 %y0, [%rd1];",
        "add.cc.s32 %y0, %x0, %x0;",
        "cvt.rz.bf16.f32 %y0, %x0;",
        "bar.sync 1;",
        "bar.sync 0, 16;",
        "cp.async.bulk.commit_group;",
        "fma.rn.relu.f16 %y0, %x0, %x0, %x0;",
        "call.uni printf, (%r1);",
    ],
)
def test_what_it_cannot_execute_is_refused(body):
    with pytest.raises(Unsupported):
        execute(body, [U], [np.int32])
