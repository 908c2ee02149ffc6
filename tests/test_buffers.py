from __future__ import annotations

import gc
import sys

import pytest
import torch

from rlhf_fast import _buffers, token_logprobs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="blocks are recycled on Linux alone")
BIG = (_buffers.SMALLEST // 4096 + 1, 1024)  # fp32


@pytest.fixture(autouse=True)
def fresh():
    gc.collect()
    _buffers.release()
    yield
    _buffers.release()


def test_a_block_comes_back_when_the_last_view_of_it_dies_and_serves_the_next():
    first = _buffers.empty(BIG, torch.float32)
    address, view = first.data_ptr(), first[3:]
    del first
    assert _buffers.cached_bytes() == 0  # the view still lives
    del view
    assert _buffers.cached_bytes() >= BIG[0] * 4096
    second = _buffers.empty(BIG, torch.float32)
    assert second.data_ptr() == address and _buffers.cached_bytes() == 0


def test_two_living_tensors_never_share_a_block():
    a, b = _buffers.empty(BIG, torch.float32), _buffers.empty(BIG, torch.float32)
    a.fill_(1.0)
    b.fill_(2.0)
    assert (a == 1.0).all() and (b == 2.0).all()


def test_small_results_are_ordinary_and_the_cache_is_bounded(monkeypatch):
    small = _buffers.empty((4, 4), torch.bfloat16)
    assert small.shape == (4, 4) and small.dtype is torch.bfloat16
    monkeypatch.setattr(_buffers, "LARGEST_CACHE", 3 * _buffers.SMALLEST)
    kept = [_buffers.empty(BIG, torch.float32) for _ in range(4)]
    kept.clear()
    assert 0 < _buffers.cached_bytes() <= _buffers.LARGEST_CACHE


def test_a_block_much_too_large_is_not_taken():
    large = _buffers.empty((2 * BIG[0], 1024), torch.float32)
    address = large.data_ptr()
    del large
    assert _buffers.empty(BIG, torch.float32).data_ptr() != address


def test_gradients_of_successive_steps_are_right_in_recycled_memory():
    logits = torch.randn(90, 100_003, requires_grad=True)  # 36 MB
    ids = torch.randint(0, 100_003, (90,))
    first = torch.autograd.grad(token_logprobs(logits, ids).logprobs.sum(), logits)[0]
    kept, address = first.clone(), first.data_ptr()
    del first
    second = torch.autograd.grad(token_logprobs(logits, ids).logprobs.sum(), logits)[0]
    assert second.data_ptr() == address and torch.equal(second, kept)
