"""Figures, their intervals, calibration and thresholds: by the book, and the same again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_loop import shapes

from dicomai.infer.network import build
from dicomai.settings import shipped
from dicomai.train import judge
from dicomai.train.evaluate import (
    COLDEST,
    HOTTEST,
    Judged,
    at_sensitivity,
    auc,
    auc_interval,
    calibration_error,
    difference,
    figures,
    intervals,
    mean_auc,
    scaling,
    sensitivity_specificity,
    weighted_auc,
    weighted_average_precision,
    youden_by_source,
)
from dicomai.train.judge import shortened
from dicomai.train.recipe import Target, load


def counted_auc(truth: NDArray[np.float64], scores: NDArray[np.float64]) -> float:
    """Every pair of a positive and a negative, a tie for half."""
    pairs = [
        float(p > n) + 0.5 * float(p == n) for p in scores[truth == 1] for n in scores[truth == 0]
    ]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auc_counts_pairs_and_ties_for_half(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for _ in range(20):
        truth = rng.permutation(np.arange(30) % 3 == 0).astype(float)
        scores = rng.integers(levels, size=30) / levels
        assert auc(truth, scores) == pytest.approx(counted_auc(truth, scores), abs=1e-12)


@pytest.mark.parametrize(("scores", "expected"), [([0, 1], 1), ([1, 0], 0), ([3, 3], 0.5)])
def test_auc_at_its_ends(scores: list[float], expected: float) -> None:
    assert auc(np.array([0.0, 1.0]), np.array(scores, float)) == expected


def test_the_interval_contains_the_figure_and_comes_out_the_same_again() -> None:
    rng = np.random.default_rng(3)
    truth = np.repeat([0.0, 1.0], 40)
    scores = truth + rng.normal(size=80)
    patients = np.array([f"p{n // 2}" for n in range(80)])
    found = auc_interval(truth, scores, patients, 1)
    assert 0 < found.low < found.value < found.high < 1
    assert found.value == auc(truth, scores)
    assert found == auc_interval(truth, scores, patients, 1)


def test_whole_patients_are_drawn() -> None:
    rng = np.random.default_rng(4)
    truth = np.repeat([0.0, 1.0], 20)
    scores = truth + rng.normal(size=40)
    alone = np.array([f"p{n}" for n in range(40)])
    tenfold = [np.repeat(values, 10) for values in (truth, scores, alone)]
    once = auc_interval(truth, scores, alone, 1)
    many = auc_interval(*tenfold, 1)
    # Ten images of each patient tell no more than one.
    assert many.high - many.low == pytest.approx(once.high - once.low, rel=0.05)


def test_the_threshold_itself_is_positive() -> None:
    truth, scores = np.array([0.0, 0, 1, 1]), np.array([0.1, 0.5, 0.5, 0.9])
    assert sensitivity_specificity(truth, scores, 0.5) == (1.0, 0.5)


def test_the_threshold_lies_half_way_between_the_scores_that_it_separates() -> None:
    truth, scores = np.array([0.0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.9])
    assert youden_by_source(truth, scores, np.array(["a"] * 4)) == pytest.approx(0.4)


def test_a_large_source_does_not_decide_the_threshold_alone() -> None:
    truth = np.array([0.0, 1] * 11)
    # The large source is indifferent from 0.2 to 0.8, and slightly better at 0.9.
    scores = np.array([0.2, 0.8] * 10 + [0.6, 0.7])
    sources = np.array(["large"] * 20 + ["small"] * 2)
    assert youden_by_source(truth, scores, sources) == pytest.approx(0.65)


def some(seed: int, count: int = 200, levels: int | None = None) -> Judged:
    """Scores that tell something, one image a patient."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(count) < 0.4).astype(float)
    score = 1 / (1 + np.exp(-(truth * 1.5 - 0.7 + rng.normal(size=count))))
    if levels is not None:
        score = np.round(score * levels) / levels
    return Judged(truth, score, np.array([f"p{n}" for n in range(count)]))


@pytest.mark.parametrize("levels", [4, None])
def test_weights_do_what_repeated_images_would(levels: int | None) -> None:
    judged = some(1, 60, levels)
    rng = np.random.default_rng(2)
    for name, figure in figures(0.5).items():
        counts = rng.integers(0, 4, 60)
        repeated = [np.repeat(values, counts) for values in (judged.truth, judged.score)]
        weighted = figure(judged.truth, judged.score, counts[None].astype(float))[0]
        plain = figure(repeated[0], repeated[1], np.ones((1, counts.sum())))[0]
        assert weighted == pytest.approx(plain, abs=1e-12), name


def test_average_precision_adds_up_precision_where_recall_grows() -> None:
    truth = np.array([1.0, 0, 1, 0, 1])
    score = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    expected = (1 / 1 + 2 / 3 + 3 / 5) / 3
    found = weighted_average_precision(truth, score, np.ones((1, 5)))[0]
    assert found == pytest.approx(expected)
    tied = weighted_average_precision(truth, np.full(5, 0.5), np.ones((1, 5)))[0]
    assert tied == pytest.approx(3 / 5)


