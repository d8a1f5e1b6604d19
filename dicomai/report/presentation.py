"""Softcopy Presentation State: contours and labels on the original (PS3.3 A.33.1, A.33.2).

Written here rather than by highdicom, which needs to know the class of the image, and its
functional groups: images of retired and private classes are shown to people, too.
"""

import copy
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from highdicom.color import CIELabColor
from numpy.typing import NDArray
from PIL import ImageCms
from pydicom.dataset import Dataset
from pydicom.uid import (
    ColorSoftcopyPresentationStateStorage,
    GrayscaleSoftcopyPresentationStateStorage,
)
from pydicom.valuerep import DSfloat

from dicomai.report import identity, origin
from dicomai.study import Algorithm, Finding, Float32

SERIES_NUMBER = 9903
LAYER = "AI"
LEVEL = 0.5  # local probability; the overlay draws a line there, too
FUNCTIONS = {"LINEAR", "LINEAR_EXACT", "SIGMOID"}
SMALLEST = 3  # corners that make an area
MOST_POINTS = 8000  # an FL element holds 65,534 bytes at most (PS3.5 7.1.2)
Line = NDArray[np.float64]  # (points, 2) of column and row
YELLOW = CIELabColor(85.0, 5.0, 80.0)
LINE_HEIGHT = 0.05  # of the displayed area
# Creation date of an ICC profile; the same object must come out the same tomorrow.
PROFILE_DATE = slice(24, 36)


def presentation_state(
    source: Dataset,
    positive: Sequence[Finding],
    lines: Mapping[tuple[int, str], list[Line]],
    algorithm: Algorithm,
) -> Dataset:
    """Where the positive findings of one image are.

    source: its header; lines: (frame number, label key) -> contours()
    """
    about = [f"{identity.frame_key(item.frame)}:{item.label.key}" for item in positive]
    in_colour = positive[0].frame.display.ndim == 3
    ds = identity.begin(
        source,
        ColorSoftcopyPresentationStateStorage
        if in_colour
        else GrayscaleSoftcopyPresentationStateStorage,
        "PR",
        identity.object_uid("gsps", about, algorithm),
        (identity.series_uid(source.StudyInstanceUID, "gsps", algorithm), SERIES_NUMBER),
    )
    ds.SeriesDescription = f"AI contours {algorithm.model.name}, not for diagnosis"
    ds.ContentLabel = "AI_CONTOURS"
    ds.ContentDescription = "Contours of AI findings, not for diagnosis"
    ds.ContentCreatorName = ""
    ds.PresentationCreationDate = ds.PresentationCreationTime = None  # sign() knows
    series = Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    series.ReferencedImageSequence = [origin.reference(source)]
    ds.ReferencedSeriesSequence = [series]
    ds.GraphicAnnotationSequence = _annotations(source, positive, lines)
    ds.GraphicLayerSequence = [_layer()]
    ds.DisplayedAreaSelectionSequence = [_whole_image(source)]
    if in_colour:
        ds.ICCProfile = standard_profile()
    else:
        _copy_grey_scale(ds, source)
    moment = identity.local_time(max(item.analyzed_at for item in positive), source)
    identity.sign(ds, source, identity.PATIENT_AND_STUDY, algorithm, moment)
    identity.restore(ds, source, ("BodyPartExamined", "Laterality"))
    identity.state_laterality(ds)
    return ds


def standard_profile() -> bytes:
    """sRGB as an ICC profile (PS3.3 C.11.15)."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[PROFILE_DATE] = bytes(12)
    return bytes(profile)


def _copy_grey_scale(ds: Dataset, source: Dataset) -> None:
    """The image's own; a presentation state takes the place of all of it (PS3.4 N.2)."""
    table = _first_item(source, "ModalityLUTSequence")
    slope = origin.number_of(source, "RescaleSlope")
    if table is not None:
        ds.ModalityLUTSequence = [table]
    elif slope:
        ds.RescaleSlope = DSfloat(slope, auto_format=True)
        intercept = origin.number_of(source, "RescaleIntercept") or 0.0
        ds.RescaleIntercept = DSfloat(intercept, auto_format=True)
        named = str(source.get("RescaleType") or "")
        ds.RescaleType = named if identity.CODE_STRING.fullmatch(named) else "US"
    item, table = Dataset(), _first_item(source, "VOILUTSequence")
    width = origin.number_of(source, "WindowWidth")
    center = origin.number_of(source, "WindowCenter")
    if table is not None:
        item.VOILUTSequence = [table]
    elif center is not None and width is not None and width >= 1:
        item.WindowCenter = DSfloat(center, auto_format=True)
        item.WindowWidth = DSfloat(width, auto_format=True)
        if str(source.get("VOILUTFunction")) in FUNCTIONS:
            item.VOILUTFunction = source.VOILUTFunction
    if len(item):
        ds.SoftcopyVOILUTSequence = [item]
    # MONOCHROME1 shows the lowest value as white (PS3.3 C.7.6.3.1.2).
    inverted = source.get("PhotometricInterpretation") == "MONOCHROME1"
    ds.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"


