"""The folder of received objects: bytes as they came, durable before anybody is told so.

inbox/<Study Instance UID>/<SOP Instance UID>.<digest>.dcm
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from dicomai import durable
from dicomai.errors import NotDicom
from dicomai.parse import PARSER_ERRORS, parse_file_head, parse_head, transfer_syntax_uid
from dicomai.study import MANUFACTURER, Instance

UID_PATTERN = re.compile(r"[0-9]+(\.[0-9]+)*")
WANTED: list[BaseTag | int] = [
    Tag(keyword)
    for keyword in (
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SpecificCharacterSet",
        "Manufacturer",
        "PatientID",
        "AccessionNumber",
        "NumberOfStudyRelatedInstances",
    )
]


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


def parse(dataset: bytes, syntax_uid: str) -> Header:
    """Read the identifying attributes of an encoded dataset, no further than the pixels.

    Raises NotDicom where one is missing or is no UID (it becomes a file name).
    """
    try:
        return _header(parse_head(dataset, UID(syntax_uid), WANTED))
    except PARSER_ERRORS as error:
        raise NotDicom(f"cannot be parsed as DICOM ({_kind(error)})") from error


def _kind(error: BaseException) -> str:
    # Never the parser's own words: they quote values, which may be a patient's.
    return (
        "sequences nested too deep" if isinstance(error, RecursionError) else type(error).__name__
    )


def _header(ds: Dataset) -> Header:
    uids = []
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        value = str(ds.get(keyword) or "")
        if not _is_uid(value):
            raise NotDicom(f"{keyword} is missing or is not a UID")
        uids.append(value)
    expected = str(ds.get("NumberOfStudyRelatedInstances") or "")
    sop_class, sop_instance, study, series = uids
    return Header(
        sop_class,
        sop_instance,
        study,
        series,
        analyzable=_is_image(uids[0]) and ds.get("Manufacturer") != MANUFACTURER,
        expected_instances=int(expected) if expected.isdigit() else None,
        patient_id=str(ds.get("PatientID") or ""),
        accession_number=str(ds.get("AccessionNumber") or ""),
    )


def _is_uid(value: str) -> bool:
    return len(value) <= 64 and UID_PATTERN.fullmatch(value) is not None


def _is_image(sop_class_uid: str) -> bool:
    # The dictionary's names: "CT Image Storage", but "Enhanced SR Storage", "Segmentation Storage".
    return "Image Storage" in UID(sop_class_uid).name


def digest(dataset: bytes, transfer_syntax_uid: str) -> str:
    """SHA-256 of what was sent; the file meta, which we write, does not count."""
    hasher = hashlib.sha256(f"{transfer_syntax_uid}\n".encode())
    hasher.update(dataset)
    return hasher.hexdigest()


def keep(
    inbox: Path, header: Header, transfer_syntax_uid: str, file_meta: bytes, dataset: bytes
) -> Instance:
    """Write an object durably. file_meta: preamble, prefix and group 0002, encoded."""
    found = digest(dataset, transfer_syntax_uid)
    folder = inbox / header.study_instance_uid
    path = folder / f"{header.sop_instance_uid}.{found[:12]}.dcm"
    durable.write(path, [file_meta, dataset])
    return Instance(
        header.sop_instance_uid,
        header.sop_class_uid,
        header.series_instance_uid,
        transfer_syntax_uid,
        path,
        found,
    )


def read_file(path: Path) -> tuple[Header, Instance, int]:
    """A DICOM file from disk with its size. Raises NotDicom where it is none, or broken."""
    data = path.read_bytes()
    try:
        ds = parse_file_head(path, WANTED)
        header = _header(ds)
        syntax = transfer_syntax_uid(ds)
        length = int(ds.file_meta.get("FileMetaInformationGroupLength", 0))
    except InvalidDicomError as error:
        raise NotDicom("not a DICOM file: it has no DICM prefix") from error
    except PARSER_ERRORS as error:
        raise NotDicom(f"cannot be parsed as DICOM ({_kind(error)})") from error
    # Preamble, prefix, the group length's own element, and what it counts (PS3.10 7.1).
    dataset = data[128 + 4 + 12 + length :] if length else data
    instance = Instance(
        header.sop_instance_uid,
        header.sop_class_uid,
        header.series_instance_uid,
        syntax,
        path,
        digest(dataset, syntax),
    )
    return header, instance, len(data)


def read_back(path: Path) -> tuple[Header, Instance, int]:
    """What keep() wrote. Raises NotDicom where it is not what its name says."""
    header, instance, size = read_file(path)
    if not path.name.endswith(f".{instance.digest[:12]}.dcm"):
        raise NotDicom(f"{path.name} does not hold the bytes that its name says")
    return header, instance, size


def _is_older(file: Path, moment: float) -> bool:
    try:
        return file.stat().st_mtime < moment
    except FileNotFoundError:  # written or replaced at this moment
        return False


def files_before(folder: Path, moment: float) -> Iterator[list[Path]]:
    """Files last changed before a moment (seconds since 1970), a study's folder at a time.

    What is no study's folder is somebody else's.
    """
    if not folder.is_dir():
        return
    for study in sorted(folder.iterdir()):
        if _is_uid(study.name) and study.is_dir():
            old = [file for file in sorted(study.iterdir()) if _is_older(file, moment)]
            if old:
                yield old
