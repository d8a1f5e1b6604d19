"""The referees have nothing to say of any kind of result of any kind of image."""

from collections.abc import Iterator
from pathlib import Path

import matrix
import pytest
from sources import SOURCES

from dicomai.analyze import Scorer

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    """It finds something in every image."""
    with matrix.permissive_scorer() as made:
        yield made


@pytest.mark.parametrize("kind", SOURCES)
def test_every_result_of_every_kind_of_image_in_every_character_set_is_valid(
    scorer: Scorer, tmp_path: Path, kind: str
) -> None:
    cells = [cell for cell in matrix.PAIRS if cell[0] == kind]
    assert len(cells) == 12
    assert matrix.judge_all(scorer, tmp_path, cells, pixelmed=False) == []


def test_pixelmed_has_nothing_to_say_of_reports_and_key_objects(
    scorer: Scorer, tmp_path: Path
) -> None:
    cells = [("multi-frame", "Japanese", "full"), ("CT", "Greek", "missing")]
    assert matrix.judge_all(scorer, tmp_path, cells, pixelmed=True) == []
