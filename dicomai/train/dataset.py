"""From what readers say to arrays: images, targets, and who is learnt from and who is tested."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dicomai.errors import Misuse, Rejected
from dicomai.prepare.pool import Pool
from dicomai.prepare.sample import Sample, sample
from dicomai.store.truth import Candidate
from dicomai.study import Accepts, Float32, Limits
from dicomai.train.labels import ABSENT, PRESENT, agree
from dicomai.train.split import SPLITS, TEST, TRAIN, VAL, assign, twins

FEWEST_PATIENTS = {TRAIN: 10, VAL: 5, TEST: 5}  # of each class of each label


@dataclass(frozen=True, slots=True)
class Data:
    """Frames to learn from or to be judged by.

    images: (N, S, S), grey, letterboxed; targets: (N, K), 1 present, 0 absent, NaN not known
    names: of the image; paths, numbers: the file, and the frame in it; patients: keys
    facts: what subgroups are made of
    """

    images: NDArray[np.uint8]
    targets: Float32
    names: NDArray[np.str_]
    paths: NDArray[np.str_]
    numbers: NDArray[np.intp]
    digests: NDArray[np.str_]
    patients: NDArray[np.str_]
    sources: NDArray[np.str_]
    splits: NDArray[np.str_]
    fingerprints: tuple[bytes, ...]
    facts: tuple[Mapping[str, str | float], ...]

    def __len__(self) -> int:
        return len(self.images)

    def where(self, chosen: NDArray[np.bool_] | Sequence[int]) -> "Data":
        """Some of them."""
        index = np.arange(len(self))[np.asarray(chosen)]
        return Data(
            self.images[index],
            self.targets[index],
            self.names[index],
            self.paths[index],
            self.numbers[index],
            self.digests[index],
            self.patients[index],
            self.sources[index],
            self.splits[index],
            tuple(self.fingerprints[i] for i in index),
            tuple(self.facts[i] for i in index),
        )

    def of(self, split: str) -> "Data":
        """A split."""
        return self.where(self.splits == split)

    def at(self, size: int) -> "Data":
        """The same at another size."""
        return dataclasses.replace(self, images=at_size(self.images, size))

    def digest(self) -> str:
        """SHA-256 over what was said of which image in which split."""
        lines = sorted(
            f"{digest} {split} {np.array2string(target)}"
            for digest, split, target in zip(self.digests, self.splits, self.targets, strict=True)
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Gathered:
    """The data, splits that are new with their reasons, and why images were left out."""

    data: Data
    chosen: Mapping[str, tuple[str, str]]
    left_out: Counter[str]


def gather(
    candidates: Sequence[Candidate],
    labels: Sequence[str],
    size: int,
    accepts: Accepts,
    files: Callable[[Candidate], Path],
    pool: Pool,
    limits: Limits,
    kept: Mapping[str, str],
    learnt: Collection[str],
    ancestors: Sequence[bytes],
    track: Callable[[Iterable[object], int], Iterable[object]],
) -> Gathered:
    """Decode every image of which anything is known, and decide who is for what.

    accepts: of the model, for images that were received; files: where a candidate's file lies;
    kept: earlier splits by patient; learnt, ancestors: patients and fingerprints that an ancestor
    of the model has learnt from; track: shows progress (of a count). Raises Misuse where too little
    is left of a label.
    """
    left_out: Counter[str] = Counter()
    agreed = [item for item in candidates if _targets(item, labels).size]
    left_out["readers do not agree, or nobody is sure"] = len(candidates) - len(agreed)
    known = [item for item in agreed if files(item).is_file()]
    left_out["the file is gone"] = len(agreed) - len(known)
    calls = [
        (files(item), accepts if item.source == RECEIVED else None, size, limits) for item in known
    ]
    frames: list[tuple[Candidate, Path, Sample]] = []
    done = track(pool.map(sample, calls), len(calls))
    for item, call, made in zip(known, calls, done, strict=True):
        if isinstance(made, Rejected):
            left_out[str(made.code)] += 1
        else:
            assert isinstance(made, list)
            frames += [(item, call[0], frame) for frame in made]
    patients = _brought(known)
    chosen = assign(patients, kept, learnt)
    splits = {**{patient: split for patient, (split, _) in chosen.items()}, **kept}
    data = _arrays(frames, labels, splits, size)
    tested = (data.splits == TEST) & np.isin(data.patients, list(learnt))
    left_out["for the test, but an ancestor has learnt from the patient"] = int(tested.sum())
    data = _without_twins(data.where(~tested), ancestors, left_out)
    require_enough(data, labels)
    return Gathered(data, chosen, +left_out)


RECEIVED = "received"


def _targets(item: Candidate, labels: Sequence[str]) -> Float32:
    """1, 0 and NaN; empty where nothing is known of any label."""
    values = {PRESENT: 1.0, ABSENT: 0.0}
    found = [values.get(agree(item.said.get(key, ())), np.nan) for key in labels]
    return np.array(found if not np.isnan(found).all() else [], np.float32)


def _brought(candidates: Iterable[Candidate]) -> dict[str, set[str]]:
    """Patient -> the splits that labels bring."""
    found: dict[str, set[str]] = {}
    for item in candidates:
        splits = found.setdefault(item.patient, set())
        if item.split:
            splits.add(item.split)
    return found


def _arrays(
    frames: Sequence[tuple[Candidate, Path, Sample]],
    labels: Sequence[str],
    splits: Mapping[str, str],
    size: int,
) -> Data:
    images = np.empty((len(frames), size, size), np.uint8)
    for index, (_, _, frame) in enumerate(frames):
        images[index] = frame.pixels
    items = [item for item, _, _ in frames]
    return Data(
        images=images,
        targets=np.array([_targets(item, labels) for item in items], np.float32).reshape(
            len(items), len(labels)
        ),
        names=np.array([item.name for item in items]),
        paths=np.array([str(path) for _, path, _ in frames]),
        numbers=np.array([frame.number for _, _, frame in frames], np.intp),
        digests=np.array([item.digest for item in items]),
        patients=np.array([item.patient for item in items]),
        sources=np.array([item.source for item in items]),
        splits=np.array([splits[item.patient] for item in items]),
        fingerprints=tuple(frame.fingerprint for _, _, frame in frames),
        facts=tuple({**frame.facts, **_said(item)} for item, _, frame in frames),
    )


def _said(item: Candidate) -> dict[str, str | float]:
    """What a dataset's own table says goes before a header."""
    return {key: value for key, value in item.facts.items() if value is not None}


