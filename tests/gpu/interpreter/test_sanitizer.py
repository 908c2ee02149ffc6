"""The access checker finds what was planted, and nothing in the twin without it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpu.tools.sanitizer import ORDERS, Sanitizer


def kinds(call, **options):
    with Sanitizer(**options) as s:
        call()
    return s.kinds()


@triton.jit
def logprob_kernel(x_ptr, id_ptr, out_ptr, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    picked = tl.load(x_ptr + tl.load(id_ptr + row)).to(tl.float32)
    tl.store(out_ptr + row, picked - top - tl.log(total))


def logprobs(V=5003, N=6, dtype=torch.bfloat16, **options):
    x, ids = (torch.randn(N, V) * 3).to(dtype), torch.randint(0, V, (N,))
    with Sanitizer(**options) as s:
        out = torch.empty(N)
        logprob_kernel[(N,)](x, ids, out, x.stride(0), V, BLOCK=2048)
    return s, x, ids, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_clean_kernel_is_clean_and_its_traffic_is_counted(dtype):
    s, x, ids, out = logprobs(dtype=dtype)
    s.check()
    assert s.unwritten(out) == 0
    truth = x.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert (out - truth).abs().max() < 5e-6
    launch = s.launches[-1]
    assert launch.load_first == x.nbytes + ids.nbytes == launch.load_first_prog
    assert launch.load_bytes == launch.load_first + 6 * x.element_size()  # the gather reads one element a row again
    assert launch.store_bytes == launch.store_first == out.nbytes
    assert launch.ops["exp"] >= x.numel()
    assert launch.kernel == "logprob_kernel" and launch.grid == (6, 1, 1)
    assert "logprob_kernel(6, 1, 1): loads" in str(launch)


def test_the_order_of_the_programs_is_chosen():
    @triton.jit
    def rank_kernel(count_ptr, out_ptr):
        tl.store(out_ptr + tl.program_id(0), tl.atomic_add(count_ptr, 1))

    def ranks(order, seed=0):
        out = torch.empty(6, dtype=torch.int32)
        with Sanitizer(order, seed) as s:
            rank_kernel[(6,)](torch.zeros(1, dtype=torch.int32), out)
        s.check()
        return out.tolist()

    assert ranks("forward") == [0, 1, 2, 3, 4, 5]
    assert ranks("reverse") == [5, 4, 3, 2, 1, 0]
    assert sorted(ranks("shuffle", 1)) == [0, 1, 2, 3, 4, 5] != ranks("shuffle", 1) == ranks("shuffle", 1)
    assert ranks("shuffle", 1) != ranks("shuffle", 2)
    with pytest.raises(ValueError, match="argument 'order' got 'backwards'"):
        Sanitizer("backwards")


@pytest.mark.parametrize("order", ORDERS)
def test_a_clean_kernel_has_the_same_bits_in_any_order(order):
    torch.manual_seed(0)
    expected = logprobs(V=1000)[3]
    torch.manual_seed(0)
    assert torch.equal(logprobs(V=1000, order=order)[3], expected)


# ---- bounds


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + shift, mask=i < n, other=0.0) if MASKED else tl.load(x_ptr + i + shift)
    tl.store(out_ptr + i, x, mask=i < n)


def test_out_of_bounds():
    whole = torch.arange(1000.0)
    out = torch.empty(1000)
    assert kinds(lambda: copy_kernel[(1,)](whole, out, 1000, 0, BLOCK=1024, MASKED=True)) == []
    assert kinds(lambda: copy_kernel[(1,)](whole, out, 1000, 1, BLOCK=1024, MASKED=True)) == ["oob"]
    assert kinds(lambda: copy_kernel[(1,)](whole, out, 1000, -1, BLOCK=1024, MASKED=True)) == ["oob"]
    assert torch.equal(out[1:], whole[:-1]) and out[0].isnan()  # the refused lane is poison


def test_outside_of_the_tensor_inside_its_storage():
    whole = torch.arange(1000.0)  # the stock interpreter reads the neighbour
    part = whole[:100]
    assert kinds(lambda: copy_kernel[(1,)](part, torch.empty(100), 100, 0, BLOCK=128, MASKED=True)) == []
    assert kinds(lambda: copy_kernel[(1,)](part, torch.empty(100), 100, 0, BLOCK=128, MASKED=False)) == ["outside-view"]
    rows = torch.randn(4, 128)[:, :100]
    ids = torch.zeros(4, dtype=torch.long)
    for V, expected in ((100, []), (101, ["outside-view"])):
        assert kinds(lambda V=V: logprob_kernel[(4,)](rows, ids, torch.zeros(4), 128, V, BLOCK=128)) == expected


def test_the_message_names_place_program_tensor_and_element():
    with Sanitizer() as s:
        copy_kernel[(2,)](torch.zeros(128), torch.zeros(256), 256, 0, BLOCK=128, MASKED=True)
    with pytest.raises(
        AssertionError, match=r"oob at test_sanitizer.py:\d+ \(copy_kernel\): load x_ptr: element 128 of a "
    ):
        s.check()
    s.check(ignore=["oob"])
    assert s.findings[0].program == 1 and s.findings[0].count == 1


def test_an_origin_survives_select_and_reshape():
    @triton.jit
    def picked_kernel(x_ptr, y_ptr, out_ptr, n, first, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        flipped = tl.reshape(tl.where(i < n // 2, x_ptr + i, x_ptr + (n - i)), (2, BLOCK // 2))
        x = tl.load(flipped)
        tl.store(out_ptr + tl.reshape(i, (2, BLOCK // 2)), x)

    x, y = torch.randn(64), torch.randn(64)
    assert kinds(lambda: picked_kernel[(1,)](x, y, torch.empty(64), 64, True, BLOCK=64)) == []
    assert kinds(lambda: picked_kernel[(1,)](x[:30], y, torch.empty(64), 64, True, BLOCK=64)) == ["outside-view"]


def test_misaligned_and_wrong_element_size():
    @triton.jit
    def cast_kernel(x_ptr, out_ptr, shift, WIDE: tl.constexpr):
        i = tl.arange(0, 16)
        if WIDE:
            tl.store(out_ptr + i, tl.load((x_ptr + shift).to(tl.pointer_type(tl.int32)) + i))
        else:
            p = (x_ptr.to(tl.int64) + shift).to(tl.pointer_type(tl.int16))
            tl.store(out_ptr + i, tl.load(p + i).to(tl.int32))

    x, out = torch.zeros(64, dtype=torch.int16), torch.empty(16, dtype=torch.int32)
    assert kinds(lambda: cast_kernel[(1,)](x, out, 4, WIDE=False)) == []
    assert kinds(lambda: cast_kernel[(1,)](x, out, 3, WIDE=False)) == ["misaligned"]
    assert kinds(lambda: cast_kernel[(1,)](x, out, 0, WIDE=True)) == ["itemsize"]


# ---- initialisation


def test_uninitialised_reads():
    def call(fill):
        x = torch.empty(64)
        if fill == "all":
            x.copy_(torch.arange(64.0))
        elif fill == "half":
            x[:32] = 1.0
        copy_kernel[(1,)](x, torch.empty(64), 64, 0, BLOCK=64, MASKED=True)

    assert kinds(lambda: call("all")) == []
    assert kinds(lambda: call("half")) == ["uninit-read"]
    assert kinds(lambda: call("none")) == ["uninit-read"]


def test_what_a_kernel_wrote_counts_as_initialised():
    def call():
        x, y = torch.empty(64), torch.empty(64)
        copy_kernel[(1,)](torch.ones(64), x, 64, 0, BLOCK=64, MASKED=True)
        copy_kernel[(1,)](x, y, 64, 0, BLOCK=64, MASKED=True)

    assert kinds(call) == []


def test_unwritten_elements_are_counted():
    with Sanitizer() as s:
        out, ints, flags = torch.empty(100), torch.empty(4, dtype=torch.int64), torch.empty(4, dtype=torch.bool)
        copy_kernel[(1,)](torch.randn(100), out, 60, 0, BLOCK=128, MASKED=True)
        whole = torch.empty_like(out)
        torch.add(out, 1.0, out=whole)
    assert s.unwritten(out) == 40 and out[60:].isnan().all() and s.unwritten(ints) == s.unwritten(flags) == 4
    assert s.unwritten(whole) == 0
    with Sanitizer(track_empty=False) as s:
        out = torch.empty(100).fill_(1.0)
        copy_kernel[(1,)](torch.randn(100), out, 60, 0, BLOCK=128, MASKED=True)
    assert s.unwritten(out) == 0 and (out[60:] == 1.0).all()


@pytest.mark.parametrize("with_other", [True, False])
def test_lanes_that_are_masked_off_are_poison_without_other(with_other):
    @triton.jit
    def sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, OTHER: tl.constexpr):
        i = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0) if OTHER else tl.load(x_ptr + i, mask=i < n)
        tl.store(out_ptr, tl.sum(x, 0))

    out = torch.zeros(1)
    with Sanitizer():
        sum_kernel[(1,)](torch.ones(100), out, 100, BLOCK=128, OTHER=with_other)
    assert out.item() == 100.0 if with_other else out.isnan().all()


# ---- order


@triton.jit
def ranges_kernel(out_ptr, step, BLOCK: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    tl.store(out_ptr + p * step + tl.arange(0, BLOCK), p * 1.0)


@triton.jit
def shift_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i + 1, mask=i + 1 < n, other=0.0), mask=i < n)


@pytest.mark.parametrize("order", ORDERS)
def test_races_between_programs(order):
    assert kinds(lambda: ranges_kernel[(4,)](torch.zeros(64), 16, BLOCK=16), order=order) == []
    assert kinds(lambda: ranges_kernel[(4,)](torch.zeros(64), 15, BLOCK=16), order=order) == ["race"]
    x = torch.zeros(64)
    assert kinds(lambda: shift_kernel[(4,)](x, torch.zeros(64), 64, BLOCK=16), order=order) == []
    assert kinds(lambda: shift_kernel[(4,)](x, x, 64, BLOCK=16), order=order) == ["hazard", "race"]


@triton.jit
def last_program_kernel(x_ptr, part_ptr, count_ptr, out_ptr, BLOCK: tl.constexpr, N: tl.constexpr, HOW: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    tl.store(part_ptr + p, tl.sum(tl.load(x_ptr + p * BLOCK + tl.arange(0, BLOCK)), 0))
    if HOW != "no barrier":
        tl.debug_barrier()
    if HOW == "relaxed":
        arrived = tl.atomic_add(count_ptr, 1, sem="relaxed")
    elif HOW == "release":
        arrived = tl.atomic_add(count_ptr, 1, sem="release")
    else:
        arrived = tl.atomic_add(count_ptr, 1)
    if arrived == N - 1:
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + tl.arange(0, N)), 0))
        tl.store(count_ptr, 0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", ["right", "no barrier", "relaxed", "release"])
def test_the_last_program_needs_a_barrier_and_an_acquiring_and_releasing_atomic(order, how):
    x, out, count = torch.randn(64), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    found = kinds(
        lambda: last_program_kernel[(4,)](x, torch.zeros(4), count, out, BLOCK=16, N=4, HOW=how), order=order, seed=3
    )
    assert found == {"right": [], "no barrier": ["hazard", "race"]}.get(how, ["race"])
    assert (out - x.sum()).abs() < 1e-5 and count.item() == 0  # in the interpreter the numbers are right all the same


def test_an_atomic_races_with_plain_accesses():
    @triton.jit
    def mixed_kernel(x_ptr, out_ptr, WRITES: tl.constexpr, READS: tl.constexpr):
        if tl.program_id(0) == 0:
            tl.atomic_add(x_ptr, 1)
        elif WRITES:
            tl.store(x_ptr, 7)
        elif READS:
            tl.store(out_ptr, tl.load(x_ptr))

    for order in ORDERS:
        for writes, reads, expected in ((False, False, []), (True, False, ["race"]), (False, True, ["race"])):
            x, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            call = lambda x=x, out=out, w=writes, r=reads: mixed_kernel[(2,)](x, out, WRITES=w, READS=r)
            assert kinds(call, order=order) == expected, (order, writes, reads)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sem", ["acq_rel", "release", "relaxed"])
def test_an_atomic_is_released_by_the_same_threads_next_atomic(order, sem):
    @triton.jit
    def ticket_kernel(counters_ptr, N: tl.constexpr, SEM: tl.constexpr):
        tl.atomic_add(counters_ptr, 1, sem="relaxed")
        if tl.atomic_add(counters_ptr + 1, 1, sem=SEM) == N - 1:
            tl.store(counters_ptr + tl.arange(0, 2), tl.zeros((2,), tl.int32))

    counters = torch.zeros(2, dtype=torch.int32)
    found = kinds(lambda: ticket_kernel[(4,)](counters, N=4, SEM=sem), order=order)
    assert found == ([] if sem == "acq_rel" else ["race"]) and not counters.any()


@triton.jit
def in_place_kernel(x_ptr, id_ptr, V, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * V + i, mask=i < V, other=float("-inf"))
    p = tl.exp(x - tl.max(x, 0))
    tl.store(x_ptr + row * V + i, p / tl.sum(p, 0), mask=i < V)
    if BARRIER:
        tl.debug_barrier()
    picked = x_ptr + row * V + tl.load(id_ptr + row)
    tl.store(picked, tl.load(picked) - 1.0)


@triton.jit
def read_twice_kernel(x_ptr, id_ptr, V, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """Every thread reads one number, and one of them reads it again and writes over it."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    picked = tl.load(x_ptr + row * V + tl.load(id_ptr + row))
    if BARRIER:
        tl.debug_barrier()
    x = tl.load(x_ptr + row * V + i, mask=i < V, other=0.0)
    tl.store(x_ptr + row * V + i, x - picked, mask=i < V)


