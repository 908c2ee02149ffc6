"""Servers of rollouts: the fake, and bases for it and for vLLM itself."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from asking import EOS
from fake_vllm import FakeVLLM
from models import letter_tokenizer, save_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast import _http


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def fake(base, pauses):
    server = FakeVLLM(base)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pauses(monkeypatch):
    """Pauses between attempts, which take no time here."""
    sleep, pauses = time.sleep, []
    monkeypatch.setattr(_http.time, "sleep", lambda s: pauses.append(s) if s >= _http.FIRST_PAUSE else sleep(s))
    return pauses


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A base with heads of 64, which vLLM's attention on a CPU has kernels for."""
    config = LlamaConfig(
        vocab_size=34,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
