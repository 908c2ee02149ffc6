"""Policy losses by name, as data over four axes: ratio level, surrogate, KL term, aggregation.

A new recipe is one line in RECIPES; a new surrogate or ratio level is one function and one line in `rlhf_fast.surrogates`.
Everything is plain PyTorch on (N,)-sized tensors; recipes that the kernel of `rlhf_fast.ppo_loss` covers run in its single pass.
`table()` lists the recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_fast import _check, corrections
from rlhf_fast._sequences import layout
from rlhf_fast._types import LossOutput, PreferenceOutput, Stats
from rlhf_fast.denominators import DIVISORS, Denominators
from rlhf_fast.ops.group_advantages import FORMULAS
from rlhf_fast.ops.kl_estimate import ALL_KINDS, Clamp, bounds
from rlhf_fast.ops.ppo_loss import arguments as loss_arguments
from rlhf_fast.ops.ppo_loss import clip_range, loss_output, scalar, token_advantages
from rlhf_fast.preference import preference_loss
from rlhf_fast.reference._reduce import REDUCTIONS, token_weights
from rlhf_fast.reference.kl_estimate import estimate, k3_of
from rlhf_fast.reference.ppo_loss import LEVELS as KERNEL_LEVELS
from rlhf_fast.surrogates import LEVELS, RATIO_CLAMP, SURROGATES, Batch, Terms, Twin

__all__ = ["RECIPES", "LossOutput", "PreferenceOutput", "Recipe", "policy_loss", "preference_loss", "table"]

STATS = (
    "policy_loss",
    "kl",
    "entropy",
    "clip_fraction",
    "approx_kl",
    "approx_kl_k3",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "tokens",
)
"""policy_loss is reduced like the loss; tokens is a count; the rest are means (extremes) over the real tokens, 0 without any.
The ratio is the one the surrogate sees; approx_kl and approx_kl_k3 are of the token log-ratios."""

PLACEMENTS = ("none", "reward", "loss", "corrected")
"""Where a recipe puts its KL term. corrected: in the loss, times pi / pi_old with its gradient, which makes k3 an unbiased
estimate off-policy and its gradient that of the reverse KL (DeepSeek-V3.2, arXiv 2512.02556)."""

ADVANTAGES = ("gae", "returns", *FORMULAS)
"""gae: `advantages` with a critic; returns: `advantages` with values of 0 and lam=1; the rest: kinds of `group_advantages`."""


@dataclass(frozen=True)
class Recipe:
    """One named policy loss."""

    level: str = "token"
    surrogate: str = "clip"
    clip: tuple[float, float] = (0.2, 0.2)
    dual_clip: float | None = None
    ratio_cap: float | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    """Options of the surrogate that differ from its own."""
    kl_kind: str = "k3"
    kl_placement: str = "none"
    reduction: str = "token-mean"
    """One of rlhf_fast.denominators.DIVISORS."""
    advantages: str = "grpo"
    """One of ADVANTAGES: what the paper feeds the loss with."""
    correction: str | None = None
    """Kind of `rollout_correction` that is part of the recipe."""
    local: bool = False
    """Whether the denominator is that of the batch at hand by definition, however the whole is split."""
    sampled: bool = False
    """Whether the old policy of its ratio is the one that sampled, however many updates ago."""
    paper: str = ""
    """arXiv id, or where else it is from."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Which of clip, dual_clip and ratio_cap have an effect; `policy_loss` refuses the others."""
        return (*LEVELS[self.level].reads, *SURROGATES[self.surrogate].reads)

    @property
    def terms(self) -> Terms:
        """Its numbers."""
        options = {**SURROGATES[self.surrogate].options, **self.options}
        return Terms(self.clip, self.dual_clip, self.ratio_cap, options)

    def twin(self, terms: Terms) -> Twin | None:
        """How the kernel of `ppo_loss` computes it with these numbers, or None."""
        return SURROGATES[self.surrogate].twin(terms) if self.level in KERNEL_LEVELS else None

    @property
    def fused(self) -> bool:
        """Whether the kernel of `ppo_loss` covers it."""
        return self.twin(self.terms) is not None

    @property
    def needs(self) -> tuple[str, ...]:
        """Tensors that `policy_loss` asks for besides those that every recipe takes."""
        return (*SURROGATES[self.surrogate].needs, *(("rollout_logprobs",) if self.correction else ()))


SEQ_MEAN, SEQ_SUM = "seq-mean-token-mean", "seq-mean-token-sum"

