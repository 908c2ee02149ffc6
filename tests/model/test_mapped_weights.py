"""A base in the dtype of its file is not copied: its weights are pages of the file, which the system drops and reads again when memory
is short, so that a frozen base may be larger than it."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from models import tiny_llama

from rlhf_fast.config import LoraConfig
from rlhf_fast.model import SharedModel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def mapped(address: int) -> str:
    """File behind an address of this process, or nothing."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        for line in file:
            span, _, _, _, _, *path = line.split(maxsplit=5)
            start, stop = (int(x, 16) for x in span.split("-"))
            if start <= address < stop:
                return path[0].strip() if path else ""
    return ""


def drop(x: torch.Tensor) -> None:
    """Make the process forget the whole pages of x: those of a file come back as they are in it, others as zeros (madvise(2))."""
    start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (x.data_ptr() + x.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        assert ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED) == 0


def test_frozen_weights_stay_in_their_file_through_training(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = SharedModel.from_pretrained(tmp_path, ("policy", "reference"), LoraConfig(r=4))
    ids = torch.randint(2, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(ids, roles=("policy",)).policy.hidden
    before.sum().backward()
    for name, p in model.base.named_parameters():
        assert mapped(p.data_ptr()).endswith(".safetensors"), name
        drop(p)
    assert torch.equal(before, model(ids, roles=("policy",)).policy.hidden), "read again from the file"
    # Another dtype needs memory of its own.
    other = SharedModel.from_pretrained(tmp_path, ("policy",), dtype=torch.bfloat16)
    assert not mapped(next(other.base.parameters()).data_ptr()).endswith(".safetensors")
