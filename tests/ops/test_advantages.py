from __future__ import annotations

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.dialects import DIALECTS
from rlhf_fast.ops import advantages, gae, kl_estimate, whiten
from rlhf_fast.reference import advantages as reference

NAMES = ("advantages", "returns", "rewards", "kl")
FLOATS = ("scores", "values", "logprobs", "ref_logprobs", "bootstrap")
READERS = [name for name, rules in DIALECTS.items() if rules.score_slot == "after_last" or rules.gap == "read"]
"""They read values of masked slots."""


def both(kwargs, **options):
    got = advantages(**kwargs, **options)
    with rlhf_fast.use_backend("reference"):
        return got, advantages(**double(kwargs), **options), advantages(**kwargs, **options)


# 1 token; empty; shorter and longer than any vector; more rows than threads; long enough to start a second thread.
@pytest.mark.parametrize("shape", [(1, 1), (3, 0), (0, 5), (5, 7), (9, 128), (40, 700)], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parity(shape, dialect, dtype):
    if shape == (40, 700) and (dialect not in ("rlhf_fast", "trl") or dtype is not torch.float32):
        shape = (4, 70)  # the long one only has to start threads
    for token_scores in (False, True):
        kwargs = reference.sample(shape, dtype=dtype, token_scores=token_scores)
        for g, t, p, name in zip(
            *both(kwargs, kl_coef=0.3, kl_kind="k3", gamma=0.97, dialect=dialect), NAMES, strict=True
        ):
            assert g.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
            assert_parity(g, t, p, name)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("token_scores", [False, True])
def test_gradient_parity(dialect, token_scores):
    def gradients(kwargs, backend):
        inputs = {k: v.clone().requires_grad_() if k in FLOATS else v for k, v in kwargs.items()}
        with rlhf_fast.use_backend(backend):
            out = advantages(**inputs, kl_coef=0.3, kl_kind="k2", dialect=dialect)
            upstream = [torch.linspace(-1, k + 1, o.numel()).view_as(o).to(o.dtype) for k, o in enumerate(out)]
            return torch.autograd.grad(out, [inputs[k] for k in FLOATS], upstream)

    kwargs = reference.sample((6, 21), token_scores=token_scores)
    got, plain, truth = gradients(kwargs, "cpp"), gradients(kwargs, "reference"), gradients(double(kwargs), "reference")
    for g, t, p, name in zip(got, truth, plain, FLOATS, strict=True):
        assert_parity(g, t, p, name)


def test_it_is_the_composition_of_the_single_ops_bit_for_bit_up_to_whitening():
    kwargs = reference.sample((9, 50), token_scores=True)
    got = advantages(**kwargs, kl_coef=0.2, kl_kind="k3", gamma=0.99, lam=0.9)
    mask = kwargs["mask"]
    kl = kl_estimate(kwargs["logprobs"], kwargs["ref_logprobs"], "k3", mask=mask)
    rewards = torch.where(mask, kwargs["scores"] - 0.2 * kl, 0.0)
    raw, returns = gae(rewards, kwargs["values"], mask, gamma=0.99, lam=0.9, bootstrap=kwargs["bootstrap"])
    plain = advantages(**kwargs, kl_coef=0.2, kl_kind="k3", gamma=0.99, lam=0.9, whiten=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, (raw, returns, rewards, kl), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got[1:], plain[1:], strict=True))
    # The moments are summed row by row, which whiten knows nothing of.
    whitened = whiten(raw, mask)
    assert (got.advantages - whitened).abs().max() <= tolerances.ISA * whitened.abs().max()


def test_worked_values():
    mask = torch.ones(1, 3, dtype=torch.bool)
    values, score = torch.tensor([[0.5, 0.6, 0.7]]), torch.tensor([1.0])
    got = advantages(score, values, mask, whiten=False)
    torch.testing.assert_close(got.advantages, torch.tensor([[0.46575, 0.385, 0.3]]), atol=tolerances.WORKED, rtol=0)
    torch.testing.assert_close(got.returns, torch.tensor([[0.96575, 0.985, 1.0]]), atol=tolerances.WORKED, rtol=0)
    got = advantages(score, values, mask, whiten=False, bootstrap=torch.tensor([0.8]))
    expected = torch.tensor([[1.18775, 1.145, 1.1]])
    torch.testing.assert_close(got.advantages, expected, atol=tolerances.WORKED, rtol=0)


