"""Plain, differentiable PyTorch: the specification of every op, its oracle in fp64, and its fallback."""
