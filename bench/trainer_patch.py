"""TRL's trainers and verl's PPO step with and without `rlhf_fast.patch`: `pip install '.[trl,verl]' && python bench/trainer_patch.py`.

grpo, dpo and reward are TRL's own trainers on a random Llama in fp32, otherwise with their defaults but for a rate of learning at
which 20 steps move the weights. verl is its log-probs, entropy, GAE, policy and value loss on random data, with their gradients.
Every run is a process of its own, with and without the patch in turn, so that the highest resident set is that of one of them.
With --parallel ddp or fsdp2 it is two, each with the whole of --batch, and the model in the hands of accelerate (gloo, on the CPU).
Nothing is downloaded: model, tokenizer and texts are made here.

A loss whose terms cancel (GRPO's advantages add up to 0) says nothing relative to itself: its difference is taken relative to the
size of its terms as well, and the gradient norms are compared. The first steps hold the patch's check, where both
implementations run: they count for the losses, not for the time, and their memory is a column of its own. Returns 1 if a loss or a norm is off by
more than LIMIT, or if completions differ.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import ranks

LIMIT = 1e-5
"""Of the losses, relative to the size of their terms, and of the gradient norms; in fp32."""
CHECKED_STEPS = 2
"""First steps, which are not timed: GRPO samples on one and trains on its completions again on the next."""
GROUP = 4
"""Completions per prompt of GRPO."""
RANGES = (
    ("steps", CHECKED_STEPS + 1, 1), ("rounds", 1, 1), ("threads", 1, 1), ("vocab", 8, 1), ("hidden", 64, 64), ("layers", 1, 1),
    ("batch", GROUP, GROUP), ("prompt", 2, 1), ("response", 2, 1), ("seed", 0, 1),
)  # fmt: skip
"""(option, least value, what it is a multiple of)."""
FRAMEWORK = {"grpo": "trl", "dpo": "trl", "reward": "trl", "verl": "verl"}


def largest(plain: Sequence[float], ours: Sequence[float], sizes: Sequence[float]) -> float:
    """Largest |ours - plain| / size over the steps; 0 where nothing differs, infinity where a difference meets a size of 0.

    Raises ValueError when the runs have other numbers of steps, or none.
    """
    if not len(plain) == len(ours) == len(sizes) or not plain:
        raise ValueError(
            f"largest: plain, ours and sizes must have one value per step, got {len(plain)}, {len(ours)} and {len(sizes)}"
        )
    found = 0.0
    for a, b, size in zip(plain, ours, sizes, strict=True):
        difference = abs(b - a)
        if difference != difference:  # NaN
            return float("inf")
        if difference:
            found = max(found, difference / abs(size) if size else float("inf"))
    return found


def fastest(rounds: Sequence[Sequence[float]], skip: int) -> float:
    """Mean seconds per step after the first `skip`, each step by its fastest round: what else the machine does only adds.

    Raises ValueError without such a step.
    """
    steps = [min(step) for step in zip(*rounds, strict=True)][skip:]
    if not steps:
        raise ValueError(f"fastest: steps must be more than skip = {skip}, got {len(rounds[0]) if rounds else 0}")
    return sum(steps) / len(steps)


def compared(name: str, plain: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one trainer from its rounds without and with the patch."""
    a, b = plain[0], ours[0]
    seconds = [fastest([r["seconds"] for r in rounds], CHECKED_STEPS) for rounds in (plain, ours)]
    generation = [fastest([r["generation"] for r in rounds], CHECKED_STEPS) for rounds in (plain, ours)]
    peaks, firsts = ([min(r[k] for r in rounds) for rounds in (plain, ours)] for k in ("peak", "first peak"))
    return {
        "trainer": name,
        "loss": largest(a["losses"], b["losses"], a["losses"]),
        "terms": largest(a["losses"], b["losses"], a["sizes"]),
        "norm": largest(a["norms"], b["norms"], a["norms"]),
        "same data": a["data"] == b["data"],
        "repeats": all(r["losses"] == rounds[0]["losses"] for rounds in (plain, ours) for r in rounds),
        "seconds": seconds,
        "generation": generation,
        "peaks": peaks,
        "first peaks": firsts,
        "reached": b["reached"],
        "fell through": b["fell through"],
    }


