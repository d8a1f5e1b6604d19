"""A model in 8 bits, calibrated and held against what it was made of with the site's own images."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dicomai.errors import Inaccurate, Misuse
from dicomai.infer import package
from dicomai.infer.engine import Engine, load_network
from dicomai.retraining import file_of, learnt_here
from dicomai.scoring import decoding_pool, limits
from dicomai.settings import Settings
from dicomai.store import registry, truth
from dicomai.store.database import Database
from dicomai.study import Model
from dicomai.train import ancestry
from dicomai.train.dataset import Data, gather
from dicomai.train.evaluate import Array, auc
from dicomai.train.judge import Score, as_input, said_by
from dicomai.train.publish import new_package, refuse_existing

CALIBRATED_WITH = 300  # images at most: more of them change no range by much, and take their time
MOST_AUC_LOST = 0.005
MOST_CHANGED = 0.05  # of a probability
# How many of the first convolutions stay in full precision: what they lose is lost for all others.
# Of a ResNet50 the second figure is the first block, the third the first stage.
KEPT_WHOLE = 1, 5, 11
TIMED_IMAGES, TIMED_SECONDS = 16, 3.0
COPIED = "weights.safetensors", "learnt.json", "README.md", "LICENSE"
SUFFIX = "-int8"


@dataclass(frozen=True, slots=True)
class Watch:
    """How a person follows it: what is done now, and counted work with its name."""

    say: Callable[[str], None]
    track: Callable[[str, Iterable[object], int], Iterable[object]]


@dataclass(frozen=True, slots=True)
class Compared:
    """A label in full precision and in 8 bits, on the test split; probabilities' changes."""

    label: str
    images: int
    auc_before: float
    auc_after: float
    largest_change: float
    mean_change: float

    def __str__(self) -> str:
        return (
            f"{self.label}: AUC {self.auc_before:.4f} before and {self.auc_after:.4f} after, "
            f"largest change of a probability {self.largest_change:.3f}, mean "
            f"{self.mean_change:.4f}, {self.images} test images"
        )


@dataclass(frozen=True, slots=True)
class Compressed:
    """The new package, what was compared, and images/s before and after."""

    model: Model
    labels: tuple[Compared, ...]
    before: float
    after: float


def compress(settings: Settings, database: Database, parent: Model, watch: Watch) -> Compressed:
    """Make an 8-bit version of a model, and install it only where it says nearly the same.

    Raises Misuse where there is nothing to calibrate or to compare with, and Inaccurate.
    """
    from dicomai.infer import int8

    int8.require_nncf()
    folder = _place(settings, database, parent)
    data = _gathered(settings, database, parent, watch)
    work = _Work(settings, parent, folder, data, watch)
    *fast, careful = KEPT_WHOLE
    for whole in fast:
        try:
            return work.attempt(whole)
        except Inaccurate as error:
            watch.say(str(error))
    return work.attempt(careful)


class _Work:
    """The images and the model in full precision, with what it says of the test split."""

    def __init__(
        self, settings: Settings, parent: Model, folder: Path, data: Data, watch: Watch
    ) -> None:
        self._parent, self._folder, self._watch = parent, folder, watch
        learn, self._test = _some(data.of("train")), data.of("test")
        self._images = [as_input(parent, square) for square in learn.images]
        self._whole = Engine(parent, "openvino", settings.data_dir / "engines").score
        self._before = said_by(self._whole, parent, self._test.images)

    def attempt(self, whole: int) -> Compressed:
        """With so many convolutions in full precision, installed. Raises Inaccurate."""
        parent, test = self._parent, self._test
        with new_package(self._folder) as work:
            self._make(work, whole)
            small = Engine(package.read(work), "openvino").score
            self._watch.say(f"comparing on {len(test)} images of the test split")
            after = said_by(small, parent, test.images)
            labels = tuple(compared(parent, test, self._before, after))
            refuse_inaccurate(labels)
            rates = [_images_per_second(score, parent) for score in (self._whole, small)]
            measured = _measured(parent, len(self._images), whole, labels, rates)
            (work / "evaluation.json").write_text(measured)
        return Compressed(package.read(self._folder), labels, *rates)

    def _make(self, work: Path, whole: int) -> None:
        """All files of the package but evaluation.json."""
        from dicomai.infer import int8

        parent, count = self._parent, len(self._images)
        self._watch.say(
            f"calibrating with {count} images of the training split; {whole} of the convolutions "
            "in full precision"
        )
        network, size = load_network(parent), parent.preprocessing.size
        answer = int8.make(network, parent.channels, size, self._images, whole, work)
        for name in COPIED:
            if (parent.path / name).is_file():
                shutil.copyfile(parent.path / name, work / name)
        (work / "model.toml").write_text(_described(parent, self._folder.name, count, work, answer))