RECIPES: dict[str, Recipe] = {
    "ppo": Recipe(kl_kind="k1", kl_placement="reward", advantages="gae", paper="1707.06347"),
    "ppo_dual_clip": Recipe(dual_clip=3.0, advantages="gae", paper="1912.09729"),
    "clip_higher": Recipe(clip=(0.2, 0.28), advantages="gae", paper="2503.14476"),
    "two_sided_clip": Recipe(ratio_cap=4.0, kl_placement="loss", paper="2505.07291"),
    "decoupled_ppo": Recipe(correction="token", advantages="gae", paper="2505.24298"),
    "grpo": Recipe(kl_placement="loss", reduction=SEQ_MEAN, paper="2402.03300"),
    "dapo": Recipe(clip=(0.2, 0.28), paper="2503.14476"),
    "bnpo": Recipe(local=True, paper="TRL loss_type"),
    "dr_grpo": Recipe(reduction="constant", advantages="dr_grpo", paper="2503.20783"),
    "lite_ppo": Recipe(advantages="lite_ppo", paper="2508.08221"),
    "gspo": Recipe("sequence", clip=(3e-4, 4e-4), reduction=SEQ_MEAN, paper="2507.18071"),
    "gspo_token": Recipe("sequence-token", clip=(3e-4, 4e-4), reduction=SEQ_MEAN, paper="2507.18071"),
    "luspo": Recipe("sequence", clip=(2e-3, 2.5e-3), reduction=SEQ_SUM, paper="2602.05261"),
    "gmpo": Recipe("geometric", "unclipped", clip=(0.4, 0.4), reduction=SEQ_MEAN, paper="2507.20673"),
    "cispo": Recipe(surrogate="cispo", clip=(1.0, 4.0), paper="2506.13585"),  # no lower bound, ratio at most 5
    "cispo_cap": Recipe(surrogate="cispo-cap", ratio_cap=5.0, paper="2506.13585, TRL"),
    "sapo": Recipe(surrogate="sapo", reduction=SEQ_MEAN, paper="2511.20347"),
    "vespo": Recipe("product", "vespo", sampled=True, paper="2602.10693"),
    "clip_cov": Recipe(surrogate="clip-cov", paper="2505.22617"),
    "kl_cov": Recipe(surrogate="kl-cov", paper="2505.22617"),
    "reinforce": Recipe(surrogate="score", reduction=SEQ_SUM, advantages="returns", paper="Williams 1992"),
    "reinforce++": Recipe(kl_kind="k1", kl_placement="reward", advantages="returns", paper="2501.03262"),
    "reinforce++_baseline": Recipe(kl_kind="k2", kl_placement="loss", advantages="reinforce++", paper="2501.03262"),
    "rloo": Recipe("product", reduction=SEQ_MEAN, kl_kind="k1", kl_placement="reward", advantages="rloo", paper="2402.14740"),
    "remax": Recipe(surrogate="score", reduction=SEQ_SUM, advantages="remax", paper="2310.10505"),
    "opo": Recipe(surrogate="score", reduction=SEQ_SUM, advantages="opo", paper="2505.23585"),
    "gpg": Recipe(surrogate="score", advantages="gpg", paper="2504.02546"),
}  # fmt: skip