def agrees(row: dict[str, Any]) -> bool:
    return row["same data"] and row["terms"] <= LIMIT and row["norm"] <= LIMIT


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; times in ms per step, memory in MiB above what the process held before the first step."""
    lines = [
        "| steps of | loss, rel. | loss / its terms | gradient norm, rel. | ms per step | of it generation | speed-up | "
        "peak MiB | memory | peak of the first steps | calls that reached ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        (t0, t1), (g0, g1), (m0, m1), (f0, f1) = (row[k] for k in ("seconds", "generation", "peaks", "first peaks"))
        calls = f"{row['reached']}" + (f", {row['fell through']} left to it" if row["fell through"] else "")
        generation = f"{g0 * 1e3:.1f} / {g1 * 1e3:.1f}" if g0 or g1 else ""
        lines.append(
            f"| {row['trainer']} | {row['loss']:.1e} | {row['terms']:.1e} | {row['norm']:.1e} | "
            f"{t0 * 1e3:.1f} / {t1 * 1e3:.1f} | {generation} | {t0 / t1:.2f} x | {m0:.0f} / {m1:.0f} | "
            f"{m1 / m0:.2f} x | {f0:.0f} / {f1:.0f} | {calls} |"
        )
    return "\n".join(lines)


def memory(name: str) -> float:
    """VmRSS, the resident set of this process, or VmHWM, the highest since `forget_peak`; in MiB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Start VmHWM afresh (proc(5), clear_refs)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Recorder:
    """What a run leaves: one entry per step, and the highest resident sets above that before the first step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sizes: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        self.generation: list[float] = []
        self.data: list[int] = []
        self.before = self.first = 0.0

    def start(self) -> None:
        forget_peak()
        self.before = memory("VmRSS")

    def step(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if len(self.seconds) == CHECKED_STEPS:
            self.first = memory("VmHWM") - self.before
            forget_peak()

    def result(self) -> dict[str, Any]:
        found = {k: v for k, v in vars(self).items() if k not in ("before", "first")}
        return {**found, "peak": memory("VmHWM") - self.before, "first peak": self.first}


def tokenizer_of(words: int) -> Any:
    """A word is a token: w0, w1, ... behind padding, end and unknown."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {word: n for n, word in enumerate([*special, *(f"w{n}" for n in range(words - len(special)))])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def save_llama(folder: str, args: argparse.Namespace, tokenizer: Any) -> None:
    """A random Llama in a folder: the trainers load policy and reference from a path."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def texts(args: argparse.Namespace, trainer: str) -> Any:
    """Random words; answers of both lengths up to --response, so that there is padding."""
    import random

    from datasets import Dataset

    draw = random.Random(args.seed)
    last = args.vocab - 4
    words = lambda least, most: " ".join(f"w{draw.randint(0, last)}" for _ in range(draw.randint(least, most)))
    rows = []
    for _ in range(args.steps * args.batch * (ranks.RANKS if args.parallel != "none" else 1)):
        prompt = words(args.prompt // 2, args.prompt)
        if trainer == "grpo":
            rows.append({"prompt": prompt})
            continue
        answers = {side: " " + words(args.response // 2, args.response) for side in ("chosen", "rejected")}
        rows.append({"prompt": prompt, **answers} if trainer == "dpo" else {k: prompt + v for k, v in answers.items()})
    return Dataset.from_list(rows)


def rarity(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group: the mean number of the sampled words."""
    return [sum(int(w[1:]) for w in c.split()) / max(len(c.split()), 1) / 1e3 for c in completions]


