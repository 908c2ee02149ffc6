"""Tests of Triton kernels in Triton's interpreter. It has to be chosen before Triton is imported, and an interpreted kernel cannot
be compiled, so these tests have a process of their own: TRITON_INTERPRET=1 pytest tests/gpu/interpreter."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
