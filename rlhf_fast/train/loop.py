"""What every training loop shares: folder, lock, optimizer, schedule, checkpoints, metrics, signals, bad steps."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.config import DataConfig, ModelConfig, OptimConfig, RunConfig, config_hash, resolve_dtype, to_yaml
from rlhf_fast.data import DataError, Encoded, encode_records, read_records
from rlhf_fast.model import SharedModel
from rlhf_fast.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
    claim_output,
    fault_point,
    load_optimizer_tensors,
    optimizer_tensors,
    rng_state,
    set_rng_state,
)
from rlhf_fast.train.monitor import Monitor

logger = logging.getLogger(__name__)

State = Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]]
"""Further JSON state of a run: how to read it for a checkpoint, and how to put it back."""

MAX_BAD_STEPS = 5
"""Updates in a row with a non-finite loss or gradient before the run stops."""


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


def learning_rate(optim: OptimConfig, progress: float) -> float:
    """Factor on the peak rate at `progress` in [0, 1): linear warm-up, then constant, linear or cosine to 0."""
    if progress < optim.warmup_ratio:
        return (progress + 1e-12) / optim.warmup_ratio
    rest = (progress - optim.warmup_ratio) / (1 - optim.warmup_ratio)
    if optim.schedule == "linear":
        return 1 - rest
    return 0.5 * (1 + math.cos(math.pi * rest)) if optim.schedule == "cosine" else 1.0


def load_model(
    config: ModelConfig, roles: tuple[str, ...], seed: int, adapters: Mapping[str, str] | None = None
) -> SharedModel:
    """The shared model of a settings tree, base frozen, with its folds and adapters."""
    return SharedModel.from_pretrained(
        config.path,
        roles=roles,
        lora=config.lora,
        shared_layers=config.shared_layers,
        fold=list(config.fold) or None,
        adapters=adapters,
        dtype=resolve_dtype(config.dtype),
        seed=seed,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a local model folder, without remote code and without a network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load_data(config: DataConfig, tokenizer: Any, *, response_only: bool = True) -> tuple[Encoded, str]:
    """(encoded records, fingerprint of their source). Raises DataError, also when nothing is left to use."""
    records = read_records(
        config.path,
        config.kind,
        on_error=config.on_error,
        fields=config.fields,
        split=config.split,
        limit=config.limit,
    )
    encoded = encode_records(
        records,
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_tokens=config.max_tokens,
        overlong=config.overlong,
        response_only=response_only,
        eos=config.eos,
    )
    left_out = {**records.skipped, **encoded.counts}
    if left_out:
        logger.warning("%s: %s", config.path, ", ".join(f"{n} records {reason}" for reason, n in left_out.items()))
    if not len(encoded):
        raise DataError(config.path, "no usable record", "empty")
    return encoded, records.fingerprint


def base_fingerprint(model: SharedModel) -> str:
    """SHA-256 over names, shapes and sampled values of the frozen weights: tells bases apart, not a proof of equality."""
    digest = hashlib.sha256()
    for name, p in model.base.named_parameters():
        sample = p.detach().flatten()[:: max(1, p.numel() // 64)].float().cpu()
        digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


class Run:
    """One training run in one folder, from its lock to its last checkpoint.

    Use as a context manager around `for step in run.steps():`; inside, call `loss.backward()` as often as the step needs
    and `run.update()` for each optimizer step, then `run.log(...)`.

    rates: {role: peak learning rate} of the roles that train. identity: what must not change on resume (data fingerprint
    and the like), beyond the settings. state: {name: (get, set)} of further JSON state that a resume restores.
    """

    def __init__(
        self,
        title: str,
        config: Any,
        model: SharedModel,
        rates: Mapping[str, float],
        total_steps: int,
        identity: Mapping[str, str],
        state: State | None = None,
    ) -> None:
        self.title, self.config, self.model, self.total_steps = title, config, model, total_steps
        self.settings: RunConfig = config.run
        self.optim: OptimConfig = config.optim
        self.folder = Path(self.settings.output_dir)
        self.rates, self.state = dict(rates), dict(state or {})
        self.parameters = {f"{role}.{n}": p for role in rates for n, p in model.parameters_of(role).items()}
        groups = [
            {"params": [p for n, p in self.parameters.items() if n.startswith(f"{role}.")], "peak": rate, "lr": rate}
            for role, rate in self.rates.items()
        ]
        o = self.optim
        self.optimizer = torch.optim.AdamW(groups, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        self.identity = {
            "command": title,
            "base": base_fingerprint(model),
            "dtype": str(next(model.base.parameters()).dtype),
            "lora": repr(model.lora),
            "shared_layers": str(model.shared_layers),
            **identity,
            "config": config_hash(config),
        }
        self.bad_steps = 0
        self._signal: int | None = None
        self._saved_at = -1

    def __enter__(self) -> Run:
        self._stack = ExitStack()
        settings = self.settings
        lock = claim_output(self.folder, resume=settings.resume, overwrite=settings.overwrite)
        self._stack.enter_context(lock)
        (self.folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        self.store = CheckpointStore(self.folder / "checkpoints", keep=settings.keep)
        self.start = self._restore() if settings.resume else 0
        self.monitor = self._stack.enter_context(
            Monitor(self.folder, self.total_steps, self.title, start_step=self.start)
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                before = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread
                break
            self._stack.callback(signal.signal, number, before)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def steps(self) -> Iterator[int]:
        """Step numbers still to do; saves after each `save_every` steps, at the end, and on the first SIGTERM or SIGINT."""
        if self.start == 0:
            self.save(0)
        for step in range(self.start, self.total_steps):
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(self.optim, step / self.total_steps)
            yield step
            done = step + 1
            due = self.settings.save_every and done % self.settings.save_every == 0
            if due or done == self.total_steps or self._signal is not None:
                self.save(done)
            if self._signal is not None:
                raise SystemExit(128 + self._signal)

    def update(self) -> float:
        """Clip the gradients, take one optimizer step, clear them; returns the gradient norm before clipping.

        A non-finite gradient leaves every parameter and moment as it was; MAX_BAD_STEPS in a row raise TrainingError.
        """
        fault_point("train.step")
        parameters = list(self.parameters.values())
        norm = nn.utils.clip_grad_norm_(parameters, self.optim.max_grad_norm)
        finite = bool(norm.isfinite())
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise TrainingError(
                f"{self.title}: {self.bad_steps} updates in a row had a non-finite loss or gradient; lower the learning "
                f"rate, or look at the last lines of {self.folder / 'metrics.jsonl'}"
            )
        return float(norm)

    def log(self, step: int, metrics: Mapping[str, float], tokens: int, text: str = "") -> None:
        """Write metrics (by log_every) and move the progress bar; `tokens` were processed in this step."""
        self.monitor.advance(step + 1, tokens=tokens, text=text)
        skipped = {"skipped_updates": float(self.bad_steps)} if self.bad_steps else {}
        if (step + 1) % self.settings.log_every == 0 or step + 1 == self.total_steps:
            lr = {f"lr/{r}": g["lr"] for r, g in zip(self.rates, self.optimizer.param_groups, strict=True)}
            rate = {"tokens_per_second": self.monitor.tokens_per_second}
            self.monitor.log(step + 1, {**metrics, **lr, **skipped, **rate})

    def save(self, step: int) -> None:
        """A checkpoint that continues bit for bit."""
        if step == self._saved_at:
            return
        state = {name: get() for name, (get, _) in self.state.items()}
        tensors: dict[str, dict[str, Tensor]] = {
            "model": {name: p.detach() for name, p in self.parameters.items()},
            "optim": optimizer_tensors(self.optimizer, list(self.parameters)),
        }
        state = {"identity": self.identity, "rng": rng_state(), "bad_steps": self.bad_steps, "extra": state}
        self.store.save(step, tensors, state)
        self._saved_at = step

    def _restore(self) -> int:
        found = self.store.load_latest(expect={"identity": self.identity})
        if found is None:
            raise CheckpointError(f"{self.folder}: there is no checkpoint to resume from")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(found.tensors["model"][name])
        load_optimizer_tensors(self.optimizer, list(self.parameters), found.tensors["optim"])
        set_rng_state(found.state["rng"])
        self.bad_steps = found.state["bad_steps"]
        for name, (_, put) in self.state.items():
            put(found.state["extra"][name])
        self._saved_at = found.step
        return found.step

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)  # the second one: now; the last checkpoint is complete on disk
        self._signal = number
