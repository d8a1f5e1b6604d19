"""Stored pixels to what a workstation shows: modality LUT, VOI LUT, polarity (PS3.4 Annex N).

The steps act on single values, so for integer pixels they are computed once for each stored value
that occurs in the image and looked up: exact, and faster than arithmetic on every pixel.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels.utils import pixel_array

from dicomai.errors import NotDicom, UnsupportedPixels
from dicomai.study import Float32, Instance

Float64 = NDArray[np.float64]

# What pydicom, its decoder plug-ins and numpy raise for damaged or unknown pixel data.
DECODER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
TABLE_LIMIT = 1 << 17


def read(instance: Instance) -> Dataset:
    """Read a stored object, pixel data included; a disk that fails raises OSError."""
    try:
        data = instance.path.read_bytes()
    except FileNotFoundError:
        raise NotDicom("the received file is gone: send it again and retry the study") from None
    try:
        return pydicom.dcmread(io.BytesIO(data))
    except InvalidDicomError as error:
        raise NotDicom("this is not a DICOM file: it has no DICM prefix") from error
    except DECODER_ERRORS as error:
        raise NotDicom(f"cannot be parsed as DICOM: {_words(error)}") from error


def frame_count(ds: Dataset) -> int:
    """Number of Frames (0028,0008); 1 where it is absent."""
    try:
        return max(1, int(ds.get("NumberOfFrames") or 1))
    except (TypeError, ValueError) as error:
        raise UnsupportedPixels("Number of Frames is not a number") from error


def display(ds: Dataset, number: int) -> Float32:
    """Frame number (from 1) of a grey image as displayed: (rows, columns), 0 is black, 1 is white.

    Raises UnsupportedPixels for colour and for what cannot be decoded.
    """
    grey = ds.get("PhotometricInterpretation") in {"MONOCHROME1", "MONOCHROME2"}
    if not grey or ds.get("SamplesPerPixel", 1) != 1:
        raise UnsupportedPixels("colour images have no grey-scale display")
    try:
        stored = pixel_array(ds, index=number - 1)
        if not np.isfinite(stored).all():
            raise UnsupportedPixels("the pixel data hold values that are no numbers")
        return _to_display(ds, stored)
    except UnsupportedPixels:
        raise
    except DECODER_ERRORS as error:
        raise UnsupportedPixels(f"the pixel data cannot be decoded: {_words(error)}") from error


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _to_display(ds: Dataset, stored: NDArray[Any]) -> Float32:
    padding = _padding(ds)
    occurring = stored
    if padding is not None:
        occurring = stored[(stored < padding[0]) | (stored > padding[1])]
    if occurring.size == 0:
        return np.zeros(stored.shape, np.float32)
    low, high = occurring.min(), occurring.max()
    show = _pipeline(ds, float(low), float(high))
    bottom, top = stored.min(), stored.max()
    if stored.dtype.kind == "f" or int(top) - int(bottom) >= TABLE_LIMIT:
        return _blank(show(stored.astype(np.float64)), stored.astype(np.float64), padding)
    values = np.arange(int(bottom), int(top) + 1, dtype=np.float64)
    table = _blank(show(values), values, padding)
    offset = stored if bottom == 0 else stored.astype(np.int64) - int(bottom)
    return np.take(table, offset)


def _blank(shown: Float64, stored: Float64, padding: tuple[float, float] | None) -> Float32:
    # Padding is background whatever the polarity (PS3.3 C.7.5.1.1.2).
    if padding is not None:
        shown = np.where((stored >= padding[0]) & (stored <= padding[1]), 0.0, shown)
    return shown.astype(np.float32)


def _padding(ds: Dataset) -> tuple[float, float] | None:
    """Stored values that are padding: (0028,0120) to (0028,0121)."""
    value = ds.get("PixelPaddingValue")
    if value is None:
        return None
    limit = ds.get("PixelPaddingRangeLimit")
    limit = value if limit is None else limit
    first, last = _signed(ds, int(value)), _signed(ds, int(limit))
    return float(min(first, last)), float(max(first, last))


def _signed(ds: Dataset, value: int) -> int:
    bits = int(ds.get("BitsAllocated", 16))
    if ds.get("PixelRepresentation") == 1 and value >= 1 << (bits - 1):
        return value - (1 << bits)
    return value


def _pipeline(ds: Dataset, low: float, high: float) -> Callable[[Float64], Float64]:
    """Stored values to display values; low and high are the image's own extremes."""
    modality = _modality(ds)
    # A modality LUT may rise and fall: its extremes need not be those of its input.
    inputs = np.array([low, high])
    if ds.get("ModalityLUTSequence") and high - low < TABLE_LIMIT:
        inputs = np.arange(low, high + 1)
    ends = modality(inputs)
    voi = _voi(ds, float(ends.min()), float(ends.max()))
    # MONOCHROME1 shows the lowest value as white, after the VOI step (PS3.3 C.7.6.3.1.2).
    inverted = ds.get("PhotometricInterpretation") == "MONOCHROME1"

    def show(values: Float64) -> Float64:
        shown = voi(modality(values))
        return 1 - shown if inverted else shown

    return show


