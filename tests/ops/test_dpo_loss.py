from __future__ import annotations

import math

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck
from torch.nn.functional import logsigmoid

import rlhf_fast
from rlhf_fast.ops import dpo_loss
from rlhf_fast.ops.dpo_loss import Curve, answers, pair_loss
from rlhf_fast.reference import dpo_loss as reference

LEAVES = ("chosen_logprobs", "rejected_logprobs")
REFS = ("ref_chosen_logprobs", "ref_rejected_logprobs")
NAMES = ("loss", "chosen rewards", "rejected rewards", *LEAVES)


def run(kwargs, backend="cpp", function=dpo_loss, **options):
    """(loss, rewards of both, gradients of LEAVES) for an upstream gradient of 1.7."""
    inputs = {k: v.clone().requires_grad_() if k in LEAVES else v for k, v in kwargs.items()}
    with rlhf_fast.use_backend(backend):
        out = function(**inputs, **options)
        grads = torch.autograd.grad(1.7 * out.loss, [inputs[k] for k in LEAVES])
    return out.loss.detach(), *out[1:], *grads


def check(kwargs, **options):
    got = run(kwargs, **options)
    truth, plain = run(double(kwargs), "reference", **options), run(kwargs, "reference", **options)
    for g, t, p, name in zip(got, truth, plain, NAMES, strict=True):
        assert_parity(g, t, p, name, scale_of(kwargs, g, t))
    return got


def scale_of(kwargs, got, truth):
    """An fp64 truth is rounded like the result: both differ by what the sums of the log-probs are before they cancel."""
    if got.dtype is not torch.float64 or not truth.numel():
        return None
    terms = (kwargs[k].where(kwargs.get(k.replace("logprobs", "mask"), kwargs[k] < 1), 0.0) for k in LEAVES)
    return truth.abs().max().item() + sum(x.abs().sum().item() for x in terms) / max(1, truth.numel())


def without(kwargs, *names):
    return {k: v for k, v in kwargs.items() if k not in names}


OPTIONS = (
    {},
    {"label_smoothing": 0.1, "beta": 0.3},
    {"average": True, "beta": 2.0},
    {"normalizer": 7.0},
    {"normalizer": torch.tensor(3.0)},
)


# No pairs; no tokens; one token; odd tails of eight lanes; around a block; long enough to start a second thread.
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 33), (300, 3), (4, 257), (7, 9000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parity(shape, dtype):
    kwargs = reference.sample(shape, dtype=dtype)
    if shape == (5, 33):
        kwargs["chosen_mask"][1] = False  # an answer without a token is a pair nevertheless
        kwargs["mask"][1] = True
    for options in OPTIONS:
        got = check(kwargs, **options)
        assert got[0].dtype == dtype and got[3].shape == kwargs["chosen_logprobs"].shape


@pytest.mark.parametrize(
    "missing", [REFS, ("chosen_mask",), ("chosen_mask", "rejected_mask"), ("weights", "mask")], ids=str
)
def test_parity_without_a_tensor(missing):
    check(without(reference.sample((4, 300)), *missing), label_smoothing=0.2)


CURVES = (
    Curve(0.3, 0.7),
    Curve(0.3, 0.0, "logistic", 1.25, -0.25),
    Curve(0.3, 0.2, "hinge"),
    Curve(1.0, 5.0, "square"),
)


def of_curve(curve, average=False):
    def function(mask=None, weights=None, normalizer=None, **kwargs):
        sides = (
            answers("x", s, kwargs[f"{s}_logprobs"], kwargs.get(f"ref_{s}_logprobs"), kwargs.get(f"{s}_mask"), None)
            for s in ("chosen", "rejected")
        )
        return pair_loss("x", *sides, mask, weights, normalizer, 0.1, curve, average)

    return function


@pytest.mark.parametrize("curve", CURVES, ids=str)
@pytest.mark.parametrize("average", [False, True])
def test_parity_of_the_curves(curve, average):
    for seed in range(3):
        check(reference.sample((9, 20), seed=seed), function=of_curve(curve, average))
        check(reference.sample((9, 20), seed=seed, dtype=torch.float64), function=of_curve(curve, average))


def test_bf16_inputs_are_computed_in_fp32():
    kwargs = reference.sample((4, 37), dtype=torch.bfloat16)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in kwargs.items()}
    got, as_fp32 = run(kwargs), run(wide)
    assert got[0].dtype is torch.float32 and got[3].dtype is torch.bfloat16
    assert torch.equal(got[0], as_fp32[0]) and torch.equal(got[3], as_fp32[3].bfloat16())


