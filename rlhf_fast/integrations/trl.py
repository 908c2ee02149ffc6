"""TRL: log-probs, entropy, the language-model head without logits, and an object for the `liger_loss` slot.

Supported: trl >= 1.10, < 1.17. Results keep TRL's dtypes (bf16 logits give bf16 log-probs on the CPU). Corrections: the entropy
of the chunked head has its gradient (TRL < 1.13 drops it), and with half_precision=True, temperature, logits of the head and
softmax are computed in fp32 and rounded once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast.integrations._compare import HALF, Unsupported, as_mask
from rlhf_fast.integrations._patch import Framework, Socket
from rlhf_fast.losses import policy_loss
from rlhf_fast.ops.linear_token_logprobs import linear_token_logprobs
from rlhf_fast.ops.token_logprobs import token_logprobs

UTILS = "trl.trainer.utils"

TOP1_BYTES = 2**26
"""Logits that live at a time while is_top1 is computed."""


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """(..., V), (...) or (..., K) -> like index."""
    if index.dim() == logits.dim() - 1:
        return selective_log_softmax_and_entropy(logits, index, False, temperature, row_mask)[0]
    if row_mask is not None:
        raise Unsupported("row_mask with several tokens per position")
    if index.dim() != logits.dim() or index.shape[-1] == 0:
        raise Unsupported(f"logits {tuple(logits.shape)} with tokens {tuple(index.shape)}")
    normalizer = token_logprobs(logits, index[..., 0], temperature=temperature).logsumexp
    picked = logits.gather(-1, index).to(normalizer.dtype) / temperature
    return (picked - normalizer[..., None]).to(logits.dtype)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """(..., V) -> (...); one pass needs no chunks."""
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, ids).entropy.to(_dtype(logits))


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(..., V), (...) -> log-probs and entropy (...), both from one read of the logits."""
    if index.dim() != logits.dim() - 1:
        raise Unsupported("several tokens per position")
    mask = None if row_mask is None else as_mask(row_mask)
    found = token_logprobs(logits, index, temperature=temperature, mask=mask)
    entropy = found.entropy if entropy_requires_grad else found.entropy.detach()
    return found.logprobs.to(_dtype(logits)), entropy.to(_dtype(logits))


def _dtype(logits: Tensor) -> torch.dtype:
    """dtype of TRL's result: fp32 where its Triton kernel runs (trl >= 1.14 on a GPU), that of the logits elsewhere."""
    if logits.device.type in ("cuda", "xpu") and "trl.kernels.logprob_entropy" in sys.modules:
        return torch.float64 if logits.dtype is torch.float64 else torch.float32
    return logits.dtype


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (N,) of scale (hidden weight^T + bias), capped and divided by the temperature."""
    if not scale > 0:
        raise Unsupported(f"logit_scale {scale}")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # c tanh(s x / c) / T = c' tanh(x / c') / T' with c' = c / s and T' = T / s.
    found = linear_token_logprobs(
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        bias=None if bias is None else bias.to(dtype),
        temperature=temperature / scale,
        softcap=None if softcap is None else softcap / scale,
    )
    return found.logprobs.float(), found.entropy.float()


def chunked_logprobs_and_entropy(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`_ChunkedLogProbFunction.apply` of trl < 1.15: (N, H), (V, H), a bias since 1.13, targets (N,), temperature, chunk_size,
    softcap and logit_scale -> log-probs and entropy (N,) fp32."""
    bias = None
    if rest[0] is None or rest[0].is_floating_point():
        bias, *rest = rest  # type: ignore[assignment]
    targets, temperature, _, *scaling = rest
    return _head(hidden, weight, bias, targets, temperature, *scaling)


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
) -> tuple[Tensor | None, ...]:
    """`ChunkedLogProbFunction.apply` of trl >= 1.15: log-probs and what `outputs` names, (N,) each, None for the others.

    mean_logits is linear in the hidden state (without a softcap); is_top1 takes a product with the head of its own.
    """
    if "log_sum_sq_probs" in outputs:
        raise Unsupported("the head also returns log_sum_sq_probs")
    if "mean_logits" in outputs and final_logit_softcapping is not None:
        raise Unsupported("the head also returns the mean of capped logits")
    logprobs, entropy = _head(hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale)
    with torch.no_grad():
        mean = _mean_logits(hidden, weight, bias) * (logit_scale / temperature) if "mean_logits" in outputs else None
        top = _is_top1(hidden, weight, bias, targets) if "is_top1" in outputs else None
    return logprobs, entropy if "entropy" in outputs else None, None, mean, top


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = hidden.float() @ weight.mean(0, dtype=torch.float32)
    return found if bias is None else found + bias.float().mean()