def test_every_figure_lies_within_its_interval() -> None:
    found = intervals(some(3), figures(0.5), 300, 1)
    assert set(found) == {
        "auc",
        "average_precision",
        "loss",
        "accuracy",
        "balanced_accuracy",
        "sensitivity",
        "specificity",
    }
    for name, value in found.items():
        assert value.low < value.value < value.high, name


def test_the_interval_of_a_difference_is_narrower_in_the_same_resamples() -> None:
    judged = some(4)
    rng = np.random.default_rng(5)
    other = Judged(judged.truth, judged.score + rng.normal(0, 0.02, 200), judged.patients)
    paired = difference(judged, other, weighted_auc, 500, 1)
    apart = [intervals(item, {"auc": weighted_auc}, 500, 1)["auc"] for item in (judged, other)]
    assert paired.high - paired.low < 0.3 * min(item.high - item.low for item in apart)
    assert paired.value == pytest.approx(apart[1].value - apart[0].value)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_what_logits_are_too_large_by_and_shifted_by_is_found(true: float, classes: int) -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, (40_000, classes))
    shift = np.linspace(0, 1.5, classes)
    # The class of the largest sum of logit and Gumbel noise is drawn by the softmax.
    chosen = (logits + shift + rng.gumbel(size=logits.shape)).argmax(1)
    divisor, bias = scaling(logits * true, chosen)
    assert divisor == pytest.approx(true, rel=0.05)
    np.testing.assert_allclose(bias - bias[0], shift, atol=0.08)


@pytest.mark.parametrize("kind", ["multi-label", "multi-class"])
def test_a_calibrated_network_says_what_is_likely(kind: str) -> None:
    labels = tuple(Target(key=key, code=("1", "99X", key)) for key in ("a", "b"))
    recipe = load(shipped("config/recipe.toml")).model_copy(update={"kind": kind, "labels": labels})
    torch.manual_seed(1)
    network, data = build("resnet18", 1, 2).eval(), shapes(400, "val", 1)
    head = network.head
    with torch.no_grad():
        logits = judge.exact(network, data, recipe)
        size = 2 / torch.from_numpy(logits.std(0)).float()
        head.bias.sub_(torch.from_numpy(logits.mean(0)).float()).mul_(size)
        head.weight.mul_(size[:, None])
    likely = judge.probabilities(judge.exact(network, data, recipe), kind)
    there = np.random.default_rng(1).random((400, 2)) < likely
    if kind == "multi-class":
        there[:, 1] = ~there[:, 0]
    with torch.no_grad():  # what class weights and too much certainty do
        head.weight.mul_(3)
        head.bias.mul_(3).add_(torch.tensor([2.0, -1.0]))
    check = replace(data, targets=there.astype(np.float32))
    scales = judge.calibrate(network, check, recipe)
    found = judge.probabilities(judge.exact(network, data, recipe), kind)
    assert np.abs(found - likely).mean() < 0.05
    assert [divisor for divisor, _ in scales] == pytest.approx([3, 3], rel=0.25)


def test_calibration_error_is_what_probabilities_are_off_by() -> None:
    rng = np.random.default_rng(7)
    score = rng.random(50_000)
    truth = (rng.random(50_000) < score).astype(float)
    assert calibration_error(truth, score) < 0.01
    off = np.clip(score + 0.1, 0, 1)
    assert calibration_error(truth, off) == pytest.approx(0.095, abs=0.01)


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.9, 0.95, 0.999])
def test_a_threshold_reaches_the_sensitivity_that_is_wanted_and_hardly_more(wanted: float) -> None:
    judged = some(8, 500)
    threshold = at_sensitivity(judged.truth, judged.score, wanted)
    sensitivity, _ = sensitivity_specificity(judged.truth, judged.score, threshold)
    assert wanted <= sensitivity < wanted + 0.02


def test_sources_of_one_class_each_are_judged_together() -> None:
    truth = np.array([0.0, 0, 0, 1, 1, 1])
    score = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
    sources = np.array(["healthy"] * 3 + ["sick"] * 3)
    assert youden_by_source(truth, score, sources) == 0.5
    logits = np.log(score / (1 - score))[:, None].astype("f4")
    assert mean_auc(logits, truth[:, None].astype("f4"), sources) == 1.0


def test_a_few_images_that_are_all_told_apart_do_not_make_certain() -> None:
    logits = np.array([[0, -2.0], [0, -1], [0, 1], [0, 2]])
    chosen = np.array([0, 0, 1, 1])
    divisor, (absent, present) = scaling(logits, chosen)
    sure = 1 / (1 + np.exp(-(logits[:, 1] / divisor + present - absent)))
    assert 0.6 < sure[2:].mean() < 0.8  # Platt's target is 3 of 4
    assert scaling(logits, 1 - chosen)[0] == pytest.approx(HOTTEST, rel=0.05)
    easy = np.repeat(logits, 1000, 0) / 10
    assert scaling(easy, np.repeat(chosen, 1000))[0] == pytest.approx(COLDEST, rel=0.05)


@pytest.mark.parametrize("threshold", [0.5, 0.00031, 0.99954, 0.1234567])
def test_a_threshold_is_written_short_and_calls_the_same(threshold: float) -> None:
    scores = threshold + np.array([-2e-5, -1e-5, 1e-5, 2e-5])
    found = shortened(threshold, scores)
    assert ((scores >= found) == (scores >= threshold)).all()
    assert len(str(found)) <= 8
