"""The identifying attributes of an encoded dataset."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID, ImplicitVRLittleEndian

from dicomai.errors import NotDicom
from dicomai.parse import BY_HAND, PARSER_ERRORS, UNDEFINED_LENGTH, parse_head
from dicomai.study import MANUFACTURER

UID_PATTERN = re.compile(r"[0-9]+(\.[0-9]+)*")
COUNT_PATTERN = re.compile(r"[0-9]{1,9}")  # what both databases hold
UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
KEYWORDS = (
    *UIDS,
    "SpecificCharacterSet",
    "Manufacturer",
    "PatientID",
    "AccessionNumber",
    "NumberOfStudyRelatedInstances",
    "RequestedProcedurePriority",
)
WANTED: list[BaseTag | int] = [Tag(keyword) for keyword in KEYWORDS]
_NEEDED = WANTED[:-1]
URGENT = {"STAT", "HIGH"}  # of STAT, HIGH, ROUTINE, MEDIUM, LOW (PS3.3 C.4.11)
_KEYWORD_OF = {int(Tag(keyword)): keyword for keyword in KEYWORDS}
_VR_OF = {tag: dictionary_VR(tag).encode() for tag in _KEYWORD_OF}
_LAST = max(_KEYWORD_OF)

# Whether a VR has two bytes of length or, after two reserved ones, four (PS3.5 7.1.2).
_SHORT = set(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = set(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_DEEPEST = 8
_EXPLICIT = struct.Struct("<HH2sH").unpack_from
_IMPLICIT = struct.Struct("<HHI").unpack_from
LONGEST = 64  # of the wanted values (PS3.5 6.2)
# Characters of which it makes no difference in which character set they are, and no backslash.
_PLAIN = re.compile(rb"[!-\[\]-~]([ -\[\]-~]*[!-\[\]-~])?")


class _Unusual(Exception):
    """Better left to pydicom."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the receiving path needs to know of a dataset."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    analyzable: bool
    expected_instances: int | None
    patient_id: str
    accession_number: str
    stat: bool = False


def parse(dataset: bytes, syntax_uid: str) -> Header:
    """Read the identifying attributes of an encoded dataset, no further than the pixels.

    Raises NotDicom where one is missing or is no UID (it becomes a file name).
    """
    try:
        return of_dataset(_head(dataset, UID(syntax_uid)))
    except PARSER_ERRORS as error:
        raise NotDicom(f"cannot be parsed as DICOM ({kind(error)})") from error


def _head(dataset: bytes, syntax: UID) -> Dataset:
    try:
        return parse_head(dataset, syntax, WANTED)
    except PARSER_ERRORS:  # the priority lies far behind the others, which are enough to keep it
        return parse_head(dataset, syntax, _NEEDED)


def kind(error: BaseException) -> str:
    """What went wrong, in our words: the parser's own quote values, which may be a patient's."""
    return (
        "sequences nested too deep" if isinstance(error, RecursionError) else type(error).__name__
    )


def of_dataset(ds: Dataset) -> Header:
    """The header of what pydicom has read. Raises NotDicom."""
    return _header({keyword: str(ds.get(keyword) or "") for keyword in KEYWORDS})


def _header(values: Mapping[str, str]) -> Header:
    for keyword in UIDS:
        if not is_uid(values.get(keyword, "")):
            raise NotDicom(f"{keyword} is missing or is not a UID")
    sop_class, sop_instance, study, series = (values[keyword] for keyword in UIDS)
    expected = values.get("NumberOfStudyRelatedInstances", "")
    return Header(
        sop_class,
        sop_instance,
        study,
        series,
        analyzable=_is_image(sop_class) and values.get("Manufacturer") != MANUFACTURER,
        expected_instances=(int(expected) if COUNT_PATTERN.fullmatch(expected) else 0) or None,
        patient_id=values.get("PatientID", ""),
        accession_number=values.get("AccessionNumber", ""),
        stat=values.get("RequestedProcedurePriority", "").strip() in URGENT,
    )


