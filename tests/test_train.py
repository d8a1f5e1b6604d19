"""Training: figures, refusals, a package from nothing; and that the shipped figures are true."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import make
import numpy as np
import pytest
from numpy.typing import NDArray
from peers import shared

from dicomai.demo.radiographs import set_pixels
from dicomai.errors import Misuse
from dicomai.infer import package
from dicomai.infer.engine import Engine
from dicomai.prepare import image
from dicomai.receive.inbox import read_file
from dicomai.scoring import limits
from dicomai.settings import Settings, shipped
from dicomai.study import Frame
from dicomai.train.dataset import load_images, read_samples
from dicomai.train.evaluate import auc, auc_interval, sensitivity_specificity, youden_by_source
from dicomai.train.loop import score

SHIPPED = shipped("config/models/chest-starter/1")
MISUSED = 2

# Figures


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


# Refusals

COLUMNS = ["image_id", "file", "label", "patient_id", "source", "split"]
Rows = list[dict[str, str]]


def rows(per_class: int = 1, source: str = "a") -> Rows:
    """A good table: in each split, per_class images with the label and without."""
    return [
        dict(zip(COLUMNS, [n, f"{n}.png", label, n, source, split], strict=True))
        for split in ("train", "val", "test")
        for label in ("pneumonia", "normal")
        for n in [f"{source}-{split}-{label}-{i}" for i in range(per_class)]
    ]


def write(folder: Path, table: Rows) -> None:
    """labels.csv of a folder."""
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def test_a_good_table_is_read(tmp_path: Path) -> None:
    write(tmp_path, rows())
    samples = read_samples(tmp_path, "pneumonia")
    assert [s.positive for s in samples] == [True, False] * 3
    assert samples[0].path == tmp_path / "a-train-pneumonia-0.png"


def refuses(folder: Path, *words: str) -> None:
    """The table is refused in one line with these words."""
    with pytest.raises(Misuse) as caught:
        read_samples(folder, "pneumonia")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    refuses(tmp_path, "labels.csv")


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    write(tmp_path, [{k: v for k, v in row.items() if k != column} for row in rows()])
    refuses(tmp_path, "labels.csv", column)


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(",".join(COLUMNS) + "\n")
    refuses(tmp_path, "labels.csv")


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    table = rows()
    table[0]["patient_id"] = table[-1]["patient_id"] = "P17"
    write(tmp_path, table)
    refuses(tmp_path, "P17", "two splits")


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("label", ["pneumonia", "normal"])
def test_a_split_with_one_class_only_is_refused(tmp_path: Path, split: str, label: str) -> None:
    write(tmp_path, [r for r in rows() if (r["split"], r["label"]) != (split, label)])
    refuses(tmp_path, split)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_source_with_one_class_only_is_refused(tmp_path: Path, split: str) -> None:
    # Each source has its own AUC; with one class it has none, and its interval never ends.
    table = rows() + [r for r in rows(source="b") if (r["split"], r["label"]) != (split, "normal")]
    write(tmp_path, table)
    refuses(tmp_path, split, "b")


# From images to a package

RECIPE = """
architecture = "resnet50"
channels = 1
labels = ["pneumonia"]
seed = 1
batch_size = 4
weight_decay = 0.05
label_smoothing = 0.05
average_decay = 0.5
half_precision = false
[augmentation]
rotation_degrees = 5.0
shift = 0.02
zoom = 0.05
aspect = 0.05
horizontal_flip = true
brightness = 0.1
contrast = 0.1
[[phases]]
size = 32
epochs = 1
learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 42 small images, bright blobs where positive, and the model trained on it."""
    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    table = rows(per_class=7)
    for row in table:
        picture = rng.normal(60, 10, (32, 32))
        if row["label"] == "pneumonia":
            y, x = rng.integers(8, 24, 2)
            picture[y - 5 : y + 5, x - 5 : x + 5] += 150
        cv2.imwrite(str(folder / row["file"]), np.clip(picture, 0, 255).astype(np.uint8))
    write(folder, table)
    (folder / "recipe.toml").write_text(RECIPE)
    done = train(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def train(folder: Path) -> subprocess.CompletedProcess[str]:
    """python -m dicomai.train, as a person types it."""
    options = ["--out", "models", "--name", "blobs", "--recipe", "recipe.toml"]
    return subprocess.run(
        [sys.executable, "-m", "dicomai.train", ".", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_training_writes_a_package_that_verifies_and_scores(trained: Path) -> None:
    model = package.read(trained / "models/blobs/1")
    package.verify(model)
    engine = Engine(model, "cpu")
    probabilities, maps = engine.score(np.zeros((1, 1, 32, 32), np.float32))
    assert probabilities.shape == (1, 1)
    assert maps.shape == (1, 1, 1, 1)
    assert model.preprocessing.size == 32
    stated = json.loads((model.path / "evaluation.json").read_text())
    assert stated["threshold"] == model.labels[0].threshold
    low, high = stated["sources"]["a"]["auc_95"]
    assert 0 <= low <= stated["sources"]["a"]["auc"] <= high <= 1
    assert [p.name for p in (trained / "models/blobs").iterdir()] == ["1"]


def test_a_version_that_exists_is_refused_before_anything_is_trained(trained: Path) -> None:
    before = (trained / "models/blobs/1/model.toml").read_bytes()
    done = train(trained)
    assert done.returncode == MISUSED
    assert done.stderr.splitlines()[-1].startswith("dicomai: ")
    assert "choose another version" in done.stderr
    assert (trained / "models/blobs/1/model.toml").read_bytes() == before
    assert "epoch" not in done.stdout + done.stderr


# What is stated of the shipped model


def test_the_shipped_figures_are_good_enough() -> None:
    figures = json.loads((SHIPPED / "evaluation.json").read_text())["sources"]
    assert figures["nih_chestxray14"]["auc"] >= 0.88
    assert figures["kermany2018"]["auc"] >= 0.97


def test_the_daemon_scores_as_training_measured(tmp_path: Path) -> None:
    samples = [s for s in read_samples(shared() / "data/cxr", "pneumonia") if s.split == "test"]
    chosen = tuple(samples[:: len(samples) // 40])
    model = package.read(SHIPPED)
    engine = Engine(model, "cpu")
    frames = []
    for sample in chosen:
        ds = make.chest_radiograph()
        picture = cv2.imread(str(sample.path), cv2.IMREAD_GRAYSCALE)
        assert picture is not None
        set_pixels(ds, picture.astype(np.uint8), bits_stored=8)
        (file,) = make.save(tmp_path / sample.image_id, [ds])
        _, frame = image.prepare(read_file(file)[1], model, limits(Settings()))
        assert isinstance(frame, Frame)
        frames.append(frame)
    served, _ = engine.score(np.stack([frame.pixels for frame in frames]))
    images = load_images(chosen, model.preprocessing.size)
    measured = score(engine.network, images, engine.device, half_precision=False)
    assert np.abs(served[:, 0] - measured).max() < 0.01
    # And these are scores worth having.
    assert auc(np.array([s.positive for s in chosen], float), measured) > 0.85
