"""A policy, an engine of vLLM, and what is asked of it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from rlhf_fast.config import (
    ModelConfig,
    VLLMConfig,
)
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.rollout.engines import Request
from rlhf_fast.rollout.vllm import VLLMEngine

EOS = 1
PROMPTS = [[5, 9, 12], [7], [4, 4, 8, 20, 3]]
VLLM = os.environ.get("RLHF_FAST_VLLM_PYTHON")
real = pytest.mark.skipif(not VLLM, reason="RLHF_FAST_VLLM_PYTHON names no Python that has vLLM")


def shake(model: SharedModel, seed: int) -> None:
    """Another policy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.parameters_of("policy").items():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=generator)


def policy(path: Path, seed: int = 1, **options) -> SharedModel:
    options = {"lora": LoraConfig(r=4, alpha=8.0), **options}
    model = SharedModel.from_pretrained(path, roles=("policy", "reference"), **options)
    shake(model, seed)
    return model


def engine(folder: Path, path: Path, *, context: int = 32, **settings) -> VLLMEngine:
    settings = VLLMConfig(**{"retries": 2, **settings})
    return VLLMEngine(settings, ModelConfig(str(path), dtype="float32"), context=context, folder=folder / "vllm")


def request(**changes) -> Request:
    n = changes.get("num_samples", 4)
    # As a trainer draws them: vLLM's generators on a CPU read the low 32 bits.
    seeds = torch.randint(2**63 - 1, (len(PROMPTS) * n,), generator=torch.Generator().manual_seed(4))
    return dataclasses.replace(Request(PROMPTS, n, seeds, 9, 0, 0.9, EOS), **changes)


def ask(engine: VLLMEngine, request: Request):
    engine.submit(request)
    return engine.collect()


def assert_same(found, expected) -> None:
    for name in ("input_ids", "attention_mask", "response_mask", "finished", "logprobs"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