def _is_top1(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Whether no other token has a larger logit; scale, cap and temperature change no order."""
    rows = max(1, TOP1_BYTES // (hidden.element_size() * weight.shape[0]))
    pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.linear(h, weight, bias).argmax(-1) == t for h, t in pairs])


class LigerGRPOLoss(torch.nn.Module):
    """For the `liger_loss` slot of GRPOTrainer (trl < 1.14, use_liger_kernel=True): GRPO from hidden states without logits.

        trainer.liger_loss = LigerGRPOLoss.replacing(trainer.liger_loss)

    The trainer calls it inside `_forward_redirection` with the weight of the head already gathered, so that the hooks of DDP and
    FSDP run around it and gradients are synchronised as with any forward; it keeps no parameter of its own.
    """

    OPTIONS = (
        "beta", "temperature", "epsilon_low", "epsilon_high", "loss_type", "max_completion_length",
        "importance_sampling_level", "delta", "use_bias_correction_kl",
    )  # fmt: skip

    def __init__(
        self,
        beta: float = 0.04,
        temperature: float = 1.0,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
    ) -> None:
        """Keywords as in liger-kernel's LigerFusedLinearGRPOLoss.

        Raises ValueError naming the option that has no counterpart here.
        """
        super().__init__()
        op = "LigerGRPOLoss"
        _check.choice(op, "loss_type", loss_type, ("grpo", "bnpo", "dr_grpo", "dapo"))
        _check.choice(op, "importance_sampling_level", importance_sampling_level, ("token", "sequence"))
        if delta is not None:
            raise _check.error(ValueError, op, "delta", delta, "None")
        if use_bias_correction_kl:
            raise _check.error(ValueError, op, "use_bias_correction_kl", True, "False")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise _check.error(ValueError, op, "max_completion_length", None, "a number with loss_type 'dr_grpo'")
        self.beta = _check.number(op, "beta", beta, 0.0)
        self.temperature = _check.number(op, "temperature", temperature, 0.0, open_low=True)
        self.clip = (float(epsilon_low), float(epsilon_high))
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.recipe = "gspo" if importance_sampling_level == "sequence" else "ppo"

    @classmethod
    def replacing(cls, loss: Any) -> LigerGRPOLoss:
        """One with the options of the object that the trainer has built."""
        return cls(**{name: getattr(loss, name) for name in cls.OPTIONS if hasattr(loss, name)})

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden (B, T, H), head (V, H), ids, mask and log-probs (B, T), advantages (B,) -> loss and [KL,] clip fraction.

        Raises ValueError for reference hidden states (give ref_per_token_logps), and for weights per token with a ratio per
        sequence.
        """
        if ref_input is not None or ref_weight is not None or ref_bias is not None:
            raise _check.error(ValueError, "LigerGRPOLoss", "ref_input", "a tensor", "None; give ref_per_token_logps")
        if vllm_is_ratio is not None and self.recipe == "gspo" and vllm_is_ratio.shape[-1] != 1:
            got = f"shape {tuple(vllm_is_ratio.shape)}"
            raise _check.error(ValueError, "LigerGRPOLoss", "vllm_is_ratio", got, "(B, 1) with a sequence ratio")
        real = attention_mask != 0
        logprobs = linear_token_logprobs(
            _input, lin_weight, selected_token_ids, bias=bias, temperature=self.temperature, mask=real
        ).logprobs
        if self.beta and ref_per_token_logps is None:  # as in Liger: the policy itself, which gives a KL of 0
            ref_per_token_logps = logprobs.detach()
        rows = real.shape[0]
        normalizer: Tensor | float
        if self.loss_type == "grpo":
            normalizer = float(rows)
        elif self.loss_type == "dr_grpo":
            normalizer = float(rows * self.max_completion_length)  # type: ignore[operator]
        elif self.loss_type == "bnpo":
            normalizer = real.sum().clamp(min=1).to(logprobs.dtype)
        else:
            normalizer = _tokens_per_process(real, num_items_in_batch).to(logprobs.dtype)
        found = policy_loss(
            self.recipe,
            logprobs,
            old_per_token_logps,
            advantages,
            real,
            clip=self.clip,
            ref_logprobs=ref_per_token_logps if self.beta else None,
            kl_coef=self.beta,
            kl_kind="k3",
            importance_weights=None if vllm_is_ratio is None else vllm_is_ratio.expand_as(logprobs),
            reduction="seq-mean-token-mean" if self.loss_type == "grpo" else "token-sum",
            normalizer=normalizer,
        )
        return found.loss, [found.stats["kl"]] * bool(self.beta) + [found.stats["clip_fraction"]]


def _tokens_per_process(real: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
    """Denominator of DAPO: real tokens of all processes (or of the generation batch, when given) over the processes, at least 1."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    total = (
        real.sum().float() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=real.device)
    )
    if num_items_in_batch is None and processes > 1:
        dist.all_reduce(total)
    return (total.float() / processes).clamp(min=1)


def _rounds_logits(tensors: Sequence[Tensor]) -> bool:
    return _dtype(tensors[0]) in HALF


def _rounds_head(tensors: Sequence[Tensor]) -> bool:
    return tensors[0].dtype in HALF or torch.is_autocast_enabled(tensors[0].device.type)


HEAD = "trl.kernels.chunked_logprob"
LOGITS = ("logits", "index", "row_mask")

FRAMEWORK = Framework(
    "trl",
    ("1.10", "1.17"),
    (
        Socket(UTILS, "selective_log_softmax", selective_log_softmax, rows=LOGITS, rounds=_rounds_logits),
        Socket(UTILS, "entropy_from_logits", entropy_from_logits, rows=("logits",), rounds=_rounds_logits),
        Socket(
            UTILS,
            "selective_log_softmax_and_entropy",
            selective_log_softmax_and_entropy,
            rows=LOGITS,
            rounds=_rounds_logits,
        ),
        # Whether the entropy has a gradient depends on the version, so that gradient is not compared.
        Socket(
            UTILS,
            "_ChunkedLogProbFunction.apply",
            chunked_logprobs_and_entropy,
            rounds=_rounds_head,
            constant=(1,),
        ),
        Socket(
            HEAD,
            "ChunkedLogProbFunction.apply",
            chunked_logprobs,
            rows=("hidden", "targets"),
            rounds=_rounds_head,
        ),
    ),
)