def run_trl(name: str, args: argparse.Namespace, found: Recorder, folder: str) -> None:
    """`args.steps` optimiser steps of one of TRL's trainers."""
    import trl
    from transformers import AutoModelForSequenceClassification, TrainerCallback

    tokenizer = tokenizer_of(args.vocab)
    path = os.path.join(folder, "model")
    save_llama(path, args, tokenizer)
    options: dict[str, Any] = {
        "output_dir": os.path.join(folder, "run"), "max_steps": args.steps, "per_device_train_batch_size": args.batch,
        "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "seed": args.seed,
        "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": args.lr,
    }  # fmt: skip
    shared: dict[str, Any] = {"train_dataset": texts(args, name), "processing_class": tokenizer}

    class Steps(TrainerCallback):
        """The clock of whole steps: data, sampling, losses, optimiser."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            found.generation.append(0.0)
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.step(time.perf_counter() - self.start)

    shared["callbacks"] = [Steps()]
    fp32 = {"model_init_kwargs": {"dtype": "float32"}}
    model: Any = path
    if name == "grpo":
        fp32 |= {"beta": 0.04, "num_generations": GROUP, "num_iterations": 2, "max_completion_length": args.response}
        shared["args"], shared["reward_funcs"] = trl.GRPOConfig(**options, **fp32), rarity
    elif name == "dpo":
        shared["args"] = trl.DPOConfig(**options, **fp32)
    else:
        shared["args"] = trl.RewardConfig(**options)
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype="float32")
    if args.parallel == "fsdp2":
        ranks.shard_on_the_cpu()
    kinds = {"grpo": trl.GRPOTrainer, "dpo": trl.DPOTrainer, "reward": trl.RewardTrainer}
    trainer: Any = kinds[name](model, **shared)
    if name == "grpo":
        generate = trainer._generate

        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            sampled = generate(*arguments, **keywords)
            found.generation[-1] += time.perf_counter() - start
            return sampled

        trainer._generate = timed

    compute_loss = trainer.compute_loss

    def recorded(model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        result = compute_loss(model, inputs, *arguments, **keywords)
        loss = float((result[0] if isinstance(result, tuple) else result).detach())
        ids = inputs["completion_ids" if name == "grpo" else "input_ids"]
        found.losses.append(loss)
        # Terms of GRPO are -A r with r near 1; those of the other losses are positive and do not cancel.
        found.sizes.append(float(inputs["advantages"].abs().mean()) if name == "grpo" else loss)
        found.data.append(hash(tuple(ids.flatten().tolist())))
        return result

    trainer.compute_loss = recorded
    found.start()
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    if ranks.held_by(trainer.model_wrapped) != args.parallel:
        raise RuntimeError(
            f"the model is in the hands of {ranks.held_by(trainer.model_wrapped)}, not of {args.parallel}"
        )
    found.norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def run_verl(args: argparse.Namespace, found: Recorder) -> None:
    """PPO losses and their gradients on logits and values that are drawn for every step."""
    import torch
    import verl.utils.torch_functional as functional
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=args.batch)
    generator = torch.Generator().manual_seed(args.seed)
    B, T, V = args.batch, args.response, args.vocab
    draw = lambda *shape: torch.randn(*shape, generator=generator)

    def step() -> None:
        logits = draw(B, T, V).mul_(2).requires_grad_()
        ids = torch.randint(0, V, (B, T), generator=generator)
        lengths = torch.randint(T // 2, T + 1, (B, 1), generator=generator)
        mask = (torch.arange(T) < lengths).long()
        values, noise, shift = draw(B, T), draw(B, T), draw(B, T)
        rewards = draw(B, T) * (torch.arange(T) == lengths - 1)
        new_values = (values + 0.3 * noise).requires_grad_()
        start = time.perf_counter()
        advantages, returns = core_algos.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95)
        logprobs = functional.logprobs_from_logits(logits, ids, inplace_backward=False)
        entropy = functional.entropy_from_logits(logits)
        old = logprobs.detach() + 0.1 * shift
        policy, _ = core_algos.compute_policy_loss_vanilla(old, logprobs, advantages, mask, "token-mean", config)
        bonus = core_algos.agg_loss(entropy, mask, "token-mean")
        value, _ = core_algos.compute_value_loss(new_values, returns, values, mask, 0.5)
        loss = policy - 0.01 * bonus + 0.5 * value
        loss.backward()
        seconds = time.perf_counter() - start
        found.generation.append(0.0)
        found.losses.append(loss.item())
        weights = mask / mask.sum()
        found.sizes.append(((advantages * weights).abs().sum() + 0.01 * bonus + 0.5 * value).item())
        # Row by row: a copy of the whole gradient in fp64 would be the peak.
        squares = sum(float(row.double().square().sum()) for x in (logits, new_values) for row in x.grad)
        found.norms.append(squares**0.5)
        found.data.append(hash(tuple(ids.flatten().tolist())))
        found.step(seconds)

    found.start()
    for _ in range(args.steps):
        step()


def measure(name: str, patched: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process."""
    import torch

    torch.set_num_threads(args.threads)
    counts = None
    if patched:
        import rlhf_fast
        from rlhf_fast.integrations import status

        rlhf_fast.patch(FRAMEWORK[name], quiet=True)
        counts = status
    found = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        if name == "verl":
            run_verl(args, found)
        else:
            run_trl(name, args, found, folder)
    rows = counts(FRAMEWORK[name]) if counts else []
    rejected = [f"{r.symbol}: {r.state}" for r in rows if r.state.startswith("rejected")]
    if rejected:
        raise RuntimeError("; ".join(rejected))
    return {
        **found.result(),
        "reached": sum(r.reached for r in rows),
        "fell through": sum(sum(r.fell_through.values()) for r in rows),
    }


