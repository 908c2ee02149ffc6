from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import tolerances
import torch
from torch.nn.functional import logsigmoid

import rlhf_fast
from rlhf_fast.ops.group_advantages import FORMULAS
from rlhf_fast.preference import preference_loss, running_delta, update_reference
from rlhf_fast.preference_kinds import DIVERGENCES, KINDS

# logpi_w = -10, logpi_l = -12, reference -11 for both, lengths 5 and 8, beta .1: D = 2, x = .2, means -2 and -1.5.
W, L, REF = torch.tensor([-10.0]).double(), torch.tensor([-12.0]).double(), torch.tensor([-11.0]).double()
LENGTHS = {"chosen_lengths": torch.tensor([5]), "rejected_lengths": torch.tensor([8])}
KL = torch.tensor([0.75, 0.25]).double()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def nls(x):
    """-log sigmoid."""
    return math.log1p(math.exp(-x))


def odds(a):
    return a - math.log(1 - math.exp(a))


E = {"label_smoothing": 0.1}
Q = sigmoid(0.2)
DPO, SMOOTH = 0.5981389, 0.6181389  # formulas by hand: -log sigmoid(.2); .9 of it and .1 of .7981389

WORKED = {
    "dpo": [
        ({}, DPO),
        (E, SMOOTH),
        ({"divergence": "forward_kl"}, nls(0.1 * (math.e - 1 / math.e))),  # -1/u at u = e and 1/e
        ({"divergence": "js"}, nls(0.1)),  # log s(1) - log s(-1) = 1
        ({"divergence": "alpha", "alpha": 0.5}, nls(0.1 * 2 * (math.exp(0.5) - math.exp(-0.5)))),
        ({"divergence": "alpha", "alpha": 0.0}, DPO),
    ],
    "cdpo": [(E, SMOOTH)],
    "robust": [(E, (0.9 * DPO - 0.1 * 0.7981389) / 0.8)],
    "ipo": [({}, 9.0)],
    "ipo_norm": [(LENGTHS, (1 / 5 + 1 / 8 - 5) ** 2)],
    "hinge": [({}, 0.8)],
    "exo": [(E, Q * math.log(Q / 0.9) + (1 - Q) * math.log((1 - Q) / 0.1))],
    "nca": [({}, nls(0.1) + nls(-0.1) / 2 + nls(0.1) / 2)],
    "bco": [({}, 2 * nls(0.1)), ({"delta": 0.3}, nls(-0.2) + nls(0.4)), ({"delta": torch.tensor(0.3)}, nls(-0.2) + nls(0.4))],
    "apo_zero": [({}, 2 * sigmoid(-0.1))],
    "apo_down": [({}, sigmoid(0.1) + sigmoid(-0.2))],
    "sppo": [({}, (1 - 5) ** 2 + (-1 + 5) ** 2)],
    "aot": [({}, DPO), (E, SMOOTH)],
    "aot_unpaired": [({}, DPO), (E, SMOOTH)],
    "discopop": [
        ({}, (1 - sigmoid(4.0)) * DPO + sigmoid(4.0) * math.exp(-0.2)),
        ({"tau": 0.2}, (1 - sigmoid(1.0)) * DPO + sigmoid(1.0) * math.exp(-0.2)),
    ],
    "dpop": [({}, DPO), (E, SMOOTH)],  # the chosen answer gained; a falling one is below
    "sigmoid_norm": [(LENGTHS, nls(0.1 * (1 / 5 + 1 / 8)))],
    "rdpo": [(LENGTHS, nls(0.2 - 0.03)), ({**LENGTHS, "length_coef": 0.1}, nls(0.2 - 0.3))],
    "rpo": [(LENGTHS, DPO + 2), ({**LENGTHS, "nll_coef": 0.5}, DPO + 1)],
    "wpo": [(LENGTHS, DPO * math.exp(-3.5))],
    "kto": [
        ({"kl_logratios": KL}, sigmoid(-0.1 * 0.5) + sigmoid(-0.1 * 1.5)),  # z0 = .5
        ({"kl_logratios": -KL}, sigmoid(-0.1) + sigmoid(-0.1)),  # a negative mean counts 0
        ({"kl_logratios": KL, "desirable_weight": 2.0, "undesirable_weight": 0.5}, 2 * sigmoid(-0.05) + 0.5 * sigmoid(-0.15)),
    ],
    "slic": [({"gamma": 1.0}, 0.8 + 10), ({"gamma": 0.1, "nll_coef": 0.5}, 5.0)],
    "simpo": [(LENGTHS, nls(-0.05)), ({**LENGTHS, "gamma": 0.5}, nls(-0.55)), ({**LENGTHS, **E}, 0.9 * nls(-0.05) + 0.1 * nls(0.05))],
    "alpha_po": [
        ({**LENGTHS, "alpha": 0.0, "gamma": 0.5}, nls(-0.55)),
        ({**LENGTHS, "alpha": 0.25, "gamma": 0.5}, nls(0.1 * 4 * (math.exp(0.375) - math.exp(0.5)) - 0.5)),
    ],
    "cpo": [({}, DPO + 10), ({"nll_coef": 0.0}, DPO)],
    "orpo": [(LENGTHS, 2 + 0.1 * nls(odds(-2.0) - odds(-1.5)))],
    "sft": [(LENGTHS, 2.0)],
}  # fmt: skip


