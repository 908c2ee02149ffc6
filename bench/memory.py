"""Peak memory of one training step in three layouts, each in a process of its own: `python bench/memory.py`.

sft: LoRA step of one role. ppo: scoring and update with four roles on one base. classic: policy, reference, value and reward as
four whole models, policy and value trained in full with AdamW. Same random model, same batch, fp32 on the CPU. The figure is
the highest resident set of the process minus what it held after the imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

from shapes import llama

SETTINGS = {
    "20 of 30 layers shared": ["--shared-layers", "20"],
    "gradient checkpointing": ["--gradient-checkpointing"],
    "neither": [],
}
"""Of the two shared layouts; all are measured unless one is chosen."""
LIMITS = {"ppo / sft": 1.6, "ppo / classic": 0.45}


def resident() -> float:
    """Highest resident set so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def batch(args: argparse.Namespace) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, args.vocabulary, (args.batch, args.prompt), generator=generator)


def shared(args: argparse.Namespace, roles: tuple[str, ...]) -> Any:
    from rlhf_fast.model import LoraConfig, SharedModel

    return SharedModel(
        llama(args.hidden, args.layers, args.vocabulary),
        roles=roles,
        lora=LoraConfig(r=16),
        shared_layers=args.shared_layers,
        gradient_checkpointing=args.gradient_checkpointing,
    )


def step_sft(args: argparse.Namespace) -> float:
    """One SFT step on prompt + response tokens."""
    import torch

    from rlhf_fast.batch import Batch
    from rlhf_fast.train.sft import sft_loss

    model = shared(args, ("policy",))
    optimizer = torch.optim.AdamW(model.parameters_of("policy").values())
    before = resident()
    ids = torch.randint(0, args.vocabulary, (args.batch, args.prompt + args.response))
    real = torch.ones_like(ids, dtype=torch.bool)
    target = real.clone()
    target[:, 0] = False
    sft_loss(model, Batch(ids, real, target), int(target.sum())).backward()
    optimizer.step()
    return before


