"""Secondary Captures (PS3.3 A.8): one of each positive finding, and a summary of the study."""

from collections.abc import Mapping, Sequence

import highdicom as hd
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomai.report import identity, origin
from dicomai.report.overlay import draw
from dicomai.report.summary import Overview
from dicomai.study import MANUFACTURER, Algorithm, Exclusion, Finding, Float32, UInt8

SERIES_NUMBER = 9901
SUMMARY_NUMBER = 1
OF_THE_STUDY = ("BodyPartExamined", "RequestAttributesSequence")
MOST_INSTANCE_NUMBER = 1_000_000  # larger ones of a source are no numbers to count on from


def capture(source: Dataset, finding: Finding, heat: Float32, algorithm: Algorithm) -> Dataset:
    """A finding's overlay of one image, for the study of its source (a header without pixels).

    heat: (rows, columns) of 0 to 1
    """
    frame, model = finding.frame, algorithm.model
    about = (identity.frame_key(frame), finding.label.key)
    moment = identity.local_time(finding.analyzed_at, source)
    ds = _secondary_capture(
        source,
        draw(finding, heat, algorithm),
        identity.object_uid("sc", about, algorithm),
        _instance_number(source, finding, algorithm),
        algorithm,
    )
    identity.sign(ds, source, identity.PATIENT_AND_STUDY + identity.OF_THE_IMAGE, algorithm, moment)
    identity.state_laterality(ds)
    ratio = origin.aspect_ratio(source)
    if ratio != [1, 1]:
        ds.PixelAspectRatio = ratio
    ds.DateOfSecondaryCapture, ds.TimeOfSecondaryCapture = ds.ContentDate, ds.ContentTime
    ds.DerivationDescription = (
        f"Class map of {finding.label.code.meaning} by {model.name} {model.version}, blended with "
        "the source image"
    )
    ds.SourceImageSequence = [origin.source_image(source, frame.number)]
    return ds


def summary(
    sources: Mapping[str, Dataset],
    findings: Sequence[Finding],
    exclusions: Sequence[Exclusion],
    overview: Overview,
    algorithm: Algorithm,
) -> Dataset:
    """The study at a glance; says so where no finding is positive.

    sources: SOP Instance UID -> header of each analyzed image
    """
    first = sources[findings[0].frame.source.sop_instance_uid]
    moment = identity.local_time(max(item.analyzed_at for item in findings), first)
    about = {identity.frame_key(item.frame) for item in findings} | {
        f"{x.instance.sop_instance_uid}:{x.instance.digest}:{x.code}" for x in exclusions
    }
    ds = _secondary_capture(
        first,
        overview.draw(len(exclusions), algorithm, moment),
        identity.object_uid("sc", about, algorithm),
        SUMMARY_NUMBER,
        algorithm,
    )
    identity.sign(ds, first, identity.PATIENT_AND_STUDY + OF_THE_STUDY, algorithm, moment)
    if len({str(source.get("BodyPartExamined")) for source in sources.values()}) > 1:
        ds.pop("BodyPartExamined", None)
    identity.state_laterality(ds)
    ds.DateOfSecondaryCapture, ds.TimeOfSecondaryCapture = ds.ContentDate, ds.ContentTime
    ds.DerivationDescription = f"Summary of the findings of {algorithm.model.name} in this study"
    ds.SourceImageSequence = [origin.source_image(source, None) for source in sources.values()]
    return ds


def _secondary_capture(
    source: Dataset, picture: UInt8, uid: str, instance_number: int, algorithm: Algorithm
) -> Dataset:
    ds = hd.sc.SCImage.from_ref_dataset(
        ref_dataset=origin.for_highdicom(source),
        pixel_array=picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        series_instance_uid=identity.series_uid(source.StudyInstanceUID, "sc", algorithm),
        series_number=SERIES_NUMBER,
        sop_instance_uid=uid,
        instance_number=instance_number,
        manufacturer=MANUFACTURER,
        patient_orientation=("L", "F"),  # asked for; the source's own replaces it
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    ds.PatientOrientation = None  # type: ignore[assignment]  # Type 2C: unknown, where the source does not say
    ds.ConversionType = "WSD"
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.BurnedInAnnotation = "YES"
    ds.SeriesDescription = f"AI overlay {algorithm.model.name}, not for diagnosis"
    ds.ImageComments = f"{identity.NOTICE}. Research software, not a medical device."
    return ds


def _instance_number(source: Dataset, finding: Finding, algorithm: Algorithm) -> int:
    """After the summary, in the order of the source images and of the model's labels.

    From the source's own number, so that an image that arrives later does not change this object.
    """
    frame, labels = finding.frame, algorithm.model.labels
    try:
        own = max(1, int(source.get("InstanceNumber") or 1))
    except (TypeError, ValueError):
        own = 1
    place = (own if own < MOST_INSTANCE_NUMBER else 1) + frame.number - 2
    return SUMMARY_NUMBER + 1 + place * len(labels) + labels.index(finding.label)