def test_every_kind_of_the_table_has_worked_values():
    assert set(WORKED) == set(KINDS)


def refs_of(kind, *tensors):
    return tensors if KINDS[kind].reference else ()


def settings(kind, n=1):
    """What a kind needs besides the log-probs, for n pairs."""
    options = WORKED[kind][1 if kind == "dpo" else -1][0]
    return {k: v.expand(n) if k in LENGTHS else v for k, v in options.items()}


def draw(kind, n, dtype=torch.float64, seed=1):
    """Log-probs of n pairs, with a reference when the kind has one."""
    g = torch.Generator().manual_seed(seed)
    tensors = [-3 - 2 * torch.rand(n, generator=g, dtype=torch.float64) for _ in range(4)]
    return [x.to(dtype) for x in tensors[: 4 if KINDS[kind].reference else 2]]


@pytest.mark.parametrize(
    ("kind", "options", "expected"), [(kind, *row) for kind, rows in WORKED.items() for row in rows], ids=str
)
def test_worked_values(kind, options, expected):
    loss = preference_loss(W, L, *refs_of(kind, REF, REF), kind=kind, **options).loss
    assert loss.dtype is torch.float64 and loss.item() == pytest.approx(expected, abs=tolerances.WORKED)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dpo", math.log(2)),
        ("cdpo", math.log(2)),
        ("robust", math.log(2)),
        ("ipo", 25.0),
        ("hinge", 1.0),
        ("aot", math.log(2)),
        ("aot_unpaired", math.log(2)),
        ("discopop", 0.5 * math.log(2) + 0.5),
        ("apo_zero", 1.0),
    ],
)
def test_item_39_at_the_reference_the_losses_have_their_known_start(kind, expected):
    x = -10 * torch.rand(7)
    assert preference_loss(x, x - 1, x, x - 1, kind=kind).loss.item() == pytest.approx(expected, rel=1e-6)


def test_case_1_10_8_ipo_differs_between_sums_and_means_per_token():
    # OpenRLHF uses sums, TRL means: here the name says which.
    sums = preference_loss(W, L, REF, REF, kind="ipo").loss
    means = preference_loss(W, L, REF, REF, kind="ipo_norm", **LENGTHS).loss
    assert sums.item() == 9.0 and means.item() == pytest.approx(21.855625)


def test_kinds_that_coincide():
    w, l, rw, rl = draw("dpo", 9)
    dpo = preference_loss(w, l, rw, rl).loss
    assert torch.equal(preference_loss(w, l, rw, rl, kind="cdpo").loss, dpo)
    close = lambda got: torch.testing.assert_close(got, dpo)
    lengths = {"chosen_lengths": torch.ones(9).long(), "rejected_lengths": torch.ones(9).long()}
    close(preference_loss(w, l, rw, rl, kind="sigmoid_norm", **lengths).loss)
    close(preference_loss(w, l, rw, rl, kind="rdpo", **lengths).loss)  # equal lengths owe each other nothing
    close(preference_loss(w, l, rw, rl, kind="rpo", nll_coef=0.0, **lengths).loss)
    close(preference_loss(w, l, rw, rl, kind="dpop", penalty=0.0).loss)
    close(preference_loss(w, l, rw, rl, divergence="alpha", alpha=1e-9).loss)
    forward = preference_loss(w, l, rw, rl, divergence="forward_kl").loss
    torch.testing.assert_close(preference_loss(w, l, rw, rl, divergence="alpha", alpha=1.0).loss, forward)
    kto = preference_loss(w, l, rw, rl, kind="kto", kl_logratios=w[:0]).loss  # no baseline: unpaired APO-zero
    torch.testing.assert_close(kto, preference_loss(w, l, rw, rl, kind="apo_zero").loss)
    simpo = preference_loss(w, l, kind="simpo", gamma=0.3, **lengths).loss
    torch.testing.assert_close(preference_loss(w, l, kind="alpha_po", alpha=1e-9, gamma=0.3, **lengths).loss, simpo)


