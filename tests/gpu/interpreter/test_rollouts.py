"""Whole rollouts on a device that is no CPU, with the kernel that serves rollouts there, against the same on the CPU and against
transformers' generate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "model"))
from gpu.interpreter.rollouts import PROMPTS, ROLLOUTS, model_of, numbers, rollout

from rlhf_fast.batch import pad

RUNNER = Path(__file__).with_name("elsewhere_rollouts.py")
OWN_ATTENTION = ("bloom",)


@pytest.fixture(scope="module")
def elsewhere():
    """What a process of its own finds, which registers the device."""
    done = subprocess.run([sys.executable, str(RUNNER)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_rollout_is_that_of_the_cpu(elsewhere, name):
    found, expected = elsewhere[name], numbers(rollout(model_of(name), name, torch.device("cpu")))
    assert (found["reason"] is None) == (name not in OWN_ATTENTION)
    for key in ("ids", "mask", "finished"):
        assert found[key] == expected[key], key
    limit = tolerances.TEACHER_FORCED[ROLLOUTS[name][2]]
    for key in ("logprobs", "entropy"):
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key]), rtol=limit, atol=limit)


@pytest.mark.parametrize("name", [name for name, (*_, options) in ROLLOUTS.items() if options["temperature"] == 0])
def test_a_greedy_rollout_is_that_of_generate(elsewhere, name):
    model = model_of(name)
    ids, mask = pad(PROMPTS, left=True)
    model.base.generation_config.eos_token_id = None
    tokens = len(elsewhere[name]["ids"][0]) - ids.shape[1]
    with model.as_role("policy"):
        expected = model.base.generate(
            ids, attention_mask=mask.long(), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    assert torch.equal(torch.tensor(elsewhere[name]["ids"])[:, ids.shape[1] :], expected[:, ids.shape[1] :])


def test_some_rows_end_and_others_do_not(elsewhere):
    finished = {name: found["finished"] for name, found in elsewhere.items() if "eos_token_id" in ROLLOUTS[name][3]}
    assert finished and all(any(rows) and not all(rows) for rows in finished.values())


def test_the_host_waits_for_one_copy_a_token(elsewhere):
    few, many = (elsewhere[name] for name in ("llama, greedy", "llama, longer"))
    tokens = len(many["ids"][0]) - len(few["ids"][0])
    assert tokens == 4
    assert sum(many["waits"].values()) - sum(few["waits"].values()) == tokens
    of_prompt = sum(few["waits"].values()) - 7
    for name in ("llama", "qwen2", "mistral"):  # rows that leave cost no more
        assert sum(elsewhere[name]["waits"].values()) <= of_prompt + 7
