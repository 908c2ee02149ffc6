"""Roles of one shared base: equal to the plain model where they must be, else independent."""

from __future__ import annotations

import copy

import pytest
import torch
from model.tiny import FAMILIES, VOCABULARY, disturb, tiny_base, tiny_batch
from tolerances import FLOOR

from rlhf_fast.model import ROLES, LoraConfig, SharedModel

LORA = LoraConfig(r=4, alpha=8.0)
# Two orders of the same fp32 sums, through three layers, on numbers of order 1.
CLOSE = 32 * FLOOR[torch.float32]


def shared(family: str = "llama", **options) -> SharedModel:
    return SharedModel(tiny_base(family), lora=LORA, **options)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=CLOSE, atol=CLOSE)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@torch.no_grad()
def test_new_policy_and_reference_give_the_plain_models_logits(family):
    ids, _ = tiny_batch(padded=False)
    plain = tiny_base(family)(input_ids=ids, use_cache=False).logits
    out = shared(family)(ids)
    close(out.reference.logits, plain)
    # Within one stacked pass a zero B adds exactly 0, so policy and reference agree in every bit.
    assert torch.equal(out.policy.logits, out.reference.logits)
    assert torch.equal(out.policy.hidden, out.reference.hidden)


@torch.no_grad()
def test_stacked_pass_equals_one_pass_per_role(family):
    ids, mask = tiny_batch()
    model = disturb(shared(family))
    stacked = model(ids, mask)
    for role in ROLES:
        alone = model(ids, mask, roles=(role,))[role]
        close(stacked[role].hidden[mask], alone.hidden[mask])
        others = [r for r in ROLES if r != role]
        assert all((stacked[role].hidden - stacked[r].hidden)[mask].abs().max() > 1e-2 for r in others)
    close(stacked.reward.scores, model(ids, mask, roles=("reward",)).reward.scores)
    close(stacked.value.values[mask], model(ids, mask, roles=("value",)).value.values[mask])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_extra_padding_changes_no_real_token(family, side):
    ids, mask = tiny_batch()
    model = disturb(shared(family))
    before = model(ids, mask)
    junk = torch.full((3, 4), VOCABULARY + 100)  # a pad may hold any id: it is never read
    off = torch.zeros(3, 4, dtype=torch.bool)
    parts = [(junk, ids), (off, mask)] if side == "left" else [(ids, junk), (mask, off)]
    after = model(*(torch.cat(pair, dim=1) for pair in parts))
    window = slice(4, None) if side == "left" else slice(None, 8)
    for role in ROLES:
        close(after[role].hidden[:, window][mask], before[role].hidden[mask])
    logprobs = [o.policy.logits.log_softmax(-1) for o in (before, after)]
    close(logprobs[1][:, window][mask], logprobs[0][mask])
    close(after.reward.scores, before.reward.scores)
    close(after.value.values[:, window][mask], before.value.values[mask])


@torch.no_grad()
def test_padded_row_equals_the_row_alone():
    ids, mask = tiny_batch()
    model = disturb(shared())
    batch = model(ids, mask)
    for row in range(3):
        alone = model(ids[row, mask[row]].unsqueeze(0))
        close(batch.policy.logits[row, mask[row]], alone.policy.logits[0])
        close(batch.reward.scores[row], alone.reward.token_scores[0, -1])


@torch.no_grad()
def test_score_is_read_at_the_last_real_token_for_both_paddings():
    ids, mask = tiny_batch()
    out = disturb(shared())(ids, mask).reward
    assert torch.equal(
        out.scores, torch.stack([out.token_scores[0, 7], out.token_scores[1, 5], out.token_scores[2, 4]])
    )


@torch.no_grad()
def test_values_and_scores_are_the_heads_of_their_own_hidden_states():
    ids, _ = tiny_batch(padded=False)
    model = disturb(shared())
    out = model(ids)
    for role, numbers in (("value", out.value.values), ("reward", out.reward.token_scores)):
        head = model.parameters_of(role)
        close(numbers, out[role].hidden @ head["score.weight"][0] + head["score.bias"])
        assert numbers.dtype == torch.float32 and numbers.shape == ids.shape


