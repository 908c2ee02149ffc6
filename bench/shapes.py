"""Random Llamas of the benchmarks' sizes; those of SmolLM2-135M unless told otherwise."""

from __future__ import annotations

from typing import Any


def llama_config(hidden: int = 576, layers: int = 30, vocabulary: int = 49152, **more: Any) -> Any:
    """Heads of 64, a third as many for keys, a feed-forward width of 8 / 3, tied embeddings."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        **more,
    )


def llama(hidden: int = 576, layers: int = 30, vocabulary: int = 49152, **more: Any) -> Any:
    """The same weights at every call."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(hidden, layers, vocabulary, **more)).eval()