def test_worked_values():
    # formulas by hand: D = 2, beta .1: -log sigmoid(.2); 1 / (1 + e^.2) of the mass moves either way
    tokens = {"chosen_logprobs": [-4.0, -6.0], "rejected_logprobs": [-12.0], REFS[0]: [-5.0, -6.0], REFS[1]: [-11.0]}
    kwargs = {k: torch.tensor([v], dtype=torch.float64) for k, v in tokens.items()}
    loss, chosen, rejected, *grads = run(kwargs)
    assert loss.item() == pytest.approx(0.5981389, abs=tolerances.WORKED)
    assert chosen.item() == pytest.approx(0.1) and rejected.item() == pytest.approx(-0.1)
    slope = 0.1 / (1 + math.exp(0.2))
    assert grads[0].tolist()[0] == pytest.approx([-1.7 * slope] * 2) and grads[1].item() == pytest.approx(1.7 * slope)
    smoothed = dpo_loss(**kwargs, label_smoothing=0.1).loss.item()
    assert smoothed == pytest.approx(0.9 * 0.5981389 + 0.1 * 0.7981389, abs=tolerances.WORKED)
    # means: log-ratios 1/2 and -1
    assert dpo_loss(**kwargs, average=True).loss.item() == pytest.approx(-logsigmoid(torch.tensor(0.15)).item())


def test_thousands_of_nats_keep_the_digits_of_their_difference():
    g = torch.Generator().manual_seed(0)
    policy = -8 * torch.rand(2, 1, 4096, generator=g)
    ref = policy + 1e-3 * torch.randn(2, 1, 4096, generator=g)
    out = dpo_loss(*policy, *ref, beta=1.0)
    gap = (policy.double() - ref.double()).sum((1, 2))
    torch.testing.assert_close(out.chosen_rewards.double(), gap[:1], rtol=1e-6, atol=0)
    assert out.loss.item() == pytest.approx(-logsigmoid(gap[0] - gap[1]).item(), rel=1e-6)


def test_extreme_gaps_stay_finite():
    for smoothing in (0.0, 0.2):
        rows = torch.tensor([[1e4], [-1e4], [1e30], [-1e30]])
        loss, _, _, chosen, rejected = run(
            {"chosen_logprobs": rows, "rejected_logprobs": -rows}, beta=1.0, label_smoothing=smoothing, normalizer=1.0
        )
        assert loss.isfinite() and chosen.isfinite().all() and torch.equal(chosen, -rejected)
        sure, wrong = 1.7 * smoothing, 1.7 * (smoothing - 1)
        torch.testing.assert_close(chosen[:, 0], torch.tensor([sure, wrong, sure, wrong]))


def test_masked_tokens_and_pairs_are_never_read():
    kwargs = reference.sample((6, 70))
    clean = run(kwargs)
    for poison in (float("nan"), float("inf"), -1e30):
        dirty = {k: v.clone() for k, v in kwargs.items()}
        for side in ("chosen", "rejected"):
            real = kwargs[f"{side}_mask"] & kwargs["mask"][:, None]
            for name in (f"{side}_logprobs", f"ref_{side}_logprobs"):
                dirty[name][~real] = poison
        dirty["weights"][~kwargs["mask"]] = poison
        assert all(torch.equal(a, b) for a, b in zip(clean, run(dirty), strict=True))
        plain = zip(run(kwargs, "reference"), run(dirty, "reference"), strict=True)
        assert all(torch.equal(a, b) for a, b in plain)
    assert not clean[3][~kwargs["chosen_mask"]].any() and not clean[3][~kwargs["mask"]].any()
    assert not clean[1][~kwargs["mask"]].any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_everything_masked_gives_zero(backend):
    kwargs = reference.sample((3, 9))
    kwargs["mask"][:] = False
    assert not any(x.any() for x in run(kwargs, backend))
    assert not run(kwargs, backend, normalizer=torch.tensor(0.0))[0]


def test_a_nan_on_a_real_token_stays_in_its_pair():
    kwargs = without(reference.sample((3, 40)), "mask")
    clean = run(kwargs)
    kwargs["chosen_logprobs"][1, kwargs["chosen_mask"][1].nonzero()[0]] = float("nan")
    got = run(kwargs)
    assert got[0].isnan() and got[1][1].isnan() and got[3][1][kwargs["chosen_mask"][1]].isnan().all()
    others = torch.tensor([0, 2])
    assert torch.equal(got[3][others], clean[3][others]) and torch.equal(got[4][others], clean[4][others])


