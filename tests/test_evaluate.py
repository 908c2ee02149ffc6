"""Judges, text metrics and intervals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlhf_fast.demo.assets import Review
from rlhf_fast.evaluate import (
    Interval,
    Judge,
    Vader,
    bootstrap_mean,
    bootstrap_win_rate,
    demo_judges,
    distinct_n,
    judge_quality,
    lengths,
    repetition,
    statistics,
    words,
)
from rlhf_fast.evaluate.judges import TextClassifier, _with_crops
from rlhf_fast.evaluate.statistics import (
    best_of_n,
    compare,
    effective_sample_size,
    expected_calibration_error,
    pass_at_k,
)

GOOD = ("a wonderful film", "truly moving and funny", "the cast is superb", "great fun from start to end")
BAD = ("a dreadful film", "truly boring and flat", "the cast is awful", "a waste of time from start to end")


def corpus(copies: int = 5) -> list[Review]:
    """Reviews of four sentences; the same sentences in every order of rotation."""
    reviews = []
    for i in range(copies):
        for positive, side in ((True, GOOD), (False, BAD)):
            text = ". ".join(side[i % 4 :] + side[: i % 4])
            reviews.append(Review(text, positive, f"x:{i}"))
    return reviews


class Fixed:
    """A judge with given scores."""

    name, description, neutral = "fixed", "", 0.0

    def __init__(self, scores):
        self.scores = scores

    def score(self, texts):
        return np.asarray(self.scores, dtype=float)


# --- judges


def test_a_classifier_tells_unseen_mixtures_of_its_sentences_apart():
    judge = TextClassifier("toy", "", corpus(), min_count=1)
    good, bad = judge.score(["the cast is wonderful and superb", "a boring waste of time"])
    assert good > 0.6 > 0.4 > bad


def test_classifier_scores_are_the_same_on_every_fit_and_independent_of_the_batch():
    texts = ["a wonderful cast", "flat and awful", ""]
    first = TextClassifier("toy", "", corpus(), crops=2, min_count=1, seed=3).score(texts)
    second = TextClassifier("toy", "", corpus(), crops=2, min_count=1, seed=3)
    assert first.tolist() == second.score(texts).tolist()
    assert [second.score([t])[0] for t in texts] == first.tolist()


def test_classifier_ignores_case_accents_and_spaced_punctuation():
    judge = TextClassifier("toy", "", corpus(), min_count=1)
    a, b = judge.score(["Wonderful, SUPERB Film!", "wonderful , supérb film !"])
    assert a == b


def test_windows_are_cut_from_their_own_text_and_carry_its_label():
    review = Review(" ".join(f"w{i}" for i in range(50)), True, "x:1")
    short = Review("only three words", False, "x:2")
    texts, labels = _with_crops([review, short], 3, 8, np.random.default_rng(0))
    assert labels == [True] * 5 + [False] * 5
    assert texts[0] == review.text and texts[1] == " ".join(f"w{i}" for i in range(8))
    assert all(len(t.split()) == 8 and t in review.text for t in texts[2:5])
    assert texts[5:] == [short.text] * 5


def test_a_classifier_without_one_of_the_classes_is_refused():
    with pytest.raises(ValueError, match="toy: needs positive and negative reviews"):
        TextClassifier("toy", "", [Review("good", True, "x:1")] * 4)


def test_vader_knows_negation_and_gives_exactly_zero_to_neutral_text():
    good, bad, negated, neutral = Vader().score(
        ["a great film", "a horrible film", "not a great film", "the film lasts two hours"]
    )
    assert good > 0.5 and bad < -0.4 and negated < 0 and neutral == 0.0


def test_the_demo_judges_follow_the_protocol_and_learn_from_their_own_texts_only():
    half_b = [*corpus(8), Review("zzyzx zzyzx zzyzx wonderful", True, "x:9")]
    judges = demo_judges(half_b, corpus(8))
    assert [judge.name for judge in judges] == ["IMDb half B", "Rotten Tomatoes", "VADER"]
    assert all(isinstance(judge, Judge) and judge.description for judge in judges)
    for judge in judges:
        scores = judge.score(["superb cast", "awful waste"])
        assert scores.shape == (2,) and scores.dtype == np.float64 and scores[0] > scores[1]
        assert judge.score([]).shape == (0,)
    known = [judge._vectorizer.vocabulary_.get("zzyzx") for judge in judges[:2]]
    assert known[0] is not None and known[1] is None


def test_judge_quality_counts_a_tie_as_half_right_and_ranks_by_auc():
    quality = judge_quality(Fixed([2.0, 0.0, 1.0, -1.0]), list("abcd"), [True, True, False, False])
    # Right, tie, wrong, right; pairs (2,1) (2,-1) won, (0,1) lost, (0,-1) won.
    assert (quality.accuracy, quality.auc, quality.texts) == (0.625, 0.75, 4)
    assert quality.calibration_error is None
    assert judge_quality(Fixed([1.0, 1.0]), ["a", "b"], [True, False]).auc == 0.5


@pytest.mark.parametrize(("labels", "message"), [([True], "2 texts, 1 labels"), ([True, True], "negative")])
def test_judge_quality_refuses_missing_labels_and_classes(labels, message):
    with pytest.raises(ValueError, match=message):
        judge_quality(Fixed([1.0, 0.0]), ["a", "b"], labels)


# --- text metrics


def test_words_split_off_punctuation_and_keep_apostrophes():
    assert words("It's GREAT!! 9/10") == ["it's", "great", "!", "!", "9", "/", "10"]


def test_distinct_n_is_distinct_over_all_ngrams_and_never_crosses_texts():
    texts = [words("a b a b"), words("b a")]
    assert distinct_n(texts, 1) == 2 / 6
    assert distinct_n(texts, 2) == 2 / 4  # ab ba ab | ba
    assert distinct_n(texts, 3) == 2 / 2
    assert distinct_n([[1, 2], [3, 4]], 2) == 1.0  # would hold (2, 3) as well if texts were joined
    assert distinct_n([["a"]], 2) == 0.0 and distinct_n([], 1) == 0.0


def test_repetition_is_the_share_of_ngrams_seen_before_in_the_same_text():
    values = repetition([words("go go go go"), words("one two three"), words("a b c a b"), ["x"]], 2)
    assert values.tolist() == pytest.approx([2 / 3, 0.0, 0.25, 0.0])
    assert lengths([[1, 2, 3], []]).tolist() == [3.0, 0.0]


def test_an_ngram_order_below_one_is_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct_n([["a"]], 0)


# --- intervals


def test_the_bootstrap_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap_mean(values, resamples=8000)
    half = 1.959964 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


@pytest.mark.parametrize("clustered", [False, True])
def test_95_percent_intervals_cover_the_truth_about_95_percent_of_the_time(clustered):
    generator = np.random.default_rng(7)
    covered, runs = 0, 300
    for run in range(runs):
        if clustered:  # 40 prompts, 3 samples each: what differs is the prompt
            values = (generator.normal(0.5, 1.0, (40, 1)) + generator.normal(0, 0.2, (40, 3))).ravel()
            groups = np.repeat(np.arange(40), 3).tolist()
        else:
            values, groups = generator.exponential(0.5, 80), None
        found = bootstrap_mean(values, groups=groups, resamples=600, seed=run)
        covered += found.low <= 0.5 <= found.high
    assert 0.90 <= covered / runs <= 0.98


def test_ignoring_the_prompts_of_repeated_samples_would_make_the_interval_too_narrow():
    values = np.repeat(np.random.default_rng(0).normal(size=50), 4)
    groups = np.repeat(np.arange(50), 4).tolist()
    grouped, naive = bootstrap_mean(values, groups=groups), bootstrap_mean(values)
    assert grouped.value == pytest.approx(naive.value)
    # Four identical copies carry the information of one: twice the width.
    assert (grouped.high - grouped.low) / (naive.high - naive.low) == pytest.approx(2.0, abs=0.15)


def test_groups_of_unequal_size_weigh_by_their_samples_and_ignore_order():
    values, groups = [1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"]
    found = bootstrap_mean(values, groups=groups)
    assert (found.value, found.low, found.high) == (2.0, 1.0, 5.0)
    shuffled = bootstrap_mean([1.0, 5.0, 1.0, 1.0], groups=["a", "b", "a", "a"])
    assert shuffled == found


def test_pairing_removes_what_the_prompts_have_in_common():
    generator = np.random.default_rng(2)
    before = generator.normal(0, 5, 200)
    after = before + 0.3 + generator.normal(0, 0.1, 200)
    row = compare("judge", before, after)
    assert row.difference.low > 0.25 and row.difference.high < 0.35
    assert row.before.high - row.before.low > 1.0  # unpaired, the gain would drown
    assert row.difference.value == pytest.approx(row.after.value - row.before.value)


def test_a_win_rate_counts_a_tie_as_half_and_knows_which_way_is_better():
    before, after = [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 5.0]
    assert bootstrap_win_rate(before, after).value == (1 + 0.5 + 0 + 1) / 4
    assert bootstrap_win_rate(before, after, higher_is_better=False).value == (0 + 0.5 + 1 + 0) / 4
    same = bootstrap_win_rate([1.0] * 9, [1.0] * 9)
    assert same == Interval(0.5, 0.5, 0.5)
    assert compare("kl", before, after, higher_is_better=None).win_rate is None


def test_intervals_repeat_with_the_seed_and_do_not_depend_on_the_block_size(monkeypatch):
    values = np.random.default_rng(0).normal(size=37)
    first = bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) == first != bootstrap_mean(values, seed=6)
    monkeypatch.setattr(statistics, "_BLOCK", 37 * 7)
    assert bootstrap_mean(values, seed=5) == first


def test_a_higher_level_gives_a_wider_interval_and_one_unit_gives_none():
    values = np.arange(20.0)
    narrow, wide = bootstrap_mean(values, level=0.5), bootstrap_mean(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    alone = bootstrap_mean([4.0, 6.0], groups=["p", "p"])
    assert alone.value == 5.0 and not alone.has_range


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([]), "values must be a non-empty 1-D array of finite numbers"),
        (lambda: bootstrap_mean([1.0, math.nan]), "finite"),
        (lambda: bootstrap_mean([[1.0]]), "1-D"),
        (lambda: bootstrap_mean([1.0, 2.0], groups=["a"]), "groups must have 2 entries, got 1"),
        (lambda: bootstrap_mean([1.0, 2.0], level=1.0), "0 < level < 1"),
        (lambda: bootstrap_win_rate([1.0], [1.0, 2.0]), "paired, got 1 and 2 values"),
        (lambda: compare("vader", [1.0], []), r"compare\('vader'\): after"),
    ],
)
def test_unusable_scores_are_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- worked values


def test_calibration_error_and_effective_sample_size_match_worked_values():
    confidence, hits = [0.55, 0.65, 0.75, 0.85, 0.95], [1, 0, 1, 1, 1]
    # Ten bins over [0, 1]: every entry alone; five: .65 and .75 share one, and their errors cancel in part.
    assert expected_calibration_error(confidence, hits, bins=10) == pytest.approx(0.31)
    assert expected_calibration_error(confidence, hits, bins=5) == pytest.approx(0.21)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0.0
    assert effective_sample_size([0.5, 1, 2, 4]) / 4 == pytest.approx(0.6617647, abs=1e-7)
    assert effective_sample_size([1e300, 1e300]) == pytest.approx(2.0)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_best_of_n_equals_the_mean_over_all_subsets(n):
    scores = [0.3, -1.0, 2.0, 0.3, 5.5, 1.0]
    best = [max(subset) for subset in itertools.combinations(scores, n)]
    assert best_of_n(scores, n) == pytest.approx(sum(best) / len(best), abs=1e-12)


@pytest.mark.parametrize(("correct", "k"), [(0, 2), (1, 3), (3, 2), (5, 1), (4, 2)])
def test_pass_at_k_equals_the_share_of_subsets_with_a_correct_answer(correct, k):
    answers = [True] * correct + [False] * (5 - correct)
    hits = [any(subset) for subset in itertools.combinations(answers, k)]
    assert pass_at_k(5, correct, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)


def test_worked_value_functions_refuse_impossible_arguments():
    with pytest.raises(ValueError, match=r"n must be in 1\.\.2"):
        best_of_n([1.0, 2.0], 3)
    with pytest.raises(ValueError, match="0 <= correct <= samples"):
        pass_at_k(3, 4, 1)
    with pytest.raises(ValueError, match="not all zero"):
        effective_sample_size([0.0, 0.0])
    with pytest.raises(ValueError, match=r"confidence in \[0, 1\]"):
        expected_calibration_error([1.2], [1])