def test_item_21_trl_puts_the_score_in_the_slot_after_the_last_token_and_trains_its_value():
    values = torch.tensor([[0.5, 0.6, 0.7, 0.65, 9.0]])
    mask = torch.tensor([[True, True, True, False, False]])
    got = advantages(torch.tensor([1.0]), values, mask, whiten=False, dialect="trl")
    expected = torch.tensor([[0.44995625, 0.368375, 0.2825, 0.0, 0.0]])
    torch.testing.assert_close(got.advantages, expected, atol=tolerances.WORKED, rtol=0)
    assert got.rewards.tolist() == [[0.0, 0.0, 0.0, 1.0, 0.0]]
    assert got.returns[0, 3] - values[0, 3] == pytest.approx(0.35, abs=tolerances.WORKED)
    full = advantages(torch.tensor([1.0]), values[:, :3], mask[:, :3], whiten=False, dialect="trl")
    assert full.rewards.tolist() == [[0.0, 0.0, 1.0]]  # no slot left: the last token


# The inputs behind the values measured in the public implementations: token KL cost .005, junk critic values on the pads.
PADDED = {
    "values": torch.tensor([[0.0925, 0.1925, 0.3075, 0.41, 0.5, 0.9, -3.0]]),
    "mask": torch.tensor([[True] * 5 + [False] * 2]),
    "scores": torch.tensor([1.0]),
}
GAP = {
    "values": torch.tensor([[0.085, 0.185, 7.0, -7.0, 0.5, 0.9]]),
    "mask": torch.tensor([[True, True, False, False, True, True]]),
    "scores": torch.tensor([0.97]),
}


def _measured(inputs, dialect):
    cost = torch.full_like(inputs["values"], 0.05)  # k1 of .05 nats a token at coefficient .1
    zero = torch.zeros_like(cost)
    got = advantages(
        **inputs, logprobs=cost, ref_logprobs=zero, kl_coef=0.1, gamma=1.0, lam=0.95, whiten=False, dialect=dialect
    )
    return got, got.advantages[inputs["mask"]]


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        ("verl", [0.7636, 0.7037, 0.6250, 0.5553, 0.4950]),
        ("nemo", [0.7636, 0.7037, 0.6250, 0.5553, 0.4950]),
        ("openrlhf", [0.7636, 0.7037, 0.6250, 0.5553, 0.4950]),
        ("trl", [0.7595, 0.6995, 0.6205, 0.5505, 0.4900]),
    ],
)
def test_measured_values_with_junk_on_the_pads(dialect, expected):
    got, real = _measured(PADDED, dialect)
    torch.testing.assert_close(real, torch.tensor(expected), atol=tolerances.WORKED4, rtol=0)
    if dialect == "trl":  # its one extra trained slot
        assert (got.returns - PADDED["values"])[0, 5] == pytest.approx(0.1, abs=tolerances.WORKED4)


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        ("verl", [0.8017, 0.7439, 0.4567, 0.0650]),
        ("nemo", [0.8017, 0.7439, 0.4567, 0.0650]),
        ("openrlhf", [0.7152, 0.6529, 0.4567, 0.0650]),
    ],
)
def test_measured_values_with_a_tool_gap(dialect, expected):
    _, real = _measured(GAP, dialect)
    torch.testing.assert_close(real, torch.tensor(expected), atol=tolerances.WORKED4, rtol=0)


