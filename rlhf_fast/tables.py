"""`python -m rlhf_fast.tables preference`: the tables of losses in Markdown, for the docs."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rlhf_fast.preference_kinds import KINDS


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


TABLES: dict[str, Callable[[], str]] = {"preference": preference}


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
