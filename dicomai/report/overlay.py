"""The picture: source image, heat map, legend."""

from datetime import datetime

import cv2
import numpy as np

from dicomai.report.identity import NOTICE, SOFTWARE
from dicomai.study import Algorithm, Finding, Float32, Presence, UInt8

# Half of the light comes from the heat map where it is hottest: anatomy stays readable below it.
STRENGTH = 0.5
READABLE = 0.45  # the smallest scale of text that is nobody's guess
LINE = 34  # rows of a line of text of scale 1
LEGIBLE = 256  # columns that the legend needs
FONT = cv2.FONT_HERSHEY_SIMPLEX
WHITE, GREY, AMBER = (255, 255, 255), (170, 170, 170), (255, 190, 60)
# The colour map as RGB; OpenCV has it in its own order.
INFERNO = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO)[
    ..., ::-1
]
# Local probability, and the colour of the line around the places that reach it.
CONTOURS = {0.25: GREY, 0.5: WHITE, 0.75: AMBER}


def colours(heat: Float32) -> UInt8:
    """0 to 1 as RGB, perceptually uniform (inferno)."""
    return np.asarray(cv2.applyColorMap(cv2.convertScaleAbs(heat, alpha=255), INFERNO), np.uint8)


def in_colour(display: UInt8) -> UInt8:
    """A grey or RGB picture as RGB."""
    if display.ndim == 3:
        return display
    return np.asarray(cv2.cvtColor(display, cv2.COLOR_GRAY2RGB), np.uint8)


def blend(display: UInt8, heat: Float32) -> UInt8:
    """display (rows, columns) or RGB, heat (rows, columns) of 0 to 1; returns RGB."""
    image = in_colour(display)
    weight = heat * np.float32(STRENGTH)
    return np.asarray(cv2.blendLinear(image, colours(heat), 1 - weight, weight), np.uint8)


def outline(picture: UInt8, heat: Float32) -> UInt8:
    """Lines where heat, (rows, columns), reaches the fixed levels; the same on every image."""
    picture = picture.copy()
    thickness = max(1, round(picture.shape[1] / 900))
    # Beyond the border as at it: lines along the border lie outside, and are not drawn.
    margin = 2 * thickness + 1
    around = cv2.copyMakeBorder(heat, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
    for level, colour in CONTOURS.items():
        lines, _ = cv2.findContours(
            (around >= level).astype(np.uint8),
            cv2.RETR_LIST,
            cv2.CHAIN_APPROX_SIMPLE,
            offset=(-margin, -margin),
        )
        cv2.drawContours(picture, lines, -1, colour, thickness, cv2.LINE_AA)
    return picture


def draw(finding: Finding, heat: Float32, algorithm: Algorithm) -> UInt8:
    """The overlay with its legend below, so that no text covers the image: RGB.

    Side by side, the original stands to the left.
    """
    display = finding.frame.display
    picture = outline(blend(display, heat), heat)
    if algorithm.reporting.layout == "side-by-side":
        picture = np.hstack([in_colour(display), picture])
    missing = LEGIBLE - picture.shape[1]
    if missing > 0:
        picture = np.pad(picture, ((0, 0), (missing // 2, missing - missing // 2), (0, 0)))
    return np.vstack([picture, legend(picture.shape[0], picture.shape[1], finding, algorithm)])


def legend(rows: int, width: int, finding: Finding, algorithm: Algorithm) -> UInt8:
    """A strip below a picture: finding, scale, model, notice.

    The text fills the width, but the strip is not higher than half a picture that is very wide.
    """
    lines = (
        (_statement(finding, algorithm), AMBER if finding.positive else WHITE),
        (made_by(algorithm, finding.analyzed_at), GREY),
        (f"{NOTICE}. Not a medical device.", WHITE),
    )
    scale = min(fit(text, width * 0.94) for text, _ in lines)
    scale = min(scale, max(READABLE, rows / 2 / (LINE * (len(lines) + 1.5))))
    thickness = max(1, round(scale * 1.6))
    row = round(scale * LINE)
    strip = np.zeros((row * (len(lines) + 1) + row // 2, width, 3), np.uint8)
    left = round(width * 0.03)
    for index, (text, colour) in enumerate(lines):
        write(strip, text, (left, round(row * (index + 0.8))), scale, colour)
    _draw_scale(strip, left, row * len(lines) + row // 4, row, scale * 0.8, thickness)
    return strip


def write(
    picture: UInt8, text: str, place: tuple[int, int], scale: float, colour: tuple[int, int, int]
) -> None:
    """Text from its lower left corner (x, y)."""
    thickness = max(1, round(scale * 1.6))
    cv2.putText(picture, text, place, FONT, scale, colour, thickness, cv2.LINE_AA)


def made_by(algorithm: Algorithm, moment: datetime) -> str:
    """Model, program and date in a line."""
    model = algorithm.model
    return f"{model.name} {model.version}, dicomai {SOFTWARE}, {moment:%Y-%m-%d}"


WORDS = {
    Presence.PRESENT: "PRESENT",
    Presence.ABSENT: "not present",
    Presence.UNDETERMINED: "undetermined",
}


def _statement(finding: Finding, algorithm: Algorithm) -> str:
    calibrated = "" if algorithm.model.calibrated else " uncalibrated"
    return (
        f"{finding.label.code.meaning}: {WORDS[finding.presence]}, {finding.probability:.0%}"
        f"{calibrated} (threshold {finding.label.threshold:.0%})"
    )


def fit(text: str, width: float) -> float:
    """The scale at which a text is so wide, lines of their usual thickness included."""
    scale = width / cv2.getTextSize(text, FONT, 1.0, 2)[0][0]
    real = cv2.getTextSize(text, FONT, scale, max(1, round(scale * 1.6)))[0][0]
    return scale * min(1.0, width / real)


def _draw_scale(strip: UInt8, left: int, top: int, row: int, scale: float, thickness: int) -> None:
    """The colour bar, from 0 to 100 % local probability, mixed with mid-grey as the image is."""
    width = strip.shape[1]
    inner = round(width * 0.5)
    ramp = np.tile(np.linspace(0, 1, inner, dtype=np.float32), (row // 2, 1))
    bar = blend(np.full(ramp.shape, 110, np.uint8), ramp)
    start = left + round(scale * 60)
    strip[top : top + bar.shape[0], start : start + inner] = bar
    for level, colour in CONTOURS.items():  # the lines in the picture
        place = start + round(inner * level)
        cv2.line(strip, (place, top), (place, top + row // 2 - 1), colour, max(2, thickness))
    base = top + row // 2
    cv2.putText(strip, "0 %", (left, base), FONT, scale, GREY, thickness, cv2.LINE_AA)
    text = "100 % local probability"
    place = (start + inner + round(scale * 12), base)
    remaining = width - place[0] - left
    scale = min(scale, fit(text, remaining))
    cv2.putText(strip, text, place, FONT, scale, GREY, thickness, cv2.LINE_AA)