def test_dialects_differ_in_what_their_tables_say():
    kwargs = reference.sample((8, 30))
    kwargs["scores"] *= 20
    kwargs["ref_logprobs"] += 3
    run = {name: advantages(**kwargs, kl_coef=0.1, kl_kind="k3", dialect=name) for name in DIALECTS}
    real = kwargs["mask"]
    assert not torch.equal(run["rlhf_fast"].advantages, run["openai"].advantages)  # biased variance
    assert run["verl"].kl.max() == 10 and run["openrlhf"].kl.max() == 10 and run["rlhf_fast"].kl.max() > 10
    assert torch.equal(run["verl"].rewards, run["nemo"].rewards)
    for name, unbiased in (("rlhf_fast", True), ("verl", True), ("openrlhf", False), ("openai", False)):
        assert run[name].advantages[real].var(unbiased=unbiased).item() == pytest.approx(1, abs=1e-5)
    last = [row.nonzero().max() if row.any() else None for row in real]
    for i, t in enumerate(last):
        if t is not None:
            clipped = kwargs["scores"][i].clamp(-10, 10) - 0.1 * run["openrlhf"].kl[i, t]
            assert run["openrlhf"].rewards[i, t].item() == pytest.approx(clipped.item(), abs=1e-5)


def test_item_24_advantages_are_whitened_over_real_tokens_and_masked_to_zero():
    kwargs = reference.sample((16, 64))
    got = advantages(**kwargs, kl_coef=0.1).advantages
    real = got[kwargs["mask"]].double()
    assert abs(real.mean().item()) <= 1e-3 and abs(real.var().item() - 1) <= 1e-3
    assert not got[~kwargs["mask"]].any()


def test_item_23_rewards_are_not_whitened():
    mask = torch.ones(2, 3, dtype=torch.bool)
    logprobs, ref = torch.randn(2, 3), torch.randn(2, 3)
    out = rlhf_fast.advantages(
        torch.tensor([5.0, -7.0]),
        torch.zeros(2, 3),
        mask,
        logprobs=logprobs,
        ref_logprobs=ref,
        kl_coef=0.1,
        whiten=True,
    )
    expected = -0.1 * (logprobs - ref)
    expected[:, -1] += torch.tensor([5.0, -7.0])
    assert torch.allclose(out.rewards, expected, atol=1e-6)


def test_item_25_returns_are_computed_before_whitening():
    kwargs = reference.sample((6, 33))
    raw, white = advantages(**kwargs, kl_coef=0.1, whiten=False), advantages(**kwargs, kl_coef=0.1)
    assert torch.equal(raw.returns, white.returns)
    torch.testing.assert_close(raw.returns, (raw.advantages + kwargs["values"]).where(kwargs["mask"], 0.0))
    assert not torch.allclose(white.advantages + kwargs["values"], white.returns)


def test_a_constant_reward_with_the_exact_critic_has_no_advantage():
    got = advantages(torch.full((3,), 2.0), torch.full((3, 9), 2.0), torch.ones(3, 9, dtype=torch.bool))
    assert got.advantages.abs().max() <= tolerances.FLOOR[torch.float32]


def test_policy_equal_to_reference_recovers_the_path_without_kl():
    kwargs = reference.sample((5, 20))
    kwargs["ref_logprobs"] = kwargs["logprobs"].clone()
    bare = {k: kwargs[k] for k in ("scores", "values", "mask", "bootstrap")}
    with_kl, without = advantages(**kwargs, kl_coef=0.7), advantages(**bare)
    assert not with_kl.kl.any()
    assert all(torch.equal(a, b) for a, b in zip(with_kl, without, strict=True))


def test_kl_coef_zero_recovers_the_path_without_kl_but_reports_the_kl():
    kwargs = reference.sample((5, 20))
    bare = {k: kwargs[k] for k in ("scores", "values", "mask", "bootstrap")}
    got, without = advantages(**kwargs), advantages(**bare)
    assert torch.equal(got.advantages, without.advantages) and torch.equal(got.rewards, without.rewards)
    assert got.kl.abs().sum() > 0


@pytest.mark.parametrize("dialect", DIALECTS)
def test_packed_equals_padded(dialect):
    kwargs = reference.sample((5, 12))
    lengths = torch.tensor([12, 0, 5, 1, 12])
    inside = torch.arange(12)[None] < lengths[:, None]
    kwargs["mask"] &= inside
    kwargs["mask"][2, 4] = True  # its last packed slot: no slot after it within the sequence
    padded = {**kwargs, **{k: v.clone() for k, v in kwargs.items()}}
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    packed = {k: v[inside] if v.dim() == 2 else v for k, v in kwargs.items()}
    got = advantages(**packed, kl_coef=0.2, dialect=dialect, cu_seqlens=cu_seqlens)
    with rlhf_fast.use_backend("reference"):
        oracle = advantages(**double(packed), kl_coef=0.2, dialect=dialect, cu_seqlens=cu_seqlens)
    for g, o, name in zip(got, oracle, NAMES, strict=True):
        assert_parity(g, o, o.float(), name)
    if dialect not in READERS:  # there the window decides whether slots follow
        rows = advantages(**padded, kl_coef=0.2, dialect=dialect, whiten=False)
        flat = advantages(**packed, kl_coef=0.2, dialect=dialect, whiten=False, cu_seqlens=cu_seqlens)
        assert all(torch.equal(a[inside], b) for a, b in zip(rows, flat, strict=True))


