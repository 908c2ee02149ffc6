"""Tiny language models trained from nothing, for code paths that need a *learned* model and not a good one.

Two recipes. :data:`REVIEW_RECIPE` (2.2M parameters) gives review-shaped English after minutes of film
reviews: the base of a demonstration without the large download. :data:`TEST_RECIPE` (0.1M) learns the prose
that ships with Python in seconds, without any download: the base of tests that must see a loss fall or a
reward rise.

Both are ordinary Llama checkpoints in a Hugging Face folder with a byte-level BPE tokenizer of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

__all__ = [
    "REVIEW_RECIPE",
    "TEST_RECIPE",
    "TinyRecipe",
    "TinyResult",
    "pretrain_tiny",
    "python_prose",
    "tiny_model_folder",
]

_END = "<|endoftext|>"
_PAD = "<|pad|>"
_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_DONE = "pretraining.json"


@dataclass(frozen=True)
class TinyRecipe:
    """Shape and optimisation of a tiny model. ``window``: tokens per training row."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    batch_size: int
    window: int
    muon_lr: float = 0.02
    adamw_lr: float = 4e-3
    warmup: float = 0.05


REVIEW_RECIPE = TinyRecipe(
    vocab_size=2048,
    hidden_size=192,
    layers=4,
    heads=4,
    intermediate_size=512,
    batch_size=32,
    window=128,
)
TEST_RECIPE = TinyRecipe(
    vocab_size=512,
    hidden_size=64,
    layers=2,
    heads=4,
    intermediate_size=160,
    batch_size=16,
    window=64,
    muon_lr=0.03,
    adamw_lr=1e-2,
)


@dataclass(frozen=True)
class TinyResult:
    """What pretraining did. Losses are nats per token on texts it never trained on; ``tokens`` trained on."""

    folder: Path
    parameters: int
    steps: int
    tokens: int
    seconds: float
    loss_before: float
    loss_after: float
    bits_per_byte: float


