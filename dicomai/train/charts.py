"""Small SVG charts: lines with axes, nothing else."""

import html
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dicomai.train.evaluate import Array

WIDTH, HEIGHT = 360, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 26, 40
COLOURS = ("var(--new)", "var(--old)", "var(--good)", "var(--bad)")
POINTS = 400  # of a curve; more are not seen

Curve = tuple[Sequence[float], Sequence[float]]
Place = Callable[[float, float], tuple[float, float]]  # of a point of the data, in pixels


def lines(
    curves: Mapping[str, Curve],
    across: str,
    up: str,
    marks: Sequence[float] = (),
    square: bool = False,
    diagonal: bool = False,
    dots: bool = False,
) -> str:
    """Curves over one pair of axes; square: both go from 0 to 1; marks: vertical lines."""
    width = HEIGHT + LEFT + RIGHT - TOP - BOTTOM if square else WIDTH
    xs = [float(x) for x_values, _ in curves.values() for x in x_values]
    ys = [float(y) for _, y_values in curves.values() for y in y_values]
    x_range = (0.0, 1.0) if square else (min(xs), max(xs))
    y_range = (0.0, 1.0) if square else _padded(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        x_part = (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1)
        y_part = (y - y_range[0]) / ((y_range[1] - y_range[0]) or 1)
        return (
            LEFT + x_part * (width - LEFT - RIGHT),
            HEIGHT - BOTTOM - y_part * (HEIGHT - TOP - BOTTOM),
        )

    parts = _axes(place, x_range, y_range, across, up, width)
    if diagonal:
        (x1, y1), (x2, y2) = place(0, 0), place(1, 1)
        parts.append(_line(x1, y1, x2, y2, "stroke-dasharray='4 4'"))
    for mark in marks:
        (x1, y1), (x2, y2) = place(mark, y_range[0]), place(mark, y_range[1])
        parts.append(_line(x1, y1, x2, y2, "stroke-dasharray='2 3'"))
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        parts.append(_curve(place, curve, colour, dots or len(curve[0]) == 1))
        parts.append(_legend(list(curves).index(name), name, colour))
    return (
        f"<svg viewBox='0 0 {width} {HEIGHT}' role='img' font-family='system-ui, sans-serif' "
        f"font-size='11' fill='var(--soft)'>{''.join(parts)}</svg>"
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    space = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - space, high + space


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to seven of them."""
    span = (high - low) or 1.0
    step = 10 ** np.floor(np.log10(span))
    step *= next(f for f in (0.1, 0.2, 0.25, 0.5, 1, 2) if span / (step * f) <= 7)
    first = np.ceil(low / step - 1e-9) * step
    return [float(x) + 0.0 for x in np.arange(first, high + step * 1e-6, step).round(12)]


def _axes(
    place: Place,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    across: str,
    up: str,
    width: int,
) -> list[str]:
    parts = []
    for y in _ticks(*y_range):
        _, at = place(x_range[0], y)
        parts.append(_line(LEFT, at, width - RIGHT, at, ""))
        parts.append(f"<text x='{LEFT - 6}' y='{at + 4:.1f}' text-anchor='end'>{y:g}</text>")
    for x in _ticks(*x_range):
        at, _ = place(x, y_range[0])
        under = HEIGHT - BOTTOM + 14
        parts.append(f"<text x='{at:.1f}' y='{under}' text-anchor='middle'>{x:g}</text>")
    middle = (LEFT + width - RIGHT) / 2
    parts.append(
        f"<text x='{middle:.0f}' y='{HEIGHT - 8}' text-anchor='middle'>{html.escape(across)}</text>"
    )
    half = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f"<text transform='translate(12 {half:.0f}) rotate(-90)' text-anchor='middle'>"
        f"{html.escape(up)}</text>"
    )
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, more: str) -> str:
    ends = f"x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'"
    return f"<line {ends} stroke='var(--line)' {more}/>"


def _curve(place: Place, curve: Curve, colour: str, dots: bool) -> str:
    index = np.unique(np.linspace(0, len(curve[0]) - 1, POINTS).astype(int))
    points = [place(float(curve[0][i]), float(curve[1][i])) for i in index]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>"
    if dots:
        drawn += "".join(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for x, y in points
        )
    return drawn


def _legend(number: int, name: str, colour: str) -> str:
    at = LEFT + number * 100
    return (
        f"<rect x='{at}' y='8' width='14' height='4' fill='{colour}'/>"
        f"<text x='{at + 19}' y='14'>{html.escape(name)}</text>"
    )


def roc(truth: Array, score: Array) -> Curve:
    """(1 - specificity, sensitivity) of every threshold."""
    order = np.argsort(-score, kind="stable")
    last = np.r_[np.diff(score[order]) != 0, True]
    found = np.cumsum(truth[order] > 0.5)[last] / max(1.0, truth.sum())
    wrong = np.cumsum(truth[order] < 0.5)[last] / max(1.0, (1 - truth).sum())
    return [0.0, *wrong.tolist()], [0.0, *found.tolist()]


def precision_recall(truth: Array, score: Array) -> Curve:
    """(sensitivity, precision) of every threshold."""
    order = np.argsort(-score, kind="stable")
    last = np.r_[np.diff(score[order]) != 0, True]
    found = np.cumsum(truth[order] > 0.5)[last]
    called = np.arange(1, len(truth) + 1)[last]
    return (found / max(1.0, truth.sum())).tolist(), (found / called).tolist()
