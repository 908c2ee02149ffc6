"""`rlhf-fast demo`: SFT, reward model and PPO on one base, judged by what training never saw."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from rlhf_fast.config import (
    DataConfig,
    GenerationConfig,
    KLConfig,
    ModelConfig,
    OptimConfig,
    PairDataConfig,
    PPOConfig,
    PPOUpdateConfig,
    PromptDataConfig,
    RewardConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    SFTConfig,
    validate,
)
from rlhf_fast.demo import assets, tiny
from rlhf_fast.evaluate.judges import Judge, demo_judges, judge_quality
from rlhf_fast.evaluate.policies import Samples, compare_samples, sample
from rlhf_fast.evaluate.statistics import Comparison
from rlhf_fast.model import LoraConfig
from rlhf_fast.report import Report, Sample, Stage, console_tables, machine_facts, write_report
from rlhf_fast.train.loop import device_of, load_model, load_tokenizer
from rlhf_fast.train.ppo import train_ppo
from rlhf_fast.train.reward import train_reward
from rlhf_fast.train.sft import train_sft

PROMPT_TOKENS, NEW_TOKENS = 8, 24
TITLE = "rlhf_fast demonstration: friendlier film reviews"


@dataclass(frozen=True)
class DemoConfig:
    """SFT on openings of film reviews, a reward model from human labels, PPO, and judges that training never saw."""

    output: str = "runs/demo"
    """Folder for the runs and the report."""
    cache: str = field(default_factory=lambda: str(assets.default_cache()))
    """Folder for downloads, kept between runs."""
    seeds: tuple[int, ...] = (0,)
    """One whole chain per seed."""
    tiny: bool = False
    """Pretrain a model of 2 million parameters on the reviews instead of downloading one of 135 million."""
    sft_texts: int = 800
    """Review openings for SFT."""
    reward_pairs: int = 900
    """Pairs (positive, negative) for the reward model."""
    ppo_steps: int = 20
    """Rollout batches of 64 completions."""
    prompts: int = 384
    """Held-out prompts of the evaluation."""


@dataclass(frozen=True)
class Corpus:
    """Files the stages read, and what judges and evaluation need."""

    base: Path
    shared_layers: int
    files: dict[str, Path]
    prompts: list[str]
    judges: list[Judge]
    quality: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """One seed's result."""

    seed: int
    before: Samples
    after: Samples
    comparisons: list[Comparison]
    stages: list[Stage]


def main(arguments: Sequence[str]) -> int:
    """Entry point of `rlhf-fast demo`."""
    config = tyro.cli(DemoConfig, prog="rlhf-fast demo", args=list(arguments))
    console = Console()
    folder = Path(config.output)
    clock = Clock()
    with clock("preparation"):
        corpus = prepare(config, console.print)
    outcomes = []
    for seed in config.seeds:
        console.rule(f"seed {seed}")
        outcomes.append(run_seed(config, corpus, seed, folder / f"seed-{seed}", clock))
        report = build_report(config, corpus, outcomes[-1], clock)
        console_tables(report)
        write_report(folder / f"seed-{seed}" / "report.html", report)
        console.print(f"report: {folder / f'seed-{seed}' / 'report.html'}")
    summary = summary_table(outcomes)
    (folder / "summary.md").write_text(summary, encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary_rows(outcomes), indent=1), encoding="utf-8")
    print(f"\n{summary}")  # as it is: a console would wrap the rows of the table
    return 0


