"""What a model refuses, and the code that it gives."""

from typing import Any

import make
import pytest
from pydicom.dataset import Dataset

from dicomai.prepare.select import why_not
from dicomai.study import Accepts

CHEST = Accepts(("CR", "DX"), ("CHEST", ""), ("PA", "AP", ""), ("MONOCHROME1", "MONOCHROME2"))
STRICT = Accepts(("CR", "DX"), ("CHEST",), ("PA", "AP"), ("MONOCHROME2",))


def code(ds: Dataset, accepts: Accepts = CHEST) -> str | None:
    """The refusal's code; its reason must say something."""
    refusal = why_not(ds, accepts)
    assert refusal is None or len(refusal[1]) > 10
    return refusal[0] if refusal else None


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"Manufacturer": "dicomai"}, "own-output"),
        ({"PixelData": None}, "no-pixels"),
        ({"Rows": None}, "no-pixels"),
        ({"Columns": 0}, "no-pixels"),
        ({"Modality": "MG"}, "wrong-modality"),
        ({"Modality": None}, "wrong-modality"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "for-processing"),
        ({"PhotometricInterpretation": "RGB"}, "wrong-photometric"),
        ({"PhotometricInterpretation": None}, "wrong-photometric"),
        ({"BodyPartExamined": "HAND"}, "wrong-body-part"),
        ({"ViewPosition": "LL"}, "wrong-view"),
    ],
)
def test_each_refusal_has_its_code(attributes: dict[str, Any], expected: str) -> None:
    assert code(make.chest_radiograph(**attributes)) == expected


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"ViewPosition": "AP"},
        {"PresentationIntentType": None},
    ],
)
def test_a_chest_radiograph_is_accepted(attributes: dict[str, Any]) -> None:
    assert code(make.chest_radiograph(**attributes)) is None


@pytest.mark.parametrize("keyword", ["BodyPartExamined", "ViewPosition"])
@pytest.mark.parametrize("value", [None, ""])
def test_an_empty_string_accepts_what_is_not_stated(keyword: str, value: str | None) -> None:
    assert code(make.chest_radiograph(**{keyword: value})) is None


@pytest.mark.parametrize(
    ("keyword", "expected"),
    [("BodyPartExamined", "wrong-body-part"), ("ViewPosition", "wrong-view")],
)
@pytest.mark.parametrize("value", [None, ""])
def test_without_the_empty_string_what_is_not_stated_is_refused(
    keyword: str, value: str | None, expected: str
) -> None:
    assert code(make.chest_radiograph(**{keyword: value}), STRICT) == expected


def test_somebody_elses_report_has_no_pixels() -> None:
    assert code(make.report("1.2.3")) == "no-pixels"


def test_the_reason_names_what_it_found_and_what_it_wants() -> None:
    refusal = why_not(make.chest_radiograph(ViewPosition="LL"), CHEST)
    assert refusal is not None
    assert refusal[1] == "view left lateral: the model accepts PA, AP"
