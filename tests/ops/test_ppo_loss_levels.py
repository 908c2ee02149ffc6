"""ppo_loss with the ratio of a whole row, and with a surrogate that is not the clip."""

from __future__ import annotations

import inspect

import pytest
import tolerances
import torch
from level_parity import CARRIED, PAIRS, check_parity, loss_of, run
from parity import assert_parity, double
from ppo_parity import FULL, GRADIENTS, LEAVES
from torch.library import opcheck

import rlhf_fast
from rlhf_fast._op import OPS
from rlhf_fast.ops.ppo_loss import PPO, arguments, ppo_loss
from rlhf_fast.reference import ppo_loss as reference
from rlhf_fast.reference._reduce import REDUCTIONS

each_pair = pytest.mark.parametrize(("level", "surrogate"), PAIRS)


def check(pair, kwargs, **options):
    got = run(pair, kwargs, **options)
    check_parity(got, pair, kwargs, **options)
    return got


# Empty; one token; a block and its neighbours; many short rows; long enough to start a second thread.
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 7), (2, 257), (300, 5), (17, 1100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_pair
def test_parity_with_every_term(level, surrogate, shape, dtype):
    kwargs = reference.sample(shape, dtype=dtype)
    if shape == (5, 7):
        kwargs["mask"][2] = False
    for reduction in REDUCTIONS:
        got = check((level, surrogate), kwargs, **FULL, reduction=reduction, dual_clip=1.5)
        assert got["loss"].dtype == dtype and got["d logprobs"].dtype == dtype


@each_pair
def test_bounds_of_tokens_and_of_rows(level, surrogate):
    kwargs = reference.sample((6, 40), dtype=torch.float64)
    kwargs["logprobs"] = kwargs["old_logprobs"] + torch.tensor([0.0, 12.0, 30.0, -30.0, 0.4, 0.001])[:, None]
    kwargs["logprobs"][4, ::3] -= 25
    for clip in (0.2, (1.0, 4.0), (0.05, 9.0)):
        got = check((level, surrogate), kwargs, clip=clip)
    assert got["ratio_clamped"] == (kwargs["mask"][2:4].sum() + kwargs["mask"][4, ::3].sum())


@pytest.mark.parametrize("missing", ["entropy", "ref_logprobs", "importance_weights"])
@pytest.mark.parametrize("pair", CARRIED)
def test_a_row_shares_its_gradient_among_its_tokens(pair, missing):
    kwargs = reference.sample((4, 300), dtype=torch.float64)
    kwargs["importance_weights"] = kwargs["importance_weights"].abs()
    del kwargs[missing]
    options = {"entropy_coef": 0.01 if "entropy" in kwargs else 0.0}
    inputs = {k: v.clone().requires_grad_() if k in LEAVES else v for k, v in kwargs.items()}
    found = []
    for backend in ("cpp", "reference"):
        with rlhf_fast.use_backend(backend):
            loss = loss_of(pair, **inputs, **options, clip=(0.9, 9.0), reduction="seq-mean-token-mean").loss
        found.append(torch.autograd.grad(loss, inputs["logprobs"])[0])
    assert_parity(*found, None, "gradient", 1.0)
    for row, mask in zip(found[0], kwargs["mask"], strict=True):
        assert (row[mask] == row[mask][0]).all() and not row[~mask].any() and row[mask][0] != 0


@each_pair
def test_masked_tokens_are_never_read(level, surrogate):
    kwargs = reference.sample((6, 70))
    kwargs["mask"][4] = False
    clean = run((level, surrogate), kwargs, **FULL)
    for poison in (float("nan"), float("inf"), -1e30):
        dirty = {k: v if k == "mask" else v.where(kwargs["mask"], poison) for k, v in kwargs.items()}
        got = run((level, surrogate), dirty, **FULL)
        assert all(torch.equal(clean[k], got[k]) for k in clean)
    assert not clean["d logprobs"][~kwargs["mask"]].any()


@each_pair
def test_a_nan_on_a_real_token_stays_in_its_row(level, surrogate):
    kwargs = reference.sample((3, 400))
    clean = run((level, surrogate), kwargs, **FULL)
    kwargs["mask"][1, 5] = True
    kwargs["old_logprobs"][1, 5] = float("nan")
    got = run((level, surrogate), kwargs, normalizer=clean["tokens"], **FULL)
    other = torch.tensor([0, 2])
    assert torch.equal(got["d logprobs"][other], clean["d logprobs"][other])
    assert got["loss"].isnan() or surrogate == "score"
    if (level, surrogate) in CARRIED:
        assert got["d logprobs"][1][kwargs["mask"][1]].isnan().all()


def uneven():
    """Lengths with rows over many chunks of tokens, rows of one token, and rows without any at either end."""
    lengths = torch.tensor([0, 3000, 1, 1, 0, 5, 1024, 0, 0, 7, 5000, 1, *[2] * 700, 300, 0, 0])
    return lengths, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


@each_pair
def test_packed_rows_of_every_length(level, surrogate):
    lengths, cu_seqlens = uneven()
    kwargs = reference.sample((int(lengths.sum()),))
    for reduction in REDUCTIONS:
        whole = check((level, surrogate), kwargs, **FULL, reduction=reduction, cu_seqlens=cu_seqlens)
    counts = {"normalizer": 7.0, "reduction": reduction}
    whole = run((level, surrogate), kwargs, **counts, cu_seqlens=cu_seqlens)
    for row in (1, 2, 6, 10, 500, 712):
        at = slice(cu_seqlens[row], cu_seqlens[row + 1])
        alone = run((level, surrogate), {k: v[None, at] for k, v in kwargs.items()}, **counts)
        assert all(torch.equal(alone[k][0], whole[k][at]) for k in GRADIENTS)


@pytest.mark.parametrize("pair", [*CARRIED, ("sequence-token", "clip"), ("token", "cispo")])
def test_threads_and_instruction_sets_give_the_same_bits(each_isa, pair):
    kwargs = reference.sample((40, 701))
    call = lambda: list(run(pair, kwargs, reduction="seq-mean-token-mean", **FULL).values())
    torch.set_num_threads(2)
    results = [r for _, r in each_isa(call)]
    torch.set_num_threads(1)
    results.append(call())
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("pair", [*CARRIED, ("token", "cispo")])
def test_results_too_large_for_the_caches(each_isa, pair):
    kwargs = reference.sample((4, 262_139))
    found = lambda x: [run(pair, x, normalizer=100.0, **FULL)[k] for k in GRADIENTS]

    def rows_alone():
        whole = found(kwargs)
        for i in range(4):
            alone = found({k: v[i : i + 1] for k, v in kwargs.items()})
            assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))

    each_isa(rows_alone)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pair", [*CARRIED, ("token", "score")])
