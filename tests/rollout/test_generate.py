from __future__ import annotations

import pytest
import torch
from models import tiny_llama
from torch import Tensor

from rlhf_fast.batch import pad
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.ops import sample_tokens
from rlhf_fast.rollout import generate
from rlhf_fast.train.scoring import head_logprobs

EOS = 1


@pytest.fixture(scope="module")
def model() -> SharedModel:
    shared = SharedModel(tiny_llama(), roles=("policy", "reference"), lora=LoraConfig(r=4), shared_layers=1)
    with torch.no_grad():
        for name, p in shared.parameters_of("policy").items():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return shared


def prompts() -> list[list[int]]:
    return [[5, 9, 12], [7], [4, 4, 8, 20, 3], [11, 2]]


def run(model: SharedModel, rows: list[list[int]], **options):
    ids, mask = pad(rows, left=True)
    options = {"max_new_tokens": 9, "generator": torch.Generator().manual_seed(3), **options}
    return generate(model, ids, mask, **options)


def test_left_padding_does_not_change_what_is_sampled(model):
    together = run(model, prompts())
    ids, mask = pad(prompts(), left=True)
    wider = torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(mask, (4, 0))
    shifted = generate(model, *wider, max_new_tokens=9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(together.responses, shifted.responses)
    assert shifted.prompt_length == together.prompt_length + 4


def test_the_cached_decode_step_has_the_logprob_of_a_full_forward(model):
    # Greedy in all but name: the token of the uncached argmax is the one sampled at a tiny temperature.
    rollout = run(model, prompts(), temperature=1e-4)
    for t in range(rollout.responses.shape[1]):
        stop = rollout.prompt_length + t
        out = model(rollout.input_ids[:, :stop], rollout.attention_mask[:, :stop], roles=("policy",))
        assert torch.equal(out.policy.logits[:, -1].argmax(-1), rollout.responses[:, t])


def test_two_roles_sample_from_two_distributions(model):
    rows = [[5, 9, 12]] * 64
    policy = run(model, rows, max_new_tokens=1)
    reference = run(model, rows, max_new_tokens=1, role="reference")
    assert not torch.equal(policy.responses, reference.responses)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_item_16_recomputed_logprob_is_the_samplers_at_any_temperature(model, temperature):
    rollout = run(model, [[5, 9, 12]] * 4000, max_new_tokens=1, temperature=temperature)
    first = rollout.prompt_length - 1
    hidden = model(rollout.input_ids[:1], rollout.attention_mask[:1], roles=("policy",)).policy.hidden[:, first]
    vocabulary = model.head_weight.shape[0]
    logprobs = head_logprobs(
        model,
        hidden.expand(vocabulary, -1),
        torch.arange(vocabulary),
        torch.ones(vocabulary, dtype=torch.bool),
        temperature,
    ).logprobs
    expected = logprobs.exp()
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))
    counts = torch.bincount(rollout.responses[:, 0], minlength=vocabulary)
    common = expected > 0.002  # cells with enough counts for the statistic to be chi-squared
    chi = ((counts - 4000 * expected) ** 2 / (4000 * expected))[common].sum()
    freedom = int(common.sum())
    assert chi < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_item_5_a_completion_ends_with_its_first_eos_and_the_rest_is_padding(model):
    rollout = run(model, [[5, 9, 12]] * 200, max_new_tokens=12, eos_token_id=EOS, temperature=3.0)
    assert rollout.finished.any() and not rollout.finished.all()
    for ids, mask, finished in zip(rollout.responses, rollout.response_mask, rollout.finished, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        kept, rest = ids[:length].tolist(), ids[length:]
        assert (kept[-1] == EOS) == bool(finished) and EOS not in kept[:-1]
        assert not rest.any()
    assert torch.equal(rollout.attention_mask[:, rollout.prompt_length :], rollout.response_mask)


def test_the_loop_stops_when_every_row_has_finished(model):
    with torch.no_grad():
        rollout = run(model, [[5, 9, 12]] * 3, max_new_tokens=200, eos_token_id=EOS, temperature=50.0)
    assert rollout.finished.all() and rollout.responses.shape[1] < 200


def test_min_new_tokens_holds_eos_back(model):
    rollout = run(model, [[5]] * 100, max_new_tokens=8, min_new_tokens=5, eos_token_id=EOS, temperature=20.0)
    assert int(rollout.response_mask.sum(1).min()) >= 5
    assert (rollout.responses[:, :5] != EOS).all()


def test_without_eos_every_completion_is_full(model):
    rollout = run(model, prompts(), max_new_tokens=6)
    assert rollout.response_mask.all() and not rollout.finished.any() and rollout.responses.shape == (4, 6)


def test_item_17_an_impossible_token_is_never_drawn_and_ties_are_fair():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(5000, 4)
    uniform = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = sample_tokens(logits, uniform).token_ids
    counts = torch.bincount(tokens, minlength=4)
    assert counts[1] == counts[3] == 0
    assert abs(int(counts[0]) - 2500) < 5 * (5000 * 0.25) ** 0.5


def test_rows_draw_their_own_numbers_and_a_seed_repeats(model):
    a, b = run(model, [[5, 9, 12]] * 8), run(model, [[5, 9, 12]] * 8)
    assert torch.equal(a.input_ids, b.input_ids)
    assert len({tuple(row.tolist()) for row in a.responses}) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 12}, "min_new_tokens"),
        ({"temperature": -0.5}, "temperature"),
    ],
)
def test_wrong_arguments_are_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        run(model, prompts(), **change)


def test_right_padded_prompts_are_refused(model):
    ids, mask = pad(prompts())
    with pytest.raises(ValueError, match="left padding"):
        generate(model, ids, mask, max_new_tokens=2)
    ids, mask = pad(prompts(), left=True)
    mask[2, 2] = False  # a hole
    with pytest.raises(ValueError, match="left padding"):
        generate(model, ids, mask, max_new_tokens=2)


def test_texts_leave_special_tokens_out():
    from models import letter_tokenizer

    from rlhf_fast.rollout import Rollout

    tokenizer = letter_tokenizer()
    ids: Tensor = torch.tensor([[*tokenizer("ab", add_special_tokens=False).input_ids, EOS, 0]])
    mask = torch.tensor([[True, True, True, False]])
    assert Rollout(ids, mask, mask[:, 1:], torch.tensor([True])).texts(tokenizer) == ["b"]
