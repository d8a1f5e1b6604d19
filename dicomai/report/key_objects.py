"""Key Object Selections: the positive images, and what is withdrawn (PS3.16 TID 2010)."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from highdicom.sr import (
    CodeContentItem,
    CodedConcept,
    RelationshipTypeValues,
)
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomai.report import identity, origin
from dicomai.report.sr import observer, refer_to_request
from dicomai.study import MANUFACTURER, WITHDRAWAL, Algorithm, Finding, Sent

SERIES_NUMBER = 9905
WITHDRAWAL_SERIES_NUMBER = 9907

OF_INTEREST = CodedConcept("113000", "DCM", "Of Interest")
REJECTED = CodedConcept("113001", "DCM", "Rejected for Quality Reasons")
TITLE_MODIFIER = CodedConcept("113011", "DCM", "Document Title Modifier")
# CID 7011 has no word for "there is a newer analysis"; the description says it.
OTHER_FAILURE = CodedConcept("111220", "DCM", "Other failure")


def key_objects(
    sources: Mapping[str, Dataset], positive: Sequence[Finding], algorithm: Algorithm
) -> Dataset:
    """The images with a positive finding, as key objects "Of Interest".

    sources: SOP Instance UID -> header of each analyzed image
    """
    frames: dict[str, set[int]] = {}
    for item in positive:
        frames.setdefault(item.frame.source.sop_instance_uid, set()).add(item.frame.number)
    images = [sources[uid] for uid in frames]
    names = sorted({item.label.code.meaning for item in positive})
    moment = identity.local_time(max(item.analyzed_at for item in positive), images[0])
    ds = _document(
        "kos",
        images[0],
        [origin.for_highdicom(image) for image in images],
        OF_INTEREST,
        f"{identity.NOTICE}. Images with: {', '.join(names)}",
        [f"{identity.frame_key(item.frame)}:{item.label.key}" for item in positive],
        algorithm,
        moment,
    )
    origin.name_classes(ds, {uid: sources[uid].SOPClassUID for uid in frames})
    for item in ds.ContentSequence:
        if item.ValueType == "IMAGE":
            (reference,) = item.ReferencedSOPSequence
            uid = reference.ReferencedSOPInstanceUID
            if origin.has_frames(sources[uid]):
                reference.ReferencedFrameNumber = sorted(frames[uid])
    ds.SeriesDescription = f"AI key images {algorithm.model.name}, not for diagnosis"
    return ds


def withdrawal(
    source: Dataset,
    withdrawn: Sequence[Sent],
    destination: str,
    algorithm: Algorithm,
    moment: datetime,
) -> Dataset:
    """What a destination holds and holds no more: "Rejected for Quality Reasons" (IHE IOCM).

    source: a header of the study
    """
    objects = []
    for item in withdrawn:
        ref = Dataset()
        ref.StudyInstanceUID, ref.SeriesInstanceUID = (
            source.StudyInstanceUID,
            item.series_instance_uid,
        )
        ref.SOPClassUID, ref.SOPInstanceUID = item.sop_class_uid, item.sop_instance_uid
        if item.kind == "sc":
            ref.Rows = ref.Columns = 1  # by these highdicom knows an image
        objects.append(ref)
    ds = _document(
        WITHDRAWAL,
        source,
        objects,
        REJECTED,
        "Superseded AI results: the study was analyzed again, with other images or another model.",
        [
            *(item.sop_instance_uid for item in withdrawn),
            destination,
            *identity.occasion(source, moment),
        ],
        algorithm,
        identity.local_time(moment, source),
    )
    modifier = CodeContentItem(
        TITLE_MODIFIER, OTHER_FAILURE, RelationshipTypeValues.HAS_CONCEPT_MOD
    )
    ds.ContentSequence.insert(0, modifier)
    ds.SeriesNumber = WITHDRAWAL_SERIES_NUMBER
    ds.SeriesDescription = "Superseded AI results"
    return ds


def _document(
    kind: str,
    source: Dataset,
    objects: list[Dataset],
    title: CodedConcept,
    description: str,
    about: list[str],
    algorithm: Algorithm,
    moment: datetime,
) -> Dataset:
    # Patient and study come from the first of the evidence.
    ref = origin.for_highdicom(source)
    evidence = [ref, *objects]
    ds = KeyObjectSelectionDocument(
        evidence=evidence,
        content=KeyObjectSelection(
            title,
            objects,
            observer_device_context=observer(algorithm.model),
            description=description,
        ),
        series_instance_uid=identity.series_uid(source.StudyInstanceUID, kind, algorithm),
        series_number=SERIES_NUMBER,
        sop_instance_uid=identity.object_uid(kind, about, algorithm),
        instance_number=1,
        manufacturer=MANUFACTURER,
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    identity.sign(ds, source, identity.PATIENT_AND_STUDY, algorithm, moment)
    for item in ds.ContentSequence:
        # TID 2010 forbids a purpose of reference; highdicom writes "Source".
        if item.ValueType in {"IMAGE", "COMPOSITE"}:
            del item.ConceptNameCodeSequence
    refer_to_request(ds, source)
    return ds
