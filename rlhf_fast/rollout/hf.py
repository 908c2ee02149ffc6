"""Sampling in the training process: a decode loop over the shared base."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast.model import SharedModel
from rlhf_fast.ops._matmul import matmul, pitch
from rlhf_fast.ops.sample_tokens import sample_tokens
from rlhf_fast.rollout.decoders import decoding, pack
from rlhf_fast.rollout.packed import PackedBase, Panels, packable
from rlhf_fast.rollout.streams import counter_uniform


@dataclass(frozen=True)
class Rollout:
    """Prompts (left-padded to P tokens) followed by their completions (right-padded to R tokens)."""

    input_ids: Tensor
    """(B, P + R) int64; padding holds id 0."""
    attention_mask: Tensor
    """(B, P + R) bool."""
    response_mask: Tensor
    """(B, R) bool: the sampled tokens, end-of-sequence included."""
    finished: Tensor
    """(B,) bool: the completion ended with end-of-sequence."""
    logprobs: Tensor | None = None
    """(B, R) fp32 log-probs of the sampled tokens in nats, 0 where masked: under the policy at the temperature (1 for temperature 0),
    without end-of-sequence where a shortest length holds it back."""
    entropy: Tensor | None = None
    """(B, R) fp32 entropy of that distribution, 0 where masked."""

    @property
    def prompt_length(self) -> int:
        """P."""
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """(B, R) sampled tokens."""
        return self.input_ids[:, self.prompt_length :]

    def to(self, device: torch.device) -> Rollout:
        """The same there."""
        known = {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}
        return replace(self, **{name: x.to(device) for name, x in known.items()})

    def texts(self, tokenizer) -> list[str]:  # type: ignore[no-untyped-def]
        """Completions as text, without special tokens."""
        pairs = zip(self.responses.cpu(), self.response_mask.cpu(), strict=True)
        rows = [row[m].tolist() for row, m in pairs]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)


@torch.no_grad()
def generate(
    model: SharedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    num_samples: int = 1,
    temperature: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
    role: str = "policy",
    packed: PackedRollout | None = None,
) -> Rollout:
    """Sample completions of left-padded prompts, with their log-probs.

    A prompt is read once for all its samples, and its keys and values are kept once where our attention serves the model
    (rlhf_fast.rollout.attention_of says why not). Rows that have finished leave the batch, on a device
    one step later, so that it never waits for the host. A token comes from one read of the logits (ops.sample_tokens), which are
    fp32 sums whatever the dtype of the model, as in training. On the CPU the linear layers
    run from packed weights (rollout/packed.py), a second copy of them for the time of the call; the adapter's factors are rounded
    and its product added as in training, but to sums that are rounded once less. Every sequence draws from a stream of its own:
    what it becomes depends on its prompt and seed. Where attention and every linear layer run by our kernels it has the same bits in any
    batch (mixtures of experts do not: theirs run by torch's grouped product).

    Args:
        model: the shared model; `role` says whose adapter samples.
        prompt_ids, prompt_mask: (B, P), left-padded, as from batch.pad(..., left=True).
        max_new_tokens: most tokens of a completion; the loop ends early when every row has finished.
        min_new_tokens: end-of-sequence has probability 0 before this many tokens.
        num_samples: completions n of each prompt; rows i n ... i n + n - 1 of the result are those of prompt i.
        temperature: logits are divided by it; 0 takes the most likely token.
        eos_token_id: one id or several; each ends a completion; None = completions of max_new_tokens tokens.
        generator: CPU generator of the seeds, one per sequence; None = torch's own.
        seeds: (B n,) int64 on the CPU instead: the seed of every sequence.
        packed: what PackedRollout(model) has made, to use it again; None packs for this call.

    Raises:
        TypeError, ValueError: prompts that are not left-padded, numbers out of range, or logits that are no distribution.
    """
    if max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens:
        got = f"{min_new_tokens} and {max_new_tokens}"
        raise ValueError(
            f"generate: arguments 'min_new_tokens', 'max_new_tokens' got {got}, expected 0 <= min <= max, max >= 1"
        )
    temperature = _check.number("generate", "temperature", temperature, 0.0)
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise _check.error(ValueError, "generate", "num_samples", repr(num_samples), "an integer above 0")
    if not bool(prompt_mask[:, -1].all()) or bool((prompt_mask[:, 1:] < prompt_mask[:, :-1]).any()):
        raise ValueError("generate: argument 'prompt_mask' got padding behind real tokens, expected left padding")
    (G, P), device = prompt_ids.shape, prompt_ids.device
    B, R = G * num_samples, max_new_tokens
    ends = torch.tensor(_ends(eos_token_id), dtype=torch.int64, device=device)
    uniform = None
    if temperature > 0:
        uniform = counter_uniform(_seeds(seeds, B, generator), R).to(device)
    ids = torch.cat([prompt_ids.where(prompt_mask, 0).repeat_interleave(num_samples, 0), prompt_ids.new_zeros(B, R)], 1)
    sampled = torch.zeros(B, R, dtype=torch.bool, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    logprobs, entropy = (torch.zeros(B, R, device=device) for _ in range(2))
    batch = _Batch(B, device)
    if packed is None:
        packed = PackedRollout(model)
    elif packed.model is not model:
        raise _check.error(
            ValueError, "generate", "packed", "that of another model", "PackedRollout(model) of this one"
        )
    with decoding(model, role, num_samples, R, packed.base) as decoder:
        hidden = decoder.read(ids[::num_samples, :P], prompt_mask)
        logits = packed.logits(hidden)[:, None].expand(-1, num_samples, -1)  # one row for the samples of a prompt
        for t in range(R):
            running = batch.rows
            found = sample_tokens(
                logits,
                None if uniform is None else uniform[running, t].view(logits.shape[:-1]),
                temperature=temperature,
                softcap=packed.softcap,
                banned_ids=ends if len(ends) and t < min_new_tokens else None,
            )
            tokens, live = found.token_ids.flatten(), batch.live
            ended = torch.isin(tokens, ends) & live if len(ends) else torch.zeros_like(live)
            ids[running, P + t], sampled[running, t] = tokens.where(live, 0), live
            logprobs[running, t], entropy[running, t] = (
                x.flatten().where(live, 0.0) for x in (found.logprobs, found.entropy)
            )
            finished[running] |= ended
            kept = batch.end(ended, tokens < 0)
            if t + 1 == R or not len(batch.rows):
                break
            tokens = tokens.clamp(min=0)  # a row without a token may be found out a step late
            logits = packed.logits(decoder.step(tokens if kept is None else tokens[kept], batch.rows))
        batch.settle()
    R = batch.length
    mask = torch.cat([prompt_mask.repeat_interleave(num_samples, 0), sampled[:, :R]], 1)
    return Rollout(ids[:, : P + R], mask, sampled[:, :R], finished, logprobs[:, :R], entropy[:, :R])


_ENDED, _BROKEN, _PAST = 1, 2, 3
"""What a new token is to its row: the last one, none at all, one behind the last."""


class _Batch:
    """The rows of a decode loop. A row that ends leaves as soon as the host knows.

    On the CPU that is at once. On a device the loop would have to wait for it in every step, and the device for the loop: there a
    step's ends are copied to the host behind it, and looked at when the next step has been queued. Until then a row goes on unseen,
    which changes nothing for the others.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = torch.arange(rows, device=device)
        """(A,) int64, ascending: the rows in the batch, by their number in the rollout."""
        self.live = torch.ones(rows, dtype=torch.bool, device=device)
        """(A,) bool: those that have not ended."""
        self.length = 0
        """Tokens of the longest completion, as far as the host knows."""
        self._steps = 0
        self._numbers = list(range(rows))  # `rows` on the host
        self._told: deque[tuple[_Copy, list[int], int]] = deque()  # ends of a step, its rows, its number
        self._behind = _steps_behind(device)

    def end(self, ended: Tensor, broken: Tensor) -> Tensor | None:
        """Live rows that end with this new token (A,), or have none (A,); gives the places (K,) of the rows that stay, None for all.

        Raises ValueError for a row without a token, here or in the step after.
        """
        what = torch.where(self.live, _ENDED * ended + _BROKEN * broken, _PAST)
        self.live = self.live & ~ended
        self._told.append((_Copy(what), self._numbers, self._steps))
        self._steps += 1
        if len(self._told) <= self._behind:
            return None
        over = self._look()
        kept = [i for i, row in enumerate(self._numbers) if row not in over]
        if len(kept) == len(self._numbers):
            return None
        self._numbers = [self._numbers[i] for i in kept]
        places = torch.tensor(kept, dtype=torch.int64).to(self.rows.device, non_blocking=True)
        self.rows, self.live = self.rows[places], self.live[places]
        return places

    def settle(self) -> None:
        """Look at what is left to look at."""
        while self._told:
            self._look()

    def _look(self) -> set[int]:
        """The rows that the earliest step not looked at leaves ended."""
        copy, rows, t = self._told.popleft()
        what = copy.wait()
        if _BROKEN in what:
            row = rows[what.index(_BROKEN)]
            raise ValueError(f"generate: the logits of row {row} at new token {t} are NaN or infinite")
        if any(x != _PAST for x in what):
            self.length = t + 1
        return {row for row, x in zip(rows, what, strict=True) if x}


class _Copy:
    """A vector on its way to the host, behind what its device has queued."""

    def __init__(self, x: Tensor) -> None:
        self.done: torch.cuda.Event | None = None
        self.there = x.to("cpu", non_blocking=x.is_cuda)  # pinned, so that nobody waits here
        if x.is_cuda:
            self.done = torch.cuda.Event()
            self.done.record(torch.cuda.current_stream(x.device))

    def wait(self) -> list[int]:
        if self.done is not None:
            self.done.synchronize()
        return self.there.tolist()


def _steps_behind(device: torch.device) -> int:
    """How many steps the host is behind a device when it looks what has ended."""
    return 0 if device.type == "cpu" else 1


class PackedRollout:
    """What rollouts of a frozen base prepare: its linear layers and its LM head packed for the CPU kernel, and how its logits are made.

    Holds a second copy of the base's weights while it lives. Adapters may change between rollouts, the base may not.
    """

    def __init__(self, model: SharedModel) -> None:
        self.model = model
        self.base: PackedBase | None = pack(model)
        self.head: Panels | None = None
        self.bias: Tensor | None = None
        self.softcap: float | None = None
        self.plain = True
        """Whether the logits are a scaled and capped product with the LM head's weight."""
        try:
            weight, self.softcap, self.scale = model.head_weight.detach(), model.final_softcap, model.logit_scale
        except ValueError:
            self.plain = False
            return
        if model.head_bias is not None:
            self.bias = model.head_bias.detach().float() * self.scale
        if self.base is not None and packable(weight) and (weight.shape[1] % 2 == 0 or weight.dtype is torch.float32):
            self.head = Panels([weight])

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, V) of hidden (rows, H), before the soft-cap; fp32 (fp64 for fp64) sums where they are a plain product."""
        if not self.plain:
            return self.model.backbone.logits(hidden[:, None])[:, 0]
        if self.head is not None:
            return self.head.multiply(hidden, torch.float32, bias=self.bias, scale=self.scale)
        weight = self.model.head_weight
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        V = weight.shape[0]
        out = torch.empty(len(hidden), pitch(V), dtype=dtype, device=hidden.device)[:, :V]
        if self.scale != 1.0:
            hidden = hidden * self.scale
        bias = None if self.bias is None else self.bias.to(dtype)
        matmul(hidden, weight.t(), out, bias=bias, narrow=hidden.dtype is weight.dtype is torch.bfloat16)
        return out


def _ends(eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _seeds(seeds: Tensor | None, count: int, generator: torch.Generator | None) -> Tensor:
    if seeds is None:
        return torch.randint(2**63 - 1, (count,), generator=generator)
    _check.integer("generate", "seeds", seeds)
    if tuple(seeds.shape) != (count,):
        expected = f"({count},), one per completion"
        raise _check.error(ValueError, "generate", "seeds", f"shape {tuple(seeds.shape)}", expected)
    return seeds.to("cpu", torch.int64)
