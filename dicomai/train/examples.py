"""A folder of images with a file of labels: DICOM, PNG or JPEG, as public collections come."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import cv2
import numpy as np
from pydicom.errors import InvalidDicomError
from pydicom.tag import BaseTag, Tag

from dicomai.errors import Misuse
from dicomai.parse import PARSER_ERRORS, parse_file_head
from dicomai.prepare.sample import PICTURES
from dicomai.prepare.select import YEARS
from dicomai.store.truth import Example
from dicomai.train.labels import (
    ABSENT,
    PRESENT,
    date_of,
    label_of,
    read_csv,
    refuse,
    value_of,
)

# Columns, under the names that public collections give them.
FILE = ("file", "path", "filename", "image", "image_index", "sop_instance_uid", "image_id")
PATIENT = ("patient_id", "patient", "patientid", "subject_id")
LISTS = ("label", "labels", "findings", "finding_labels", "class")
VIEW = ("view", "view_position", "viewposition")
AGE = ("age_years", "age", "patient_age")
SEX = ("sex", "patient_sex", "gender", "patient_gender")
# In a list of labels: none of them is there.
NOTHING = {"normal", "no_finding", "none", "negative"}
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
HEADER: list[BaseTag | int] = [
    Tag(keyword)
    for keyword in (
        "SOPInstanceUID",
        "PatientID",
        "PatientSex",
        "PatientAge",
        "ViewPosition",
        "Manufacturer",
    )
]
DICOM = {".dcm", ".dicom", ".ima", ""}


@dataclass(frozen=True, slots=True)
class Found:
    """What there is to learn from; undecodable, missing: names; unlabelled: files nobody named."""

    examples: tuple[Example, ...]
    undecodable: tuple[str, ...]
    missing: tuple[str, ...]
    unlabelled: int


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the folder, with what its header says."""

    path: Path
    digest: str
    facts: Mapping[str, str]


def read_examples(
    folder: Path,
    csv: Path,
    known: Collection[str],
    column: str | None,
    reader: str,
    track: Callable[[Sequence[Path], str], Iterable[Path]],
) -> Found:
    """Match the lines of a CSV file with the images of a folder.

    Labels are in columns label and value; in one column that lists those which are there, and then
    the others are absent; or in a column each. column: the one that lists them, where there are
    several. known: labels that there are; track: shows progress.
    Raises Misuse where lines are at fault, or a patient is in two splits.
    """
    rows = read_csv(csv)
    columns = set(rows[0]) - {"line"}
    if column is not None and column not in columns:
        raise Misuse(f"{csv} has no column {column}; it has {', '.join(sorted(columns))}")
    name = next((c for c in FILE if c in columns), None)
    if name is None:
        raise Misuse(f"{csv} names no files: it needs one of the columns {', '.join(FILE)}")
    labelled = _labelled(csv, rows, columns, known, column, name)
    files = _files(folder, name == "sop_instance_uid", track)
    examples, undecodable, missing = [], [], []
    names: dict[Path, str] = {}
    for file_name, (row, said) in labelled.items():
        file = files.get(file_name)
        if file is not None and names.setdefault(file.path, file_name) != file_name:
            raise Misuse(f"{csv}: {names[file.path]} and {file_name} are the same file")
        if file is None:
            missing.append(file_name)
        elif file.path.suffix.lower() in PICTURES and not _decodes(file.path):
            undecodable.append(file_name)
        else:
            examples.append(_example(csv, folder, file, row, said, reader))
    nobodys = sum(not item.patient_id for item in examples)
    if nobodys:
        raise Misuse(
            f"{csv}: {nobodys} images are of nobody: add a column {PATIENT[0]}, or one patient's "
            "images would be learnt from and tested on"
        )
    _check_splits(csv, examples)
    used = {item.path for item in examples}
    left = {path for file in files.values() if str(path := file.path.resolve()) not in used}
    return Found(tuple(examples), tuple(undecodable), tuple(missing), len(left) - len(undecodable))


_Row = dict[str, str]


def _labelled(
    csv: Path,
    rows: list[_Row],
    columns: set[str],
    known: Collection[str],
    column: str | None,
    name: str,
) -> dict[str, tuple[_Row, dict[str, str]]]:
    """File -> its (first) line and label -> value."""
    read = _form(csv, columns, known, column)
    found: dict[str, tuple[_Row, dict[str, str]]] = {}
    faults: list[str] = []
    for row in rows:
        try:
            if not row.get(name):
                raise ValueError(f"no {name}")
            if row.get("split") and row["split"].lower() not in SPLITS:
                raise ValueError(f"the split '{row['split'][:20]}' is none of train, val, test")
            date_of(row.get("date", ""))
            said = read(row)
        except ValueError as error:
            faults.append(f"line {row['line']}: {error}")
            continue
        first, before = found.setdefault(row[name], (row, {}))
        for fact in (PATIENT, ("split",)):
            mine, other = (_first(line, fact) for line in (row, first))
            if mine and other and mine != other:
                faults.append(
                    f"lines {first['line']} and {row['line']}: {fact[0]} is {other} and {mine}"
                )
        for key, value in said.items():
            if before.setdefault(key, value) != value:
                faults.append(
                    f"lines {first['line']} and {row['line']}: {key} is {before[key]} and {value}"
                )
    refuse(csv, faults, len(rows))
    return found


