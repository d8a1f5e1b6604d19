"""What an image looks like, in 128 bytes that are no picture; of near-duplicates they are near."""

import functools
import hashlib
from collections.abc import Sequence

import cv2
import numpy as np

from dicomai.study import Float32, UInt8

SIDE = 64  # pixels of the small image
BITS = 1024
# Of the bits: an angle of 31 degrees, a correlation of 0.86. Measured on 2,247 radiographs: other
# patients' correlate up to 0.78; the same image correlates at least 0.90 after another JPEG
# compression (quality 40), half the size, another gamma or window, and -0.99 inverted.
NEAR = 0.17


def fingerprint(shown: Float32) -> bytes:
    """The signs of 1,024 random projections of an image's small structures.

    shown: (rows, columns[, 3]), any scale. The chance that two signs differ is the angle between
    the images over 180 degrees (Charikar, Similarity Estimation Techniques, STOC 2002).
    """
    grey = cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY) if shown.ndim == 3 else shown
    small = cv2.resize(grey.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    span = float(np.ptp(small))
    if span > 0:
        small = (small - small.min()) * (255 / span)
    # What is left is neither the brightness nor the contrast of the place.
    details = small - cv2.GaussianBlur(small, (0, 0), 4)
    details /= np.sqrt(cv2.GaussianBlur(details * details, (0, 0), 6)) + 2
    signs = _projections() @ (details - details.mean()).ravel() > 0
    return np.packbits(signs).tobytes()


@functools.cache
def _projections() -> Float32:
    """1,024 x 4,096 of -1 and 1, the same for ever."""
    stream = hashlib.shake_256(b"dicomai fingerprint 1").digest(BITS * SIDE * SIDE // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8)).reshape(BITS, SIDE * SIDE)
    return bits.astype(np.float32) * 2 - 1


def near(one: Sequence[bytes], other: Sequence[bytes]) -> list[tuple[int, int]]:
    """Which of one look like which of the other, inverted or not: pairs of indices."""
    if not one or not other:
        return []
    right = _signs(other)
    found: list[tuple[int, int]] = []
    for start in range(0, len(one), 4096):
        # The product counts bits that agree less those that differ.
        same = np.abs(_signs(one[start : start + 4096]) @ right.T)
        pairs = np.argwhere(same >= BITS * (1 - 2 * NEAR))
        found += [(start + int(i), int(j)) for i, j in pairs]
    return found


def _signs(prints: Sequence[bytes]) -> Float32:
    packed: UInt8 = np.frombuffer(b"".join(prints), np.uint8).reshape(len(prints), BITS // 8)
    return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