def apart(name: str, patched: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One run, in processes of its own."""
    keys = ("steps", "vocab", "hidden", "layers", "batch", "prompt", "response", "threads", "seed", "lr", "parallel")
    command = [sys.executable, __file__, "--measure", name, *(f"--{k}={getattr(args, k)}" for k in keys)]
    # Integers hash to the same in every process; one thread each, and nothing asks a hub.
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(args.threads),
    }  # fmt: skip
    command += ["--patched"] * patched
    found = ranks.run(command, environment, args.parallel)
    return found[0] if args.parallel == "none" else ranks.merged(found)


def missing(names: Sequence[str], has: Callable[[str], Any] = importlib.util.find_spec) -> str | None:
    """What to install before these can run, or None."""
    absent = sorted({FRAMEWORK[name] for name in names if has(FRAMEWORK[name]) is None})
    if not absent:
        return None
    return f"{' and '.join(absent)} cannot be imported; install with: pip install 'rlhf-fast[{','.join(absent)}]'"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", nargs="+", choices=list(FRAMEWORK), default=list(FRAMEWORK))
    options = {
        "steps": 20, "vocab": 32000, "hidden": 128, "layers": 2, "batch": 8, "prompt": 16, "response": 32, "threads": 1,
        "rounds": 2, "seed": 0,
    }  # fmt: skip
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-4, help="of TRL's trainers")
    parser.add_argument("--parallel", choices=list(ranks.PARALLEL), default="none", help="two ranks of TRL's trainers")
    parser.add_argument("--measure", choices=list(FRAMEWORK), help=argparse.SUPPRESS)
    parser.add_argument("--patched", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args.patched, args)))
        return 0
    for name, low, multiple in RANGES:
        value = getattr(args, name)
        if value < low or value % multiple:
            extra = f" and a multiple of {multiple}" if multiple > 1 else ""
            parser.error(f"--{name} must be at least {low}{extra}, got {value}")
    if args.parallel != "none" and "verl" in args.trainer:
        parser.error(f"--parallel {args.parallel} is for TRL's trainers, got --trainer verl")
    reason = missing(args.trainer)
    if reason:
        parser.error(reason)
    rows = []
    for name in args.trainer:
        runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for turn in range(args.rounds):
            for patched in (False, True) if turn % 2 == 0 else (True, False):
                runs[patched].append(apart(name, patched, args))
        rows.append(compared(name, runs[False], runs[True]))
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in sorted({FRAMEWORK[n] for n in args.trainer}))
    print(
        f"{versions}, torch {importlib.metadata.version('torch')}; {args.steps} steps, fp32, {args.threads} thread(s), vocabulary "
        f"{args.vocab}, {args.layers} layers of {args.hidden}, {args.batch} x ({args.prompt} + {args.response}) tokens"
        + (f" on each of {ranks.RANKS} ranks under {args.parallel}" if args.parallel != "none" else "")
        + "; without "
        f"/ with the patch, each step by the faster of {args.rounds} rounds\n"
    )
    print(table(rows))
    for row in rows:
        if not row["reached"]:
            print(f"\n{row['trainer']}: the patch replaces nothing here, so times and memory differ by chance alone")
        if not row["repeats"]:
            print(f"\n{row['trainer']}: two rounds of the same run gave other losses")
        if not agrees(row):
            print(
                f"\n{row['trainer']}: differs by more than {LIMIT:g}" + ("" if row["same data"] else ", on other data")
            )
    return 0 if all(map(agrees, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
