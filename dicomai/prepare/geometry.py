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
    """Resize (rows, columns) into (size, size); what lies outside the image is 0 (black).

    Shrinks by area, so that every source pixel counts; enlarges linearly.
    """
    shrinks = box.height < box.rows or box.width < box.columns
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    inner = cv2.resize(image, (box.width, box.height), interpolation=method)
    square = np.zeros((box.size, box.size), np.float32)
    square[box.top : box.top + box.height, box.left : box.left + box.width] = inner
    return square


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
