from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from integrations import fakes

import rlhf_fast
from rlhf_fast.integrations import status
from rlhf_fast.integrations.trl import LigerGRPOLoss

UTILS = "trl.trainer.utils"
HEAD = "trl.kernels.chunked_logprob.ChunkedLogProbFunction.apply"


def close(a, b, **kwargs):
    """Values and dtypes agree; None agrees with None."""
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, **kwargs)


def both(get, path, call):
    """call(function) before and after the patch: [(results, gradients)] twice, and the counters of the function."""
    results = [call(get(path))]
    rlhf_fast.patch("trl", quiet=True)
    results.append(call(get(path)))
    return *results, next(r for r in status("trl") if r.symbol == path)


def logits_and_ids(dtype=torch.float32, shape=(3, 5), vocab=11):
    return torch.randn(*shape, vocab, dtype=dtype, requires_grad=True), torch.randint(0, vocab, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"row_mask": True}, {"temperature": 2.0, "row_mask": True}]
)
@pytest.mark.parametrize("entropy", [None, False, True])
def test_log_probs_and_entropy(dtype, options, entropy, framework):
    x, ids = logits_and_ids(dtype)
    options = {**options, "row_mask": torch.rand(3, 5) > 0.4} if "row_mask" in options else options
    name = "selective_log_softmax" if entropy is None else "selective_log_softmax_and_entropy"

    def call(function):
        found = function(x, ids, **options) if entropy is None else function(x, ids, entropy, **options)
        found = (found,) if entropy is None else found
        assert [y.requires_grad for y in found] == [True, bool(entropy)][: len(found)]
        grad = torch.autograd.grad(sum((y * (n + 1)).sum() for n, y in enumerate(found)), x)
        return (*found, *grad)

    before, after, counts = both(framework("trl"), f"{UTILS}.{name}", call)
    close(after, before)
    assert counts.reached == 1 and not counts.fell_through


@pytest.mark.parametrize("k", [1, 4])
def test_several_tokens_per_position(k, framework):
    x, ids = logits_and_ids()[0], torch.randint(0, 11, (3, 5, k))
    call = lambda function: (y := function(x, ids), torch.autograd.grad(y.square().sum(), x)[0])
    before, after, counts = both(framework("trl"), f"{UTILS}.selective_log_softmax", call)
    close(after, before)
    assert after[0].shape == ids.shape and counts.reached == 1


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_entropy(shape, framework):
    x = torch.randn(*shape, 9, requires_grad=True)
    call = lambda function: (y := function(x, chunk_size=2), torch.autograd.grad(y.sum(), x)[0])
    before, after, counts = both(framework("trl"), f"{UTILS}.entropy_from_logits", call)
    close(after, before)
    assert counts.reached == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_bits_unless_it_is_asked_for(dtype, framework):
    get = framework("trl")
    x, ids = logits_and_ids(dtype, vocab=700)
    original = get(f"{UTILS}.selective_log_softmax")
    expected = original(x, ids)
    rlhf_fast.patch("trl", quiet=True)
    call = get(f"{UTILS}.selective_log_softmax")
    assert torch.equal(call(x, ids), expected)
    assert status()[0].reached == 0 and "half_precision=True" in str(status())
    rlhf_fast.patch("trl", half_precision=True, quiet=True)
    found, truth = call(x, ids), original(x.double(), ids)
    assert found.dtype is dtype and status()[0].reached == 1
    assert (found.double() - truth).abs().max() <= (expected.double() - truth).abs().max()
    rounded = truth.to(dtype).double()
    torch.testing.assert_close(found.double(), rounded, rtol=torch.finfo(dtype).eps, atol=0.0)  # rounded once