def test_what_several_threads_read_none_may_write_before_a_barrier():
    ids = torch.randint(0, 100, (4,))
    for barrier in (True, False):
        call = lambda b=barrier: read_twice_kernel[(4,)](torch.randn(4, 100), ids, 100, BLOCK=128, BARRIER=b)
        assert kinds(call) == ([] if barrier else ["hazard"])


def test_hazards_inside_a_program():
    ids = torch.randint(0, 100, (4,))
    assert kinds(lambda: in_place_kernel[(4,)](torch.randn(4, 100), ids, 100, BLOCK=128, BARRIER=True)) == []
    assert kinds(lambda: in_place_kernel[(4,)](torch.randn(4, 100), ids, 100, BLOCK=128, BARRIER=False)) == ["hazard"]


@triton.jit
def scratch_kernel(x_ptr, out_ptr, BARRIER: tl.constexpr, REDUCES: tl.constexpr, SCALAR: tl.constexpr):
    i = tl.arange(0, 16)
    if SCALAR:
        tl.store(x_ptr, 3.0)
    else:
        tl.store(x_ptr + i, i * 1.0)
    if REDUCES:
        tl.store(out_ptr + 16, tl.sum(i, 0))
    if BARRIER:
        tl.debug_barrier()
    if SCALAR:
        tl.store(out_ptr + i, tl.load(x_ptr) + i)
    else:
        tl.store(out_ptr + i, tl.load(x_ptr + 15 - i))