def _without_twins(data: Data, ancestors: Sequence[bytes], left_out: Counter[str]) -> Data:
    found = twins(list(data.splits), data.fingerprints, ancestors)
    left_out["looks the same as an image of another split"] = len(found.learnt)
    left_out["for the test, but an ancestor has learnt from it"] = len(found.tested)
    gone = {*found.learnt, *found.tested}
    return data.where([i for i in range(len(data)) if i not in gone]) if gone else data


def require_enough(data: Data, labels: Sequence[str]) -> None:
    """Raise Misuse unless each label has patients of both classes in each split, with counts."""
    for index, label in enumerate(labels):
        for split in SPLITS:
            part = data.of(split)
            counts = {
                word: len(set(part.patients[part.targets[:, index] == value]))
                for word, value in (("with", 1), ("without", 0))
            }
            if min(counts.values()) < FEWEST_PATIENTS[split]:
                raise Misuse(
                    f"too little to learn from: of {label} there are {counts['with']} patients "
                    f"with it and {counts['without']} without in the split {split}, and each needs "
                    f"{FEWEST_PATIENTS[split]}: import more labels"
                )


def subgroups(data: Data, wanted: Collection[str]) -> dict[str, NDArray[np.bool_]]:
    """Name -> which frames: by source, sex, decade of age, view, manufacturer."""
    found: dict[str, NDArray[np.bool_]] = {}
    for kind in wanted:
        values = np.array([_value(data, i, kind) for i in range(len(data))])
        for value in np.unique(values[values != ""]):
            found[f"{kind} {value}"] = values == value
    return found


def _value(data: Data, index: int, kind: str) -> str:
    if kind == "source":
        return str(data.sources[index])
    facts = data.facts[index]
    if kind != "age":
        return str(facts.get(kind, ""))
    age = facts.get("age_years")
    if age is None:
        return ""
    first = int(float(age) // 20) * 20
    return f"{first} to {first + 19}"


def at_size(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(N, S, S) shrunk by area, or enlarged, to (N, size, size)."""
    if images.shape[1] == size:
        return images
    method = cv2.INTER_AREA if size < images.shape[1] else cv2.INTER_LINEAR
    return np.stack([cv2.resize(image, (size, size), interpolation=method) for image in images])
