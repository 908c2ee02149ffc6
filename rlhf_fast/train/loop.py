"""What every training loop shares: folder, lock, optimizer, schedule, checkpoints, metrics, signals, bad steps."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import rlhf_fast
from rlhf_fast import _check
from rlhf_fast.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    config_hash,
    resolve_device,
    resolve_dtype,
    to_yaml,
)
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
from rlhf_fast.train.micro_batches import MicroBatches
from rlhf_fast.train.monitor import Monitor
from rlhf_fast.train.optimizer import HostAdamW, adamw
from rlhf_fast.train.ranks import Ranks, join

logger = logging.getLogger(__name__)

State = Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]]
"""Further JSON state of a run: how to read it for a checkpoint, and how to put it back."""

Buffers = Mapping[str, tuple[Callable[[int], Mapping[str, Tensor]], Callable[[Mapping[str, Tensor]], None]]]
"""Further tensors: how to read those that a run needs to go on at a step, and how to put them back."""

MAX_BAD_STEPS = 5
"""Updates in a row with a non-finite loss or gradient before the run stops."""
BAD_UPDATES = "bad_updates.jsonl"
"""File of the run's folder with a line for each of them: step, records, loss, gradient norm, parameters."""
_NAMED = 8


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
    config: ModelConfig,
    roles: tuple[str, ...],
    seed: int,
    adapters: Mapping[str, str] | None = None,
    *,
    device: torch.device,
) -> SharedModel:
    """The shared model of a settings tree, base frozen, with its folds and adapters, on a device that becomes the current one.

    Layers that `Run.shard` spreads over GPUs wait on the host for it, since one of them need not hold them all.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels run on the current one
    if config.offload and device.type == "cpu":
        logger.warning("model.offload changes nothing on a CPU, whose memory holds the layers anyway")
    waits = config.shard and device.type != "cpu" and int(os.environ.get("WORLD_SIZE") or 1) > 1
    model = SharedModel.from_pretrained(
        config.path,
        roles=roles,
        lora=config.lora,
        shared_layers=config.shared_layers,
        fold=list(config.fold) or None,
        adapters=adapters,
        dtype=resolve_dtype(config.dtype, device.type),
        quantize=config.quantize,
        seed=seed,
        gradient_checkpointing=config.gradient_checkpointing,
        device="cpu" if waits else device,
        offload=config.offload,
    )
    if waits:
        model.move_all_but_layers(device)
    return model


def device_of(settings: RunConfig) -> torch.device:
    """The device of a run in this process. Raises ValueError."""
    if ":" in settings.device and int(os.environ.get("LOCAL_WORLD_SIZE") or 1) > 1:
        expected = "auto, cpu or cuda under torchrun, whose ranks have a GPU each"
        raise _check.error(ValueError, "RunConfig", "device", repr(settings.device), expected)
    return resolve_device("RunConfig", settings.device)


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


def code_fingerprint() -> str:
    """SHA-256 over this package's Python files: tells versions apart, also in a checkout whose number stays the same."""
    digest = hashlib.sha256()
    root = Path(rlhf_fast.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Run:
    """One training run in one folder, from its lock to its last checkpoint.

    Use as a context manager around `for step in run.steps():`; inside, call `loss.backward()` as often as the step needs
    and `run.update()` for each optimizer step, then `run.log(...)`. An error inside saves what was done before its step, unless the
    step has changed the parameters already.

    rates: {role: peak learning rate} of the roles that train. identity: what must not change on resume (data fingerprint
    and the like), beyond the settings. state: {name: (get, set)} of further JSON state that a resume restores; read before every
    step. flags: what may change on resume, but not without a warning. buffers: {file stem: (get, set)} of further tensors.

    Under torchrun every rank has its Run. `ranks` is what they do together: each calls backward for its share of a step, with the
    denominators of the whole, and `update` adds the gradients up. The first rank alone writes.
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
        flags: Mapping[str, str] | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        self.title, self.config, self.model, self.total_steps = title, config, model, total_steps
        self.settings: RunConfig = config.run
        self.optim: OptimConfig = config.optim
        self.folder = Path(self.settings.output_dir)
        self.rates, self.state, self.buffers = dict(rates), dict(state or {}), dict(buffers or {})
        self.parameters = {f"{role}.{n}": p for role in rates for n, p in model.parameters_of(role).items()}
        groups = [
            {"params": [p for n, p in self.parameters.items() if n.startswith(f"{role}.")], "peak": rate, "lr": rate}
            for role, rate in self.rates.items()
        ]
        self.optimizer = adamw(groups, self.optim)
        self.identity = {
            "command": title,
            "base": base_fingerprint(model),
            "dtype": str(next(model.base.parameters()).dtype),
            "lora": repr(model.lora),
            "shared_layers": str(model.shared_layers),
            **identity,
            "config": config_hash(config),
        }
        device = model.backbone.device.type
        steps_on = "cpu" if isinstance(self.optimizer, HostAdamW) else device
        kinds = {"the kind of device": device, "the kind of device of the optimizer": steps_on}
        self.flags = {"the code of rlhf_fast": code_fingerprint(), **kinds, **(flags or {})}
        self.bad_steps = 0
        self.ranks = Ranks()
        """Alone, until the run begins."""
        self.records: Sequence[str] = ()
        """Where the records of the current step stand ("file:line"), for messages."""
        self._signal: int | None = None
        self._saved_at = -1
        self._step: int | None = None
        self._before: dict[str, Any] = {}
        self._updates = 0

    def __enter__(self) -> Run:
        with ExitStack() as stack:  # gives the folder back if the run cannot begin
            settings = self.settings
            self.ranks = stack.enter_context(
                join(settings.rank_timeout, settings.slow_rank, self.model.backbone.device)
            )
            text = to_yaml(self.config)
            # In this order: what names a difference best comes first.
            self.ranks.agree({**self.identity, **self.flags})
            self.ranks.agree({"settings": hashlib.sha256(text.encode()).hexdigest()})
            if self.ranks.first:
                stack.enter_context(claim_output(self.folder, resume=settings.resume, overwrite=settings.overwrite))
                self.store = CheckpointStore(self.folder / "checkpoints", keep=settings.keep)
            self.start = self._restore() if settings.resume else 0
            if self.ranks.first:
                (self.folder / "config.yaml").write_text(text, encoding="utf-8")
            monitor = Monitor(
                self.folder, self.total_steps, self.title, start_step=self.start, silent=not self.ranks.first
            )
            self.monitor = stack.enter_context(monitor)
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    before = signal.signal(number, self._on_signal)
                except ValueError:  # not the main thread
                    break
                stack.callback(signal.signal, number, before)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.ranks.fail(error)  # before anything that takes time: the others wait
            if self.ranks.first and isinstance(error, Exception) and not isinstance(error, CheckpointError):
                self._rescue(error)
        finally:
            self._stack.__exit__(kind, error, trace)  # type: ignore[arg-type]

    def _rescue(self, error: Exception) -> None:
        """Save the state before the step that failed, as far as it is still there."""
        if self._step is None or self._updates or self._step == self._saved_at:
            return
        logger.warning("%s: saving step %d before stopping", self.title, self._step)
        try:
            self._write(self._step, self._before)
        except Exception as second:  # the error that stops the run must not get lost behind this one
            logger.warning("%s: step %d could not be saved: %s", self.title, self._step, second)

    def steps(self) -> Iterator[int]:
        """Step numbers still to do; saves after each `save_every` steps, at the end, and on the first SIGTERM or SIGINT."""
        if self.start == 0:
            self.save(0)
        for step in range(self.start, self.total_steps):
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(self.optim, step / self.total_steps)
            self._step, self._before, self._updates = step, self._further_state(), 0
            self.ranks.at(step)
            self.ranks.seed(self.settings.seed, step)
            yield step
            self._step = None
            done = step + 1
            signals = [number for number in self.ranks.gather(self._signal) if number is not None]
            due = self.settings.save_every and done % self.settings.save_every == 0
            if due or done == self.total_steps or signals:
                self.save(done)
            if signals:
                self.ranks.barrier()  # torchrun ends the others when the first one is gone
                raise SystemExit(128 + signals[0])

    def shard(self, micro_batches: MicroBatches, **sizes: int) -> None:
        """Spread the frozen layers over the ranks if the settings say so.

        sizes: what a rank gets an equal share of, so that all make the same passes; micro_batches then keep their size.
        """
        if not self.config.model.shard or self.ranks.world == 1:
            return
        for name, size in sizes.items():
            if size % self.ranks.world:
                expected = f"a multiple of the {self.ranks.world} ranks with model.shard"
                raise ValueError(f"{self.title}: argument '{name}' got {size}, expected {expected}")
        micro_batches.halve = False
        micro_batches.size = min(self.ranks.gather(micro_batches.size))
        self.ranks.shard(self.model.backbone.decoder, list(self.model.backbone.layers))

    def update(self, loss: float = 0.0) -> float:
        """Add up the gradients of the ranks, clip them, take one optimizer step, clear them; returns the norm before clipping.

        loss: of the whole step, the same on every rank.
        A non-finite gradient or loss leaves every parameter and moment as it was and is told with the records of the step;
        MAX_BAD_STEPS in a row raise TrainingError.
        """
        fault_point("train.step")
        culprits = self.ranks.sum_gradients(self.parameters)
        parameters = list(self.parameters.values())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = bool(norm.isfinite()) and math.isfinite(loss)
        if finite:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.max_grad_norm, norm)
            self.optimizer.step()
            self._updates += 1
        else:
            self._tell_bad(loss, float(norm), culprits)
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise TrainingError(
                f"{self.title}: {self.bad_steps} updates in a row had a non-finite loss or gradient; lower the learning "
                f"rate, or look at the records in {self.folder / BAD_UPDATES}"
            )
        return float(norm)

    def _tell_bad(self, loss: float, norm: float, culprits: Sequence[int]) -> None:
        if not self.ranks.first:
            return
        bad = [n for n, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
        logger.warning(
            "%s: update skipped in step %s: loss %g, gradient norm %g; records %s; non-finite gradients: %s",
            *(self.title, "?" if self._step is None else self._step + 1, loss, norm, _some(self.records), _some(bad)),
        )
        if culprits:
            logger.warning("%s: the gradient was not finite on rank %s", self.title, ", ".join(map(str, culprits)))
        row = {"step": self._step, "records": list(self.records), "loss": str(loss), "grad_norm": str(norm)}
        with suppress(OSError), open(self.folder / BAD_UPDATES, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "parameters": bad}) + "\n")

    def log(self, step: int, metrics: Mapping[str, float], tokens: int, text: str = "") -> None:
        """Write metrics (by log_every) and move the progress bar; `tokens` were processed in this step."""
        self.monitor.advance(step + 1, tokens=tokens, text=text)
        skipped = {"skipped_updates": float(self.bad_steps)} if self.bad_steps else {}
        if (step + 1) % self.settings.log_every == 0 or step + 1 == self.total_steps:
            lr = {f"lr/{r}": g["lr"] for r, g in zip(self.rates, self.optimizer.param_groups, strict=True)}
            rate = {"tokens_per_second": self.monitor.tokens_per_second}
            self.monitor.log(step + 1, {**metrics, **lr, **skipped, **rate})

    def save(self, step: int) -> None:
        """A checkpoint that continues bit for bit, also with another number of ranks (but for rounding and dropout)."""
        if self.ranks.first and step != self._saved_at:
            self._write(step, self._further_state())

    def _further_state(self) -> dict[str, Any]:
        extra = {name: get() for name, (get, _) in self.state.items()}
        return {"rng": rng_state(), "bad_steps": self.bad_steps, "extra": extra}

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        tensors: dict[str, dict[str, Tensor]] = {
            "model": {name: p.detach() for name, p in self.parameters.items()},
            "optim": optimizer_tensors(self.optimizer, list(self.parameters)),
            **{stem: dict(get(step)) for stem, (get, _) in self.buffers.items()},
        }
        if self.store.save(step, tensors, {"identity": self.identity, "flags": self.flags, **state}) is not None:
            self._saved_at = step

    def _restore(self) -> int:
        found, tensors = None, {}
        if self.ranks.first:
            found = self.store.load_latest(expect={"identity": self.identity})
            if found is None:
                raise CheckpointError(f"{self.folder}: there is no checkpoint to resume from")
            tensors = {f"{stem}/{n}": x for stem, named in found.tensors.items() for n, x in named.items()}
            for name, value in self.flags.items():
                if found.state["flags"].get(name) != value:
                    logger.warning("%s: since this checkpoint was written %s has changed", found.path, name)
        # The folder need not be on every rank's machine.
        (step, state), tensors = self.ranks.share_state((found.step, found.state) if found else (0, {}), tensors)
        of = lambda stem: {n.removeprefix(stem): x for n, x in tensors.items() if n.startswith(stem)}
        model = of("model/")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(model[name])
        load_optimizer_tensors(self.optimizer, list(self.parameters), of("optim/"))
        set_rng_state(state["rng"])
        self.bad_steps = state["bad_steps"]
        for name, (_, put) in self.state.items():
            put(state["extra"][name])
        for stem, (_, put_tensors) in self.buffers.items():
            put_tensors(of(f"{stem}/"))
        self._saved_at = step
        return step

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)  # the second one: now; the last checkpoint is complete on disk
        self._signal = number


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) or "none") + rest
