"""Who a result is about, and who made it: UIDs, patient, study, request, equipment.

A result's UID comes from what it is about, so that making it again gives the same UID and, because
its dates come from stored facts, the same bytes.
"""

import copy
import re
import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from importlib.metadata import version

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.valuerep import DA, TM

from dicomai.study import MANUFACTURER, Algorithm, Frame, Model

NAMESPACE = uuid.UUID("6d1f7c0a-6e0e-5b53-9f5e-0d5ab7f3c1ce")
SOFTWARE = version("dicomai")
NOTICE = "AI result, not for diagnosis"

# Taken verbatim from the source, so that a PACS files the result with it (PS3.3 C.7.1, C.7.2).
PATIENT_AND_STUDY = (
    "SpecificCharacterSet",
    "TimezoneOffsetFromUTC",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "IssuerOfPatientIDQualifiersSequence",
    "OtherPatientIDsSequence",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "ReferencedPatientSequence",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "IssuerOfAccessionNumberSequence",
    "ReferringPhysicianName",
    "ProcedureCodeSequence",
    "ReferencedStudySequence",
)
OF_THE_IMAGE = (
    "BodyPartExamined",
    "Laterality",
    "ImageLaterality",
    "PatientOrientation",
    "RequestAttributesSequence",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)

# Defined terms of Body Part Examined (PS3.16 Annex L) that there is one of.
UNPAIRED = frozenset((
    "ABDOMEN", "ABDOMENPELVIS", "AORTA", "BACK", "BLADDER", "BRAIN", "CHEST", "CHESTABDOMEN",
    "CHESTABDPELVIS", "CIRCLEOFWILLIS", "COCCYX", "COLON", "CSPINE", "CTSPINE", "ESOPHAGUS",
    "FACE", "GALLBLADDER", "HEAD", "HEADNECK", "HEART", "JAW", "LARYNX", "LIVER", "LSPINE",
    "LSSPINE", "MEDIASTINUM", "MOUTH", "NECK", "NOSE", "PANCREAS", "PELVIS", "PROSTATE",
    "RECTUM", "SKULL", "SPINE", "SPLEEN", "SSPINE", "STERNUM", "STOMACH", "THYROID", "TLSPINE",
    "TONGUE", "TRACHEA", "TSPINE", "UTERUS", "VAGINA", "WHOLEBODY",
))  # fmt: skip


def make_uid(*parts: str) -> str:
    """A UID that is the same for the same parts (PS3.5 B.2; RFC 9562 version 5)."""
    return f"2.25.{uuid.uuid5(NAMESPACE, '|'.join(parts)).int}"


def algorithm_key(algorithm: Algorithm) -> str:
    """What of the algorithm decides the content of a result."""
    model, how = algorithm.model, algorithm.reporting
    labels = ",".join(f"{x.key}:{x.threshold!r}:{x.code}" for x in model.labels)
    return "|".join(
        (
            SOFTWARE,
            model.name,
            model.version,
            model.sha256,
            str(model.calibrated),
            labels,
            algorithm.engine,
            how.layout,
            repr(how.undetermined_margin),
        )
    )


def device_uid(model: Model) -> str:
    """Changes with every version of the model (IHE AIR 6.5.3.1)."""
    return make_uid("device", model.name, model.version, model.sha256)


def series_uid(study_instance_uid: str, kind: str, algorithm: Algorithm) -> str:
    """One series a study, kind and equipment."""
    return make_uid("series", study_instance_uid, kind, algorithm_key(algorithm))


def object_uid(kind: str, about: Iterable[str], algorithm: Algorithm) -> str:
    """The SOP Instance UID of the object of a kind about these sources, in whatever order."""
    return make_uid(kind, *sorted(set(about)), algorithm_key(algorithm))


def frame_key(frame: Frame) -> str:
    """Which image a result is about, its content included."""
    source = frame.source
    return f"{source.sop_instance_uid}:{source.digest}:{frame.number}"


def local_time(moment: datetime, source: Dataset) -> datetime:
    """A moment in the time zone that the source's dates are in.

    Timezone Offset From UTC (0008,0201) governs every date and time of an object, so our clock is
    converted to it; without one, this host's zone is as good a guess as the scanner's.
    """
    offset = str(source.get("TimezoneOffsetFromUTC") or "")
    if re.fullmatch(r"[+-](0[0-9]|1[0-4])[0-5][0-9]", offset):  # PS3.3 C.12.1.1.8
        delta = timedelta(hours=int(offset[1:3]), minutes=int(offset[3:]))
        return moment.astimezone(timezone(delta if offset[0] == "+" else -delta))
    return moment.astimezone()


def has_frames(source: Dataset) -> bool:
    """Whether a reference to this image has to name a frame."""
    return int(source.get("NumberOfFrames") or 1) > 1


