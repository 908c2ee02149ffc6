"""Tiny random causal LMs of several architectures, built in memory."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_fast.model import SharedModel

VOCABULARY = 97

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Each name stands for one trait: GQA, attention biases, q/k norms, soft-capped logits, alternating windows,
# Conv1D with learned positions, parallel residual, sliding window, LM head bias, ALiBi, divided logits,
# multiplied logits, a subclass of nn.Linear, experts.
CONFIGS = {
    "llama": ("LlamaConfig", _SIZES),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_SIZES, **_GEMMA, "final_logit_softcapping": 0.5}),
    "gemma3": ("Gemma3TextConfig", {**_SIZES, **_GEMMA}),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
    "mistral": ("MistralConfig", _SIZES),
    "phi": ("PhiConfig", _SIZES),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "granite": ("GraniteConfig", {**_SIZES, "logits_scaling": 4.0}),
    "cohere": ("CohereConfig", {**_SIZES, "logit_scale": 0.25}),
    "falcon": ("FalconConfig", {**_SIZES, "alibi": False}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_SIZES, **_MOE, "head_dim": 8}),
}
FAMILIES = tuple(CONFIGS)


def tiny_base(family: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A fresh random model; the same family and seed give the same weights."""
    name, options = CONFIGS[family]
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**options, **overrides})).eval()
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            if key.endswith("bias"):  # zero in a fresh model, which would hide a forgotten bias
                parameter.normal_(0.0, 0.1)
    return base


def tiny_batch(padded: bool = True) -> tuple[Tensor, Tensor]:
    """Ids (3, 8) and a mask (3, 8): padding on the left, on both sides, on the right; or none."""
    ids = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 8, dtype=torch.bool)
    if padded:
        mask[0, :3] = False
        mask[1, :1] = mask[1, 6:] = False
        mask[2, 5:] = False
    return ids, mask


@torch.no_grad()
def disturb(model: SharedModel, *roles: str, seed: int = 1) -> SharedModel:
    """Give the roles (all with an adapter by default) weights that matter, different for each."""
    generator = torch.Generator().manual_seed(seed)
    for role in roles or model.roles:
        for parameter in model.parameters_of(role).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
