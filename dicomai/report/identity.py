"""Who a result is about, and who made it: UIDs, patient, study, request, equipment.

A result's UID comes from what it is about, so that making it again gives the same UID and, because
its dates come from stored facts, the same bytes.
"""

import copy
import re
import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from importlib.metadata import version

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import DA, TM

from dicomai.study import MANUFACTURER, Model

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


def make_uid(*parts: str) -> str:
    """A UID that is the same for the same parts (PS3.5 B.2; RFC 9562 version 5)."""
    return f"2.25.{uuid.uuid5(NAMESPACE, '|'.join(parts)).int}"


def model_key(model: Model, engine: str) -> str:
    """What of the algorithm decides the content of a result."""
    return f"{SOFTWARE}|{model.name}|{model.version}|{model.sha256}|{engine}"


def device_uid(model: Model) -> str:
    """Changes with every version of the model (IHE AIR 6.5.3.1)."""
    return make_uid("device", model.name, model.version, model.sha256)


def series_uid(study_instance_uid: str, kind: str, model: Model, engine: str) -> str:
    """One series a study, kind and equipment."""
    return make_uid("series", study_instance_uid, kind, model_key(model, engine))


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
    if not all(_is_pair(ds.get(k)) for k in ("PatientOrientation", "ImagerPixelSpacing")):
        # Of a radiograph, highdicom's image library demands both (TID 1603); many have neither.
        ds.Modality = "OT"
    return ds


def _is_pair(value: object) -> bool:
    return isinstance(value, (list, MultiValue)) and len(value) == 2


def _or_none(kind: type[DA] | type[TM], value: object) -> DA | TM | None:
    try:
        return kind(str(value)) if value else None
    except ValueError:
        return None


def restore(result: Dataset, source: Dataset, keywords: Sequence[str]) -> None:
    """Put the source's own values back, verbatim."""
    for keyword in keywords:
        if keyword in source and _worth_copying(source, keyword):
            result[keyword] = copy.deepcopy(source[keyword])
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


def describe_equipment(result: Dataset, model: Model, moment: datetime) -> None:
    """The equipment is us, never the scanner (PS3.3 C.7.5.1; C.12.1, Contributing Equipment)."""
    result.Manufacturer = MANUFACTURER
    result.ManufacturerModelName = f"dicomai {model.name}"
    result.SoftwareVersions = [SOFTWARE, f"{model.name} {model.version}"]
    result.DeviceSerialNumber = "1"
    result.DeviceUID = device_uid(model)
    item = Dataset()
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "109102", "DCM"
    purpose.CodeMeaning = "Processing Equipment"
    item.PurposeOfReferenceCodeSequence = [purpose]
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
    for keyword in ("InstanceCreation", "Content", "SecondaryCapture"):
        date_keyword, time_keyword = f"{keyword}Date", f"{keyword}Time"
        if keyword == "SecondaryCapture":
            date_keyword, time_keyword = "DateOfSecondaryCapture", "TimeOfSecondaryCapture"
            if result.SOPClassUID != "1.2.840.10008.5.1.4.1.1.7":
                continue
        setattr(result, date_keyword, date)
        setattr(result, time_keyword, time)
