"""Secondary Capture of an overlay (PS3.3 A.8)."""

import highdicom as hd
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomai.report import identity
from dicomai.report.overlay import draw
from dicomai.study import MANUFACTURER, Finding, Float32, Model

SERIES_NUMBER = 9901


def overlay_uid(finding: Finding, model: Model, engine: str) -> str:
    """The SOP Instance UID of an image's overlay."""
    source = finding.frame.source
    return identity.make_uid(
        "sc",
        source.sop_instance_uid,
        source.digest,
        str(finding.frame.number),
        identity.model_key(model, engine),
    )


def capture(source: Dataset, finding: Finding, heat: Float32, model: Model, engine: str) -> Dataset:
    """The overlay of one image, in RGB, for the study of its source (a header without pixels).

    heat: (rows, columns) of 0 to 1
    """
    moment = identity.local_time(finding.analyzed_at, source)
    ref = identity.for_highdicom(source)
    ds = hd.sc.SCImage.from_ref_dataset(
        ref_dataset=ref,
        pixel_array=draw(finding, heat, model),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        series_instance_uid=identity.series_uid(source.StudyInstanceUID, "sc", model, engine),
        series_number=SERIES_NUMBER,
        sop_instance_uid=overlay_uid(finding, model, engine),
        instance_number=_instance_number(source, finding.frame.number),
        manufacturer=MANUFACTURER,
        patient_orientation=("L", "F"),  # asked for; the source's own replaces it below
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    ds.PatientOrientation = None  # type: ignore[assignment]  # Type 2C: unknown, where the source does not say
    identity.restore(ds, source, identity.PATIENT_AND_STUDY + identity.OF_THE_IMAGE)
    identity.describe_equipment(ds, model, moment)
    identity.stamp(ds, moment)
    ds.ConversionType = "WSD"
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.BurnedInAnnotation = "YES"
    ds.SeriesDescription = f"AI overlay {model.name}, not for diagnosis"
    ds.ImageComments = f"{identity.NOTICE}. Research software, not a medical device."
    ds.DerivationDescription = (
        f"Class map of {finding.label.code.meaning} by {model.name} {model.version}, blended with "
        "the source image"
    )
    ds.SourceImageSequence = [_source_image(source, finding)]
    return ds


def _instance_number(source: Dataset, frame_number: int) -> int:
    # The source's own, so that an image that arrives later does not change this object.
    try:
        return max(1, int(source.get("InstanceNumber") or 1)) + frame_number - 1
    except (TypeError, ValueError):
        return frame_number


def _source_image(source: Dataset, finding: Finding) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if identity.has_frames(source):
        item.ReferencedFrameNumber = finding.frame.number
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item
