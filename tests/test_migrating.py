"""MIGRATING.md against the code: keys, defaults, names, and calls that give TRL's numbers."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import logsigmoid

import rlhf_fast
from rlhf_fast import losses
from rlhf_fast.config import PPOConfig, load_config
from rlhf_fast.denominators import Denominators
from rlhf_fast.entropy import covariance_mask, top_entropy_mask
from rlhf_fast.losses import RECIPES, policy_loss
from rlhf_fast.preference import preference_loss
from rlhf_fast.preference_kinds import KINDS

PAGE = (Path(__file__).parent.parent / "MIGRATING.md").read_text()

# Fields of trl.experimental.ppo.PPOConfig in trl 1.12.0, the last release with it.
TRL_PPO = [
    "learning_rate", "dataset_num_proc", "num_mini_batches", "total_episodes",
    "local_rollout_forward_batch_size", "num_sample_generations", "response_length", "stop_token",
    "stop_token_id", "temperature", "missing_eos_penalty", "sft_model_path",
    "world_size", "num_total_batches", "micro_batch_size", "local_batch_size",
    "batch_size", "local_mini_batch_size", "mini_batch_size", "push_to_hub",
    "reward_model_path", "model_adapter_name", "ref_adapter_name", "num_ppo_epochs",
    "whiten_rewards", "kl_coef", "kl_estimator", "cliprange",
    "vf_coef", "cliprange_value", "gamma", "lam",
    "ds3_gather_for_generation",
]  # fmt: skip


def tables():
    """[(header, rows)] of cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.M):
        header, _, *rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in block.splitlines()]
        found.append((header, rows))
    return found


def rows_of(column):
    return [row for header, rows in tables() if column in header for row in rows]


def code(cell):
    """The first piece of code of a cell, or nothing."""
    return (re.findall(r"`([^`]*)`", cell) or [""])[0]


