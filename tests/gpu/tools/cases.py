"""Small seeded calls of every public op: what the compiled kernels are executed on, audited for and mutated under.

A case names the tensors (from the reference's own samples), the keywords, and which inputs get a gradient. Its results are every
output and every gradient, by name, whatever the op returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from gpu.tools.on_cpu import on_cpu
from parity import assert_parity, double
from torch import Tensor

import rlhf_fast
from rlhf_fast._op import OPS
from rlhf_fast._types import LossOutput
from rlhf_fast.reference import (
    advantages,
    cached_attention,
    dpo_loss,
    gae,
    group_advantages,
    kl_estimate,
    linear_ppo_loss,
    linear_token_logprobs,
    lora_linear,
    ppo_loss,
    reward_loss,
    sample_tokens,
    token_logprobs,
    whiten,
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    inputs: Callable[[], Tensors]
    leaves: tuple[str, ...] = ()
    """Inputs that get a gradient."""
    options: dict[str, Any] = field(default_factory=dict)
    function: Callable[..., Any] | None = None
    """What is called, where it is not the public function of the op."""

    @property
    def audited(self) -> bool:
        """Has code of its own. The others share theirs with one that has, up to a coefficient, a sign or the name of a type."""
        return self.name not in _LIKE_ANOTHER

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def results(self, inputs: Tensors) -> Tensors:
        """Every output, and as "d <leaf>" the gradients of a sum of the outputs under fixed random weights."""
        held = {k: v.detach().requires_grad_() if k in self.leaves else v for k, v in inputs.items()}
        found = _named((self.function or getattr(rlhf_fast, self.op))(**held, **self.options))
        g = torch.Generator().manual_seed(7)
        total = torch.zeros((), dtype=torch.float64)
        for x in found.values():
            if x.requires_grad:
                total = total + (x.double() * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum()
        if self.leaves:
            grads = torch.autograd.grad(total, [held[k] for k in self.leaves])
            found |= {f"d {k}": v for k, v in zip(self.leaves, grads, strict=True)}
        return {k: v.detach() for k, v in found.items()}

    def kernels(self, inputs: Tensors) -> Tensors:
        """The results of the Triton cells on CPU tensors. Fails when an input was changed."""
        before = {k: v.clone() for k, v in inputs.items()}
        with on_cpu("triton"):
            found = self.results(inputs)
        for k, v in inputs.items():
            assert torch.equal(v.nan_to_num(7.0), before[k].nan_to_num(7.0)), f"{self}: {k} was changed"
        return found

    def masked(self, inputs: Tensors) -> Iterator[tuple[Tensor, Tensor]]:
        """(input, where the mask hides it): what no kernel may read."""
        if self.op == "dpo_loss":
            yield from _masked_answers(inputs)
        mask = inputs.get("mask")
        if mask is None:
            return
        if self.op == "advantages":  # where some dialects have a value and the score
            mask = advantages.with_slot_after(mask, inputs.get("cu_seqlens"))
        for name, x in inputs.items():
            if name not in ("mask", "cu_seqlens") and x.shape[: mask.dim()] == mask.shape:
                yield x, ~mask

    def expected(self, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """(in fp64, in the dtype at hand) by the reference."""
        options = double(self.options)
        with rlhf_fast.use_backend("reference"):
            plain = self.results(inputs)
            truth = replace(self, options=options).results(double(inputs))
        return truth, plain

    def check(self, got: Tensors, expected: tuple[Tensors, Tensors]) -> None:
        truth, plain = expected
        assert got.keys() == truth.keys()
        for name, value in got.items():
            # What is left of a difference says nothing of the size of its terms, which is that of a nat or of a variance.
            least = 1.0 if name in _DIFFERENCES else 0.0
            scale = max(least, *truth[name].nan_to_num(0, 0, 0).abs().flatten().tolist(), 0.0)
            assert_parity(value, truth[name], plain[name], f"{self}: {name}", scale)


_DIFFERENCES = ("logprobs", "entropy", "kl", "loss", "policy_loss", "explained_variance")


_LIKE_ANOTHER = (
    *("fp16-reference", "fp16-cap", "fp32-cap", "fp32-reference", "fp32-reference-tiles", "shifted", "one-class"),
    *("fp32-hidden", "fp32-hidden-weight-bias", "trained", "fp16-adapters"),
    *("abs", "k2", "k3+", "no-mask", "shift-False", "openrlhf", "no-reference"),
    *("token-sum", "seq-mean-token-sum", "verl", "normalizer", "dr_grpo", "rloo", "opo"),
    *("robust", "means"),
)
"""Cases whose kernels are executed, but not audited on six targets."""


def _named(out: Any) -> Tensors:
    if isinstance(out, Tensor):
        return {"result": out}
    if isinstance(out, LossOutput):
        return {"loss": out.loss, **dict(out.stats.items())}
    names = getattr(out, "_fields", [f"result {i}" for i in range(len(out))])
    return {name: x for name, x in zip(names, out, strict=True) if x is not None}


def triton_ops() -> list[str]:
    """Public ops whose forward has a Triton cell."""
    names = [name for name in OPS if not name.endswith("_backward")]
    return [name for name in names if any(cell.name == "triton" for cell in OPS[name].backends)]


@contextmanager
def as_arch(name: str) -> Iterator[None]:
    """Launchers that look their sizes up by architecture find those of `name` for CPU tensors."""
    modules = [m for k, m in sys.modules.items() if k.startswith("rlhf_fast.kernels") and hasattr(m, "arch_of")]
    before = [m.arch_of for m in modules]
    for module in modules:
        module.arch_of = lambda x: name  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.arch_of = value  # type: ignore[attr-defined]


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _logits(
    shape: tuple[int, ...],
    vocab: int,
    dtype: torch.dtype,
    *,
    ref: bool = False,
    masked: bool = True,
    pad: int = 0,
    **more: Tensor,
) -> Callable[[], Tensors]:
    """pad: elements between the rows, which hold NaN."""

    def inputs() -> Tensors:
        found = token_logprobs.sample(shape, vocab, dtype=dtype, ref=ref)
        found["token_ids"] = found["token_ids"].clamp_min(0)
        if masked:
            found["mask"][...], found["mask"].view(-1)[1:2] = True, False
            found["token_ids"][~found["mask"]] = -100
        else:
            del found["mask"]
        for name in ("logits", "ref_logits"):
            if pad and name in found:
                wide = torch.full((*shape, vocab + pad), float("nan"), dtype=dtype)
                wide[..., :vocab] = found[name]
                found[name] = wide[..., :vocab]
        return {**found, **more}

    return inputs


def _shifted(shape: tuple[int, int], vocab: int, dtype: torch.dtype) -> Callable[[], Tensors]:
    """logits[:, :-1] of (B, T, V): two levels of strides."""

    def inputs() -> Tensors:
        B, T = shape
        found = token_logprobs.sample((B, T + 1), vocab, dtype=dtype, ref=False)
        return {"logits": found["logits"][:, :-1], "token_ids": found["token_ids"][:, 1:].contiguous().clamp_min(0)}

    return inputs


def _packed(inputs: Callable[[], Tensors], lengths: list[int], per_row: tuple[str, ...] = ()) -> Callable[[], Tensors]:
    """(B, T) tensors as one run of tokens; row b keeps lengths[b] of them."""

    def packed() -> Tensors:
        found = inputs()
        T = found["mask"].shape[1]
        inside = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
        found = {k: v[inside] if v.dim() == 2 else v for k, v in found.items()}
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return {**found, "cu_seqlens": bounds}

    return packed


def _without(inputs: Callable[[], Tensors], *names: str) -> Callable[[], Tensors]:
    return lambda: {k: v for k, v in inputs().items() if k not in names}


def _with_ties() -> Tensors:
    """Log-ratios of 0 among others, where |x| has no derivative and gets 0."""
    found = kl_estimate.sample((5, 37))
    found["logprobs"][:, ::4] = found["ref_logprobs"][:, ::4]
    return found


def _token_logprobs() -> Iterator[Case]:
    leaf = ("logits",)
    for dtype, name in ((FP32, "fp32"), (BF16, "bf16"), (FP16, "fp16")):
        yield Case("token_logprobs", f"{name}-aligned", _logits((3,), 2048, dtype, masked=False), leaf)
        yield Case("token_logprobs", f"{name}-odd", _logits((3,), 1003, dtype), leaf)
        yield Case("token_logprobs", f"{name}-reference", _logits((3,), 1003, dtype, ref=True), leaf)
        options = {"softcap": 5.0, "temperature": 0.7}
        yield Case("token_logprobs", f"{name}-cap", _logits((3,), 515, dtype, ref=True), leaf, options)
    temperature = torch.tensor([0.5, 1.0, 2.0])
    yield Case("token_logprobs", "temperatures", _logits((3,), 1024, BF16, temperature=temperature), leaf)
    yield Case("token_logprobs", "padded", _logits((3,), 1003, BF16, ref=True, pad=21), leaf)
    yield Case("token_logprobs", "shifted", _shifted((2, 2), 1003, BF16), leaf)
    yield Case("token_logprobs", "one-class", _logits((3,), 1, BF16), leaf)
    yield Case("token_logprobs", "fp32-reference-tiles", _logits((3,), 3077, FP32, ref=True), leaf)
    yield Case("token_logprobs", "large", _logits((2,), 20_001, BF16, masked=False), leaf)
    yield Case("token_logprobs", "large-fp32", _logits((2,), 10_240, FP32, masked=False), leaf)


def _sampled() -> Iterator[Case]:
    def rows(vocab: int, dtype: torch.dtype, *names: str, **more: Tensor) -> Callable[[], Tensors]:
        found = sample_tokens.sample((4,), vocab, dtype=dtype)
        return lambda: {**{k: v for k, v in found.items() if k in ("logits", *names)}, **more}

    def shared() -> Tensors:
        """The samples of a prompt have one row of logits, and those of prompts lie apart."""
        found = sample_tokens.sample((2, 3), 1003, dtype=BF16)
        wide = torch.full((2, 2, 1003), float("nan"), dtype=BF16)
        wide[:, 0] = found["logits"][:, 0]
        return {**found, "logits": wide[:, :1].expand(2, 3, 1003)}

    def last() -> Tensors:
        """The largest number below 1: some sums in fp32 stay below their share of the whole, and the last class is taken all the same."""
        found = sample_tokens.sample((8,), 20_001, dtype=FP32)
        found["logits"][..., -1] = found["logits"].logsumexp(-1)
        return {"logits": found["logits"], "uniform": torch.full((8,), 1 - 2.0**-53, dtype=torch.float64)}

    some = torch.tensor([True, False, True, True])
    for dtype, name in ((FP32, "fp32"), (BF16, "bf16"), (FP16, "fp16")):
        yield Case("sample_tokens", f"{name}-aligned", rows(2048, dtype, "uniform"))
        yield Case("sample_tokens", f"{name}-odd", rows(1003, dtype, "uniform", mask=some))
    options = {"softcap": 5.0, "temperature": 0.7}
    yield Case("sample_tokens", "cap", rows(1503, BF16, "uniform", mask=some), options=options)
    temperature = torch.tensor([0.5, 1.0, 0.0, 2.0])
    yield Case("sample_tokens", "temperatures", rows(1503, BF16, "uniform", temperature=temperature, mask=some))
    yield Case("sample_tokens", "greedy", rows(2503, FP32), options={"temperature": 0.0})
    banned = torch.tensor([2502, 0, 1023, 1024, 77])
    yield Case("sample_tokens", "banned", rows(2503, BF16, "uniform", banned_ids=banned, mask=some))
    yield Case("sample_tokens", "shared", shared)
    yield Case("sample_tokens", "one-class", rows(1, BF16, "uniform"))
    yield Case("sample_tokens", "large", rows(20_001, BF16, "uniform"))
    yield Case("sample_tokens", "large-aligned", rows(20_000, FP32, "uniform"))
    yield Case("sample_tokens", "last", last)


def _linear() -> Iterator[Case]:
    for dtype, name in ((FP32, "fp32"), (BF16, "bf16")):
        for trained in (("hidden",), ("hidden", "weight", "bias")):
            inputs = lambda dtype=dtype: linear_token_logprobs.sample((2, 3), 515, 32, dtype=dtype)
            yield Case("linear_token_logprobs", f"{name}-{'-'.join(trained)}", inputs, trained, {"chunk_bytes": 8192})
    inputs = lambda: linear_token_logprobs.sample((1, 3), 4100, 8)  # several warps write over the logits
    yield Case("linear_token_logprobs", "large", inputs, ("hidden", "weight"))
    inputs = lambda: linear_ppo_loss.sample((2, 3), 515, 32)
    options = {"entropy_coef": 0.01, "kl_coef": 0.1, "chunk_bytes": 8192}
    yield Case("linear_ppo_loss", "frozen", inputs, ("hidden",), options)
    yield Case("linear_ppo_loss", "trained", inputs, ("hidden", "weight", "bias", "values"), options)


def _lora() -> Iterator[Case]:
    leaves = ("x", "lora_a", "lora_b")

    def of(
        name: str, rows: int, inner: int, outer: int, ranks: tuple[int, ...], dtype: torch.dtype, *also: str
    ) -> Case:
        whole = lora_linear.sample(rows, inner, outer, ranks, dtype=dtype)
        options = {k: v for k, v in whole.items() if not isinstance(v, Tensor)}

        def inputs() -> Tensors:
            found = {k: v for k, v in whole.items() if isinstance(v, Tensor)}
            if also:  # factors of other strides, which read something else
                found["lora_input"] = found["x"].flip(0)
                found |= {k: found[k].t().contiguous().t() for k in ("lora_a", "lora_b")}
            return found

        return Case("lora_linear", name, inputs, (*leaves, *also), {} if len(ranks) == 1 else options)

    yield of("one", 35, 65, 35, (5,), FP32)
    yield of("fp32-adapters", 96, 64, 128, (16, 40), FP32)
    yield of("bf16-adapters", 96, 64, 128, (16, 40), BF16)
    yield of("fp16-adapters", 70, 65, 33, (5, 3), FP16)
    yield of("strided", 70, 65, 66, (5, 33), BF16, "lora_input")


def _attending() -> Iterator[Case]:
    """Keys of less than a part and of several, of the prompt alone and of the slot alone, odd and wide heads."""

    def of(name: str, shape: tuple[int, ...], lengths: tuple[int, int], dtype: torch.dtype, **options: Any) -> Case:
        drop = options.pop("drop", "-")

        def inputs() -> Tensors:
            found = cached_attention.sample(3, *shape, prompt_length=lengths[0], room=lengths[1], dtype=dtype)
            slots = ("keys", "values", "rows", "lengths")
            return {k: v for k, v in found.items() if not (k in slots if drop == "slots" else k.startswith(drop))}

        return Case("cached_attention", name, inputs, options=options)

    yield of("fp32", (6, 2, 24, 40), (40, 9), FP32)
    yield of("bf16", (6, 2, 64, 64), (300, 20), BF16)
    yield of("fp16-odd", (3, 3, 24, 33), (20, 270), FP16)
    yield of("window", (4, 2, 32, 32), (40, 300), BF16, window=70, softcap=2.0)
    yield of("prompts-alone", (4, 1, 128, 128), (40, 0), BF16, drop="slots")
    yield of("slots-alone", (20, 1, 32, 32), (2, 40), BF16, drop="prefix")

    # With no place, the last of a part and the first of the next; and places of the sample. Prompts of several tiles of keys.
    for name, shape, room, held, dtype in (
        ("step", (6, 2, 64, 64), 300, [0, 256, 257], BF16),
        ("step-odd", (3, 3, 24, 33), 270, None, FP16),
    ):

        def inputs(
            shape: tuple = shape, room: int = room, held: list | None = held, dtype: torch.dtype = dtype
        ) -> Tensors:
            found = cached_attention.sample(3, *shape, prompt_length=70, room=room, dtype=dtype)
            new = cached_attention.sample(3, *shape, dtype=dtype, seed=1)
            new = {f"new_{k}": new[f"prefix_{k}"][:, :, 0] for k in ("keys", "values")}
            return {**found, **new, "lengths": found["lengths"] if held is None else torch.tensor(held)}

        yield Case("cached_attention", name, inputs, function=_step)


def _step(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
    """A decode step as rollouts take it: the tokens' keys and values are written to copies of the cache, and attended to."""
    keys, values, query = keys.clone(), values.clone(), rest["query"]
    shared = (rest[f"prefix_{k}"] for k in ("keys", "values", "rows", "start", "stop"))
    arguments = [query, keys, values, rest["rows"], rest["lengths"], *shared, query.shape[2] ** -0.5, 0.0, 0]
    cell = OPS["cached_attention"].select("cpu")
    if cell.name == "reference":
        for x, new in ((keys, new_keys), (values, new_values)):
            there = rest["lengths"] > 0
            x[rest["rows"][there], :, rest["lengths"][there] - 1] = new[there]
        out = cell.fn(*arguments)
    else:
        out = cell.fn(*arguments, new_keys, new_values)
    return out, keys, values


