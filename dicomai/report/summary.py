"""The summary picture of a study: what was found, how sure, and where."""

from bisect import insort
from dataclasses import dataclass
from datetime import datetime

import cv2
import numpy as np

from dicomai.report.identity import frame_key
from dicomai.report.overlay import (
    AMBER,
    GREY,
    READABLE,
    WHITE,
    WORDS,
    blend,
    fit,
    made_by,
    outline,
    write,
)
from dicomai.study import Algorithm, Finding, Float32, Label, Presence, UInt8

WIDTH = 1024
MARGIN = 32
TILES = 6  # images shown, the most probable first
TILES_IN_A_ROW = 3
LARGEST = 480  # pixels of the only tile; two are smaller, three fill the row
ROW = 44
CORNERS = 128  # rows above and below that viewers write into
NAME, BAR, WORD = MARGIN, 330, 660  # where the columns of the table begin
TRACK, BAND = (60, 60, 60), (110, 110, 110)


@dataclass(frozen=True, slots=True)
class Tile:
    """A small image and its map; order: the most probable first, then always the same."""

    order: tuple[float, str]
    caption: str
    display: UInt8
    heat: Float32


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What the summary needs to know of a frame; said: of each label, how probable it is."""

    said: tuple[tuple[Label, float, Presence], ...]
    tile: Tile


@dataclass(slots=True)
class Tally:
    """A label over all images of a study; best: the highest probability."""

    best: float = 0.0
    presence: Presence = Presence.ABSENT
    positive: int = 0


class Overview:
    """Collects what a study's summary shows, image by image; keeps no whole picture."""

    def __init__(self, labels: tuple[Label, ...]) -> None:
        self._tallies = {label: Tally() for label in labels}
        self._tiles: list[Tile] = []
        self._images = 0

    def add(self, glimpse: Glimpse) -> None:
        """One frame."""
        self._images += 1
        for label, probability, presence in glimpse.said:
            tally = self._tallies[label]
            tally.positive += presence is Presence.PRESENT
            if probability >= tally.best:
                tally.best, tally.presence = probability, presence
        insort(self._tiles, glimpse.tile, key=lambda tile: tile.order)
        del self._tiles[TILES:]

    def draw(self, not_analyzed: int, algorithm: Algorithm, moment: datetime) -> UInt8:
        """The picture, RGB, WIDTH wide."""
        images = f"{_count(self._images, 'image')} analyzed"
        if not_analyzed:
            images += f", {_count(not_analyzed, 'image')} NOT analyzed"
        colour = AMBER if self._positive() else WHITE
        head = (
            ("AI summary, not for diagnosis", 1.1, WHITE),
            *((line, 0.9, colour) for line in _wrap(self._statement(), 0.9)),
            (images, 0.7, AMBER if not_analyzed else GREY),
        )
        probabilities = "calibrated" if algorithm.model.calibrated else "not calibrated"
        foot = (
            (f"{made_by(algorithm, moment)}. Probabilities are {probabilities}.", 0.6, GREY),
            (
                "The images with the highest probabilities are shown. Not a medical device.",
                0.6,
                GREY,
            ),
        )
        table = [_table_row(label, tally, self._images, algorithm.reporting.undetermined_margin)
                 for label, tally in self._tallies.items()]  # fmt: skip
        corners = np.zeros((CORNERS, WIDTH, 3), np.uint8)
        parts = [corners, _lines(head), *table, *self._rows_of_tiles(), _lines(foot), corners]
        return np.vstack(parts)

    def _positive(self) -> list[str]:
        return [label.code.meaning for label, tally in self._tallies.items() if tally.positive]

    def _statement(self) -> str:
        if positive := self._positive():
            return f"Present: {', '.join(positive)}"
        if any(tally.presence is Presence.UNDETERMINED for tally in self._tallies.values()):
            return "No finding is present; see those that are undetermined"
        return "No finding reaches its threshold. This does not rule one out."

    def _rows_of_tiles(self) -> list[UInt8]:
        rows = []
        columns = min(TILES_IN_A_ROW, len(self._tiles))
        side = min(LARGEST, (WIDTH - (columns + 1) * MARGIN) // columns)
        for start in range(0, len(self._tiles), columns):
            row = np.zeros((side + ROW + MARGIN, WIDTH, 3), np.uint8)
            for column, tile in enumerate(self._tiles[start : start + columns]):
                left = MARGIN + column * (side + MARGIN)
                row[MARGIN : MARGIN + side, left : left + side] = _square(tile, side)
                scale = min(0.55, fit(tile.caption, side))
                write(row, tile.caption, (left, MARGIN + side + 24), scale, WHITE)
            rows.append(row)
        return rows


def glimpse(findings: list[Finding], heat: Float32, name: str, pixel_height: float) -> Glimpse:
    """Of a frame; heat: (rows, columns), of its most probable finding."""
    top = most_probable(findings)
    order = (-top.probability, frame_key(top.frame))
    caption = f"{name}: {top.label.code.meaning} {top.probability:.0%}"
    size = _fitting(top.frame.display.shape, LARGEST, pixel_height)
    display = cv2.resize(top.frame.display, size, interpolation=cv2.INTER_AREA)
    cells = cv2.resize(heat, size, interpolation=cv2.INTER_AREA)
    tile = Tile(order, caption, display.astype(np.uint8), cells.astype(np.float32))
    return Glimpse(tuple((x.label, x.probability, x.presence) for x in findings), tile)


def most_probable(findings: list[Finding]) -> Finding:
    """The finding with the highest probability."""
    return max(findings, key=lambda item: item.probability)


def _wrap(text: str, scale: float) -> list[str]:
    """Lines that fit the picture."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fit(longer, WIDTH - 2 * MARGIN) >= scale or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _cut(text: str, width: float) -> str:
    """As much of a text as can be read in so many pixels."""
    if fit(text, width) >= READABLE:
        return text
    while len(text) > 1 and fit(f"{text}...", width) < READABLE:
        text = text[:-1]
    return f"{text}..."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _lines(lines: tuple[tuple[str, float, tuple[int, int, int]], ...]) -> UInt8:
    strip = np.zeros((ROW * len(lines) + MARGIN, WIDTH, 3), np.uint8)
    for index, (text, scale, colour) in enumerate(lines):
        smaller = min(scale, fit(text, WIDTH - 2 * MARGIN))
        write(strip, text, (MARGIN, MARGIN // 2 + round(ROW * (index + 0.7))), smaller, colour)
    return strip


def _table_row(label: Label, tally: Tally, images: int, margin: float) -> UInt8:
    """Name, a bar up to the highest probability with the threshold, what it means."""
    row = np.zeros((ROW, WIDTH, 3), np.uint8)
    colour = AMBER if tally.positive else WHITE
    name = _cut(label.code.meaning, BAR - NAME - 16)
    write(row, name, (NAME, 29), min(0.65, fit(name, BAR - NAME - 16)), colour)

    def x(probability: float) -> int:
        return BAR + round((WORD - 24 - BAR) * min(1.0, max(0.0, probability)))

    cv2.rectangle(row, (x(0), 14), (x(1), 32), TRACK, cv2.FILLED)
    if margin:
        low, high = label.threshold - margin, label.threshold + margin
        cv2.rectangle(row, (x(low), 14), (x(high), 32), BAND, cv2.FILLED)
    cv2.rectangle(row, (x(0), 18), (x(tally.best), 28), colour, cv2.FILLED)
    cv2.line(row, (x(label.threshold), 8), (x(label.threshold), 38), WHITE, 2)
    text = f"{tally.best:.0%} {WORDS[tally.presence]}"
    if tally.positive and images > 1:
        text += f" in {tally.positive} of {images}"
    write(row, text, (WORD, 29), min(0.65, fit(text, WIDTH - MARGIN - WORD)), colour)
    return row


def _fitting(shape: tuple[int, ...], side: int, pixel_height: float) -> tuple[int, int]:
    """Columns and rows of an image that fits a square, whole; pixel_height: of a width of 1."""
    rows, columns = shape[0] * pixel_height, shape[1]
    scale = side / max(rows, columns)
    return min(side, max(1, round(columns * scale))), min(side, max(1, round(rows * scale)))


def _square(tile: Tile, side: int) -> UInt8:
    """An overlay on black."""
    size = _fitting(tile.display.shape, side, 1.0)
    display = cv2.resize(tile.display, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    heat = cv2.resize(tile.heat, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    square = np.zeros((side, side, 3), np.uint8)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    square[top : top + size[1], left : left + size[0]] = outline(blend(display, heat), heat)
    return square
