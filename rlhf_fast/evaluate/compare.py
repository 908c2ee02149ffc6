"""`rlhf-fast evaluate`: several adapters on the same prompts, judged against a baseline."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_fast.batch import pad
from rlhf_fast.config import EvaluateConfig, is_callable_spec
from rlhf_fast.evaluate.judges import Judge, Vader
from rlhf_fast.evaluate.policies import Samples, compare_samples, sample
from rlhf_fast.evaluate.statistics import Comparison
from rlhf_fast.model import SharedModel
from rlhf_fast.train.loop import device_of, load_data, load_model, load_tokenizer
from rlhf_fast.train.rewards import call_reward, load_callable

BUILT_IN = {"vader": Vader}


class FunctionJudge:
    """A reward function as a judge; it sees completions without their prompts."""

    neutral = 0.0

    def __init__(self, spec: str) -> None:
        self.name, self.description = spec, "reward function"
        self._function = load_callable(spec)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) scores. Raises ValueError when a text cannot be scored: a comparison needs all of them."""
        scores = call_reward(self._function, self.name, [""] * len(texts), list(texts)).double().numpy()
        if np.isnan(scores).any():
            raise ValueError(f"judge {self.name}: {int(np.isnan(scores).sum())} of {len(texts)} texts have no score")
        return scores


class RewardJudge:
    """A trained reward role as a judge."""

    neutral = 0.0

    def __init__(self, model: SharedModel, tokenizer: Any, folder: str, batch_size: int) -> None:
        self.name, self.description = Path(folder).parent.name or folder, f"reward model {folder}"
        self._model, self._tokenizer, self._folder, self._size = model, tokenizer, folder, batch_size

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) scores of texts; an empty text is scored as end-of-sequence."""
        self._model.load_adapter("reward", self._folder)
        rows = [self._tokenizer(t, add_special_tokens=False).input_ids or [self._tokenizer.eos_token_id] for t in texts]
        parts = []
        for i in range(0, len(rows), self._size):
            ids, mask = pad(rows[i : i + self._size], device=self._model.backbone.device)
            parts.append(self._model(ids, mask, roles=("reward",)).reward.scores)
        return torch.cat(parts).double().cpu().numpy()


def load_judges(names: Sequence[str], model: SharedModel, tokenizer: Any, batch_size: int) -> list[Judge]:
    """Judges by built-in name, callable or reward adapter folder. Raises ValueError for anything else."""
    judges: list[Judge] = []
    for name in names:
        if name in BUILT_IN:
            judges.append(BUILT_IN[name]())
        elif is_callable_spec(name):
            judges.append(FunctionJudge(name))
        elif (Path(name) / "adapter_config.json").is_file():
            judges.append(RewardJudge(model, tokenizer, name, batch_size))
        else:
            raise ValueError(
                f"evaluate: judge {name!r} is no built-in judge ({', '.join(BUILT_IN)}), no module:function and no adapter folder"
            )
    return judges


def evaluate(config: EvaluateConfig) -> Path:
    """Sample, judge, print the tables, and write evaluation.json; returns its path."""
    from rlhf_fast.report import print_comparisons

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    folder = Path(config.run.output_dir)
    target = folder / "evaluation.json"
    if target.exists() and not config.run.overwrite:
        raise ValueError(f"evaluate: {target} exists; replace it with --run.overwrite")
    tokenizer = load_tokenizer(config.model.path)
    encoded, _ = load_data(config.data, tokenizer)
    prompts = [e.input_ids for e in encoded]
    roles = ("policy", "reference", "reward")
    model = load_model(config.model, roles, config.run.seed, device=device_of(config.run))
    judges = load_judges(config.judges, model, tokenizer, config.rollout.batch_size)
    found: dict[str, Samples] = {}
    for name, adapter in {"base": None, **config.adapters}.items():
        if adapter is not None:
            model.load_adapter("policy", adapter)
        found[name] = sample(
            model,
            tokenizer,
            prompts,
            config.rollout,
            role="reference" if adapter is None else "policy",
            samples_per_prompt=config.samples_per_prompt,
            seed=config.run.seed,
        )
    baseline = config.baseline or "base"
    results: dict[str, list[Comparison]] = {}
    for name, samples in found.items():
        if name != baseline:
            results[name] = compare_samples(
                found[baseline], samples, judges, resamples=config.bootstrap, level=config.confidence
            )
            print_comparisons(results[name], before=baseline, after=name)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: [strict(dataclasses.asdict(c)) for c in rows] for name, rows in results.items()}
    completions = {name: s.completions for name, s in found.items()}
    document = {
        "baseline": baseline,
        "comparisons": rows,
        "prompts": found[baseline].prompts,
        "completions": completions,
    }
    target.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return target


def strict(value: Any) -> Any:
    """`value` with None for the NaN ends of an interval that was not computed, which JSON does not know."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
