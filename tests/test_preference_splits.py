"""Any split of the pairs gives the loss and the gradient of the whole: micro-batches, ranks, and for kinds that look across the pairs
the rows of all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances
import torch
from preference_batches import CASES, LEAVES, N, across, across_ranks, pairs, run

from rlhf_fast import Denominators, advantages, gather_rows, gdpo_advantages, group_advantages
from rlhf_fast.ops.group_advantages import FORMULAS
from rlhf_fast.preference_kinds import KINDS

SPLITS = {
    "two": [[0, 1, 2, 3], [4, 5, 6, 7, 8]],
    "one pair each": [[row] for row in range(N)],
    "uneven, in another order": [[7, 2], [8, 0, 3, 5, 4], [], [1, 6]],
}
ALONE = [case for case in CASES if not across(case)]
TOGETHER = [case for case in CASES if across(case)]


def close(got, expected):
    """Equal but for the order of summation in fp64."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    difference = torch.as_tensor(got, dtype=torch.float64) - expected
    assert difference.abs().max() <= tolerances.SPLIT * expected.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", ALONE)
def test_micro_batches_with_shared_denominators_add_up(case, split):
    tensors = pairs(case)
    loss, grads = run(case, tensors)
    parts = [{k: v[rows] for k, v in tensors.items()} for rows in SPLITS[split]]
    counts = sum(Denominators.of(part["mask"][:, None]) for part in parts)
    for d, share in ((counts, 1), (counts.averaged(len(parts)), len(parts))):
        found = [run(case, part, normalizer=d.normalizer("token-mean")) for part in parts]
        close(sum(f[0] for f in found) / share, loss)
        for name, expected in grads.items():
            assert expected[tensors["mask"]].any() or name == "rejected_logprobs", name  # sft has no use for them
            got = torch.zeros(N, dtype=torch.float64)
            for (_, of_part), rows in zip(found, SPLITS[split], strict=True):
                got[rows] = of_part[name]
            close(got / share, expected)


@pytest.mark.parametrize("case", TOGETHER)
def test_kinds_that_look_across_the_pairs_do_not_add_up(case):
    """What their docstring says, and why they need the rows of all ranks."""
    tensors = pairs(case)
    parts = [{k: v[rows] for k, v in tensors.items()} for rows in SPLITS["one pair each"]]
    counts = Denominators.of(tensors["mask"][:, None])
    total = sum(run(case, part, normalizer=counts.normalizer("token-mean"))[0] for part in parts)
    assert (total - run(case, tensors)[0]).abs() > 1e-3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes under gloo found, each with its own pairs."""
    folder = tmp_path_factory.mktemp("gloo")
    script = Path(__file__).parent / "preference_rank.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_loss_and_the_gradient_of_one(ranks, case):
    loss, grads = run(case, pairs(case))
    for found in ranks:
        close(found[case]["loss"], loss)
        close(found[case]["averaged"], loss)
    for name in LEAVES:
        got = torch.zeros(N, dtype=torch.float64)
        for found in ranks:
            got[found["rows"]] = torch.tensor(found[case][name], dtype=torch.float64)
        close(got, grads[name])


@pytest.mark.parametrize("kind", FORMULAS)
def test_group_advantages_of_all_ranks_are_those_of_one(ranks, kind):
    scores = torch.linspace(-1, 2, N, dtype=torch.float64).square().requires_grad_()
    extra = {"lengths": torch.arange(N) + 1} if kind == "opo" else {}
    extra |= {"greedy_scores": scores.detach() * 0.5} if kind == "remax" else {}
    expected = group_advantages(scores, torch.arange(N) % 2, kind, **extra)
    (grad,) = torch.autograd.grad((expected * torch.linspace(1, 2, N, dtype=torch.float64)).sum(), scores)
    for found in ranks:
        everywhere, own = found[f"group {kind}"]
        close(everywhere, expected.detach())
        close(own, grad[found["rows"]])


def test_rewards_normalised_and_advantages_whitened_over_all_ranks_are_those_of_one(ranks):
    several, values, mask = across_ranks()
    scores, ids = torch.linspace(-1, 2, N, dtype=torch.float64).square(), torch.arange(N) % 2
    of_one = advantages(scores, values, mask).advantages
    for found in ranks:
        close(found["gdpo"], gdpo_advantages(several, ids))
        close(found["whitened"], of_one[found["rows"]])


def test_the_running_mean_of_bco_is_that_of_all_ranks(ranks):
    expected = torch.linspace(-1, 2, N, dtype=torch.float64).square().mean().item()
    assert all(found["delta"] == pytest.approx(expected, rel=1e-12) for found in ranks)


def test_rows_come_in_the_order_of_the_ranks_with_a_first_derivative_towards_the_own(ranks):
    rows = torch.arange(6.0).view(3, 2)
    for rank, found in enumerate(ranks):
        gathered, first, second = found["gathered"]
        assert gathered == rows.tolist() and first == (2 * rows).tolist()[: 3 * rank]
        assert "second derivative" in second


def test_wrong_arguments_of_gather_rows_are_named():
    with pytest.raises(TypeError, match="gather_rows: argument 'x' got list"):
        gather_rows([1.0])
    with pytest.raises(ValueError, match="gather_rows: argument 'x' got a scalar"):
        gather_rows(torch.tensor(1.0))
    with pytest.raises(TypeError, match="gather_rows: argument 'process_group' got str"):
        gather_rows(torch.ones(2), "world")


def test_every_kind_takes_part():
    assert {*ALONE, *TOGETHER} >= set(KINDS) and set(TOGETHER) == {name for name, kind in KINDS.items() if kind.across}
