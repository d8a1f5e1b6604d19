"""Letterbox and its inverse."""

import cv2
import numpy as np

from dicomai.study import Float32, Letterbox, UInt16


def fit(rows: int, columns: int, size: int) -> Letterbox:
    """Centre rows x columns inside a square of size, aspect ratio kept."""
    scale = size / max(rows, columns)
    height = max(1, round(rows * scale))
    width = max(1, round(columns * scale))
    return Letterbox(rows, columns, size, (size - height) // 2, (size - width) // 2, height, width)


def letterbox(image: UInt16, box: Letterbox) -> Float32:
    """Resize (rows, columns[, 3]) of 0 to 65535 into (size, size[, 3]) of 0 to 1.

    What lies outside the image is 0 (black). Shrinks by area, so that every source pixel counts;
    enlarges linearly.
    """
    square = np.zeros((box.size, box.size, *image.shape[2:]), np.float32)
    inner = _resize(image, box).astype(np.float32) / np.float32(65535)
    square[box.top : box.top + box.height, box.left : box.left + box.width] = inner
    return square


def _resize(image: UInt16, box: Letterbox) -> UInt16:
    if box.height >= box.rows and box.width >= box.columns:
        return _scaled(image, box.width, box.height, cv2.INTER_LINEAR)
    # An area is a share of rows times a share of columns: rows first is the same and twice as fast.
    narrow = _scaled(image, box.columns, box.height, cv2.INTER_AREA)
    return _scaled(narrow, box.width, box.height, cv2.INTER_AREA)


def _scaled(image: UInt16, width: int, height: int, method: int) -> UInt16:
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint16)


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