def policy_loss(
    recipe: str,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    clip: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    options: Mapping[str, float] | None = None,
    kl_coef: float = 0.0,
    kl_kind: str | None = None,
    kl_clamp: Clamp = None,
    kl_placement: str | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    correction: str | None = None,
    correction_bounds: corrections.Bounds | float | None = None,
    selected: Tensor | None = None,
    reduction: str | None = None,
    normalizer: Tensor | float | None = None,
    denominators: Denominators | None = None,
    cu_seqlens: Tensor | None = None,
    fused: bool | None = None,
) -> LossOutput:
    """A policy loss by name: loss = policy + kl_coef kl - entropy_coef entropy; keywords left at None take the recipe's value.

    `rlhf_fast.losses.table()` lists the recipes with their papers. The log-probs may come from anywhere: from logits by
    `token_logprobs(logits, token_ids)`, from hidden states by `linear_token_logprobs(hidden, head.weight, token_ids)`, which
    never stores the logits, or from a model that returns them. Both ops give `.logprobs` and, from the same read, `.entropy`,
    and the gradient of this loss flows through either into the model:

        s = linear_token_logprobs(hidden, head.weight, token_ids, mask=mask)
        out = policy_loss("dapo", s.logprobs, old, advantages, mask, entropy=s.entropy, entropy_coef=0.01, denominators=d)
        out.loss.backward()

    (`linear_ppo_loss` fuses head and loss for PPO.)

    Losses of parts add up to the loss of the whole, gradients included, when all of them get the `Denominators` of the whole.
    That holds for every recipe but bnpo, whose denominator is the token count of the batch at hand by definition. clip_cov and
    kl_cov look across the batch: their tokens are chosen once, by `covariance_mask`, and passed in.

    Args:
        recipe: one of RECIPES.
        logprobs: (B, T) of the sampled tokens, in nats; (N,) with cu_seqlens.
        old_logprobs: like logprobs, of the policy before the update ("proximal"); None = logprobs, detached (on-policy).
            For vespo: of the policy that sampled.
        advantages: like logprobs, or one per sequence.
        mask: like logprobs, True = real token. Masked tokens are never read; gradient 0.
        ref_logprobs: like logprobs; adds kl_coef kl, per token and reduced like the policy term.
        clip: (low, high) of the ratio (of the log-ratio for gmpo), or one number for both.
        dual_clip: c > 1: where A < 0 the loss is at most -c A.
        ratio_cap: > 0, largest ratio before it is multiplied by A (TRL's `delta`); for cispo_cap the largest weight.
        options: numbers of the surrogate by name, each > 0: those in its row of rlhf_fast.surrogates.SURROGATES. A number that
            the recipe does not read is refused (`RECIPES[recipe].reads`).
        kl_kind, kl_clamp: as in `kl_estimate`. kl_kind defaults to the recipe's, or to k3 where its KL is not in the loss.
        kl_placement: "loss", or "corrected" (times pi / pi_old, with gradient). A kl_coef > 0 always adds the term to the loss:
            leave it 0 where the reward carries the KL.
        entropy: like logprobs, per token; entropy_coef >= 0 (`EntropyController` steers it).
        importance_weights: like logprobs, factor of the policy term. Masks that shall not change the denominators go here.
        rollout_logprobs: like logprobs, of the engine or the older policy that sampled, with `correction`: the policy term is
            multiplied by the weights of `rollout_correction(old_logprobs, rollout_logprobs, kind=correction)`.
        correction: kind of `rollout_correction`; correction_bounds: its bounds.
        selected: bool, like logprobs; for clip_cov and kl_cov.
        reduction: "token-mean"; "token-sum"; "seq-mean-token-mean"; "seq-mean-token-sum"; "seq-mean-token-sum-norm" (over
            sequences x horizon); "constant" (token sum over all slots, rows x horizon). The horizon of padded input is T; packed
            input has none, so the last two need `denominators` there.
        normalizer: > 0, replaces the denominator of the reduction.
        denominators: counts of the whole optimiser step; replaces those of this call.
        cu_seqlens: (S+1,) boundaries of packed sequences.
        fused: None = in one pass by the kernel of `ppo_loss` where it covers recipe and options, else by the formula; False = by
            the formula, which can be differentiated twice; True = in one pass or an error.

    Returns:
        LossOutput(loss, stats), differentiable towards logprobs and entropy; 0 without a real token. The statistics are those in
        rlhf_fast.losses.STATS; from the one pass those of `ppo_loss`, which has these and more.

    Raises:
        TypeError, ValueError: wrong recipe, dtype, shape, device or range, or a keyword that the recipe does not read; names
            the argument.
    """
    op = "policy_loss"
    _check.choice(op, "recipe", recipe, tuple(RECIPES))
    rules = RECIPES[recipe]
    terms = _terms(op, recipe, rules, clip, dual_clip, ratio_cap, options)
    in_loss = rules.kl_placement in ("loss", "corrected")
    kind = (rules.kl_kind if in_loss else "k3") if kl_kind is None else kl_kind
    _check.choice(op, "kl_kind", kind, ALL_KINDS)
    placement = (rules.kl_placement if in_loss else "loss") if kl_placement is None else kl_placement
    _check.choice(op, "kl_placement", placement, ("loss", "corrected"))
    clamp_in, clamp_out = bounds(op, "kl_clamp", kl_clamp)
    kl_coef = _check.number(op, "kl_coef", kl_coef, 0.0)
    entropy_coef = _check.number(op, "entropy_coef", entropy_coef, 0.0)
    reduction = rules.reduction if reduction is None else reduction
    _check.choice(op, "reduction", reduction, tuple(DIVISORS))
    correction = rules.correction if correction is None else correction
    if correction is not None:
        _check.choice(op, "correction", correction, tuple(corrections.KINDS))
    for name, value, reason in (
        ("ref_logprobs", ref_logprobs, f"kl_coef={kl_coef}" if kl_coef else ""),
        ("entropy", entropy, f"entropy_coef={entropy_coef}" if entropy_coef else ""),
        ("rollout_logprobs", rollout_logprobs, f"correction={correction!r}" if correction else ""),
        ("selected", selected, f"recipe {recipe!r}" if "selected" in rules.needs else ""),
    ):
        if value is None and reason:
            raise _check.error(ValueError, op, name, None, f"a tensor with {reason}")
    if selected is not None and "selected" not in rules.needs:
        raise _check.error(ValueError, op, "selected", "a tensor", f"None: {recipe} does not read it")
    if correction is None:
        if rollout_logprobs is not None:
            raise _check.error(ValueError, op, "correction", None, "a kind of rollout_correction with rollout_logprobs")
        if correction_bounds is not None:
            raise _check.error(ValueError, op, "correction_bounds", correction_bounds, "None without correction")
    else:
        low, high = corrections.bounds_of(op, "correction_bounds", correction, correction_bounds)

    at = layout(op, "logprobs", logprobs, mask, cu_seqlens)
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    importance = importance_weights
    if correction is not None:
        importance = _corrected(op, at, logprobs, old, rollout_logprobs, importance, correction, low, high)
    divide = _normalizer(op, recipe, at, reduction, normalizer, denominators)
    twin = rules.twin(terms) if placement == "loss" and kl_clamp is None else None
    if fused and twin is None:
        raise _check.error(
            ValueError, op, "fused", True, f"None or False: no kernel covers {recipe} with these options"
        )
    if twin is not None and fused is not False:
        sums = reduction if reduction in REDUCTIONS else "token-sum"
        inputs = loss_arguments(
            op, "logprobs", logprobs, old, advantages, mask, twin.clip, twin.dual_clip, entropy, entropy_coef,
            ref_logprobs, kl_coef, kind, None, None, None, None, 0.0, importance, sums, divide, "rlhf_fast", cu_seqlens,
        )  # fmt: skip
        return loss_output(inputs, rules.level, twin.surrogate)

    b, entropy, ref, importance = _batch(op, at, logprobs, old, advantages, selected, entropy, ref_logprobs, importance)
    weights = token_weights(at.mask, b.logprobs.dtype, reduction, *_divisor(op, divide, b.logprobs), at.cu_seqlens)
    ratio = LEVELS[rules.level].ratio(b, terms)
    token_loss, clipped = SURROGATES[rules.surrogate].loss(b, ratio, terms)
    if importance is not None:
        token_loss = token_loss * importance
    policy = (weights * token_loss).sum()
    loss, kl = policy, None
    if ref is not None:
        kl = estimate(b.logprobs, ref, kind, clamp_in, clamp_out)
        if placement == "corrected":
            kl = kl * b.log_ratio.exp()
        loss = loss + kl_coef * (weights * kl).sum()
    if entropy is not None:
        loss = loss - entropy_coef * (weights * entropy).sum()
    return LossOutput(loss, Stats(_stats(b, policy, kl, entropy, ratio, clipped), STATS))