def test_gradcheck(pair, reduction):
    kwargs = double(reference.sample((3, 6)))
    inputs = [kwargs.pop(k).requires_grad_() for k in LEAVES]

    def call(logprobs, entropy, values):
        terms = {"entropy": entropy, "values": values, "reduction": reduction, **FULL}
        return loss_of(pair, logprobs=logprobs, **kwargs, **terms).loss

    assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)


@each_pair
def test_opcheck_and_compilation(level, surrogate):
    torch._dynamo.reset()  # or one pair too many would count as a recompilation
    kwargs = reference.sample((3, 9))
    leaves = [kwargs[k].requires_grad_() for k in LEAVES]
    bound = inspect.signature(ppo_loss).bind(**kwargs, reduction="seq-mean-token-mean")
    bound.apply_defaults()
    inputs = arguments("ppo_loss", "logprobs", *bound.arguments.values())
    opcheck(torch.ops.rlhf_fast.ppo_loss.default, (*inputs, level, surrogate, True))
    rest = {k: v for k, v in kwargs.items() if k not in LEAVES}

    def call(logprobs, entropy, values):
        return 3 * loss_of((level, surrogate), logprobs=logprobs, entropy=entropy, values=values, **rest).loss

    eager = torch.autograd.grad(call(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, atol=tolerances.FLOOR[torch.float32], rtol=0)


@each_pair
def test_the_triton_kernel_serves_what_the_cuda_kernel_declines_with_a_reason(level, surrogate):
    kwargs = reference.sample((2, 3))
    bound = inspect.signature(ppo_loss).bind(**kwargs)
    bound.apply_defaults()
    inputs = arguments("ppo_loss", "logprobs", *bound.arguments.values())
    cuda, triton = (backend for backend in OPS["ppo_loss"].backends if backend.device == "cuda")
    assert (cuda.name, triton.name) == ("cuda", "triton")
    assert cuda.declines(*inputs, *PPO, True) is None
    declined = f"{surrogate} at the level of the {level} is left to the next backend"
    served = (level, surrogate) == ("token", "cispo")
    assert cuda.declines(*inputs, level, surrogate, True) == (None if served else declined)
    assert triton.declines(*inputs, level, surrogate, True) is None
    doubles = tuple(double(dict(enumerate(inputs))).values())
    assert triton.declines(*doubles, level, surrogate, True) == "fp64 is left to the reference"
