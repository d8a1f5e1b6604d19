"""A trained network made ready to be used: calibrated, with thresholds, and measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dicomai.infer.network import NetworkWithMaps
from dicomai.prepare.image import normalize
from dicomai.study import Float32, Model
from dicomai.train.dataset import Data, subgroups
from dicomai.train.evaluate import (
    Array,
    Interval,
    Judged,
    at_sensitivity,
    calibration_error,
    figures,
    intervals,
    reliability,
    scaling,
    youden_by_source,
)
from dicomai.train.loop import score
from dicomai.train.recipe import Recipe

GROUPS = ("source", "sex", "age", "view", "manufacturer")
AT_ONCE = 32  # images
Score = Callable[[Float32], tuple[Float32, Float32]]
FEWEST = 5  # patients of each class, that a group's figures are made of


@dataclass(frozen=True, slots=True)
class Figures:
    """What a label reaches in one group of images."""

    label: str
    group: str
    images: int
    patients: int
    positive: int
    figures: Mapping[str, Interval]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of a label, on the test split: the expected calibration error, and its diagram after it."""

    label: str
    temperature: float
    bias: float
    before: float
    after: float
    diagram: Sequence[tuple[float, float, int]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that is measured of a candidate on the test split; scores: (N, K), probabilities."""

    thresholds: Mapping[str, float]
    whole: Sequence[Figures]
    groups: Sequence[Figures]
    calibration: Sequence[Calibration]
    scores: Array

    def as_json(self) -> dict[str, Any]:
        """For evaluation.json: without the scores of single images."""
        return {
            "thresholds": dict(self.thresholds),
            "figures": [_plain(item) for item in (*self.whole, *self.groups)],
            "calibration": [asdict(item) for item in self.calibration],
        }


def _plain(item: Figures) -> dict[str, Any]:
    found = {name: [round(x, 4) for x in asdict(v).values()] for name, v in item.figures.items()}
    return {**asdict(item), "figures": found}


def calibrate(network: NetworkWithMaps, check: Data, recipe: Recipe) -> list[tuple[float, float]]:
    """Scale and shift the logits as fits the validation split: T and b of each label.

    It goes into the last layer, so that whoever loads the weights gets calibrated probabilities,
    and class maps that still add up to the logit.
    """
    logits = exact(network, check, recipe)
    known = ~np.isnan(check.targets)
    if recipe.kind == "multi-class":
        is_one = (check.targets == 1).sum(1) == 1
        divisor, shifts = scaling(logits[is_one], check.targets[is_one].argmax(1))
        found = [(divisor, float(shift)) for shift in shifts]
    else:
        found = [
            _of_two(logits[known[:, k], k], check.targets[known[:, k], k] > 0.5)
            for k in range(len(recipe.keys))
        ]
    head = network.head
    divisors, biases = torch.tensor(found, device=head.weight.device).T
    with torch.no_grad():
        head.weight.div_(divisors[:, None])
        head.bias.div_(divisors).add_(biases)
    return found


def _of_two(logits: Array, is_there: NDArray[np.bool_]) -> tuple[float, float]:
    """Absent is a class whose logit is 0."""
    both = np.stack([np.zeros_like(logits), logits], axis=1)
    divisor, (absent, present) = scaling(both, is_there.astype(np.intp))
    return divisor, float(present - absent)


def exact(network: NetworkWithMaps, data: Data, recipe: Recipe) -> Array:
    """Logits in full precision, as the daemon computes them: (N, K)."""
    plain = recipe.model_copy(update={"half_precision": False})
    return score(network, data.images, plain).numpy().astype(np.float64)


def said_by(score: Score, model: Model, squares: NDArray[np.uint8]) -> Array:
    """What a model says of grey images (N, size, size), letterboxed: probabilities (N, K)."""
    parts = [
        score(np.stack([as_input(model, square) for square in squares[start : start + AT_ONCE]]))[0]
        for start in range(0, len(squares), AT_ONCE)
    ]
    return np.concatenate(parts).astype(np.float64)


def as_input(model: Model, square: NDArray[np.uint8]) -> Float32:
    """A grey image as the daemon shows it to a model: (channels, size, size)."""
    shown = square.astype(np.float32) / np.float32(255)
    return normalize(shown, model.preprocessing, model.channels)


def probabilities(logits: Array, kind: str) -> Array:
    """(N, K) of 0 to 1."""
    if kind == "multi-class":
        return np.asarray(np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None]))
    return np.asarray(1 / (1 + np.exp(-logits)))


def choose_thresholds(scores: Array, check: Data, recipe: Recipe) -> dict[str, float]:
    """By the recipe's rule, on the validation split; as short as it may be without another call."""
    rule, found = recipe.judgement.threshold, {}
    for index, label in enumerate(recipe.keys):
        known = ~np.isnan(check.targets[:, index])
        truth = check.targets[known, index].astype(np.float64)
        mine = scores[known, index]
        value = (
            youden_by_source(truth, mine, check.sources[known])
            if rule == "youden"
            else at_sensitivity(truth, mine, rule)
        )
        found[label] = shortened(value, mine)
    return found


def shortened(threshold: float, scores: Array) -> float:
    """With as few places, three or more, as none of these scores is called otherwise by."""
    for places in range(3, 17):
        value = round(threshold, places)
        if ((scores >= value) == (scores >= threshold)).all():
            return value
    return threshold


def evaluate(
    before: Array,
    scores: Array,
    test: Data,
    thresholds: Mapping[str, float],
    scales: Sequence[tuple[float, float]],
    recipe: Recipe,
) -> Evaluation:
    """Measure on the test split; before: probabilities without calibration.

    scales: as calibrate() returns them
    """
    groups = subgroups(test, GROUPS)
    everything = {"all": np.ones(len(test), bool)}
    whole: list[Figures] = []
    parts: list[Figures] = []
    calibration: list[Calibration] = []
    for index, label in enumerate(recipe.keys):
        known = ~np.isnan(test.targets[:, index])
        truth = test.targets[:, index].astype(np.float64)
        judged = Judged(truth, scores[:, index], test.patients)
        for chosen, into in ((everything, whole), (groups, parts)):
            for name, mask in chosen.items():
                item = judged.where(known & mask)
                if _says_enough(item):
                    into.append(_figures(label, name, item, thresholds[label], recipe))
        calibration.append(
            Calibration(
                label,
                *scales[index],
                calibration_error(truth[known], before[known, index]),
                calibration_error(truth[known], scores[known, index]),
                reliability(truth[known], scores[known, index]),
            )
        )
    return Evaluation(thresholds, whole, parts, calibration, scores)


def _says_enough(judged: Judged) -> bool:
    counts = [len(set(judged.patients[judged.truth == value])) for value in (0, 1)]
    return min(counts) >= FEWEST


def _figures(label: str, group: str, judged: Judged, threshold: float, recipe: Recipe) -> Figures:
    how = recipe.judgement
    return Figures(
        label,
        group,
        len(judged.truth),
        len(set(judged.patients)),
        int(judged.truth.sum()),
        intervals(judged, figures(threshold), how.resamples, recipe.seed),
    )


def most_confident_mistakes(
    evaluation: Evaluation, test: Data, recipe: Recipe, count: int
) -> list[tuple[int, str, float]]:
    """Index, label and probability of what the candidate is most wrong about."""
    found: list[tuple[float, int, str, float]] = []
    for index, label in enumerate(recipe.keys):
        truth: NDArray[np.float32] = test.targets[:, index]
        for image in np.flatnonzero(~np.isnan(truth)):
            probability = float(evaluation.scores[image, index])
            found.append((abs(probability - truth[image]), int(image), label, probability))
    found.sort(reverse=True)
    return [(image, label, probability) for _, image, label, probability in found[:count]]
