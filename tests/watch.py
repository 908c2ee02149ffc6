"""What an op asks of torch: its matrix products, and the size of what it allocates."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rlhf_fast._op import OPS
from rlhf_fast.ops import _lm_head
from rlhf_fast.ops._matmul import matmul


class Watch(TorchDispatchMode):
    """Records every torch call, also those inside of this package's kernels: (name, shape of each input, bytes of the output)."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self._entered = 0
        self._patch = patch.object(_lm_head, "matmul", self._product)

    def __enter__(self):
        if not self._entered:
            self._patch.start()
        self._entered += 1
        return super().__enter__()

    def __exit__(self, *args):
        self._entered -= 1
        if not self._entered:
            self._patch.stop()
        return super().__exit__(*args)

    def _product(self, a, b, out, **options):
        """The package's own product, whatever makes it."""
        self.calls.append(("product", [tuple(a.shape), tuple(b.shape)], 0))
        with _disable_current_modes():
            matmul(a, b, out, **options)

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
        names = ("product", "mm", "addmm_", "addmm", "matmul", "bmm")
        return [shapes[-2:] for name, shapes, _ in self.calls if name in names]
