"""Microbenchmarks: every op against the reference, PyTorch, torch.compile and the libraries it replaces, in one run."""