class Clock:
    """Seconds of the parts of a run, by name; the last one of a name counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def prepare(config: DemoConfig, say: Callable[[str], Any]) -> Corpus:
    """Fetch and verify the inputs, cut the corpus into its parts, fit the judges."""
    cache = Path(config.cache)
    reviews = assets.movie_reviews(cache, say=say)
    if config.tiny:
        say("pretraining a model of 2 million parameters on half A")
        base = cache / "tiny-reviews"
        if not (base / "config.json").is_file():
            tiny.pretrain_tiny(base, [r.text for r in reviews.half_a], seconds=240, seed=0)
    else:
        base = assets.convert_base(cache, say=say)
    tokenizer = load_tokenizer(str(base))
    data = Path(config.output) / "data"
    data.mkdir(parents=True, exist_ok=True)
    pairs = assets.sentiment_pairs(reviews.reward, tokenizer, config.reward_pairs, tokens=(20, 48))
    rows: dict[str, list[dict[str, str]]] = {
        "sft": [{"text": t} for t in assets.openings(reviews.sft, tokenizer, 48, min_tokens=32)[: config.sft_texts]],
        "pairs": [{"prompt": "", "chosen": good, "rejected": bad} for good, bad in pairs],
        "prompts": [{"prompt": p} for p in assets.prompts(reviews.prompts, tokenizer, PROMPT_TOKENS)],
    }
    files = {}
    for name, records in rows.items():
        files[name] = data / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    prompts = assets.evaluation_prompts(reviews, tokenizer, PROMPT_TOKENS)[: config.prompts]
    say("fitting the judges on reviews that training does not see")
    judges = demo_judges(reviews.half_b, reviews.rotten_tomatoes)
    return Corpus(base, 2 if config.tiny else 24, files, prompts, judges, judge_facts(judges, reviews, tokenizer))


def judge_facts(judges: Sequence[Judge], reviews: assets.Reviews, tokenizer: Any) -> dict[str, str]:
    """How far each judge agrees with human labels on held-out openings as short as a completion."""
    pairs = assets.sentiment_pairs(reviews.held_out, tokenizer, 800, tokens=(NEW_TOKENS, NEW_TOKENS), seed=1)
    texts = [text for pair in pairs for text in pair]
    labels = [True, False] * len(pairs)
    found = {judge.name: judge_quality(judge, texts, labels) for judge in judges}
    return {
        name: f"accuracy {q.accuracy:.2f}, AUC {q.auc:.2f} on {NEW_TOKENS}-token texts" for name, q in found.items()
    }


def stage_configs(config: DemoConfig, corpus: Corpus, seed: int, folder: Path) -> dict[str, Any]:
    """The settings of the three trainings; `rlhf-fast sft|reward|ppo` with the written YAML files repeats them."""

    def model(fold: tuple[str, ...] = ()) -> ModelConfig:
        return ModelConfig(
            str(corpus.base), shared_layers=corpus.shared_layers, lora=LoraConfig(r=16, alpha=32.0), fold=fold
        )

    def run(name: str, **options: Any) -> RunConfig:
        return RunConfig(str(folder / name), seed=seed, overwrite=True, save_every=10, **options)

    sft = str(folder / "sft" / "adapter")
    return {
        "sft": SFTConfig(
            model=model(),
            data=DataConfig(str(corpus.files["sft"]), max_tokens=64, eos=False),
            run=run("sft"),
            optim=OptimConfig(lr=3e-4),
            batch_size=16,
            micro_batch_size=16,
        ),
        "reward": RewardConfig(
            model=model((sft,)),
            data=PairDataConfig(str(corpus.files["pairs"]), max_tokens=64, eos=False),
            run=run("reward"),
            optim=OptimConfig(lr=3e-3, warmup_ratio=0.1),
            batch_size=16,
            micro_batch_size=16,
            eval_fraction=0.15,
        ),
        "ppo": PPOConfig(
            model=model((sft,)),
            data=PromptDataConfig(str(corpus.files["prompts"]), max_tokens=64),
            run=run("ppo", sample_every=7),
            reward=RewardSource(source=str(folder / "reward" / "adapter"), normalize="reference"),
            optim=OptimConfig(lr=1e-3),
            rollout=RolloutConfig(batch_size=64, max_new_tokens=NEW_TOKENS, stop_at_eos=False),
            kl=KLConfig(coef=0.1),
            ppo=PPOUpdateConfig(epochs=2, minibatch_size=32, micro_batch_size=32),
            steps=config.ppo_steps,
        ),
    }


def run_seed(config: DemoConfig, corpus: Corpus, seed: int, folder: Path, clock: Clock) -> Outcome:
    """The three trainings and the evaluation of one seed."""
    configs = {name: validate(c) for name, c in stage_configs(config, corpus, seed, folder).items()}
    with clock("SFT"):
        train_sft(configs["sft"])
    with clock("reward model"):
        train_reward(configs["reward"])
    with clock("PPO"):
        train_ppo(configs["ppo"], observe=lambda texts: judge_means(corpus.judges, texts))
    with clock("evaluation"):
        before, after = evaluate_policies(configs["ppo"], corpus, folder)
        comparisons = compare_samples(before, after, corpus.judges)
    names = {"SFT": "sft", "reward model": "reward", "PPO": "ppo"}
    stages = [
        Stage(title, clock.seconds[title], folder / name / "metrics.jsonl", stage_details(configs[name]))
        for title, name in names.items()
    ]
    return Outcome(seed, before, after, comparisons, stages)


def judge_means(judges: Sequence[Judge], texts: list[str]) -> dict[str, float]:
    """Mean score of each judge, as metrics; they are watched during PPO and have no influence on it."""
    return {f"judge/{judge.name}": float(judge.score(texts).mean()) for judge in judges}


def evaluate_policies(config: PPOConfig, corpus: Corpus, folder: Path) -> tuple[Samples, Samples]:
    """Completions of the held-out prompts before PPO (the reference: base and SFT) and after it."""
    adapters = {"policy": str(folder / "ppo" / "adapter")}
    model = load_model(config.model, ("policy", "reference"), config.run.seed, adapters, device=device_of(config.run))
    tokenizer = load_tokenizer(config.model.path)
    prompts = [tokenizer(p, add_special_tokens=False).input_ids for p in corpus.prompts]
    rollout = GenerationConfig(batch_size=64, max_new_tokens=NEW_TOKENS, stop_at_eos=False)
    seed = 10_000 + config.run.seed
    before = sample(model, tokenizer, prompts, rollout, role="reference", seed=seed)
    return before, sample(model, tokenizer, prompts, rollout, role="policy", seed=seed)


def stage_details(config: Any) -> dict[str, str]:
    """The settings of a stage that a reader asks for first."""
    details = {"learning rate": f"{config.optim.lr:g}", "batch size": str(getattr(config, "batch_size", ""))}
    if isinstance(config, PPOConfig):
        details["batch size"] = f"{config.rollout.batch_size} completions of {config.rollout.max_new_tokens} tokens"
        details["KL coefficient"] = f"{config.kl.coef:g}"
        details["steps"] = f"{config.steps} x {config.ppo.epochs} epochs"
    return details


def build_report(config: DemoConfig, corpus: Corpus, outcome: Outcome, clock: Clock) -> Report:
    """The page of one seed: tables, curves, and ten pairs of completions."""
    before, after = outcome.before, outcome.after
    scores = [
        {j.name: pair for j, pair in zip(corpus.judges, columns, strict=True)}
        for columns in zip(
            *(zip(j.score(before.completions), j.score(after.completions), strict=True) for j in corpus.judges),
            strict=True,
        )
    ]
    samples = [
        Sample(
            before.prompts[i],
            before.completions[i],
            after.completions[i],
            {name: float(pair[0]) for name, pair in scores[i].items()},
            {name: float(pair[1]) for name, pair in scores[i].items()},
        )
        for i in range(min(10, len(before.completions)))
    ]
    preparation = Stage("preparation", clock.seconds["preparation"], description="inputs, splits and judges")
    evaluation = Stage("evaluation", clock.seconds["evaluation"], description=f"{len(before.prompts)} held-out prompts")
    return Report(
        title=TITLE,
        summary=(
            f"One frozen base model ({corpus.base.name}) carries policy, reference, value and reward as adapters. PPO is to "
            "make it continue film reviews kindly. The judges below were fitted on reviews that no training stage has seen."
        ),
        comparisons=outcome.comparisons,
        samples=samples,
        stages=[preparation, *outcome.stages, evaluation],
        configuration={**dataclasses.asdict(config), "seed": outcome.seed},
        machine=machine_facts(),
        notes=[
            *(f"{name}: {fact}." for name, fact in corpus.quality.items()),
            "The ten samples are the first ten prompts of the evaluation, not a selection.",
            "Before and after use the same random numbers for each prompt.",
            "Not measured: human preference, longer texts, other subjects than film reviews.",
        ],
        command="make demo",
        before_label="SFT",
        after_label="PPO",
    )


def summary_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per seed: win rates with their intervals, KL, diversity kept, minutes."""
    rows = []
    for o in outcomes:
        by_name = {c.metric: c for c in o.comparisons}
        judges = {c.metric: dataclasses.asdict(c.win_rate) for c in o.comparisons if c.win_rate is not None}
        distinct = by_name["distinct-2"]
        rows.append(
            {
                "seed": o.seed,
                "win_rate": judges,
                "kl": by_name["KL to the reference"].after.value,
                "distinct_2_kept": distinct.after.value / max(distinct.before.value, 1e-9),
                "perplexity": [o.before.perplexity, o.after.perplexity],
                "minutes": sum(stage.seconds for stage in o.stages) / 60,
            }
        )
    return rows


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """The rows as a Markdown table."""
    rows = summary_rows(outcomes)
    judges = list(rows[0]["win_rate"])
    head = [
        "seed",
        *(f"win rate, {name}" for name in judges),
        "KL (nats)",
        "distinct-2 kept",
        "training (min)",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        wins: list[Mapping[str, float]] = [row["win_rate"][name] for name in judges]
        cells = [f"{w['value']:.3f} [{w['low']:.3f}, {w['high']:.3f}]" for w in wins]
        tail = [f"{row['kl']:.1f}", f"{row['distinct_2_kept']:.0%}", f"{row['minutes']:.1f}"]
        lines.append(f"| {' | '.join([str(row['seed']), *cells, *tail])} |")
    if len(rows) > 1:
        kl = statistics.mean(row["kl"] for row in rows)
        lines.append(f"\nMean KL over {len(rows)} seeds: {kl:.1f} nats per completion of {NEW_TOKENS} tokens.")
    return "\n".join(lines) + "\n"