def _terms(op, recipe, rules, clip, dual_clip, ratio_cap, options) -> Terms:  # type: ignore[no-untyped-def]
    """The recipe's numbers with those of the call; a number that nothing would read is an error."""
    for name, value in (("clip", clip), ("dual_clip", dual_clip), ("ratio_cap", ratio_cap)):
        if value is not None and name not in rules.reads:
            raise _check.error(ValueError, op, name, value, f"None: {recipe} does not read it")
    own = rules.terms
    found = dict(own.options)
    for name, value in (options or {}).items():
        if name not in found:
            expected = f"only {', '.join(map(repr, found))}" if found else f"none: {recipe} has no options"
            raise _check.error(ValueError, op, "options", repr(name), expected)
        found[name] = _check.number(op, f"options[{name!r}]", value, 0.0, open_low=True)
    return Terms(
        own.clip if clip is None else clip_range(op, clip),
        own.dual_clip if dual_clip is None else _check.number(op, "dual_clip", dual_clip, 1.0, open_low=True),
        own.ratio_cap if ratio_cap is None else _check.number(op, "ratio_cap", ratio_cap, 0.0, open_low=True),
        found,
    )


@torch.no_grad()
def _corrected(op, at, logprobs, old, rollout, importance, kind, low, high):  # type: ignore[no-untyped-def]
    """Importance weights times those of the rollout correction."""
    given = {"old_logprobs": old, "rollout_logprobs": rollout}
    if importance is not None:
        given["importance_weights"] = importance
    _check.alike(op, logprobs, "logprobs", given)
    old, rollout, importance = _check.common_wide(old, rollout, importance)
    weights = corrections.weigh((old - rollout).where(at.mask, 0.0), at, kind, low, high)[0]
    return weights if importance is None else weights * importance