@pytest.mark.parametrize("scalar", [False, True])
def test_a_barrier_orders_and_a_reduction_only_on_demand(scalar):
    def call(barrier, reduces=False):
        return lambda: scratch_kernel[(1,)](
            torch.zeros(16), torch.zeros(17), BARRIER=barrier, REDUCES=reduces, SCALAR=scalar
        )

    assert kinds(call(True)) == []
    assert kinds(call(False)) == ["hazard"]
    assert kinds(call(False, reduces=True)) == ["hazard"]
    assert kinds(call(False, reduces=True), reductions_order=True) == []


def test_duplicate_addresses_in_a_store():
    @triton.jit
    def scatter_kernel(id_ptr, out_ptr):
        i = tl.arange(0, 16)
        tl.store(out_ptr + tl.load(id_ptr + i), i)

    out = torch.zeros(16, dtype=torch.int32)
    ids = torch.randperm(16)
    assert kinds(lambda: scatter_kernel[(1,)](ids, out)) == []
    ids[3] = ids[9]
    assert kinds(lambda: scatter_kernel[(1,)](ids, out)) == ["duplicate"]


def test_float_atomics():
    @triton.jit
    def total_kernel(x_ptr, out_ptr):
        tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 16)), 0))

    ints = torch.zeros(1, dtype=torch.int64)
    assert kinds(lambda: total_kernel[(1,)](torch.ones(16, dtype=torch.int64), ints)) == [] and ints.item() == 16
    assert kinds(lambda: total_kernel[(1,)](torch.ones(16), torch.zeros(1))) == ["float-atomic"]


