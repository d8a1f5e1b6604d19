"""The fast way to a dataset's identifying attributes says what pydicom says, or nothing."""

import random

import make
import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)
from pynetdicom.dsutils import create_file_meta, encode_file_meta
from sources import SOURCES

from dicomai.errors import NotDicom
from dicomai.receive import header, inbox
from dicomai.receive.listener import IMPLEMENTATION

# What pydicom warns of is left to it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def encoded(ds: Dataset, syntax: str, undefined: bool = False) -> bytes:
    """Without file meta information; undefined: sequences and items have no length."""
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, syntax == ImplicitVRLittleEndian
    for element in ds.iterall():
        if element.VR == "SQ":
            element.is_undefined_length = undefined
            for item in element.value:
                item.is_undefined_length_sequence_item = undefined
    write_dataset(out, ds)
    return out.getvalue()


def nested(ds: Dataset) -> Dataset:
    """With a sequence in a sequence before what is wanted."""
    inner, outer = Dataset(), Dataset()
    inner.CodeValue, inner.CodingSchemeDesignator, inner.CodeMeaning = "1", "99X", "One"
    outer.ReferencedSOPClassUID, outer.ReferencedSOPInstanceUID = CTImageStorage, "1.2.3"
    outer.PurposeOfReferenceCodeSequence = Sequence([inner, inner])
    ds.ReferencedImageSequence = Sequence([outer, outer])
    ds.ProcedureCodeSequence = Sequence([])
    return ds


def asked(data: bytes, syntax: str) -> header.Header | None:
    """What pydicom says; None where it refuses."""
    try:
        return header.parse(data, syntax)
    except NotDicom:
        return None


@pytest.mark.parametrize("kind", sorted(SOURCES))
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_of_every_kind_of_image_it_says_what_pydicom_says(kind: str, syntax: str) -> None:
    for undefined in (False, True):
        data = encoded(nested(SOURCES[kind]()), syntax, undefined)
        said = header.glance(data[: inbox.START_BYTES], syntax)
        assert said is not None
        assert said == asked(data, syntax)


@pytest.mark.parametrize("attributes", [
    {"PatientID": "  7"}, {"PatientID": "7  "}, {"PatientID": "A\\B"}, {"PatientID": ""},
    {"PatientID": "Ä7", "SpecificCharacterSet": "ISO_IR 100"}, {"PatientID": None},
    {"AccessionNumber": "a ~ b"}, {"StudyInstanceUID": None}, {"SeriesInstanceUID": "1.2/3"},
    {"NumberOfStudyRelatedInstances": "0"}, {"NumberOfStudyRelatedInstances": "12"},
    {"NumberOfStudyRelatedInstances": "9" * 20}, {"NumberOfStudyRelatedInstances": "9" * 5000},
    {"NumberOfStudyRelatedInstances": "-1"}, {"Manufacturer": "dicomai"},
    {"RequestedProcedurePriority": "STAT"}, {"RequestedProcedurePriority": "HIGH "},
    {"RequestedProcedurePriority": " STAT"}, {"RequestedProcedurePriority": "STAT\\HIGH"},
    {"RequestedProcedurePriority": ""}, {"RequestedProcedurePriority": "LOW"},
])  # fmt: skip
def test_odd_values_are_what_pydicom_says(attributes: dict[str, str | None]) -> None:
    ds = make.chest_radiograph(NumberOfStudyRelatedInstances="3")
    for keyword, value in attributes.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, "1")
            ds[keyword]._value = value
    data = encoded(ds, ExplicitVRLittleEndian)
    assert header.glance(data, ExplicitVRLittleEndian) in {
        None,
        asked(data, ExplicitVRLittleEndian),
    }


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(
    ("priority", "stat"), [("STAT", True), ("HIGH", True), ("ROUTINE", False), ("", False)]
)
def test_the_priority_of_the_requested_procedure_says_what_is_stat(
    priority: str, stat: bool, syntax: str
) -> None:
    ds = make.chest_radiograph(RequestedProcedurePriority=priority)
    ds.RequestAttributesSequence = Sequence([Dataset()])
    ds.RequestAttributesSequence[0].RequestedProcedurePriority = "LOW" if stat else "STAT"
    data = encoded(ds, syntax)
    found = header.glance(data[: inbox.START_BYTES], syntax)
    assert found is not None
    assert found == asked(data, syntax)
    assert found.stat is stat


