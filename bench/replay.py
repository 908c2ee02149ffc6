"""Whether ours and TRL's GRPO learn the same from the same completions: `python bench/replay.py` (pip install trl peft).

TRL's GRPOTrainer trains a small random Llama of few words, as in `bench/curves.py`. Then `rlhf-fast grpo` starts from TRL's first
adapter and is given TRL's completions batch by batch: scores, advantages, gradients and optimizer steps are its own. After every step the
distance of the two adapters is printed, and how far TRL's has come. Curves of seeds differ by what was sampled; this does not. Last, the
policy that TRL has come to is sampled by ours and by Hugging Face's `generate`: means of the reward, with their standard errors.

Adam's first step is as large where a gradient is rounding error as where it is not, so the two part there and stay about as far apart.
TRL adds 1e-4 to the deviation of a group, ours 1e-6.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import steps
import torch
from torch import Tensor

TRAINED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def trained_by_trl(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """(the batches of its steps, its adapter before each of them)."""
    import trl

    batches: list[dict[str, Tensor]] = []
    adapters: list[dict[str, Tensor]] = []
    known = trl.GRPOTrainer

    class Recorded(known):  # type: ignore[misc, valid-type]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            adapters.append(
                {
                    name.replace("base_model.model.", "").replace(".default", ""): parameter.detach().clone()
                    for name, parameter in self.model.named_parameters()
                    if parameter.requires_grad
                }
            )
            found = super()._generate_and_score_completions(inputs)
            batches.append({name: found[name].clone() for name in TRAINED})
            return found

    trl.GRPOTrainer = Recorded
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the log of every step
            steps.grpo_trl(args, folder)
    finally:
        trl.GRPOTrainer = known
    return batches, adapters


def norm(x: dict[str, Tensor]) -> float:
    return float(sum(v.double().pow(2).sum() for v in x.values())) ** 0.5


def replayed(
    args: argparse.Namespace, folder: Path, batches: list[dict[str, Tensor]], adapters: list[dict[str, Tensor]]
) -> None:
    """Train on the batches, and print how far the adapters are from each other before each of them but the first."""
    from rlhf_fast.rollout import Rollout
    from rlhf_fast.train import group

    done = 0

    class Replayed(group.Trainer):
        def rollout(self, prompts: list[list[int]], generator: torch.Generator) -> Rollout:
            nonlocal done
            ours, theirs, start = self.model.parameters_of("policy"), adapters[done], adapters[0]
            if done == 0:
                with torch.no_grad():
                    for name, parameter in ours.items():
                        parameter.copy_(start[name])
            else:
                apart = norm({name: parameter.detach() - theirs[name] for name, parameter in ours.items()})
                way = norm({name: value - start[name] for name, value in theirs.items()})
                print(f"after {done:2} steps: {apart:.4f} apart, {way:.3f} from the start, {apart / way:.2%}")
            batch = batches[done]
            done += 1
            ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
            real = batch["completion_mask"].bool()
            last = batch["completion_ids"].gather(1, real.sum(1, keepdim=True) - 1).squeeze(1)
            return Rollout(ids, mask.bool(), real, last == self.tokenizer.eos_token_id)

    known = group.Trainer
    group.Trainer = Replayed  # type: ignore[misc]
    try:
        steps.grpo_ours(args, folder)
    finally:
        group.Trainer = known  # type: ignore[misc]


@torch.no_grad()
def sampled(args: argparse.Namespace, folder: Path, adapter: dict[str, Tensor]) -> None:
    """Print the reward of the policy with this adapter, by our rollouts and by `generate`."""
    import peft
    from transformers import AutoModelForCausalLM

    from rlhf_fast.model import LoraConfig, SharedModel
    from rlhf_fast.rollout import generate

    tokenizer = steps.tokenizer_of(steps.SIZES[args.size]["vocabulary"])
    ours = SharedModel.from_pretrained(str(folder / "model"), ("policy",), LoraConfig(r=16, alpha=32.0))
    for name, parameter in ours.parameters_of("policy").items():
        parameter.copy_(adapter[name])
    ours.save_adapter("policy", folder / "sampled")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    theirs: Any = peft.PeftModel.from_pretrained(base, folder / "sampled").eval()
    texts, generator = steps.prompts(args, args.completions), torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)

    def by_ours(ids: Tensor, mask: Tensor) -> list[str]:
        found = generate(ours, ids, mask.bool(), max_new_tokens=args.response, eos_token_id=1, generator=generator)
        return found.texts(tokenizer)

    def by_generate(ids: Tensor, mask: Tensor) -> list[str]:
        found = theirs.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=args.response, top_k=0, top_p=1.0,
            pad_token_id=0, eos_token_id=1,
        )[:, ids.shape[1] :]  # fmt: skip
        return tokenizer.batch_decode(found, skip_special_tokens=True)

    def rewards(sample: Any) -> Iterator[float]:
        for i in range(0, len(texts), 128):
            batch = tokenizer(texts[i : i + 128], return_tensors="pt")
            yield from steps.reward([], sample(batch.input_ids, batch.attention_mask))

    for name, sample in (("ours", by_ours), ("generate", by_generate)):
        found = [*rewards(sample)]
        error = statistics.stdev(found) / len(found) ** 0.5
        print(f"{len(found)} completions by {name}: reward {statistics.fmean(found):.4f} +- {error:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--response", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--completions", type=int, default=4096)
    args = parser.parse_args()
    args.steps -= 1  # both run one more, which warms up where steps are timed
    args.size, args.dtype = steps.FEW_WORDS, "float32"
    with tempfile.TemporaryDirectory() as folder:
        steps.save(args, Path(folder))
        batches, adapters = trained_by_trl(args, Path(folder))
        replayed(args, Path(folder), batches, adapters)
        sampled(args, Path(folder), adapters[-1])


if __name__ == "__main__":
    main()
