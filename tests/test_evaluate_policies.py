"""Sampling policies side by side, and `rlhf-fast evaluate` from settings to its JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from models import letter_tokenizer, save_tiny, tiny_llama

from rlhf_fast.config import EvaluateConfig, GenerationConfig, ModelConfig, PromptDataConfig, RunConfig
from rlhf_fast.evaluate.compare import FunctionJudge, RewardJudge, evaluate, load_judges, strict
from rlhf_fast.evaluate.policies import Samples, compare_samples, sample
from rlhf_fast.model import LoraConfig, SharedModel

SCORERS = Path(__file__).parent / "train" / "scorers.py"
COUNT_E = f"{SCORERS}:count_e"
PROMPTS = ("the film", "a story of", "we saw")
ROLES = ("policy", "reference", "reward")


def make(folder: Path | None = None) -> SharedModel:
    base = str(folder / "model") if folder else tiny_llama()
    lora = LoraConfig(r=4, alpha=8.0)
    if folder:
        return SharedModel.from_pretrained(base, roles=ROLES, lora=lora, seed=0)
    return SharedModel(base, roles=ROLES, lora=lora, seed=0)


def disturb(model: SharedModel, role: str, scale: float = 0.3) -> None:
    """Random adapter weights, as if it had been trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters_of(role).values():
            p += scale * torch.randn(p.shape, generator=generator)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    model = make(tmp_path)
    disturb(model, "policy")
    model.save_adapter("policy", tmp_path / "trained")
    model.save_adapter("reward", tmp_path / "judge" / "adapter")
    return tmp_path


def settings(folder: Path, **changes: object) -> EvaluateConfig:
    given: dict = {
        "model": ModelConfig(str(folder / "model"), dtype="float32", lora=LoraConfig(r=4, alpha=8.0)),
        "data": PromptDataConfig(str(folder / "prompts.jsonl")),
        "run": RunConfig(str(folder / "run")),
        "adapters": {"trained": str(folder / "trained")},
        "rollout": GenerationConfig(batch_size=2, max_new_tokens=6),
        "judges": (COUNT_E, str(folder / "judge" / "adapter"), "vader"),
        "samples_per_prompt": 2,
        "bootstrap": 200,
    }
    return EvaluateConfig(**(given | changes))


def ids() -> list[list[int]]:
    return [letter_tokenizer()(p).input_ids for p in PROMPTS]


# --- samples


