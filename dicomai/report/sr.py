"""Enhanced SR with TID 1500, one TID 1501 group a finding (PS3.16)."""

import contextlib
import copy
from collections.abc import Iterable, Mapping, Sequence

import highdicom as hd
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    ImageLibraryEntryDescriptors,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    SourceImageForMeasurementGroup,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomai.report import identity
from dicomai.study import MANUFACTURER, Algorithm, Finding, Model, Presence, Sent

SERIES_NUMBER = 9902

# CID 240, TID 4019, TID 1500 and units, as DICOM's own tables and PixelMed's know them.
PRESENCE = {
    Presence.PRESENT: CodedConcept("52101004", "SCT", "Present"),
    Presence.ABSENT: CodedConcept("272519000", "SCT", "Absent"),
    Presence.UNDETERMINED: CodedConcept("373068000", "SCT", "Undetermined"),
}
PROBABILITY = CodedConcept("122157", "DCM", "Probability")
PERCENT = CodedConcept("%", "UCUM", "Percent")
ARTIFICIAL_INTELLIGENCE = CodedConcept("123110", "DCM", "Artificial Intelligence")
IMAGING_PROCEDURE = CodedConcept("363679005", "SCT", "Imaging procedure")
DEVICE = CodedConcept("121007", "DCM", "Device")


def report_uid(
    findings: Sequence[Finding], algorithm: Algorithm, predecessors: Sequence[Sent]
) -> str:
    """The SOP Instance UID of the report of these findings."""
    about = [identity.frame_key(item.frame) for item in findings]
    before = [f"after {item.sop_instance_uid}" for item in predecessors]
    return identity.object_uid("sr", about + before, algorithm)


def report(
    sources: Mapping[str, Dataset],
    findings: Sequence[Finding],
    algorithm: Algorithm,
    predecessors: Sequence[Sent],
) -> Dataset:
    """The report of a study's findings.

    sources: SOP Instance UID -> header of each analyzed image; predecessors: reports that this
    one replaces
    """
    first = sources[findings[0].frame.source.sop_instance_uid]
    moment = identity.local_time(max(item.analyzed_at for item in findings), first)
    refs = {uid: identity.for_highdicom(source) for uid, source in sources.items()}
    groups = [_group(item, number, refs, algorithm) for number, item in enumerate(findings, 1)]
    content = MeasurementReport(
        observation_context=observer(algorithm.model),
        procedure_reported=IMAGING_PROCEDURE,
        imaging_measurements=groups,
        referenced_images=library(refs.values()),
        title=CodedConcept("126000", "DCM", "Imaging Measurement Report"),
    )
    ds = EnhancedSR(
        evidence=list(refs.values()),
        content=content[0],
        series_instance_uid=identity.series_uid(first.StudyInstanceUID, "sr", algorithm),
        series_number=SERIES_NUMBER,
        sop_instance_uid=report_uid(findings, algorithm, predecessors),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
        previous_versions=previous(first, predecessors),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    identity.sign(ds, first, identity.PATIENT_AND_STUDY, algorithm, moment)
    ds.SeriesDescription = f"AI report {algorithm.model.name}, not for diagnosis"
    refer_to_request(ds, first)
    return ds


def observer(model: Model) -> ObservationContext:
    return ObservationContext(
        observer_device_context=ObserverContext(
            observer_type=DEVICE,
            observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
                uid=identity.device_uid(model),
                name="dicomai",
                manufacturer_name=MANUFACTURER,
                model_name=f"{model.name} {model.version}",
            ),
        )
    )


