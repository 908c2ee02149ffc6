from __future__ import annotations

import pytest
import tolerances
import torch
from parity import assert_parity, double

import rlhf_fast
from rlhf_fast import gae, gdpo_advantages, group_advantages, lambda_returns, length_adaptive_lambda, vtrace
from rlhf_fast._scan import CHUNK
from rlhf_fast.ops.gae import GAPS, _by_lam, _by_scan
from rlhf_fast.ops.group_advantages import COMPOSED, FORMULAS
from rlhf_fast.reference import gae as gae_source
from rlhf_fast.reference import group_advantages as group_source


def tokens(shape=(5, 12), dtype=torch.float64, seed=0):
    """Keyword arguments of vtrace: ragged rows with gaps, one of them empty."""
    kwargs = gae_source.sample(shape, dtype=dtype, seed=seed)
    kwargs["mask"][1] = False
    g = torch.Generator().manual_seed(seed + 9)
    for name in ("logprobs", "old_logprobs"):
        kwargs[name] = -torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)
    return kwargs


def only(kwargs, *left_out):
    return {k: v for k, v in kwargs.items() if k not in left_out}


POLICIES = ("logprobs", "old_logprobs")


def returns_of(**kwargs):
    return (lambda_returns(**only(kwargs, *POLICIES)),)


ESTIMATORS = pytest.mark.parametrize("estimate", [returns_of, vtrace])


def test_lambda_returns_have_the_values_of_rlax():
    # rlax 0.1, _src/multistep_test.py, LambdaReturnsTest: its v_t are the values after the step.
    r = torch.tensor([[1.0, 0.0, -1.0, 0.0, 1.0], [0.5, 0.8, -0.7, 0.0, 2.1]])
    discount = torch.tensor([[0.5, 0.9, 1.0, 0.5, 0.8], [0.9, 0.5, 0.3, 0.8, 0.7]])
    v = torch.tensor([[3.0, 1.0, 5.0, -5.0, 3.0], [-1.7, 1.2, 2.3, 2.2, 2.7]])
    before = torch.cat([torch.full((2, 1), 7.0), v[:, :-1]], 1)
    got = lambda_returns(r, before, gamma=discount, lam=0.75, bootstrap=v[:, -1])
    expected = [[1.6460547, 0.72281253, 0.7375001, 0.6500001, 3.4], [0.7866317, 0.9913063, 0.1101501, 2.834, 3.99]]
    torch.testing.assert_close(got, torch.tensor(expected), atol=0, rtol=1e-5)


def test_vtrace_has_the_values_of_rlax():
    # rlax, _src/vtrace_test.py, test_vtrace_td_error_and_advantage, at the tolerance of that test.
    behaviour = torch.tensor(
        [[[8.9, 0.7], [5.0, 1.0], [0.6, 0.1], [-0.9, -0.1]], [[0.3, -5.0], [1.0, -8.0], [0.3, 1.7], [4.7, 3.3]]]
    )
    target = torch.tensor(
        [[[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]], [[1.0, 0.9], [1.0, -1.0], [-4.3, 8.7], [0.8, 0.3]]]
    )
    actions = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]])
    values = torch.tensor([[2.1, 1.1, -3.1, 0.0], [3.1, 0.1, -1.1, 7.4]])
    out = vtrace(
        torch.tensor([[-1.3, -1.3, 2.3, 42.0], [1.3, 5.3, -3.3, -5.0]]),
        values,
        *(rlhf_fast.token_logprobs(x, actions).logprobs for x in (target, behaviour)),
        gamma=torch.tensor([[0.0, 0.89, 0.85, 0.99], [0.88, 1.0, 0.83, 0.95]]),
        bootstrap=torch.tensor([8.4, -1.2]),
    )
    errors = [[-1.6155143, -3.4973226, 1.8670533, 50.316002], [1.4662437, 3.6116405, -8.3327293e-5, -13.54]]
    advantages = [[-1.6155143, -3.4973226, 1.8670534, 50.316002], [1.4662433, 3.6116405, -8.3369283e-5, -13.54]]
    torch.testing.assert_close(out.returns - values, torch.tensor(errors), rtol=1e-3, atol=tolerances.WORKED)
    torch.testing.assert_close(out.advantages, torch.tensor(advantages), rtol=1e-3, atol=tolerances.WORKED)


