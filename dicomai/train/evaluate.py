"""How good a model is, with intervals."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def auc(truth: Array, score: Array) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative.

    Mann-Whitney U with ties counted half (Hanley and McNeil, Radiology 1982).
    """
    ranks = _midranks(score)
    positives = truth > 0.5
    n1, n0 = int(positives.sum()), int((~positives).sum())
    return float((ranks[positives].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def _midranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def auc_interval(truth: Array, score: Array, patients: NDArray[np.str_], seed: int) -> Interval:
    """AUC with its percentile interval over 2,000 resamples of whole patients."""
    rng = np.random.default_rng(seed)
    names, owner = np.unique(patients, return_inverse=True)
    images = [np.flatnonzero(owner == patient) for patient in range(len(names))]
    figures: list[float] = []
    while len(figures) < 2000:
        drawn = np.concatenate([images[i] for i in rng.integers(len(names), size=len(names))])
        if 0 < truth[drawn].sum() < len(drawn):
            figures.append(auc(truth[drawn], score[drawn]))
    low, high = np.percentile(figures, [2.5, 97.5])
    return Interval(auc(truth, score), float(low), float(high))


def sensitivity_specificity(truth: Array, score: Array, threshold: float) -> tuple[float, float]:
    """Share of the positives at or above the threshold, and of the negatives below it."""
    called = score >= threshold
    return float(called[truth > 0.5].mean()), float((~called[truth < 0.5]).mean())


def youden_by_source(truth: Array, score: Array, sources: NDArray[np.str_]) -> float:
    """The threshold with the largest mean of Youden's index over the sources (Cancer 1950).

    It lies half-way between two neighbouring scores, so that rounding does not move it.
    """
    values = np.unique(score)
    candidates = (values[1:] + values[:-1]) / 2
    masks = [sources == name for name in np.unique(sources)]
    return float(
        max(
            candidates,
            key=lambda t: sum(sum(sensitivity_specificity(truth[m], score[m], t)) for m in masks),
        )
    )