def _first_item(source: Dataset, keyword: str) -> Dataset | None:
    if keyword not in source or source[keyword].VR != "SQ" or not source[keyword].value:
        return None
    first: Dataset = copy.deepcopy(source[keyword].value[0])
    return first


def _layer() -> Dataset:
    layer = Dataset()
    layer.GraphicLayer, layer.GraphicLayerOrder = LAYER, 1
    layer.GraphicLayerDescription = identity.NOTICE
    layer.GraphicLayerRecommendedDisplayCIELabValue = list(YELLOW.value)
    return layer


def _whole_image(source: Dataset) -> Dataset:
    area = Dataset()
    area.DisplayedAreaTopLeftHandCorner = [1, 1]
    area.DisplayedAreaBottomRightHandCorner = [int(source.Columns), int(source.Rows)]
    area.PresentationSizeMode = "SCALE TO FIT"
    area.PresentationPixelAspectRatio = origin.aspect_ratio(source)
    return area


def _annotations(
    source: Dataset, positive: Sequence[Finding], lines: Mapping[tuple[int, str], list[Line]]
) -> list[Dataset]:
    """One a frame: its lines, and what they are."""
    annotations = []
    for number in sorted({item.frame.number for item in positive}):
        here = [item for item in positive if item.frame.number == number]
        annotation = Dataset()
        annotation.GraphicLayer = LAYER
        annotation.ReferencedImageSequence = [origin.reference(source, [number])]
        annotation.TextObjectSequence = [_words(item, index) for index, item in enumerate(here)]
        drawn = [_polyline(line) for item in here for line in lines[number, item.label.key]]
        if drawn:
            annotation.GraphicObjectSequence = drawn
        annotations.append(annotation)
    return annotations


def contours(heat: Float32) -> list[Line]:
    """Closed lines around the places that reach LEVEL.

    The corner of the image is 0, 0, the centre of its first pixel 0.5, 0.5 (PS3.3 C.10.5.1.2).
    """
    mask = (heat >= LEVEL).astype(np.uint8)
    found, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    lines = [
        _simplify(np.asarray(line, np.int32))[:, 0, :] for line in found if len(line) >= SMALLEST
    ]
    return [np.vstack([line, line[:1]]).astype(np.float64) + 0.5 for line in lines]


def _simplify(line: NDArray[np.int32]) -> NDArray[np.int32]:
    """Half a pixel away at most, more where an element could not hold so many points."""
    distance = 0.5
    simple = cv2.approxPolyDP(line, distance, closed=True)
    while len(simple) > MOST_POINTS:
        distance *= 2
        simple = cv2.approxPolyDP(line, distance, closed=True)
    return np.asarray(simple, np.int32)


def _polyline(line: Line) -> Dataset:
    item = Dataset()
    item.GraphicAnnotationUnits, item.GraphicDimensions = "PIXEL", 2
    item.NumberOfGraphicPoints = len(line)
    item.GraphicData = line.ravel().tolist()
    item.GraphicType, item.GraphicFilled = "POLYLINE", "N"
    return item


def _words(finding: Finding, index: int) -> Dataset:
    """In the upper left corner, one below the other."""
    top = 0.02 + index * LINE_HEIGHT
    item = Dataset()
    item.BoundingBoxAnnotationUnits = "DISPLAY"
    item.UnformattedTextValue = f"AI: {finding.label.code.meaning} {finding.probability:.0%}"
    item.BoundingBoxTopLeftHandCorner = [0.02, top]
    item.BoundingBoxBottomRightHandCorner = [0.6, top + LINE_HEIGHT]
    item.BoundingBoxTextHorizontalJustification = "LEFT"
    return item
