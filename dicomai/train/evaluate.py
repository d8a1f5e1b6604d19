"""How good a model is, with intervals; how well calibrated; where its thresholds lie."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

Array = NDArray[np.float64]
Names = NDArray[np.str_]

AT_ONCE = 2_000_000  # weights of resamples in memory together
BINS = 10


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Judged:
    """One label of some images whose truth is known: truth (0 or 1), score (0 to 1), patients."""

    truth: Array
    score: Array
    patients: Names

    def where(self, chosen: NDArray[np.bool_]) -> "Judged":
        """Some of them."""
        return Judged(self.truth[chosen], self.score[chosen], self.patients[chosen])

    @property
    def has_both(self) -> bool:
        """Whether there are images with the label and without."""
        return bool(0 < self.truth.sum() < len(self.truth))


# A figure of weighted images: (truth, score, weights) -> value; weights (R, N) give R values.
Figure = Callable[[Array, Array, Array], Array]


def auc(truth: Array, score: Array) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative.

    Ties count half (Hanley and McNeil, Radiology 1982).
    """
    return float(weighted_auc(truth, score, np.ones((1, len(truth))))[0])


def weighted_auc(truth: Array, score: Array, weights: Array) -> Array:
    """The AUC where image i is there weights[r, i] times: (R,)."""
    order = np.argsort(score, kind="stable")
    positive, ordered = truth[order] > 0.5, weights[:, order]
    _, group = np.unique(score[order], return_inverse=True)
    starts = np.flatnonzero(np.r_[True, np.diff(group) > 0])
    of_positives = np.add.reduceat(ordered * positive, starts, axis=1)
    of_negatives = np.add.reduceat(ordered * ~positive, starts, axis=1)
    below = np.cumsum(of_negatives, axis=1) - of_negatives / 2
    pairs = of_positives.sum(1) * of_negatives.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((of_positives * below).sum(1) / pairs)


def weighted_average_precision(truth: Array, score: Array, weights: Array) -> Array:
    """Precision averaged over the positives, from the highest score down: (R,).

    Images of one score are found together (Su, Yuan and Zhu, ICTIR 2015).
    """
    order = np.argsort(-score, kind="stable")
    positive, ordered = truth[order] > 0.5, weights[:, order]
    _, group = np.unique(-score[order], return_inverse=True)
    starts = np.flatnonzero(np.r_[True, np.diff(group) > 0])
    found = np.add.reduceat(ordered * positive, starts, axis=1)
    called = np.cumsum(np.add.reduceat(ordered, starts, axis=1), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.cumsum(found, axis=1) / called
        return np.asarray(np.nansum(found * precision, axis=1) / found.sum(1))


def rates(threshold: float) -> dict[str, Figure]:
    """Figures of a decision: positive at the threshold or above."""

    def share(of: Callable[[Array], NDArray[np.bool_]], right: bool) -> Figure:
        def figure(truth: Array, score: Array, weights: Array) -> Array:
            chosen = of(truth)
            good = ((score >= threshold) == right)[chosen]
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray((weights[:, chosen] * good).sum(1) / weights[:, chosen].sum(1))

        return figure

    sensitivity = share(lambda truth: truth > 0.5, True)
    specificity = share(lambda truth: truth < 0.5, False)

    def accuracy_of(truth: Array, score: Array, weights: Array) -> Array:
        good = (score >= threshold) == (truth > 0.5)
        return np.asarray((weights * good).sum(1) / weights.sum(1))

    def balanced(truth: Array, score: Array, weights: Array) -> Array:
        both = sensitivity(truth, score, weights), specificity(truth, score, weights)
        return np.asarray((both[0] + both[1]) / 2)

    return {
        "accuracy": accuracy_of,
        "balanced_accuracy": balanced,
        "sensitivity": sensitivity,
        "specificity": specificity,
    }


def weighted_loss(truth: Array, score: Array, weights: Array) -> Array:
    """Cross-entropy in nats: (R,)."""
    likely = np.clip(np.where(truth > 0.5, score, 1 - score), 1e-12, 1)
    return np.asarray(-(weights * np.log(likely)).sum(1) / weights.sum(1))


def figures(threshold: float) -> dict[str, Figure]:
    """Every figure that a label is judged by."""
    return {
        "auc": weighted_auc,
        "average_precision": weighted_average_precision,
        "loss": weighted_loss,
        **rates(threshold),
    }


def resamples(patients: Names, count: int, seed: int) -> Iterator[Array]:
    """How often each image is in a resample of whole patients: (R, N), count rows in all."""
    random = np.random.default_rng(seed)
    names, owner = np.unique(patients, return_inverse=True)
    rows = max(1, AT_ONCE // max(1, len(patients)))
    for start in range(0, count, rows):
        size = min(rows, count - start)
        drawn = random.integers(len(names), size=(size, len(names)))
        counts = np.zeros((size, len(names)))
        np.add.at(counts, (np.arange(size)[:, None], drawn), 1)
        yield counts[:, owner]


def intervals(
    judged: Judged, wanted: Mapping[str, Figure], count: int, seed: int
) -> dict[str, Interval]:
    """Each figure with its percentile interval over resamples of whole patients."""
    drawn: dict[str, list[Array]] = {name: [] for name in wanted}
    for weights in resamples(judged.patients, count, seed):
        for name, figure in wanted.items():
            drawn[name].append(figure(judged.truth, judged.score, weights))
    once = np.ones((1, len(judged.truth)))
    found = {}
    for name, figure in wanted.items():
        # A resample without one of the classes has no such figure.
        low, high = np.nanpercentile(np.concatenate(drawn[name]), [2.5, 97.5])
        value = figure(judged.truth, judged.score, once)[0]
        found[name] = Interval(float(value), float(low), float(high))
    return found


def auc_interval(truth: Array, score: Array, patients: Names, seed: int) -> Interval:
    """AUC with its percentile interval over 2,000 resamples of whole patients."""
    return intervals(Judged(truth, score, patients), {"auc": weighted_auc}, 2000, seed)["auc"]


def difference(before: Judged, after: Judged, figure: Figure, count: int, seed: int) -> Interval:
    """After less before, of the same images, in the same resamples (paired bootstrap)."""
    drawn = [
        figure(after.truth, after.score, weights) - figure(before.truth, before.score, weights)
        for weights in resamples(before.patients, count, seed)
    ]
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])
    once = np.ones((1, len(before.truth)))
    value = figure(after.truth, after.score, once) - figure(before.truth, before.score, once)
    return Interval(float(value[0]), float(low), float(high))


