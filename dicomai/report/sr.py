"""Enhanced SR with TID 1500, one TID 1501 group a finding (PS3.16)."""

import copy
from collections.abc import Mapping, Sequence

import cv2
import highdicom as hd
import numpy as np
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    CoordinatesForMeasurement,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    GraphicTypeValues,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    SourceImageForRegion,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from dicomai.report import identity, origin
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
COMMENT = CodedConcept("121106", "DCM", "Comment")
ACQUISITION = {code.value for code in codes.cid29.concepts.values()}
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
    refs = {uid: origin.for_highdicom(source) for uid, source in sources.items()}
    groups = [_group(item, number, refs, algorithm) for number, item in enumerate(findings, 1)]
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=observer(algorithm.model)),
        procedure_reported=IMAGING_PROCEDURE,
        imaging_measurements=groups,
        # "Other" is no modality of the image library's (CID 29).
        referenced_images=[r for r in refs.values() if origin.described_as(r) in ACQUISITION]
        or None,
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
    origin.name_classes(ds, {uid: source.SOPClassUID for uid, source in sources.items()})
    return ds


def observer(model: Model) -> ObserverContext:
    """Who says it: this device (PS3.16 TID 1004)."""
    return ObserverContext(
        observer_type=DEVICE,
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=identity.device_uid(model),
            name="dicomai",
            manufacturer_name=MANUFACTURER,
            model_name=f"{model.name} {model.version}",
        ),
    )


def _group(
    finding: Finding, number: int, refs: dict[str, Dataset], algorithm: Algorithm
) -> MeasurementsAndQualitativeEvaluations:
    source, model = finding.frame.source, algorithm.model
    code = finding.label.code
    concept = CodedConcept(code.value, code.scheme, code.meaning)
    ref = refs[source.sop_instance_uid]
    image = SourceImageForMeasurementGroup.from_source_image(ref)
    probability = Measurement(
        PROBABILITY,
        round(finding.probability * 100, 2),  # in percent: OHIF prints two decimals
        PERCENT,
        # OHIF cannot open a report of which one measurement has no coordinates.
        referenced_coordinates=[_most_suspicious_place(finding, ref)],
    )
    if origin.has_frames(ref):
        image.ReferencedSOPSequence[0].ReferencedFrameNumber = finding.frame.number
    group = MeasurementsAndQualitativeEvaluations(
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
        measurements=[probability],
        qualitative_evaluations=[QualitativeEvaluation(concept, PRESENCE[finding.presence])],
        source_images=[image],
    )
    # OHIF shows neither finding nor evaluation, but a comment.
    group[0].ContentSequence.append(
        TextContentItem(
            COMMENT, f"{code.meaning}: {finding.presence}", RelationshipTypeValues.CONTAINS
        )
    )
    return group


def _most_suspicious_place(finding: Finding, ref: Dataset) -> CoordinatesForMeasurement:
    """The centre of the cell around which the local probability is highest, as (column, row).

    The corner of the image is 0, 0, the centre of its first pixel 0.5, 0.5 (PS3.3 C.18.6.1.1).
    """
    box, (rows, columns) = finding.frame.letterbox, finding.cells.shape
    x = ((np.arange(columns) + 0.5) * box.size / columns - box.left) * box.columns / box.width
    y = ((np.arange(rows) + 0.5) * box.size / rows - box.top) * box.rows / box.height
    inside = np.outer((y > 0) & (y < box.rows), (x > 0) & (x < box.columns))
    # Among neighbours: a map may be flat at its highest, and beyond the border there is nothing.
    cells = np.where(inside, finding.cells, np.float32(0))
    around = cv2.GaussianBlur(cells, (3, 3), 0, borderType=cv2.BORDER_CONSTANT)
    row, column = np.unravel_index(np.argmax(np.where(inside, around, -1)), around.shape)
    place = np.clip([x[column], y[row]], 0.5, [box.columns - 0.5, box.rows - 0.5])
    frames = [finding.frame.number] if origin.has_frames(ref) else None
    return CoordinatesForMeasurement(
        GraphicTypeValues.POINT,
        place[None].astype(np.float32),
        SourceImageForRegion(ref.SOPClassUID, ref.SOPInstanceUID, frames),
    )


def _parameters(finding: Finding, algorithm: Algorithm) -> list[str]:
    margin = algorithm.reporting.undetermined_margin
    return [
        f"threshold={finding.label.threshold:g}",
        *([f"undetermined within {margin:g} of the threshold"] if margin else []),
        f"probability is {'calibrated' if algorithm.model.calibrated else 'not calibrated'}",
    ]


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
    request = copy.deepcopy(source["RequestAttributesSequence"])
    identity.drop_empty(request)
    asked = request.value[0] if request.value else Dataset()
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
