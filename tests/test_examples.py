"""Folders of labelled images: every form in which public collections come, and what is wrong."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import make
import numpy as np
import pytest
from killed import say
from peers import shared
from sqlalchemy import update
from studies import keep

from dicomai.errors import Misuse
from dicomai.receive.admission import Admission
from dicomai.settings import load
from dicomai.store.database import open_database
from dicomai.store.tables import study
from dicomai.train.examples import Found, age_in_years, read_examples

KNOWN = {"pneumonia", "effusion"}


def quietly(paths: Sequence[Path], _words: str) -> Iterable[Path]:
    """No progress bar."""
    return paths


def pictures(folder: Path, *names: str) -> Path:
    """Grey images, each another, of one patient as CheXpert names its folders."""
    for number, name in enumerate(names):
        file = folder / "patient00001" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (64, 48), np.uint8)
        cv2.imwrite(str(file), noise)
    return folder


def read(folder: Path, text: str, column: str | None = None) -> Found:
    """A folder with this file of labels."""
    csv = folder.parent / "labels.csv"
    csv.write_text(text)
    return read_examples(folder, csv, KNOWN, column, "A", quietly)


@pytest.mark.parametrize(
    "text",
    [
        "file,label,value\na.png,pneumonia,1\na.png,effusion,0\nb.png,pneumonia,0\nb.png,effusion,0",
        "Image Index,Finding Labels\na.png,Pneumonia|Mass\nb.png,No Finding",
        "filename,pneumonia,effusion\na.png,1,0\nb.png,0.0,0.0",
        "file,label\na,pneumonia\nb,normal",
    ],
    ids=["a line each", "a list", "a column each", "stems"],
)
def test_labels_come_in_any_form_of_public_collections(tmp_path: Path, text: str) -> None:
    found = read(pictures(tmp_path / "in", "a.png", "b.png"), text)
    said = {Path(item.path).stem: item.labels for item in found.examples}
    assert said == {
        "a": {"pneumonia": "present", "effusion": "absent"},
        "b": {"pneumonia": "absent", "effusion": "absent"},
    }


def test_an_empty_cell_says_nothing(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "a.png")
    (item,) = read(folder, "file,pneumonia,effusion\na.png,-1,\n").examples
    assert item.labels == {"pneumonia": "unsure"}


def test_what_is_known_of_a_patient_and_an_image_is_kept(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "deep/a.png")
    (item,) = read(
        folder,
        "file,label,patient_id,split,source,sex,age,view,reader,date\n"
        "patient00001/deep/a.png,normal,P1,Valid,NIH,female,63,pa,B,2026-03-01\n",
    ).examples
    assert (item.patient_id, item.split, item.source, item.reader) == ("P1", "val", "NIH", "B")
    assert (item.sex, item.age_years, item.view, str(item.read_on)) == (
        "F",
        63.0,
        "PA",
        "2026-03-01",
    )


def test_dicom_files_are_found_by_their_uid_and_say_the_rest_themselves(tmp_path: Path) -> None:
    ds = make.chest_radiograph(0, PatientID="P7", Manufacturer="ACME")
    make.save(tmp_path / "in", [ds, make.chest_radiograph(1)])
    found = read(tmp_path / "in", f"sop_instance_uid,label\n{ds.SOPInstanceUID},pneumonia\n")
    (item,) = found.examples
    assert (item.patient_id, item.manufacturer, item.sex, item.age_years) == (
        "P7",
        "ACME",
        "F",
        47.0,
    )
    assert item.source == "in"
    assert found.unlabelled == 1


def test_what_is_missing_broken_or_unnamed_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "a.png", "b.png", "c.png")
    (folder / "patient00001/b.png").write_bytes(b"no picture")
    found = read(folder, "file,label\na.png,normal\nb.png,normal\ngone.png,normal\n")
    assert [Path(item.path).name for item in found.examples] == ["a.png"]
    assert (found.undecodable, found.missing, found.unlabelled) == (("b.png",), ("gone.png",), 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label,patient_id\nnormal,P1", "names no files"),
        ("file,patient_id\na.png,P1", "has no labels"),
        ("file,label\na.png,", "line 2: no label"),
        ("file,label\na.png,normal|pneumonia", "both nothing and something"),
        ("file,label,value\na.png,fracture,1", "the label 'fracture' is none of"),
        ("file,label,split\na.png,normal,holdout", "the split 'holdout' is none of"),
        ("file,label\na.png,normal\na.png,pneumonia", "lines 2 and 3: pneumonia is absent and"),
        ("file,label\na.png,normal\na,pneumonia", "a.png and a are the same file"),
        (
            "file,label,value,patient_id\na.png,pneumonia,1,P1\na.png,effusion,1,P2",
            "lines 2 and 3: patient_id is P1 and P2",
        ),
        (
            "file,label,value,split\na.png,pneumonia,1,train\na.png,effusion,1,test",
            "lines 2 and 3: split is train and test",
        ),
        (
            "file,label,patient_id,split\na.png,normal,P1,train\nb.png,normal,P1,test",
            "1 patients are in two splits",
        ),
    ],
)
def test_a_file_at_fault_is_refused_with_one_line(tmp_path: Path, text: str, words: str) -> None:
    folder = pictures(tmp_path / "in", "a.png", "b.png")
    with pytest.raises(Misuse) as caught:
        read(folder, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_patients_images_are_taken_together_or_not_at_all(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "a.png", "b.png")
    text = "file,label\na.png,normal\nb.png,normal\n"
    assert {item.patient_id for item in read(folder, text).examples} == {"patient00001"}
    (folder / "patient00001").rename(folder / "study1")
    with pytest.raises(Misuse, match="2 images are of nobody: add a column patient_id"):
        read(folder, text)


def test_files_that_are_no_images_are_nobodys_business(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "a.png")
    (folder / "LICENSE").write_text("free")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "link.dcm").symlink_to(folder / "gone")
    found = read(folder, "file,label,reader\na.png,normal\n")
    assert len(found.examples) == 1


@pytest.mark.parametrize(
    ("words", "years"), [("063Y", 63.0), ("018M", 1.5), ("7", 7.0), ("", None), ("old", None)]
)
def test_an_age_is_read_in_years(words: str, years: float | None) -> None:
    assert age_in_years(words) == years


# The commands


def settings_of(folder: Path, url: str) -> Path:
    """Settings with a migrated database."""
    config = folder / "dicomai.toml"
    config.write_text(f'data_dir = "{folder}/data"\n[database]\nurl = "{url}"\n')
    assert say(config, "db", "upgrade").returncode == 0
    return config


def test_a_dataset_is_added_once_brought_up_to_date_and_forgotten(
    tmp_path: Path, database_url: str
) -> None:
    config = settings_of(tmp_path, database_url)
    folder = pictures(tmp_path / "xrays", "a.png", "b.png")
    csv = tmp_path / "labels.csv"
    csv.write_text("file,label,patient_id\na.png,pneumonia,P1\nb.png,normal,P2\n")
    add = ("dataset", "add", str(folder), "--labels", str(csv))
    assert say(config, *add).stdout == "xrays: images: 2 new; labels: 2 new\n"
    assert say(config, *add).stdout == "xrays: images: 2 same; labels: 2 same\n"
    csv.write_text("file,label,patient_id\na.png,normal,P1\nb.png,normal,P2\n")
    assert say(config, *add).stdout == "xrays: images: 2 same; labels: 1 changed, 1 same\n"
    (folder / "patient00001/b.png").unlink()
    csv.write_text("file,label,patient_id\na.png,normal,P1\nb.png,normal,P2\n")
    done = say(config, *add).stdout
    assert done.startswith("xrays: images: 1 gone, 1 same; labels: 1 same\nleft out: 1 files are")
    assert "xrays" in say(config, "dataset", "list").stdout
    assert say(config, "dataset", "remove", "xrays").stdout == "xrays: 1 images forgotten\n"
    refused = say(config, "dataset", "remove", "xrays")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_labels_are_imported_by_uid_and_by_accession_number(
    tmp_path: Path, database_url: str
) -> None:
    config = settings_of(tmp_path, database_url)
    settings = load(config)
    database = open_database(database_url)
    images = [make.chest_radiograph(n, AccessionNumber=f"A{n}") for n in range(3)]
    for file in make.save(tmp_path / "sent", images):
        admission = Admission(database, settings.data_dir, 0)
        admission.admit(*keep(file, settings.data_dir), "MODALITY")
    with database.write() as connection:  # as it is after an upgrade
        connection.execute(update(study).values(accession=None))
    csv = tmp_path / "labels.csv"
    csv.write_text(
        "sop_instance_uid,accession_number,label,value\n"
        f"{images[0].SOPInstanceUID},,pneumonia,present\n"
        ",A1,pneumonia,absent\n"
        ",A9,pneumonia,absent\n"
    )
    done = say(config, "labels", "import", str(csv), "--reader", "Dr A")
    assert done.stdout == "2 of 3 labels are of what is here: 2 new\n"
    listed = json.loads(say(config, "labels", "list", "--format", "json").stdout)
    assert {(row["subject"], row["subject_id"], row["value"], row["reader"]) for row in listed} == {
        ("image", images[0].SOPInstanceUID, "present", "Dr A"),
        ("study", images[1].StudyInstanceUID, "absent", "Dr A"),
    }
    csv.write_text("accession_number,label,value\nA9,pneumonia,absent\n")
    refused = say(config, "labels", "import", str(csv))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    database.engine.dispose()


def test_the_real_collection_is_taken_as_it_comes() -> None:
    folder = shared() / "data/cxr"
    found = read_examples(folder, folder / "labels.csv", {"pneumonia"}, None, "cxr", quietly)
    assert len(found.examples) == 2247
    assert (found.undecodable, found.missing, found.unlabelled) == ((), (), 0)
    splits = dict.fromkeys(("train", "val", "test"), 0)
    for item in found.examples:
        splits[str(item.split)] += item.labels["pneumonia"] == "present"
    assert splits == {"train": 773, "val": 136, "test": 225}
