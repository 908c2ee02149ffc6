"""Small language models for tests, built in memory: no download, no training."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?\n"
PAD, EOS = "<pad>", "<eos>"


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of LETTERS, a pad and an end-of-sequence token: texts and tokens map one to one."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS)


def tiny_llama(
    seed: int = 0, *, layers: int = 3, hidden: int = 32, vocabulary: int = len(LETTERS) + 2
) -> LlamaForCausalLM:
    """Random Llama of some ten thousand parameters."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """The model and its tokenizer as a Hugging Face folder."""
    tiny_llama(seed).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder
