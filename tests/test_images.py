"""The real files, all of them: see images.py, which makes the table."""

import warnings

import images
import numpy as np
import pydicom
import pytest
from images import EXCEPTIONS, LIMITS, Row, entries, table
from peers import need, shared

from dicomai.prepare import pixels
from dicomai.prepare.decoders import Frames


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Every file, rendered and compared."""
    need("/usr/bin/storescu")
    return list(table(shared() / "data/dicom"))


@pytest.mark.timeout(600)
def test_every_file_is_decoded_or_has_a_reason(rows: list[Row]) -> None:
    assert len(rows) == 323
    assert [row.file for row in rows if row.shown == 0 and not row.reason] == []
    assert [row.file for row in rows if "crashed" in row.reason or "stopped" in row.reason] == []


def test_what_dcmtk_or_pydicom_decodes_is_decoded(rows: list[Row]) -> None:
    can = [row for row in rows if row.dcmtk_renders or row.pydicom_decodes]
    assert len(can) > 250
    assert [row.file for row in can if row.shown == 0] == []


def test_pictures_are_dcmtks_but_for_the_listed_exceptions(rows: list[Row]) -> None:
    beside = [row for row in rows if row.mean is not None]
    assert sum(not row.colour for row in beside) > 130
    assert sum(row.colour for row in beside) > 70
    apart = {row.file for row in beside if not row.agrees}
    assert apart - EXCEPTIONS.keys() == set()
    # An exception that has become none is struck from the list.
    assert {f for f in EXCEPTIONS if f not in apart} == {
        "orthanc-tests/2026-05-26-oob-monochrome-46341.dcm"
    }


LOSSY = ("JPEG Baseline", "JPEG Extended", "JPEG-LS Near", "JPEG2000")


def test_stored_values_are_pydicoms() -> None:
    root = shared() / "data/dicom"
    apart = {}
    for entry in entries(root):
        if entry["pydicom_decode"] != "ok" or "no DICM preamble" in entry["odd"]:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = pydicom.dcmread(root / entry["file"]).pixel_array
            ds = pixels.read(root / entry["file"], LIMITS)
            frames = Frames(ds, LIMITS)
        stored = frames.decode(1)
        ours = pixels.values_of(stored.cells, stored)
        difference = np.abs(ours - (theirs[0] if theirs.ndim > ours.ndim else theirs))
        # JPEG decoders may round differently, and colour twice (PS3.5 8.2.1, T.83).
        allowed = 0.0
        if entry["transfer_syntax"] in LOSSY:
            allowed = 0.15 if ours.ndim == 3 else 0.05
        elif entry["photometric"].startswith("YBR"):
            allowed = 0.001
        if difference.mean() > allowed:
            apart[entry["file"]] = float(difference.mean())
    assert apart == {}


def test_all_of_it_takes_little_time_and_memory(rows: list[Row]) -> None:
    assert max(row.seconds for row in rows) < 10
    assert rows[-1].megabytes < 1500 + images.peak_megabytes("self")
    assert max(row.megabytes for row in rows) - images.peak_megabytes("self") < 1000
