"""process_group: slices of the vocabulary on 2 and 4 processes under gloo, against the whole on one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances
import torch
from parity import assert_parity, double
from vocab_slices import FIRST_DIMENSION, LAST_DIMENSION, SIZES, cases, loss_cases, loss_results, results

import rlhf_fast
from rlhf_fast._types import TokenStats

CASES, LOSSES = cases(), loss_cases()


@pytest.fixture(
    scope="module", params=[(2, "cpp"), (4, "cpp"), (2, "reference")], ids=lambda p: f"{p[0]} ranks, {p[1]}"
)
def ranks(request, tmp_path_factory):
    """What each rank found."""
    (world, backend), folder = request.param, tmp_path_factory.mktemp("gloo")
    script = Path(__file__).parent / "vocab_rank.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RLHF_FAST_BACKEND": backend},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def of_ranks(ranks, case):
    """The results of a case, the slices of a gradient put together; what every rank holds whole is the same on all of them."""
    found = {}
    for name in ranks[0][case]:
        each = [
            torch.tensor(r[case][name][1], dtype=getattr(torch, r[case][name][0].removeprefix("torch."))) for r in ranks
        ]
        leaf = name.removeprefix("d ")
        if leaf in (*LAST_DIMENSION, *FIRST_DIMENSION):
            shape = list({**CASES, **LOSSES}[case][0][leaf].shape)  # JSON keeps no shape of an empty tensor
            found[name] = torch.cat(each, -1 if leaf in LAST_DIMENSION else 0).reshape(shape)
        else:
            assert all(torch.equal(x.nan_to_num(7.0), each[0].nan_to_num(7.0)) for x in each), name
            found[name] = each[0]
    return found


@pytest.mark.parametrize("case", CASES)
def test_slices_give_the_statistics_and_gradients_of_the_whole(ranks, case):
    kwargs, options, trained = CASES[case]
    got = of_ranks(ranks, case)
    with rlhf_fast.use_backend("reference"):
        truth, plain = (results(k, options, trained) for k in (double(kwargs), kwargs))
    assert got.keys() == truth.keys()
    for name, x in got.items():
        assert x.dtype is plain[name].dtype, name
        x = x.reshape(truth[name].shape)
        if x.dtype is torch.float64:
            assert torch.equal(x.isfinite(), truth[name].isfinite()), name
            assert torch.equal(x.isnan(), truth[name].isnan()), name
            rows = x.isfinite()
            largest = truth[name][rows].abs().max() if rows.any() else 0.0
            assert (((x - truth[name])[rows]).abs() <= tolerances.DOUBLE * largest).all(), name
        else:
            # logprobs, kl and entropy are differences of log-sum-exps, which are rounded to their own width.
            sums = truth["logsumexp"].flatten().abs().tolist()
            scale = max(sums, default=0.0) if name in TokenStats._fields else None
            assert_parity(x, truth[name], plain[name], name, scale=scale)


@pytest.mark.parametrize("case", LOSSES)
def test_slices_give_the_loss_and_gradients_of_the_whole(ranks, case):
    kwargs, options, trained = LOSSES[case]
    got = of_ranks(ranks, case)
    with rlhf_fast.use_backend("reference"):
        truth, plain = (loss_results(k, options, trained) for k in (double(kwargs), kwargs))
    assert got.keys() == truth.keys() and got["d hidden"].any()
    for name, x in got.items():
        assert x.dtype is plain[name].dtype, name
        size = float(truth[name].abs().max())
        if kwargs["hidden"].dtype is torch.float64:
            assert (x - truth[name]).abs().max() <= tolerances.DOUBLE * max(1.0, size), name
        else:  # means of differences and of terms of both signs: at the size of a term, 1, and of the head's precision
            x = x.float() if x.dtype is torch.float64 else x
            assert_parity(x, truth[name], plain[name], name, scale=size if x.dim() else max(1.0, size))


def test_a_row_has_the_same_bits_in_any_batch(ranks):
    assert all(r["invariance"] for r in ranks)


def test_one_exchange_of_statistics_and_one_of_the_gradient(ranks):
    tokens, width = 33, 24
    for r in ranks:
        assert r["collectives"] == {"forward": [1, 5 * tokens], "backward": [tokens * width]}


def test_every_rank_names_the_wrong_argument(ranks):
    row = int(CASES["fp64"][0]["mask"].flatten().nonzero()[0])
    for i, r in enumerate(ranks):
        assert r["errors"]["id"] == (
            f"ValueError: token_logprobs: argument 'token_ids' got 127 at row {row}, expected a token id in [0, 127)"
        )
        assert f"'temperature' got 0.0 at row {row}, expected a finite number > 0" in r["errors"]["temperature"]
        assert r["errors"]["type"].startswith("TypeError: token_logprobs: argument 'process_group' got str, expected a")
        assert re.match(r"RuntimeError: .*the second derivative .*is not available", r["errors"]["second derivative"])
        assert re.match(
            r"ValueError: .*'token_ids' got \d+ at row \d+, expected a token id in \[0, 127\)", r["errors"]["loss, id"]
        )
        assert r["errors"]["loss, coefficient"].startswith(
            "ValueError: linear_ppo_loss: argument 'ref_logprobs' got None"
        )
        assert r["errors"]["loss, type"].startswith("TypeError: linear_ppo_loss: argument 'process_group' got str")
        if i > 0:
            assert "'process_group' got a group without this rank" in r["errors"]["member"]


def test_sizes_cover_the_vocabulary():
    assert all(sum(sizes) == 127 and len(sizes) == world for world, sizes in SIZES.items())
