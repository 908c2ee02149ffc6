"""The audit reads what the compiler made, and sees what was planted."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpu.tools.audit import audit, instructions, occupancy
from gpu.tools.driver import install


@triton.jit
def logsumexp_kernel(x_ptr, out_ptr, stride, V, EXPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    top = tl.zeros((BLOCK,), tl.float32) - 1e30
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        if EXPS == 1:
            total += tl.exp2(x - 8.0)
        else:
            new = tl.maximum(top, x)
            total = total * tl.exp2(top - new) + tl.exp2(x - new)
            top = new
    tl.store(out_ptr + row, tl.sum(total, 0) + tl.max(top, 0))


def audited(arch, V=8192, exps=1, block=2048, warps=4, dtype=torch.bfloat16):
    x, out = torch.zeros(2, V, dtype=dtype), torch.empty(2)
    with install(arch, execute=False) as driver:
        logsumexp_kernel[(2,)](x, out, V, V, EXPS=exps, BLOCK=block, num_warps=warps)
    (kernel,) = driver.compiled.values()
    return audit(kernel)


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_the_hottest_loop_of_a_kernel(arch):
    aligned, odd = audited(arch), audited(arch, V=8191)
    assert aligned.spills == odd.spills == 0 and 16 <= aligned.registers <= 128
    assert aligned.wide == 1.0 and odd.wide == 0.0
    assert aligned.loop_bytes == odd.loop_bytes == 32  # 16 bf16 a thread
    instructions, exps = aligned.per_element(2)
    assert exps == 1.0 and 3.0 < instructions < 12.0
    assert odd.per_element(2)[0] > instructions
    assert audited(arch, exps=2).per_element(2)[1] == 2.0
    assert 0 < aligned.occupancy <= 1.0 and aligned.shared >= 16


def test_a_wider_type_needs_more_loads():
    assert audited(90, dtype=torch.float32).loop_bytes == 64
    assert audited(90, dtype=torch.float32).wide == 1.0


def test_spills_are_seen():
    clean, spilled = audited(90), audited(90, exps=2, block=32768, warps=4)
    assert clean.spills == 0 < spilled.spills


def test_amd_assembly():
    found, spilled = audited("gfx942"), audited("gfx942", exps=2, block=65536, warps=4)
    assert found.spills == 0 < spilled.spills and 8 <= found.registers <= 128
    assert found.wide == 1.0 > audited("gfx942", V=8191).wide
    assert 0 < spilled.occupancy < found.occupancy <= 1.0


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "threads", "expected"),
    [
        (90, 32, 0, 256, 1.0),
        (90, 64, 0, 256, 0.5),
        (90, 255, 0, 256, 0.125),
        (90, 32, 114_000, 256, 0.25),  # two blocks by shared memory
        (86, 32, 0, 32, 16 / 48),  # blocks
        (80, 40, 0, 1024, 0.5),  # one block of 32 warps by registers
    ],
)
def test_occupancy(capability, registers, shared, threads, expected):
    assert occupancy(capability, registers, shared, threads) == pytest.approx(expected)


def test_loops_of_a_disassembly():
    sass = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.EX2 R6, R5 ;
        /*0030*/                   FADD R7, R7, R6 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/               @P2 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
"""
    code, loops = instructions(sass)
    assert len(code) == 8 and loops == [(1, 5)]
    assert code[1].startswith("LDG.E.U16") and code[2].startswith("MUFU.EX2")
