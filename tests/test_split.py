"""No patient and no near-duplicate crosses between what is learnt from and what is tested."""

from collections import Counter
from pathlib import Path

import cv2
import make
import numpy as np
import pytest

from dicomai.demo.radiographs import pixels, radiographs
from dicomai.prepare.fingerprint import BITS, fingerprint, near
from dicomai.prepare.sample import Sample
from dicomai.scoring import limits
from dicomai.settings import Settings
from dicomai.store.truth import Candidate
from dicomai.study import Float32
from dicomai.train.dataset import gather
from dicomai.train.split import TEST, TRAIN, VAL, assign, twins

PATIENTS = {f"patient {number}": () for number in range(5000)}


def test_the_split_of_a_patient_never_changes() -> None:
    first = assign(PATIENTS, {}, ())
    kept = {patient: split for patient, (split, _) in first.items()}
    assert assign(PATIENTS, kept, ()) == {}
    some = dict.fromkeys(list(PATIENTS)[::7], ())
    again = assign(some, {}, ())
    assert {patient: first[patient] for patient in some} == again


def test_a_fifth_is_for_the_test() -> None:
    count = Counter(split for split, _ in assign(PATIENTS, {}, ()).values())
    assert count[TEST] == pytest.approx(1000, abs=100)
    assert count[VAL] == pytest.approx(600, abs=80)


def test_what_labels_say_decides_and_what_was_decided_before_stays() -> None:
    brought = {"A": {TRAIN}, "B": {TEST}, "C": {TEST, TRAIN}, "D": {TRAIN}}
    found = assign(brought, {"D": TEST}, ())
    assert {patient: split for patient, (split, _) in found.items()} == {
        "A": TRAIN,
        "B": TEST,
        "C": TEST,
    }


def test_nobody_whom_an_ancestor_has_learnt_from_is_tested() -> None:
    found = assign({**PATIENTS, "B": {TEST}}, {}, {*PATIENTS, "B"})
    assert TEST not in {split for split, _ in found.values()}
    assert found["B"] == (TRAIN, "an ancestor of the model has learnt from this patient")


def picture(number: int) -> Float32:
    """A real radiograph."""
    return pixels(radiographs()[number]).astype(np.float32)


def copies(image: Float32) -> dict[str, Float32]:
    """The same image as other ways bring it."""
    rows, columns = image.shape
    encoded = cv2.imencode(".jpg", image.astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    return {
        "JPEG": cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE).astype(np.float32),
        "half the size": cv2.resize(image, (columns // 2, rows // 2), interpolation=cv2.INTER_AREA),
        "inverted": 255 - image,
        "another window": np.clip(image * 1.3 - 30, 0, 255),
        "another gamma": 255 * (image / 255) ** 1.3,
        "12 bits": np.rint(image * 4095 / 255),
    }


@pytest.mark.parametrize("way", list(copies(np.ones((8, 8), np.float32))))
def test_a_copy_is_recognized_however_it_comes(way: str) -> None:
    for number in range(len(radiographs())):
        image = picture(number)
        assert near([fingerprint(image)], [fingerprint(copies(image)[way])]) == [(0, 0)], number


def test_different_radiographs_are_no_copies() -> None:
    prints = [fingerprint(picture(number)) for number in range(len(radiographs()))]
    assert near(prints, prints) == [(i, i) for i in range(len(prints))]
    assert len(prints[0]) == BITS // 8


def test_an_image_without_contrast_is_no_copy_of_a_radiograph() -> None:
    flat = fingerprint(np.full((100, 80), 7, np.float32))
    assert near([flat], [fingerprint(picture(0))]) == []


def test_a_copy_on_the_other_side_is_left_out() -> None:
    a, b, c, d = (fingerprint(picture(number)) for number in range(4))
    copy = fingerprint(255 - picture(0))
    found = twins((TEST, TRAIN, TRAIN, VAL, TEST), (a, copy, b, b, c), [c])
    assert found.learnt == (1, 3)  # what is tested, and in val what is trained on
    assert found.tested == (4,)  # the ancestor knows it
    assert twins((TEST, TRAIN, VAL), (a, b, d), []) == type(found)((), ())


class Shown:
    """A pool that shows noise."""

    def map(self, _function: object, calls: list[object]) -> list[list[Sample]]:
        """An image for each call, each another."""
        random = np.random.default_rng(1)
        return [
            [Sample(1, random.integers(0, 255, (32, 32), np.uint8), random.bytes(128), {})]
            for _ in calls
        ]


def test_who_was_for_the_test_and_was_learnt_from_elsewhere_is_left_out() -> None:
    kept = {f"p{n}": "train" if n < 24 else "val" if n < 36 else "test" for n in range(52)}
    candidates = [
        Candidate(
            patient, __file__, patient, patient, "here", None,
            {"pneumonia": [("file", "present" if number % 2 else "absent")]}, {},
        )
        for number, patient in enumerate(kept)
    ]  # fmt: skip
    found = gather(
        candidates,
        ["pneumonia"],
        32,
        make.accepts(),
        lambda item: Path(item.path) if item.patient != "p0" else Path("gone"),
        Shown(),  # type: ignore[arg-type]
        limits(Settings()),
        kept,
        {"p1", "p36", "p37"},
        (),
        lambda items, _: items,
    )
    assert found.left_out == {
        "for the test, but an ancestor has learnt from the patient": 2,
        "the file is gone": 1,
    }
    assert set(found.data.of("test").patients) == {f"p{n}" for n in range(38, 52)}
    assert "p1" in found.data.of("train").patients
