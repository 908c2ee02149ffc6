"""The kernels and launchers under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: clean as they are, and
found out when something is taken away."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from gpu.shim.build import CSRC, HERE, LAUNCHERS, compile_program, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ to build the CUDA kernels for the CPU")

MEMORY = ["-fsanitize=address,alignment,bounds,signed-integer-overflow,null", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]
OPS = [path.stem for path in LAUNCHERS]


def kernels_of(op, csrc):
    """All variants of token_logprobs would take the sanitizers minutes to compile."""
    return HERE / "some_variants.cu" if op == "token_logprobs" else csrc / "cuda" / f"{op}.cu"


def run(tmp_path, ops, flags, csrc=CSRC):
    needed = {*ops, "whiten"} if "advantages" in ops else set(ops)
    sources = [kernels_of(op, csrc) for op in needed] + [csrc / "cuda" / f"{op}.cpp" for op in needed]
    cases = [f"-DCASE_{op}" for op in ops]
    program = compile_program(tmp_path, [*sources, HERE / "sanitize.cpp"], ["-O1", "-g1", *flags, *cases], csrc)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("flags", [MEMORY, THREADS], ids=["memory", "threads"])
def test_every_launcher_is_clean(tmp_path, flags):
    status, output = run(tmp_path, OPS, flags)
    assert status == 0 and output.strip() == "done", output[:4000]


BARRIER = "  __syncthreads();\n"
RACE = "data race"
OUTSIDE = "AddressSanitizer|runtime error"
MUTANTS = {
    # (op, file, what is taken away, what stays, sanitizer, how it is found)
    "first barrier of block_max": ("ppo_loss", "block.cuh", BARRIER, "", 0, THREADS, RACE),
    "last barrier of block_max": ("ppo_loss", "block.cuh", BARRIER, "", 1, THREADS, RACE),
    "first barrier of block_sum": ("whiten", "block.cuh", BARRIER, "", 2, THREADS, RACE),
    "first barrier of the scan": ("gae", "scan.cuh", BARRIER, "", 0, THREADS, RACE),
    "last barrier of the scan": ("gae", "scan.cuh", BARRIER, "", 1, THREADS, RACE),
    "barrier before the centre is read": ("whiten", "moments.cuh", BARRIER, "", 0, THREADS, RACE),
    "barrier of block_sum_of_first": ("ppo_loss", "block.cuh", BARRIER, "", 3, THREADS, RACE),
    "barrier behind the ticket": ("ppo_loss", "grid.cuh", BARRIER, "", 0, THREADS, f"{RACE}|SEGV"),
    "barrier behind the count": ("reward_loss", "grid.cuh", BARRIER, "", 1, THREADS, RACE),
    "barrier behind the last block": ("reward_loss", "grid.cuh", BARRIER, "", 2, THREADS, RACE),
    "barrier before the centres are read": ("ppo_loss", "ppo_loss.cuh", "    __syncthreads();\n", "", 0, THREADS, RACE),
    "end of a count": ("ppo_loss", "rows.cuh", "real[k] = k < count && mask", "real[k] = mask", 0, MEMORY, OUTSIDE),
    "barrier of the terms": ("token_logprobs", "token_logprobs_backward.cuh", BARRIER, "", 0, THREADS, RACE),
    "barrier before the members": ("group_advantages", "group_advantages.cuh", "    __syncthreads();\n", "", 0, THREADS, RACE),
    "barrier behind the members": ("group_advantages", "group_advantages.cuh", "    __syncthreads();\n", "", 1, THREADS, RACE),
    "first vector of a row": ("token_logprobs", "token_logprobs.cuh", "begin < before ? before - static_cast<int>(begin) : 0", "0", 0, MEMORY, OUTSIDE),
    "last vector of a row": ("token_logprobs", "token_logprobs.cuh", "static_cast<unsigned>(last - first) + 1;", "static_cast<unsigned>(n);", 0, MEMORY, OUTSIDE),
    "what realignment reads": ("token_logprobs", "token_logprobs.cuh", "n - short_of - ", "n - ", 0, MEMORY, OUTSIDE),
    "guard of single logits": (
        "token_logprobs", "token_logprobs.cuh", "at + k < n ? z.capped(widen(row[at + k])) : -INFINITY", "z.capped(widen(row[at + k]))", 0,
        MEMORY, OUTSIDE,
    ),
    "alignment of the row": ("token_logprobs", "token_logprobs.cuh", "offset == 0) {", "true) {", 0, MEMORY, OUTSIDE),
    "peel of the gradient": (
        "token_logprobs", "token_logprobs_backward.cuh", "off ? kLanes<Out> - off : 0", "0", 0, MEMORY, OUTSIDE,
    ),
    "alignment of the logits": (
        "token_logprobs", "token_logprobs_backward.cuh", "phase_of(row + begin + head) == 0", "row != nullptr", 0, MEMORY, OUTSIDE,
    ),
    "end of the gradient": (
        "token_logprobs", "token_logprobs_backward.cuh", "j + kEach <= n", "j < n", 0, MEMORY, OUTSIDE,
    ),
    "alignment of a group": ("gae", "rows.cuh", " && reinterpret_cast<uintptr_t>(at) % bytes == 0", "", 0, MEMORY, OUTSIDE),
    "end of a group": ("kl_estimate", "rows.cuh", "real[k] = k < count && mask[first + k]", "real[k] = mask[first + k]", 0, MEMORY, OUTSIDE),
    "end of a stored group": ("kl_estimate", "rows.cuh", "        if (k < count) to", "        to", 0, MEMORY, OUTSIDE),
    "clamp of a first boundary": ("gae", "rows.cuh", "from < 0 ? 0 : from < a.n ? from : a.n", "from", 0, MEMORY, OUTSIDE),
    "clamp of a last boundary": ("advantages", "rows.cuh", "to < a.n ? to : a.n", "to", 0, MEMORY, OUTSIDE),
    "end of the rows": ("ppo_loss", "ppo_loss.cuh", " && row < a.rows - 1", "", 0, MEMORY, OUTSIDE),
    "what the mask hides of a group": ("kl_estimate", "rows.cuh", "real[0] && real[1] && real[2] && real[3] && whole", "whole", 0, MEMORY, OUTSIDE),
    "what the mask hides of a mixed group": ("kl_estimate", "rows.cuh", "x[k] = real[k] ? from[first + k] : 0", "x[k] = k < count ? from[first + k] : 0", 0, MEMORY, OUTSIDE),
    "what the mask hides of a row": ("token_logprobs", "token_logprobs.cuh", "const double scale = real ? scale_of(a, i) : 0;", "const double scale = scale_of(a, i);", 0, MEMORY, OUTSIDE),
    "ids of samples that the mask hides": ("group_advantages", "group_advantages.cuh", "real ? a.group_ids[j] : 0", "j < a.n ? a.group_ids[j] : 0", 0, MEMORY, OUTSIDE),
    "end of the samples": ("group_advantages", "group_advantages.cuh", "if (inside) a.out[i]", "a.out[i]", 0, MEMORY, OUTSIDE),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_taken_away_from_a_kernel_is_missed(tmp_path, name):
    op, file, old, new, place, flags, found = MUTANTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC / "common", csrc / "common")
    shutil.copytree(CSRC / "cuda", csrc / "cuda")
    source = csrc / "cuda" / file
    parts = source.read_text(encoding="utf-8").split(old)
    assert len(parts) > place + 1, f"{file} has no {old!r} number {place}"
    source.write_text(
        old.join(parts[: place + 1]) + new + old.join(parts[place + 1 :]),
        encoding="utf-8",
    )
    status, output = run(tmp_path, [op], [*flags, "-DONE_VARIANT"], csrc)
    assert status != 0, f"{name}: nothing was reported"
    assert re.search(found, output), output[:2000]
