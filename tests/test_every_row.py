"""Every recipe, advantage and preference loss has worked values, a gradient check, mask invariance and split invariance.

The tables are walked: a new row, or a new public function, without tests of the four fails here, and so does a test that no longer
takes every row. Tests are named file::function, below tests/.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest
import tolerances
import torch

import rlhf_fast
from rlhf_fast import preference_loss
from rlhf_fast.losses import RECIPES
from rlhf_fast.ops.group_advantages import FORMULAS
from rlhf_fast.preference_kinds import KINDS

HERE = Path(__file__).parent
PROPERTIES = ("worked values", "gradient", "masks", "splits")
NAMES = ("recipe", "kind", "case")
"""What tests call a row."""

TABLES = {
    # function: (its rows, the tests of each property that are parametrized over them)
    "policy_loss": (
        RECIPES,
        {
            "worked values": ["test_loss_recipes::test_worked_values"],
            "gradient": ["test_loss_recipes::test_gradcheck_of_every_recipe"],
            "masks": ["test_loss_recipes::test_masked_tokens_change_no_bit"],
            "splits": ["test_loss_splits::test_micro_batches_add_up", "test_loss_splits::test_two_ranks_add_up_to_one"],
        },
    ),
    "preference_loss": (
        KINDS,
        {
            "worked values": ["test_preference::test_worked_values"],
            "gradient": ["test_preference::test_gradcheck"],
            "masks": ["test_preference::test_masked_pairs_are_never_read_and_the_order_does_not_matter"],
            "splits": ["test_preference_splits::test_two_ranks_have_the_loss_and_the_gradient_of_one"],
        },
    ),
    "group_advantages": (
        FORMULAS,
        {
            "worked values": ["ops/test_group_advantages::test_worked_values"],
            "gradient": ["ops/test_group_advantages::test_gradcheck", "test_advantage_estimators::test_the_composed_group_kinds"],
            "masks": [
                "ops/test_group_advantages::test_masked_samples_belong_to_no_group",
                "test_advantage_estimators::test_the_composed_group_kinds",
            ],
            "splits": ["test_preference_splits::test_group_advantages_of_all_ranks_are_those_of_one"],
        },
    ),
}  # fmt: skip

EXCEPT = {
    (
        "policy_loss",
        "bnpo",
        "splits",
    ): "test_loss_splits::test_bnpo_divides_by_the_tokens_of_the_part_and_is_therefore_no_sum",
    # Its weight is a constant to the gradient, so that finite differences need answers where it is one.
    ("preference_loss", "wpo", "gradient"): "test_every_row::test_gradcheck_of_wpo",
}
"""(table, row, property): a test of its own."""

FUNCTIONS = {
    # public function without a table: a test of each property, in the order of PROPERTIES
    "advantages": (
        "ops/test_advantages::test_worked_values",
        "ops/test_advantages::test_gradcheck",
        "ops/test_advantages::test_masked_slots_are_never_read",
        "test_preference_splits::test_rewards_normalised_and_advantages_whitened_over_all_ranks_are_those_of_one",
    ),
    "gae": (
        "ops/test_gae::test_worked_values",
        "ops/test_gae::test_gradcheck",
        "ops/test_gae::test_masked_values_are_never_read",
        "ops/test_gae::test_rows_do_not_depend_on_the_batch_or_on_threads",
    ),
    "lambda_returns": (
        "test_advantage_estimators::test_lambda_returns_have_the_values_of_rlax",
        "test_advantage_estimators::test_gradcheck_of_lambda_returns",
        "test_advantage_estimators::test_packed_equals_padded_and_masked_slots_are_never_read",
        "test_advantage_estimators::test_a_row_has_the_same_bits_in_any_batch_and_keeps_its_nan",
    ),
    "vtrace": (
        "test_advantage_estimators::test_vtrace_has_the_values_of_rlax",
        "test_advantage_estimators::test_vtrace_clips_step_by_step",  # constants
        "test_advantage_estimators::test_packed_equals_padded_and_masked_slots_are_never_read",
        "test_advantage_estimators::test_a_row_has_the_same_bits_in_any_batch_and_keeps_its_nan",
    ),
    "gdpo_advantages": (
        "test_advantage_estimators::test_gdpo_normalises_before_it_adds",
        "test_advantage_estimators::test_gdpo_on_one_reward_is_whitened_grpo_and_masks_samples_and_rewards",
        "test_advantage_estimators::test_gdpo_on_one_reward_is_whitened_grpo_and_masks_samples_and_rewards",
        "test_preference_splits::test_rewards_normalised_and_advantages_whitened_over_all_ranks_are_those_of_one",
    ),
    "ppo_loss": (
        "ops/test_ppo_loss::test_item_27_worked_values_of_the_ratio_clip_and_where_its_gradient_is_zero",
        "ops/test_ppo_loss_modes::test_gradcheck",
        "ops/test_ppo_loss::test_masked_tokens_are_never_read",
        "ops/test_ppo_loss::test_item_26_micro_batches_that_share_a_normalizer_add_up_to_the_one_shot_gradient",
    ),
    "dpo_loss": (
        "ops/test_dpo_loss::test_worked_values",
        "ops/test_dpo_loss::test_gradcheck",
        "ops/test_dpo_loss::test_masked_tokens_and_pairs_are_never_read",
        "ops/test_dpo_loss::test_micro_batches_that_share_a_normalizer_add_up",
    ),
    "linear_ppo_loss": (
        "ops/test_linear_ppo_loss::test_loss_and_statistics_have_the_bits_of_the_two_ops",  # which have worked values
        "ops/test_linear_ppo_loss::test_gradcheck",
        "ops/test_linear_ppo_loss::test_masked_rows_are_never_multiplied_or_read",
        "ops/test_linear_ppo_loss::test_micro_batches_that_share_a_normalizer_add_up",
    ),
    "reward_loss": (
        "ops/test_reward_loss::test_worked_values",
        "ops/test_reward_loss::test_gradcheck",
        "ops/test_reward_loss::test_masked_pairs_are_never_read",
        "ops/test_reward_loss::test_micro_batches_that_share_the_number_of_pairs_add_up",
    ),
    "kto_loss": ("test_ranking::test_worked_values_of_kto", *["test_ranking::test_kto_masks_splits_and_gradients"] * 3),
    "plackett_luce_loss": (
        "test_ranking::test_worked_values_of_plackett_luce",
        *["test_ranking::test_plackett_luce_masks_splits_and_gradients"] * 3,
    ),
}

OTHERS = {
    "backends", "covariance_mask", "cached_attention", "gather_rows", "kl_estimate", "length_adaptive_lambda", "linear_token_logprobs", "lora_linear",
    "off_policy_mask", "patch", "rms_norm", "rollout_correction", "rotary", "running_delta", "sample_tokens", "sequence_logprobs", "silu_mul",
    "token_logprobs",
    "top_entropy_mask", "unpatch", "update_reference", "use_backend", "varlen_attention", "whiten", "with_length_covariate",
}  # fmt: skip
"""Public functions that are neither a loss nor an estimator of advantages."""


@cache
def module(name):
    path = HERE / f"{name}.py"
    for folder in (HERE, path.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(f"of_{path.stem}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def resolve(name):
    """The test function; a missing one fails."""
    file, function = name.split("::")
    assert hasattr(module(file), function), f"{name} is gone"
    return getattr(module(file), function)


def values_of(test):
    """The rows that its parametrize marks give it."""
    found = set()
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            for place in (names.index(name) for name in NAMES if name in names):
                rows = (getattr(value, "values", value) if hasattr(value, "marks") else value for value in values)
                found |= {row[place] if len(names) > 1 else row for row in rows}
    return found


def may_leave_early(test):
    """Whether a row may pass without being tested."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(test))).body
    todo, inner = list(body.body), (ast.FunctionDef, ast.Lambda)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Return) or (isinstance(node, ast.Attribute) and node.attr in ("skip", "xfail")):
            return True
        if not isinstance(node, inner):
            todo += ast.iter_child_nodes(node)
    return False