def step_ppo(args: argparse.Namespace) -> float:
    """Scoring of one rollout batch by four roles, then one update on all of it."""
    import torch

    from rlhf_fast.config import (
        ModelConfig,
        PPOConfig,
        PPOUpdateConfig,
        PromptDataConfig,
        RewardSource,
        RolloutConfig,
        RunConfig,
    )
    from rlhf_fast.rollout import Rollout
    from rlhf_fast.train.ppo import Trainer
    from rlhf_fast.train.rewards import Rewards

    model = shared(args, ("policy", "reference", "value", "reward"))
    trained = [p for role in ("policy", "value") for p in model.parameters_of(role).values()]
    optimizer = torch.optim.AdamW(trained)
    before = resident()
    config = PPOConfig(
        model=ModelConfig("unused"),
        data=PromptDataConfig("unused"),
        run=RunConfig("unused"),
        reward=RewardSource(source="unused"),
        rollout=RolloutConfig(batch_size=args.batch, max_new_tokens=args.response),
        ppo=PPOUpdateConfig(epochs=1, minibatch_size=args.batch, micro_batch_size=args.batch),
    )

    class Texts:
        """The texts play no part in the reward role's score."""

        eos_token_id = None

        def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
            return [""] * len(rows)

    class Steps:
        def update(self, loss: float) -> float:
            optimizer.step()
            optimizer.zero_grad()
            return 0.0

    trainer = Trainer(config, model, Texts(), Rewards(config.reward))
    ids = torch.cat([batch(args), torch.randint(0, args.vocabulary, (args.batch, args.response))], dim=1)
    real = torch.ones_like(ids, dtype=torch.bool)
    rollout = Rollout(ids, real, real[:, args.prompt :], torch.zeros(args.batch, dtype=torch.bool))
    trainer.update(Steps(), trainer.score(rollout), torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return before


def step_classic(args: argparse.Namespace) -> float:
    """The usual four models and plain PyTorch losses, policy and value with AdamW over every weight."""
    import torch
    from torch.nn.functional import log_softmax

    policy, reference, value, reward = (llama(args.hidden, args.layers, args.vocabulary) for _ in range(4))
    heads = [torch.nn.Linear(args.hidden, 1) for _ in range(2)]
    optimizer = torch.optim.AdamW([*policy.parameters(), *value.parameters(), *heads[0].parameters()])
    before = resident()
    ids = torch.cat([batch(args), torch.randint(0, args.vocabulary, (args.batch, args.response))], dim=1)
    responses, first = ids[:, args.prompt :], args.prompt - 1

    def logprobs(model: Any) -> Any:
        logits = model(ids, logits_to_keep=args.response + 1).logits[:, :-1]
        return log_softmax(logits, -1).gather(-1, responses[..., None]).squeeze(-1)

    def hidden(model: Any) -> Any:
        return model.model(ids).last_hidden_state

    with torch.no_grad():
        old, ref = logprobs(policy), logprobs(reference)
        scores = heads[1](hidden(reward))[:, -1, 0]
        returns = scores[:, None] - 0.05 * (old - ref)
    ratio = (logprobs(policy) - old).exp()
    (-(ratio * returns).mean()).backward()
    values = heads[0](hidden(value))[:, first:-1, 0]
    (0.1 * (values - returns).square().mean()).backward()
    optimizer.step()
    return before


def measure(layout: str, args: argparse.Namespace) -> dict[str, float]:
    """MiB of one layout: after the imports, once the models stand, and at the peak of the step."""
    import torch

    import rlhf_fast.model
    import rlhf_fast.train.ppo
    import rlhf_fast.train.sft  # noqa: F401

    torch.manual_seed(0)
    imports = resident()
    built = {"sft": step_sft, "ppo": step_ppo, "classic": step_classic}[layout](args)
    return {"imports": imports, "models": built - imports, "peak": resident() - imports}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    options = {
        "batch": 16, "prompt": 32, "response": 96, "layers": 30, "hidden": 576, "vocabulary": 49152, "shared-layers": 0,
    }  # fmt: skip
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layout", choices=["sft", "ppo", "classic"])
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of the two shared layouts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.layout:
        print(json.dumps(measure(args.layout, args)))
        return 0
    chosen = args.shared_layers or args.gradient_checkpointing or "--shared-layers" in sys.argv
    settings = {"as chosen": []} if chosen else SETTINGS
    classic = peak("classic", [])
    table: list[dict[str, Any]] = []
    for name, extra in settings.items():
        sft, ppo = peak("sft", extra), peak("ppo", extra)
        ratios = {"ppo / sft": ppo / sft, "ppo / classic": ppo / classic}
        table.append({"setting": name, "sft": sft, "ppo": ppo, "classic": classic, "ratios": ratios})
    if args.json:
        print(json.dumps({"rows": table, "limits": LIMITS}))
        return 0
    print(
        f"batch {args.batch} x ({args.prompt} + {args.response}) tokens, {args.layers} layers of {args.hidden}, fp32; MiB"
    )
    limits = "".join(f"{f'{name} (limit {limit:g})':>28}" for name, limit in LIMITS.items())
    print(f"{'setting':<28}{'sft':>8}{'ppo':>8}{'classic':>9}{limits}")
    for row in table:
        columns = "".join(
            f"{row['ratios'][k]:>21.2f} {'met' if row['ratios'][k] <= v else 'missed':<6}" for k, v in LIMITS.items()
        )
        print(f"{row['setting']:<28}{row['sft']:>8.0f}{row['ppo']:>8.0f}{row['classic']:>9.0f}{columns}")
    return 0


def peak(layout: str, extra: list[str]) -> float:
    """MiB at the peak of a layout, in a process of its own with this one's arguments and `extra`."""
    command = [sys.executable, __file__, *sys.argv[1:], *extra, "--layout", layout]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


if __name__ == "__main__":
    sys.exit(main())