def test_packed_gradients_match_the_reference():
    cu_seqlens = torch.tensor([0, 5, 5, 6, 14])
    kwargs = reference.sample((1, 14))
    kwargs = {k: v[0] if v.dim() == 2 else v for k, v in kwargs.items()}
    kwargs["scores"], kwargs["bootstrap"] = torch.randn(4), torch.randn(4)
    for dialect in ("rlhf_fast", "trl"):
        found = []
        for backend in ("cpp", "reference"):
            inputs = {k: v.double().requires_grad_() if k in FLOATS else v for k, v in kwargs.items()}
            with rlhf_fast.use_backend(backend):
                out = advantages(**inputs, kl_coef=0.2, kl_kind="k3", dialect=dialect, cu_seqlens=cu_seqlens)
                loss = sum((o * torch.linspace(-1, 1, 14).double()).sum() for o in out)
                found.append(torch.autograd.grad(loss, [inputs[k] for k in FLOATS]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d not in READERS])
def test_masked_slots_are_never_read(dialect):
    kwargs = reference.sample((6, 20))
    clean = advantages(**kwargs, kl_coef=0.1, dialect=dialect)
    for poison in (float("nan"), float("inf"), 1e30):
        dirty = {k: v.clone() for k, v in kwargs.items()}
        for k in ("values", "logprobs", "ref_logprobs"):
            dirty[k][~dirty["mask"]] = poison
        got = advantages(**dirty, kl_coef=0.1, dialect=dialect)
        for a, b in zip(clean, got, strict=True):
            assert torch.equal(a, b) and not b[~dirty["mask"]].any()


def test_trl_reads_one_slot_past_the_end_and_no_further():
    kwargs = reference.sample((6, 20), gaps=False)
    clean = advantages(**kwargs, kl_coef=0.1, dialect="trl")
    after = torch.arange(20)[None] > kwargs["mask"].sum(1, keepdim=True)
    for k in ("values", "logprobs", "ref_logprobs"):
        kwargs[k][after] = float("nan")
    got = advantages(**kwargs, kl_coef=0.1, dialect="trl")
    assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))


def test_a_row_without_a_token_drops_its_score():
    mask = torch.tensor([[False, False], [True, True]])
    got = advantages(torch.tensor([100.0, 1.0]), torch.zeros(2, 2), mask, whiten=False)
    assert got.rewards.tolist() == [[0, 0], [0, 1]] and got.advantages[0].tolist() == [0, 0]


def test_everything_masked_gives_zeros():
    got = advantages(torch.ones(2), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert all(not x.any() for x in got)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_gradcheck(dialect):
    kwargs = double(reference.sample((3, 6)))
    inputs = [kwargs[k].requires_grad_() for k in FLOATS]

    def call(scores, values, logprobs, ref_logprobs, bootstrap):
        return advantages(
            scores, values, kwargs["mask"], logprobs=logprobs, ref_logprobs=ref_logprobs, bootstrap=bootstrap,
            kl_coef=0.3, kl_kind="k3", gamma=0.9, dialect=dialect,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)
    if dialect == "rlhf_fast":
        with rlhf_fast.use_backend("reference"):
            assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)


def test_opcheck():
    rest = (0.1, "k3", 20.0, 10.0, 5.0)
    for grad in (False, True):
        kwargs = reference.sample((3, 9))
        s, v, a, b, boot = (kwargs[k].requires_grad_(grad) for k in FLOATS)
        op = torch.ops.rlhf_fast.advantages.default
        opcheck(op, (s, v, kwargs["mask"], a, b, boot, None, False, *rest, True, 0.9, 0.95, True, True, False, True))
        opcheck(
            op, (v, v, kwargs["mask"], None, None, None, None, True, *rest, False, 1.0, 0.95, False, False, True, False)
        )