def test_worked_values_with_termination_and_truncation():
    # formulas.md 4.2: termination after t = 1, truncation after t = 3 with bootstrap .6; two episodes in one row by a discount of
    # 0, or packed.
    r, v = torch.tensor([1.0, 0.0, 2.0, 1.0]).double(), torch.tensor([0.5, 0.4, 0.3, 0.2]).double()
    expected = torch.tensor([1.072, 0.0, 3.1448, 1.54]).double()
    discount = torch.tensor([[0.9, 0.0, 0.9, 0.9]]).double()
    one = lambda_returns(r[None], v[None], gamma=discount, lam=0.8, bootstrap=torch.tensor([0.6]).double())
    torch.testing.assert_close(one[0], expected)
    packed = {
        "gamma": 0.9,
        "lam": 0.8,
        "bootstrap": torch.tensor([0.0, 0.6]).double(),
        "cu_seqlens": torch.tensor([0, 2, 4]),
    }
    torch.testing.assert_close(lambda_returns(r, v, **packed), expected)
    torch.testing.assert_close(gae(r, v, **packed)[1], expected)
    torch.testing.assert_close(gae(r, v, **packed)[0], torch.tensor([0.572, -0.4, 2.8448, 1.34]).double())


def test_worked_values_of_the_response():
    r, v = torch.tensor([[0.0, 0.0, 1.0]]).double(), torch.tensor([[0.5, 0.6, 0.7]]).double()
    torch.testing.assert_close(lambda_returns(r, v), torch.tensor([[0.96575, 0.985, 1.0]]).double())
    more = lambda_returns(r, v, bootstrap=torch.tensor([0.8]).double())
    torch.testing.assert_close(more - v, torch.tensor([[1.18775, 1.145, 1.1]]).double())


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_on_policy_every_estimator_is_gae(lam, gamma):
    kwargs = tokens((6, 77))
    advantages, returns = gae(**only(kwargs, *POLICIES), gamma=gamma, lam=lam)
    torch.testing.assert_close(lambda_returns(**only(kwargs, *POLICIES), gamma=gamma, lam=lam), returns)
    out = vtrace(**{**kwargs, "old_logprobs": kwargs["logprobs"]}, gamma=gamma, lam=lam)
    torch.testing.assert_close(out.returns, returns)
    torch.testing.assert_close(out.advantages, advantages)


