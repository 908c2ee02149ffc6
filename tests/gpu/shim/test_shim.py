"""The shim finds what it is there to find: kernels with one mistake each."""

from __future__ import annotations

import re
import subprocess

import pytest
from gpu.shim.build import HERE, compile_program, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ to build CUDA kernels for the CPU")

PLAIN: list[str] = []
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]


def run(tmp_path, planted, flags):
    program = compile_program(tmp_path, [HERE / "planted.cu"], ["-O1", "-g1", f"-DPLANTED={planted}", *flags])
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("flags", [PLAIN, MEMORY, THREADS], ids=["plain", "memory", "threads"])
def test_a_right_kernel_is_right(tmp_path, flags):
    assert run(tmp_path, 0, flags) == (0, "done\n")


@pytest.mark.parametrize(
    ("planted", "flags", "found"),
    [
        (1, THREADS, "data race"),
        (2, MEMORY, "heap-buffer-overflow"),
        (3, MEMORY, "misaligned address"),
        (4, PLAIN, r"SIMT ERROR: a __syncthreads\(\) is not reached by threads that exited"),
        (5, THREADS, "data race"),
        (6, PLAIN, "SIMT ERROR: .*mask"),
        (7, THREADS, "data race"),
        (8, MEMORY, "out of bounds|heap-buffer-overflow"),
        (9, PLAIN, r"SIMT ERROR: threads meet at different __syncthreads\(\)"),
        (10, PLAIN, "SIMT ERROR: a warp operation waits for a lane that has exited"),
    ],
)
def test_a_planted_mistake_is_found(tmp_path, planted, flags, found):
    status, output = run(tmp_path, planted, flags)
    assert status != 0 and re.search(found, output), output[:2000]
