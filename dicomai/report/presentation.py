"""Softcopy Presentation State: contours and labels on the original image (PS3.3 A.33)."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from highdicom import PresentationLUTTransformation
from highdicom.color import CIELabColor
from highdicom.pr import (
    ColorSoftcopyPresentationState,
    GraphicAnnotation,
    GraphicLayer,
    GraphicObject,
    GrayscaleSoftcopyPresentationState,
    TextObject,
)
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomai.report import identity
from dicomai.study import MANUFACTURER, Algorithm, Finding, Float32

SERIES_NUMBER = 9903
LAYER = "AI"
LEVEL = 0.5  # local probability; the overlay draws a line there, too
SMALLEST = 3  # corners that make an area
YELLOW = CIELabColor(85.0, 5.0, 80.0)
# What the image says of its own grey scale; the presentation state takes its place (PS3.4 N.2).
GREY_SCALE = (
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "WindowCenterWidthExplanation", "VOILUTFunction",
    "VOILUTSequence",
)  # fmt: skip


def presentation_state(
    source: Dataset,
    positive: Sequence[Finding],
    heats: Mapping[tuple[int, str], Float32],
    algorithm: Algorithm,
) -> Dataset:
    """Where the positive findings of one image are.

    source: its header; heats: (frame number, label key) -> (rows, columns) of 0 to 1
    """
    moment = identity.local_time(max(item.analyzed_at for item in positive), source)
    ref = identity.for_highdicom(source)
    layer = GraphicLayer(LAYER, 1, "AI result, not for diagnosis", display_color=YELLOW)
    about = [f"{identity.frame_key(item.frame)}:{item.label.key}" for item in positive]
    arguments: dict[str, Any] = {
        "referenced_images": [ref],
        "series_instance_uid": identity.series_uid(source.StudyInstanceUID, "gsps", algorithm),
        "series_number": SERIES_NUMBER,
        "sop_instance_uid": identity.object_uid("gsps", about, algorithm),
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": "dicomai",
        "software_versions": (identity.SOFTWARE,),
        "device_serial_number": "1",
        "content_label": "AI_CONTOURS",
        "content_description": "Contours of AI findings, not for diagnosis",
        "graphic_layers": [layer],
        "graphic_annotations": _annotations(ref, positive, heats, layer),
        "transfer_syntax_uid": ExplicitVRLittleEndian,
    }
    if int(source.get("SamplesPerPixel") or 1) > 1:
        ds: Dataset = ColorSoftcopyPresentationState(**arguments)
    else:
        # MONOCHROME1 shows the lowest value as white (PS3.3 C.7.6.3.1.2).
        inverted = source.get("PhotometricInterpretation") == "MONOCHROME1"
        shape = PresentationLUTTransformation("INVERSE" if inverted else "IDENTITY")
        ds = GrayscaleSoftcopyPresentationState(**arguments, presentation_lut_transformation=shape)
    identity.sign(ds, source, identity.PATIENT_AND_STUDY, algorithm, moment)
    identity.restore(ds, source, ("BodyPartExamined", "Laterality"))
    identity.state_laterality(ds)
    ds.SeriesDescription = f"AI contours {algorithm.model.name}, not for diagnosis"
    return ds


def _annotations(
    ref: Dataset,
    positive: Sequence[Finding],
    heats: Mapping[tuple[int, str], Float32],
    layer: GraphicLayer,
) -> list[GraphicAnnotation]:
    """One a frame: its lines, and above them what they are."""
    annotations = []
    for number in sorted({item.frame.number for item in positive}):
        here = [item for item in positive if item.frame.number == number]
        lines = [
            GraphicObject("POLYLINE", line, "PIXEL")
            for item in here
            for line in contours(heats[number, item.label.key])
        ]
        words = [_words(item, index, ref) for index, item in enumerate(here)]
        annotations.append(
            GraphicAnnotation(
                [ref],
                layer,
                number if identity.has_frames(ref) else None,
                graphic_objects=lines or None,
                text_objects=words,
            )
        )
    return annotations


def contours(heat: Float32) -> list[np.ndarray[Any, Any]]:
    """Closed lines around the places that reach LEVEL: (points, 2) of column and row, from 1."""
    mask = (heat >= LEVEL).astype(np.uint8)
    found, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    lines = [line[:, 0, :] for line in found if len(line) >= SMALLEST]
    # Graphic data in pixels: the centre of the first pixel is 0.5, 0.5 (PS3.3 C.10.5.1.2).
    return [np.vstack([line, line[:1]]).astype(np.float64) + 0.5 for line in lines]


def _words(finding: Finding, index: int, ref: Dataset) -> TextObject:
    """In the upper left corner, one below the other."""
    height = 0.05
    top = 0.02 + index * height
    return TextObject(
        f"AI: {finding.label.code.meaning} {finding.probability:.0%}",
        "DISPLAY",
        bounding_box=(0.02, top, 0.6, top + height),
        text_justification="LEFT",
    )
