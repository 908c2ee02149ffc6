"""preference_loss on the log-probs of tokens: every kind of the table, by the kernel where it covers it."""

from __future__ import annotations

import pytest
import torch
from parity import assert_parity, double

from rlhf_fast import linear_token_logprobs, preference_loss, sequence_logprobs
from rlhf_fast.preference_kinds import KINDS
from rlhf_fast.reference.dpo_loss import sample

LEAVES = ("chosen_logprobs", "rejected_logprobs")
FUSED = [name for name, kind in KINDS.items() if kind.fused]
OPTIONS = {
    "exo": {"label_smoothing": 0.1},
    "alpha_po": {"alpha": 0.25},
    "kto": {"kl_logratios": torch.tensor([0.75, 0.25])},
}
MORE = {"simpo": {"gamma": 0.5, "label_smoothing": 0.1}, "ipo": {"beta": 0.7}, "hinge": {"beta": 4.0}}
"""Options on top of those that a kind needs."""


def batch(kind, shape=(6, 21), dtype=torch.float64, seed=0):
    """Answers that differ in length, an empty one among them, with NaN behind the masks."""
    kwargs = sample(shape, dtype=dtype, seed=seed)
    kwargs["rejected_mask"][2] = False
    for side in ("chosen", "rejected"):
        for name in (f"{side}_logprobs", f"ref_{side}_logprobs"):
            kwargs[name] = kwargs[name].where(kwargs[f"{side}_mask"], float("nan"))
    unread = () if KINDS[kind].reference else ("ref_chosen_logprobs", "ref_rejected_logprobs")
    unread += ("weights",) if KINDS[kind].across else ()
    return {k: v for k, v in kwargs.items() if k not in unread}


def run(kwargs, **options):
    """(loss, rewards of both, gradients of LEAVES)."""
    leaves = {k: kwargs[k].clone().requires_grad_() for k in LEAVES}
    out = preference_loss(**{**kwargs, **leaves}, **options)
    return out.loss.detach(), *out[1:], *torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)


def whole(kwargs, kind, **options):
    """The same from the log-probs of whole answers."""
    leaves = {k: kwargs[k].clone().requires_grad_() for k in LEAVES}
    given = {k: v for k, v in kwargs.items() if k in ("mask", "weights")}
    for side in ("chosen", "rejected"):
        packing = kwargs.get(f"{side}_cu_seqlens")
        for name in (f"{side}_logprobs", f"ref_{side}_logprobs"):
            if name in kwargs:
                x = leaves.get(name, kwargs[name])
                given[name], lengths = sequence_logprobs(x, kwargs.get(f"{side}_mask"), cu_seqlens=packing)
        if KINDS[kind].per_token or KINDS[kind].lengths:
            given[f"{side}_lengths"] = lengths
    out = preference_loss(**given, kind=kind, **options)
    return out.loss.detach(), *out[1:], *torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)


def packed(kwargs, lengths):
    found = {k: v for k, v in kwargs.items() if v.dim() == 1}
    for side, n in lengths.items():
        inside = torch.arange(kwargs[f"{side}_mask"].shape[1]) < torch.tensor(n)[:, None]
        found |= {k: v[inside] for k, v in kwargs.items() if side in k.replace("ref_", "").split("_")[0]}
        found[f"{side}_cu_seqlens"] = torch.tensor([0, *n]).cumsum(0)
    return found


def test_the_kinds_that_depend_on_the_gap_alone_have_a_kernel():
    assert FUSED == ["dpo", "cdpo", "robust", "ipo", "ipo_norm", "hinge", "sigmoid_norm", "simpo"]


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_of_tokens_give_what_those_of_whole_answers_give(kind):
    options = {**OPTIONS.get(kind, {}), **MORE.get(kind, {})}
    kwargs = batch(kind)
    flat = packed(kwargs, {"chosen": [21, 3, 9, 0, 21, 1], "rejected": [25, 25, 4, 7, 1, 2]})
    for x in (kwargs, flat):
        expected = whole(x, kind, **options)
        for found in (run(x, kind=kind, **options), run(x, kind=kind, **options, fused=False)):
            for a, b in zip(found, expected, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FUSED)
