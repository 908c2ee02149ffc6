"""Whole training steps against the same steps made of other parts: `python bench/steps.py grpo ppo packing`.

grpo: `rlhf-fast grpo` against TRL's GRPOTrainer with PEFT (pip install trl peft), same random Llama, prompts, reward and settings.
ppo: `rlhf-fast ppo` against the step that one would put together from Hugging Face `generate`, PEFT adapters and eager PyTorch
losses. packing: scoring and updates of PPO packed and padded, on completions of mixed lengths.

Every run is a process of its own, so that the highest resident set is that of one of them; contenders take turns. The first step of a
run warms up and is not timed. Mean rewards of the first and of the last two steps are printed; --steps says how many there are: by
itself 5 at 17M and 2 at 135M, where a step of the others takes half a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from shapes import llama
from torch import Tensor

FEW_WORDS = "17M-128"
"""The layers of 17M with so few words that a batch shows each several times, or some dozens of steps would teach nothing."""
SIZES = {
    "17M": {"hidden": 384, "layers": 8, "vocabulary": 8192},
    FEW_WORDS: {"hidden": 384, "layers": 8, "vocabulary": 128},
    "135M": {"hidden": 576, "layers": 30, "vocabulary": 49152},
}
BARS = {
    ("grpo", "17M"): 2.5,
    ("grpo", "135M"): 1.5,
    ("ppo", "135M"): 2.0,
    ("packing", "17M"): 1.3,
    ("packing", "135M"): 1.3,
}
MEMORY_BAR = 0.7
PROMPT_TOKENS = 8
STEPS = {"17M": 5, FEW_WORDS: 5, "135M": 2}


def tokenizer_of(words: int) -> Any:
    """A word is a token: w3, w4, ... behind padding, end and unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {w: i for i, w in enumerate([*special, *(f"w{i}" for i in range(len(special), words))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def prompts(args: argparse.Namespace, count: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SIZES[args.size]["vocabulary"], (count, PROMPT_TOKENS), generator=generator)
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def reward(prompts: list[str], completions: list[str]) -> list[float]:
    """Share of words with an even number."""
    return [sum(w[-1] in "02468" for w in c.split()) / max(1, len(c.split())) for c in completions]


def save(args: argparse.Namespace, folder: Path) -> None:
    llama(**SIZES[args.size], pad_token_id=0, eos_token_id=1, bos_token_id=None).to(
        getattr(torch, args.dtype)
    ).save_pretrained(folder / "model")
    tokenizer_of(SIZES[args.size]["vocabulary"]).save_pretrained(folder / "model")
    lines = (json.dumps({"prompt": p}) for p in prompts(args, 4096))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


class Clock:
    """Seconds between calls, and the mean reward of what it is shown."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self.rewards: list[float] = []

    def __call__(self, completions: list[str]) -> dict[str, float]:
        self.times.append(time.perf_counter())
        self.rewards.append(statistics.fmean(reward([], completions)))
        return {}

    def result(self) -> dict[str, Any]:
        seconds = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return {"seconds": seconds[1:], "rewards": self.rewards}


def settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the settings of both of our trainers share."""
    from rlhf_fast.config import ModelConfig, OptimConfig, PromptDataConfig, RewardSource, RolloutConfig, RunConfig
    from rlhf_fast.model import LoraConfig

    return {
        "model": ModelConfig(str(folder / "model"), dtype=args.dtype, lora=LoraConfig(r=16, alpha=32.0)),
        "data": PromptDataConfig(str(folder / "prompts.jsonl")),
        "run": RunConfig(str(folder / "run"), save_every=0, sample_every=0, seed=args.seed),
        "reward": RewardSource(source=f"{__file__}:reward"),
        "optim": OptimConfig(lr=args.lr, betas=(0.9, 0.999), eps=1e-8, schedule="constant"),
        "rollout": RolloutConfig(batch_size=args.batch, max_new_tokens=args.response),
        "steps": args.steps + 1,
    }


def grpo_ours(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from rlhf_fast.config import GroupConfig, GroupUpdateConfig
    from rlhf_fast.train.group import train_group

    clock = Clock()
    update = GroupUpdateConfig(minibatch_size=args.batch, micro_batch_size=args.micro)
    train_group(GroupConfig(group_size=8, group=update, **settings(args, folder)), observe=clock)
    return clock.result()


def grpo_trl(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock()
    shown: list[str] = []

    def scored(completions: list[str], **_: Any) -> list[float | None]:
        shown[:] = completions
        return [*reward([], completions)]

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock(shown)

    options = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=args.batch // args.micro, num_generations=8, max_completion_length=args.response,
        max_steps=args.steps + 1, learning_rate=args.lr, lr_scheduler_type="constant", beta=0.0, loss_type="grpo", use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False, gradient_checkpointing=False,
        model_init_kwargs={"dtype": args.dtype}, seed=args.seed,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=scored,
        args=options,
        train_dataset=Dataset.from_dict({"prompt": prompts(args, 4096)}),
        processing_class=tokenizer_of(SIZES[args.size]["vocabulary"]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Steps()],
    )
    trainer.train()
    return clock.result()


def ppo_ours(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from rlhf_fast.config import PPOConfig
    from rlhf_fast.train.ppo import train_ppo

    clock = Clock()
    train_ppo(PPOConfig(ppo=ppo_update(args), packing=args.packed, **settings(args, folder)), observe=clock)
    return clock.result()


def ppo_update(args: argparse.Namespace) -> Any:
    from rlhf_fast.config import PPOUpdateConfig

    return PPOUpdateConfig(epochs=args.epochs, minibatch_size=args.batch // 2, micro_batch_size=args.micro)


def ppo_assembled(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Hugging Face's generate, PEFT's adapters and eager losses, as the tutorials have them; logits whole, like everywhere there."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def adapter() -> Any:
        return peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, args.dtype))
    model: Any = peft.get_peft_model(base, adapter(), adapter_name="policy")
    model.add_adapter("value", adapter())
    head = torch.nn.Linear(base.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    roles: dict[str, list[Any]] = {}
    for role in ("policy", "value"):
        model.set_adapter(role)
        roles[role] = [p for n, p in model.named_parameters() if f".{role}." in n]
    trained = [*roles["policy"], *roles["value"], *head.parameters()]
    for p in trained:
        p.requires_grad_()
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    texts, clock, P = prompts(args, 4096), Clock(), PROMPT_TOKENS

    def logprobs_of(ids: Tensor, attention: Tensor) -> Tensor:
        logits = model(ids, attention_mask=attention).logits[:, P - 1 : -1]
        return logits.float().log_softmax(-1).gather(-1, ids[:, P:, None]).squeeze(-1)

    def values_of(ids: Tensor, attention: Tensor) -> Tensor:
        model.set_adapter("value")
        hidden = model.get_base_model().get_decoder()(ids, attention_mask=attention).last_hidden_state
        return head(hidden[:, P - 1 : -1].float()).squeeze(-1)

    for step in range(args.steps + 1):
        batch = tokenizer(texts[step * args.batch : (step + 1) * args.batch], return_tensors="pt", padding=True)
        model.eval()
        model.set_adapter("policy")
        with torch.no_grad():
            ids = model.generate(
                **batch,
                do_sample=True,
                max_new_tokens=args.response,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                eos_token_id=1,
            )
            ended = (ids[:, P:] == 1).cumsum(1)
            mask = (ended - (ids[:, P:] == 1).long()) == 0
            attention = torch.cat([torch.ones_like(ids[:, :P]), mask.long()], dim=1)
            completions = tokenizer.batch_decode(ids[:, P:], skip_special_tokens=True)
            parts = [slice(i, i + args.micro) for i in range(0, args.batch, args.micro)]
            old = torch.cat([logprobs_of(ids[p], attention[p]) for p in parts])
            with model.disable_adapter():
                ref = torch.cat([logprobs_of(ids[p], attention[p]) for p in parts])
            values = torch.cat([values_of(ids[p], attention[p]) for p in parts]) * mask
            rewards = -0.05 * (old - ref) * mask
            last = mask.sum(1) - 1
            rewards[torch.arange(len(ids)), last] += torch.tensor(reward([], completions))
            advantages, carry = torch.zeros_like(values), torch.zeros(len(ids))
            for t in reversed(range(values.shape[1])):
                following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros(len(ids))
                carry = (rewards[:, t] + following - values[:, t] + 0.95 * carry) * mask[:, t]
                advantages[:, t] = carry
            returns = advantages + values
            real = advantages[mask]
            advantages = (advantages - real.mean()) / (real.std() + 1e-8) * mask
        for _ in range(args.epochs):
            for minibatch in torch.randperm(args.batch).split(args.batch // 2):
                tokens = mask[minibatch].sum()
                for rows in minibatch.split(args.micro):
                    model.set_adapter("policy")
                    for p in trained:
                        p.requires_grad_()
                    ratio = (logprobs_of(ids[rows], attention[rows]) - old[rows]).exp()
                    clipped = torch.minimum(ratio * advantages[rows], ratio.clamp(0.8, 1.2) * advantages[rows])
                    (-(clipped * mask[rows]).sum() / tokens).backward()
                    new = values_of(ids[rows], attention[rows])
                    for p in trained:
                        p.requires_grad_()
                    near = values[rows] + (new - values[rows]).clamp(-0.2, 0.2)
                    squares = torch.maximum((new - returns[rows]) ** 2, (near - returns[rows]) ** 2)
                    (0.1 * 0.5 * (squares * mask[rows]).sum() / tokens).backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        clock(completions)
    return clock.result()


def packing_of(packed: bool) -> Callable[[argparse.Namespace, Path], dict[str, Any]]:
    """Scoring and update of a batch whose completions are as long as those of the demonstration: half of them end before the half."""

    def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
        from rlhf_fast.config import PPOConfig
        from rlhf_fast.model import SharedModel
        from rlhf_fast.rollout import Rollout
        from rlhf_fast.train.ppo import Trainer
        from rlhf_fast.train.rewards import Rewards

        config = PPOConfig(ppo=ppo_update(args), packing=packed, **settings(args, folder))
        model = SharedModel.from_pretrained(
            config.model.path, ("policy", "reference", "value"), config.model.lora, dtype=getattr(torch, args.dtype)
        )
        generator = torch.Generator().manual_seed(3)
        P, R = 24, 4 * args.response
        ids = torch.randint(3, SIZES[args.size]["vocabulary"], (args.batch, P + R), generator=generator)
        prompt_lengths = torch.randint(6, P + 1, (args.batch,), generator=generator)
        lengths = (R * torch.rand(args.batch, generator=generator) ** 1.5).long().clamp(2, R)
        lengths[0] = R
        mask = torch.cat([torch.arange(P) >= P - prompt_lengths[:, None], torch.arange(R) < lengths[:, None]], dim=1)
        rollout = Rollout(ids.where(mask, 0), mask, mask[:, P:], lengths < R)

        parameters = [*model.parameters_of("policy").values(), *model.parameters_of("value").values()]
        optimizer = torch.optim.AdamW(parameters, lr=args.lr)

        class Updates:
            def update(self, loss: float) -> float:
                optimizer.step()
                optimizer.zero_grad()
                return 0.0

        clock = Clock()
        with Rewards(config.reward) as rewards:
            trainer = Trainer(config, model, tokenizer_of(SIZES[args.size]["vocabulary"]), rewards)
            for step in range(args.steps + 1):
                experience = trainer.score(rollout)
                trainer.update(Updates(), experience, torch.Generator().manual_seed(step))  # type: ignore[arg-type]
                clock(["w1"])
        return {**clock.result(), "real": float(mask.float().mean())}

    return run


CONTENDERS: dict[str, dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]]] = {
    "grpo": {"ours": grpo_ours, "TRL": grpo_trl},
    "ppo": {"ours": ppo_ours, "generate + PEFT + eager": ppo_assembled},
    "packing": {"packed": packing_of(True), "padded": packing_of(False)},
}


def child(args: argparse.Namespace, what: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(args, Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = CONTENDERS[what][name](args, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("RESULT " + json.dumps({**result, "peak": peak / 1024, "before": before / 1024}))


def run(arguments: Sequence[str], what: str, name: str, threads: int | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments, "--child", what, name]
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{what}, {name}: {done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"among {', '.join(CONTENDERS)}; all when left out")
    parser.add_argument("--size", default="17M", choices=SIZES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--response", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="timed steps of a run, behind one that warms up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--padded", dest="packed", action="store_false", default=None, help="ppo: our side with padding"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        if args.steps is None:
            args.steps = STEPS[args.size]
        child(args, *args.child)
        return
    passed = [a for a in sys.argv[1:] if a not in CONTENDERS]
    print(
        f"{args.size} Llama, {args.dtype}, {args.batch} completions of up to {args.response} tokens, {torch.get_num_threads()} threads"
    )
    for what in args.what or CONTENDERS:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS[what]}
        for _ in range(args.rounds):
            for name, results in found.items():
                results.append(run(passed, what, name))
        seconds = {n: statistics.median(s for r in results for s in r["seconds"]) for n, results in found.items()}
        peaks = {n: min(r["peak"] for r in results) for n, results in found.items()}
        for name, results in found.items():
            curve = results[0]["rewards"]
            learned = (
                f", reward {statistics.fmean(curve[:2]):.3f} to {statistics.fmean(curve[-2:]):.3f}"
                if what != "packing"
                else ""
            )
            print(f"{what:8} {name:24} {seconds[name]:7.2f} s a step, peak {peaks[name]:6.0f} MiB{learned}")
        ours, other = found
        ratio, bar = seconds[other] / seconds[ours], BARS.get((what, args.size))
        verdict = "" if bar is None else f" (aim {bar}): {'met' if ratio >= bar else 'missed'}"
        share = f"{found[ours][0]['real']:.0%} of the slots real; " if what == "packing" else ""
        memory = peaks[ours] / peaks[other]
        of_memory = f" (aim {MEMORY_BAR}): {'met' if memory <= MEMORY_BAR else 'missed'}" if what == "grpo" else ""
        print(f"{what:8} {share}{other} / {ours}: {ratio:.2f} x{verdict}; memory {memory:.2f}{of_memory}")


if __name__ == "__main__":
    main()