def _modality(ds: Dataset) -> Callable[[Float64], Float64]:
    """Modality LUT Sequence, else Rescale Slope and Intercept (PS3.3 C.11.1)."""
    if ds.get("ModalityLUTSequence"):
        table, first, _ = _lut(ds, ds.ModalityLUTSequence[0], signed=_is_signed(ds))
        return lambda values: table[_index(values, first, len(table))]
    slope = float(ds.get("RescaleSlope") or 1)
    intercept = float(ds.get("RescaleIntercept") or 0)
    return lambda values: values * slope + intercept


def _voi(ds: Dataset, low: float, high: float) -> Callable[[Float64], Float64]:
    """The first VOI LUT, else the first window, else the image's own range (PS3.3 C.11.2)."""
    if ds.get("VOILUTSequence"):
        table, first, bits = _lut(
            ds,
            ds.VOILUTSequence[0],
            signed=low < 0 or _is_signed(ds) or float(ds.get("RescaleIntercept") or 0) < 0,
        )
        white = (1 << bits) - 1
        return lambda values: table[_index(values, first, len(table))] / white
    window = _window(ds)
    if window is not None:
        center, width = window
        function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
        return lambda values: apply_window(values, center, width, function)
    if high <= low:
        return lambda values: np.clip(values - low, 0, 1)
    return lambda values: np.clip((values - low) / (high - low), 0, 1)


def _window(ds: Dataset) -> tuple[float, float] | None:
    center, width = ds.get("WindowCenter"), ds.get("WindowWidth")
    if center is None or width is None:
        return None
    first_center = center[0] if isinstance(center, (list, pydicom.multival.MultiValue)) else center
    first_width = width[0] if isinstance(width, (list, pydicom.multival.MultiValue)) else width
    # A width of zero or less is forbidden (PS3.3 C.11.2.1.2.1) and shows nothing: as if absent.
    return (float(first_center), float(first_width)) if float(first_width) > 0 else None


def apply_window(values: Float64, center: float, width: float, function: str) -> Float64:
    """LINEAR, LINEAR_EXACT or SIGMOID to 0..1 (PS3.3 C.11.2.1.2.1, C.11.2.1.3)."""
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700))))
    if function == "LINEAR_EXACT" or width < 1:  # LINEAR is defined from a width of 1 on
        return np.clip((values - center) / width + 0.5, 0, 1)
    if width == 1:
        return np.where(values <= center - 0.5, 0.0, 1.0)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def _is_signed(ds: Dataset) -> bool:
    return bool(ds.get("PixelRepresentation") == 1)


def _lut(ds: Dataset, item: Dataset, signed: bool) -> tuple[Float64, int, int]:
    """A LUT's values, the input that maps to its first entry, and its depth in bits.

    LUT Descriptor (0028,3002): entries (0 means 65536), first input, bits (PS3.3 C.11.1.1.1).
    """
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    entries = entries or 65536
    if signed and first >= 1 << 15:
        first -= 1 << 16
    data = item["LUTData"].value
    if isinstance(data, bytes):
        little = "<" if ds.original_encoding[1] is not False else ">"
        packed = len(data) < 2 * entries
        words = np.frombuffer(data, np.uint8 if packed else np.dtype(f"{little}u2"))
    else:
        words = np.atleast_1d(np.asarray(data, np.uint16))
        if len(words) < entries <= 2 * len(words):  # two 8-bit entries in a word
            words = words.view(np.uint8)
    table = words[:entries].astype(np.float64)
    # Some devices declare fewer bits than they use: the values themselves are right.
    return table, first, max(bits, int(table.max()).bit_length())


def _index(values: Float64, first: int, entries: int) -> NDArray[np.intp]:
    index: NDArray[np.intp] = np.clip(np.rint(values) - first, 0, entries - 1).astype(np.intp)
    return index
