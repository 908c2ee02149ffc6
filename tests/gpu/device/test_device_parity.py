"""The parity suite on a device: every backend of every op there against the fp64 reference on the CPU, results and gradients.

On a machine with a GPU this is what `bench/sanitize.py` runs. Without one the same tests run on CPU tensors, so that the suite
itself is never untried.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_op_properties as properties
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, double
from torch import Tensor

import rlhf_fast
from rlhf_fast._types import LossOutput, Stats

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CELLS = [
    (op, name)
    for op, cells in sorted(rlhf_fast.backends().items())
    if any(name != "reference" for name, *_ in cells["cuda"])  # an op of the CPU alone has nothing to show here
    for name, available, _ in cells[DEVICE.type]
    if available and name != "reference"
]


def to_cpu(out: Any) -> Any:
    """Results of an op where the reference's lie; gradients flow through."""
    if isinstance(out, Tensor):
        return out.cpu()
    if isinstance(out, LossOutput):
        return LossOutput(out.loss.cpu(), Stats(out.stats.tensor.cpu(), out.stats.names))
    parts = [x.cpu() if isinstance(x, Tensor) else x for x in out]
    return type(out)(*parts) if hasattr(out, "_fields") else tuple(parts)


def on_device(op: str) -> Any:
    """The public function of CPU tensors, computed on the device."""
    function = getattr(rlhf_fast, op)
    return lambda **kwargs: to_cpu(
        function(**{k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in kwargs.items()})
    )


@pytest.mark.parametrize("op, backend", CELLS, ids=lambda x: x)
def test_a_backend_gives_what_the_reference_gives(op, backend):
    inputs = getattr(properties, op)
    served = 0

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal served
        kwargs = inputs(properties.Draw(data))
        try:
            with rlhf_fast.use_backend(backend):
                got = properties.run(on_device(op), kwargs)
        except RuntimeError as error:
            if "declines this call" in str(error):  # left to the next backend
                return
            raise
        served += 1
        with rlhf_fast.use_backend("reference"):
            truth, plain = properties.run(getattr(rlhf_fast, op), double(kwargs)), properties.run(on_device(op), kwargs)
        largest = max((x.abs().max().item() for x in truth.values() if x.numel()), default=0.0)
        for name, x in got.items():
            if x.dtype is not torch.float64:
                assert_parity(x, truth[name], plain[name], name, scale=largest)
            else:
                torch.testing.assert_close(x, truth[name], rtol=1e-10, atol=1e-10 * max(largest, 1.0))

    check()
    assert served


@pytest.mark.parametrize("vocab", [1, 2, 127, 1000, 50257, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_logprobs_of_rows_of_every_length_between_poisoned_gaps(vocab, dtype):
    """Logits whose rows begin at odd addresses and end before NaN: nothing beyond a row is read or written."""
    generator = torch.Generator().manual_seed(vocab)
    wide = torch.full((3, vocab + 5), torch.nan, dtype=dtype)
    wide[:, 1 : vocab + 1] = (3 * torch.randn(3, vocab, generator=generator)).to(dtype)
    ids = torch.randint(0, vocab, (3,), generator=generator)
    found = []
    for device, kind in ((DEVICE, dtype), (torch.device("cpu"), torch.float64)):
        logits = wide.to(device, kind)[:, 1 : vocab + 1].requires_grad_()
        assert logits.stride(0) == vocab + 5
        with rlhf_fast.use_backend("reference" if kind is torch.float64 else None):
            out = rlhf_fast.token_logprobs(logits, ids.to(device))
        (out.logprobs.sum() + 0.5 * out.entropy.sum() - out.logsumexp.sum()).backward()
        found.append([x.detach().cpu() for x in (out.logprobs, out.entropy, out.logsumexp, logits.grad)])
    for got, truth in zip(*found, strict=True):
        assert_parity(got, truth, truth.to(got.dtype), scale=max(truth.abs().max().item(), 10.0))


def test_token_logprobs_of_nothing():
    out = rlhf_fast.token_logprobs(torch.empty(0, 7, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert out.logprobs.shape == (0,) and out.logprobs.device.type == DEVICE.type