def for_highdicom(source: Dataset) -> Dataset:
    """A header that highdicom accepts whatever the source holds; restore() undoes it afterwards."""
    ds = Dataset()
    for element in source:
        if element.tag.group < 0x7FE0 and not element.tag.is_private:
            ds[element.tag] = copy.deepcopy(element)
    ds.SpecificCharacterSet = "ISO_IR 192"
    for keyword in ("PatientName", "PatientID", "StudyID", "AccessionNumber"):
        setattr(ds, keyword, "")
    ds.ReferringPhysicianName = ds.PatientBirthDate = ds.PatientSex = None
    ds.StudyDate = _or_none(DA, ds.get("StudyDate"))
    ds.StudyTime = _or_none(TM, ds.get("StudyTime"))
    return ds


def _or_none(kind: type[DA] | type[TM], value: object) -> DA | TM | None:
    try:
        return kind(str(value)) if value else None
    except ValueError:
        return None


def restore(result: Dataset, source: Dataset, keywords: Sequence[str]) -> None:
    """Put the source's own values back, verbatim."""
    for keyword in keywords:
        if keyword in source and _worth_copying(source, keyword):
            element = copy.deepcopy(source[keyword])
            if element.VR == "SQ":
                _drop_empty(element)
                if not element.value:
                    continue
            result[keyword] = element
        elif keyword in {"SpecificCharacterSet", "TimezoneOffsetFromUTC"} and keyword in result:
            del result[keyword]


def _worth_copying(source: Dataset, keyword: str) -> bool:
    # An empty Laterality on an unpaired body part, and an age that is none, are errors here too;
    # neither says who the patient is.
    if keyword in {"Laterality", "ImageLaterality", "BodyPartExamined"}:
        return bool(source[keyword].value)
    if keyword == "PatientAge":
        return re.fullmatch(r"[0-9]{3}[DWMY]", str(source.PatientAge)) is not None
    return True


def _drop_empty(sequence: DataElement) -> None:
    """Remove elements and items that say nothing: no sequence that we copy may hold them."""
    for item in sequence.value:
        for element in list(item):
            if element.VR == "SQ":
                _drop_empty(element)
            if element.is_empty or (element.VR == "SQ" and not element.value):
                del item[element.tag]
    sequence.value = [item for item in sequence.value if len(item)]


def state_laterality(result: Dataset) -> None:
    """Unknown, where the body part may be one of a pair and the source does not say which.

    Laterality (0020,0060) is Type 2C: it must be there, empty (PS3.3 C.7.3.1).
    """
    stated = any(keyword in result for keyword in ("Laterality", "ImageLaterality"))
    if not stated and result.get("BodyPartExamined", "") not in UNPAIRED:
        result.Laterality = ""


def describe_equipment(result: Dataset, model: Model, moment: datetime) -> None:
    """The equipment is us, never the scanner (PS3.3 C.7.5.1; C.12.1, Contributing Equipment)."""
    result.Manufacturer = MANUFACTURER
    result.ManufacturerModelName = f"dicomai {model.name}"
    result.SoftwareVersions = [SOFTWARE, f"{model.name} {model.version}"]
    result.DeviceSerialNumber = "1"
    result.DeviceUID = device_uid(model)
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code("109102", "DCM", "Processing Equipment")]
    item.Manufacturer = MANUFACTURER
    item.ManufacturerModelName = model.name
    item.SoftwareVersions = model.version
    item.DeviceUID = device_uid(model)
    item.ContributionDateTime = moment.strftime("%Y%m%d%H%M%S")
    item.ContributionDescription = NOTICE
    others = [
        other
        for other in result.get("ContributingEquipmentSequence", [])
        if other.PurposeOfReferenceCodeSequence[0].CodeValue != "109102"
    ]
    for other in others:
        # highdicom stamps these with the clock; a result must come out the same tomorrow.
        if "ContributionDateTime" in other:
            del other.ContributionDateTime
    result.ContributingEquipmentSequence = [*others, item]


def stamp(result: Dataset, moment: datetime) -> None:
    """Every date and time of the object itself is when the analysis was made."""
    date, time = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")
    result.InstanceCreationDate, result.InstanceCreationTime = date, time
    for keyword in ("Content", "PresentationCreation"):
        if f"{keyword}Date" in result:
            result[f"{keyword}Date"].value, result[f"{keyword}Time"].value = date, time


def sign(
    result: Dataset,
    source: Dataset,
    keywords: Sequence[str],
    algorithm: Algorithm,
    moment: datetime,
) -> None:
    """Say whose the result is, who made it and when."""
    restore(result, source, keywords)
    describe_equipment(result, algorithm.model, moment)
    stamp(result, moment)


def source_image(source: Dataset, frame_number: int | None) -> Dataset:
    """An item of Source Image Sequence (PS3.3 C.7.6.1.1.4); no frame: the whole image."""
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if frame_number is not None and has_frames(source):
        item.ReferencedFrameNumber = frame_number
    item.PurposeOfReferenceCodeSequence = [
        code("121322", "DCM", "Source image for image processing operation")
    ]
    return item


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """An item of a code sequence (PS3.3 8.8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item
