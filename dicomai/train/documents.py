"""Labels from Structured Reports: what a radiologist says of an image, or corrects in our report.

PS3.16 TID 1500 and 1501; PS3.3 C.17. A code of the model's table names the label.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.sr.coding import Code as Concept
from pydicom.uid import (
    BasicTextSRStorage,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    ExtensibleSRStorage,
)

from dicomai.errors import NotDicom
from dicomai.parse import PARSER_ERRORS, parse_file
from dicomai.study import Code
from dicomai.train.labels import ABSENT, PRESENT, UNSURE

SOP_CLASSES = (
    BasicTextSRStorage,
    EnhancedSRStorage,
    ComprehensiveSRStorage,
    Comprehensive3DSRStorage,
    ExtensibleSRStorage,
)
MOST_BYTES = 16 << 20
MOST_ITEMS = 20_000

# CID 240 as our own reports say it, with what others say in its place.
PRESENCE = {
    Concept("52101004", "SCT", "Present"): PRESENT,
    Concept("373066001", "SCT", "Yes"): PRESENT,
    Concept("10828004", "SCT", "Positive"): PRESENT,
    Concept("272519000", "SCT", "Absent"): ABSENT,
    Concept("2667000", "SCT", "Absent"): ABSENT,
    Concept("373067005", "SCT", "No"): ABSENT,
    Concept("260385009", "SCT", "Negative"): ABSENT,
    Concept("373068000", "SCT", "Undetermined"): UNSURE,
    Concept("82334004", "SCT", "Indeterminate"): UNSURE,
}
FINDING = Concept("121071", "DCM", "Finding")
OBSERVER_TYPE = Concept("121005", "DCM", "Observer Type")
PERSON = Concept("121006", "DCM", "Person")
PERSON_NAME = Concept("121008", "DCM", "Person Observer Name")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a document says of an image; of its whole study where it names none ("")."""

    sop_instance_uid: str
    label: str
    value: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a person says in a document; reader: the name, for its key only."""

    study_instance_uid: str
    reader: str
    read_on: date | None
    readings: tuple[Reading, ...]


def read(path: Path, table: Mapping[str, Code]) -> Report:
    """Read a document for labels; table: label -> its code.

    Raises NotDicom where it cannot be read, or where nobody but a device says it.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise NotDicom(f"the document is larger than {MOST_BYTES >> 20} MB")
        ds = parse_file(path, MOST_BYTES)
        items = list(_walk(ds, []))
        reader, read_on = _observer(ds, [item for item, _ in items])
        return Report(str(ds.StudyInstanceUID), reader, read_on, tuple(_readings(ds, items, table)))
    except PARSER_ERRORS as error:
        raise NotDicom(f"cannot be parsed as a document ({type(error).__name__})") from error


_Item = tuple[Dataset, list[Dataset]]


def _walk(ds: Dataset, above: list[Dataset]) -> Iterator[_Item]:
    """Each content item with those above it, the document first."""
    waiting: list[_Item] = [(ds, above)]
    for count, (item, path) in enumerate(_popped(waiting)):
        if count > MOST_ITEMS:
            raise NotDicom(f"the document has more than {MOST_ITEMS:,} content items")
        yield item, path
        children = item.get("ContentSequence") or []
        waiting += [(child, [*path, item]) for child in reversed(children)]


def _popped(waiting: list[_Item]) -> Iterator[_Item]:
    while waiting:
        yield waiting.pop()


def _concept(item: Dataset, keyword: str) -> Concept | None:
    sequence = item.get(keyword)
    if not sequence:
        return None
    code = sequence[0]
    value = code.get("CodeValue") or code.get("LongCodeValue") or code.get("URNCodeValue") or ""
    return Concept(str(value), str(code.get("CodingSchemeDesignator", "")), "")


def _observer(ds: Dataset, items: Sequence[Dataset]) -> tuple[str, date | None]:
    """Who says it, and when: who verified it, else the person who observed."""
    verifying = ds.get("VerifyingObserverSequence")
    if verifying:
        return str(verifying[0].get("VerifyingObserverName", "")), _date(
            str(verifying[0].get("VerificationDateTime", ""))
        )
    types = {
        _concept(item, "ConceptCodeSequence")
        for item in items
        if _concept(item, "ConceptNameCodeSequence") == OBSERVER_TYPE
    }
    names = [
        str(item.get("PersonName", ""))
        for item in items
        if _concept(item, "ConceptNameCodeSequence") == PERSON_NAME
    ]
    if PERSON not in types and not names:
        raise NotDicom("no person observed or verified it")
    return (names or [""])[0], _date(str(ds.get("ContentDate", "")))


def _date(value: str) -> date | None:
    with suppress(ValueError):
        return datetime.strptime(value[:8], "%Y%m%d").date()
    return None


def _readings(ds: Dataset, items: Sequence[_Item], table: Mapping[str, Code]) -> Iterator[Reading]:
    codes: dict[Concept | None, str] = {
        Concept(c.value, c.scheme, c.meaning): key for key, c in table.items()
    }
    said: dict[tuple[str, str], str] = {}
    for item, above in items:
        if not above:
            continue
        spoken = _spoken(item, above[-1], codes)
        if spoken is not None:
            images = _images(above[-1]) if len(above) > 1 else []
            for uid in images or [""]:  # beside the title it is said of the study
                said[uid, spoken[0]] = spoken[1]
    for (uid, key), value in said.items():
        yield Reading(uid, key, value)


def _spoken(
    item: Dataset, group: Dataset, codes: Mapping[Concept | None, str]
) -> tuple[str, str] | None:
    """The label of an item, and what it says of it."""
    name, value = (
        _concept(item, key) for key in ("ConceptNameCodeSequence", "ConceptCodeSequence")
    )
    if name in codes and value in PRESENCE:
        return codes[name], PRESENCE[value]
    if name == FINDING and value in codes:
        beside = {_concept(x, "ConceptNameCodeSequence") for x in group.get("ContentSequence", [])}
        # Where the same group evaluates the finding, that counts: it may be "absent".
        return None if value in beside else (codes[value], PRESENT)
    return None


def _images(group: Dataset) -> list[str]:
    """The images that a group, or what it is inferred from, refers to."""
    found = []
    for item, _ in _walk(group, []):
        if item.get("ValueType") == "IMAGE":
            found += [
                str(ref.ReferencedSOPInstanceUID) for ref in item.get("ReferencedSOPSequence", [])
            ]
    return list(dict.fromkeys(found))