# While training


def accuracy(logits: NDArray[np.float32], targets: NDArray[np.float32]) -> float:
    """Share of what is known that is called right at 0.5."""
    known = ~np.isnan(targets)
    return float(((logits > 0) == (targets > 0.5))[known].mean())


def mean_auc(logits: NDArray[np.float32], targets: NDArray[np.float32], sources: Names) -> float:
    """The mean over labels and sources, so that no source can be traded for another."""
    found = []
    for label in range(targets.shape[1]):
        known = ~np.isnan(targets[:, label])
        truth, score = targets[known, label].astype(np.float64), logits[known, label]
        for mask in _with_both(truth, sources[known]):
            found.append(auc(truth[mask], score[mask].astype(np.float64)))
    return float(np.mean(found))


def _with_both(truth: Array, sources: Names) -> list[NDArray[np.bool_]]:
    """The sources that have images with the label and without; all as one, where none has."""
    masks = [sources == name for name in np.unique(sources)]
    both = [mask for mask in masks if 0 < truth[mask].sum() < mask.sum()]
    return both or [np.ones(len(truth), bool)]


# Thresholds


def sensitivity_specificity(truth: Array, score: Array, threshold: float) -> tuple[float, float]:
    """Share of the positives at or above the threshold, and of the negatives below it."""
    called = score >= threshold
    return float(called[truth > 0.5].mean()), float((~called[truth < 0.5]).mean())


def youden_by_source(truth: Array, score: Array, sources: Names) -> float:
    """The threshold with the largest mean of Youden's index over the sources (Cancer 1950).

    It lies half-way between two neighbouring scores, so that rounding does not move it.
    """
    masks = _with_both(truth, sources)
    return float(
        max(
            _between(score),
            key=lambda t: sum(sum(sensitivity_specificity(truth[m], score[m], t)) for m in masks),
        )
    )


def at_sensitivity(truth: Array, score: Array, wanted: float) -> float:
    """The highest threshold at which the sensitivity is at least so much."""
    positives = np.sort(score[truth > 0.5])
    missed = int(np.floor(len(positives) * (1 - wanted) + 1e-9))
    lowest = positives[min(missed, len(positives) - 1)]
    below = score[score < lowest]
    return float((lowest + below.max()) / 2) if len(below) else float(lowest)


def _between(score: Array) -> Array:
    values = np.unique(score)
    return np.asarray((values[1:] + values[:-1]) / 2) if len(values) > 1 else values


# Calibration

COLDEST, HOTTEST = 0.25, 10.0


def scaling(logits: Array, chosen: NDArray[np.intp]) -> tuple[float, Array]:
    """A temperature T and a bias b of each class: logits / T + b are the likeliest ones.

    logits: (N, C); chosen: (N,), the true class. The bias takes back what class weights, and
    classes that were more frequent in training than here, have put on top (Alexandari et al., ICML
    2020; Guo et al., ICML 2017). Of few images that are all told apart nothing is certain: the
    targets are Platt's (Advances in Large Margin Classifiers, 1999), and T stays within COLDEST
    and HOTTEST.
    """
    x, truth = torch.from_numpy(logits), torch.from_numpy(chosen)
    classes = logits.shape[1]
    counts = torch.bincount(truth, minlength=classes).double()[truth, None]
    wanted = (one_hot(truth, classes) * counts + 1) / (counts + classes)
    least, most = 1 / HOTTEST, 1 / COLDEST
    place = torch.tensor(np.log((1 - least) / (most - 1)), requires_grad=True)  # where T is 1
    bias = torch.zeros(classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [place, bias], max_iter=500, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def inverse() -> Tensor:
        return least + (most - least) * place.sigmoid()

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x * inverse() + bias, wanted)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return float(1 / inverse().detach()), bias.detach().numpy()


def calibration_error(truth: Array, score: Array, bins: int = BINS) -> float:
    """Expected calibration error: mean distance of share and score, over bins of equal size.

    Bins of equal count have the smaller bias (Nixon et al., CVPR Workshops 2019).
    """
    order = np.argsort(score, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [abs(truth[part].mean() - score[part].mean()) * len(part) for part in parts]
    return float(sum(gaps) / len(truth))


def reliability(truth: Array, score: Array, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Of each bin: mean score, share of positives, images."""
    order = np.argsort(score, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return [(float(score[p].mean()), float(truth[p].mean()), len(p)) for p in parts]