def packed(kwargs, lengths):
    """The same with the first lengths[side] tokens of every answer, one after the other."""
    found = {k: v for k, v in kwargs.items() if v.dim() == 1}
    for side, n in lengths.items():
        n = torch.tensor(n)
        names = (f"{side}_logprobs", f"ref_{side}_logprobs", f"{side}_mask")
        inside = torch.arange(kwargs[names[0]].shape[1]) < n[:, None]
        found |= {k: kwargs[k][inside] for k in names}
        found[f"{side}_cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), n.cumsum(0)])
        kwargs[f"{side}_mask"] &= inside
    return found, kwargs


@pytest.mark.parametrize("average", [False, True])
def test_packed_equals_padded(average):
    lengths = {"chosen": [300, 0, 17, 1, 300], "rejected": [5, 9, 0, 304, 304]}
    flat, kwargs = packed(reference.sample((5, 300)), lengths)
    padded, got = run(kwargs, average=average), run(flat, average=average)
    assert all(torch.equal(a, b) for a, b in zip(padded[:3], got[:3], strict=True))
    for side, name, a, b in zip(lengths, LEAVES, padded[3:], got[3:], strict=True):
        inside = torch.arange(kwargs[name].shape[1]) < torch.tensor(lengths[side])[:, None]
        assert torch.equal(a[inside], b)
    check(flat, average=average)


def test_micro_batches_that_share_a_normalizer_add_up():
    kwargs = reference.sample((8, 29))
    counted = kwargs["mask"].sum()
    whole = run(kwargs)
    parts = [run({k: v[i] for k, v in kwargs.items()}, normalizer=counted.float()) for i in (slice(3), slice(3, 8))]
    for i in (1, 2, 3, 4):
        assert torch.equal(torch.cat([p[i] for p in parts]), whole[i])
    assert sum(p[0].double() for p in parts).item() == pytest.approx(whole[0].item(), rel=1e-6)


@pytest.mark.parametrize("packs", [False, True])
def test_threads_instruction_sets_and_the_batch_change_no_bit(each_isa, packs):
    kwargs = reference.sample((40, 701))
    if packs:
        kwargs, _ = packed(kwargs, {"chosen": [701 - 9 * i for i in range(40)], "rejected": list(range(40))})
    call = lambda: run(kwargs, normalizer=9.0)
    torch.set_num_threads(2)
    results = [r for _, r in each_isa(call)]
    torch.set_num_threads(1)
    results.append(call())
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
    if not packs:
        alone = run({k: v[7:8] for k, v in kwargs.items()}, normalizer=9.0)
        assert all(torch.equal(a, b[7:8]) for a, b in zip(alone[1:], results[0][1:], strict=True))


def test_results_too_large_for_the_caches(each_isa):
    kwargs = reference.sample((3, 400_003))
    kwargs["mask"][:] = True

    def rows_alone():
        whole = run(kwargs, normalizer=9.0)
        for i in range(3):
            alone = run({k: v[i : i + 1] for k, v in kwargs.items()}, normalizer=9.0)
            assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone[1:], whole[1:], strict=True))

    each_isa(rows_alone)


@pytest.mark.parametrize("curve", [None, *CURVES], ids=str)
def test_gradcheck(curve):
    kwargs = double(reference.sample((4, 6)))
    inputs = [kwargs.pop(k).requires_grad_() for k in LEAVES]
    function = dpo_loss if curve is None else of_curve(curve)
    call = lambda c, r: function(chosen_logprobs=c, rejected_logprobs=r, **kwargs).loss
    assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)
    with rlhf_fast.use_backend("reference"):
        assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)


def op_args(kwargs, wanted):
    names = (*LEAVES, *REFS, "chosen_mask", "rejected_mask", "mask", "weights")
    tensors = [kwargs.get(k) for k in names]
    return (*tensors, None, None, None, 0.1, 0.1, 0.0, "logistic", 0.9, 0.1, True, 0.0, wanted)


@pytest.mark.parametrize("wanted", [[False, False], [True, False], [True, True]])
def test_opcheck(wanted):
    kwargs = reference.sample((3, 9))
    leaves = {k: v.requires_grad_(wanted[LEAVES.index(k)]) if k in LEAVES else v for k, v in kwargs.items()}
    opcheck(torch.ops.rlhf_fast.dpo_loss.default, op_args(leaves, wanted))
    opcheck(torch.ops.rlhf_fast.dpo_loss.default, op_args({k: leaves[k] for k in LEAVES}, wanted))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_compile_gives_the_eager_result_and_gradient(backend):
    kwargs = reference.sample((3, 9))
    leaves = [kwargs.pop(k).requires_grad_() for k in LEAVES]
    call = lambda c, r: 3 * dpo_loss(c, r, **kwargs, beta=0.5).loss
    with rlhf_fast.use_backend(backend):
        eager = torch.autograd.grad(call(*leaves), leaves)
        compiled = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, atol=tolerances.FLOOR[torch.float32], rtol=0)


