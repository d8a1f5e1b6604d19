"""Labelled image files with patients, sources and a patient-disjoint split."""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dicomai.errors import Misuse
from dicomai.prepare.geometry import fit, letterbox
from dicomai.study import Float32
from dicomai.train.recipe import Augmentation

COLUMNS = {"image_id", "file", "label", "patient_id", "source", "split"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image; positive: the label is present."""

    image_id: str
    path: Path
    positive: bool
    patient_id: str
    source: str
    split: str


def read_samples(folder: Path, label: str) -> tuple[Sample, ...]:
    """Read folder/labels.csv (image_id, file, label, patient_id, source, split).

    Raises Misuse where a column is missing, a class is empty, or a patient is in two splits.
    """
    path = folder / "labels.csv"
    if not path.is_file():
        raise Misuse(f"{path} is missing: name a folder that holds labels.csv and its images")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = COLUMNS - set(rows[0] if rows else ())
    if missing:
        raise Misuse(f"{path} lacks the columns {', '.join(sorted(missing))}")
    samples = tuple(
        Sample(
            row["image_id"],
            folder / row["file"],
            row["label"] == label,
            row["patient_id"],
            row["source"],
            row["split"],
        )
        for row in rows
    )
    _check(samples, label, path)
    return samples


def _check(samples: tuple[Sample, ...], label: str, path: Path) -> None:
    splits: dict[str, str] = {}
    for sample in samples:
        if splits.setdefault(sample.patient_id, sample.split) != sample.split:
            raise Misuse(f"{path}: patient {sample.patient_id} is in two splits")
    for split in ("train", "val", "test"):
        chosen = [sample for sample in samples if sample.split == split]
        # Each source is judged by itself, so that a model cannot learn the hospital instead.
        sources = {sample.source for sample in chosen} if split != "train" else set()
        groups = [chosen, *([s for s in chosen if s.source == source] for source in sources)]
        if any(len({sample.positive for sample in group}) < 2 for group in groups):
            raise Misuse(
                f"{path}: the split {split} needs images with and without {label}, of each source"
            )


def digest(samples: tuple[Sample, ...]) -> str:
    """SHA-256 over ids, labels and splits: what a model says it was trained on."""
    lines = sorted(f"{s.image_id},{s.positive},{s.patient_id},{s.split}\n" for s in samples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_images(samples: tuple[Sample, ...], size: int) -> NDArray[np.uint8]:
    """Decode and letterbox grey 8-bit files: (N, size, size)."""
    images = np.empty((len(samples), size, size), np.uint8)
    for index, sample in enumerate(samples):
        grey = cv2.imread(str(sample.path), cv2.IMREAD_GRAYSCALE)
        if grey is None:
            raise Misuse(f"cannot decode {sample.path}: replace it or take it out of labels.csv")
        rows, columns = grey.shape
        square = letterbox(grey.astype(np.float32), fit(rows, columns, size))
        images[index] = np.rint(square)
    return images


def targets(samples: tuple[Sample, ...]) -> Float32:
    """(N,), 1 where the label is present."""
    return np.array([sample.positive for sample in samples], np.float32)


def augment(image: NDArray[np.uint8], bounds: Augmentation, rng: np.random.Generator) -> Float32:
    """One random view of a grey image (size, size), as 0 to 1."""
    size = image.shape[0]
    angle = rng.uniform(-1, 1) * bounds.rotation_degrees
    zoom = 1 + rng.uniform(-1, 1) * bounds.zoom
    aspect = 1 + rng.uniform(-1, 1) * bounds.aspect
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle, zoom)
    matrix[1] = (matrix[1] - [0, 0, (size - 1) / 2]) * aspect + [0, 0, (size - 1) / 2]
    matrix[:, 2] += rng.uniform(-1, 1, 2) * bounds.shift * size
    view = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)
    if bounds.horizontal_flip and rng.random() < 0.5:
        view = view[:, ::-1]
    pixels = view.astype(np.float32) / 255
    contrast = 1 + rng.uniform(-1, 1) * bounds.contrast
    brightness = rng.uniform(-1, 1) * bounds.brightness * 0.5
    mean = pixels.mean()
    changed: Float32 = np.clip((pixels - mean) * contrast + mean + brightness, 0, 1)
    return changed.astype(np.float32)


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """Random order, every index once, the last incomplete batch left out."""
    order = rng.permutation(count)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]
