from __future__ import annotations

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.ops.gae import _gae
from rlhf_fast.reference import gae as reference


def both(kwargs, **options):
    got = rlhf_fast.gae(**kwargs, **options)
    with rlhf_fast.use_backend("reference"):
        truth = rlhf_fast.gae(**double(kwargs), **options)
        plain = rlhf_fast.gae(**kwargs, **options)
    return got, truth, plain


# 1 token; shorter and longer than any vector; more rows than threads; long enough to start a second thread.
@pytest.mark.parametrize("shape", [(1, 1), (3, 0), (0, 5), (5, 7), (4, 33), (9, 128), (64, 1024)], ids=str)
@pytest.mark.parametrize("gap", ["carry", "decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parity(shape, gap, dtype):
    kwargs = reference.sample(shape, dtype=dtype)
    got, truth, plain = both(kwargs, gap=gap, gamma=0.97, lam=0.9)
    for g, t, p, name in zip(got, truth, plain, ("advantages", "returns"), strict=True):
        assert g.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert_parity(g, t, p, name)


def test_worked_values():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    advantages, returns = rlhf_fast.gae(rewards, values)
    torch.testing.assert_close(advantages, torch.tensor([[0.46575, 0.385, 0.3]]), atol=tolerances.WORKED, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[0.96575, 0.985, 1.0]]), atol=tolerances.WORKED, rtol=0)
    advantages, _ = rlhf_fast.gae(rewards, values, bootstrap=torch.tensor([0.8]))
    torch.testing.assert_close(advantages, torch.tensor([[1.18775, 1.145, 1.1]]), atol=tolerances.WORKED, rtol=0)
    slot_after_eos, _ = rlhf_fast.gae(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7, 0.65]]))
    expected = torch.tensor([[0.44995625, 0.368375, 0.2825, 0.35]])
    torch.testing.assert_close(slot_after_eos, expected, atol=tolerances.WORKED, rtol=0)


def test_lambda_one_telescopes_to_the_discounted_return():
    kwargs = double(reference.sample((6, 40), gaps=False))
    kwargs["mask"] = None
    advantages, returns = rlhf_fast.gae(**kwargs, gamma=0.9, lam=1.0)
    expected = torch.zeros(6, 41, dtype=torch.float64)
    expected[:, 40] = kwargs["bootstrap"]
    for t in reversed(range(40)):
        expected[:, t] = kwargs["rewards"][:, t] + 0.9 * expected[:, t + 1]
    torch.testing.assert_close(advantages + kwargs["values"], expected[:, :40])
    torch.testing.assert_close(returns, expected[:, :40])


def test_lambda_zero_is_the_td_error_and_the_exact_critic_has_no_advantage():
    rewards, values = torch.full((2, 6), 0.5), torch.arange(6, 0, -1) * 0.5
    advantages, _ = rlhf_fast.gae(rewards, values.expand(2, 6).contiguous())
    assert advantages.abs().max() <= tolerances.FLOOR[torch.float32]
    r, v = torch.randn(3, 9), torch.randn(3, 9)
    td = r + torch.cat([v[:, 1:], torch.zeros(3, 1)], 1) - v
    torch.testing.assert_close(rlhf_fast.gae(r, v, lam=0.0)[0], td)


@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_packed_equals_padded_and_empty_sequences_are_allowed(gap):
    kwargs = reference.sample((5, 12))
    lengths = torch.tensor([12, 0, 5, 1, 12])
    inside = torch.arange(12)[None] < lengths[:, None]
    kwargs["mask"] &= inside
    padded = rlhf_fast.gae(**kwargs, gap=gap)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    packed = rlhf_fast.gae(
        kwargs["rewards"][inside], kwargs["values"][inside], kwargs["mask"][inside],
        bootstrap=kwargs["bootstrap"], cu_seqlens=cu_seqlens, gap=gap,
    )  # fmt: skip
    for a, b in zip(padded, packed, strict=True):
        assert torch.equal(a[inside], b)
    with rlhf_fast.use_backend("reference"):
        oracle = rlhf_fast.gae(
            kwargs["rewards"][inside], kwargs["values"][inside], kwargs["mask"][inside],
            bootstrap=kwargs["bootstrap"], cu_seqlens=cu_seqlens, gap=gap,
        )  # fmt: skip
    assert_parity(packed[0], oracle[0].double(), oracle[0])


@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_masked_values_are_never_read(gap):
    kwargs = reference.sample((6, 20))
    clean = rlhf_fast.gae(**kwargs, gap=gap)
    for poison in (float("nan"), float("inf"), 1e30):
        dirty = {k: v.clone() for k, v in kwargs.items()}
        dirty["rewards"][~dirty["mask"]] = poison
        dirty["values"][~dirty["mask"]] = poison
        got = rlhf_fast.gae(**dirty, gap=gap)
        assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))
        assert got[0][~dirty["mask"]].abs().sum() == 0 and got[1][~dirty["mask"]].abs().sum() == 0


