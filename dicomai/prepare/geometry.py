"""Letterbox and its inverse."""

import cv2
import numpy as np

from dicomai.study import Float32, Letterbox


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


def spread(cells: Float32, box: Letterbox) -> Float32:
    """Bring a map of h x w cells over the square back onto the image: (rows, columns).

    Cell (i, j) is centred at ((i + 0.5) / h, (j + 0.5) / w) of the square; between the centres
    the map is cubic, and never leaves the range of the cells.
    """
    h, w = cells.shape
    matrix = np.array(
        [
            [box.width / box.columns * w / box.size, 0, 0],
            [0, box.height / box.rows * h / box.size, 0],
        ],
        np.float64,
    )
    # Pixel centres: image (x + 0.5) maps to square left + (x + 0.5) * width / columns.
    matrix[0, 2] = (box.left + 0.5 * box.width / box.columns) * w / box.size - 0.5
    matrix[1, 2] = (box.top + 0.5 * box.height / box.rows) * h / box.size - 0.5
    image = cv2.warpAffine(
        cells,
        matrix,
        (box.columns, box.rows),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.clip(image, cells.min(), cells.max())
