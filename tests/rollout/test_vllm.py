"""Rollouts by a vLLM server: the protocol against a server that samples as we do, and, where RLHF_FAST_VLLM_PYTHON names a Python
that has vLLM, against vLLM itself."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import fake_vllm
import pytest
import tolerances
import torch
from asking import EOS, VLLM, ask, assert_same, engine, policy, real, request, shake
from models import save_tiny
from processes import PATIENCE, gone, until

from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.rollout.engines import sample
from rlhf_fast.rollout.vllm import EngineError

pytestmark = pytest.mark.usefixtures("pauses")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eos_token_id": None},
        {"min_new_tokens": 9},
        {"temperature": 0.0},
        {"num_samples": 1},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_a_rollout_is_what_the_server_sampled_in_the_order_of_the_request(fake, base, tmp_path, changes):
    model, asked = policy(base), request(**changes)
    with engine(tmp_path, base, server=fake.url) as vllm:
        vllm.update(model, 7)
        found, version = ask(vllm, asked)
    assert version == 7 and found.entropy is None
    expected = sample(model, asked)
    assert_same(found, expected)
    if not changes:
        assert expected.finished.any() and not expected.finished.all()


def test_a_request_says_all_that_decides_what_is_sampled(fake, base, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_VLLM_TOKEN", "secret")
    with engine(tmp_path, base, server=fake.url) as vllm:
        vllm.update(policy(base), 0)
        fake.seen.clear()
        ask(vllm, request(min_new_tokens=2))
    bodies = fake.bodies("/v1/completions")
    assert {token for _, token, _ in fake.seen} == {"Bearer secret"}
    assert sorted(b["seed"] for b in bodies) == sorted(request().seeds.tolist())
    name = bodies[0]["model"]
    assert {**bodies[0], "seed": 0, "prompt": []} == {
        "model": name,
        "prompt": [],
        "seed": 0,
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.9,
        "ignore_eos": True,
        "stop_token_ids": [EOS],
        "logprobs": 0,
        "return_token_ids": True,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def test_a_batch_is_sampled_by_the_adapter_it_was_submitted_under(fake, base, tmp_path):
    model, asked = policy(base), request()
    with engine(tmp_path, base, server=fake.url) as vllm:
        vllm.update(model, 0)
        before = sample(model, asked)
        vllm.submit(asked)
        shake(model, 2)
        vllm.update(model, 1)
        vllm.submit(asked)
        assert len(fake.adapters) == 2  # the old one stays until its batch is there
        first, second = vllm.collect(), vllm.collect()
        assert_same(first[0], before)
        assert_same(second[0], sample(model, asked))
        assert (first[1], second[1]) == (0, 1) and not torch.equal(first[0].input_ids, second[0].input_ids)
        (name,) = fake.adapters
        assert [p.name for p in (tmp_path / "vllm").iterdir()] == [name]
        shake(model, 3)
        vllm.update(model, 2)
        assert len(fake.adapters) == 1 and name not in fake.adapters
    loaded = [body["lora_name"] for body in fake.bodies("/v1/load_lora_adapter")]
    assert len(set(loaded)) == 3 and not fake.adapters and not list((tmp_path / "vllm").iterdir())
    with engine(tmp_path, base, server=fake.url) as vllm:  # a run that is resumed, or another one
        vllm.update(model, 0)
        assert not set(fake.adapters) & set(loaded)


def test_the_server_holds_the_base_without_folds(fake, base, tmp_path):
    policy(base, 5).save_adapter("policy", tmp_path / "sft")
    model = policy(base, fold=tmp_path / "sft", lora=LoraConfig(r=6, alpha=3.0, target_modules=("q_proj", "v_proj")))
    with engine(tmp_path, base, server=fake.url) as vllm:
        vllm.update(model, 0)
        found, _ = ask(vllm, request())
        config = json.loads((next(iter(fake.adapters.values())) / "adapter_config.json").read_text())
    expected = sample(model, request())
    assert config["r"] == 10 and torch.equal(found.input_ids, expected.input_ids)
    assert float((found.logprobs - expected.logprobs).abs().max()) < tolerances.ANOTHER_ENGINE


def test_what_may_pass_is_tried_again(fake, base, tmp_path, pauses):
    with engine(tmp_path, base, server=fake.url, requests=2, retries=3) as vllm:
        vllm.update(policy(base), 0)
        fake.script = ["close", 503, 500]
        assert_same(ask(vllm, request())[0], sample(policy(base), request()))
        assert pauses and not fake.script
        fake.script = [503] * 100
        vllm.submit(request())
        with pytest.raises(EngineError, match=r"server http://127.*: a completion failed \(status 503: busy\)"):
            vllm.collect()


def test_an_adapter_that_an_earlier_attempt_has_loaded_is_there(fake, base, tmp_path, monkeypatch):
    load = fake.RequestHandlerClass.load

    def deaf(handler, name, folder):
        known = name in handler.server.adapters
        if not known:
            handler.reply = lambda *_: None
        load(handler, name, folder)

    monkeypatch.setattr(fake.RequestHandlerClass, "load", deaf)
    with engine(tmp_path, base, server=fake.url) as vllm:
        vllm.update(policy(base), 0)
        assert len(fake.bodies("/v1/load_lora_adapter")) == 2
        assert_same(ask(vllm, request())[0], sample(policy(base), request()))


def test_a_server_that_cannot_serve_the_run_is_refused_before_the_first_request(fake, base, tmp_path):
    def message(path: Path = base, model: SharedModel | None = None, **options) -> str:
        with pytest.raises(EngineError) as caught, engine(tmp_path, path, **{"server": fake.url, **options}) as vllm:
            vllm.update(model or policy(path), 0)
        assert not fake.adapters and not list((tmp_path / "vllm").iterdir())
        return str(caught.value)

    assert "its context has 256 tokens, and the longest prompt and completion have 257" in message(context=257)
    wide = policy(base, lora=LoraConfig(r=20))
    assert "rank 20 is greater than max_lora_rank 16" in message(model=wide).lower()
    assert message(model=wide).endswith("it needs --enable-lora --max-lora-rank 32")
    other = save_tiny(tmp_path / "other", seed=3)
    assert f"nats off those of the policy here: it has to serve {other} without folds" in message(other)
    fake.raw = True
    assert "start it with --logprobs-mode processed_logprobs" in message()
    fake.raw, fake.updating = False, False
    assert "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in message()
    fake.updating = True
    assert "no answer to /v1/models (ConnectionRefusedError" in message(server="http://127.0.0.1:9")
    fake.script = ["{}"]
    assert "a completion got '{}', expected token ids with a log-prob each" in message()
    elsewhere = tmp_path / "elsewhere"
    fake.RequestHandlerClass = type(
        "Elsewhere",
        (fake.RequestHandlerClass,),
        {"load": lambda self, name, _: type(self).__base__.load(self, name, elsewhere)},
    )
    assert "has to see" in message() and "rollout.vllm.adapters names another folder" in message()


GOOD = {"token_ids": [5, 6, EOS], "logprobs": {"token_logprobs": [-1.0, -2.0, -3]}}


@pytest.mark.parametrize(
    "choices",
    [
        [],
        [GOOD, GOOD],
        [{**GOOD, "token_ids": [5, 6]}],
        [{**GOOD, "token_ids": [5, 6, 7]}],  # neither finished nor long enough
        [{**GOOD, "token_ids": [5, EOS, EOS]}],
        [{**GOOD, "token_ids": [5, -6, EOS]}],
        [{**GOOD, "token_ids": [5, "6", EOS]}],
        [{**GOOD, "token_ids": None}],
        [{**GOOD, "logprobs": None}],
        [{**GOOD, "logprobs": {"token_logprobs": [-1.0, None, -3.0]}}],
        [{**GOOD, "logprobs": {"token_logprobs": [-1.0, float("nan"), -3.0]}}],
    ],
    ids=str,
)
def test_an_answer_that_breaks_the_protocol_stops_the_run(fake, base, tmp_path, choices):
    with engine(tmp_path, base, server=fake.url) as vllm:
        vllm.update(policy(base), 0)
        fake.script = [json.dumps({"choices": [GOOD]}), json.dumps({"choices": choices})]
        one = request(prompts=[[5]], num_samples=1, seeds=torch.zeros(1, dtype=torch.int64))
        found, _ = ask(vllm, one)
        assert found.responses.tolist() == [[5, 6, EOS]] and found.logprobs.tolist() == [[-1.0, -2.0, -3.0]]
        vllm.submit(one)
        with pytest.raises(EngineError, match="expected token ids with a log-prob each"):
            vllm.collect()


def test_misuse_is_refused(fake, base, tmp_path):
    with pytest.raises(ValueError, match="argument 'python' got '/no/python'"):
        engine(tmp_path, base, python="/no/python")
    with pytest.raises(ValueError, match="argument 'url' got 'host:1'"):
        engine(tmp_path, base, server="host:1")
    with engine(tmp_path, base, server=fake.url, context=13) as vllm:
        with pytest.raises(ValueError, match="expected `update` first"):
            vllm.submit(request())
        with pytest.raises(ValueError, match="nothing was submitted"):
            vllm.collect()
        vllm.update(policy(base), 0)
        with pytest.raises(ValueError, match="got 5 tokens and 9 new ones, expected at most 13 in all"):
            vllm.submit(request())


def test_a_run_that_stops_does_not_wait_for_a_server_elsewhere(fake, base, tmp_path):
    with engine(tmp_path, base, server=fake.url) as vllm:
        vllm.update(policy(base), 0)
        fake.open.clear()  # it samples nothing
        vllm.submit(request())
        until(lambda: fake.waiting > 0)
        started = time.monotonic()
    assert time.monotonic() - started < PATIENCE
    fake.open.set()


@pytest.fixture
def python(tmp_path) -> str:
    """A Python of another environment in which `vllm` is the fake."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(fake_vllm.__file__)}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_a_server_that_the_run_starts(base, tmp_path, python, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/this/python")
    model = policy(base)
    with engine(tmp_path, base, python=python, arguments=("--fail-after", "13")) as vllm:
        vllm.update(model, 0)
        assert_same(ask(vllm, request())[0], sample(model, request()))
        vllm.submit(request())
        with pytest.raises(EngineError) as caught:
            vllm.collect()
        assert "the vLLM server: it has ended; the end of " in str(caught.value)
        assert "out of memory\nthe program ended with status 9" in str(caught.value)
        pid = int((tmp_path / "vllm" / "server.log").read_text().split("process ")[1].split()[0])
    assert gone(pid)


