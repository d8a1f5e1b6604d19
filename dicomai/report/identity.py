"""Who a result is about, and who made it: UIDs, patient, study, request, equipment.

A result's UID comes from what it is about, so that making it again gives the same UID and, because
its dates come from stored facts, the same bytes.
"""

import copy
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from importlib.metadata import version

from highdicom.base import SOPClass
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomai.report import origin
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
# Code strings (PS3.5 6.2).
CODE_STRING = re.compile(r"[A-Z0-9_ ]{1,16}")
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
    # str: in a damaged header, a UID may have the VR of a name.
    return f"2.25.{uuid.uuid5(NAMESPACE, '|'.join(map(str, parts))).int}"


def algorithm_key(algorithm: Algorithm) -> str:
    """What of the algorithm decides the content of a result."""
    model, how = algorithm.model, algorithm.reporting
    labels = ",".join(f"{x.key}:{x.threshold!r}:{x.code}" for x in model.labels)
    return "|".join(
        (
            SOFTWARE,
            model.name,
            model.version,
            model.digest,
            str(model.calibrated),
            labels,
            algorithm.engine,
            how.layout,
            repr(how.undetermined_margin),
            str(how.largest_side),
            # Dates of a source without a time zone are in this host's, see local_time().
            f"{time.timezone} {time.altzone}",
        )
    )


def device_uid(model: Model) -> str:
    """Changes with every version of the model (IHE AIR 6.5.3.1)."""
    return make_uid("device", model.name, model.version, model.digest)


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


def occasion(source: Dataset, moment: datetime) -> tuple[str, str]:
    """What decides whose an object is and when it was made, where no finding does."""
    return str(source.SOPInstanceUID), moment.astimezone(UTC).isoformat()


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


def begin(
    source: Dataset,
    sop_class_uid: str,
    modality: str,
    uid: str,
    series: tuple[str, int],
) -> Dataset:
    """An object of the source's study with nothing in it yet; series: UID and number."""
    ref = origin.for_highdicom(source)
    return SOPClass(
        study_instance_uid=ref.StudyInstanceUID,
        series_instance_uid=series[0],
        series_number=series[1],
        sop_instance_uid=uid,
        sop_class_uid=sop_class_uid,
        instance_number=1,
        modality=modality,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        study_date=ref.StudyDate,
        study_time=ref.StudyTime,
    )


def restore(result: Dataset, source: Dataset, keywords: Sequence[str]) -> None:
    """Put the source's own values back, verbatim."""
    for keyword in keywords:
        if keyword in source and _worth_copying(source, keyword):
            element = copy.deepcopy(source[keyword])
            if element.VR == "SQ":
                drop_empty(element)
                if not element.value:
                    continue
            elif dictionary_VR(keyword) == "SQ":
                continue
            result[keyword] = element
        elif keyword in {"SpecificCharacterSet", "TimezoneOffsetFromUTC"} and keyword in result:
            del result[keyword]


def _worth_copying(source: Dataset, keyword: str) -> bool:
    # An empty Laterality on an unpaired body part, and an age that is none, are errors here too;
    # neither says who the patient is.
    if keyword == "PatientOrientation":
        return origin.states(source, keyword)
    if keyword in {"BodyPartExamined", "Laterality", "ImageLaterality"}:
        return CODE_STRING.fullmatch(str(source[keyword].value or "")) is not None
    if keyword in OF_THE_IMAGE:
        return not source[keyword].is_empty
    if keyword == "PatientAge":
        return re.fullmatch(r"[0-9]{3}[DWMY]", str(source.PatientAge)) is not None
    return True


def drop_empty(sequence: DataElement) -> None:
    """Remove elements and items that say nothing: no sequence that we copy may hold them."""
    if sequence.VR != "SQ":
        sequence.value = None
        return
    for item in sequence.value:
        for element in list(item):
            if element.VR == "SQ":
                drop_empty(element)
            if element.is_empty or (element.VR == "SQ" and not element.value):
                del item[element.tag]
    sequence.value = [item for item in sequence.value if len(item)]


def state_laterality(result: Dataset) -> None:
    """Unknown, where the body part may be one of a pair and the source does not say which.

    Laterality (0020,0060) is Type 2C: it must be there, empty (PS3.3 C.7.3.1).
    """
    stated = any(keyword in result for keyword in ("Laterality", "ImageLaterality"))
    if not stated and str(result.get("BodyPartExamined", "")) not in UNPAIRED:
        result.Laterality = ""


def describe_equipment(result: Dataset, model: Model, moment: datetime) -> None:
    """The equipment is us, never the scanner (PS3.3 C.7.5.1; C.12.1, Contributing Equipment)."""
    result.Manufacturer = MANUFACTURER
    result.ManufacturerModelName = f"dicomai {model.name}"
    result.SoftwareVersions = [SOFTWARE, f"{model.name} {model.version}"]
    result.DeviceSerialNumber = "1"
    result.DeviceUID = device_uid(model)
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [origin.code("109102", "DCM", "Processing Equipment")]
    item.Manufacturer = MANUFACTURER
    item.ManufacturerModelName = model.name
    item.SoftwareVersions = model.version
    item.DeviceUID = device_uid(model)
    item.ContributionDateTime = moment.strftime("%Y%m%d%H%M%S")
    item.ContributionDescription = NOTICE
    result.ContributingEquipmentSequence = [item]


def stamp(result: Dataset, moment: datetime) -> None:
    """Every date and time of the object itself is when the analysis was made."""
    date, clock = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")
    result.InstanceCreationDate, result.InstanceCreationTime = date, clock
    for keyword in ("Content", "PresentationCreation"):
        if f"{keyword}Date" in result:
            result[f"{keyword}Date"].value, result[f"{keyword}Time"].value = date, clock


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