def step_by_step(rewards, values, logprobs, old_logprobs, mask, bootstrap, gamma, lam, rho_clip, pg_clip):
    """V-trace of one row as Espeholt et al. write it, token after token."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    next_value, error = bootstrap, 0.0
    for t in reversed(mask.nonzero()[:, 0].tolist()):
        rho = (logprobs[t] - old_logprobs[t]).exp().item()
        td = rewards[t] + gamma * next_value - values[t]
        advantages[t] = min(pg_clip, rho) * (td + gamma * lam * error)
        error = min(rho_clip, rho) * td + gamma * lam * min(1.0, rho) * error
        returns[t], next_value = values[t] + error, values[t]
    return advantages, returns


def test_vtrace_clips_step_by_step():
    kwargs = tokens((7, 33))
    options = {"gamma": 0.95, "lam": 0.9, "rho_clip": 1.2, "pg_clip": 0.8}
    got = vtrace(**kwargs, **options)
    for i in range(7):
        row = step_by_step(**{k: v[i] for k, v in kwargs.items()}, **options)
        torch.testing.assert_close(got.advantages[i], row[0])
        torch.testing.assert_close(got.returns[i], row[1])
    assert not got.advantages.requires_grad


@ESTIMATORS
def test_parity_in_fp32_and_half_inputs_are_widened(estimate):
    kwargs = tokens((9, 300), torch.float32)
    got, truth = estimate(**kwargs), estimate(**double(kwargs))
    for a, b in zip(got, truth, strict=True):
        assert a.dtype is torch.float32
        assert_parity(a, b, scale=float(b.abs().max()) * 4)  # sums of terms that cancel
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in kwargs.items()}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    assert all(map(torch.equal, estimate(**half), estimate(**wide)))


@ESTIMATORS
def test_packed_equals_padded_and_masked_slots_are_never_read(estimate):
    kwargs = tokens()
    lengths = torch.tensor([12, 4, 0, 1, 9])
    inside = torch.arange(12) < lengths[:, None]
    kwargs["mask"] &= inside
    options = {"gamma": 0.9, "lam": torch.tensor([0.9, 0.1, 0.2, 0.3, 1.0])}
    padded = estimate(**kwargs, **options)
    packed = {k: v if k == "bootstrap" else v[inside] for k, v in kwargs.items()}
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    for a, b in zip(padded, estimate(**packed, **options), strict=True):
        assert torch.equal(a[inside], b)
    dirty = {k: v.clone() for k, v in kwargs.items()}
    for name in ("rewards", "values", *POLICIES):
        dirty[name][~kwargs["mask"]] = float("nan")
    for a, b in zip(padded, estimate(**dirty, **options), strict=True):
        assert torch.equal(a, b) and not b[~kwargs["mask"]].any()


@ESTIMATORS
def test_a_row_has_the_same_bits_in_any_batch_and_keeps_its_nan(estimate):
    kwargs = tokens((6, 40), torch.float32)
    whole = estimate(**kwargs)
    for i in range(6):
        alone = estimate(**{k: v[i : i + 1] for k, v in kwargs.items()})
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))
    kwargs["mask"][3] = True
    clean = estimate(**kwargs)
    kwargs["rewards"][3, 5] = float("nan")
    got = estimate(**kwargs)
    others = torch.arange(6) != 3
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[others], b[others]) and torch.equal(a[3, 6:], b[3, 6:]) and a[3, :6].isnan().all()


@ESTIMATORS
def test_empty_and_extreme_inputs(estimate):
    for shape in ((0, 4), (3, 0), (1, 1)):
        kwargs = {k: torch.zeros(shape) for k in ("rewards", "values", *POLICIES)}
        assert all(x.shape == shape for x in estimate(**kwargs))
    flat = {k: torch.zeros(0) for k in ("rewards", "values", *POLICIES)}
    for bounds in ([0], [0, 0, 0]):
        assert all(x.shape == (0,) for x in estimate(**flat, cu_seqlens=torch.tensor(bounds)))
    kwargs = tokens((4, 9), torch.float32)
    kwargs["logprobs"], kwargs["old_logprobs"] = kwargs["logprobs"] * 1e4, kwargs["old_logprobs"] * 1e4
    assert all(x.isfinite().all() for x in estimate(**kwargs))
    kwargs["mask"][:] = False
    assert not any(x.any() for x in estimate(**kwargs))


@ESTIMATORS
def test_rows_around_a_chunk_have_their_bits_padded_packed_and_alone(estimate):
    lengths = torch.tensor([CHUNK - 1, CHUNK, 0, CHUNK + 1, 4 * CHUNK, 3 * CHUNK + 5, 1])
    kwargs = tokens((7, 4 * CHUNK), torch.float32)
    inside = torch.arange(4 * CHUNK) < lengths[:, None]
    kwargs["mask"] = inside & (torch.rand(inside.shape, generator=torch.Generator().manual_seed(1)) > 0.1)
    gamma = (
        torch.rand(inside.shape, generator=torch.Generator().manual_seed(2)).gt(0.02).float() * 0.99
    )  # some ends inside
    padded = estimate(**kwargs, gamma=gamma)
    packed = {k: v if k == "bootstrap" else v[inside] for k, v in kwargs.items()}
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for a, b in zip(padded, estimate(**packed, gamma=gamma[inside], cu_seqlens=bounds), strict=True):
        assert torch.equal(a[inside], b)
    spoilt = {**packed, "rewards": packed["rewards"].clone()}
    at = bounds[4] + int(kwargs["mask"][4].nonzero()[100])
    spoilt["rewards"][at] = (
        torch.nan
    )  # spoils its own sequence up to there, or to the end of an episode inside, and no other
    for a, b in zip(padded, estimate(**spoilt, gamma=gamma[inside], cu_seqlens=bounds), strict=True):
        others = torch.arange(len(b))
        clean = (others < bounds[4]) | (others > at)
        assert torch.equal(a[inside][clean], b[clean]) and b[at].isnan()
    for i in range(7):
        alone = estimate(**{k: v[i : i + 1] for k, v in kwargs.items()}, gamma=gamma[i : i + 1])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, padded, strict=True))


def everything(r, v, logprobs, old_logprobs, mask, lam, bootstrap, cu_seqlens):
    flat = [x.reshape(-1) for x in (r, v, logprobs, old_logprobs, mask)]
    found = [lambda_returns(r, v, mask, lam=lam, bootstrap=bootstrap), lambda_returns(r, v, gamma=0.9)]
    found += vtrace(r, v, logprobs, old_logprobs, mask, lam=lam, bootstrap=bootstrap)
    found += vtrace(*flat, cu_seqlens=cu_seqlens)
    found.append(lambda_returns(flat[0], flat[1], flat[4], lam=lam, bootstrap=bootstrap, cu_seqlens=cu_seqlens))
    for gap in GAPS:
        found += gae(r, v, mask, lam=lam, bootstrap=bootstrap, gap=gap, gamma=0.99)
        found += gae(flat[0], flat[1], flat[4], lam=lam, gap=gap, cu_seqlens=cu_seqlens)
    return found


def arguments_of_everything(rows=4, length=150, dtype=torch.float32):
    kwargs = tokens((rows, length), dtype)
    lam, bounds = torch.linspace(0.0, 1.0, rows), torch.arange(rows + 1) * length
    names = ("rewards", "values", *POLICIES, "mask")
    return [*(kwargs[k] for k in names), lam, kwargs["bootstrap"], bounds]


def test_the_estimators_are_one_graph_of_the_same_numbers():
    eager, compiled = (arguments_of_everything(dtype=torch.float64) for _ in range(2))
    results = []
    for inputs, f in (
        (eager, everything),
        (compiled, torch.compile(everything, fullgraph=True, backend="aot_eager")),
    ):
        leaves = [x.requires_grad_() for x in (*inputs[:2], inputs[6])]
        out = f(*inputs)
        total = sum((x * torch.linspace(1, 2, x.numel()).view_as(x)).sum() for x in out if x.requires_grad)
        results.append((out, torch.autograd.grad(total, leaves)))
    torch.testing.assert_close(*results)  # a lam per row: kernels eagerly, the scan when compiled


def test_no_number_is_read_on_the_host():
    """There is none on the meta device."""
    inputs = [x.to("meta") for x in arguments_of_everything()]
    leaves = [x.requires_grad_() for x in (*inputs[:2], inputs[6])]
    out = everything(*inputs)
    grads = torch.autograd.grad([x.sum() for x in out if x.requires_grad], leaves)
    assert [x.shape for x in grads] == [x.shape for x in leaves]
    assert all(x.shape in ((4, 150), (600,)) for x in out)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_the_scan_with_one_lam_per_sequence_is_that_of_the_kernels(gap, packed):
    r, v, _, _, mask, lam, bootstrap, bounds = arguments_of_everything(6, 200)
    if packed:
        r, v, mask = (x.reshape(-1) for x in (r, v, mask))
    cut = bounds if packed else None
    args = (mask, bootstrap, cut, 0.98, gap == "decay")
    got = _by_scan(lam, r, v, *args)
    truth = _by_lam(lam.double(), r.double(), v.double(), mask, bootstrap.double(), *args[2:])
    for a, b in zip(got, truth, strict=True):
        assert_parity(a, b, scale=float(b.abs().max()) * 4)  # sums of terms that cancel
        assert not a[~mask].any()
    bad = _by_scan(torch.tensor([1.5, -0.1, float("nan"), 0.5, 0.5, 0.5]), r, v, *args)[0]
    rows = torch.arange(6).repeat_interleave(200) if packed else torch.arange(6)[:, None].expand(6, 200)
    first = (rows < 3) & mask
    first &= first.flip(-1).cumsum(-1).flip(-1) > 1 if not packed else True
    lasts = torch.stack(
        [(mask & (rows == i)).reshape(-1).nonzero().max() for i in range(3) if (mask & (rows == i)).any()]
    )
    first.view(-1)[lasts] = False  # the last token has nothing behind it to decay
    assert bad[first].isnan().all() and bad[rows >= 3].isfinite().all()


def test_gradcheck_of_lambda_returns():
    kwargs = only(tokens((3, 6)), *POLICIES)
    leaves = [kwargs[k].requires_grad_() for k in ("rewards", "values", "bootstrap")]
    call = lambda r, v, b: lambda_returns(r, v, kwargs["mask"], gamma=0.9, lam=0.7, bootstrap=b)
    assert torch.autograd.gradcheck(call, leaves, **tolerances.GRADCHECK)


@pytest.mark.parametrize("gap", ["carry", "decay"])
@pytest.mark.parametrize("packed", [False, True])
def test_gae_with_one_lam_per_sequence_has_the_bits_of_single_calls(gap, packed):
    kwargs = only(tokens((6, 20), torch.float32), *POLICIES)
    lam = torch.tensor([0.9, 0.5, 0.9, 0.0, 1.0, 0.5], dtype=torch.float64)
    alone = [
        gae(**{k: v[i : i + 1] for k, v in kwargs.items()}, gap=gap, gamma=0.9, lam=lam[i].item()) for i in range(6)
    ]
    expected = [torch.cat(x) for x in zip(*alone, strict=True)]
    if packed:
        lengths = torch.tensor([20, 3, 0, 20, 11, 7])
        inside = torch.arange(20) < lengths[:, None]
        kwargs["mask"] &= inside
        alone = [
            gae(**{k: v[i : i + 1] for k, v in kwargs.items()}, gap=gap, gamma=0.9, lam=lam[i].item()) for i in range(6)
        ]
        expected = [torch.cat(x)[inside] for x in zip(*alone, strict=True)]
        kwargs = {k: v if k == "bootstrap" else v[inside] for k, v in kwargs.items()}
        kwargs["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    got = gae(**kwargs, gap=gap, gamma=0.9, lam=lam)
    assert all(map(torch.equal, got, expected))


def test_gae_with_one_lam_per_sequence_shapes_gradients_and_errors():
    kwargs = only(tokens((6, 5)), *POLICIES)
    lam = torch.tensor([[0.9, 0.5, 0.9], [0.0, 1.0, 0.5]])
    nested = gae(**{k: v.reshape(2, 3, *v.shape[1:]) for k, v in kwargs.items()}, lam=lam)
    assert all(torch.equal(a.reshape(6, 5), b) for a, b in zip(nested, gae(**kwargs, lam=lam.reshape(6)), strict=True))
    leaves = [kwargs[k].requires_grad_() for k in ("rewards", "values", "bootstrap")]
    call = lambda r, v, b: gae(r, v, kwargs["mask"], bootstrap=b, lam=lam.reshape(6))
    assert torch.autograd.gradcheck(call, leaves, **tolerances.GRADCHECK)
    assert gae(torch.zeros(0, 3), torch.zeros(0, 3), lam=torch.zeros(0))[0].shape == (0, 3)
    for bad, message in (
        (torch.zeros(5), r"'lam' got shape \(5,\)"),
        (torch.full((6,), 1.5), "'lam' got 1.5"),
        (torch.full((6,), float("nan")), "'lam' got nan"),
        (torch.zeros(6).long(), "'lam' got torch.int64"),
    ):
        with pytest.raises((ValueError, TypeError), match="gae: argument " + message):
            gae(**kwargs, lam=bad)


def test_worked_values_of_the_length_adaptive_lambda():
    got = length_adaptive_lambda(torch.tensor([0, 10, 20, 40, 100, 1000]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.8, 0.98]))
    assert length_adaptive_lambda(torch.tensor([10]), alpha=1.0).item() == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"length_adaptive_lambda: argument 'alpha' got 0\.0"):
        length_adaptive_lambda(torch.tensor([1]), 0.0)


def test_reinforce_plus_plus_is_the_whole_path_without_a_critic():
    # Discounted returns of (score - beta k1), whitened over the batch (formulas.md 1.4): values of zero and lam 1.
    g = torch.Generator().manual_seed(4)
    draw = lambda: -torch.rand(3, 6, generator=g, dtype=torch.float64)
    new, ref, scores = draw(), draw(), torch.tensor([1.0, -1.0, 0.5]).double()
    mask = torch.arange(6) < torch.tensor([[6], [3], [4]])
    got = rlhf_fast.advantages(
        scores, torch.zeros_like(new), mask, logprobs=new, ref_logprobs=ref, kl_coef=0.2, gamma=0.9, lam=1.0
    ).advantages
    raw = torch.zeros_like(new)
    for i, last in enumerate([5, 2, 3]):
        running = 0.0
        for t in reversed(range(last + 1)):
            running = -0.2 * (new[i, t] - ref[i, t]) + (scores[i] if t == last else 0.0) + 0.9 * running
            raw[i, t] = running
    real = raw[mask]
    torch.testing.assert_close(got[mask], (real - real.mean()) / (real.var() + 1e-8).sqrt())


R = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0]).double()
IDS = torch.tensor([4, 4, 4, 4, 4, -1, -1])


def test_worked_values_of_the_composed_group_kinds():
    assert set(COMPOSED) == {"lite_ppo", "gpg"}
    # The batch: mean 1, deviations 0 1 1 0 0 1 1, variance 4 / 6 (4 / 7 biased). The second group is equal.
    centred = torch.tensor([0.4, -0.6, -0.6, 0.4, 0.4, 0.0, 0.0]).double()
    lite = group_advantages(R, IDS, "lite_ppo")
    torch.testing.assert_close(lite, centred / ((4 / 6) ** 0.5 + 1e-6))
    biased = group_advantages(R, IDS, "lite_ppo", unbiased=False, eps=0.5)
    torch.testing.assert_close(biased, centred / ((4 / 7) ** 0.5 + 0.5))
    torch.testing.assert_close(group_advantages(R, IDS, "gpg"), centred * 7 / 5)
    middle = torch.tensor([0.0, 1.0, 2.0]).double()  # the sample at the mean has a signal in its group
    torch.testing.assert_close(group_advantages(middle, torch.zeros(3).long(), "gpg"), middle - 1)


@pytest.mark.parametrize("kind", COMPOSED)
def test_the_composed_group_kinds(kind):
    kwargs = only(group_source.sample(60, dtype=torch.float32), "lengths", "greedy_scores")
    got = group_advantages(**kwargs, kind=kind)
    with rlhf_fast.use_backend("reference"):
        truth, plain = group_advantages(**double(kwargs), kind=kind), group_advantages(**kwargs, kind=kind)
    assert_parity(got, truth, plain)
    mask = kwargs["mask"]
    dirty = {**kwargs, "scores": kwargs["scores"].where(mask, float("nan"))}
    assert torch.equal(group_advantages(**dirty, kind=kind), got) and not got[~mask].any()
    left = {k: v[mask] for k, v in kwargs.items()}
    torch.testing.assert_close(group_advantages(**left, kind=kind), got[mask])
    square = {k: v.reshape(6, 10) for k, v in kwargs.items()}
    assert torch.equal(group_advantages(**square, kind=kind).reshape(-1), got)
    order = torch.randperm(60)
    torch.testing.assert_close(group_advantages(**{k: v[order] for k, v in kwargs.items()}, kind=kind), got[order])
    leaf = torch.randn(12, dtype=torch.float64, requires_grad=True)  # equal scores are a jump, so none are here
    call = lambda x: group_advantages(x, torch.arange(12) % 3, kind, mask=torch.arange(12) != 5)
    assert torch.autograd.gradcheck(call, leaf, **tolerances.GRADCHECK)
    for n in (0, 1, 4):  # nothing, one sample, equal scores
        zeros = group_advantages(torch.full((n,), 0.1, requires_grad=True), torch.zeros(n, dtype=torch.int64), kind)
        assert not zeros.any()
        zeros.sum().backward()


@pytest.mark.parametrize("kind", FORMULAS)
def test_groups_that_stay_together_may_be_split_but_for_the_kinds_that_scale_by_the_batch(kind):
    kwargs = double(group_source.sample(40))
    first = kwargs["group_ids"] % 2 == 0
    whole = group_advantages(**kwargs, kind=kind)
    parts = torch.empty_like(whole)
    for side in (first, ~first):
        parts[side] = group_advantages(**{k: v[side] for k, v in kwargs.items()}, kind=kind)
    assert torch.allclose(parts, whole) != (kind in ("reinforce++", "lite_ppo", "gpg"))


def test_gdpo_normalises_before_it_adds():
    # Two rewards; in group 0 the second is equal, in group 1 the first.
    scores = torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 0.0], [2.0, 30.0]]).double()
    ids = torch.tensor([0, 0, 1, 1])
    half = 0.5**0.5  # of a group of two: -+ 1 over a Bessel deviation of sqrt(2)
    raw = torch.tensor([-half, half, -half, half]).double()
    expected = raw / (4 * 0.5 / 3) ** 0.5
    torch.testing.assert_close(gdpo_advantages(scores, ids), expected, atol=1e-5, rtol=0)
    raw = raw * torch.tensor([2.0, 2.0, 1.0, 1.0])
    expected = raw / ((2 * 2.0 + 2 * 0.5) / 3) ** 0.5
    torch.testing.assert_close(gdpo_advantages(scores, ids, torch.tensor([2.0, 1.0])), expected, atol=1e-5, rtol=0)


def test_gdpo_on_one_reward_is_whitened_grpo_and_masks_samples_and_rewards():
    kwargs = group_source.sample(30, dtype=torch.float64)
    r, ids, mask = kwargs["scores"], kwargs["group_ids"], kwargs["mask"]
    grpo = group_advantages(r, ids, mask=mask)
    torch.testing.assert_close(gdpo_advantages(r[:, None], ids, mask=mask), rlhf_fast.whiten(grpo, mask))
    two = torch.stack([r, r.flip(0)], 1)
    has = torch.stack([mask, mask.flip(0)], 1)
    got = gdpo_advantages(two, ids, mask=has)
    assert torch.equal(gdpo_advantages(two.where(has, float("nan")), ids, mask=has), got)
    assert not got[~has.any(1)].any() and has.any(1).sum() > mask.sum()
    total = group_advantages(r, ids, mask=has[:, 0]) + group_advantages(two[:, 1], ids, mask=has[:, 1])
    torch.testing.assert_close(got, rlhf_fast.whiten(total, has.any(1)))
    leaf = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    call = lambda x: gdpo_advantages(x, torch.arange(12) % 3, mask=torch.arange(24).view(12, 2) % 7 != 3)
    assert torch.autograd.gradcheck(call, leaf, **tolerances.GRADCHECK)
    order = torch.randperm(30)
    torch.testing.assert_close(gdpo_advantages(two[order], ids[order], mask=has[order]), got[order])
    assert not gdpo_advantages(torch.full((4, 2), 0.1), torch.zeros(4).long()).any()
    for shape in ((0, 2), (3, 0)):
        assert not gdpo_advantages(torch.zeros(shape), torch.zeros(shape[0]).long()).any()


Z = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lambda_returns(torch.zeros(3), torch.zeros(3)), r"lambda_returns: argument 'rewards' got shape \(3,\)"),
        (lambda: lambda_returns(Z, Z[:1]), "'values' got shape"),
        (lambda: lambda_returns(Z, Z, Z), "'mask' got torch.float32"),
        (lambda: lambda_returns(Z, Z, gamma=1.5), "'gamma' got 1.5"),
        (lambda: lambda_returns(Z, Z, gamma=torch.ones(2)), r"'gamma' got shape \(2,\)"),
        (lambda: lambda_returns(Z, Z, lam=-0.5), "'lam' got -0.5"),
        (lambda: lambda_returns(Z, Z, lam=torch.ones(3)), r"'lam' got shape \(3,\), expected \(2,\)"),
        (lambda: lambda_returns(Z, Z, bootstrap=0.5), "'bootstrap' got float"),
        (lambda: lambda_returns(Z, Z, bootstrap=torch.ones(3)), r"'bootstrap' got shape \(3,\)"),
        (lambda: lambda_returns(Z, Z, cu_seqlens=torch.tensor([0, 6])), r"'rewards' got shape \(2, 3\), expected \(N,\)"),
        (lambda: vtrace(Z, Z, Z, None), "vtrace: argument 'old_logprobs' got NoneType"),
        (lambda: vtrace(Z, Z, Z, Z, rho_clip=0.0), "'rho_clip' got 0.0"),
        (lambda: vtrace(Z, Z, Z, Z, pg_clip=float("inf")), "'pg_clip' got inf"),
        (lambda: gdpo_advantages(Z[0], Z[0].long()), r"gdpo_advantages: argument 'scores' got shape \(3,\)"),
        (lambda: gdpo_advantages(Z, Z[0].long()), "'group_ids' got shape"),
        (lambda: gdpo_advantages(Z, Z[:, 0]), "'group_ids' got torch.float32"),
        (lambda: gdpo_advantages(Z, Z[:, 0].long(), torch.ones(2)), r"'weights' got shape \(2,\), expected \(3,\)"),
        (lambda: gdpo_advantages(Z, Z[:, 0].long(), mask=torch.ones(3).bool()), "'mask' got shape"),
        (lambda: group_advantages(Z[0], Z[0].long(), "gpgg"), "'kind' got 'gpgg'.*'lite_ppo', 'gpg'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
