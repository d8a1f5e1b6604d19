"""The summary picture of a study: readable whatever it has to say."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from studies import PNEUMONIA, model

from dicomai.report.overlay import draw
from dicomai.report.summary import CORNERS, TILES, WIDTH, Overview, glimpse
from dicomai.study import (
    Algorithm,
    Code,
    Finding,
    Frame,
    Instance,
    Letterbox,
    Presence,
    Reporting,
    UInt8,
)

NOW = datetime(2026, 3, 29, tzinfo=UTC)
LONG = "Consolidation of the right upper lobe with an air bronchogram"
LABELS = tuple(
    replace(PNEUMONIA, key=f"l{n}", code=Code(str(n), "99X", f"{LONG} {n}")) for n in range(18)
)
ALGORITHM = Algorithm(
    replace(model(), labels=LABELS), "test", Reporting("overlay", 0.1, 1536, frozenset({"sc"}))
)


def findings(number: int, probability: float, shape: tuple[int, int] = (200, 150)) -> list[Finding]:
    """One image, all labels of the same probability."""
    source = Instance(f"1.2.{number}", "1.2", "1.3", "1.2.840.10008.1.2.1", Path("x"), "0")
    display = np.full(shape, 128, np.uint8)
    box = Letterbox(*shape, 224, 0, 0, 224, 224)
    frame = Frame(source, 1, np.zeros((1, 2, 2), np.float32), display, box)
    presence = Presence.PRESENT if probability >= 0.5 else Presence.ABSENT
    cells = np.zeros((7, 7), np.float32)
    return [Finding(frame, label, probability, presence, cells, NOW) for label in LABELS]


def summary_of(probabilities: list[float]) -> UInt8:
    """The picture of a study of so many images."""
    overview = Overview(LABELS)
    for number, probability in enumerate(probabilities):
        items = findings(number, probability)
        heat = np.zeros(items[0].frame.display.shape, np.float32)
        overview.add(glimpse(items, heat, f"image {number}", 1.0))
    return overview.draw(1, ALGORITHM, NOW)


@pytest.mark.parametrize("images", [1, 2, 3, 4, 50])
def test_nothing_touches_the_borders_and_the_corners_are_the_viewers(images: int) -> None:
    picture = summary_of([0.9] * images)
    assert picture.shape[1] == WIDTH
    assert not picture[:, -8:].any()
    assert not picture[:CORNERS].any()
    assert not picture[-CORNERS:].any()


def test_more_images_than_there_are_tiles_leave_the_size_as_it_is() -> None:
    assert summary_of([0.9] * TILES).shape == summary_of([0.9] * 50).shape


def test_the_order_in_which_images_come_changes_nothing_but_their_number() -> None:
    ordered = [0.1 * n for n in range(9)]
    overviews = [Overview(LABELS), Overview(LABELS)]
    for overview, numbers in zip(overviews, (range(9), reversed(range(9))), strict=True):
        for number in numbers:
            items = findings(number, ordered[number])
            heat = np.zeros((200, 150), np.float32)
            overview.add(glimpse(items, heat, f"image {number}", 1.0))
    first, second = (overview.draw(0, ALGORITHM, NOW) for overview in overviews)
    assert (first == second).all()


def test_the_legend_of_a_very_wide_image_stays_a_strip() -> None:
    item = findings(1, 0.9, shape=(40, 4000))[0]
    picture = draw(item, np.zeros((40, 4000), np.float32), ALGORITHM)
    assert picture.shape[0] < 160