def _normalizer(op, recipe, at, reduction, normalizer, denominators):  # type: ignore[no-untyped-def]
    """What replaces the denominator of the reduction: a number, a 0-d tensor, or None for the kernels' own count."""
    if denominators is not None:
        if not isinstance(denominators, Denominators):
            raise _check.error(TypeError, op, "denominators", type(denominators).__name__, "rlhf_fast.Denominators")
        if normalizer is not None:
            raise _check.error(ValueError, op, "normalizer", normalizer, "None with denominators")
        if RECIPES[recipe].local:
            raise _check.error(
                ValueError, op, "denominators", "a Denominators", f"None: {recipe} divides by the tokens of this call"
            )
        _check.device(op, "denominators", denominators.counts, at.mask, "mask")
        return denominators.normalizer(reduction)
    if normalizer is None and reduction not in REDUCTIONS:
        return Denominators.of(at.mask, at.cu_seqlens).normalizer(reduction)
    return normalizer


def _divisor(op: str, normalizer: Tensor | float | None, like: Tensor) -> tuple[Tensor | None, float]:
    """As `token_weights` takes it: a 0-d tensor, or a number (0 for none)."""
    if normalizer is None:
        return None, 0.0
    if isinstance(normalizer, Tensor):
        return scalar(op, normalizer, like), 0.0
    return None, _check.number(op, "normalizer", normalizer, 0.0, open_low=True)


def _batch(op, at, logprobs, old, advantages, selected, entropy, ref, importance):  # type: ignore[no-untyped-def]
    """Checked tensors in one dtype, 0 where masked: (the batch, entropy, reference, importance)."""
    _check.floating(op, "advantages", advantages)
    given = {
        "old_logprobs": old,
        "advantages": token_advantages(advantages, logprobs, at.cu_seqlens),
        "ref_logprobs": ref,
        "importance_weights": importance,
        "entropy": entropy,
    }
    _check.alike(op, logprobs, "logprobs", {name: x for name, x in given.items() if x is not None})
    if selected is not None:
        _check.boolean(op, "selected", selected)
        selected = _check.mask_like(op, selected, logprobs, "logprobs", "selected") & at.mask
    new, *rest = (None if x is None else x.where(at.mask, 0.0) for x in _check.common_wide(logprobs, *given.values()))
    old, A, ref, importance = (None if x is None else x.detach() for x in rest[:4])
    log_ratio = (new - old).clamp(-RATIO_CLAMP, RATIO_CLAMP)
    return Batch(new, log_ratio, A, at, selected), rest[4], ref, importance


@torch.no_grad()
def _stats(
    b: Batch, policy: Tensor, kl: Tensor | None, entropy: Tensor | None, ratio: Tensor, clipped: Tensor
) -> Tensor:
    zero, mask = torch.zeros_like(policy), b.at.mask
    tokens = mask.sum()
    mean = lambda x: zero if x is None else x.to(zero.dtype).where(mask, 0.0).sum() / tokens.clamp(min=1)
    extreme = lambda fill, f: torch.where(tokens > 0, f(ratio.where(mask, fill)), 0.0) if mask.numel() else zero
    return torch.stack(
        [
            policy,
            mean(kl),
            mean(entropy),
            mean(clipped),
            mean(b.log_ratio.square()) / 2,
            mean(k3_of(b.log_ratio)),
            mean(ratio),
            extreme(torch.inf, torch.amin),
            extreme(-torch.inf, torch.amax),
            tokens.to(zero.dtype),
        ]
    )


def table() -> str:
    """The recipes as a Markdown table."""
    head = ("recipe", "ratio", "surrogate", "bounds", "KL", "aggregation", "advantages", "paper")
    rows = [_row(name, recipe) for name, recipe in RECIPES.items()]
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(name: str, r: Recipe) -> tuple[str, ...]:
    numbers = [f"-{r.clip[0]:g} / +{r.clip[1]:g}"] if "clip" in r.reads else []
    numbers += [f"dual {r.dual_clip:g}"] if r.dual_clip is not None else []
    numbers += [f"ratio <= {r.ratio_cap:g}"] if r.ratio_cap is not None else []
    surrogate = r.surrogate + (f" x {r.correction} weights" if r.correction else "")
    kl = "" if r.kl_placement == "none" else f"{r.kl_kind}, {r.kl_placement}"
    reduction = r.reduction + (" of the batch at hand" if r.local else "")
    return f"`{name}`", r.level, surrogate, ", ".join(numbers), kl, reduction, r.advantages, r.paper
