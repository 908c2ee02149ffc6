"""Rollouts that are run here and on another device: a model and how it samples, by name."""

from __future__ import annotations

from typing import Any

import torch
from tiny import disturb, tiny_base

from rlhf_fast.batch import pad
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.rollout import Rollout, generate

PROMPTS = [[5, 9, 12, 30, 8, 7], [7], [4, 44, 8]]
_SAMPLED = {"num_samples": 2, "temperature": 2.5, "eos_token_id": [2, 11, 40, 41]}
_GREEDY = {"temperature": 0.0}

# Grouped heads, biases, windows that end within the completion and within the prompt, soft-caps that bend what they cap, learned
# positions with one product for queries, keys and values; an attention of the model's own.
ROLLOUTS: dict[str, tuple[str, dict[str, Any], torch.dtype, dict[str, Any]]] = {
    "llama": ("llama", {}, torch.float32, _SAMPLED),
    "llama, greedy": ("llama", {}, torch.float32, _GREEDY),
    "llama, longer": ("llama", {}, torch.float32, {**_GREEDY, "max_new_tokens": 11}),
    "qwen2": ("qwen2", {}, torch.float32, _SAMPLED),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 0.02}, torch.float32, _GREEDY),
    "gemma3": ("gemma3", {}, torch.float32, _GREEDY),
    "gpt2": ("gpt2", {}, torch.float32, _GREEDY),
    "mistral": ("mistral", {"sliding_window": 5}, torch.float32, {**_SAMPLED, "min_new_tokens": 2}),
    "bloom": ("bloom", {}, torch.float32, _SAMPLED),
    "fp16": ("llama", {}, torch.float16, _GREEDY),
}


def model_of(name: str) -> SharedModel:
    family, options, dtype, _ = ROLLOUTS[name]
    base = tiny_base(family, **{"num_hidden_layers": 2, "n_layer": 2, **options}).to(dtype)
    return disturb(SharedModel(base, roles=("policy",), lora=LoraConfig(r=3)))


def rollout(model: SharedModel, name: str, device: torch.device) -> Rollout:
    ids, mask = (x.to(device) for x in pad(PROMPTS, left=True))
    options = {"max_new_tokens": 7, **ROLLOUTS[name][3]}
    seeds = torch.arange(len(PROMPTS) * options.get("num_samples", 1)) + 2**40
    return generate(model, ids, mask, seeds=seeds, **options)


def numbers(found: Rollout) -> dict[str, Any]:
    assert found.logprobs is not None and found.entropy is not None
    whole = {"ids": found.input_ids, "mask": found.attention_mask, "finished": found.finished}
    return {k: v.tolist() for k, v in {**whole, "logprobs": found.logprobs, "entropy": found.entropy}.items()}
