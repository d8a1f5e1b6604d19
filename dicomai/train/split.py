"""Who is for training and who for the test: decided once for each patient, and kept."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dicomai.prepare.fingerprint import near

TRAIN, VAL, TEST = "train", "val", "test"
SPLITS = (TRAIN, VAL, TEST)
TEST_PERCENT, VAL_PERCENT = 20, 12


def assign(
    patients: Mapping[str, Collection[str]], kept: Mapping[str, str], learnt: Collection[str]
) -> dict[str, tuple[str, str]]:
    """The split of each patient who has none, with the reason.

    patients: key -> splits that labels bring; kept: earlier decisions; learnt: patients that an
    ancestor of the model has learnt from, who never enter a test set.
    """
    found = {}
    for patient, brought in patients.items():
        if patient in kept:
            continue
        split, reason = _decide(patient, brought)
        if patient in learnt and split == TEST:
            split, reason = TRAIN, "an ancestor of the model has learnt from this patient"
        found[patient] = split, reason
    return found


def _decide(patient: str, brought: Collection[str]) -> tuple[str, str]:
    if brought:
        # Of two datasets that disagree, the one that tests.
        return max(brought, key=SPLITS.index), "as its labels say"
    # The key of a patient is already keyed with this database's salt.
    place = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") % 100
    split = TEST if place < TEST_PERCENT else VAL if place < TEST_PERCENT + VAL_PERCENT else TRAIN
    return split, "by chance"


@dataclass(frozen=True, slots=True)
class Twins:
    """Images to leave out, because one that looks the same is on the other side."""

    learnt: tuple[int, ...]
    tested: tuple[int, ...]


def twins(
    splits: Sequence[str], fingerprints: Sequence[bytes], ancestors: Sequence[bytes]
) -> Twins:
    """Near-duplicates that cross: what looks like a test image is not learnt from, nor, of val,
    what looks like a training image judged by; what an ancestor has learnt from is not tested.
    """
    of = {split: [i for i, found in enumerate(splits) if found == split] for split in SPLITS}
    prints = {split: [fingerprints[i] for i in of[split]] for split in SPLITS}
    tested = {of[TEST][i] for i, _ in near(prints[TEST], ancestors)}
    learnt = {of[split][i] for split in (TRAIN, VAL) for i, _ in near(prints[split], prints[TEST])}
    learnt |= {of[VAL][i] for i, _ in near(prints[VAL], prints[TRAIN])}
    return Twins(tuple(sorted(learnt)), tuple(sorted(tested)))
