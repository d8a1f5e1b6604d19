"""Labels that come back as Structured Reports over C-STORE."""

from collections.abc import Iterator
from pathlib import Path

import highdicom as hd
import make
import pytest
from highdicom.sr import (
    CodedConcept,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    PersonObserverIdentifyingAttributes,
    QualitativeEvaluation,
    SourceImageForMeasurementGroup,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from sqlalchemy import select
from studies import keep

from dicomai import learning
from dicomai.errors import NotDicom
from dicomai.receive.admission import Admission
from dicomai.settings import Settings
from dicomai.store import queries, truth
from dicomai.store.database import Database
from dicomai.store.tables import document, label
from dicomai.study import Code
from dicomai.train import documents
from dicomai.train.documents import Reading

TABLE = {"pneumonia": Code("233604007", "SCT", "Pneumonia")}
PNEUMONIA = CodedConcept("233604007", "SCT", "Pneumonia")
FRACTURE = CodedConcept("125605004", "SCT", "Fracture of bone")
SAID = {
    "present": CodedConcept("52101004", "SCT", "Present"),
    "absent": CodedConcept("272519000", "SCT", "Absent"),
    "unsure": CodedConcept("373068000", "SCT", "Undetermined"),
}
RADIOLOGIST = ObserverContext(
    observer_type=CodedConcept("121006", "DCM", "Person"),
    observer_identifying_attributes=PersonObserverIdentifyingAttributes(name="Doe^Jane"),
)
DEVICE = ObserverContext(
    observer_type=CodedConcept("121007", "DCM", "Device"),
    observer_identifying_attributes=DeviceObserverIdentifyingAttributes(uid=generate_uid()),
)


def report(
    image: Dataset,
    value: str | None,
    finding: CodedConcept = PNEUMONIA,
    observer: ObserverContext = RADIOLOGIST,
) -> EnhancedSR:
    """A report of TID 1500 on one image; value None: the finding is named and not evaluated."""
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(hd.UID(), "1"),
        finding_type=finding,
        qualitative_evaluations=[QualitativeEvaluation(finding, SAID[value])] if value else None,
        source_images=[SourceImageForMeasurementGroup.from_source_image(image)],
    )
    content = MeasurementReport(
        observation_context=ObservationContext(
            observer_person_context=observer if observer is RADIOLOGIST else None,
            observer_device_context=observer if observer is DEVICE else None,
        ),
        procedure_reported=CodedConcept("363679005", "SCT", "Imaging procedure"),
        imaging_measurements=[group],
    )
    return EnhancedSR(
        evidence=[image],
        content=content[0],
        series_instance_uid=generate_uid(),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Somebody else",
    )


def read(folder: Path, ds: Dataset) -> documents.Report:
    """What a document says."""
    file = folder / "report.dcm"
    ds.save_as(file, enforce_file_format=True)
    return documents.read(file, TABLE)


@pytest.mark.parametrize("value", ["present", "absent", "unsure"])
def test_a_radiologist_says_of_an_image_what_is_coded(tmp_path: Path, value: str) -> None:
    image = make.chest_radiograph()
    found = read(tmp_path, report(image, value))
    assert found.reader == "Doe^Jane"
    assert found.readings == (Reading(image.SOPInstanceUID, "pneumonia", value),)


def test_a_finding_that_is_named_and_not_evaluated_is_present(tmp_path: Path) -> None:
    image = make.chest_radiograph()
    (reading,) = read(tmp_path, report(image, None)).readings
    assert reading == Reading(image.SOPInstanceUID, "pneumonia", "present")


def test_a_finding_that_no_model_knows_is_no_label(tmp_path: Path) -> None:
    assert read(tmp_path, report(make.chest_radiograph(), "present", FRACTURE)).readings == ()


def test_what_only_a_device_says_is_no_label(tmp_path: Path) -> None:
    with pytest.raises(NotDicom, match="no person observed or verified it"):
        read(tmp_path, report(make.chest_radiograph(), "present", observer=DEVICE))


def test_what_a_person_has_verified_is_that_persons(tmp_path: Path) -> None:
    ds = report(make.chest_radiograph(), "present", observer=DEVICE)
    who = Dataset()
    who.VerifyingObserverName, who.VerificationDateTime = "Roe^Richard", "20260302101500"
    ds.VerifyingObserverSequence = [who]
    found = read(tmp_path, ds)
    assert (found.reader, str(found.read_on)) == ("Roe^Richard", "2026-03-02")
    assert len(found.readings) == 1


@pytest.fixture
def site(database: Database, tmp_path: Path) -> Iterator[tuple[Settings, Database]]:
    """A data folder with a database of each kind."""
    yield Settings(data_dir=tmp_path / "data"), database


def arrive(site: tuple[Settings, Database], ds: Dataset) -> None:
    """An object is received."""
    settings, database = site
    (file,) = make.save(settings.data_dir.parent / "sent", [ds])
    admission = Admission(database, settings.data_dir, 0)
    admission.admit(*keep(file, settings.data_dir), "READER")


def labels(database: Database) -> list[tuple[str, str, str, str]]:
    """All that is said."""
    with database.read() as connection:
        rows = connection.execute(select(label).order_by(label.c.id)).all()
    return [(row.subject, row.subject_id, row.label, row.value) for row in rows]


def test_a_document_is_read_once_and_one_that_replaces_it_again(
    site: tuple[Settings, Database],
) -> None:
    settings, database = site
    image = make.chest_radiograph()
    arrive(site, image)
    ds = report(image, "present")
    arrive(site, ds)
    assert learning.read_documents(*site) == "1 labels of 1 documents"
    assert labels(database) == [("image", image.SOPInstanceUID, "pneumonia", "present")]
    assert learning.read_documents(*site) == "0 labels of 0 documents"
    again = report(image, "absent")
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    arrive(site, again)
    assert learning.read_documents(*site) == "1 labels of 1 documents"
    assert labels(database) == [("image", image.SOPInstanceUID, "pneumonia", "absent")]
    assert "Jane" not in str(truth.labels(database, None, None, 10))
    # It is no image, and nothing is analyzed again because of it.
    (study,) = queries.studies(database)
    assert study["revision"] == 1
    assert settings.data_dir.is_dir()


def test_a_document_that_cannot_be_read_says_why_and_is_not_read_again(
    site: tuple[Settings, Database],
) -> None:
    _, database = site
    arrive(site, report(make.chest_radiograph(), "present", observer=DEVICE))
    assert learning.read_documents(*site) == "0 labels of 1 documents"
    assert learning.read_documents(*site) == "0 labels of 0 documents"
    with database.read() as connection:
        (row,) = connection.execute(select(document)).all()
    assert row.reason == "no person observed or verified it"


def test_a_document_of_images_that_are_not_here_says_nothing(
    site: tuple[Settings, Database],
) -> None:
    arrive(site, report(make.chest_radiograph(), "present"))
    assert learning.read_documents(*site) == "0 labels of 1 documents"
