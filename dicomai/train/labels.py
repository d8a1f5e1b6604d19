"""Labels from a CSV file: who says what of which image; and what holds where they disagree."""

import csv
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import zip_longest
from pathlib import Path

from dicomai.errors import Misuse

PRESENT, ABSENT, UNSURE = "present", "absent", "unsure"
FILE, DOCUMENT = "file", "document"  # sources
VALUES = {
    **dict.fromkeys(("present", "positive", "yes", "true", "1", "1.0"), PRESENT),
    **dict.fromkeys(("absent", "negative", "no", "false", "0", "0.0"), ABSENT),
    # -1 is CheXpert's "uncertain" (Irvin et al., AAAI 2019).
    **dict.fromkeys(("unsure", "uncertain", "undetermined", "-1", "-1.0"), UNSURE),
}
# Column -> what its values name; the first of them that a file has and a line fills counts.
NAMED_BY = {"sop_instance_uid": "image", "study_instance_uid": "study", "accession_number": "study"}
LISTED = 5  # faults that are told of a file


@dataclass(frozen=True, slots=True)
class Statement:
    """What a reader says of an image or a study; column: what name is (a key of NAMED_BY)."""

    line: int
    column: str
    name: str
    label: str
    value: str
    reader: str
    read_on: date | None


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, its columns in lower case with underscores; "line" is its number.

    Comma, semicolon or tabulator, with or without a byte order mark. Raises Misuse.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise Misuse(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Misuse(f"{path} is not UTF-8: save it as CSV UTF-8") from error
    first, _, _ = text.partition("\n")
    delimiter = max(",;\t", key=first.count)
    lines = csv.reader(text.splitlines(), delimiter=delimiter)
    try:
        columns = [_column(name) for name in next(lines, [])]
        rows = [(lines.line_num, cells) for cells in lines if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise Misuse(f"{path}, line {lines.line_num}: {error}") from error
    if len(set(columns)) < len(columns):
        twice = Counter(columns).most_common(1)[0][0]
        raise Misuse(f"{path} has the column {twice} twice")
    if not rows:
        raise Misuse(f"{path} holds no line below its header")
    for number, cells in rows:
        if len(cells) > len(columns):
            raise Misuse(f"{path}, line {number}: {len(cells)} cells, but {len(columns)} columns")
    return [
        {"line": str(number), **dict(zip_longest(columns, map(str.strip, cells), fillvalue=""))}
        for number, cells in rows
    ]


def _column(name: str) -> str:
    return "_".join(name.strip().lower().split())


def read_statements(path: Path, known: Collection[str], reader: str) -> list[Statement]:
    """Read lines of an identifying column, label, value, and maybe reader and date (YYYY-MM-DD).

    known: labels that there are; reader: of lines that name none. Raises Misuse with the number of
    lines at fault and the first of them; no line is taken then.
    """
    rows = read_csv(path)
    missing = {"label", "value"} - rows[0].keys()
    if missing or not rows[0].keys() & NAMED_BY.keys():
        raise Misuse(
            f"{path} needs the columns label, value, and one of {', '.join(NAMED_BY)}; "
            f"it has {', '.join(rows[0].keys() - {'line'})}"
        )
    found: list[Statement] = []
    faults: list[str] = []
    for row in rows:
        try:
            found.append(_statement(row, known, reader))
        except ValueError as error:
            faults.append(f"line {row['line']}: {error}")
    faults += _contradictions(found)
    refuse(path, faults, len(rows))
    return found


def _statement(row: dict[str, str], known: Collection[str], reader: str) -> Statement:
    column = next((name for name in NAMED_BY if row.get(name)), None)
    if column is None:
        raise ValueError(f"no {' or '.join(NAMED_BY)}")
    return Statement(
        int(row["line"]),
        column,
        row[column],
        label_of(row["label"], known),
        value_of(row["value"]),
        row.get("reader") or reader,
        date_of(row.get("date", "")),
    )


def label_of(word: str, known: Collection[str]) -> str:
    """A label's key, whatever its case. Raises ValueError."""
    key = "_".join(word.lower().split())
    if key not in known:
        raise ValueError(f"the label '{word[:40]}' is none of {', '.join(sorted(known))}")
    return key


def value_of(word: str) -> str:
    """present, absent or unsure. Raises ValueError."""
    if word.lower() not in VALUES:
        raise ValueError(f"the value '{word[:40]}' is none of present, absent, unsure")
    return VALUES[word.lower()]


def date_of(word: str) -> date | None:
    """A date; None of nothing. Raises ValueError."""
    if not word:
        return None
    try:
        return date.fromisoformat(word[:10])
    except ValueError:
        raise ValueError(f"the date '{word[:40]}' is not YYYY-MM-DD") from None


def _contradictions(found: Sequence[Statement]) -> list[str]:
    """One reader who says two things of the same image on the same day."""
    said: dict[tuple[object, ...], Statement] = {}
    faults = []
    for item in found:
        key = item.column, item.name, item.label, item.reader, item.read_on
        before = said.setdefault(key, item)
        if before.value != item.value:
            faults.append(
                f"lines {before.line} and {item.line}: {item.reader} says {before.value} and "
                f"{item.value} of the same"
            )
    return faults


def refuse(path: Path, faults: Sequence[str], lines: int) -> None:
    """Raise Misuse where there is a fault."""
    if faults:
        more = f"; and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        raise Misuse(
            f"{path}: {len(faults)} of {lines} lines cannot be used, nothing was imported: "
            f"{'; '.join(faults[:LISTED])}{more}"
        )


def digest(path: Path) -> str:
    """SHA-256 of a file, as its labels' origin."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def agree(said: Iterable[tuple[str, str]]) -> str:
    """What holds where readers say these (source, value): the sure ones' majority, else unsure.

    Whoever corrects a report has seen the image and what was said of it before: documents outweigh
    files. Unsure labels are masked in training, and not counted in any figure.
    """
    sure = [(source, value) for source, value in said if value != UNSURE]
    corrected = [value for source, value in sure if source == DOCUMENT]
    counts = Counter(corrected or [value for _, value in sure])
    if counts[PRESENT] == counts[ABSENT]:
        return UNSURE
    return PRESENT if counts[PRESENT] > counts[ABSENT] else ABSENT
