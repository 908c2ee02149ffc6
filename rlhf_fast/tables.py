"""`python -m rlhf_fast.tables [policy] [advantages] [preference]`: what the package knows by name, in Markdown, for the docs."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rlhf_fast.losses import table as policy
from rlhf_fast.ops.group_advantages import FORMULAS
from rlhf_fast.preference_kinds import KINDS


def advantages() -> str:
    """One row per estimator: functions of token rewards and values, then the kinds of `group_advantages`."""
    rows = [
        (
            "`gae`",
            "A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}",
            "Schulman et al. 2015, arXiv 1506.02438, eq. 16",
        ),
        (
            "`gae(lam=length_adaptive_lambda(lengths))`",
            "the same with lam = 1 - 1 / (alpha length) per sequence",
            "Yue et al. 2025, arXiv 2504.05118 (VAPO)",
        ),
        (
            "`lambda_returns`",
            "G_t = r_t + gamma_t ((1 - lam) V_{t+1} + lam G_{t+1})",
            "Sutton & Barto 2018, section 12.1",
        ),
        ("`vtrace`", "clipped importance ratios in both", "Espeholt et al. 2018, arXiv 1802.01561, eq. 1"),
        (
            "`advantages` with values of 0 and lam 1",
            "discounted returns of score - kl_coef kl, whitened over the batch",
            "Hu et al. 2025, arXiv 2501.03262 (REINFORCE++)",
        ),
        (
            "`gdpo_advantages`",
            "sum of weights_k (r_k - mean_k) / (std_k + eps), whitened over the batch",
            "Liu et al. 2026, arXiv 2601.05242",
        ),
        *((f'`group_advantages(kind="{kind}")`', *row) for kind, row in FORMULAS.items()),
    ]
    return "\n".join(
        ["| estimator | advantage | source |", "| --- | --- | --- |", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    )


def preference() -> str:
    """One row per kind of `preference_loss`."""
    lines = ["| kind | loss of a pair | reads | source |", "| --- | --- | --- | --- |"]
    for name, kind in KINDS.items():
        reads = ["reference"] if kind.reference else []
        reads += ["lengths"] if kind.per_token or kind.lengths else []
        reads += [f"`{option}`" for option in kind.options]
        reads += ["`kl_logratios`"] if name == "kto" else []
        reads += ["`divergence`"] if kind.divergence else []
        reads += ["the whole batch"] if kind.across else []
        formula = kind.formula.replace("|", "\\|")
        lines.append(f"| `{name}` | {formula} | {', '.join(reads)} | {kind.source} |")
    legend = "b = `beta`, e = `label_smoothing`, s the sigmoid; w, l log-probs of the two answers, r_w, r_l their log-ratios to the "
    legend += "reference, D = r_w - r_l, x = b D; \\|w\\|, \\|l\\| tokens, a_w, a_l means per token."
    beside = [
        "- LD-DPO (Liu et al. 2024, arXiv 2409.06411): `dpo` on `sequence_logprobs(..., common_lengths=, tail_weight=)`.",
        "- TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656): any kind, `update_reference` between steps.",
        '- MPO (Wang et al. 2024, arXiv 2411.10442): `kind={"dpo": 0.8, "bco": 0.2, "sft": 1.0}`, any weighted sum alike.',
        "- Answers with labels instead of pairs: `kto_loss`; lists: `plackett_luce_loss`; scores: `reward_loss` (margin, centring, "
        "label smoothing), `with_length_covariate`.",
    ]
    return "\n".join([*lines, "", legend, "", *beside])


TABLES: dict[str, Callable[[], str]] = {"policy": policy, "advantages": advantages, "preference": preference}


def main(names: list[str]) -> int:
    """Print the tables by name, all of them without one."""
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        print(f"unknown tables {unknown}, expected some of {sorted(TABLES)}", file=sys.stderr)
        return 2
    print("\n\n".join(TABLES[name]() for name in names or TABLES))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