def _place(settings: Settings, database: Database, parent: Model) -> Path:
    """The folder of the new version."""
    name, version = parent.name, parent.version + SUFFIX
    if parent.int8 is not None:
        raise Misuse(f"{name} {parent.version} is compressed already")
    if len(version) > package.LONGEST_VERSION:
        raise Misuse(f"the version {version} would be longer than {package.LONGEST_VERSION}")
    if registry.sha256_of(database, name, version) is not None:
        raise Misuse(f"{name} {version} was made before: see 'dicomai model list'")
    return refuse_existing(settings.data_dir / "models", name, version)


def _gathered(settings: Settings, database: Database, parent: Model, watch: Watch) -> Data:
    keys = tuple(label.key for label in parent.labels)
    candidates = truth.candidates(database, keys)
    if not candidates:
        raise Misuse(
            "there are no labelled images to calibrate with: see 'dicomai labels import' and "
            "'dicomai dataset add'"
        )
    learnt = ancestry.read(parent.path)
    with decoding_pool(settings) as pool:
        gathered = gather(
            candidates,
            keys,
            parent.preprocessing.size,
            parent.accepts,
            partial(file_of, settings),
            pool,
            limits(settings),
            truth.splits(database),
            learnt_here(database, learnt),
            learnt.fingerprints,
            partial(watch.track, "reading images"),
        )
    truth.keep_splits(database, gathered.chosen)
    return gathered.data


def _some(data: Data) -> Data:
    """Evenly taken, so that every source and patient has its share."""
    return data.where(np.unique(np.linspace(0, len(data) - 1, CALIBRATED_WITH).astype(int)))


def compared(model: Model, test: Data, before: Array, after: Array) -> Iterable[Compared]:
    """Each label's figures; before, after: probabilities (N, K) of the same images.

    Of a change, every image counts; of the AUC, those of which the label is known.
    """
    for index, label in enumerate(model.labels):
        known = ~np.isnan(test.targets[:, index])
        truth_ = test.targets[known, index].astype(np.float64)
        change = np.abs(after[:, index] - before[:, index])
        yield Compared(
            label.key,
            len(test),
            auc(truth_, before[known, index]),
            auc(truth_, after[known, index]),
            float(change.max()),
            float(change.mean()),
        )


def refuse_inaccurate(labels: Sequence[Compared]) -> None:
    """Raise Inaccurate where a label loses more than it may."""
    worse = [
        item
        for item in labels
        if item.auc_before - item.auc_after > MOST_AUC_LOST or item.largest_change > MOST_CHANGED
    ]
    if worse:
        raise Inaccurate(
            f"not installed, for in 8 bits it says too much else: {'; '.join(map(str, worse))}; "
            f"allowed are {MOST_AUC_LOST} of AUC and {MOST_CHANGED} of a probability"
        )


def _images_per_second(score: Score, model: Model) -> float:
    size = model.preprocessing.size
    shape = TIMED_IMAGES, model.channels, size, size
    images = np.random.default_rng(0).random(shape, np.float32)
    score(images)
    started, count = time.monotonic(), 0
    while time.monotonic() - started < TIMED_SECONDS:
        score(images)
        count += len(images)
    return count / (time.monotonic() - started)


def _described(
    parent: Model, version: str, images: int, work: Path, answer: Sequence[Sequence[float]]
) -> str:
    """The parent's model.toml with another version and provenance, and what is new."""
    text = (parent.path / "model.toml").read_text()
    text = re.sub(r"(?m)^version *=.*$", f"version = {json.dumps(version)}", text, count=1)
    text = re.sub(r"(?ms)^\[provenance\].*?(?=^\[|\Z)", "", text)
    origin: dict[str, object] = {
        **parent.provenance,
        "parent": f"{parent.name} {parent.version}",
        "compressed": f"to 8 bits, calibrated with {images} images",
    }
    network, weights = (package.sha256_of(work / name) for name in package.INT8)
    tables: dict[str, dict[str, object]] = {
        "provenance": origin,
        "int8": {"network": network, "weights": weights, "answer": answer},
    }
    for name, table in tables.items():
        lines = (f"{key} = {json.dumps(value)}" for key, value in table.items())
        text += f"\n[{name}]\n" + "\n".join(lines) + "\n"
    return text


def _measured(
    parent: Model, images: int, whole: int, labels: Sequence[Compared], rates: Sequence[float]
) -> str:
    """evaluation.json."""
    found = {
        "parent": parent.version,
        "calibration_images": images,
        "convolutions_in_full_precision": whole,
        "labels": [asdict(item) for item in labels],
        "images_per_second": [round(rate, 1) for rate in rates],
        "batch_size": TIMED_IMAGES,
        "threads": torch.get_num_threads(),
    }
    return json.dumps({"compressed": found}, indent=1) + "\n"