def is_uid(value: str) -> bool:
    """Whether it may be one (PS3.5 9.1), and so may name a file."""
    return len(value) <= 64 and UID_PATTERN.fullmatch(value) is not None


@lru_cache(maxsize=256)
def _is_image(sop_class_uid: str) -> bool:
    # The dictionary's names: "CT Image Storage", but "Enhanced SR Storage", "Segmentation Storage".
    return "Image Storage" in UID(sop_class_uid).name


# The fast way: a tenth of pydicom's time, for what is as it should be


def glance(start: bytes, syntax_uid: str) -> Header | None:
    """What parse() says of a dataset, from its first bytes; None where it takes pydicom to say.

    That is where the attributes are not all within these bytes, or anything is not as it should
    be, or in another character set than ASCII.
    """
    try:
        return _header(_scan(start, syntax_uid))
    except (_Unusual, NotDicom, struct.error):
        return None


def _scan(data: bytes, syntax_uid: str) -> dict[str, str]:
    """Keyword -> value of the wanted elements that are not empty. Raises _Unusual, struct.error."""
    if syntax_uid in BY_HAND:
        raise _Unusual
    is_explicit = syntax_uid != ImplicitVRLittleEndian
    found: dict[str, str] = {}
    at, before, vr = 0, -1, b""
    while True:
        if is_explicit:  # most elements, without a call
            group, element, vr, length = _EXPLICIT(data, at)
            tag, at = group << 16 | element, at + 8
            if vr not in _SHORT or group == _ITEM >> 16:
                tag, length, at = _element(data, at - 8, is_explicit)
        else:
            group, element, length = _IMPLICIT(data, at)
            tag, at = group << 16 | element, at + 8
        if tag > _LAST:
            return found
        if tag <= before:
            raise _Unusual
        before = tag
        if length == UNDEFINED_LENGTH:
            at = _after_sequence(data, at, is_explicit, _DEEPEST)
            continue
        keyword = _KEYWORD_OF.get(tag)
        if keyword is not None and length:
            if is_explicit and vr != _VR_OF[tag]:
                raise _Unusual
            found[keyword] = _text(data, at, length)
        at += length


def _text(data: bytes, at: int, length: int) -> str:
    value = data[at : at + length].rstrip(b"\0 ")
    too_long = length > LONGEST or at + length > len(data)
    if too_long or (value and not _PLAIN.fullmatch(value)):
        raise _Unusual
    return value.decode("ascii")


def _element(data: bytes, at: int, is_explicit: bool) -> tuple[int, int, int]:
    """Tag and length of the element, and where its value begins."""
    group, element, vr, short = _EXPLICIT(data, at)
    tag = group << 16 | element
    if is_explicit and group != 0xFFFE:
        if vr in _SHORT:
            return tag, short, at + 8
        (length,) = struct.unpack_from("<I", data, at + 8)
        # VR UN of undefined length is a sequence in another encoding (PS3.5 6.2.2).
        if vr not in _LONG or (vr == b"UN" and length == UNDEFINED_LENGTH):
            raise _Unusual
        return tag, length, at + 12
    return tag, struct.unpack_from("<I", data, at + 4)[0], at + 8


def _after_sequence(data: bytes, at: int, is_explicit: bool, deepest: int) -> int:
    """Where a sequence of undefined length ends (PS3.5 7.5)."""
    while True:
        tag, length, at = _element(data, at, is_explicit)
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM or not deepest:
            raise _Unusual
        if length != UNDEFINED_LENGTH:
            at += length
            continue
        while True:
            tag, length, at = _element(data, at, is_explicit)
            if tag == _ITEM_END:
                break
            if length == UNDEFINED_LENGTH:
                at = _after_sequence(data, at, is_explicit, deepest - 1)
            else:
                at += length