def test_dpop_charges_a_falling_chosen_answer():
    _, l, rw, rl = draw("dpo", 9)
    fallen = preference_loss(rw - 1, l, rw, rl, kind="dpop", penalty=2.0).loss
    torch.testing.assert_close(fallen, -logsigmoid(0.1 * ((-1 - (l - rl)) - 2.0)).mean())


def test_wpo_takes_no_gradient_through_its_weight_and_never_weighs_above_one():
    w, l, rw, rl = draw("wpo", 4)
    lengths = {"chosen_lengths": torch.tensor([1, 2, 3, 4]), "rejected_lengths": torch.tensor([4, 3, 2, 1])}
    weights = (w / lengths["chosen_lengths"] + l / lengths["rejected_lengths"]).exp()
    leaf = w.clone().requires_grad_()
    grads = []
    for options in ({"kind": "wpo", **lengths}, {"kind": "dpo", "weights": weights}):
        loss = preference_loss(leaf, l, rw, rl, **options).loss
        grads.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(grads[0], grads[1])
    sure = preference_loss(-w, -l, rw, rl, kind="wpo", **lengths).loss
    torch.testing.assert_close(sure, preference_loss(-w, -l, rw, rl).loss)


def test_aot_sorts_differences_or_rewards_and_leaves_masked_pairs_out():
    w, l = torch.tensor([3.0, 1.0, 9.0]), torch.tensor([0.0, 2.0, 9.0])
    rw, rl = torch.tensor([1.0, 0.0, 9.0]), torch.tensor([0.0, 0.5, 0.0])
    mask = torch.tensor([True, True, False])
    paired = preference_loss(w, l, rw, rl, kind="aot", beta=1.0, mask=mask).loss
    # w - l = 3, -1; ref = 1, -.5
    torch.testing.assert_close(paired, -logsigmoid(torch.tensor([-1.0 + 0.5, 3.0 - 1.0])).mean())
    unpaired = preference_loss(w, l, rw, rl, kind="aot_unpaired", beta=1.0, mask=mask).loss
    # w - ref = 2, 1; l - ref = 0, 1.5
    torch.testing.assert_close(unpaired, -logsigmoid(torch.tensor([1.0 - 0.0, 2.0 - 1.5])).mean())


def test_a_mixture_is_the_weighted_sum_of_its_kinds():
    w, l, rw, rl = draw("dpo", 6)
    lengths = {"chosen_lengths": torch.tensor([3, 4, 5, 6, 7, 8]), "rejected_lengths": torch.tensor([9, 8, 7, 6, 5, 4])}
    mpo = preference_loss(w, l, rw, rl, kind={"dpo": 0.8, "bco": 0.2, "sft": 1.0}, delta=0.1, **lengths)
    parts = 0.8 * preference_loss(w, l, rw, rl).loss + 0.2 * preference_loss(w, l, rw, rl, kind="bco", delta=0.1).loss
    torch.testing.assert_close(mpo.loss, parts + preference_loss(w, l, kind="sft", **lengths).loss)
    torch.testing.assert_close(mpo.chosen_rewards, 0.1 * (w - rw))
    # Kinds of one mixture compare different things: log-ratios, means of them, and log-probs.
    mixed = preference_loss(w, l, rw, rl, kind={"ipo": 1.0, "ipo_norm": 1.0, "cpo": 1.0}, **lengths).loss
    alone = preference_loss(w, l, rw, rl, kind="ipo").loss + preference_loss(w, l, kind="cpo").loss
    torch.testing.assert_close(mixed, alone + preference_loss(w, l, rw, rl, kind="ipo_norm", **lengths).loss)