def test_a_nan_stays_in_its_row():
    r, v = torch.randn(3, 8), torch.randn(3, 8)
    clean = rlhf_fast.gae(r, v)[0]
    r[1, 4] = float("nan")
    got = rlhf_fast.gae(r, v)[0]
    assert (
        torch.equal(got[[0, 2]], clean[[0, 2]]) and got[1, :5].isnan().all() and torch.equal(got[1, 5:], clean[1, 5:])
    )


@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_gradcheck(gap):
    kwargs = double(reference.sample((3, 9)))
    floats = [kwargs[k].requires_grad_() for k in ("rewards", "values", "bootstrap")]

    def call(r, v, b):
        return rlhf_fast.gae(r, v, kwargs["mask"], bootstrap=b, gamma=0.9, gap=gap)

    assert torch.autograd.gradcheck(call, floats, **tolerances.GRADCHECK)
    with rlhf_fast.use_backend("reference"):
        assert torch.autograd.gradcheck(call, floats, **tolerances.GRADCHECK)


def test_opcheck():
    kwargs = reference.sample((3, 9))
    for grad in (False, True):
        r, v, b = (kwargs[k].clone().requires_grad_(grad) for k in ("rewards", "values", "bootstrap"))
        opcheck(torch.ops.rlhf_fast.gae.default, (r, v, kwargs["mask"], b, None, 0.9, 0.95, False))
        opcheck(torch.ops.rlhf_fast.gae.default, (r, v, None, None, None, 1.0, 0.95, True))


def test_compile_gives_the_eager_result_and_gradient():
    kwargs = reference.sample((3, 9))
    r = kwargs["rewards"].requires_grad_()
    call = lambda x: rlhf_fast.gae(x, kwargs["values"], kwargs["mask"])[0].square().sum()
    (eager,) = torch.autograd.grad(call(r), r)
    (compiled,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(r), r)
    assert torch.equal(eager, compiled)


def test_rows_do_not_depend_on_the_batch_or_on_threads():
    kwargs = reference.sample((70, 700))
    torch.set_num_threads(2)
    whole = rlhf_fast.gae(**kwargs)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(whole, rlhf_fast.gae(**kwargs), strict=True))
    for i in (0, 33, 69):
        alone = rlhf_fast.gae(**{k: v[i : i + 1] for k, v in kwargs.items()})
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))


def test_every_instruction_set_gives_the_same_bits(each_isa):
    kwargs = reference.sample((9, 130))
    results = each_isa(lambda: rlhf_fast.gae(**kwargs))
    assert all(torch.equal(a, b) for _, r in results for a, b in zip(results[0][1], r, strict=True))


def test_strided_inputs():
    kwargs = reference.sample((12, 7))
    expected = rlhf_fast.gae(**kwargs)
    strided = {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in kwargs.items()}
    assert all(torch.equal(a, b) for a, b in zip(expected, rlhf_fast.gae(**strided), strict=True))
    three = {k: v.reshape(3, 4, *v.shape[1:]) for k, v in kwargs.items()}
    assert torch.equal(rlhf_fast.gae(**three)[0], expected[0].reshape(3, 4, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 4)}, r"gae: argument 'values' got shape \(2, 4\), expected \(2, 3\)"),
        ({"values": torch.zeros(2, 3, dtype=torch.int8)}, "gae: argument 'values' got torch.int8"),
        ({"mask": torch.ones(2, 3)}, "gae: argument 'mask' got torch.float32, expected torch.bool"),
        ({"bootstrap": torch.zeros(3)}, r"gae: argument 'bootstrap' got shape \(3,\), expected \(2,\)"),
        ({"gamma": 1.5}, r"gae: argument 'gamma' got 1.5, expected a finite number in \[0.0, 1.0\]"),
        ({"lam": float("nan")}, "gae: argument 'lam' got nan"),
        ({"gap": "skip"}, "gae: argument 'gap' got 'skip', expected one of 'carry', 'decay'"),
        ({"values": torch.zeros(2, 3, device="meta")}, "gae: argument 'values' got device meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    kwargs = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        rlhf_fast.gae(**kwargs)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 6], [0, 4, 2, 6], []], ids=str)
def test_bad_cu_seqlens_are_refused(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"):
        rlhf_fast.gae(torch.zeros(6), torch.zeros(6), cu_seqlens=torch.tensor(bounds, dtype=torch.int64))


def test_meta_tensors_have_shapes_and_no_data():
    a, r = _gae(torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, device="meta"), None, None, None, 1.0, 0.9, False)
    assert a.shape == r.shape == (2, 3) and a.is_meta
