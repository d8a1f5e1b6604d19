"""Labels: from a file, from documents, from folders of images; what holds in a dispute."""

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from studies import Bench
from studies import bench as new_bench

from dicomai.errors import Misuse
from dicomai.store import truth
from dicomai.store.database import Database
from dicomai.store.truth import Said
from dicomai.train.labels import ABSENT, PRESENT, UNSURE, agree, read_statements

KNOWN = {"pneumonia", "effusion"}
HEADER = "sop_instance_uid,label,value,reader,date\n"


def write(folder: Path, text: str) -> Path:
    """A file of labels."""
    file = folder / "labels.csv"
    file.write_bytes(text.encode())
    return file


def refusal(folder: Path, text: str) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(Misuse) as caught:
        read_statements(write(folder, text), KNOWN, "import")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [("present", PRESENT), ("1", PRESENT), ("NO", ABSENT), ("0.0", ABSENT), ("-1.0", UNSURE)],
)
def test_a_value_may_be_said_in_the_words_of_public_collections(
    tmp_path: Path, word: str, value: str
) -> None:
    (item,) = read_statements(write(tmp_path, HEADER + f"1.2,Pneumonia,{word},A,"), KNOWN, "import")
    assert (item.label, item.value, item.reader, item.read_on) == ("pneumonia", value, "A", None)


def test_a_file_of_a_spreadsheet_is_read_with_its_semicolons_and_byte_order_mark(
    tmp_path: Path,
) -> None:
    text = "\ufeffAccession Number;Label;Value;Date\nA1;Effusion;yes;2026-03-01\n\n"
    (item,) = read_statements(write(tmp_path, text), KNOWN, "import")
    assert (item.column, item.name, item.read_on) == ("accession_number", "A1", date(2026, 3, 1))
    assert item.reader == "import"


def test_a_line_may_end_early(tmp_path: Path) -> None:
    (item,) = read_statements(write(tmp_path, HEADER + "1.2,pneumonia,1"), KNOWN, "import")
    assert (item.reader, item.read_on) == ("import", None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1.2,pneumonia", "the value '' is none of present, absent, unsure"),
        ("1.2,fracture,present,A,", "the label 'fracture' is none of effusion, pneumonia"),
        ("1.2,pneumonia,maybe,A,", "the value 'maybe' is none of present, absent, unsure"),
        ("1.2,pneumonia,present,A,1.3.2026", "the date '1.3.2026' is not YYYY-MM-DD"),
        (",pneumonia,present,A,", "no sop_instance_uid"),
    ],
)
def test_a_line_at_fault_refuses_the_whole_file_and_is_named(
    tmp_path: Path, line: str, words: str
) -> None:
    said = refusal(tmp_path, HEADER + "1.1,pneumonia,present,A,\n" + line)
    assert "1 of 2 lines cannot be used, nothing was imported: line 3: " in said
    assert words in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no line"),
        (HEADER, "holds no line"),
        ("label,value\npneumonia,1", "needs the columns label, value, and one of sop_instance_uid"),
        ("label,label,value\na,b,c", "has the column label twice"),
        (HEADER + "1.2,pneumonia,1,A,2026-01-01,6", "line 2: 6 cells, but 5 columns"),
    ],
)
def test_a_file_that_is_none_is_refused_with_one_line(
    tmp_path: Path, text: str, words: str
) -> None:
    assert words in refusal(tmp_path, text)


def test_of_many_lines_at_fault_the_first_are_named_and_the_others_counted(tmp_path: Path) -> None:
    said = refusal(tmp_path, HEADER + "1.2,x,1,A,\n" * 8)
    assert "8 of 8 lines" in said
    assert said.endswith("and 3 more")


def test_a_reader_who_contradicts_himself_on_one_day_is_asked_to_decide(tmp_path: Path) -> None:
    said = refusal(tmp_path, HEADER + "1.2,pneumonia,1,A,\n1.2,pneumonia,0,A,\n")
    assert "lines 2 and 3: A says present and absent of the same" in said


@pytest.mark.parametrize(
    ("said", "holds"),
    [
        ([("file", PRESENT)], PRESENT),
        ([("file", UNSURE)], UNSURE),
        ([("file", PRESENT), ("file", UNSURE)], PRESENT),
        ([("file", PRESENT), ("file", ABSENT)], UNSURE),
        ([("file", PRESENT), ("file", ABSENT), ("file", ABSENT)], ABSENT),
        ([("file", PRESENT), ("file", PRESENT), ("document", ABSENT)], ABSENT),
        ([("file", PRESENT), ("document", UNSURE)], PRESENT),
        ([("document", PRESENT), ("document", ABSENT), ("file", PRESENT)], UNSURE),
    ],
)
def test_the_majority_holds_and_who_corrects_a_report_outweighs_a_file(
    said: list[tuple[str, str]], holds: str
) -> None:
    assert agree(said) == holds


# In the database


@pytest.fixture
def bench(database: Database) -> Iterator[Bench]:
    """Each kind of database."""
    found = new_bench(database)
    yield found
    assert found.unexplained() == []


def said(subject: tuple[str, str], value: str, reader: str = "A", on: date | None = None) -> Said:
    """A statement about pneumonia."""
    return Said(subject, "pneumonia", value, reader, on, "file", "0" * 64)


def test_of_one_reader_the_latest_holds_and_of_several_each(bench: Bench) -> None:
    bench.arrive(1, "1.1", uid="1.1.1")
    image = ("image", "1.1.1")
    assert truth.say(bench.database, [said(image, PRESENT)]) == {"new": 1}
    assert truth.say(bench.database, [said(image, PRESENT)]) == {"same": 1}
    late = said(image, ABSENT, on=date(2026, 3, 2))
    assert truth.say(bench.database, [late]) == {"changed": 1}
    early = said(image, PRESENT, on=date(2026, 3, 1))
    assert truth.say(bench.database, [early]) == {"older": 1}
    assert truth.say(bench.database, [said(image, PRESENT, "B")]) == {"new": 1}
    (item,) = truth.candidates(bench.database, KNOWN)
    assert sorted(item.said["pneumonia"]) == [("file", ABSENT), ("file", PRESENT)]


def test_what_is_said_of_an_image_goes_before_what_is_said_of_its_study(bench: Bench) -> None:
    for number in (1, 2):
        bench.arrive(number, "1.1", uid=f"1.1.{number}")
    statements = [said(("study", "1.1"), PRESENT), said(("image", "1.1.2"), ABSENT)]
    truth.say(bench.database, statements)
    values = {item.name: item.said["pneumonia"] for item in truth.candidates(bench.database, KNOWN)}
    assert values == {"1.1.1": [("file", PRESENT)], "1.1.2": [("file", ABSENT)]}


def test_an_image_of_which_nothing_is_said_is_not_learnt_from(bench: Bench) -> None:
    bench.arrive(1, "1.1")
    assert truth.candidates(bench.database, KNOWN) == []


def test_what_is_not_here_is_not_found(bench: Bench) -> None:
    bench.arrive(1, "1.1", uid="1.1.1")
    bench.arrive(2, "1.1", uid="1.1.2", analyzable=False)
    images = truth.subjects(bench.database, "sop_instance_uid", {"1.1.1", "1.1.2", "7.7"})
    assert images == {"1.1.1": ("image", "1.1.1")}
    studies = truth.subjects(bench.database, "study_instance_uid", {"1.1", "7"})
    assert studies == {"1.1": ("study", "1.1")}