def _form(
    csv: Path, columns: set[str], known: Collection[str], column: str | None
) -> Callable[[_Row], dict[str, str]]:
    """How a line says its labels."""
    if column is None and {"label", "value"} <= columns:
        return lambda row: {label_of(row["label"], known): value_of(row["value"])}
    listed = column or next((c for c in LISTS if c in columns), None)
    if listed is not None:
        return lambda row: _listed(row.get(listed, ""), known)
    own = sorted(columns & set(known))
    if not own:
        raise Misuse(
            f"{csv} has no labels: it needs the columns label and value, or one of "
            f"{', '.join(LISTS)}, or a column for each of {', '.join(sorted(known))}"
        )
    return lambda row: {key: value_of(row[key]) for key in own if row.get(key)}


def _listed(words: str, known: Collection[str]) -> dict[str, str]:
    """Of "A|B": A and B are present, every other label is absent.

    Other words than labels are other findings, of which nothing is learnt.
    """
    found = {"_".join(word.lower().split()) for word in words.split("|") if word.strip()}
    if not found:
        raise ValueError("no label: what is not known is left out, what is absent is 'normal'")
    if found & NOTHING and len(found) > 1:
        raise ValueError(f"'{words[:40]}' is both nothing and something")
    return {key: PRESENT if key in found else ABSENT for key in known}


def _files(
    folder: Path, by_uid: bool, track: Callable[[Sequence[Path], str], Iterable[Path]]
) -> dict[str, _File]:
    """Each image under its path below the folder, its name and its stem, where that is one file's.

    by_uid: under its SOP Instance UID instead
    """
    if not folder.is_dir():
        raise Misuse(f"there is no folder {folder}")
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix.lower() in DICOM | PICTURES
    ]
    files = [file for path in track(paths, "reading files") if (file := _file(path))]
    if by_uid:
        return {file.facts["sop_instance_uid"]: file for file in files if file.facts}
    found: dict[str, _File] = {}
    for part in ("stem", "name"):
        count = Counter(getattr(file.path, part) for file in files)
        found |= {n: f for f in files if count[n := getattr(f.path, part)] == 1}
    return found | {str(file.path.relative_to(folder)): file for file in files}


def _file(path: Path) -> _File | None:
    """None for what is neither a picture nor DICOM."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix.lower() in PICTURES:
        return _File(path, digest, {})
    try:
        ds = parse_file_head(path, HEADER)
    except (*PARSER_ERRORS, InvalidDicomError):
        return None
    return _File(
        path,
        digest,
        {
            "sop_instance_uid": str(ds.get("SOPInstanceUID") or ""),
            "patient_id": str(ds.get("PatientID") or ""),
            "sex": str(ds.get("PatientSex") or ""),
            "age_years": str(ds.get("PatientAge") or ""),
            "view": str(ds.get("ViewPosition") or ""),
            "manufacturer": str(ds.get("Manufacturer") or ""),
        },
    )


def _decodes(path: Path) -> bool:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    try:
        return bool(data.size) and cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) is not None
    except cv2.error:  # more pixels than OpenCV takes
        return False


def _patient_of(path: Path) -> str:
    """As CheXpert names its folders."""
    return next((part for part in path.parts if re.fullmatch(r"patient\d+", part)), "")


def _example(
    csv: Path, folder: Path, file: _File, row: _Row, said: dict[str, str], reader: str
) -> Example:
    def fact(columns: Sequence[str]) -> str:
        return _first(row, columns) or file.facts.get(columns[0], "")

    split = row.get("split", "").lower()
    return Example(
        path=str(file.path.resolve()),
        digest=file.digest,
        patient_id=fact(PATIENT) or _patient_of(file.path.relative_to(folder)),
        source=row.get("source") or folder.resolve().name,
        split=SPLITS[split] if split else None,
        sex=fact(SEX)[:1].upper() or None,
        age_years=age_in_years(fact(AGE)),
        view=fact(VIEW)[:16].upper() or None,
        manufacturer=fact(("manufacturer",))[:64] or None,
        labels=said,
        reader=row.get("reader") or reader,
        read_on=_read_on(row),
    )


def _first(row: _Row, columns: Sequence[str]) -> str:
    """What the first of these columns says that a line fills."""
    return next((row[column] for column in columns if row.get(column)), "")


def _read_on(row: _Row) -> date | None:
    return date_of(row.get("date", ""))


def age_in_years(words: str) -> float | None:
    """063Y, 018M (AS, PS3.5 6.2) or 63; None for anything else."""
    found = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)([DWMY]?)", words.strip().upper())
    return float(found[1]) / YEARS[found[2] or "Y"] if found else None


def _check_splits(csv: Path, examples: Sequence[Example]) -> None:
    splits: dict[str, set[str]] = {}
    for item in examples:
        if item.patient_id and item.split:
            splits.setdefault(item.patient_id, set()).add(item.split)
    torn = sum(len(found) > 1 for found in splits.values())
    if torn:
        raise Misuse(f"{csv}: {torn} patients are in two splits: give each patient one")