def test_what_is_broken_before_the_priority_is_read_without_it() -> None:
    ds = make.chest_radiograph(RequestedProcedurePriority="STAT")
    data = encoded(ds, ExplicitVRLittleEndian)
    broken = bytearray(data)
    place = data.index(b"\x28\0\x10\0US") + 4
    broken[place : place + 2] = b"??"
    for end in (len(data), place + 2):
        found = asked(bytes(broken[:end]), ExplicitVRLittleEndian)
        assert found is not None
        assert found.study_instance_uid == ds.StudyInstanceUID
        assert header.glance(bytes(broken[:end]), ExplicitVRLittleEndian) in {None, found}


def test_a_count_that_no_database_holds_is_none() -> None:
    for count, expected in (("999999999", 999_999_999), ("1000000000", None), ("9" * 30, None)):
        ds = make.chest_radiograph(NumberOfStudyRelatedInstances="1")
        ds["NumberOfStudyRelatedInstances"]._value = count
        found = asked(encoded(ds, ExplicitVRLittleEndian), ExplicitVRLittleEndian)
        assert found is not None
        assert found.expected_instances == expected


def test_a_value_of_another_vr_is_left_to_pydicom() -> None:
    data = encoded(make.chest_radiograph(), ExplicitVRLittleEndian)
    place = data.index(b"\x10\0\x20\0LO") + 4
    assert header.glance(data, ExplicitVRLittleEndian) is not None
    for vr in (b"SH", b"US"):
        changed = data[:place] + vr + data[place + 2 :]
        assert header.glance(changed, ExplicitVRLittleEndian) is None


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_of_damaged_bytes_it_says_what_pydicom_says_or_nothing(syntax: str) -> None:
    draw, said = random.Random(20261122), 0
    ds = nested(make.chest_radiograph(RequestedProcedurePriority="STAT"))
    whole = [encoded(ds, syntax, undefined) for undefined in (False, True)]
    for turn in range(3000):
        data = bytearray(whole[turn % 2][:4000])
        for _ in range(draw.choice([1, 1, 2, 5])):
            any_byte = draw.choice([draw.randrange(256), *b"\0 \\~\x1b\xff"])
            data[draw.randrange(1800)] = any_byte
        found = header.glance(bytes(data), syntax)
        if found is not None:
            said += 1
            assert found == asked(bytes(data), syntax)
    assert said > 300


def test_what_is_not_all_there_or_another_encoding_is_left_to_pydicom() -> None:
    data = encoded(make.chest_radiograph(), ExplicitVRLittleEndian)
    before = data.index(b"\x20\x00\x0d\x00UI")
    assert header.glance(data[: before + 20], ExplicitVRLittleEndian) is None
    assert header.glance(data, JPEG2000Lossless) == asked(data, ExplicitVRLittleEndian)
    for syntax in (ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian):
        assert header.glance(data, syntax) is None


@pytest.mark.parametrize("length", range(20, 24))
def test_file_meta_information_is_what_pynetdicom_writes(length: int) -> None:
    uid = "1." + "2" * (length - 2)
    made = encode_file_meta(create_file_meta(
        sop_class_uid=CTImageStorage, sop_instance_uid=uid, transfer_syntax=JPEG2000Lossless
    ))  # fmt: skip
    found = inbox.file_meta(CTImageStorage, uid, JPEG2000Lossless, IMPLEMENTATION)
    assert found == b"\0" * 128 + b"DICM" + made
