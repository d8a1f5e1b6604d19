"""Letterbox, and heat maps back where they belong."""

import numpy as np
import pytest
from numpy.typing import NDArray

from dicomai.prepare.geometry import fit, letterbox, spread

SHAPES = [(300, 200), (200, 300), (256, 256), (2500, 2048), (2048, 2500), (120, 97)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_aspect_ratio_is_kept_and_the_longer_side_fills_the_square(
    rows: int, columns: int
) -> None:
    box = fit(rows, columns, 224)
    assert max(box.height, box.width) == 224
    assert abs(box.height - 224 * rows / max(rows, columns)) <= 0.5
    assert abs(box.width - 224 * columns / max(rows, columns)) <= 0.5


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_image_is_centred_between_black_borders(rows: int, columns: int) -> None:
    square = letterbox(np.ones((rows, columns), np.float32), fit(rows, columns, 224))
    ys, xs = np.nonzero(square)
    assert square.shape == (224, 224)
    assert square[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].min() == pytest.approx(1)
    assert abs(ys.min() - (223 - ys.max())) <= 1
    assert abs(xs.min() - (223 - xs.max())) <= 1


def test_a_strip_keeps_at_least_one_pixel() -> None:
    box = fit(1, 10_000, 224)
    assert letterbox(np.ones((1, 10_000), np.float32), box).sum() == pytest.approx(224)


def test_shrinking_counts_every_pixel() -> None:
    noise = np.random.default_rng(0).random((2240, 1120)).astype(np.float32)
    square = letterbox(noise, fit(2240, 1120, 224))
    np.testing.assert_allclose(
        square[:, 56:168], noise.reshape(224, 10, 112, 10).mean((1, 3)), atol=1e-5
    )


def test_enlarging_stays_in_range() -> None:
    noise = np.random.default_rng(0).random((40, 30)).astype(np.float32)
    square = letterbox(noise, fit(40, 30, 224))
    assert square.min() >= 0
    assert noise.min() <= square[:, 100:120].min() <= square.max() <= noise.max()


def centre(heat: NDArray[np.float32]) -> tuple[float, float]:
    """Centre of mass (row, column), pixel centres at whole numbers."""
    mass = heat.astype(np.float64)
    ys, xs = np.indices(heat.shape)
    return float((mass * ys).sum() / mass.sum()), float((mass * xs).sum() / mass.sum())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("cell", [(3, 3), (2, 4), (4, 2)])
def test_a_hot_cell_comes_back_where_it_belongs(
    rows: int, columns: int, cell: tuple[int, int]
) -> None:
    cells = np.zeros((7, 7), np.float32)
    cells[cell] = 1
    heat = spread(cells, fit(rows, columns, 224))
    longer = max(rows, columns)
    # The square is `longer` wide in image pixels, and the image lies in its middle.
    expected = [
        (index + 0.5) / 7 * longer - (longer - side) / 2 - 0.5
        for index, side in zip(cell, (rows, columns), strict=True)
    ]
    assert heat.shape == (rows, columns)
    assert centre(heat) == pytest.approx(expected, abs=1 + longer / 224)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_bright_spot_of_the_image_and_its_heat_fall_together(rows: int, columns: int) -> None:
    image = np.zeros((rows, columns), np.float32)
    y, x = int(rows * 0.55), int(columns * 0.45)
    radius = min(rows, columns) // 12
    image[y - radius : y + radius + 1, x - radius : x + radius + 1] = 1
    box = fit(rows, columns, 224)
    heat = spread(letterbox(image, box).reshape(28, 8, 28, 8).mean((1, 3)), box)
    assert centre(heat) == pytest.approx((y, x), abs=1 + max(rows, columns) / 224)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_spreading_keeps_the_range_of_the_cells(rows: int, columns: int) -> None:
    cells = np.random.default_rng(1).random((7, 7)).astype(np.float32)
    heat = spread(cells, fit(rows, columns, 224))
    assert cells.min() <= heat.min() <= heat.max() <= cells.max()


def test_a_flat_map_stays_flat() -> None:
    assert np.ptp(spread(np.full((7, 7), 0.3, np.float32), fit(300, 200, 224))) == 0
