"""Whether a candidate takes the place of the active model: proven on the same test images."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicomai.errors import Misuse
from dicomai.train.evaluate import (
    Array,
    Interval,
    Judged,
    Names,
    auc,
    difference,
    intervals,
    resamples,
    weighted_auc,
)

# A subgroup with fewer patients of either class says too little to refuse a model by.
FEWEST = 10


@dataclass(frozen=True, slots=True)
class Rule:
    """What the settings ask of a candidate.

    min_gain: of the test AUC, that the interval's lower end must exceed; margin: by which the AUC
    may fall in no subgroup; resamples, seed: of the bootstrap
    """

    min_gain: float
    margin: float
    resamples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidate less active model, of one label in one group of test images."""

    label: str
    group: str
    images: int
    before: float
    after: float
    gain: Interval


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the candidate is promoted, why, and its gain in AUC, over labels and sources."""

    promoted: bool
    reasons: tuple[str, ...]
    gain: Interval
    comparisons: tuple[Comparison, ...]

    @property
    def words(self) -> str:
        """The reasons in one line."""
        return "; ".join(self.reasons)

    def as_json(self, parent: str) -> dict[str, Any]:
        """For evaluation.json."""
        return {"active": parent, **asdict(self)}

    @property
    def would(self) -> str:
        """What a dry run says of it."""
        return "would-promote" if self.promoted else "would-keep"


WHOLE = "all test images"


def decide(
    labels: Sequence[str],
    targets: NDArray[np.float32],
    before: Array,
    after: Array,
    patients: Names,
    groups: Mapping[str, NDArray[np.bool_]],
    rule: Rule,
    against: Sequence[str] = (),
) -> Decision:
    """Compare two models on the same images: better on the whole, and nowhere much worse.

    targets: (N, K) of 0, 1 and NaN; before, after: probabilities (N, K), before NaN for a label
    that only the candidate knows, which must be better than chance; groups: name -> (N,); against:
    reasons for which it is not promoted, whatever it says. Raises Misuse where they share no label.
    """
    is_new = [bool(np.isnan(before[:, index]).all()) for index in range(len(labels))]
    if all(is_new):
        raise Misuse("the active model knows none of the recipe's labels: nothing to compare")
    newcomers = [
        f"not better than chance: {label}, AUC {_interval(chance)}"
        for index, label in enumerate(labels)
        if is_new[index]
        for chance in [_chance(targets[:, index], after[:, index], patients, rule)]
        if not chance.low > 0.5
    ]
    shared = [index for index, new in enumerate(is_new) if not new]
    labels = [labels[index] for index in shared]
    targets, before, after = targets[:, shared], before[:, shared], after[:, shared]
    sources = [chosen for name, chosen in groups.items() if name.startswith("source ")]
    gain = _mean_gain(targets, before, after, patients, sources, rule)
    found: list[Comparison] = []
    for index, label in enumerate(labels):
        known = ~np.isnan(targets[:, index])
        for name, chosen in {WHOLE: known, **groups}.items():
            mask = known & chosen
            truth = targets[mask, index].astype(np.float64)
            old, new = (Judged(truth, x[mask, index], patients[mask]) for x in (before, after))
            if _says_enough(old):
                found.append(_compare(label, name, old, new, rule))
    refusals = [*against, *newcomers]
    refusals += [
        f"worse by more than {rule.margin:g}: {_words(item)}"
        for item in found
        if item.gain.value < -rule.margin
    ]
    if not gain.low > rule.min_gain:
        refusals.insert(0, f"not better by more than {rule.min_gain:g}: AUC {_gained(gain)}")
    return Decision(
        not refusals, tuple(refusals) or (f"better: AUC {_gained(gain)}",), gain, tuple(found)
    )


def _mean_gain(
    targets: NDArray[np.float32],
    before: Array,
    after: Array,
    patients: Names,
    sources: Sequence[NDArray[np.bool_]],
    rule: Rule,
) -> Interval:
    """The gain in AUC, averaged over labels and sources, each resample of patients for all of them.

    Over all images together, a model could gain by telling from which hospital they are.
    """
    parts: list[tuple[int, NDArray[np.bool_]]] = []
    for index in range(targets.shape[1]):
        known = ~np.isnan(targets[:, index])
        of_sources = [known & source for source in sources]
        enough = [
            mask
            for mask in of_sources
            if _says_enough(Judged(targets[mask, index], before[mask, index], patients[mask]))
        ]
        parts += [(index, mask) for mask in enough or [known]]

    def gains(weights: Array) -> Array:
        of_parts = []
        for index, mask in parts:
            truth, counts = targets[mask, index].astype(np.float64), weights[:, mask]
            new, old = (
                weighted_auc(truth, scores[mask, index], counts) for scores in (after, before)
            )
            of_parts.append(new - old)
        return np.asarray(np.mean(of_parts, axis=0))

    drawn = [gains(weights) for weights in resamples(patients, rule.resamples, rule.seed)]
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])
    return Interval(float(gains(np.ones((1, len(targets))))[0]), float(low), float(high))


def _chance(targets: NDArray[np.float32], scores: Array, patients: Names, rule: Rule) -> Interval:
    """The AUC of a label that there is nothing to compare with."""
    known = ~np.isnan(targets)
    judged = Judged(targets[known].astype(np.float64), scores[known], patients[known])
    return intervals(judged, {"auc": weighted_auc}, rule.resamples, rule.seed)["auc"]


def _says_enough(judged: Judged) -> bool:
    counts = [len(set(judged.patients[judged.truth == value])) for value in (0, 1)]
    return min(counts) >= FEWEST


def _compare(label: str, group: str, before: Judged, after: Judged, rule: Rule) -> Comparison:
    return Comparison(
        label,
        group,
        len(before.truth),
        auc(before.truth, before.score),
        auc(after.truth, after.score),
        difference(before, after, weighted_auc, rule.resamples, rule.seed),
    )


def _words(item: Comparison) -> str:
    return (
        f"{item.label}, {item.group} ({item.images}): AUC {item.before:.3f} -> {item.after:.3f}, "
        f"{_gained(item.gain)}"
    )


def _interval(value: Interval) -> str:
    return f"{value.value:.3f} (95 %: {value.low:.3f} to {value.high:.3f})"


def _gained(gain: Interval) -> str:
    return f"{gain.value:+.3f} (95 %: {gain.low:+.3f} to {gain.high:+.3f})"
