"""What a model refuses, and the code that it gives."""

import warnings
from typing import Any

import make
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from dicomai.prepare.select import frame_numbers, why_not
from dicomai.study import Accepts

CHEST = make.accepts()
STRICT = make.accepts(body_parts=("CHEST",), views=("PA", "AP"), photometric=("MONOCHROME2",))
UNCODED = {"ViewCodeSequence": None, "AnatomicRegionSequence": None}
ADULTS = make.accepts(age_years=(18, 130))


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
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"Rows": 64, "Columns": 64}, "too-small"),
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
    assert code(make.chest_radiograph(**{keyword: value}, **UNCODED)) is None


@pytest.mark.parametrize(
    ("keyword", "expected"),
    [("BodyPartExamined", "wrong-body-part"), ("ViewPosition", "wrong-view")],
)
@pytest.mark.parametrize("value", [None, ""])
def test_without_the_empty_string_what_is_not_stated_is_refused(
    keyword: str, value: str | None, expected: str
) -> None:
    assert code(make.chest_radiograph(**{keyword: value}, **UNCODED), STRICT) == expected


def test_somebody_elses_report_has_no_pixels() -> None:
    assert code(make.report("1.2.3")) == "no-pixels"


def test_the_reason_names_what_it_found_and_what_it_wants() -> None:
    refusal = why_not(make.chest_radiograph(ViewPosition="LL"), CHEST)
    assert refusal is not None
    assert refusal[1] == "view left lateral: the model accepts PA, AP"


# What an attribute does not say, another does


def coded(value: str, meaning: str, keyword: str = "ViewCodeSequence") -> dict[str, Any]:
    """A chest radiograph that says its view, or region, only by a code."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    plain = "ViewPosition" if keyword == "ViewCodeSequence" else "BodyPartExamined"
    return {plain: None, keyword: [item]}


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (coded("272479007", "postero-anterior"), None),
        (coded("399173006", "left lateral"), "wrong-view"),
        (coded("399067008", "lateral"), "wrong-view"),
        (coded("816094009", "Chest", "AnatomicRegionSequence"), None),
        (coded("56459004", "Foot", "AnatomicRegionSequence"), "wrong-body-part"),
        ({"ViewPosition": None, "PatientOrientation": ["A", "F"], **UNCODED}, "wrong-view"),
        ({"ViewPosition": "", "PatientOrientation": ["P", "F"], **UNCODED}, "wrong-view"),
        ({"ViewPosition": None, "PatientOrientation": ["L", "F"], **UNCODED}, None),
        ({"ViewPosition": None, "PatientOrientation": None, **UNCODED}, None),
    ],
)
def test_view_and_region_may_be_coded_or_follow_from_the_orientation(
    attributes: dict[str, Any], expected: str | None
) -> None:
    assert code(make.chest_radiograph(**attributes)) == expected


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"BodyPartExamined": "CHEST_PA"}, None),
        ({"BodyPartExamined": "PORT CHEST"}, None),
        ({"BodyPartExamined": "CHEST 2 VIEW"}, None),
        ({"BodyPartExamined": "CHEST ABDOMEN"}, "wrong-body-part"),
        ({"ViewPosition": "PA ERECT"}, None),
        ({"ViewPosition": "CHEST LAT"}, "wrong-view"),
        ({"ViewPosition": "LLO"}, "wrong-view"),
        ({**coded("99X", "Postero-anterior")}, None),
        ({"ViewPosition": None, "SeriesDescription": "CHEST LAT", **UNCODED}, "wrong-view"),
        ({"ViewPosition": None, "SeriesDescription": "Thorax seitl.", **UNCODED}, "wrong-view"),
        ({"ViewPosition": None, "SeriesDescription": "CHEST PA/LAT", **UNCODED}, None),
        ({"ViewPosition": None, "PatientOrientation": ["PL", "F"], **UNCODED}, "wrong-view"),
        (coded("74101002", "Both lungs", "AnatomicRegionSequence"), None),
    ],
)
def test_what_devices_write_beside_the_standards_words_is_understood(
    attributes: dict[str, Any], expected: str | None
) -> None:
    accepts = make.accepts(body_parts=("CHEST", "LUNG", ""))
    assert code(make.chest_radiograph(**attributes), accepts) == expected


def test_a_reason_quotes_no_damaged_value() -> None:
    ds = make.chest_radiograph()
    for value in ("DOE^JOHN", "X" * 1_000_000):
        with warnings.catch_warnings(action="ignore"):  # that it is too long
            ds.add_new("BodyPartExamined", "LO", value)
        refusal = why_not(ds, CHEST)
        assert refusal is not None
        assert refusal[1].startswith("body part something else: ")


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"PatientAge": "047Y"}, None),
        ({"PatientAge": "017Y"}, "paediatric"),
        ({"PatientAge": "011M"}, "paediatric"),
        ({"PatientAge": "003D"}, "paediatric"),
        (
            {"PatientAge": None, "PatientBirthDate": "20250101", "StudyDate": "20260101"},
            "paediatric",
        ),
        ({"PatientAge": None, "PatientBirthDate": "19500101", "StudyDate": "20260101"}, None),
        ({"PatientAge": "", "PatientBirthDate": ""}, "wrong-age"),
    ],
)
def test_a_model_for_adults_refuses_children_and_who_has_no_age(
    attributes: dict[str, Any], expected: str | None
) -> None:
    ds = make.chest_radiograph(**{"StudyDate": "20260101", **attributes})
    assert code(ds, ADULTS) == expected


def test_a_model_for_children_refuses_adults() -> None:
    assert code(make.chest_radiograph(), make.accepts(age_years=(0, 17))) == "wrong-age"


def test_a_model_without_bounds_takes_who_has_no_age() -> None:
    assert code(make.chest_radiograph(PatientAge=None, PatientBirthDate="")) is None


def test_a_sop_class_that_is_not_listed_is_refused_by_name() -> None:
    refusal = why_not(make.chest_radiograph(), make.accepts(sop_classes=(CTImageStorage,)))
    assert refusal is not None
    assert refusal[0] == "wrong-sop-class"
    assert "Digital X-Ray" in refusal[1]
    assert "CT Image Storage" in refusal[1]


def test_an_empty_list_accepts_everything() -> None:
    anything = make.accepts(
        modalities=(), body_parts=(), views=(), photometric=(), presentation_intents=()
    )
    odd = make.chest_radiograph(
        Modality="XX",
        BodyPartExamined="HAND",
        ViewPosition="LL",
        PhotometricInterpretation="RGB",
        PresentationIntentType="FOR PROCESSING",
    )
    assert code(odd, anything) is None


def test_a_model_may_accept_localizers() -> None:
    scout = make.chest_radiograph(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert code(scout, make.accepts(localizers=True)) is None


@pytest.mark.parametrize(
    ("rule", "count", "expected"),
    [
        ("all", 3, [1, 2, 3]),
        ("middle", 1, [1]),
        ("middle", 4, [2]),
        ("middle", 5, [3]),
        ("every 2", 5, [1, 3, 5]),
        ("every 10", 5, [1]),
    ],
)
def test_the_model_says_which_frames(rule: str, count: int, expected: list[int]) -> None:
    assert list(frame_numbers(count, rule)) == expected
