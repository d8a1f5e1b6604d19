"""Enhanced SR with TID 1500, one TID 1501 group a finding (PS3.16)."""

from collections.abc import Sequence
from dataclasses import dataclass

import highdicom as hd
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
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
from pydicom.uid import EnhancedSRStorage, ExplicitVRLittleEndian

from dicomai.report import identity
from dicomai.study import MANUFACTURER, Finding, Model

SERIES_NUMBER = 9902

# CID 240, TID 4019, TID 1500 and units, as DICOM's own tables and PixelMed's know them.
PRESENT = CodedConcept("52101004", "SCT", "Present")
ABSENT = CodedConcept("272519000", "SCT", "Absent")
PROBABILITY = CodedConcept("122157", "DCM", "Probability")
PERCENT = CodedConcept("%", "UCUM", "Percent")
ARTIFICIAL_INTELLIGENCE = CodedConcept("123110", "DCM", "Artificial Intelligence")
IMAGING_PROCEDURE = CodedConcept("363679005", "SCT", "Imaging procedure")
DEVICE = CodedConcept("121007", "DCM", "Device")


@dataclass(frozen=True, slots=True)
class Predecessor:
    """The report that this one replaces."""

    sop_instance_uid: str
    series_instance_uid: str


def report_uid(
    findings: Sequence[Finding], model: Model, engine: str, predecessor: Predecessor | None
) -> str:
    """The SOP Instance UID of the report of these findings."""
    about = (
        f"{item.frame.source.sop_instance_uid}:{item.frame.source.digest}:{item.frame.number}"
        for item in findings
    )
    before = predecessor.sop_instance_uid if predecessor else ""
    return identity.make_uid("sr", *sorted(set(about)), identity.model_key(model, engine), before)


def report(
    sources: dict[str, Dataset],
    findings: Sequence[Finding],
    model: Model,
    engine: str,
    predecessor: Predecessor | None,
) -> Dataset:
    """The report of a study's findings.

    sources: SOP Instance UID -> header of each analyzed image
    """
    first = sources[findings[0].frame.source.sop_instance_uid]
    moment = identity.local_time(max(item.analyzed_at for item in findings), first)
    refs = {uid: identity.for_highdicom(source) for uid, source in sources.items()}
    groups = [_group(item, number, refs, model) for number, item in enumerate(findings, 1)]
    content = MeasurementReport(
        observation_context=_observer(model),
        procedure_reported=IMAGING_PROCEDURE,
        imaging_measurements=groups,
        referenced_images=list(refs.values()),
        title=CodedConcept("126000", "DCM", "Imaging Measurement Report"),
    )
    ds = EnhancedSR(
        evidence=list(refs.values()),
        content=content[0],
        series_instance_uid=identity.series_uid(first.StudyInstanceUID, "sr", model, engine),
        series_number=SERIES_NUMBER,
        sop_instance_uid=report_uid(findings, model, engine, predecessor),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
        previous_versions=_previous(first, predecessor),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    identity.restore(ds, first, identity.PATIENT_AND_STUDY)
    identity.describe_equipment(ds, model, moment)
    identity.stamp(ds, moment)
    ds.SeriesDescription = f"AI report {model.name}, not for diagnosis"
    request = _referenced_request(first)
    if request is not None:
        ds.ReferencedRequestSequence = [request]
    return ds


def _observer(model: Model) -> ObservationContext:
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
    finding: Finding, number: int, refs: dict[str, Dataset], model: Model
) -> MeasurementsAndQualitativeEvaluations:
    source = finding.frame.source
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
            parameters=[f"threshold={finding.label.threshold:g}"],
            family=ARTIFICIAL_INTELLIGENCE,
        ),
        # In percent: OHIF prints two decimals.
        measurements=[Measurement(PROBABILITY, round(finding.probability * 100, 2), PERCENT)],
        qualitative_evaluations=[
            QualitativeEvaluation(concept, PRESENT if finding.positive else ABSENT)
        ],
        source_images=[image],
    )


def _previous(first: Dataset, predecessor: Predecessor | None) -> list[Dataset] | None:
    if predecessor is None:
        return None
    ds = Dataset()
    ds.StudyInstanceUID = first.StudyInstanceUID
    ds.SeriesInstanceUID = predecessor.series_instance_uid
    ds.SOPInstanceUID = predecessor.sop_instance_uid
    ds.SOPClassUID = EnhancedSRStorage
    return [ds]


def _referenced_request(source: Dataset) -> Dataset | None:
    """The order that the source image fulfils (PS3.3 C.17.2), where it names one."""
    if not source.get("RequestAttributesSequence"):
        return None
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
    return item
