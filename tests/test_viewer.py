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
from peers import free_port, need
from viewer import Look

from dicomai.store import queries

pytestmark = pytest.mark.timeout(200)

# Read here: the tests themselves run without the developer's DICOMAI_ variables.
SCREENSHOTS = os.environ.get("DICOMAI_SCREENSHOTS")
POSITIVE = 4  # of the radiographs: pneumonia, well above the threshold
COLOURED = 10_000  # pixels of a canvas of about 700,000; a radiograph has none


@dataclass(frozen=True)
class Seen:
    """What the pages showed, by the name of the look, and what the report has to say."""

    looks: dict[str, dict[str, Any]]
    elsewhere: list[str]
    statements: tuple[str, ...]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """A study that went from the PACS through a daemon and back, opened in the viewer."""
    need("chromium", "node", "npm")
    folder = tmp_path_factory.mktemp("viewer")
    port = free_port()
    ds = make.chest_radiograph(POSITIVE)
    pacs = viewer.Archive(folder / "orthanc", port)
    try:
        (file,) = make.save(folder / "sent", [ds])
        destinations = [("pacs", "ORTHANC", pacs.dicom)]
        with daemon(folder, f"sqlite:///{folder}/dicomai.db", port, destinations) as running:
            pacs.post("/modalities/dicomai/store", pacs.post("/instances", file.read_bytes())["ID"])
            running.wait_idle(1)
            (finding,) = queries.findings(running.database)
        statements = ("Pneumonia: present", f"Probability: {finding['probability']:.2%}")
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
