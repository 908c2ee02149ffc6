"""What `rlhf-fast bench --traffic` counts for our ops is what their Triton kernels do: as many launches, and the bytes they touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu.tools.on_cpu import on_cpu
from gpu.tools.sanitizer import Sanitizer
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench import audit, traffic
from rlhf_fast.bench.cases import advantages, dpo_loss, ppo_loss
from rlhf_fast.bench.cases import sample_tokens as draws
from rlhf_fast.reference import lora_linear

SLACK = 0.02
"""Sums of rows and of programs, and what a backward keeps, against arrays of thousands."""


def log_probs(x: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return rlhf_fast.token_logprobs(x["logits"], x["ids"])


def log_probs_and_gradient(x: dict[str, Tensor]) -> Any:
    logits = x["logits"].detach().requires_grad_()
    out = rlhf_fast.token_logprobs(logits, x["ids"])
    return torch.autograd.grad([out.logprobs, out.entropy], logits, [x["upstream"], x["upstream"]])


def raw_advantages(x: dict[str, Tensor]) -> Any:
    given = {k: x[k] for k in ("logprobs", "ref_logprobs")}
    return rlhf_fast.advantages(x["scores"], x["values"], x["mask"], **given, kl_coef=0.1, whiten=False)


def loss_and_gradients(x: dict[str, Tensor]) -> Any:
    """Found by the forward; the backward would only scale them."""
    return ppo_loss.ours(x["logprobs"].detach().requires_grad_(), x["values"].detach().requires_grad_(), x)


def pairs_and_gradients(x: dict[str, Tensor]) -> Any:
    return dpo_loss.ours(*(x[k].detach().requires_grad_() for k in dpo_loss.POLICY), x)


def every_answer_real() -> dict[str, Tensor]:
    x = dpo_loss.make(6, 700)
    return x | {k: torch.ones_like(x[k]) for k in dpo_loss.MASKS}


def logits() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(4, 5000, generator=generator).to(torch.bfloat16),
        "ids": torch.randint(0, 5000, (4,), generator=generator),
        "upstream": torch.randn(4, generator=generator),
    }


def step_logits() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4, generator=generator, dtype=torch.float64)
    return {"logits": torch.randn(4, 32_768, generator=generator), "uniform": uniform}


def every_token_real(make: Callable[[int, int], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """Masked tokens are not read; the table counts arrays without any."""
    return lambda: (x := make(6, 700)) | {"mask": torch.ones_like(x["mask"])}


def test_the_table_counts_what_adapters_add_to_a_layer():
    """Its first kernel is the product with the weight, PyTorch's; what reads the factors comes after it."""
    x = lora_linear.sample(96, 512, 768, (16, 16), dtype=torch.bfloat16, bias=False)
    with Sanitizer() as s, on_cpu("triton"):
        y = rlhf_fast.lora_linear(**x)
    s.check()
    shapes = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in x.items()}
    with traffic.Traffic() as counted, audit.direct(counted):
        rlhf_fast.lora_linear(**shapes)
    assert counted.launches == 1 + len(s.launches) == 3
    touched = sum(launch.load_first + launch.store_first for launch in s.launches)
    product = x["x"].nbytes + x["weight"].nbytes + y.nbytes
    assert product + touched == pytest.approx(counted.read + counted.written, rel=SLACK)


@pytest.mark.parametrize(
    "make, call, launches",
    [
        (logits, log_probs, 1),
        (logits, log_probs_and_gradient, 2),
        (step_logits, draws.ours, 2),
        (every_token_real(advantages.make), advantages.ours, 2),
        (every_token_real(advantages.make), raw_advantages, 1),
        (every_token_real(ppo_loss.make), loss_and_gradients, 1),
        (every_answer_real, pairs_and_gradients, 1),
    ],
    ids=[
        "log-probs",
        "log-probs and gradient",
        "a step",
        "advantages",
        "advantages, not whitened",
        "ppo_loss",
        "dpo_loss",
    ],
)
def test_the_table_counts_what_the_kernels_do(make, call, launches):
    x = make()
    with Sanitizer() as s, on_cpu("triton"):
        call(x)
    s.check()
    shapes = {k: v.to("meta") for k, v in x.items()}
    with traffic.Traffic() as counted, audit.direct(counted):
        call(shapes)
    assert len(s.launches) == counted.launches == launches
    touched = sum(launch.load_first + launch.store_first for launch in s.launches)
    assert touched == pytest.approx(counted.read + counted.written, rel=SLACK)