def _group(
    finding: Finding, number: int, refs: dict[str, Dataset], algorithm: Algorithm
) -> MeasurementsAndQualitativeEvaluations:
    source, model = finding.frame.source, algorithm.model
    code = finding.label.code
    concept = CodedConcept(code.value, code.scheme, code.meaning)
    ref = refs[source.sop_instance_uid]
    image = SourceImageForMeasurementGroup.from_source_image(ref)
    if identity.has_frames(ref):
        image.ReferencedSOPSequence[0].ReferencedFrameNumber = finding.frame.number
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            identifier=f"{code.meaning} {number}",
            uid=hd.UID(
                identity.make_uid(
                    "tracking",
                    source.sop_instance_uid,
                    source.digest,
                    str(finding.frame.number),
                    finding.label.key,
                    model.name,
                    model.version,
                )
            ),
        ),
        finding_type=concept,
        algorithm_id=AlgorithmIdentification(
            name=model.name,
            version=model.version,
            parameters=_parameters(finding, algorithm),
            family=ARTIFICIAL_INTELLIGENCE,
        ),
        # In percent: OHIF prints two decimals.
        measurements=[Measurement(PROBABILITY, round(finding.probability * 100, 2), PERCENT)],
        qualitative_evaluations=[QualitativeEvaluation(concept, PRESENCE[finding.presence])],
        source_images=[image],
    )


def _parameters(finding: Finding, algorithm: Algorithm) -> list[str]:
    margin = algorithm.reporting.undetermined_margin
    return [
        f"threshold={finding.label.threshold:g}",
        *([f"undetermined within {margin:g} of the threshold"] if margin else []),
        f"probability is {'calibrated' if algorithm.model.calibrated else 'not calibrated'}",
    ]


def library_entry(ref: Dataset) -> Dataset:
    """An image as highdicom's image library can describe it, with what it has.

    Of a radiograph the library demands orientation and spacing (TID 1603), of a slice its place
    (TID 1604); many lack one of them, and are described as any image (TID 1602).
    """
    projection = ("PatientOrientation", "ImagerPixelSpacing")
    slices = ("PixelSpacing", "SliceThickness", "ImageOrientationPatient", "ImagePositionPatient")
    whole = (projection, (2, 2)), (slices, (2, 1, 6, 3))
    if any(_has(ref, keywords, counts) for keywords, counts in whole):
        return ref
    entry = copy.copy(ref)
    entry.Modality = "OT"
    return entry


def library(refs: Iterable[Dataset]) -> list[Dataset] | None:
    """What the image library lists: private and retired image classes have no place in it."""
    entries = []
    for ref in refs:
        entry = library_entry(ref)
        with contextlib.suppress(ValueError):
            ImageLibraryEntryDescriptors(entry)
            entries.append(entry)
    return entries or None


def _has(ref: Dataset, keywords: Sequence[str], counts: Sequence[int]) -> bool:
    return all(
        keyword in ref and count == ref[keyword].VM and not ref[keyword].is_empty
        for keyword, count in zip(keywords, counts, strict=True)
    )


def previous(first: Dataset, predecessors: Sequence[Sent]) -> list[Dataset] | None:
    """What highdicom makes the Predecessor Documents Sequence of (PS3.3 C.17.2)."""
    found = []
    for item in predecessors:
        ds = Dataset()
        ds.StudyInstanceUID = first.StudyInstanceUID
        ds.SeriesInstanceUID = item.series_instance_uid
        ds.SOPInstanceUID = item.sop_instance_uid
        ds.SOPClassUID = item.sop_class_uid
        found.append(ds)
    return found or None


def refer_to_request(document: Dataset, source: Dataset) -> None:
    """Name the order that the source image fulfils (PS3.3 C.17.2), where it names one."""
    if not source.get("RequestAttributesSequence"):
        return
    asked = source.RequestAttributesSequence[0]
    item = Dataset()
    item.StudyInstanceUID = asked.get("StudyInstanceUID") or source.StudyInstanceUID
    item.ReferencedStudySequence = []
    item.AccessionNumber = asked.get("AccessionNumber", source.get("AccessionNumber", ""))
    item.PlacerOrderNumberImagingServiceRequest = ""
    item.FillerOrderNumberImagingServiceRequest = ""
    item.RequestedProcedureID = asked.get("RequestedProcedureID", "")
    item.RequestedProcedureDescription = asked.get("RequestedProcedureDescription", "")
    item.RequestedProcedureCodeSequence = asked.get("RequestedProcedureCodeSequence", [])
    document.ReferencedRequestSequence = [item]