@torch.no_grad()
def test_head_properties_turn_hidden_states_into_the_models_logits(family):
    ids, _ = tiny_batch(padded=False)
    model = shared(family)
    out = model(ids, roles=("policy",)).policy
    logits = out.hidden @ model.head_weight.t()
    if model.head_bias is not None:
        logits = logits + model.head_bias
    logits = logits * model.logit_scale
    if model.final_softcap is not None:
        logits = model.final_softcap * torch.tanh(logits / model.final_softcap)
    close(logits, out.logits)
    expected = {"gemma2": (0.5, 1.0), "granite": (None, 0.25), "cohere": (None, 0.25)}.get(family, (None, 1.0))
    assert (model.final_softcap, model.logit_scale) == expected
    assert (model.head_bias is not None) == (family == "phi")


def test_head_of_another_form_is_refused_but_logits_still_work(monkeypatch):
    model = shared()
    plain = model.base.forward

    def squared(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits.square()
        return output

    monkeypatch.setattr(model.base, "forward", squared)
    with pytest.raises(ValueError, match=r"use \.logits instead"):
        _ = model.head_weight
    ids, _ = tiny_batch(padded=False)
    out = model(ids, roles=("policy",)).policy
    close(out.logits, (out.hidden @ model.base.lm_head.weight.t()).square())


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_reused_trunk_gives_the_same_bits(family, layers):
    ids, mask = tiny_batch()
    model = disturb(shared(family, shared_layers=layers))
    trunk = model.trunk(ids, mask)
    assert trunk.shape == (3, 8, 32) and not trunk.requires_grad
    fresh, reused = model(ids, mask), model(ids, mask, trunk=trunk)
    for role in ROLES:
        assert torch.equal(fresh[role].hidden, reused[role].hidden)
    whole = tiny_base(family).get_decoder()(
        input_ids=ids.masked_fill(~mask, 0),
        attention_mask=mask.long(),
        use_cache=False,
        **({} if family == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}),
    )
    close(fresh.reference.hidden[mask], whole.last_hidden_state[mask])


@torch.no_grad()
def test_trunk_runs_the_shared_layers_once_and_a_reused_trunk_runs_none():
    ids, mask = tiny_batch()
    model = shared(shared_layers=2)
    rows: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for i, layer in enumerate(model.base.model.layers):
        # The attention runs only if its layer really computes.
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: rows[i].append(kwargs["hidden_states"].shape[0]),
            with_kwargs=True,
        )
    trunk = model.trunk(ids, mask)
    assert rows == {0: [3], 1: [3], 2: []}
    model(ids, mask, trunk=trunk)
    assert rows == {0: [3], 1: [3], 2: [12]}
    model(ids, mask)
    assert rows == {0: [3, 3], 1: [3, 3], 2: [12, 12]}


def test_stacked_gradient_equals_the_gradients_of_separate_passes(family):
    ids, mask = tiny_batch()
    model = disturb(shared(family, roles=("policy", "reference", "value")))
    names = ("policy", "value")

    def losses(out, role):
        if role == "policy":
            return -out.policy.logits.log_softmax(-1)[..., 7][mask].mean()
        return out.value.values[mask].square().mean()

    out = model(ids, mask)
    assert not out.reference.hidden.requires_grad
    (losses(out, "policy") + losses(out, "value")).backward()
    stacked = {r: {n: p.grad.clone() for n, p in model.parameters_of(r).items()} for r in names}
    model.zero_grad(set_to_none=True)
    for role in names:
        losses(model(ids, mask, roles=(role,)), role).backward()
    for role in names:
        for name, parameter in model.parameters_of(role).items():
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0 or "experts" in name, name
            close(stacked[role][name], parameter.grad)
    assert all(p.grad is None and not p.requires_grad for p in model.base.parameters())


