"""`rlhf-fast plan` beside the peak of the run it plans: `python bench/plan.py`.

Every run is the whole command on a random Llama and random tokens, two steps with run.memory_gib in a process of its own: reading,
sampling, scoring, updates and a checkpoint. Measured is its highest resident set, libraries and mapped weights included; both
figures are also given without what the process held before its model, which is where a plan can be wrong. A second process that
samples is measured and planned beside it. `--free` runs without run.memory_gib, and shows what the C library holds beyond what lives.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shapes import llama

LIMIT = 0.1
"""How far a plan may be off the measured peak."""
RUNS: list[dict[str, Any]] = [
    {"trainer": "sft"},
    {"trainer": "sft", "checkpointing": True},
    {"trainer": "sft", "micro": 4},
    {"trainer": "sft", "shared": 0.5},
    {"trainer": "sft", "dtype": "bfloat16"},
    {"trainer": "sft", "quantize": "int8"},
    {"trainer": "sft", "quantize": "nf4"},
    {"trainer": "reward", "checkpointing": True},
    {"trainer": "reward", "micro": 4, "dtype": "bfloat16"},
    {"trainer": "dpo"},
    {"trainer": "dpo", "shared": 0.5, "checkpointing": True},
    {"trainer": "grpo"},
    {"trainer": "grpo", "shared": 0.5, "micro": 4},
    {"trainer": "grpo", "dtype": "bfloat16", "checkpointing": True},
    {"trainer": "ppo"},
    {"trainer": "ppo", "shared": 0.5},
    {"trainer": "ppo", "micro": 4, "checkpointing": True},
    {"trainer": "ppo", "dtype": "bfloat16"},
    {"trainer": "ppo", "steps": True},
    {"trainer": "ppo", "engine": "process"},
    {"trainer": "ppo", "engine": "process", "dtype": "bfloat16"},
    {"trainer": "grpo", "remax": True},
    {"trainer": "grpo", "remax": True, "engine": "process", "micro": 4, "checkpointing": True},
    {"trainer": "kto"},
    {"trainer": "kto", "micro": 3, "checkpointing": True},
    {"trainer": "online-dpo", "micro": 2},
    {"trainer": "online-dpo", "micro": 4, "shared": 0.5},
    {"trainer": "raft"},
    {"trainer": "raft", "micro": 2, "dtype": "bfloat16"},
]
ONLINE = ("ppo", "grpo", "online-dpo", "raft")
GROUP = 4
"""Completions of each prompt."""


def saved(folder: Path, args: argparse.Namespace) -> str:
    """A model folder with a tokenizer of one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    llama(args.hidden, args.layers, args.vocabulary).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, args.vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def data(path: Path, args: argparse.Namespace, trainer: str) -> str:
    """Two batches of records whose tokens fill the lengths."""
    import random

    draw = random.Random(0)
    words = lambda n: " ".join(f"w{draw.randrange(2, args.vocabulary)}" for _ in range(n))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(2 * args.batch):
            prompt = {"prompt": words(args.prompt)}
            answers = {name: " " + words(args.response - 1) for name in ("chosen", "rejected")}
            text = {"text": words(args.prompt + args.response - 1)}
            label = prompt | {"completion": answers["chosen"], "label": draw.random() < 0.5}
            row = {"sft": text, "kto": label}.get(trainer, prompt if trainer in ONLINE else prompt | answers)
            file.write(json.dumps(row) + "\n")
    return str(path)


