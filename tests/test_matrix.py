"""The referees have nothing to say of any kind of result of any kind of image."""

import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matrix
import pytest
from peers import complaints, shared
from sources import SOURCES

from dicomai.analyze import Context, Scorer, analyze
from dicomai.errors import Rejected
from dicomai.receive import inbox
from dicomai.study import KINDS, Study

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
    assert matrix.judge_all(scorer, tmp_path, cells, pixelmed=False).lines == []


def test_pixelmed_has_nothing_to_say_of_reports_and_key_objects(
    scorer: Scorer, tmp_path: Path
) -> None:
    cells = [("multi-frame", "Japanese", "full"), ("CT", "Greek", "missing")]
    assert matrix.judge_all(scorer, tmp_path, cells, pixelmed=True).lines == []


# Of real images: what is said of results because of the source, and why it is left so.
OF_THE_SOURCE = (
    r"Value invalid for this VR - .* (DA|TM) ",  # dates of ACR-NEMA, copied verbatim
    r"patientName absent or empty",  # see matrix.MISTAKEN
    r"Attribute value uses retired form",
    r"Attribute value does not conform .* Type (DA|TM)",
    r"contains invalid data values for Value Representations",
    r"Illegal root for UID",
    r"dcentvfy Error - Dicom dataset read failed",  # of a source that dcentvfy cannot read
    r"String attribute has different value",
    # Not images to the referee's mind, though they have frames: label maps, dose.
    r"Shall not be present for Referenced SOP Class that is not multi-frame",
    r"dsrdump E: Reading content item (IMAGE|SCOORD|NUM|CONTAINER) .* \(Invalid Value\)",
)


def test_every_kind_of_real_image_yields_every_kind_of_result(
    scorer: Scorer, tmp_path: Path
) -> None:
    root, seen, found = shared() / "data/dicom", set(), []
    model = scorer.algorithm.model
    accepts = replace(model.accepts, frames="middle", localizers=True)
    one_frame = replace(model, accepts=accepts)
    with matrix.permissive_scorer(one_frame) as scorer:
        for row in csv.DictReader((root / "manifest.csv").read_text().splitlines()):
            key = row["modality"], row["photometric"], row["sop_class"]
            if not row["photometric"] or key in seen:
                continue
            try:
                header, instance, _ = inbox.read_file(root / row["file"])
            except Rejected:
                continue
            seen.add(key)
            study = Study(header.study_instance_uid, 1, matrix.NOW, (instance,))
            out = tmp_path / str(len(seen))
            done = analyze(study, scorer, Context({}, (), {}, matrix.NOW, out))
            kinds = {result.kind for result in done.results}
            whole = {"not-analyzed"} if done.exclusions else {*KINDS} - {"not-analyzed"}
            assert kinds == whole, row["file"]
            files = [root / row["file"], *(result.path for result in done.results)]
            for line in complaints(files):
                of_source = line.startswith(files[0].name) or any(
                    re.search(pattern, line) for pattern in OF_THE_SOURCE
                )
                if not of_source:
                    found.append(f"{row['file']}: {line}")
    assert found == []
    assert len(seen) >= 43