def _per_token() -> Iterator[Case]:
    both = ("logprobs", "ref_logprobs")
    for kind in ("k1", "k2", "k3", "abs", "k3+"):
        inputs = _with_ties if kind == "abs" else lambda: kl_estimate.sample((5, 37))
        yield Case("kl_estimate", kind, inputs, both, {"kind": kind, "clamp": (5.0, 3.0)})
    yield Case("kl_estimate", "bf16", lambda: kl_estimate.sample((3, 70), dtype=BF16), both, {"kind": "k3"})
    yield Case("kl_estimate", "no-mask", _without(lambda: kl_estimate.sample((3, 70)), "mask"), both)

    leaves = ("rewards", "values", "bootstrap")
    for gap in ("carry", "decay"):
        yield Case("gae", gap, lambda: gae.sample((5, 37)), leaves, {"gap": gap, "gamma": 0.97, "lam": 0.9})
    yield Case("gae", "long", lambda: gae.sample((2, 1500)), leaves)
    yield Case("gae", "bf16", lambda: gae.sample((3, 129), dtype=BF16), leaves)
    yield Case("gae", "no-mask", _without(lambda: gae.sample((3, 64)), "mask", "bootstrap"), leaves[:2])
    packed = _packed(lambda: gae.sample((5, 40)), [40, 0, 5, 1, 33])
    yield Case("gae", "packed", packed, leaves, {"gamma": 0.97})

    leaves = ("scores", "values", "logprobs", "ref_logprobs", "bootstrap")
    for dialect in ("rlhf_fast", "trl", "openrlhf"):
        options = {"kl_coef": 0.3, "kl_kind": "k3", "gamma": 0.97, "dialect": dialect}
        yield Case("advantages", dialect, lambda: advantages.sample((6, 41)), leaves, options)
    options = {"kl_coef": 0.2, "whiten": False}
    yield Case("advantages", "token-scores", lambda: advantages.sample((4, 70), token_scores=True), leaves, options)
    yield Case("advantages", "long", lambda: advantages.sample((3, 1300)), leaves, {"kl_coef": 0.2})
    plain = _without(lambda: advantages.sample((4, 70)), "logprobs", "ref_logprobs", "bootstrap")
    yield Case("advantages", "no-reference", plain, leaves[:2])
    packed = _packed(lambda: advantages.sample((5, 40)), [40, 0, 5, 1, 33])
    yield Case("advantages", "packed", packed, leaves, {"kl_coef": 0.2})

    for shift in (True, False):
        yield Case("whiten", f"shift-{shift}", lambda: whiten.sample((6, 37)), ("x",), {"shift_mean": shift})
    yield Case("whiten", "three-parts", lambda: whiten.sample((9000,)), ("x",))
    yield Case("whiten", "unmasked", _without(lambda: whiten.sample((9000,)), "mask"), ("x",), {"unbiased": False})

    leaves = ("logprobs", "entropy", "values")
    options = {"entropy_coef": 0.01, "kl_coef": 0.1, "dual_clip": 1.5}
    for reduction in ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"):
        yield Case("ppo_loss", reduction, lambda: ppo_loss.sample((7, 41)), leaves, {**options, "reduction": reduction})
    core = _without(lambda: ppo_loss.sample((4, 300)), *("entropy", "ref_logprobs", "values", "old_values", "returns"))
    yield Case("ppo_loss", "policy", core, leaves[:1])
    recipe = lambda name, **options: partial(rlhf_fast.policy_loss, name, **options)
    yield Case("ppo_loss", "cispo", core, leaves[:1], function=recipe("cispo", clip=(0.2, 0.1)))
    policy = lambda *shape: _without(lambda: ppo_loss.sample(shape), "values", "old_values", "returns")
    weighed = _without(policy(3, 600), "entropy", "ref_logprobs")  # rows of two blocks
    yield Case("ppo_loss", "row-ratio", weighed, leaves[:1], function=recipe("gspo", clip=(0.1, 0.05)))
    packed = _packed(core, [300, 0, 17, 1])
    yield Case("ppo_loss", "row-ratio-token", packed, leaves[:1], function=recipe("gspo_token", clip=(0.1, 0.05)))
    product = recipe("rloo", entropy_coef=0.01, kl_coef=0.1)
    yield Case("ppo_loss", "row-product", policy(7, 41), leaves[:2], function=product)
    yield Case("ppo_loss", "score", core, leaves[:1], function=recipe("gpg"))
    packed = _packed(lambda: ppo_loss.sample((5, 60)), [60, 0, 17, 1, 60])
    yield Case("ppo_loss", "packed", packed, leaves, {**options, "reduction": "seq-mean-token-mean"})
    yield Case("ppo_loss", "verl", lambda: ppo_loss.sample((4, 300)), leaves, {**options, "dialect": "verl"})
    yield Case("ppo_loss", "normalizer", lambda: ppo_loss.sample((4, 300)), leaves, {**options, "normalizer": 77.0})

    for kind in ("grpo", "dr_grpo", "rloo", "reinforce++", "opo", "remax", "pass@k"):
        inputs = _without(
            lambda: group_advantages.sample(60),
            *(() if kind == "opo" else ("lengths",)),
            *(() if kind == "remax" else ("greedy_scores",)),
        )
        yield Case("group_advantages", kind, inputs, ("scores",), {"kind": kind})
    options = {"center_coef": 0.1, "label_smoothing": 0.1}
    for name, n in (("all", 77), ("three-parts", 2500)):
        inputs = lambda n=n: reward_loss.sample(n)
        yield Case("reward_loss", name, inputs, ("chosen_scores", "rejected_scores"), options)