@pytest.mark.parametrize(
    "options",
    [{}, {"final_logit_softcapping": 3.0}, {"logit_scale": 0.25}, {"final_logit_softcapping": 2.0, "logit_scale": 3.0}],
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_head(options, bias, framework):
    hidden, weight = (torch.randn(n, 6, requires_grad=True) for n in (7, 13))
    bias = torch.randn(13, requires_grad=True) if bias else None
    targets = torch.randint(0, 13, (7,))
    rest = (0.7, 4, *(options.get(k, d) for k, d in (("final_logit_softcapping", None), ("logit_scale", 1.0))))

    def call(function):
        logps, entropy, *others = function(hidden, weight, bias, targets, *rest, ("log_probs", "entropy"))
        assert others == [None] * 3
        leaves = [x for x in (hidden, weight, bias) if x is not None]
        return logps, entropy, *torch.autograd.grad((2 * logps + entropy.square()).sum(), leaves)

    before, after, counts = both(framework("trl"), HEAD, call)
    close(after, before, rtol=2e-5, atol=2e-5)
    assert counts.reached == 1


@pytest.mark.parametrize("bias", [False, True])
def test_the_heads_metrics(bias, framework, monkeypatch):
    monkeypatch.setattr("rlhf_fast.integrations.trl.TOP1_BYTES", 100)  # 2 rows at a time
    hidden, weight = torch.randn(7, 6, requires_grad=True), torch.randn(13, 6)
    bias = torch.randn(13) if bias else None
    targets = F.linear(hidden, weight, bias).argmax(-1)
    targets[::3] = 0
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    call = lambda function: function(hidden, weight, bias, targets, 0.7, 4, None, 1.5, outputs)
    before, after, counts = both(framework("trl"), HEAD, call)
    close(after, before)
    assert after[4].sum() >= 4 and not after[4].all() and not after[3].requires_grad and counts.reached == 1


def test_what_the_head_leaves_to_trl(framework):
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.randint(0, 5, (3,))
    get = framework("trl")
    rlhf_fast.patch("trl", quiet=True)
    apply = get(HEAD)
    assert apply(hidden, weight, None, targets, 1.0, 4)[2] is not None  # the default asks for every output
    apply(hidden, weight, None, targets, 1.0, 4, 2.0, 1.0, ("mean_logits",))
    apply(hidden, weight, None, targets, 1.0, 4, None, -1.0, ())
    apply(hidden.bfloat16(), weight.bfloat16(), None, targets, 1.0, 4, None, 1.0, ())
    assert apply(hidden, weight, None, targets, 1.0, 4, None, 1.0, ())[1] is None
    found = next(r for r in status() if r.symbol == HEAD)
    assert found.reached == 1 and sorted(found.fell_through)[1:] == [
        "logit_scale -1.0",
        "the head also returns log_sum_sq_probs",
        "the head also returns the mean of capped logits",
    ]


def test_old_versions_have_another_head_and_ours_gives_its_entropy_a_gradient(framework):
    fakes.old_trl()
    apply = lambda *args: sys.modules[UTILS]._ChunkedLogProbFunction.apply(*args)
    hidden, weight = (torch.randn(n, 6, requires_grad=True) for n in (7, 13))
    targets = torch.randint(0, 13, (7,))
    expected = apply(hidden, weight, targets, 0.7, 4)
    lost = torch.autograd.grad(expected[1].sum(), hidden)[0]
    rlhf_fast.patch("trl", quiet=True)
    found = apply(hidden, weight, targets, 0.7, 4)
    close(found, expected)
    logps = F.log_softmax(F.linear(hidden, weight) / 0.7, -1)
    wanted = torch.autograd.grad(-(logps.exp() * logps).sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(found[1].sum(), hidden, retain_graph=True)[0], wanted)
    assert lost.abs().max() == 0 < wanted.abs().max()
    assert {r.symbol: r.reached for r in status()} == {
        f"{UTILS}.selective_log_softmax": 0,
        f"{UTILS}._ChunkedLogProbFunction.apply": 1,
    }


def liger_formula(loss, hidden, weight, ids, mask, advantages, bias, old, ref, importance):
    """The losses of LigerFusedLinearGRPOLoss, in plain PyTorch."""
    logps = F.log_softmax(F.linear(hidden, weight, bias) / loss.temperature, -1).gather(-1, ids[..., None])[..., 0]
    d = logps - (logps.detach() if old is None else old)
    if loss.recipe == "gspo":
        d = ((d * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None].expand_as(logps)
    low, high = loss.clip
    A = advantages[:, None]
    token = -torch.min(d.exp() * A, d.exp().clamp(1 - low, 1 + high) * A)
    clipped = ((d.exp() < 1 - low) & (A < 0)) | ((d.exp() > 1 + high) & (A > 0))
    if importance is not None:
        token = token * importance
    kl = None
    if loss.beta:
        x = ref - logps
        kl = x.exp() - x - 1
        token = token + loss.beta * kl
    count = mask.sum().clamp(min=1)
    value = {
        "grpo": lambda: ((token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum() / len(mask),
        "bnpo": lambda: (token * mask).sum() / count,
        "dr_grpo": lambda: (token * mask).sum() / (len(mask) * loss.max_completion_length),
        "dapo": lambda: (token * mask).sum() / count,
    }[loss.loss_type]()
    return value, [(x * mask).sum() / count for x in ([] if kl is None else [kl]) + [clipped.float()]]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_liger_slot(loss_type, level, beta):
    built = torch.nn.Module()
    built.beta, built.temperature, built.epsilon_low, built.epsilon_high = beta, 0.8, 0.1, 0.15
    built.loss_type, built.max_completion_length, built.importance_sampling_level = loss_type, 9, level
    built.delta, built.use_bias_correction_kl = None, False
    loss = LigerGRPOLoss.replacing(built)
    assert not list(loss.parameters())
    hidden, weight, bias = torch.randn(4, 6, 5), torch.randn(11, 5), torch.randn(11)
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    ids, mask = torch.randint(0, 11, (4, 6)), (torch.rand(4, 6) > 0.3).long()
    mask[2] = 0
    advantages = torch.randn(4).double()
    old, ref = (-2.5 + 0.3 * torch.randn(4, 6).double() for _ in range(2))
    importance = torch.rand(4, 6).double()
    importance = importance if level == "token" else importance[:, :1]  # one weight per sequence, as TRL gives it
    for given in ((None, None), (old, importance)):
        got, metrics = loss(
            _input=leaves[0], lin_weight=leaves[1], selected_token_ids=ids, attention_mask=mask, advantages=advantages,
            bias=leaves[2], old_per_token_logps=given[0], ref_per_token_logps=ref, vllm_is_ratio=given[1],
        )  # fmt: skip
        expected, wanted = liger_formula(loss, *leaves[:2], ids, mask, advantages, leaves[2], given[0], ref, given[1])
        torch.testing.assert_close(got, expected)
        close(metrics, wanted, check_dtype=False)
        close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


def test_the_liger_slot_refuses_what_it_does_not_compute():
    for name, value in {
        "loss_type": "sapo",
        "delta": 2.0,
        "use_bias_correction_kl": True,
        "importance_sampling_level": "x",
    }.items():
        with pytest.raises(ValueError, match=f"LigerGRPOLoss: argument '{name}'"):
            LigerGRPOLoss(**{name: value})
    with pytest.raises(ValueError, match="argument 'max_completion_length' got None"):
        LigerGRPOLoss(loss_type="dr_grpo")
    ids = torch.zeros(1, 1, dtype=torch.long)
    given = torch.zeros(1, 1, 2), torch.zeros(3, 2), ids, ids, torch.zeros(1)
    with pytest.raises(ValueError, match="argument 'ref_input' got a tensor"):
        LigerGRPOLoss()(*given, ref_weight=torch.zeros(3, 2))
    weights = torch.ones(1, 4)  # the gradient of a sequence ratio does not see which token has which weight
    with pytest.raises(ValueError, match=r"'vllm_is_ratio' got shape \(1, 4\), expected \(B, 1\)"):
        LigerGRPOLoss(importance_sampling_level="sequence")(*given, vllm_is_ratio=weights)


def test_two_ddp_ranks_give_the_gradient_of_the_whole_batch(tmp_path):
    script = Path(__file__).with_name("ddp_rank.py")
    command = [sys.executable, str(script), "--store", str(tmp_path / "store"), "--rank"]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    (first, whole), (second,) = ([torch.tensor(json.loads(line)) for line in text.splitlines()] for text in printed)
    assert torch.equal(first, second) and first.abs().max() > 0
    torch.testing.assert_close(first, whole)