def test_an_untrained_policy_says_what_the_reference_says_at_no_kl():
    model, tokenizer = make(), letter_tokenizer()
    config = GenerationConfig(batch_size=2, max_new_tokens=6)
    policy, reference = (sample(model, tokenizer, ids(), config, role=r, seed=3) for r in ("policy", "reference"))
    assert policy.completions == reference.completions and len(policy.completions) == len(PROMPTS)
    assert policy.kl.tolist() == [0.0] * len(PROMPTS)
    assert sample(model, tokenizer, ids(), config, seed=4).completions != policy.completions


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_and_perplexity_are_those_of_the_sampled_tokens(temperature):
    model, tokenizer = make(), letter_tokenizer()
    disturb(model, "policy")
    config = GenerationConfig(batch_size=4, max_new_tokens=6, temperature=temperature, stop_at_eos=False)
    letters = (sample(model, tokenizer, ids(), config, seed=seed) for seed in range(100))
    found = next(s for s in letters if all(len(c) == 6 for c in s.completions))  # special tokens have no letter
    logprobs = {"policy": [], "reference": []}
    for prompt, completion in zip(ids(), found.completions, strict=True):
        tokens = tokenizer(completion, add_special_tokens=False).input_ids
        row = torch.tensor([prompt + tokens])
        out = model(row, torch.ones_like(row, dtype=torch.bool), roles=("policy", "reference"))
        for role, sums in logprobs.items():
            p = (out[role].logits[0, len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
            sums.append(p.gather(1, torch.tensor(tokens)[:, None]).sum().item())
    policy, reference = (np.array(v) for v in logprobs.values())
    np.testing.assert_allclose(found.ref_logprobs, reference, rtol=1e-4)
    np.testing.assert_allclose(found.kl, policy - reference, rtol=1e-3, atol=1e-4)
    assert found.perplexity == pytest.approx(math.exp(-reference.sum() / 18), rel=1e-4)
    assert found.tokens.tolist() == [6.0] * 3


def test_samples_of_one_prompt_stand_together():
    found = sample(
        make(), letter_tokenizer(), ids(), GenerationConfig(batch_size=4, max_new_tokens=4), samples_per_prompt=3
    )
    assert found.prompts == [p for p in PROMPTS for _ in range(3)]
    assert len({*found.completions[:3]}) > 1


def test_a_comparison_has_a_row_per_judge_and_the_price():
    def of(texts: list[str], kl: float) -> Samples:
        n = len(texts)
        return Samples(["p"] * n, texts, np.full(n, kl), np.full(n, -8.0), np.full(n, 4.0))

    before, after = of(["bad film", "dull one"], 0.0), of(["good film", "good film"], 1.5)

    class Goodness:
        name, description, neutral = "goodness", "", 0.0

        def score(self, texts):
            return np.array([float(t.count("good")) for t in texts])

    rows = {row.metric: row for row in compare_samples(before, after, [Goodness()], resamples=200)}
    assert rows["goodness"].win_rate.value == 1.0
    assert rows["KL to the reference"].after.value == 1.5
    assert rows["distinct-2"].before.value == 1.0 and rows["distinct-2"].after.value == 0.5
    assert rows["perplexity under the reference"].after.value == pytest.approx(math.exp(2.0))


# --- judges


def test_judges_come_by_name_callable_or_folder(folder):
    model, tokenizer = make(folder), letter_tokenizer()
    judges = load_judges([COUNT_E, str(folder / "judge" / "adapter"), "vader"], model, tokenizer, 2)
    assert [j.name for j in judges] == [COUNT_E, "judge", "VADER"]
    with pytest.raises(ValueError, match=r"no built-in judge .*vader.*no module:function and no adapter folder"):
        load_judges(["nobody"], model, tokenizer, 2)


def test_a_reward_judge_scores_a_text_alike_in_any_batch_and_an_empty_one_too(folder):
    model = make(folder)
    texts = ["a good film", "", "we saw it there"]
    at_once = RewardJudge(model, letter_tokenizer(), str(folder / "judge" / "adapter"), 3).score(texts)
    one_by_one = RewardJudge(model, letter_tokenizer(), str(folder / "judge" / "adapter"), 1).score(texts)
    np.testing.assert_allclose(at_once, one_by_one, atol=1e-5)
    assert len(set(at_once.round(6))) == 3


def test_a_judge_that_cannot_score_a_text_is_an_error():
    with pytest.raises(ValueError, match="1 of 2 texts have no score"):
        FunctionJudge(f"{SCORERS}:skip_first").score(["a", "b"])


# --- the command


def test_evaluate_writes_every_comparison_and_completion(folder, capsys):
    path = evaluate(settings(folder))
    document = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert document["baseline"] == "base" and list(document["comparisons"]) == ["trained"]
    rows = {row["metric"]: row for row in document["comparisons"]["trained"]}
    assert {COUNT_E, "judge", "VADER", "KL to the reference", "distinct-2"} <= rows.keys()
    assert rows["KL to the reference"]["before"]["value"] == 0.0
    completions = document["completions"]
    assert len(completions["base"]) == len(completions["trained"]) == len(document["prompts"]) == 6
    counted = [sum(t.count("e") for t in completions[name]) / 6 for name in ("base", "trained")]
    assert [rows[COUNT_E][side]["value"] for side in ("before", "after")] == pytest.approx(counted)
    assert "trained" in capsys.readouterr().out


def test_evaluate_repeats_with_its_seed_and_never_overwrites_unasked(folder):
    first = evaluate(settings(folder)).read_text()
    with pytest.raises(ValueError, match=r"--run\.overwrite"):
        evaluate(settings(folder))
    again = evaluate(settings(folder, run=RunConfig(str(folder / "run"), overwrite=True))).read_text()
    assert first == again


def test_a_baseline_other_than_the_plain_model(folder):
    document = json.loads(evaluate(settings(folder, baseline="trained")).read_text())
    assert document["baseline"] == "trained" and list(document["comparisons"]) == ["base"]
    with pytest.raises(ValueError, match="baseline"):
        settings(folder, baseline="nobody")


def test_nan_becomes_null():
    assert strict({"a": math.nan, "b": {"c": 1.0}, "d": "x"}) == {"a": None, "b": {"c": 1.0}, "d": "x"}