def setting(path):
    """Default of a dotted key of PPOConfig, MISSING where it must be given. Raises KeyError for an unknown key."""
    owner, value = PPOConfig, dataclasses.MISSING
    for name in path.split("."):
        field = {f.name: f for f in dataclasses.fields(owner)}[name]
        if value is not dataclasses.MISSING:
            value = getattr(value, name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = field.default
        owner = typing.get_type_hints(owner)[name]
    return value


KEYS = [(code(row[2]), row[3]) for row in rows_of("rlhf-fast ppo") if len(row) == 5 and row[2] != "not there"]


def test_the_page_has_its_tables():
    assert len(tables()) == 8 and len(KEYS) > 40


@pytest.mark.parametrize(("key", "default"), KEYS)
def test_every_key_exists_and_has_the_default_of_the_page(key, default):
    value = setting(key)
    if default == "required":
        assert value is dataclasses.MISSING
        return
    shown = yaml.safe_load(default)
    if isinstance(value, float):  # YAML 1.1 reads 3e-5 as a word
        shown = float(shown)
    assert shown == (list(value) if isinstance(value, tuple) else value)


def test_every_setting_named_in_the_text_exists():
    named = re.findall(r"`((?:ppo|kl|rollout|optim|run|model|reward|data)\.[a-z_.]+)", PAGE)
    assert len(named) > 60
    for key in named:
        setting(key)
    with pytest.raises(KeyError):
        setting("ppo.cliprange")


def test_every_field_of_the_last_ppo_config_has_one_row():
    left = [name for row in rows_of("rlhf-fast ppo") if len(row) == 5 for name in re.findall(r"`(\w+)`", row[0])]
    assert {name: left.count(name) for name in TRL_PPO} == dict.fromkeys(TRL_PPO, 1)


def test_the_yaml_of_the_page_is_a_configuration(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (tmp_path / "ppo.yaml").write_text(text)
    config = load_config(PPOConfig, tmp_path / "ppo.yaml")
    assert (config.steps, config.rollout.batch_size, config.rollout.missing_eos) == (100, 64, "subtract")


def test_every_function_and_keyword_named_in_the_text_exists():
    calls = [c for c in re.findall(r"`(\w+)\(([^`]*)\)", PAGE) if c[0] != "PPOConfig"]
    assert len(calls) > 5
    for name, arguments in calls:
        known = inspect.signature(getattr(rlhf_fast, name, None) or getattr(losses, name)).parameters
        assert set(re.findall(r"(\w+)=", arguments)) <= set(known), name


B, T = 6, 7
SETTINGS = {
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "delta": 1.5,
    "beta": 0.04,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.1,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "max_completion_length": 9,
    "top_entropy_quantile": 0.4,
    "vllm_importance_sampling_clip_max": 1.1,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.25,
    "clip_ratio_c": 3.0,
    "loss_agg_mode": "token-mean",
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "clip_cov_ratio": 0.2,
    "clip_cov_lb": -1.0,
    "clip_cov_ub": 5.0,
    "kl_cov_ratio": 0.2,
    "ppo_kl_coef": 0.1,
    "eps_clip": 0.2,
    "eps_clip_low_high": (0.2, 0.27),
    "dual_clip": 3.0,
    "init_coef": 0.01,
    "estimator": "k2",
    "is_correction_threshold": (0.9, 1.2),
}


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    logprobs = -draw(B, T).abs() - 0.1
    old = logprobs + 0.8 * draw(B, T)
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": old,
        "ref_logprobs": logprobs.detach() + 0.2 * draw(B, T),
        "rollout_logprobs": old + 0.1 * draw(B, T),
        "advantages": draw(B, 1).expand(B, T).contiguous(),
        "mask": torch.arange(T) < torch.tensor([7, 3, 5, 1, 6, 4])[:, None],
        "entropy": draw(B, T).abs(),
    }


FUNCTIONS = {f.__name__: f for f in (Denominators, covariance_mask, top_entropy_mask)}
RECIPE_ROWS = [row for row in rows_of("recipe") if row[1] != "not there"]


def called(row, batch):
    """Loss and gradient of a row of the page."""
    keywords = eval(f"dict({code(row[2])})", {**FUNCTIONS, **SETTINGS, **batch})
    inputs = [batch[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")]
    loss = policy_loss(code(row[1]), *inputs, **keywords).loss
    return loss, torch.autograd.grad(loss, batch["logprobs"])[0]


@pytest.mark.parametrize("row", RECIPE_ROWS, ids=lambda row: row[0])
def test_every_recipe_exists_and_takes_the_call_of_its_row(row, batch):
    assert code(row[1]) in RECIPES
    loss, gradient = called(row, batch)
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0


def of_trl(case, b):
    """trl 1.16.0, trl/trainer/grpo_trainer.py, _compute_loss, with one accumulation step and one process."""
    s, m, A = SETTINGS, b["mask"].double(), b["advantages"]
    logprobs = b["logprobs"].where(b["mask"], 0)
    old, ref, rollout = (b[k].where(b["mask"], 0) for k in ("old_logprobs", "ref_logprobs", "rollout_logprobs"))
    kind = (re.findall(r'loss_type="(\w+)"', case) or ["dapo"])[0]
    if "beta" in case or "bias" in case:
        kind = "grpo"
    log_ratio = logprobs - old
    if "sequence" in case or kind == "luspo":
        log_ratio = ((log_ratio * m).sum(-1) / m.sum(-1))[:, None]
    ratio = log_ratio.exp()
    cap = s["delta"] if case == "`delta`" else float("inf")
    clipped = ratio.clamp(1 - s["epsilon"], 1 + s["epsilon_high"])
    loss = -torch.min(ratio.clamp(max=cap) * A, clipped * A)
    if kind == "cispo":
        loss = -ratio.clamp(max=s["epsilon_high"]).detach() * A * logprobs
    elif kind == "sapo":
        tau = torch.where(A > 0, s["sapo_temperature_pos"], s["sapo_temperature_neg"]).double()
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * A
    elif kind == "vespo":
        w = (log_ratio * m).sum(-1, keepdim=True).exp().detach()
        k, lam = (torch.where(A >= 0, s[f"vespo_{x}_pos"], s[f"vespo_{x}_neg"]).double() for x in ("k", "lambda"))
        loss = -(w**k * (lam * (1 - w)).exp()) * A * logprobs
    if "top_entropy" in case:
        threshold = b["entropy"][b["mask"]].quantile(1 - s["top_entropy_quantile"])
        loss = loss * (b["entropy"] >= threshold)
    if "vllm" in case:
        loss = loss * (old - rollout).exp().clamp(max=s["vllm_importance_sampling_clip_max"])
    if "beta" in case or "bias" in case:
        kl = (ref - logprobs).exp() - (ref - logprobs) - 1
        loss = loss + s["beta"] * kl * (ratio if "bias" in case else 1)
    if kind in ("grpo", "sapo"):
        return ((loss * m).sum(-1) / m.sum(-1)).mean()
    if kind == "luspo":
        return (loss * m).sum(-1).mean()
    if kind == "dr_grpo":
        return (loss * m).sum() / (B * s["max_completion_length"])
    return (loss * m).sum() / m.sum()


@pytest.mark.parametrize(
    "row", [r for h, rows in tables() if "TRL `GRPOConfig`" in h for r in rows], ids=lambda r: r[0]
)
def test_the_rows_of_grpo_give_the_numbers_of_trl(row, batch):
    expected = of_trl(row[0], batch)
    gradient = torch.autograd.grad(expected, batch["logprobs"])[0]
    loss, ours = called(row, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, gradient)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_dialect_gives_the_advantages_of_trls_ppo(kind, batch):
    """trl 1.12.0, trl/experimental/ppo/ppo_trainer.py, train, steps 4 and 6, on rows that end early and rows that fill the window."""
    mask, kl_coef, gamma, lam = batch["mask"], 0.05, 0.99, 0.95
    g = torch.Generator().manual_seed(2)
    values, scores = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((B, T), (B,)))
    logprobs, ref = batch["logprobs"].detach(), batch["ref_logprobs"]

    end = mask.sum(1) - 1
    at = torch.arange(T).expand(B, T)
    padding, padding_p1 = at > end[:, None], at > end[:, None] + 1
    logr = ref.masked_fill(padding, 1.0) - logprobs.masked_fill(padding, 1.0)
    v = values.masked_fill(padding_p1, 0)
    rewards = -kl_coef * (-logr if kind == "k1" else logr.exp() - 1 - logr)
    slot = torch.where(end + 1 < T, end + 1, end)
    rewards[torch.arange(B), slot] += scores
    last, reverse = torch.zeros(B, dtype=torch.float64), []
    for t in reversed(range(T)):
        following = v[:, t + 1] if t < T - 1 else 0.0
        last = rewards[:, t] + gamma * following - v[:, t] + gamma * lam * last
        reverse.append(last)
    raw = torch.stack(reverse[::-1], 1)
    real = raw[~padding]
    whitened = ((raw - real.mean()) * torch.rsqrt(real.var() + 1e-8)).masked_fill(padding, 0)

    found = rlhf_fast.advantages(
        scores, values, mask, logprobs=logprobs, ref_logprobs=ref, kl_coef=kl_coef, kl_kind=kind, gamma=gamma, lam=lam,
        dialect="trl",
    )  # fmt: skip
    torch.testing.assert_close(found.advantages, whitened)
    torch.testing.assert_close(found.rewards, rewards)
    torch.testing.assert_close(found.returns.masked_fill(padding_p1, 0), (raw + v).masked_fill(padding_p1, 0))


DPO = {"label_smoothing": 0.1, "discopop_tau": 0.05, "f_alpha_divergence_coef": 0.4}
DPO_ROWS = [row for row in rows_of("kind") if row[1] != "not there"]


def of_dpo(case, c, r, n, k, beta=0.1):
    """trl 1.16.0, trl/trainer/dpo_trainer.py, _compute_loss: per pair, from log-ratios c, r and lengths n, k."""
    e, a = DPO["label_smoothing"], DPO["f_alpha_divergence_coef"] - 1
    D, mean = c - r, c / n - r / k
    reshaped = {
        "forward_kl": lambda x: 1 - (-x).exp(),
        "js": logsigmoid,
        "alpha": lambda x: (a * x).exp() / a,
    }
    for name, f in reshaped.items():
        if f"{name}_div" in case or f'"{name}"' in case:
            return -logsigmoid(beta * (f(c) - f(r)))
    smooth = lambda x: -(1 - e) * logsigmoid(beta * x) - e * logsigmoid(-beta * x)
    q, gate = torch.sigmoid(beta * D), torch.sigmoid(beta * D / DPO["discopop_tau"])
    return {
        "sigmoid": -logsigmoid(beta * D),
        "hinge": torch.relu(1 - beta * D),
        "ipo": (mean - 1 / (2 * beta)) ** 2,
        "exo_pair": q * (q / (1 - e)).log() + (1 - q) * ((1 - q) / e).log(),
        "nca_pair": -logsigmoid(beta * c) - 0.5 * logsigmoid(-beta * c) - 0.5 * logsigmoid(-beta * r),
        "robust": (-(1 - e) * logsigmoid(beta * D) + e * logsigmoid(-beta * D)) / (1 - 2 * e),
        "bco_pair": -logsigmoid(beta * c) - logsigmoid(-beta * r),
        "sppo_hard": (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "aot_unpaired": smooth(c.sort().values - r.sort().values),
        "apo_zero": 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
        "apo_down": torch.sigmoid(beta * c) + 1 - torch.sigmoid(beta * D),
        "discopop": -logsigmoid(beta * D) * (1 - gate) + (-beta * D).exp() * gate,
        "sigmoid_norm": -logsigmoid(beta * mean),
    }.get(case.strip("`"))


@pytest.mark.parametrize("row", DPO_ROWS, ids=lambda row: row[0])
def test_the_rows_of_dpo_give_the_numbers_of_trl(row):
    """sft and wpo are said to differ, and only run."""
    g = torch.Generator().manual_seed(1)
    w, l, ref_w, ref_l = (-5 * torch.rand(B, generator=g, dtype=torch.float64) for _ in range(4))
    n, k = (torch.randint(2, 9, (B,), generator=g) for _ in range(2))
    kind = code(row[1])
    keywords = eval(f"dict({code(row[2])})", {**DPO, "chosen_lengths": n, "rejected_lengths": k})
    references = (ref_w, ref_l) if KINDS[kind].reference else (None, None)
    loss = preference_loss(w, l, *references, kind=kind, **keywords).loss
    expected = of_dpo(row[0], w - ref_w, l - ref_l, n, k)
    if code(row[0]) == "aot":
        x = 0.1 * ((w - l).sort().values - (ref_w - ref_l).sort().values)
        expected = -0.9 * logsigmoid(x) - 0.1 * logsigmoid(-x)
    if expected is None:
        assert code(row[0]) in ("sft", "use_weighting") and loss.isfinite()
    else:
        torch.testing.assert_close(loss, expected.mean())
