"""The only reader of the package's run-time environment variables."""

from __future__ import annotations

import os

VARIABLES = {
    "BACKEND": "force one backend for every op (cpp, triton, cuda, reference)",
    "CPU_ISA": "force one instruction set of the C++ kernels (scalar, avx2, avx512, avx512bf16)",
    "CUDA_LIB": "use the CUDA kernels of one CUDA major (12, 13) or of a file, whatever this torch is built for",
    "FAULT": "kill the process at a named point, for tests of crash safety",
    "REWARD_TOKEN": "bearer token that requests to a reward server carry",
    "VLLM_TOKEN": "bearer token that requests to a vLLM server elsewhere carry",
}


def get(name: str) -> str | None:
    """Value of RLHF_FAST_<name>, or None when it is unset or empty."""
    if name not in VARIABLES:
        raise KeyError(f"RLHF_FAST_{name} is not a variable of this package: {sorted(VARIABLES)}")
    return os.environ.get(f"RLHF_FAST_{name}") or None