def test_only_the_policys_log_probs_get_a_gradient():
    for backend in ("cpp", "reference"):
        kwargs = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in reference.sample((3, 9)).items()}
        with rlhf_fast.use_backend(backend):
            out = dpo_loss(**kwargs)
            out.loss.backward()
        assert all((v.grad is not None) == (k in LEAVES) for k, v in kwargs.items())
        assert not out.chosen_rewards.requires_grad
    one = {k: v.detach() for k, v in kwargs.items()} | {"rejected_logprobs": kwargs["rejected_logprobs"]}
    before = kwargs["rejected_logprobs"].grad.clone()
    dpo_loss(**one).loss.backward()
    torch.testing.assert_close(kwargs["rejected_logprobs"].grad, 2 * before)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_backwards_agree_and_the_last_one_may_use_the_memory_of_the_forward(scale):
    kwargs = reference.sample((3, 9))
    leaves = [kwargs[k].requires_grad_() for k in LEAVES]
    loss, upstream = dpo_loss(**kwargs).loss, torch.tensor(scale)
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, upstream, retain_graph=True)]
    for g in torch.autograd.grad(loss, leaves, upstream, retain_graph=True):
        g.fill_(7.0)
    loss.backward(upstream)
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(leaves, first, strict=True)) and upstream == scale
    dpo_loss(**kwargs).loss.backward(upstream)  # adds to .grad in place
    assert all(torch.equal(leaf.grad, 2 * g) for leaf, g in zip(leaves, first, strict=True))


def test_a_second_derivative_is_refused():
    kwargs = reference.sample((2, 5))
    leaf = kwargs["chosen_logprobs"].requires_grad_()
    (grad,) = torch.autograd.grad(dpo_loss(**kwargs).loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="dpo_loss: the second derivative is not available"):
        grad.sum().backward()


def test_strided_inputs_and_inputs_are_not_changed():
    kwargs = reference.sample((12, 7))
    copies = {k: v.clone() for k, v in kwargs.items()}
    expected = run(kwargs)
    got = run({k: v.T.contiguous().T if v.dim() == 2 else v for k, v in kwargs.items()})
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert all(torch.equal(kwargs[k], copies[k]) for k in kwargs)


def test_meta_tensors_have_shapes_and_no_data():
    x = torch.zeros(2, 3, device="meta", requires_grad=True)
    out = dpo_loss(x, torch.zeros(2, 5, device="meta"))
    assert out.loss.shape == () and out.loss.is_meta and out.chosen_rewards.shape == (2,)


Z = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_logprobs": Z.int()}, "'chosen_logprobs' got torch.int32"),
        (
            {"chosen_logprobs": torch.zeros(6)},
            r"'chosen_logprobs' got shape \(6,\), expected \(B, T\), or chosen_cu_seqlens",
        ),
        ({"rejected_logprobs": torch.zeros(3, 3)}, "'rejected_logprobs' got 3 answers, expected 2"),
        ({"rejected_logprobs": torch.zeros(2, 3, device="meta")}, "'rejected_logprobs' got device meta"),
        ({"ref_chosen_logprobs": torch.zeros(2, 4)}, r"'ref_chosen_logprobs' got shape \(2, 4\), expected \(2, 3\)"),
        ({"ref_chosen_logprobs": Z}, "'ref_rejected_logprobs' got None, expected a tensor with ref_chosen_logprobs"),
        ({"ref_rejected_logprobs": Z}, "'ref_chosen_logprobs' got None, expected a tensor with ref_rejected_logprobs"),
        ({"chosen_mask": Z}, "'chosen_mask' got torch.float32"),
        ({"rejected_mask": torch.ones(2, 4).bool()}, "'rejected_mask' got shape"),
        (
            {"chosen_cu_seqlens": torch.tensor([0, 6])},
            r"'chosen_logprobs' got shape \(2, 3\), expected \(N,\) with chosen_cu",
        ),
        ({"beta": 0.0}, "'beta' got 0.0"),
        ({"label_smoothing": 0.5}, "'label_smoothing' got 0.5"),
        ({"mask": Z}, "'mask' got torch.float32"),
        ({"mask": torch.ones(3).bool()}, r"'mask' got shape \(3,\), expected \(2,\)"),
        ({"weights": torch.ones(3)}, r"'weights' got shape \(3,\)"),
        ({"weights": torch.ones(2).int()}, "'weights' got torch.int32"),
        ({"normalizer": 0.0}, "'normalizer' got 0.0"),
        ({"normalizer": torch.ones(2)}, "'normalizer' got shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match="dpo_loss: argument " + message):
        dpo_loss(**{"chosen_logprobs": Z, "rejected_logprobs": Z, **change})