def test_a_server_that_does_not_start_says_why(base, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no module named vllm; exit 1\n")
    script.chmod(0o755)
    with engine(tmp_path, base, python=str(script)) as vllm, pytest.raises(EngineError) as caught:
        vllm.update(policy(base), 0)
    assert "it ended before it answered" in str(caught.value) and "no module named vllm\nthe program" in str(
        caught.value
    )
    script.write_text("#!/bin/sh\necho loading; sleep 1000\n")
    started = time.monotonic()
    with engine(tmp_path, base, python=str(script), start_timeout=2.0) as vllm, pytest.raises(EngineError) as caught:
        vllm.update(policy(base), 0)
    assert "no answer within rollout.vllm.start_timeout = 2 s" in str(caught.value) and "loading" in str(caught.value)
    assert time.monotonic() - started < PATIENCE


@real
def test_vllm_samples_what_we_do(wide, tmp_path, small_cache, monkeypatch):
    policy(wide, 5).save_adapter("policy", tmp_path / "sft")
    model = policy(wide, fold=tmp_path / "sft", shared_layers=1)
    with engine(tmp_path, wide, python=VLLM) as vllm:
        seen = []
        for version in range(3):
            shake(model, version)
            started = time.monotonic()
            vllm.update(model, version)
            took = time.monotonic() - started
            assert version == 0 or took < 5.0  # no restart
            greedy, got = ask(vllm, request(temperature=0.0))
            assert got == version
            assert torch.equal(greedy.input_ids, sample(model, request(temperature=0.0)).input_ids)
            seen.append(greedy.input_ids)
            for changes in ({}, {"temperature": 1.7, "min_new_tokens": 5}, {"eos_token_id": None}):
                asked = request(**changes)
                found, _ = ask(vllm, asked)
                ids, mask = found.responses, found.response_mask
                with torch.no_grad():
                    logits = model(found.input_ids, found.attention_mask, roles=("policy",)).policy.logits
                logits = logits[:, found.prompt_length - 1 : -1].clone()
                logits[:, : asked.min_new_tokens, EOS] = -torch.inf
                logprobs = (logits / asked.temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
                assert float((found.logprobs - logprobs)[mask].abs().max()) < tolerances.ANOTHER_ENGINE
                lengths, last = mask.sum(1), ids.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
                assert bool((lengths >= asked.min_new_tokens).all())
                assert torch.equal(found.finished, (last == EOS) & (asked.eos_token_id is not None))
                assert bool((lengths[~found.finished] == asked.max_new_tokens).all())
            again, _ = ask(vllm, request())
            assert torch.equal(again.input_ids, ask(vllm, request())[0].input_ids)  # the seeds count
            assert len(again.input_ids[:4].unique(dim=0)) > 1
        assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