def packed_answers(x: Tensors, chosen: list[int], rejected: list[int]) -> Tensors:
    """Pairs of `dpo_loss` with the first so many tokens of every answer, one after the other; no mask of tokens."""
    found = {k: v for k, v in x.items() if v.dim() == 1}
    for side, lengths in (("chosen", chosen), ("rejected", rejected)):
        inside = torch.arange(x[f"{side}_logprobs"].shape[1]) < torch.tensor(lengths)[:, None]
        found |= {k: x[k][inside] for k in (f"{side}_logprobs", f"ref_{side}_logprobs")}
        found[f"{side}_cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    return found


def _masked_answers(x: Tensors) -> Iterator[tuple[Tensor, Tensor]]:
    for side in ("chosen", "rejected"):
        if f"{side}_mask" in x:
            yield from ((v, ~x[f"{side}_mask"]) for k, v in x.items() if k.endswith(f"{side}_logprobs"))


def _pairs() -> Iterator[Case]:
    leaves = ("chosen_logprobs", "rejected_logprobs")
    masked = lambda: dpo_loss.sample((5, 33))
    yield Case("dpo_loss", "masked", masked, leaves, {"label_smoothing": 0.1})
    # Two blocks of tokens, an answer of none, and one past the other's end; a cell for each of the curves.
    lengths = [2100, 0, 700], [1, 2049, 300]
    packed = lambda: packed_answers(dpo_loss.sample((3, 2100)), *lengths)
    yield Case("dpo_loss", "packed", packed, leaves, {"average": True})
    unmasked = _without(masked, "chosen_mask", "rejected_mask", "mask", "weights")
    for kind in ("ipo_norm", "hinge", "robust"):
        options = {"kind": kind, "beta": 0.3, **({"label_smoothing": 0.2} if kind == "robust" else {})}
        yield Case("dpo_loss", kind, unmasked, leaves, options, rlhf_fast.preference_loss)
    policy = _without(masked, "ref_chosen_logprobs", "ref_rejected_logprobs")
    yield Case("dpo_loss", "simpo", policy, leaves, {"kind": "simpo", "gamma": 0.5}, rlhf_fast.preference_loss)
    yield Case("dpo_loss", "one-side", masked, leaves[1:], {"normalizer": 7.0})
    tensor = lambda: {**masked(), "normalizer": torch.tensor(3.0)}
    yield Case("dpo_loss", "bf16", lambda: dpo_loss.sample((5, 40), dtype=BF16), leaves)
    yield Case("dpo_loss", "normalizer", tensor, leaves)
    # So many parts that some wait for the pairs to be counted. Two pairs a part, and one in the last.
    yield Case("dpo_loss", "means", lambda: dpo_loss.sample((40, 5)), leaves, {"average": True})
    yield Case("dpo_loss", "large", lambda: dpo_loss.sample((1031, 2)), leaves, {"average": True})


CASES = [*_token_logprobs(), *_sampled(), *_linear(), *_lora(), *_attending(), *_per_token(), *_pairs()]


def cases_of(*ops: str) -> list[Case]:
    return [case for case in CASES if case.op in ops]
