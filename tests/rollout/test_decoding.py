"""Rollouts against transformers' generate and against a teacher-forced pass, for every architecture of tests/model/tiny.py."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import tolerances
import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.batch import pad
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.rollout import PackedRollout, Rollout, attention_of, decoders, generate, hf

sys.path.insert(0, str(Path(__file__).parent.parent / "model"))
from tiny import FAMILIES, VOCABULARY, disturb, tiny_base

OWN_ATTENTION = ("bloom", "falcon")
OURS = tuple(family for family in FAMILIES if family not in OWN_ATTENTION)
SAME_BITS = tuple(family for family in OURS if family != "qwen3_moe")  # experts run by torch's grouped product
PROMPTS = [[5, 9, 12, 30, 8, 7], [7], [4, 44, 8, 20, 3], [11, 2]]


def shared(
    family: str = "llama", dtype: torch.dtype = torch.float32, lora: LoraConfig | None = None, **kw
) -> SharedModel:
    lora = lora or LoraConfig(r=3)
    return SharedModel(tiny_base(family).to(dtype), roles=("policy", "reference"), lora=lora, **kw)


def run(model: SharedModel, rows: list[list[int]] = PROMPTS, **options) -> Rollout:
    ids, mask = pad(rows, left=True)
    return generate(
        model, ids, mask, **{"max_new_tokens": 10, "generator": torch.Generator().manual_seed(3), **options}
    )


@pytest.fixture(params=["ours", "plain"])
def path(request):
    """Our attention and packed weights where they serve, and the decoder of every other device."""
    with rlhf_fast.use_backend("reference" if request.param == "plain" else None):
        yield request.param


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family, path):
    base = tiny_base(family)
    twin = copy.deepcopy(base)
    model = SharedModel(base, roles=("policy",))
    assert (attention_of(model) is None) == (path == "ours" and family in OURS)
    found = run(model, temperature=0.0, max_new_tokens=14)
    ids, mask = pad(PROMPTS, left=True)
    twin.generation_config.eos_token_id = None
    expected = twin.generate(ids, attention_mask=mask.long(), max_new_tokens=14, do_sample=False, pad_token_id=0)
    assert torch.equal(found.responses, expected[:, ids.shape[1] :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_entropy_are_those_of_a_teacher_forced_pass(family, dtype, path):
    model = disturb(shared(family, dtype))
    found = run(model, num_samples=2, temperature=1.3, eos_token_id=2)
    assert found.logprobs is not None and found.entropy is not None
    first = found.prompt_length - 1
    out = model(found.input_ids, found.attention_mask, roles=("policy",)).policy
    expected = rlhf_fast.token_logprobs(
        out.logits[:, first:-1].float(), found.responses, temperature=1.3, mask=found.response_mask
    )
    limit = tolerances.TEACHER_FORCED[dtype]
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=limit, atol=limit)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=limit, atol=limit)
    assert (found.logprobs[~found.response_mask] == 0).all() and (found.entropy[~found.response_mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SAME_BITS)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(family, dtype):
    """Other prompts beside it, other padding before it, rows that finish: none of it changes a bit."""
    model = disturb(shared(family, dtype))
    seeds = torch.arange(8) + 2**40
    whole = run(model, num_samples=2, seeds=seeds, eos_token_id=2, temperature=2.0, max_new_tokens=12)
    assert attention_of(model) is None and whole.logprobs is not None
    for i in range(8):
        alone = run(
            model, [PROMPTS[i // 2]], seeds=seeds[i : i + 1], eos_token_id=2, temperature=2.0, max_new_tokens=12
        )
        n = int(alone.response_mask.sum())
        assert int(whole.response_mask[i].sum()) == n
        assert torch.equal(whole.responses[i, :n], alone.responses[0])
        assert torch.equal(whole.logprobs[i, :n], alone.logprobs[0])


def test_samples_of_a_prompt_are_what_its_copies_are(path):
    model = disturb(shared())
    seeds = torch.randint(2**62, (12,))
    together = run(model, num_samples=3, seeds=seeds)
    copies = run(model, [row for row in PROMPTS for _ in range(3)], seeds=seeds)
    assert torch.equal(together.input_ids, copies.input_ids)
    torch.testing.assert_close(together.logprobs, copies.logprobs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(together.responses[0], together.responses[1])


class Fed:
    """The shapes of what passes the embedding of a model."""

    def __init__(self, model: SharedModel) -> None:
        self.shapes: list[tuple[int, ...]] = []
        embedding = model.base.get_input_embeddings()
        self.handle = embedding.register_forward_hook(lambda _, args, out: self.shapes.append(tuple(args[0].shape)))


def test_a_prompt_is_read_once_and_finished_rows_leave(path):
    model = disturb(shared())
    attention_of(model)  # tried out beforehand
    PackedRollout(model)
    fed = Fed(model)
    found = run(model, num_samples=4, eos_token_id=2, temperature=4.0, max_new_tokens=30)
    lengths = found.response_mask.sum(1)
    assert fed.shapes[0] == (4, 6)
    running = [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]
    rows = [shape[0] for shape in fed.shapes[1:]]
    if path == "ours":
        assert rows == running
    else:  # a quarter of the rows at a time
        assert all(have <= held and have > 3 * held // 4 for have, held in zip(running, rows, strict=True))
    assert len(set(running)) > 2


ENDING = {"num_samples": 4, "eos_token_id": list(range(2, 14)), "temperature": 4.0, "seeds": torch.arange(16) + 160}


@pytest.mark.parametrize("behind", [1, 3])
def test_a_host_that_looks_later_finds_the_same(path, behind, monkeypatch):
    """As on a device: what a step has ended is looked at when later ones are queued."""
    model = disturb(shared())
    expected = run(model, **ENDING, max_new_tokens=50)
    lengths = expected.response_mask.sum(1)
    assert expected.finished.all() and int(lengths.max()) < 50  # the loop ends early
    monkeypatch.setattr(hf, "_steps_behind", lambda device: behind)
    fed = Fed(model)
    found = run(model, **ENDING, max_new_tokens=50)
    for name in ("input_ids", "attention_mask", "response_mask", "finished"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    if path == "ours":
        steps = range(1, int(lengths.max()) + behind)
        assert [shape[0] for shape in fed.shapes[1:]] == [int((lengths > max(t - behind, 0)).sum()) for t in steps]


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("step", [0, 4, 8])
def test_a_row_without_a_token_is_named(path, behind, step, monkeypatch):
    """Rows that have ended have none to miss, and the last step has none behind it in which the host would look."""
    model = disturb(shared())
    lengths = run(model, **ENDING, max_new_tokens=9).response_mask.sum(1)
    row = int((lengths > step).nonzero()[0])
    assert step == 0 or row > 0
    monkeypatch.setattr(hf, "_steps_behind", lambda device: behind)
    logits, calls = PackedRollout.logits, []

    def broken(self, hidden):
        calls.append(None)
        return logits(self, hidden * (torch.nan if len(calls) == step + 1 else 1.0))

    monkeypatch.setattr(PackedRollout, "logits", broken)
    with pytest.raises(ValueError, match=rf"logits of row {row} at new token {step} are NaN"):
        run(model, **ENDING, max_new_tokens=9)


def test_the_keys_of_a_prompt_are_stored_once_and_written_in_place():
    model = shared()
    where = []
    with decoders.decoding(model, "policy", 5, 6, None) as decoder:
        ids, mask = pad(PROMPTS, left=True)
        decoder.read(ids, mask)
        for _ in range(6):
            decoder.step(torch.full((20,), 9), torch.arange(20))
            part = decoder.cache.parts[1]
            where.append((part.keys.data_ptr(), part.values.data_ptr(), part.prefix_keys.data_ptr()))
    assert len(set(where)) == 1
    assert part.prefix_keys.shape == (4, 2, 6, 8) and part.keys.shape == (20, 2, 6, 8)


def test_the_plain_cache_is_written_in_place():
    model = shared("bloom")
    where = []
    with decoders.decoding(model, "policy", 1, 6, None) as decoder:
        ids, mask = pad(PROMPTS, left=True)
        decoder.read(ids, mask)
        for _ in range(6):
            decoder.step(torch.full((4,), 9), torch.arange(4))
            where.append(decoder.cache.layers[0].keys.data_ptr())
    assert len(set(where)) == 1


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=1, target_modules=("v_proj", "down_proj")),
        LoraConfig(r=4, alpha=3.0, target_modules=("q_proj", "up_proj")),
        LoraConfig(r=5, alpha=1.7, dropout=0.5),
    ],
    ids=["some of a group", "odd scale", "dropout"],
)
def test_adapters_of_any_kind_are_in_the_packed_products(lora):
    model = disturb(shared(lora=lora), "policy")
    found = run(model)
    out = model(found.input_ids, found.attention_mask, roles=("policy",)).policy
    logits = out.logits[:, found.prompt_length - 1 : -1]
    torch.testing.assert_close(
        found.logprobs, rlhf_fast.token_logprobs(logits, found.responses).logprobs, rtol=1e-5, atol=1e-5
    )
    assert not torch.equal(found.responses, run(model, role="reference").responses)


def test_members_of_a_group_with_different_scales(tmp_path):
    import json

    model = disturb(shared(lora=LoraConfig(r=4, target_modules=("q_proj", "k_proj", "v_proj"))), "policy")
    model.save_adapter("policy", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"k_proj": 5.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model.load_adapter("policy", tmp_path)
    found = run(model)
    out = model(found.input_ids, found.attention_mask, roles=("policy",)).policy
    logits = out.logits[:, found.prompt_length - 1 : -1]
    torch.testing.assert_close(
        found.logprobs, rlhf_fast.token_logprobs(logits, found.responses).logprobs, rtol=1e-5, atol=1e-5
    )


def test_a_packed_base_serves_many_rollouts_while_the_adapter_changes():
    model = disturb(shared())
    packed = PackedRollout(model)
    assert packed.base is not None and packed.head is not None
    for seed in range(2):
        disturb(model, seed=seed)
        assert torch.equal(run(model, packed=packed).input_ids, run(model).input_ids)


def test_the_model_is_left_as_it_was_found_even_by_a_failure(path):
    model = disturb(shared())
    forwards = [m for m in model.base.modules() if "forward" in m.__dict__]
    weights = {name: p.clone() for name, p in model.base.named_parameters()}
    implementation = model.base.config._attn_implementation
    before = run(model)
    with torch.no_grad():
        model.base.lm_head.weight[4] = torch.nan
    with pytest.raises(ValueError, match=r"logits of row 0 at new token 0 are NaN"):
        run(model)
    with torch.no_grad():
        model.base.lm_head.weight.copy_(weights["lm_head.weight"])
    assert [m for m in model.base.modules() if "forward" in m.__dict__] == forwards
    assert model.base.config._attn_implementation == implementation
    assert all(torch.equal(p, weights[name]) for name, p in model.base.named_parameters())
    assert torch.equal(run(model).input_ids, before.input_ids)


def test_shared_layers_are_packed_as_well():
    model = disturb(shared(shared_layers=1))
    found = run(model)
    out = model(found.input_ids, found.attention_mask, roles=("policy",)).policy
    logits = out.logits[:, found.prompt_length - 1 : -1]
    torch.testing.assert_close(
        found.logprobs, rlhf_fast.token_logprobs(logits, found.responses).logprobs, rtol=1e-5, atol=1e-5
    )


def test_several_ends_of_sequence_and_none():
    model = disturb(shared())
    found = run(model, num_samples=8, eos_token_id=[2, 40], temperature=5.0, max_new_tokens=40)
    last = found.responses.gather(1, found.response_mask.sum(1, keepdim=True) - 1)[:, 0]
    assert set(last[found.finished].tolist()) == {2, 40}
    assert not run(model, eos_token_id=[]).finished.any()


def test_tokens_before_the_shortest_length_come_from_a_distribution_without_the_end():
    model = disturb(shared())
    found = run(model, eos_token_id=2, min_new_tokens=4, max_new_tokens=4)
    out = model(found.input_ids, found.attention_mask, roles=("policy",)).policy
    logits = out.logits[:, found.prompt_length - 1 : -1].index_fill(-1, torch.tensor([2]), -torch.inf)
    torch.testing.assert_close(
        found.logprobs, rlhf_fast.token_logprobs(logits, found.responses).logprobs, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_a_model_with_an_attention_of_its_own_says_so(family):
    assert "has an attention of its own" in str(attention_of(shared(family)))


def test_our_attention_is_refused_where_its_result_differs(monkeypatch):
    from rlhf_fast.rollout import attention

    monkeypatch.setattr(decoders, "_tried", type(decoders._tried)())
    real = attention._attention
    monkeypatch.setitem(
        attention.AttentionInterface._global_mapping,
        attention.NAME,
        lambda module, q, k, v, mask, scaling=None, **kw: real(module, q, k, v, mask, 0.5 * scaling, **kw),
    )
    model = shared()
    assert "attends in another way" in str(attention_of(model))
    assert run(model).responses.max() < VOCABULARY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "'num_samples' got 0"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"'seeds' got shape \(3,\), expected \(4,\)"),
        ({"seeds": torch.zeros(4)}, "'seeds' got torch.float32"),
        ({"temperature": -1.0}, "'temperature' got -1"),
        ({"packed": PackedRollout(shared())}, "'packed' got that of another model"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(shared(), **change)


def test_draws_follow_torchs_own_generator_when_none_is_given():
    model = shared()
    ids, mask = pad(PROMPTS, left=True)

    def once() -> Tensor:
        torch.manual_seed(7)
        return generate(model, ids, mask, max_new_tokens=5).input_ids

    assert torch.equal(once(), once())
