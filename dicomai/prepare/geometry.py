"""Letterbox and its inverse."""

import dataclasses

import cv2
import numpy as np

from dicomai.study import Float32, Letterbox

SHARPNESS = -0.75  # of the cubic between cells, as OpenCV's


def fit(rows: int, columns: int, size: int) -> Letterbox:
    """Centre rows x columns inside a square of size, aspect ratio kept."""
    scale = size / max(rows, columns)
    height = max(1, round(rows * scale))
    width = max(1, round(columns * scale))
    return Letterbox(rows, columns, size, (size - height) // 2, (size - width) // 2, height, width)


def letterbox(image: Float32, box: Letterbox) -> Float32:
    """Resize (rows, columns[, 3]) into (size, size[, 3]); what lies outside the image is 0 (black).

    Shrinks by area, so that every source pixel counts; enlarges linearly.
    """
    square = np.zeros((box.size, box.size, *image.shape[2:]), np.float32)
    method = cv2.INTER_LINEAR
    if box.height < box.rows or box.width < box.columns:
        image, method = _shrink_rows(image, box.height), cv2.INTER_AREA
    inner = cv2.resize(image, (box.width, box.height), interpolation=method)
    square[box.top : box.top + box.height, box.left : box.left + box.width] = inner
    return square


def _shrink_rows(image: Float32, height: int) -> Float32:
    """(rows, ...) to (height, ...) by area: what cv2.resize does for rows, four times as fast.

    An area is a share of rows times a share of columns, so rows may go first.
    """
    rows = len(image)
    flat = np.ascontiguousarray(image).reshape(rows, -1)
    edges = np.arange(height + 1) * (rows / height)
    first = edges[:-1].astype(np.intp)
    last = np.minimum(np.ceil(edges[1:] - 1e-9).astype(np.intp), rows)
    sums = np.empty((height, flat.shape[1]), np.float32)
    for i in range(height):
        cv2.reduce(flat[first[i] : last[i]], 0, cv2.REDUCE_SUM, dst=sums[i : i + 1])
    # The first and the last row of each sum count for the part that lies inside.
    sums -= (edges[:-1] - first).astype(np.float32)[:, None] * flat[first]
    sums -= (last - edges[1:]).astype(np.float32)[:, None] * flat[last - 1]
    sums *= np.float32(height / rows)
    return sums.reshape(height, *image.shape[1:])


def shrunk(box: Letterbox, largest_side: int) -> Letterbox:
    """The letterbox of the same image with no more pixels on its longer side."""
    scale = largest_side / max(box.rows, box.columns)
    if scale >= 1:
        return box
    rows, columns = (max(1, round(side * scale)) for side in (box.rows, box.columns))
    return dataclasses.replace(box, rows=rows, columns=columns)


def spread(cells: Float32, box: Letterbox) -> Float32:
    """Bring a map of h x w cells over the square back onto the image: (rows, columns).

    Cell (i, j) is centred at ((i + 0.5) / h, (j + 0.5) / w) of the square; between the centres
    the map is cubic, and never leaves the range of the cells.
    """
    h, w = cells.shape
    down = _cubic(box.rows, box.top, box.height, box.size, h)
    across = _cubic(box.columns, box.left, box.width, box.size, w)
    image: Float32 = np.matmul(down @ cells, across.T)
    return np.clip(image, cells.min(), cells.max(), out=image)


def _cubic(pixels: int, start: int, extent: int, size: int, cells: int) -> Float32:
    """How much each cell counts in each pixel of an axis: (pixels, cells).

    The image lies on the square, of so many cells, from start on. Keys, IEEE Trans. Acoust. 29,
    1981; beyond the border the cells go on as at it. The same as cv2.warpAffine within 5e-7, in
    4 instead of 57 ms for an image of 2500 x 2048.
    """
    place = (start + (np.arange(pixels) + 0.5) * extent / pixels) * cells / size - 0.5
    first = np.floor(place).astype(np.intp)
    weights = np.zeros((pixels, cells), np.float64)
    for neighbour in range(-1, 3):
        away = np.abs(place - first - neighbour)
        near = ((SHARPNESS + 2) * away - (SHARPNESS + 3)) * away**2 + 1
        far = ((away - 5) * away + 8) * away * SHARPNESS - 4 * SHARPNESS
        index = np.clip(first + neighbour, 0, cells - 1)
        np.add.at(weights, (np.arange(pixels), index), np.where(away <= 1, near, far))
    return weights.astype(np.float32)