# ---- integers and hints


@triton.jit
def offset_kernel(x_ptr, out_ptr, row, stride, WIDE: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
    i = tl.arange(0, 64)
    tl.store(out_ptr + i, tl.load(x_ptr + (row * stride - row * stride) + i))


@triton.jit
def program_kernel(x_ptr, out_ptr, stride, HOW: tl.constexpr):
    row = tl.program_id(0)
    if HOW == "wide":
        row = row.to(tl.int64)
    if HOW == "late":
        row = (tl.expand_dims(row + tl.arange(0, 1), 0) * stride).to(tl.int64)
    else:
        row = tl.expand_dims(row + tl.arange(0, 1), 0) * stride
    tl.store(out_ptr + row, tl.load(x_ptr + row))


def test_int32_wraps():
    x, out = torch.randn(64), torch.empty(64)
    assert kinds(lambda: offset_kernel[(1,)](x, out, 70_000, 152_064, WIDE=True)) == []
    assert kinds(lambda: offset_kernel[(1,)](x, out, 70_000, 152_064, WIDE=False)) == ["int32-wrap"]
    assert kinds(lambda: offset_kernel[(1,)](x, out, 7_000, 152_064, WIDE=False)) == []


@pytest.mark.parametrize(("how", "found"), [("wide", []), ("narrow", ["narrow-offset"]), ("late", ["narrow-offset"])])
def test_products_of_the_programs_number_are_wide_whatever_the_grid(how, found):
    assert kinds(lambda: program_kernel[(4,)](torch.randn(64), torch.empty(64), 16, HOW=how)) == found


@triton.jit
def identity(x):
    return x


@triton.jit
def hint_kernel(x_ptr, out_ptr, shift, step):
    at = identity(tl.multiple_of(shift, 16))  # a device function in between must not undo the check
    i = tl.max_contiguous(tl.multiple_of(at, 16) + tl.arange(0, 32) * step, 32)
    tl.store(out_ptr + tl.arange(0, 32), tl.load(x_ptr + i))


def test_hints_are_verified():
    x, out = torch.randn(256), torch.empty(32)
    assert kinds(lambda: hint_kernel[(1,)](x, out, 16, 1)) == []
    assert kinds(lambda: hint_kernel[(1,)](x, out, 3, 1)) == ["hint"]
    assert kinds(lambda: hint_kernel[(1,)](x, out, 16, 2)) == ["hint"]


# ---- the sanitizer itself


def test_it_leaves_the_interpreter_as_it_was():
    import triton.runtime.interpreter as interpreter

    def state():
        owners = (interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter.ReduceOps, interpreter.ScanOps)
        return (
            [dict(vars(owner)) for owner in owners],
            interpreter._patch_lang_core,
            interpreter.interpreter_builder.options,
        )

    before = state()
    with pytest.raises(ZeroDivisionError), Sanitizer():
        assert state() != before
        raise ZeroDivisionError
    assert state() == before
    with Sanitizer(), pytest.raises(RuntimeError, match="another one is active"), Sanitizer():
        pass
    assert state() == before


def test_device_asserts_are_on():
    @triton.jit
    def assert_kernel(x_ptr):
        tl.device_assert(tl.load(x_ptr) > 0, "positive")

    with Sanitizer():
        assert_kernel[(1,)](torch.ones(1))
        with pytest.raises(AssertionError, match="positive"):
            assert_kernel[(1,)](torch.zeros(1))
