"""What a radiologist sees of a result: OHIF on Orthanc, in a real browser."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make
import pytest
import viewer
from daemon import daemon
from peers import Orthanc, free_port, need
from viewer import Look

from dicomai.store import queries

pytestmark = pytest.mark.timeout(200)

SCREENSHOTS = os.environ.get("DICOMAI_SCREENSHOTS")
POSITIVE = 3  # of the radiographs: pneumonia, well above the threshold
COLOURED = 10_000  # pixels of a canvas of about 700,000; a radiograph has none


@dataclass(frozen=True)
class Seen:
    """What the pages showed, by the name of the look, and what the report has to say."""

    looks: dict[str, dict[str, Any]]
    elsewhere: list[str]
    statements: tuple[str, ...]


@pytest.fixture(scope="module")
def no_variables() -> Iterator[None]:
    """As conftest's no_overrides, which is for one test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("DICOMAI_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, no_variables: None) -> Iterator[Seen]:
    """A study that went from the PACS through a daemon and back, opened in the viewer."""
    need("chromium", "node", "npm", viewer.DICOMWEB)
    folder = tmp_path_factory.mktemp("viewer")
    port = free_port()
    ds = make.chest_radiograph(POSITIVE)
    pacs = Orthanc(folder / "orthanc", port, plugins=[viewer.DICOMWEB])
    try:
        (file,) = make.save(folder / "sent", [ds])
        destinations = [("pacs", "ORTHANC", pacs.dicom)]
        with daemon(folder, f"sqlite:///{folder}/dicomai.db", port, destinations) as running:
            pacs.post("/modalities/dicomai/store", pacs.post("/instances", file.read_bytes())["ID"])
            running.wait_idle(1)
            (finding,) = queries.findings(running.database, queries.FindingFilter())
        statements = ("Pneumonia: present", f"Probability: {finding['probability'] * 100:.2f} %")
        looks = [
            Look("original", "DX"),
            Look("overlay", "AI overlay", coloured=COLOURED),
            Look("report", "AI report", statements),
        ]
        pictures = Path(SCREENSHOTS) if SCREENSHOTS else folder / "screenshots"
        with viewer.site(pacs.http) as url:
            found = viewer.look(url, ds.StudyInstanceUID, looks, pictures)
        yield Seen(found["looks"], found["elsewhere"], statements)
    finally:
        pacs.stop()


def test_the_study_opens_with_its_original_in_grey(seen: Seen) -> None:
    original = seen.looks["original"]
    assert original["errors"] == []
    assert original["series"][0].startswith("DX")
    assert original["bright"] > original["pixels"] / 4
    assert original["coloured"] == 0


def test_the_overlay_is_listed_and_opens_in_colour(seen: Seen) -> None:
    overlay = seen.looks["overlay"]
    assert overlay["errors"] == []
    assert any("AI overlay" in entry for entry in seen.looks["original"]["series"])
    assert overlay["coloured"] >= COLOURED


def test_the_report_opens_with_finding_and_probability(seen: Seen) -> None:
    report = seen.looks["report"]
    assert report["errors"] == []
    assert any("AI report" in entry for entry in seen.looks["original"]["series"])
    assert [words for words in seen.statements if words not in report["labels"]] == []


def test_the_viewer_asks_no_other_host(seen: Seen) -> None:
    assert seen.elsewhere == []
