"""The conventions in which public RLHF code differs, as data.

A dialect changes what a real token gets: where the score goes, how gaps and whitening are treated, which quantities are
clamped. It is a row of the table below and nothing else; the maths stays in one place. Masked tokens give 0 in every
dialect (verl and OpenRLHF leave whitened leftovers there, which their losses mask). A row named framework_option is the
framework with that option switched on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from rlhf_fast._check import error

KlClamp = tuple[float | None, float | None]


@dataclass(frozen=True)
class Dialect:
    """One set of conventions."""

    score_slot: str = "last"
    """A sequence score goes to the "last" real token, or "after_last": the slot after it where the window has one (the
    value and the return of that slot then count too)."""
    score_clip: float | None = None
    """Sequence scores are clamped to +-this."""
    gap: str = "carry"
    """Masked slots inside a row: skipped ("carry"), or a step with zero reward and zero value ("decay"). "read": all masked slots, those
    after the last token too, are steps with zero reward and the value that stands there."""
    bootstrap: bool = False
    """A sequence that was cut before its end goes on: the value of the state after its last token counts. Elsewhere the trainer has
    none."""
    drop_truncated: bool = False
    """The score of such a sequence counts 0."""
    kl_clamp: dict[str, KlClamp] = field(default_factory=dict)
    """{estimator: (bound of the log-ratio, bound of the estimate)}; none when absent."""
    unbiased: bool = True
    """Variance of the whitening divides by n - 1."""
    floor_variance: bool = False
    """Whitening divides by sqrt(max(var, 1e-8)) instead of sqrt(var + 1e-8)."""
    deviation_eps: float | None = None
    """Whitening divides by sqrt(var) + this, in fp64."""
    ratio_clamp: float | None = None
    """The PPO log-ratio is clamped to +-this."""
    dual_clip: float | None = None
    """Dual clipping that is always on."""
    dual_clip_slope: float = 0.0
    """Its bound is dual_clip + this x the ratio clip."""
    value_scale: float = 1.0
    """Factor of the value loss: 2 for a loss without the 1/2. The statistic value_loss is that of the loss with it."""

    def kl_bounds(self, kind: str) -> tuple[float, float]:
        """(bound of the log-ratio, bound of the estimate) for an estimator; infinity for none."""
        low, high = self.kl_clamp.get(kind.removesuffix("+"), (None, None))
        return (math.inf if low is None else low, math.inf if high is None else high)

    def dual_bound(self, op: str, low: float, high: float) -> float | None:
        """Bound of the dual clipping beside a ratio clip (low, high). Raises ValueError where one number must give it and two do not."""
        if self.dual_clip is None or not self.dual_clip_slope:
            return self.dual_clip
        if low != high:
            expected = f"one number: the dialect's dual_clip is {self.dual_clip:g} + {self.dual_clip_slope:g} clip; or a dual_clip"
            raise error(ValueError, op, "clip", f"({low:g}, {high:g})", expected)
        return self.dual_clip + self.dual_clip_slope * low


_ALL = ("k1", "k2", "k3", "abs")

# areal/trainer/ppo/actor.py, areal/utils/data.py, NormConfig in areal/api/cli_args.py: scores are clipped after their scaling, every
# estimator is bounded, a sequence that fills the window is cut. A score whose slot is outside of the loss mask is lost there; here
# it goes to the last real token.
_AREAL = Dialect(
    score_clip=20.0, bootstrap=True, kl_clamp=dict.fromkeys(_ALL, (None, 10.0)), deviation_eps=1e-5
)  # fmt: skip
# roll/utils/functionals.py: only k3 is bounded. The scan has no mask at all, so that critic outputs on padding leak in.
_ROLL = Dialect(gap="read", kl_clamp={"k3": (None, 10.0)})

DIALECTS: dict[str, Dialect] = {
    "rlhf_fast": Dialect(ratio_clamp=20.0),
    # trl/experimental/ppo: the score follows the end-of-sequence token, values live one slot longer, plain loop over T.
    "trl": Dialect(score_slot="after_last", gap="decay"),
    # verl/trainer/ppo/core_algos.py.
    "verl": Dialect(kl_clamp={"k3": (20.0, 10.0)}, ratio_clamp=20.0, dual_clip=3.0),
    # openrlhf/trainer/ppo_utils: every estimator is bounded, whitening is biased and over the whole rollout.
    "openrlhf": Dialect(
        score_clip=10.0,
        gap="decay",
        kl_clamp=dict.fromkeys(_ALL, (None, 10.0)),
        unbiased=False,
        floor_variance=True,
        ratio_clamp=20.0,
    ),
    "nemo": Dialect(kl_clamp=dict.fromkeys(_ALL, (20.0, 10.0))),
    # slime/utils/ppo_utils.py, slime/backends/megatron_utils/loss.py: "k3" is its unbounded one (low_var_kl is bounded by 10). Its
    # scan ignores the loss mask: mask is that of the response. The value loss lacks the factor 1/2.
    "slime": Dialect(value_scale=2.0),
    "areal": _AREAL,
    "areal_mask_no_eos_with_zero": replace(_AREAL, drop_truncated=True),
    "roll": _ROLL,
    # roll/pipeline/base_worker.py: bounded by 1 + 2 pg_clip, also where two other numbers clip the ratio.
    "roll_dual_clip_loss": replace(_ROLL, dual_clip=1.0, dual_clip_slope=2.0),
    # lm-human-preferences (Ziegler et al. 2019): biased variance.
    "openai": Dialect(gap="decay", unbiased=False),
}


def dialect(op: str, name: str) -> Dialect:
    """The row `name`. Raises ValueError naming the known ones."""
    found = DIALECTS.get(name)
    if found is None:
        raise error(ValueError, op, "dialect", repr(name), f"one of {', '.join(map(repr, DIALECTS))}")
    return found