def pretrain_tiny(
    folder: Path,
    texts: Sequence[str],
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    recipe: TinyRecipe = REVIEW_RECIPE,
    on_step: Callable[[int, float, float], None] | None = None,
) -> TinyResult:
    """Train a tokenizer and a Llama on ``texts`` and save both to ``folder``, which appears only when
    complete.

    Give either ``steps`` (the same weights every time on one machine and thread count) or ``seconds`` of
    training. One text in 50 is held out for the losses. Hidden matrices train with Muon, the rest with AdamW,
    both with a warm-up and a linear decay to zero. ``on_step(step, share_done, loss)`` is called after every
    step.

    Raises ``ValueError`` if both or neither of ``seconds`` and ``steps`` are given, or if there is too little
    text.
    """
    if (seconds is None) == (steps is None) or (seconds or steps or 0) <= 0:
        raise ValueError(f"pretrain_tiny: give seconds or steps, and a positive one, got {seconds}, {steps}")
    folder = Path(folder)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    held_out = max(1, len(texts) // 50)
    tokenizer = _train_tokenizer([texts[i] for i in order[held_out:]], recipe.vocab_size)
    train = _stream(tokenizer, [texts[i] for i in order[held_out:]])
    validation_texts = [texts[i] for i in order[:held_out]]
    validation = _stream(tokenizer, validation_texts)
    if min(len(train), 8 * len(validation)) < 4 * recipe.window:
        raise ValueError(
            f"pretrain_tiny: too little text, {len(train)} tokens to train on and {len(validation)} held out "
            f"for windows of {recipe.window}"
        )

    model = _build(recipe, tokenizer, seed)
    before = _loss_on(model, validation, recipe)
    started = time.monotonic()
    step = _train(model, train, recipe, generator, seconds, steps, on_step)
    elapsed = time.monotonic() - started
    after = _loss_on(model, validation, recipe)
    text_bytes = sum(len(text.encode()) for text in validation_texts)
    result = TinyResult(
        folder=folder,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=step,
        tokens=step * recipe.batch_size * recipe.window,
        seconds=elapsed,
        loss_before=before,
        loss_after=after,
        bits_per_byte=after / math.log(2) * len(validation) / text_bytes,
    )
    record = {**asdict(result), "folder": folder.name, "recipe": asdict(recipe), "seed": seed}
    _save(folder, model, tokenizer, record)
    return result


def tiny_model_folder(cache: Path, *, steps: int = 250) -> Path:
    """Folder of a 0.1M-parameter model that has learned some English; trained on first use, then reused.

    About ten seconds on two cores, no download: the text is the language reference that comes with Python.
    The folder name carries a fingerprint of recipe and text, so a change of either trains again.
    """
    texts = python_prose()
    recipe = json.dumps([asdict(TEST_RECIPE), steps, _CHAT_TEMPLATE]).encode()
    fingerprint = hashlib.sha256(recipe + "\0".join(texts).encode()).hexdigest()[:12]
    folder = Path(cache) / f"tiny-{fingerprint}"
    if not (folder / _DONE).is_file():
        threads = torch.get_num_threads()
        # One thread: the matrices are too small to share, and the weights then do not depend on the machine's
        # cores.
        torch.set_num_threads(1)
        try:
            pretrain_tiny(folder, texts, steps=steps, recipe=TEST_RECIPE)
        finally:
            torch.set_num_threads(threads)
    return folder


def python_prose() -> list[str]:
    """Paragraphs of the Python language reference as shipped in ``pydoc_data``, code listings left out."""
    from pydoc_data import topics

    paragraphs = []
    for name in sorted(topics.topics):
        for block in topics.topics[name].split("\n\n"):
            # Indented blocks are listings and tables; short ones are headings and list markers.
            text = " ".join(block.split())
            if not block.startswith("   ") and len(text) >= 80:
                paragraphs.append(text)
    return list(dict.fromkeys(paragraphs))


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _END, _TURN_START, _TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=[_TURN_START, _TURN_END],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def _stream(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """(tokens,) int64: all texts, each closed by the end token."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    flat = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
    return torch.tensor(flat, dtype=torch.int64)


def _build(recipe: TinyRecipe, tokenizer: Any, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    # The caller's random stream is left as it was found.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _train(
    model: Any,
    stream: torch.Tensor,
    recipe: TinyRecipe,
    generator: torch.Generator,
    seconds: float | None,
    steps: int | None,
    on_step: Callable[[int, float, float], None] | None,
) -> int:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    hidden = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in hidden]
    # Three Newton-Schulz steps instead of five: the same loss here, and on CPUs without bfloat16 instructions
    # five of them are a third of the time of a step.
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0, ns_steps=3),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [recipe.muon_lr, recipe.adamw_lr]
    model.train()
    started = time.monotonic()
    step, done = 0, 0.0
    while done < 1.0:
        scale = min((done + 1e-3) / recipe.warmup, (1.0 - done) / (1.0 - recipe.warmup), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        starts = torch.randint(len(stream) - recipe.window, (recipe.batch_size, 1), generator=generator)
        rows = stream[starts + torch.arange(recipe.window + 1)]
        loss = _loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        done = step / steps if steps else (time.monotonic() - started) / (seconds or 1.0)
        if on_step is not None:
            on_step(step, min(done, 1.0), loss.item())
    return step


def _loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy of (B, window + 1) rows, nats."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def _loss_on(model: Any, stream: torch.Tensor, recipe: TinyRecipe, limit: int = 64) -> float:
    model.eval()
    width = min(recipe.window + 1, len(stream))
    rows = stream[: len(stream) // width * width].view(-1, width)[:limit]
    total = sum(_loss(model, part).item() * len(part) for part in rows.split(recipe.batch_size))
    return total / len(rows)


def _save(folder: Path, model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pretrain-") as scratch:
        built = Path(scratch) / "model"
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        (built / _DONE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(Path(scratch) / "outdated")
        built.rename(folder)
