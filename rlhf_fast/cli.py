"""The command line: `rlhf-fast COMMAND [settings.yaml] [--dotted.name value ...]`."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One sub-command: where its settings and its function live; imported only when it runs."""

    summary: str
    settings: str | None
    run: str


COMMANDS = {
    "demo": Command(
        "SFT, reward model, PPO and evaluation of a real model on real reviews", None, "rlhf_fast.demo.chain:main"
    ),
    "sft": Command("supervised fine-tuning of the policy adapter", "SFTConfig", "rlhf_fast.train.sft:train_sft"),
    "reward": Command("reward model from preference pairs", "RewardConfig", "rlhf_fast.train.reward:train_reward"),
    "ppo": Command("PPO with four roles on one base model", "PPOConfig", "rlhf_fast.train.ppo:train_ppo"),
    "grpo": Command(
        "GRPO, DAPO, RLOO, REINFORCE++, ReMax and other recipes without a critic",
        "GroupConfig",
        "rlhf_fast.train.group:train_group",
    ),
    "dpo": Command(
        "DPO, IPO, SimPO, KTO and other losses on preference pairs",
        "PreferenceConfig",
        "rlhf_fast.train.preference:train_preference",
    ),
    "kto": Command("KTO on answers that are judged alone, without pairs", "KTOConfig", "rlhf_fast.train.kto:train_kto"),
    "online-dpo": Command(
        "DPO and its kin on pairs of the policy's own completions",
        "OnlineDPOConfig",
        "rlhf_fast.train.online_dpo:train_online_dpo",
    ),
    "raft": Command(
        "best-of-n fine-tuning: the best of the policy's own completions are learned",
        "RaftConfig",
        "rlhf_fast.train.raft:train_raft",
    ),
    "ray": Command("any of these trainers on the nodes of a Ray cluster", None, "rlhf_fast.placement:main"),
    "evaluate": Command(
        "compare policies by judges, with intervals", "EvaluateConfig", "rlhf_fast.evaluate.compare:evaluate"
    ),
    "plan": Command("memory of a run before it runs, part by part", "PlanConfig", "rlhf_fast.plan:run"),
    "bench": Command(
        "time every op against other libraries and the machine's limits", None, "rlhf_fast.bench.command:main"
    ),
    "doctor": Command("versions, devices, and which kernels run here", None, "rlhf_fast.doctor:main"),
}

EXIT_FAILED, EXIT_USAGE = 1, 2


class UsageError(Exception):
    """The command line cannot be understood; the message says what to type instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rlhf-fast`. Exit status: 0 done, 1 failed, 2 usage, 128 + n ended by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or "--run.debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a folder's name must not fail a run on an output that cannot spell it
            stream.reconfigure(errors="backslashreplace")
    try:
        return _dispatch(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else (0 if stop.code is None else EXIT_FAILED)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stdout = None  # type: ignore[assignment]  # the reader left; nothing to flush into
        return EXIT_FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        usage = isinstance(error, UsageError) or type(error).__name__ == "ConfigError"
        print(f"rlhf-fast: {_one_line(error)}", file=sys.stderr)
        if not debug and not usage:
            print("rlhf-fast: add --debug for the traceback", file=sys.stderr)
        return EXIT_USAGE if usage else EXIT_FAILED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name in ("-V", "--version"):
        from rlhf_fast import __version__

        print(f"rlhf-fast {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}, expected one of {', '.join(COMMANDS)}{_suggest(name)}")
    command = COMMANDS[name]
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not command.run.startswith("rlhf_fast.train."):
        raise UsageError(f"{name} runs in one process, expected no torchrun")
    _quiet()
    if command.settings is None:
        return int(_import(command.run, name)(rest) or 0)
    config = _import("rlhf_fast.config", name)
    settings = getattr(config, command.settings)
    if any(a in ("-h", "--help") for a in rest):
        print(config.config_help(settings, f"rlhf-fast {name}", command.summary))
        return 0
    path = rest.pop(0) if rest and not rest[0].startswith("-") else None
    loaded = config.load_config(settings, path, rest)
    result = _import(command.run, name)(loaded)
    if result is not None and os.environ.get("RANK", "0") == "0":  # under torchrun the first one reports
        print(result)
    return 0


def _quiet() -> None:
    """No bars of the model library between ours; read by it when it is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _import(where: str, command: str) -> Any:
    module, _, attribute = where.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != "rlhf_fast":
            extra = command if command in ("demo", "bench", "ray") else "train"
            raise UsageError(f"{command} needs the package {error.name!r}: pip install 'rlhf-fast[{extra}]'") from None
        raise
    return getattr(found, attribute) if attribute else found


def _help() -> str:
    from rlhf_fast import __version__

    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items())
    return (
        f"rlhf-fast {__version__}: a kernel-optimised RLHF engine\n\n"
        f"usage: rlhf-fast COMMAND [settings.yaml] [--dotted.name value ...]\n\n{rows}\n\n"
        "rlhf-fast COMMAND --help lists every setting; --debug shows tracebacks."
    )


def _suggest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