def test_gradient_agrees_with_finite_differences():
    ids, mask = tiny_batch()
    model = disturb(shared("gpt2", roles=("policy",)).double())  # no fp32 island, unlike an RMSNorm
    parameters = model.parameters_of("policy")
    (model(ids, mask).policy.logits.log_softmax(-1)[..., 7] * mask).sum().backward()
    for name in (
        "transformer.h.0.attn.c_attn.lora_A.weight",
        "transformer.h.1.mlp.c_proj.lora_B.weight",
    ):
        parameter, step = parameters[name], 1e-5
        values = []
        with torch.no_grad():
            for sign in (1.0, -2.0):
                parameter[1, 2] += sign * step
                values.append((model(ids, mask).policy.logits.log_softmax(-1)[..., 7] * mask).sum())
        torch.testing.assert_close(parameter.grad[1, 2], (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-7)


def test_optimizer_step_moves_one_role_and_leaves_base_and_other_roles_bit_equal():
    ids, mask = tiny_batch()
    model = disturb(shared())
    base = copy.deepcopy(model.base.state_dict())
    states = {role: model.state_of(role) for role in ROLES}
    optimizer = torch.optim.AdamW(model.parameters_of("policy").values(), lr=1e-2)
    out = model(ids, mask)
    (out.policy.logits[mask].square().mean() + out.value.values[mask].mean()).backward()
    optimizer.step()
    for name, tensor in model.base.state_dict().items():
        assert torch.equal(tensor, base[name]), name
    for role in ("reference", "value", "reward"):
        assert all(torch.equal(t, states[role][n]) for n, t in model.state_of(role).items())
    assert all(not torch.equal(t, states["policy"][n]) for n, t in model.state_of("policy").items())


def saved_bytes(compute) -> int:
    """Bytes that autograd keeps for a backward of `compute()`, each storage once, parameters left out."""
    storages: dict[int, int] = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(storages.values())


def test_roles_without_training_keep_no_activations():
    ids, mask = tiny_batch()
    model = disturb(shared())
    for parameter in model.parameters_of("reward").values():
        parameter.requires_grad_(False)
    alone = saved_bytes(lambda: model(ids, mask, roles=("policy",)).policy.hidden.sum())
    together = saved_bytes(lambda: model(ids, mask, roles=("policy", "reference", "reward")).policy.hidden.sum())
    assert 0 < together == alone
    assert saved_bytes(lambda: model(ids, mask, roles=("reference", "reward"))) == 0


def test_shared_layers_keep_no_activations():
    ids, mask = tiny_batch()
    kept = [
        saved_bytes(lambda k=k: shared(shared_layers=k)(ids, mask, roles=("policy",)).policy.hidden.sum())
        for k in (0, 1, 2)
    ]
    per_layer = kept[1] - kept[2]
    assert per_layer > 0 and kept[2] < 0.5 * kept[0]


@torch.no_grad()
def test_as_role_makes_the_base_that_role_and_only_inside_the_context():
    ids, _ = tiny_batch(padded=False)
    model = disturb(shared())
    out = model(ids)
    plain = model.base(input_ids=ids).logits
    close(plain, out.reference.logits)
    with model.as_role("policy"):
        close(model.base(input_ids=ids).logits, out.policy.logits)
        with model.as_role("reference"):
            close(model.base(input_ids=ids).logits, plain)
        close(model.base(input_ids=ids).logits, out.policy.logits)
    assert torch.equal(model.base(input_ids=ids).logits, plain)
    with pytest.raises(KeyError), model.as_role("policy"):
        raise KeyError("inside")
    assert torch.equal(model.base(input_ids=ids).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("layers", [0, 1])
def test_generation_with_cache_follows_the_roles_own_logits(family, layers):
    ids, _ = tiny_batch(padded=False)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model = disturb(shared(family, shared_layers=layers))
    with model.as_role("policy"):
        tokens = model.base.generate(
            input_ids=ids * mask,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    full = torch.cat([mask, torch.ones(3, 5, dtype=mask.dtype)], dim=1)
    logits = model(tokens, full, roles=("policy",)).policy.logits
    assert torch.equal(tokens[:, 8:], logits[:, 7:-1].argmax(-1))


@torch.no_grad()
def test_routed_experts_are_run_role_by_role():
    """A list of experts sees rows in the router's order; stacked, they would reach the wrong role's block."""

    class Routed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

        def forward(self, x):
            rows, out = x.reshape(-1, 32), torch.zeros_like(x).reshape(-1, 32)
            for i, expert in enumerate(self.experts):
                chosen = (rows[:, 0] > 0) == bool(i)
                out[chosen] = expert(rows[chosen])
            return out.view_as(x)

    base = tiny_base()
    base.model.layers[1].mlp = Routed()
    model = disturb(SharedModel(base, lora=LORA))
    ids, _ = tiny_batch(padded=False)
    together = model(ids)
    for role in ROLES:
        with model.as_role(role):
            expected = model.base.model(input_ids=ids).last_hidden_state
        close(together[role].hidden, expected)


def test_start_depends_on_the_seed_alone():
    bases = [tiny_base() for _ in range(3)]
    torch.manual_seed(1)
    first = SharedModel(bases[0], lora=LORA, seed=3)
    torch.manual_seed(99)
    again = SharedModel(bases[1], ("reward", "policy"), LORA, seed=3)
    other = SharedModel(bases[2], lora=LORA, seed=4)
    after = torch.rand(4)
    for role in ("policy", "reward"):
        one, two, three = (m.state_of(role) for m in (first, again, other))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert any(not torch.equal(one[name], three[name]) for name in one)
    torch.manual_seed(99)
    assert torch.equal(torch.rand(4), after)  # the global stream was not touched
    policy, value = first.state_of("policy"), first.state_of("value")
    assert any(not torch.equal(policy[name], value[name]) for name in policy if "lora_A" in name)


def test_start_values_are_those_documented():
    model = SharedModel(tiny_base(hidden_size=64, num_attention_heads=4), lora=LoraConfig(r=8))
    policy = model.parameters_of("policy")
    a = policy["model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert a.shape == (8, 64) and a.dtype == torch.float32 and a.abs().max() <= 1 / 8
    assert abs(a.std().item() * 3**0.5 * 8 - 1) < 0.1
    assert all(not p.any() for n, p in policy.items() if "lora_B" in n)
    value, reward = model.parameters_of("value"), model.parameters_of("reward")
    assert not value["score.weight"].any() and not value["score.bias"].any() and not reward["score.bias"].any()
    assert 0.6 < reward["score.weight"].std().item() * 65**0.5 < 1.4
    assert model.parameters_of("reference") == {}
    assert {n.split(".")[-3] for n in policy} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_target_suffixes_choose_the_layers():
    model = SharedModel(tiny_base(), lora=LoraConfig(r=2, target_modules=("q_proj", "mlp.down_proj")), shared_layers=1)
    names = {n.rsplit(".", 2)[0] for n in model.parameters_of("policy")}
    assert names == {f"model.layers.{i}.{n}" for i in (1, 2) for n in ("self_attn.q_proj", "mlp.down_proj")}


@torch.no_grad()
def test_only_lora_dropout_is_active_in_train_mode():
    ids, mask = tiny_batch()
    base = tiny_base("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = disturb(SharedModel(base, lora=LoraConfig(r=4, dropout=0.5)))
    calm = model(ids, mask)
    assert torch.equal(model(ids, mask).policy.hidden, calm.policy.hidden)
    model.train()
    first, second = model(ids, mask), model(ids, mask)
    assert not torch.equal(first.policy.hidden, second.policy.hidden)
    assert torch.equal(first.reference.hidden, calm.reference.hidden)
    assert not any(module.training for module in model.base.modules())
    assert torch.equal(model.eval()(ids, mask).policy.hidden, calm.policy.hidden)


@torch.no_grad()
def test_copy_role_copies_the_adapter_and_not_the_head():
    ids, mask = tiny_batch()
    model = disturb(shared())
    head = model.state_of("value")["score.weight"]
    held = model.parameters_of("value")
    model.copy_role("reward", "value")
    out = model(ids, mask)
    assert torch.equal(out.value.hidden, out.reward.hidden)
    assert torch.equal(model.state_of("value")["score.weight"], head)
    assert all(p is held[n] for n, p in model.parameters_of("value").items())  # an optimizer stays valid
    model.copy_role("policy", "reference")
    out = model(ids, mask)
    assert torch.equal(out.policy.hidden, out.reference.hidden)
    assert not any(p.requires_grad for p in model.parameters_of("reference").values())


@torch.no_grad()
def test_state_of_is_a_copy_and_load_state_of_restores_it():
    ids, mask = tiny_batch()
    model = disturb(shared())
    state, before = model.state_of("value"), model(ids, mask).value.values
    disturb(model, "value", seed=9)
    assert not torch.equal(model(ids, mask).value.values, before)
    model.load_state_of("value", state)
    assert torch.equal(model(ids, mask).value.values, before)


@torch.no_grad()
def test_bf16_base_keeps_fp32_adapters_and_follows_the_fp32_model():
    ids, mask = tiny_batch()
    wide = disturb(shared())
    narrow = disturb(SharedModel(tiny_base().to(torch.bfloat16), lora=LORA))
    out = narrow(ids, mask)
    assert out.policy.hidden.dtype == torch.bfloat16 and out.value.values.dtype == torch.float32
    assert {p.dtype for p in narrow.parameters_of("policy").values()} == {torch.float32}
    error = (out.policy.hidden.float() - wide(ids, mask).policy.hidden)[mask].abs().max()
    assert error < 40 * FLOOR[torch.bfloat16]  # hidden states of order 1 through three layers


def test_bf16_gradient_reaches_every_adapter_parameter():
    ids, mask = tiny_batch()
    model = disturb(SharedModel(tiny_base().to(torch.bfloat16), ("policy",), LORA))
    model(ids, mask).policy.logits[mask].float().logsumexp(-1).mean().backward()
    for name, parameter in model.parameters_of("policy").items():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0, name


def test_deep_copy_is_independent():
    ids, mask = tiny_batch()
    model = disturb(shared())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(ids, mask).policy.hidden
        assert torch.equal(twin(ids, mask).policy.hidden, before)
        disturb(twin, "policy", seed=8)
        assert not torch.equal(twin(ids, mask).policy.hidden, before)
        assert torch.equal(model(ids, mask).policy.hidden, before)


@torch.no_grad()
def test_from_pretrained_loads_a_local_folder(tmp_path):
    base = tiny_base("gpt2")
    base.save_pretrained(tmp_path)
    ids, _ = tiny_batch(padded=False)
    model = SharedModel.from_pretrained(tmp_path, ("policy", "reference"), LORA)
    close(model(ids).policy.logits, base(input_ids=ids).logits)
    assert model.base.dtype == torch.float32
    narrow = SharedModel.from_pretrained(str(tmp_path), ("policy",), LORA, dtype=torch.bfloat16)
    assert narrow.base.dtype == torch.bfloat16


@torch.no_grad()
def test_adapted_base_saves_as_the_model_it_is(tmp_path):
    model = disturb(shared())
    model.base.save_pretrained(tmp_path)
    again = SharedModel.from_pretrained(tmp_path, lora=LORA)
    for name, tensor in tiny_base().state_dict().items():
        assert torch.equal(again.base.state_dict()[name], tensor)


@pytest.mark.parametrize("shared_layers", [0, 1])
def test_gradient_checkpointing_changes_no_gradient(shared_layers):
    found = []
    for checkpointing in (False, True):
        model = SharedModel(tiny_base(), shared_layers=shared_layers, gradient_checkpointing=checkpointing)
        generator = torch.Generator().manual_seed(0)
        parameters = {(r, n): p for r in ("policy", "value") for n, p in model.parameters_of(r).items()}
        with torch.no_grad():
            for p in parameters.values():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        ids = torch.randint(0, VOCABULARY, (2, 6), generator=generator)
        out = model(ids, roles=("policy", "reference", "value"))
        with model.as_role("reference"):  # whatever role is active when the backward runs
            (out.policy.logits.square().mean() + out.value.values.square().sum()).backward()
        found.append({name: p.grad for name, p in parameters.items()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7)
