"""Fractional Segmentation of the class maps (PS3.3 A.51).

Written here rather than by highdicom, which needs the geometry or the functional groups of the
image; one that names the frame that each of its frames is derived from needs neither.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import SegmentDescription
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import SegmentationStorage

from dicomai.report import identity, origin
from dicomai.report.sr import ARTIFICIAL_INTELLIGENCE
from dicomai.study import Algorithm, Finding, Float32, Label, UInt8

SERIES_NUMBER = 9904
# A segmentation has Image Laterality alone, and an orientation only without geometry.
OF_THE_IMAGE = tuple(
    keyword
    for keyword in identity.OF_THE_IMAGE
    if keyword not in {"Laterality", "PatientOrientation"}
)
MAXIMUM = 255  # stands for a probability of 1
ABNORMAL = CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure")
DERIVATION = ("113076", "DCM", "Segmentation")


def segmentation(
    source: Dataset,
    positive: Sequence[Finding],
    planes: Mapping[tuple[int, str], UInt8],
    algorithm: Algorithm,
) -> Dataset:
    """The local probability of each positive finding of one image, 0 to 255.

    source: its header; planes: (frame number, label key) -> plane()
    """
    labels = [label for label in algorithm.model.labels if label in {x.label for x in positive}]
    about = [f"{identity.frame_key(item.frame)}:{item.label.key}" for item in positive]
    ds = identity.begin(
        source,
        SegmentationStorage,
        "SEG",
        identity.object_uid("seg", about, algorithm),
        (identity.series_uid(source.StudyInstanceUID, "seg", algorithm), SERIES_NUMBER),
    )
    ds.SeriesDescription = f"AI class map {algorithm.model.name}, not for diagnosis"
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.ContentLabel = "AI_CLASS_MAP"
    ds.ContentDescription = "Class maps of AI findings, not for diagnosis"
    ds.ContentCreatorName = ""
    ds.ContentDate = ds.ContentTime = None  # sign() knows
    ds.SegmentationType, ds.SegmentationFractionalType = "FRACTIONAL", "PROBABILITY"
    ds.MaximumFractionalValue = MAXIMUM
    ds.SegmentsOverlap = "YES"
    ds.SegmentSequence = [
        _describe(number, label, about, algorithm) for number, label in enumerate(labels, 1)
    ]
    ds.LossyImageCompression = "00"
    ordered = sorted(positive, key=lambda item: (labels.index(item.label), item.frame.number))
    _add_pixels(ds, [planes[item.frame.number, item.label.key] for item in ordered])
    _add_frames(ds, source, [(labels.index(x.label) + 1, x.frame.number) for x in ordered])
    series = Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    series.ReferencedInstanceSequence = [origin.reference(source)]
    ds.ReferencedSeriesSequence = [series]
    moment = identity.local_time(max(item.analyzed_at for item in positive), source)
    identity.sign(ds, source, identity.PATIENT_AND_STUDY + OF_THE_IMAGE, algorithm, moment)
    if "PlaneOrientationSequence" not in ds.SharedFunctionalGroupsSequence[0]:
        identity.restore(ds, source, ("PatientOrientation",))
        ds.setdefault("PatientOrientation", None)  # Type 2C: unknown
    return ds


def plane(heat: Float32) -> UInt8:
    """A map of 0 to 1 in the cells of a segmentation."""
    return np.rint(heat * MAXIMUM).astype(np.uint8)


def _add_pixels(ds: Dataset, planes: Sequence[UInt8]) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = planes[0].shape
    ds.NumberOfFrames = len(planes)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    cells = b"".join(item.tobytes() for item in planes)
    ds.PixelData = cells + b"\0" * (len(cells) % 2)


def _add_frames(ds: Dataset, source: Dataset, frames: Sequence[tuple[int, int]]) -> None:
    """frames: segment number and source frame number of each frame."""
    dimensions = Dataset()
    dimensions.DimensionOrganizationUID = identity.make_uid("dimensions", ds.SOPInstanceUID)
    ds.DimensionOrganizationSequence = [dimensions]
    pointers = (
        ("ReferencedSegmentNumber", "SegmentIdentificationSequence"),
        ("ReferencedFrameNumber", "DerivationImageSequence"),
    )
    used = pointers if origin.has_frames(source) else pointers[:1]
    ds.DimensionIndexSequence = []
    for keyword, group in used:
        item = Dataset()
        item.DimensionOrganizationUID = dimensions.DimensionOrganizationUID
        item.DimensionIndexPointer, item.FunctionalGroupPointer = Tag(keyword), Tag(group)
        ds.DimensionIndexSequence.append(item)
    indices = {number: i for i, number in enumerate(sorted({n for _, n in frames}), 1)}
    ds.SharedFunctionalGroupsSequence = [_geometry(ds, source)]
    ds.PerFrameFunctionalGroupsSequence = []
    for segment, number in frames:
        groups, place, named, derived = Dataset(), Dataset(), Dataset(), Dataset()
        place.DimensionIndexValues = [segment, indices[number]][: len(used)]
        groups.FrameContentSequence = [place]
        named.ReferencedSegmentNumber = segment
        groups.SegmentIdentificationSequence = [named]
        derived.DerivationCodeSequence = [origin.code(*DERIVATION)]
        derived.SourceImageSequence = [origin.source_image(source, number)]
        groups.DerivationImageSequence = [derived]
        ds.PerFrameFunctionalGroupsSequence.append(groups)


def _geometry(ds: Dataset, source: Dataset) -> Dataset:
    """The image's own place in the patient, where it states it whole (PS3.3 C.7.6.2)."""
    groups = Dataset()
    measures = Dataset()
    # Of a radiograph only the size of the detector's pixels is known; OHIF must have one.
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        if origin.states(source, keyword):
            measures.PixelSpacing = source[keyword].value
            groups.PixelMeasuresSequence = [measures]
            break
    whole = ("FrameOfReferenceUID", "PixelSpacing", "SliceThickness", *origin.PLACE)
    if not all(origin.states(source, keyword) for keyword in whole):
        return groups
    ds.FrameOfReferenceUID = source.FrameOfReferenceUID
    ds.PositionReferenceIndicator = source.get("PositionReferenceIndicator", "")
    orientation, position = Dataset(), Dataset()
    measures.SliceThickness = source.SliceThickness
    orientation.ImageOrientationPatient = source.ImageOrientationPatient
    position.ImagePositionPatient = source.ImagePositionPatient
    groups.PlaneOrientationSequence = [orientation]
    groups.PlanePositionSequence = [position]
    return groups


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
