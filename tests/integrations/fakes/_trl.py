"""TRL in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from integrations.fakes._module import log_softmax_rows, module


def trl(version="1.16.0"):
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        if temperature != 1.0:
            logits = logits / temperature
        wide = index if index.dim() == logits.dim() else index[..., None]
        found = F.log_softmax(logits, -1).gather(-1, wide)
        found = found if index.dim() == logits.dim() else found[..., 0]
        return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)

    def entropy_from_logits(logits, chunk_size=128):
        logps = F.log_softmax(logits, -1)
        return -(logps.exp() * logps).sum(-1)

    def selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
        logps = selective_log_softmax(logits, index, temperature, row_mask)
        entropy = entropy_from_logits(logits / temperature)
        entropy = entropy if entropy_requires_grad else entropy.detach()
        return logps, entropy if row_mask is None else entropy.masked_fill(row_mask == 0, 0.0)

    class ChunkedLogProbFunction(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
            outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ):  # fmt: skip
            ctx.save_for_backward(hidden, weight, bias, targets)
            ctx.rest = temperature, final_logit_softcapping, logit_scale
            logps, entropy = head(hidden, weight, bias, targets, *ctx.rest)
            z = capped(hidden, weight, bias, *ctx.rest[1:]) / temperature
            extra = {
                "log_sum_sq_probs": 2 * F.log_softmax(z, -1),
                "mean_logits": z.mean(-1),
                "is_top1": z.argmax(-1) == targets,
            }
            extra["log_sum_sq_probs"] = extra["log_sum_sq_probs"].logsumexp(-1)
            given = [extra[name] if name in outputs else None for name in extra]
            ctx.mark_non_differentiable(*(x for x in given if x is not None))
            return logps, entropy if "entropy" in outputs else None, *given

        @staticmethod
        def backward(ctx, grad_logps, grad_entropy, *_):
            *inputs, targets = ctx.saved_tensors
            leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                outputs = head(*leaves, targets, *ctx.rest)
            pairs = [(o, g) for o, g in zip(outputs, (grad_logps, grad_entropy), strict=True) if g is not None]
            grads = iter(
                torch.autograd.grad([o for o, _ in pairs], [x for x in leaves if x is not None], [g for _, g in pairs])
            )
            return *(None if x is None else next(grads) for x in leaves), *[None] * 6

    def capped(hidden, weight, bias, softcap, scale):
        logits = F.linear(hidden, weight, bias).float() * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def head(hidden, weight, bias, targets, temperature, softcap, scale):
        logps = F.log_softmax(capped(hidden, weight, bias, softcap, scale) / temperature, -1)
        return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)

    module("trl", __version__=version)
    module("trl.kernels.chunked_logprob", ChunkedLogProbFunction=ChunkedLogProbFunction)
    utils = module(
        "trl.trainer.utils",
        selective_log_softmax=selective_log_softmax,
        entropy_from_logits=entropy_from_logits,
        selective_log_softmax_and_entropy=selective_log_softmax_and_entropy,
        _ChunkedLogProbFunction=ChunkedLogProbFunction,
    )
    # Trainers import the functions by name.
    module("trl.trainer.rloo_trainer").selective_log_softmax = utils.selective_log_softmax


def old_trl():
    """trl 1.10: no temperature, a head without bias whose entropy has no gradient."""

    class _ChunkedLogProbFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, last_hidden, weight, targets, temperature, chunk_size, softcap=None, logit_scale=1.0):
            ctx.save_for_backward(last_hidden, weight, targets)
            ctx.rest = temperature
            logps = F.log_softmax(F.linear(last_hidden, weight) / temperature, -1)
            return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)

        @staticmethod
        def backward(ctx, grad_logps, grad_entropy):
            hidden, weight, targets = ctx.saved_tensors
            leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
            with torch.enable_grad():
                logps = F.log_softmax(F.linear(*leaves) / ctx.rest, -1).gather(-1, targets[:, None])[:, 0]
            return *torch.autograd.grad(logps, leaves, grad_logps), None, None, None, None, None

    def selective_log_softmax(logits, index):
        return log_softmax_rows(logits, index)

    module("trl", __version__="1.10.0.dev0")
    module(
        "trl.trainer.utils",
        selective_log_softmax=selective_log_softmax,
        _ChunkedLogProbFunction=_ChunkedLogProbFunction,
    )
