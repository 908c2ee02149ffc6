"""Judges: functions from texts to scores that no training stage has seen.

The reward model is trained on half A of the reviews. A judge must therefore learn from something else, or a
gain could be the policy exploiting what both have memorised: one classifier learns from half B, one from
Rotten Tomatoes, and VADER is a lexicon with rules. On texts of 24 tokens each of them is wrong in a quarter
to four tenths of the cases, so :func:`judge_quality` measures every judge on held-out human labels next to
the numbers it is used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from rlhf_fast.evaluate.statistics import expected_calibration_error

__all__ = [
    "Judge",
    "JudgeQuality",
    "TextClassifier",
    "Vader",
    "demo_judges",
    "half_b_judge",
    "judge_quality",
    "rotten_tomatoes_judge",
]


@runtime_checkable
class Judge(Protocol):
    """Scores texts; higher is better. Deterministic: the same text always gets the same score.

    ``neutral`` is the score that favours neither side, ``description`` says in a line what the judge learned
    from.
    """

    name: str
    description: str
    neutral: float

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) float64 scores of N texts."""
        ...


class LabelledText(Protocol):
    """A text with a human label; :class:`rlhf_fast.demo.assets.Review` is one."""

    @property
    def text(self) -> str: ...

    @property
    def positive(self) -> bool: ...


class TextClassifier:
    """Probability of the positive class from TF-IDF of words and word pairs, by logistic regression.

    ``crops`` is the number of random windows of ``crop_words`` words that are added per training text, plus
    one from its beginning, all with the label of the whole text. A judge of short texts needs them: a model
    fitted on whole reviews meets, in 24 tokens, feature vectors unlike any it was fitted on.

    Raises ``ValueError`` if a class is missing.
    """

    neutral = 0.5

    def __init__(
        self,
        name: str,
        description: str,
        reviews: Sequence[LabelledText],
        *,
        crops: int = 0,
        crop_words: int = 24,
        min_count: int = 3,
        inverse_regularisation: float = 4.0,
        seed: int = 0,
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        self.name = name
        self.description = description
        if len({review.positive for review in reviews}) != 2:
            raise ValueError(f"{name}: needs positive and negative reviews, got {len(reviews)} of one kind")
        texts, labels = _with_crops(reviews, crops, crop_words, np.random.default_rng(seed))
        self._vectorizer = TfidfVectorizer(
            ngram_range=(1, 2),
            min_df=min_count,
            sublinear_tf=True,
            strip_accents="unicode",
            token_pattern=r"[a-z0-9']+|[!?]",
        )
        # liblinear on the primal is deterministic and needs no thread pool; random_state pins it all the
        # same.
        self._model = LogisticRegression(C=inverse_regularisation, solver="liblinear", max_iter=200, random_state=seed)
        self._model.fit(self._vectorizer.fit_transform(texts), labels)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) probabilities of "positive"; a text without a known word gets the prior."""
        if not len(texts):
            return np.zeros(0)
        return self._model.predict_proba(self._vectorizer.transform(texts))[:, 1]


class Vader:
    """VADER compound score in [-1, 1]: a lexicon with rules for negation, emphasis (Hutto & Gilbert 2014)."""

    name = "VADER"
    description = "sentiment lexicon with rules, learned from no review"
    neutral = 0.0

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) compound scores; exactly 0 where no lexicon word occurs."""
        return np.array([self._analyzer.polarity_scores(text)["compound"] for text in texts], dtype=np.float64)


def half_b_judge(reviews: Sequence[LabelledText], *, seed: int = 0) -> TextClassifier:
    """Classifier for half B of the IMDb reviews, fitted on whole reviews and on windows of 24 words."""
    return TextClassifier(
        "IMDb half B",
        "classifier fitted on IMDb reviews that neither the policy nor its reward model has seen",
        reviews,
        crops=4,
        seed=seed,
    )


def rotten_tomatoes_judge(reviews: Sequence[LabelledText], *, seed: int = 0) -> TextClassifier:
    """Classifier for Rotten Tomatoes sentences, which are short already: no windows are added."""
    return TextClassifier(
        "Rotten Tomatoes",
        "classifier fitted on Rotten Tomatoes sentences only",
        reviews,
        min_count=2,
        seed=seed,
    )


def demo_judges(
    half_b: Sequence[LabelledText], rotten_tomatoes: Sequence[LabelledText], *, seed: int = 0
) -> list[Judge]:
    """The three judges of the demonstration, none of which shares a text with the reward model."""
    return [half_b_judge(half_b, seed=seed), rotten_tomatoes_judge(rotten_tomatoes, seed=seed), Vader()]


@dataclass(frozen=True)
class JudgeQuality:
    """How far a judge agrees with human labels.

    ``accuracy``: share right, a score at ``neutral`` counting one half. ``auc``: chance that a positive text
    gets more than a negative one, ties one half. ``calibration_error``: expected calibration error over 10
    bins for judges that return probabilities, otherwise None. ``texts``: how many.
    """

    accuracy: float
    auc: float
    calibration_error: float | None
    texts: int


def judge_quality(judge: Judge, texts: Sequence[str], positive: Sequence[bool]) -> JudgeQuality:
    """Agreement of ``judge`` with human labels; raises ``ValueError`` if one of the two labels is missing."""
    labels = np.asarray(positive, dtype=bool)
    if len(texts) != len(labels):
        raise ValueError(f"judge_quality: {len(texts)} texts, {len(labels)} labels")
    if not labels.any() or labels.all():
        raise ValueError("judge_quality: needs positive and negative texts")
    scores = judge.score(texts)
    right = np.where(scores == judge.neutral, 0.5, (scores > judge.neutral) == labels)
    calibration = None
    if isinstance(judge, TextClassifier):
        confidence = np.where(scores >= 0.5, scores, 1.0 - scores)
        calibration = expected_calibration_error(confidence, (scores >= 0.5) == labels)
    return JudgeQuality(float(right.mean()), _auc(scores, labels), calibration, len(texts))


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    negative = np.sort(scores[~labels])
    below = np.searchsorted(negative, scores[labels], side="left")
    not_above = np.searchsorted(negative, scores[labels], side="right")
    return float((below + not_above).mean() / (2 * len(negative)))


def _with_crops(
    reviews: Sequence[LabelledText], crops: int, crop_words: int, generator: np.random.Generator
) -> tuple[list[str], list[bool]]:
    texts: list[str] = []
    labels: list[bool] = []
    for review in reviews:
        texts.append(review.text)
        if crops:
            words = review.text.split()
            starts = generator.integers(0, max(1, len(words) - crop_words + 1), size=crops)
            texts += [" ".join(words[start : start + crop_words]) for start in (0, *starts)]
        labels += [review.positive] * (len(texts) - len(labels))
    return texts, labels