def test_compile_gives_the_eager_result_and_gradient():
    kwargs = reference.sample((3, 9))
    leaf = kwargs.pop("values").requires_grad_()
    call = lambda v: advantages(values=v, **kwargs, kl_coef=0.1).advantages.pow(3).sum()
    (eager,) = torch.autograd.grad(call(leaf), leaf)
    (compiled,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(leaf), leaf)
    assert torch.equal(eager, compiled)


def test_threads_and_instruction_sets_give_the_same_bits(each_isa):
    kwargs = reference.sample((70, 700))
    run = lambda: advantages(**kwargs, kl_coef=0.1, kl_kind="k3")
    torch.set_num_threads(2)
    results = [r for _, r in each_isa(run)]
    torch.set_num_threads(1)
    results.append(run())
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_unwhitened_rows_do_not_depend_on_the_batch():
    kwargs = reference.sample((20, 70))
    whole = advantages(**kwargs, kl_coef=0.1, whiten=False)
    for i in (0, 7, 19):
        alone = advantages(**{k: v[i : i + 1] for k, v in kwargs.items()}, kl_coef=0.1, whiten=False)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))


def test_strided_inputs_and_inputs_are_not_changed():
    kwargs = reference.sample((12, 7))
    copies = {k: v.clone() for k, v in kwargs.items()}
    expected = advantages(**kwargs, kl_coef=0.1)
    strided = {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in kwargs.items()}
    assert all(torch.equal(a, b) for a, b in zip(expected, advantages(**strided, kl_coef=0.1), strict=True))
    assert all(torch.equal(kwargs[k], copies[k]) for k in kwargs)


Z = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores": torch.zeros(3)},
            r"'scores' got shape \(3,\), expected \(2,\), one per sequence, or \(2, 3\), one per token",
        ),
        ({"scores": 1.0}, "'scores' got float"),
        ({"values": torch.zeros(2, 3, 1)}, r"'mask' got shape \(2, 3\), expected \(2, 3, 1\)"),
        ({"mask": None}, "'mask' got None"),
        ({"logprobs": Z}, "'ref_logprobs' got None, expected a tensor, since logprobs is given"),
        ({"kl_coef": 0.1}, "'kl_coef' got 0.1, expected 0 without logprobs"),
        ({"logprobs": Z, "ref_logprobs": Z, "kl_coef": -0.1}, r"'kl_coef' got -0.1"),
        ({"logprobs": Z, "ref_logprobs": Z, "kl_coef": float("nan")}, "'kl_coef' got nan"),
        ({"kl_kind": "k9"}, "'kl_kind' got 'k9'"),
        ({"dialect": "esperanto"}, "'dialect' got 'esperanto', expected one of 'rlhf_fast', 'trl', 'verl'"),
        ({"gamma": 1.2}, "'gamma' got 1.2"),
        ({"lam": -0.1}, "'lam' got -0.1"),
        ({"gap": "skip"}, "'gap' got 'skip'"),
        ({"bootstrap": torch.zeros(3)}, r"'bootstrap' got shape \(3,\), expected \(2,\)"),
        ({"cu_seqlens": torch.tensor([0, 6])}, r"'values' got shape \(2, 3\), expected \(N,\) with cu_seqlens"),
        ({"scores": torch.zeros(2, device="meta")}, "'scores' got device meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    kwargs = {"scores": torch.zeros(2), "values": Z, "mask": torch.ones(2, 3, dtype=torch.bool), **change}
    with pytest.raises((ValueError, TypeError), match="advantages: argument " + message):
        advantages(**kwargs)


def test_meta_tensors_have_shapes_and_no_data():
    v = torch.zeros(2, 3, device="meta")
    out = advantages(torch.zeros(2, device="meta"), v, torch.ones(2, 3, dtype=torch.bool, device="meta"))
    assert all(x.shape == (2, 3) and x.is_meta for x in out)
