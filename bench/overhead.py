"""Cost of calling each op on 8 elements, where the kernel itself takes nothing: `python bench/overhead.py`.

Microseconds per call, the smallest of many short repeats, without gradient and with it (forward only), against a limit. The
pure cost of allocating one output stands first, as the machine's floor. The ops on hidden states are compositions around PyTorch's
matrix product and have no limit here.
"""

from __future__ import annotations

import json
import sys
import timeit
from collections.abc import Callable

import torch

import rlhf_fast

LIMIT = 15.0
COMPOSED = ("linear_token_logprobs", "linear_ppo_loss")
FLOOR = "(torch.empty_like)"


def calls() -> dict[str, Callable[[bool], Callable[[], object]]]:
    """{op: function of requires_grad that returns the call to time}."""
    mask = torch.ones(2, 4, dtype=torch.bool)
    ids = torch.zeros(4, dtype=torch.int64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])

    def x(grad: bool, *shape: int) -> torch.Tensor:
        return torch.randn(*(shape or (2, 4))).requires_grad_(grad)

    def bind(function: Callable[..., object], *tensors: object, **options: object) -> Callable[[], object]:
        return lambda: function(*tensors, **options)

    old, adv = torch.randn(2, 4), torch.randn(2, 4)
    return {
        "token_logprobs": lambda g: bind(rlhf_fast.token_logprobs, x(g, 4, 2), ids),
        "linear_token_logprobs": lambda g: bind(rlhf_fast.linear_token_logprobs, x(g, 4, 2), torch.randn(3, 2), ids),
        "linear_ppo_loss": lambda g: bind(
            rlhf_fast.linear_ppo_loss, x(g, 2, 4, 2), torch.randn(3, 2), ids.expand(2, 4), old, adv, mask
        ),
        "kl_estimate": lambda g: bind(rlhf_fast.kl_estimate, x(g), old, "k3"),
        "gae": lambda g: bind(rlhf_fast.gae, x(g), old, mask),
        "whiten": lambda g: bind(rlhf_fast.whiten, x(g), mask),
        "advantages": lambda g: bind(
            rlhf_fast.advantages, torch.zeros(2), x(g), mask, logprobs=old, ref_logprobs=adv, kl_coef=0.1
        ),
        "group_advantages": lambda g: bind(rlhf_fast.group_advantages, x(g, 8), groups),
        "ppo_loss": lambda g: bind(rlhf_fast.ppo_loss, x(g), old, adv, mask),
        "dpo_loss": lambda g: bind(rlhf_fast.dpo_loss, x(g), old, adv, old, chosen_mask=mask, rejected_mask=mask),
        "reward_loss": lambda g: bind(rlhf_fast.reward_loss, x(g, 8), torch.randn(8)),
    }


def microseconds(calls: dict[object, Callable[[], object]], number: int = 200, rounds: int = 80) -> dict[object, float]:
    """Smallest mean of `number` calls over the rounds; each round times every call, so that all meet the quiet moments."""
    timers = {name: timeit.Timer(call) for name, call in calls.items()}
    best = {name: timer.timeit(number) for name, timer in timers.items()}
    for _ in range(rounds):
        for name, timer in timers.items():
            best[name] = min(best[name], timer.timeit(number))
    return {name: 1e6 * seconds / number for name, seconds in best.items()}


def main() -> int:
    torch.set_num_threads(1)
    out = torch.randn(2, 4)
    timed = {(name, grad): make(grad) for name, make in calls().items() for grad in (False, True)}
    found = microseconds({FLOOR: lambda: torch.empty_like(out), **timed})
    rows = {FLOOR: {"no gradient": found[FLOOR]}}
    for name in calls():
        rows[name] = {"no gradient": found[name, False], "gradient": found[name, True]}
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return 0
    print(f"{'op':<23}{'no gradient':>14}{'gradient':>12}   (us per call, limit {LIMIT:g} without gradient)")
    for name, row in rows.items():
        cells = "".join(
            f"{row[k]:>{w}.1f}" if k in row else " " * w for k, w in (("no gradient", 14), ("gradient", 12))
        )
        print(f"{name:<23}{cells}{'   over' if row['no gradient'] > LIMIT and name not in COMPOSED else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
