"""What an op asks of torch: its matrix products, and the size of what it allocates."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast._op import OPS


class Watch(TorchDispatchMode):
    """Records every torch call, also those inside of this package's kernels: (name, shape of each input, bytes of the output)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "rlhf_fast":
            with self:
                out = OPS[name]._below_autograd(*args)
        else:
            out = func(*args, **(kwargs or {}))
        size = 0
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x._base is None:
                size = max(size, x.untyped_storage().nbytes())
        self.calls.append((name, [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)], size))
        return out

    def products(self):
        """Shapes of the inputs of every matrix product; without the tensor that one is added to."""
        names = ("mm", "addmm_", "addmm", "matmul", "bmm")
        return [shapes[-2:] for name, shapes, _ in self.calls if name in names]
