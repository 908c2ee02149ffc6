"""One pass for four roles against PEFT's adapter switching: `python bench/roles.py`.

The same random Llama, the same four adapters (policy, value and reward; the reference has none), the same batch. PEFT takes one
forward of the decoder per role; SharedModel stacks them. Hidden states must agree before anything is timed. Then a training step of
the policy (forward and backward of the decoder) against the same step through the frozen base alone, whose products with the
weights it cannot do without, by our op and by PyTorch's own layers. Contenders take turns; medians and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from shapes import llama
from torch import Tensor

ADAPTED = ("policy", "value", "reward")
BARS = {"one pass / PEFT": 0.75, "one pass, half the layers shared / PEFT": 0.50, "LoRA step / frozen step": 1.15}


def base(args: argparse.Namespace) -> Any:
    return llama(args.hidden, args.layers, args.vocabulary).to(args.dtype)


def shared(args: argparse.Namespace, layers: int) -> Any:
    """A SharedModel whose adapters are no longer zero."""
    from rlhf_fast.model import LoraConfig, SharedModel

    model = SharedModel(base(args), lora=LoraConfig(r=args.rank), shared_layers=layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def of_peft(args: argparse.Namespace, model: Any) -> Any:
    """The same base and adapters in PEFT."""
    import peft

    wrapped: Any = None
    for role in ADAPTED:
        with tempfile.TemporaryDirectory() as folder:
            model.save_adapter(role, folder)
            if wrapped is None:
                wrapped = peft.PeftModel.from_pretrained(base(args), folder, adapter_name=role)
            else:
                wrapped.load_adapter(folder, role)
    return wrapped.eval()


@torch.no_grad()
def switching(wrapped: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Hidden states of the four roles, one forward each."""
    decoder = wrapped.get_base_model().get_decoder()
    found = {}
    for role in ADAPTED:
        wrapped.set_adapter(role)
        found[role] = decoder(ids, attention_mask=mask).last_hidden_state
    with wrapped.disable_adapter():
        found["reference"] = decoder(ids, attention_mask=mask).last_hidden_state
    return found


@torch.no_grad()
def one_pass(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    out = model(ids, mask)
    return {role: out[role].hidden for role in model.roles}


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one call that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def check(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """Largest difference of hidden states, as a share of the largest; raises SystemExit when it is no rounding error."""
    worst = max(float((ours[r] - theirs[r]).abs().max() / theirs[r].abs().max()) for r in theirs)
    if not worst < (1e-4 if dtype is torch.float32 else 0.1):
        raise SystemExit(f"roles: hidden states differ from PEFT's by {worst:.2g} of the largest")
    return worst


def step_calls(args: argparse.Namespace, model: Any, ids: Tensor, mask: Tensor) -> dict[str, Callable[[], Any]]:
    """A training step of the policy, and the same through the frozen base: from the embeddings' output, so that nothing is cut off."""
    upstream = torch.randn(*ids.shape, args.hidden, generator=torch.Generator().manual_seed(2)).to(args.dtype)
    embeddings = model.base.get_input_embeddings()

    def trained() -> None:
        model(ids, mask, roles=("policy",)).policy.hidden.backward(upstream)
        model.zero_grad(set_to_none=True)

    def frozen(layers: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            handle = embeddings.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
            try:
                layers().backward(upstream)
            finally:
                handle.remove()

        return run

    def by_the_op() -> Tensor:
        with model.as_role("reference"):
            return model.backbone.hidden(ids, mask)

    return {
        "LoRA step": trained,
        "frozen step": frozen(by_the_op),
        "frozen step, PyTorch's layers": frozen(lambda: model.backbone.hidden(ids, mask)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--step-only", action="store_true", help="the training step alone, in a process without other models"
    )
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocabulary, (args.rows, args.length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    whole, rows = shared(args, 0), slice(0, max(1, args.rows // 4))
    if args.step_only:
        show(in_turns(step_calls(args, whole, ids[rows], mask[rows]), args.rounds))
        return
    half, plain = shared(args, args.layers // 2), base(args)
    wrapped = of_peft(args, whole)
    worst = check(one_pass(whole, ids, mask), switching(wrapped, ids, mask), args.dtype)
    print(
        f"{args.rows} x {args.length} tokens, {args.layers} layers of {args.hidden}, rank {args.rank}, {args.dtype},",
        end=" ",
    )
    print(f"{torch.get_num_threads()} threads; hidden states within {worst:.1g} of PEFT's")

    @torch.no_grad()
    def four() -> None:
        for _ in range(4):
            plain.model(ids, attention_mask=mask)

    seconds = in_turns(
        {
            "PEFT": lambda: switching(wrapped, ids, mask),
            "one pass": lambda: one_pass(whole, ids, mask),
            "one pass, half the layers shared": lambda: one_pass(half, ids, mask),
            "four forwards of the plain base": four,
        },
        args.rounds,
    )
    show(seconds | in_turns(step_calls(args, whole, ids[rows], mask[rows]), args.rounds))


def show(seconds: Mapping[str, float]) -> None:
    """Times, and the ratios there are against their bars."""
    for name, value in seconds.items():
        print(f"{name:34} {value:8.3f} s")
    for pair, bar in BARS.items():
        name, _, other = pair.partition(" / ")
        if name not in seconds:
            continue
        ratio = seconds[name] / seconds[other]
        print(f"{pair:48} {ratio:5.2f} (aim {bar:.2f}): {'met' if ratio <= bar else 'missed'}")


if __name__ == "__main__":
    main()