def test_rewards_are_beta_times_the_log_ratio_and_detached():
    w = W.clone().requires_grad_()
    out = preference_loss(w, L, REF, REF, beta=0.5)
    assert out.chosen_rewards.item() == 0.5 and out.rejected_rewards.item() == -0.5
    assert not out.chosen_rewards.requires_grad and out.loss.requires_grad
    assert preference_loss(w, L, kind="simpo", **LENGTHS).chosen_rewards.item() == pytest.approx(-0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    w, l, *refs = draw(kind, 5)
    if kind == "wpo":  # its weight is a constant, so the finite differences see it move; tested against dpo above
        return
    call = lambda a, b: preference_loss(a, b, *refs, kind=kind, mask=torch.arange(5) != 2, **settings(kind, 5)).loss
    assert torch.autograd.gradcheck(call, (w.requires_grad_(), l.requires_grad_()), **tolerances.GRADCHECK)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_of_every_divergence(divergence):
    w, l, *refs = draw("dpo", 5)
    options = {"divergence": divergence, **({"alpha": 0.4} if divergence == "alpha" else {})}
    call = lambda a, b: preference_loss(a, b, *refs, **options).loss
    assert torch.autograd.gradcheck(call, (w.requires_grad_(), l.requires_grad_()), **tolerances.GRADCHECK)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_pairs_are_never_read_and_the_order_does_not_matter(kind):
    tensors = draw(kind, 6, torch.float32)
    mask = torch.tensor([True, False, True, True, False, True])
    options = settings(kind, 6)
    clean = preference_loss(*tensors, kind=kind, mask=mask, **options)
    dirty = [x.where(mask, float("nan")).requires_grad_() for x in tensors]
    got = preference_loss(*dirty, kind=kind, mask=mask, **options)
    assert torch.equal(got.loss.detach(), clean.loss) and not got.chosen_rewards[~mask].any()
    got.loss.backward()
    assert dirty[0].grad.isfinite().all() and not dirty[0].grad[~mask].any()
    assert all(x.grad is None for x in dirty[2:])
    order = torch.randperm(6)
    moved = preference_loss(*(x[order] for x in tensors), kind=kind, mask=mask[order], **options)
    torch.testing.assert_close(moved.loss, clean.loss)
    less = {k: v[mask] if k in LENGTHS else v for k, v in options.items()}
    torch.testing.assert_close(preference_loss(*(x[mask] for x in tensors), kind=kind, **less).loss, clean.loss)
    nothing = preference_loss(*tensors, kind=kind, mask=torch.zeros(6, dtype=torch.bool), **options)
    assert nothing.loss == 0
    empty = {k: v[:0] if k in LENGTHS else v for k, v in options.items()}
    assert preference_loss(*(x[:0] for x in tensors), kind=kind, **empty).loss == 0


# Kinds that look across the pairs only whole and pair by pair: a coarse split may keep the ranks that count.
CUTS = [(0, 7), (0, 1, 7), (0, 3, 3, 7), (0, 1, 2, 3, 4, 5, 6, 7)]
SPLITS = [(kind, cuts) for kind in KINDS for cuts in (CUTS[::3] if KINDS[kind].across else CUTS)]


@pytest.mark.parametrize(("kind", "cuts"), SPLITS, ids=str)
def test_micro_batches_that_share_the_number_of_pairs_add_up(kind, cuts):
    tensors, mask = draw(kind, 7), torch.tensor([True, True, False, True, True, True, True])
    lengths = {"chosen_lengths": torch.arange(3, 10), "rejected_lengths": torch.arange(12, 5, -1)}
    options = {k: lengths.get(k, v) for k, v in settings(kind, 7).items()}
    options["weights"] = torch.linspace(0.5, 2, 7).double()
    if KINDS[kind].across:
        with pytest.raises(ValueError, match="'weights'"):
            preference_loss(*tensors, kind=kind, **options)
        del options["weights"]

    def run(rows, normalizer):
        leaf = tensors[0][rows].clone().requires_grad_()
        part = {k: v[rows] if k in (*LENGTHS, "weights") else v for k, v in options.items()}
        loss = preference_loss(
            leaf, *(x[rows] for x in tensors[1:]), kind=kind, mask=mask[rows], normalizer=normalizer, **part
        ).loss
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    whole = run(slice(0, 7), None)
    for normalizer in (mask.sum(), 6.0):
        parts = [run(slice(i, j), normalizer) for i, j in pairwise(cuts)]
        agree = torch.allclose(sum(p[0] for p in parts), whole[0], rtol=1e-12)
        if KINDS[kind].across and len(cuts) > 2:
            assert not agree  # what the docs say of it
            continue
        assert agree
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sure_pairs_stay_finite(kind, dtype):
    refs = refs_of(kind, *[torch.full((2,), -500.0, dtype=dtype)] * 2)
    w = torch.tensor([-1e-8, -1000.0], dtype=dtype, requires_grad=True)
    l = torch.tensor([-1000.0, -1e-8], dtype=dtype, requires_grad=True)
    for divergence in DIVERGENCES if KINDS[kind].divergence else ["reverse_kl"]:
        options = {**settings(kind, 2), **({"divergence": divergence} if KINDS[kind].divergence else {})}
        if divergence == "alpha":
            options["alpha"] = 1.5
        loss = preference_loss(w, l, *refs, kind=kind, beta=0.5, **options).loss
        grads = torch.autograd.grad(loss, (w, l), allow_unused=True)
        assert loss.dtype is torch.float32 and loss.isfinite()
        assert all(g is None or g.isfinite().all() for g in grads)


def test_half_precision_is_computed_in_fp32():
    tensors = draw("dpo", 50, torch.bfloat16)
    assert torch.equal(preference_loss(*tensors).loss, preference_loss(*(x.float() for x in tensors)).loss)


def test_strided_inputs_and_inputs_stay_as_they_were():
    x = -5 * torch.rand(4, 6)
    strided = x.T.contiguous().T
    before = strided.clone()
    assert torch.equal(preference_loss(*strided).loss, preference_loss(*x).loss) and torch.equal(strided, before)


def test_compile_gives_the_eager_result_and_gradient():
    tensors = draw("dpo", 6, torch.float32)

    def both(w, l, rw, rl):
        mixed = preference_loss(w, l, rw, rl, kind={"dpo": 0.5, "nca": 0.5}, normalizer=7.0).loss
        return mixed + preference_loss(w, l, rw, rl, kind="aot", label_smoothing=0.1).loss

    results = []
    for call in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaf = tensors[0].clone().requires_grad_()
        loss = call(leaf, *tensors[1:])
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(results[0], results[1])


def test_bco_subtracts_the_running_mean_of_the_rewards():
    delta, seen, rewards = torch.zeros(()), torch.zeros((), dtype=torch.int64), []
    for step in range(3):
        tensors = draw("bco", 5, torch.float32, seed=step)
        mask = torch.tensor([True, True, True, False, step != 1])
        out = preference_loss(*tensors, kind="bco", delta=delta, mask=mask)
        both = torch.stack([out.chosen_rewards, out.rejected_rewards])
        delta, seen = running_delta(delta, seen, both.where(mask, float("nan")), mask.expand(2, 5))
        rewards += [out.chosen_rewards[mask], out.rejected_rewards[mask]]
        torch.testing.assert_close(delta, torch.cat(rewards).mean())
        assert seen == len(torch.cat(rewards))


def test_the_reference_of_tr_dpo_moves_towards_the_policy_in_place():
    policy, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).bfloat16()
    expected = [(0.4 * r.float() + 0.6 * p).bfloat16() for r, p in zip(reference.parameters(), policy.parameters())]  # noqa: B905
    before = [p.clone() for p in policy.parameters()]
    update_reference(reference.parameters(), policy.parameters())
    for got, want in zip(reference.parameters(), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert all(map(torch.equal, before, policy.parameters()))
    update_reference(reference.parameters(), policy.parameters(), 1.0)
    assert torch.equal(reference.weight, policy.weight.bfloat16())
    with pytest.raises(ValueError, match="update_reference: argument 'policy' got 1 tensors"):
        update_reference(reference.parameters(), [policy.weight])


def test_the_command_prints_a_row_for_every_kind():
    call = [sys.executable, "-m", "rlhf_fast.tables"]
    out = subprocess.run([*call, "preference"], capture_output=True, text=True, check=True)
    rows = [line for line in out.stdout.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(KINDS) and not out.stderr
    columns = {row.replace("\\|", "").count("|") for row in out.stdout.splitlines() if row.startswith("|")}
    assert columns == {5}
    both = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert out.stdout in both and all(f'`group_advantages(kind="{kind}")`' in both for kind in FORMULAS)
    failed = subprocess.run([*call, "losses of"], capture_output=True, text=True)
    assert failed.returncode == 2 and "unknown tables ['losses of']" in failed.stderr


def test_preference_loss_is_public():
    assert rlhf_fast.preference_loss is preference_loss


NO_REF = {"ref_chosen_logprobs": None, "ref_rejected_logprobs": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dpoo"}, "'kind' got 'dpoo', expected one of 'dpo', 'cdpo', 'robust'"),
        ({"kind": {}}, "'kind' got an empty mapping"),
        ({"kind": {"dpo": 1.0, "mpo": 1.0}}, "'kind' got 'mpo'"),
        ({"kind": {"dpo": float("nan")}}, r"'kind\['dpo'\]' got nan"),
        ({"beta": 0.0}, "'beta' got 0.0"),
        ({"beta": -0.1}, "'beta' got -0.1"),
        ({"beta": float("nan")}, "'beta' got nan"),
        ({"label_smoothing": 0.5}, "'label_smoothing' got 0.5"),
        (
            {"kind": "ipo", "label_smoothing": 0.1},
            r"'label_smoothing' got 0.1, expected 0.0 with kind ipo \(only dpo, cdpo",
        ),
        ({"kind": "exo"}, "'label_smoothing' got 0.0, expected a number in"),
        ({"gamma": 1.0}, r"'gamma' got 1.0, expected 0.0 with kind dpo \(only slic, simpo, alpha_po read it\)"),
        ({"delta": torch.tensor(1.0)}, "'delta' got 1.0"),
        ({"kind": "bco", "delta": torch.zeros(1)}, r"'delta' got shape \(1,\)"),
        ({"kind": "discopop", "tau": 1.5}, "'tau' got 1.5"),
        ({"kind": "discopop", "tau": 0.0}, "'tau' got 0.0"),
        ({"alpha": 0.5}, "'alpha' got 0.5, expected None with kind dpo"),
        ({"divergence": "alpha"}, "'alpha' got None, expected a number with dpo and divergence 'alpha'"),
        ({"divergence": "kl"}, "'divergence' got 'kl'"),
        ({"kind": "ipo", "divergence": "js"}, "'divergence' got 'js', expected 'reverse_kl' with kind ipo"),
        ({"ref_chosen_logprobs": None}, "'ref_chosen_logprobs' got NoneType"),
        ({"kind": "cpo"}, "'ref_chosen_logprobs' got a tensor, expected None: cpo takes no reference"),
        ({"kind": "simpo", **NO_REF}, "'chosen_lengths' got None"),
        ({"kind": "ipo_norm", "chosen_lengths": torch.tensor([5])}, "'rejected_lengths' got None"),
        ({"kind": "ipo", **LENGTHS}, r"'chosen_lengths' got a tensor, expected None with kind ipo \(only ipo_norm"),
        ({"kind": "ipo_norm", **LENGTHS, "chosen_lengths": torch.ones(1)}, "'chosen_lengths' got torch.float32"),
        ({"kind": "kto"}, "'kl_logratios' got NoneType"),
        ({"kind": "kto", "kl_logratios": torch.zeros(1, 1)}, r"'kl_logratios' got shape \(1, 1\)"),
        ({"kl_logratios": KL}, "'kl_logratios' got a tensor, expected None with kind dpo"),
        ({"weights": torch.zeros(2)}, "'weights' got shape"),
        ({"normalizer": 0.0}, "'normalizer' got 0.0"),
        ({"normalizer": torch.ones(1)}, "'normalizer' got shape"),
        ({"rejected_logprobs": torch.zeros(2)}, r"'rejected_logprobs' got shape \(2,\), expected \(1,\)"),
        (
            {"chosen_logprobs": torch.zeros(1, 1, 1)},
            r"'chosen_logprobs' got shape \(1, 1, 1\), expected \(B,\), or \(B, T\)",
        ),
        ({"mask": torch.ones(1)}, "'mask' got torch.float32"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    kwargs = {
        "chosen_logprobs": W, "rejected_logprobs": L, "ref_chosen_logprobs": REF, "ref_rejected_logprobs": REF, **change,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match="preference_loss: argument " + message):
        preference_loss(**kwargs)
