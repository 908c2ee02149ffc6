"""Launch sizes timed by `rlhf-fast bench --device cuda --tune`; an architecture here comes before that of configs.py."""

TUNED: dict[str, dict[tuple[str, str, str], tuple[int, int]]] = {}
"""{architecture: {(op, width of the logits, vocabulary class): (lanes, num_warps)}}."""