@pytest.mark.parametrize("wanted", PROPERTIES)
@pytest.mark.parametrize("table", TABLES)
def test_every_row_has_a_test_of_every_property(table, wanted):
    rows, tests = TABLES[table]
    own = {row for name, row, which in EXCEPT if (name, which) == (table, wanted)}
    covered = set().union(*(values_of(resolve(name)) for name in tests[wanted]))
    assert own <= set(rows) and set(rows) - covered <= own, sorted(set(rows) - covered - own)
    for name in tests[wanted]:
        assert own or not may_leave_early(resolve(name)), name
    if wanted == "worked values":  # a test that walks the table itself finds them in a table of its module
        tables = (module(name.split("::")[0]).WORKED for name in tests[wanted])
        worked = {row[0] if isinstance(row, tuple) else row for table in tables for row in table}
        assert worked >= set(rows), sorted(set(rows) - worked)


@pytest.mark.parametrize("key", EXCEPT, ids=str)
def test_the_rows_with_tests_of_their_own_have_them(key):
    assert key[1] in inspect.getsource(resolve(EXCEPT[key]))


def test_every_public_function_has_a_test_of_every_property():
    functions = {name for name in rlhf_fast.__all__ if inspect.isfunction(getattr(rlhf_fast, name))}
    assert functions == {*TABLES, *FUNCTIONS, *OTHERS}
    for name, tests in FUNCTIONS.items():
        assert len(tests) == len(PROPERTIES), name
        for test in map(resolve, tests):
            assert not may_leave_early(test), (name, test.__name__)


def test_what_this_file_would_notice():
    @pytest.mark.parametrize("split", ["c"])
    @pytest.mark.parametrize(("n", "kind"), [(1, "a"), (2, "b")])
    def full(n, kind, split):
        assert kind

    @pytest.mark.parametrize("recipe", ["a", "b"])
    def early(recipe):
        if recipe == "a":
            return
        call = lambda: recipe
        assert call()

    assert values_of(full) == values_of(early) == {"a", "b"}
    assert may_leave_early(early) and not may_leave_early(full)
    with pytest.raises(AssertionError, match="is gone"):
        resolve("test_every_row::test_nothing")


def test_gradcheck_of_wpo():
    """Where the mean log-probs add up to more than 0 its weight is 1; elsewhere it is dpo with the weight as a given constant."""
    g = torch.Generator().manual_seed(3)
    w, l, rw, rl = (torch.rand(5, generator=g, dtype=torch.float64) for _ in range(4))
    lengths = {"chosen_lengths": torch.tensor([1, 2, 3, 4, 5]), "rejected_lengths": torch.tensor([5, 3, 4, 1, 2])}
    options = {"label_smoothing": 0.1, "mask": torch.arange(5) != 2}
    call = lambda a, b: preference_loss(a, b, rw, rl, kind="wpo", **lengths, **options).loss
    assert torch.autograd.gradcheck(call, (w.requires_grad_(), l.requires_grad_()), **tolerances.GRADCHECK)
    leaves = [(-3 * x).detach().requires_grad_() for x in (w, l)]
    weights = (leaves[0] / lengths["chosen_lengths"] + leaves[1] / lengths["rejected_lengths"]).exp().detach()
    assert (weights < 1).all()
    given = preference_loss(*leaves, rw, rl, weights=weights, **options).loss
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (call(*leaves), given)), strict=True):
        torch.testing.assert_close(a, b)
        assert a.any()