def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Hardly any two score the same."""
    return [float(len(c) % 7) + len(c) / 1e3 for c in completions]


def highest(pid: int | str) -> int:
    """Highest resident set of a process, in bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measured(run: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """MiB: what the process holds when its model is about to be read, its highest resident set, and the plan's of both; the highest
    resident set of the process that samples, and the plan's, where there is one."""
    import torch

    import rlhf_fast.config as c
    import rlhf_fast.train.loop as loop
    from rlhf_fast._allocator import resident_bytes
    from rlhf_fast.plan import plan
    from rlhf_fast.rollout.process import ProcessEngine
    from rlhf_fast.train.group import train_group
    from rlhf_fast.train.kto import train_kto
    from rlhf_fast.train.online_dpo import train_online_dpo
    from rlhf_fast.train.ppo import train_ppo
    from rlhf_fast.train.preference import train_preference
    from rlhf_fast.train.raft import train_raft
    from rlhf_fast.train.reward import train_reward
    from rlhf_fast.train.sft import train_sft

    folder, work, trainer, micro = args.folder, Path(args.work), run["trainer"], run.get("micro", args.batch)
    shared = int(run.get("shared", 0) * args.layers)
    lora = c.LoraConfig(r=16)
    model = c.ModelConfig(
        folder, run.get("dtype", "float32"), shared, lora, run.get("checkpointing", False), run.get("quantize", "none")
    )
    settings = c.RunConfig(str(work / "out"), threads=1, save_every=1, memory_gib=None if args.free else 64.0)
    path = data(work / "data.jsonl", args, trainer)
    engine, remax = run.get("engine", "local"), run.get("remax", False)
    rollout = c.RolloutConfig(
        args.batch, args.response, stop_at_eos=False, engine=engine, process=c.ProcessConfig(threads=1)
    )
    offline = {"batch_size": args.batch, "micro_batch_size": micro, "max_steps": 2}
    online = {"data": c.PromptDataConfig(path), "rollout": rollout, "steps": 2}
    update = {"minibatch_size": args.batch, "micro_batch_size": micro}
    pairs = c.PairDataConfig(path)
    held: list[int] = []
    sampler: list[int] = []
    read, close = loop.SharedModel.from_pretrained, ProcessEngine.close

    def reading(*a: Any, **k: Any) -> Any:
        held.append(resident_bytes())
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident set begins anew
        return read(*a, **k)

    def closing(engine: Any) -> None:
        sampler.append(highest(engine._worker.process.pid))
        close(engine)

    told = plan(
        c.PlanConfig(
            folder, trainer=trainer, dtype=model.dtype, quantize=model.quantize, lora=lora, shared_layers=shared,
            gradient_checkpointing=model.gradient_checkpointing, batch_size=args.batch, micro_batch_size=micro,
            group_size=GROUP, greedy=remax, engine=engine,
            prompt_tokens=args.prompt if trainer != "sft" else 1,
            response_tokens=args.response if trainer != "sft" else args.prompt + args.response - 1,
        )
    )  # fmt: skip
    if trainer == "ppo":
        made = loop.SharedModel.from_pretrained(folder, ("reward",), lora, shared)
        made.save_adapter("reward", work / "reward")
        del made
    loop.SharedModel.from_pretrained = reading  # type: ignore[method-assign]
    ProcessEngine.close = closing  # type: ignore[method-assign]
    scores = c.RewardSource(f"{__file__}:score", workers=0)
    grouped = {"run": settings, "reward": scores, "group_size": GROUP}
    if trainer == "sft":
        train_sft(c.SFTConfig(model, c.DataConfig(path), settings, **offline))
    elif trainer == "reward":
        train_reward(c.RewardConfig(model, pairs, settings, **offline))
    elif trainer == "dpo":
        train_preference(c.PreferenceConfig(model, pairs, settings, **offline))
    elif trainer == "kto":
        train_kto(c.KTOConfig(model, c.LabelDataConfig(path), settings, **offline))
    elif trainer == "grpo":
        group = c.GroupUpdateConfig("remax" if remax else "grpo", **update)
        train_group(c.GroupConfig(model, kl=c.GroupKLConfig(coef=0.05), group=group, **grouped, **online))
    elif trainer == "online-dpo":
        dpo = c.OnlineDPOUpdateConfig(micro_batch_size=micro)
        train_online_dpo(c.OnlineDPOConfig(model, dpo=dpo, **grouped, **online))
    elif trainer == "raft":
        best = c.RaftUpdateConfig(best=GROUP, micro_batch_size=micro)
        train_raft(c.RaftConfig(model, raft=best, **grouped, **online))
    else:
        source = c.RewardSource(str(work / "reward"), separator=" " if run.get("steps") else None)
        ppo = c.PPOUpdateConfig(epochs=1, **update)
        train_ppo(c.PPOConfig(model, run=settings, reward=source, ppo=ppo, **online))
    before = told.always.pop("process before the model")
    found = {"held": held[-1], "peak": highest("self"), "plan": told.peak + held[-1], "told": before}
    if told.sampler is not None:
        found |= {"sampler peak": sampler[-1], "sampler plan": told.sampler.peak}
    phase = max(told.phases, key=lambda name: told.phases[name])
    return {name: x / 2**20 for name, x in found.items()} | {"phase": phase, "isa": torch.get_num_threads()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    options = {"batch": 16, "prompt": 32, "response": 96, "layers": 12, "hidden": 384, "vocabulary": 16384}
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--free", action="store_true", help="without run.memory_gib")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print("\n" + json.dumps(measured(args.run, args)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        saved(Path(folder), args)
        print(f"{'MiB':<44}{'plan':>8}{'measured':>10}{'ratio':>7}{'net of the process':>27}", flush=True)
        for run in RUNS if args.only is None else [RUNS[i] for i in args.only]:
            if "quantize" in run and importlib.util.find_spec("bitsandbytes") is None:
                continue
            with tempfile.TemporaryDirectory() as work:
                command = [sys.executable, __file__, *sys.argv[1:], "--run", json.dumps(run)]
                done = subprocess.run([*command, "--folder", folder, "--work", work], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({**run, **found, "ratio": found["plan"] / found["peak"]})
            net = found["plan"] - found["held"], found["peak"] - found["held"]
            name = " ".join(str(x) if k in ("trainer", "dtype") else f"{k}={x}" for k, x in run.items())
            outcome = "met" if abs(rows[-1]["ratio"] - 1) <= LIMIT else "missed"
            print(
                f"{name:<44}{found['plan']:>8.0f}{found['peak']:>10.0f}{rows[-1]['ratio']:>7.2f} {outcome:<7}"
                f"{net[0]:>6.0f} /{net[1]:>6.0f} ={net[0] / net[1]:>5.2f}  {found['phase']}",
                flush=True,
            )
            if "sampler peak" in found:
                ratio = found["sampler plan"] / found["sampler peak"]
                outcome = "met" if abs(ratio - 1) <= LIMIT else "missed"
                sizes = f"{found['sampler plan']:>8.0f}{found['sampler peak']:>10.0f}{ratio:>7.2f}"
                print(f"{'  the process that samples':<44}{sizes} {outcome}", flush=True)
    if args.json:
        print(json.dumps({"rows": rows, "limit": LIMIT}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
