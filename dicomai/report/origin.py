"""What the header of a source image says, as far as it can be believed, and how to refer to it."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from highdicom.sr import ImageLibraryEntryDescriptors
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import SecondaryCaptureImageStorage
from pydicom.valuerep import DA, TM

# Radiographs, of which the image library demands orientation and spacing (TID 1603), and slices, of
# which it demands their place (TID 1604).
DETAILED = {"CR", "DX", "IO", "MG", "PX", "RF", "RG", "XA", "CT", "MR", "PT"}
SQUARE = 0.01  # pixels that are so nearly as high as wide are square
MOST_HEIGHT = 100.0  # of a pixel of width 1; more is nobody's detector
# Values of an element that describes an image, and how many; anything else is as good as none.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
LENGTH = re.compile(r"(?=[\d.]*[1-9])(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")  # above zero
TEXT = re.compile(r"(?s).+")
DIRECTION = re.compile(r"[AFHLPR]{1,3}")  # PS3.3 C.7.6.1.1.1
PLACE = {"ImageOrientationPatient": (6, NUMBER), "ImagePositionPatient": (3, NUMBER)}
IDENTIFIES_IMAGE = {"SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"}
DESCRIBES_IMAGE = {
    "SOPClassUID": (1, TEXT),
    "SOPInstanceUID": (1, TEXT),
    "StudyInstanceUID": (1, TEXT),
    "SeriesInstanceUID": (1, TEXT),
    "Modality": (1, TEXT),
    "FrameOfReferenceUID": (1, TEXT),
    "NumberOfFrames": (1, LENGTH),
    "Rows": (1, LENGTH),
    "Columns": (1, LENGTH),
    "SamplesPerPixel": (1, LENGTH),
    "PixelRepresentation": (1, NUMBER),
    "PatientOrientation": (2, DIRECTION),
    "PixelAspectRatio": (2, LENGTH),
    "PixelSpacing": (2, LENGTH),
    "ImagerPixelSpacing": (2, LENGTH),
    "SliceThickness": (1, LENGTH),
    **PLACE,
}


def has_frames(source: Dataset) -> bool:
    """Whether a reference to this image has to name a frame."""
    return int(source.get("NumberOfFrames") or 1) > 1


def number_of(source: Dataset, keyword: str) -> float | None:
    """The first value as a number, where there is one."""
    value = source.get(keyword)
    if isinstance(value, (MultiValue, list)):
        value = value[0] if value else None
    text = "" if value is None else str(value)
    return float(text) if NUMBER.fullmatch(text) and math.isfinite(float(text)) else None


def states(source: Dataset, keyword: str) -> bool:
    """Whether an element of DESCRIBES_IMAGE is there, with values that can be."""
    if keyword not in source or source[keyword].VR == "SQ":
        return False
    count, pattern = DESCRIBES_IMAGE[keyword]
    value = source[keyword].value
    values = value if isinstance(value, (MultiValue, list)) else [value]
    return len(values) == count and all(pattern.fullmatch(str(item)) for item in values)


def pixel_height(source: Dataset) -> float:
    """Of a pixel whose width is 1 (PS3.3 C.7.6.3.1.7)."""
    for keyword in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing"):
        if states(source, keyword):
            vertical, horizontal = (float(value) for value in source[keyword].value)
            height = vertical / horizontal
            return height if 1 / MOST_HEIGHT < height < MOST_HEIGHT else 1.0
    return 1.0


def aspect_ratio(source: Dataset) -> list[int]:
    """Height and width of a pixel as whole numbers."""
    height = pixel_height(source)
    return [1, 1] if abs(height - 1) < SQUARE else [round(height * 1000), 1000]


def for_highdicom(source: Dataset) -> Dataset:
    """A header that highdicom accepts whatever the source holds.

    sign() puts the source's own values in, name_classes() its class where highdicom has no name for
    it (private and retired ones).
    """
    ds = Dataset()
    for keyword in DESCRIBES_IMAGE:
        if states(source, keyword):
            ds[keyword] = copy.deepcopy(source[keyword])
    ds.SpecificCharacterSet = "ISO_IR 192"
    for keyword in ("PatientName", "PatientID", "StudyID", "AccessionNumber"):
        setattr(ds, keyword, "")
    ds.ReferringPhysicianName = ds.PatientBirthDate = ds.PatientSex = None
    ds.StudyDate = _or_none(DA, source.get("StudyDate"))
    ds.StudyTime = _or_none(TM, source.get("StudyTime"))
    # Many lack what the image library demands, and are described as any image (TID 1602).
    if ds.get("Modality") not in DETAILED or described_as(ds) is None:
        ds.Modality = "OT"
    if described_as(ds) is None:
        ds.SOPClassUID = SecondaryCaptureImageStorage
    return ds


def described_as(ref: Dataset) -> str | None:
    """The modality that the image library has for an image; None where it cannot describe it."""
    return _described_as(_Description(ref))


class _Description:
    """What the image library says of an image; images of one kind are equal."""

    def __init__(self, ref: Dataset) -> None:
        self.ref = ref
        self._key = tuple(
            (keyword, ref[keyword].VR, str(ref[keyword].value))
            for keyword in DESCRIBES_IMAGE
            if keyword in ref and keyword not in IDENTIFIES_IMAGE
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Description) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=1024)  # highdicom looks through all attributes of the image's class each time
def _described_as(description: _Description) -> str | None:
    try:
        return str(ImageLibraryEntryDescriptors(description.ref)[0].value.value)
    except (ValueError, KeyError, AttributeError, TypeError, IndexError):
        return None


def name_classes(document: Dataset, classes: Mapping[str, str]) -> None:
    """Name the true class of each image; classes: SOP Instance UID -> SOP Class UID."""
    for element in document:
        for item in element.value if element.VR == "SQ" else ():
            uid = item.get("ReferencedSOPInstanceUID")
            if uid in classes:
                item.ReferencedSOPClassUID = classes[uid]
            name_classes(item, classes)


def _or_none(kind: type[DA] | type[TM], value: object) -> DA | TM | None:
    try:
        return kind(str(value)) if value else None
    except ValueError:
        return None


def reference(source: Dataset, frame_numbers: Sequence[int] = ()) -> Dataset:
    """An item that names an image (PS3.3 10.3); its frames, where it has more than one."""
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if frame_numbers and has_frames(source):
        item.ReferencedFrameNumber = list(frame_numbers)
    return item


def source_image(source: Dataset, frame_number: int | None) -> Dataset:
    """An item of Source Image Sequence (PS3.3 C.7.6.1.1.4); no frame: the whole image."""
    item = reference(source, [] if frame_number is None else [frame_number])
    item.PurposeOfReferenceCodeSequence = [
        code("121322", "DCM", "Source image for image processing operation")
    ]
    return item


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """An item of a code sequence (PS3.3 8.8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item