def test_the_kernel_and_the_formula_of_a_kind_agree(kind, dtype):
    takes = {"label_smoothing": 0.2, "gamma": 0.3}
    options = {"kind": kind, "beta": 0.3, **{k: v for k, v in takes.items() if k in KINDS[kind].options}}
    for seed, shape in enumerate([(6, 21), (3, 700), (1, 1), (0, 4)]):
        kwargs = batch(kind, shape, dtype, seed) if shape[0] > 2 else sample(shape, dtype=dtype)
        if not KINDS[kind].reference:
            kwargs = {k: v for k, v in kwargs.items() if not k.startswith("ref_")}
        for normalizer in (None, 7.0):
            given = {**options, "normalizer": normalizer}
            fused, plain = run(kwargs, **given, fused=True), run(kwargs, **given, fused=False)
            truth = run(double(kwargs), **given, fused=False)
            for g, t, p, name in zip(fused, truth, plain, ("loss", "rewards", "rewards", *LEAVES), strict=True):
                size = None
                if (
                    dtype is torch.float64 and t.numel()
                ):  # the truth is rounded like the result, as are the sums behind it
                    answers = (kwargs[k].where(kwargs[k.replace("logprobs", "mask")], 0.0).sum(1) for k in LEAVES)
                    size = 1 + max((x.abs().max().item() for x in answers if len(x)), default=0.0)
                    size = {"loss": size**2, "rewards": size}.get(name, size * t.abs().max().item())
                assert_parity(g, t, p, name, size)
            default = run(kwargs, **given)
            assert all(torch.equal(a, b) for a, b in zip(fused, default, strict=True))
            assert not fused[3][~kwargs["chosen_mask"]].any() and not fused[4][~kwargs["mask"]].any()


def test_the_gradient_reaches_the_hidden_states_without_logits():
    g = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(4, 7, 16, generator=g), torch.randn(50, 16, generator=g)
    ids, mask = torch.randint(0, 50, (4, 7), generator=g), torch.rand(4, 7, generator=g) > 0.2
    ref = linear_token_logprobs(hidden, weight, ids, mask=mask).logprobs + 0.1
    found = []
    for fused in (True, False):
        leaf = hidden.clone().requires_grad_()
        both = linear_token_logprobs(leaf, weight, ids, mask=mask).logprobs
        masks = {"chosen_mask": mask[:2], "rejected_mask": mask[2:]}
        loss = preference_loss(*both.split(2), *ref.split(2), **masks, fused=fused).loss
        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert not found[0][1][~mask].any() and found[0][1].any()


def test_the_formula_can_be_differentiated_twice():
    kwargs = batch("dpo")
    leaf = kwargs["chosen_logprobs"].requires_grad_()
    (grad,) = torch.autograd.grad(preference_loss(**kwargs, fused=False).loss, leaf, create_graph=True)
    assert torch.autograd.grad(grad.sum(), leaf)[0].any()


Z, ONE = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_chosen_logprobs": None}, "'ref_chosen_logprobs' got None"),
        ({"ref_rejected_logprobs": None, "ref_chosen_logprobs": None}, "'ref_chosen_logprobs' got None"),
        ({"kind": "simpo"}, "'ref_chosen_logprobs' got a tensor, expected None: simpo takes no reference"),
        ({"kind": "rpo", "ref_rejected_logprobs": torch.zeros(2, 4)}, "'ref_rejected_logprobs' got shape"),
        (
            {"chosen_lengths": torch.ones(2).int()},
            "'chosen_lengths' got a tensor, expected None with log-probs of tokens",
        ),
        (
            {"rejected_logprobs": torch.zeros(3, 3), "ref_rejected_logprobs": torch.zeros(3, 3)},
            "'rejected_logprobs' got 3 answers",
        ),
        ({"chosen_mask": torch.ones(2).bool()}, "'chosen_mask' got shape"),
        ({"weights": torch.ones(3)}, "'weights' got shape"),
        ({"kl_logratios": ONE}, "'kl_logratios' got a tensor, expected None with kind dpo"),
        ({"kind": "rpo", "fused": True}, "'fused' got True, expected None or False: no kernel covers rpo"),
        ({"kind": {"dpo": 0.5}, "fused": True}, "'fused' got True, expected None or False: no kernel covers dpo"),
        ({"divergence": "js", "fused": True}, "'fused' got True, expected None or False: no kernel covers dpo"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    kwargs = dict.fromkeys((*LEAVES, "ref_chosen_logprobs", "ref_rejected_logprobs"), Z)
    with pytest.raises((ValueError, TypeError), match="preference_loss: argument " + message):
        preference_loss(**{**kwargs, **change})


def test_masks_and_boundaries_of_tokens_are_refused_with_whole_answers():
    for change in ({"chosen_mask": ONE.bool()}, {"rejected_mask": ONE.bool()}, {"rejected_cu_seqlens": ONE.int()}):
        (name,) = change
        with pytest.raises(ValueError, match=f"'{name}' got a tensor, expected None with log-probs of whole answers"):
            preference_loss(ONE, ONE, ONE, ONE, **change)
    with pytest.raises(ValueError, match="'fused' got True, expected None or False: no kernel covers dpo"):
        preference_loss(ONE, ONE, ONE, ONE, fused=True)
