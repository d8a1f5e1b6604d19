"""Fractional Segmentation of the class maps (PS3.3 A.51)."""

from collections.abc import Mapping, Sequence

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomai.report import identity
from dicomai.report.sr import ARTIFICIAL_INTELLIGENCE
from dicomai.study import MANUFACTURER, Algorithm, Finding, Float32, Label

SERIES_NUMBER = 9904
ABNORMAL = CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure")


def segmentation(
    source: Dataset,
    positive: Sequence[Finding],
    heats: Mapping[tuple[int, str], Float32],
    algorithm: Algorithm,
) -> Dataset:
    """The local probability of each positive finding of one image, 0 to 255.

    source: its header; heats: (frame number, label key) -> (rows, columns) of 0 to 1
    """
    moment = identity.local_time(max(item.analyzed_at for item in positive), source)
    ref = identity.for_highdicom(source)
    labels = [label for label in algorithm.model.labels if label in {x.label for x in positive}]
    about = [f"{identity.frame_key(item.frame)}:{item.label.key}" for item in positive]
    ds = Segmentation(
        source_images=[ref],
        pixel_array=_planes(source, labels, heats),
        segmentation_type="FRACTIONAL",
        fractional_type="PROBABILITY",
        segment_descriptions=[
            _describe(number, label, about, algorithm) for number, label in enumerate(labels, 1)
        ],
        series_instance_uid=identity.series_uid(source.StudyInstanceUID, "seg", algorithm),
        series_number=SERIES_NUMBER,
        sop_instance_uid=identity.object_uid("seg", about, algorithm),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name="dicomai",
        software_versions=(identity.SOFTWARE,),
        device_serial_number="1",
        content_label="AI_CLASS_MAP",
        content_description="Class maps of AI findings, not for diagnosis",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    identity.sign(ds, source, identity.PATIENT_AND_STUDY, algorithm, moment)
    identity.restore(ds, source, identity.OF_THE_IMAGE)
    # highdicom's own is random.
    dimensions = identity.make_uid("dimensions", ds.SOPInstanceUID)
    for item in (*ds.DimensionOrganizationSequence, *ds.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    ds.SeriesDescription = f"AI class map {algorithm.model.name}, not for diagnosis"
    return ds


def _planes(
    source: Dataset, labels: list[Label], heats: Mapping[tuple[int, str], Float32]
) -> Float32:
    """(frames, rows, columns, labels)"""
    frames = int(source.get("NumberOfFrames") or 1)
    planes = np.zeros((frames, int(source.Rows), int(source.Columns), len(labels)), np.float32)
    for (number, key), heat in heats.items():
        for index, label in enumerate(labels):
            if label.key == key:
                planes[number - 1, :, :, index] = heat
    return planes


def _describe(
    number: int, label: Label, about: list[str], algorithm: Algorithm
) -> SegmentDescription:
    code = label.code
    return SegmentDescription(
        segment_number=number,
        segment_label=code.meaning[:64],
        segmented_property_category=ABNORMAL,
        segmented_property_type=CodedConcept(code.value, code.scheme, code.meaning),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=algorithm.model.name,
            family=ARTIFICIAL_INTELLIGENCE,
            version=algorithm.model.version,
        ),
        tracking_uid=identity.make_uid("segment", *about, label.key),
        tracking_id=f"{code.meaning} map",
    )
