"""Stored pixels to what a workstation shows: modality LUT, VOI LUT, polarity (PS3.4 Annex N).

The steps act on single values. Cells of 8 and 16 bits can hold so few different ones that the steps
are computed once for each, in float64, and looked up: exact, and faster than arithmetic on every
pixel. Bits that do not count and the sign are part of the same look-up.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels.processing import apply_color_lut

from dicomai.errors import NotDicom, TooLarge, UnsupportedPixels
from dicomai.parse import PARSER_ERRORS, parse_file
from dicomai.prepare.decoders import Stored
from dicomai.study import Float32, Limits

Float64 = NDArray[np.float64]
Array = NDArray[Any]
Step = Callable[[Float64], Float64]

MODALITY = ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept")
VOI = ("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction")
GREY_SCALE = MODALITY + VOI
# Functional group macro: what it says instead of the object (PS3.3 C.7.6.16.2.9, C.7.6.16.2.10).
MACROS = {"PixelValueTransformationSequence": MODALITY, "FrameVOILUTSequence": VOI}

# Float Pixel Data have padding of their own (PS3.3 C.7.6.24, C.7.6.25).
PADDING = {"f4": "FloatPixel", "f8": "DoubleFloatPixel"}

# What pydicom, the decoders and numpy raise for damaged or unknown data.
DECODER_ERRORS = (*PARSER_ERRORS, cv2.error)


def read(file: Path, limits: Limits) -> Dataset:
    """Read a stored object, pixel data included; a disk that fails raises OSError.

    Raises NotDicom, and TooLarge for what is larger than the limits.
    """
    try:
        require_size(file, limits)
        return parse_file(file, limits.max_bytes)
    except FileNotFoundError:
        raise NotDicom("the received file is gone: send it again and retry the study") from None
    except InvalidDicomError as error:
        raise NotDicom("this is not a DICOM file: it has no DICM prefix") from error
    except PARSER_ERRORS as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not pydicom's
            raise
        raise NotDicom(f"cannot be parsed as DICOM: {words(error)}") from error


def require_size(file: Path, limits: Limits) -> None:
    """Raise TooLarge before a file is read."""
    size = file.stat().st_size
    if size > limits.max_bytes:
        raise TooLarge(
            f"a file of {size} bytes: at most {limits.max_bytes} are taken (prepare.max_megabytes)"
        )


def words(error: BaseException) -> str:
    """What went wrong, in a word or two: most errors' own words quote values, maybe a patient's."""
    if isinstance(error, RecursionError):
        return "sequences are nested too deep"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if isinstance(error, cv2.error) and lines else type(error).__name__


def display(ds: Dataset, number: int, stored: Stored) -> Float32:
    """Frame number (from 1) as displayed: 0 is black, 1 is white.

    Returns (rows, columns) for grey images, (rows, columns, 3) in RGB for colour images.
    Raises UnsupportedPixels for what has no display.
    """
    photometric = str(ds.get("PhotometricInterpretation") or "")
    if stored.cells.ndim == 3:
        return _look_up(stored, _scale_to_white(stored))
    if photometric == "PALETTE COLOR":
        return _palette(ds, stored)
    return _grey(of_frame(ds, number), stored)


def _look_up(stored: Stored, show: Step) -> Float32:
    """show() of every cell; where they are few, of every possible one instead."""
    cells = stored.cells
    if cells.dtype.kind == "f" or cells.dtype.itemsize > 2:
        return show(values_of(cells, stored)).astype(np.float32)
    cells = np.ascontiguousarray(cells).view(f"u{cells.dtype.itemsize}")
    every = np.arange(1 << 8 * cells.dtype.itemsize, dtype=cells.dtype)
    table = show(values_of(every, stored)).astype(np.float32)
    return np.asarray(cv2.LUT(cells, table.reshape(1, -1)), np.float32)


def values_of(cells: Array, stored: Stored) -> Float64:
    """The values in cells, unused bits removed, sign extended (PS3.5 8.1.1)."""
    if cells.dtype.kind == "f":
        return cells.astype(np.float64)
    unsigned = cells.view(f"u{cells.dtype.itemsize}").astype(np.uint64)
    value = (unsigned >> np.uint64(stored.shift)) & np.uint64((1 << stored.bits) - 1)
    shown = value.astype(np.float64)
    if stored.signed:
        shown = np.where(shown >= 2.0 ** (stored.bits - 1), shown - 2.0**stored.bits, shown)
    return shown


# Colour


def _scale_to_white(stored: Stored) -> Step:
    white = 2.0**stored.depth - 1
    return lambda values: np.clip(values / white, 0, 1)


def _palette(ds: Dataset, stored: Stored) -> Float32:
    """PALETTE COLOR through its three LUTs, segmented ones too (PS3.3 C.7.6.3.1.5, C.7.9)."""
    cells = np.ascontiguousarray(stored.cells)
    if cells.dtype.kind == "f" or cells.dtype.itemsize > 2:
        raise UnsupportedPixels("PALETTE COLOR of more than 16 bits cannot be shown")
    cells = cells.view(f"u{cells.dtype.itemsize}")
    every = np.arange(1 << 8 * cells.dtype.itemsize, dtype=cells.dtype)
    values = values_of(every, stored)
    if "SegmentedRedPaletteColorLookupTableData" in ds:
        colours = apply_color_lut(values.astype(np.int32), ds)[..., :3].astype(np.float64)
        colours /= (1 << int(ds.RedPaletteColorLookupTableDescriptor[2])) - 1
    else:
        planes = [_palette_plane(ds, name, values, stored) for name in ("Red", "Green", "Blue")]
        colours = np.stack(planes, -1)
    return np.asarray(colours.astype(np.float32)[cells])


def _palette_plane(ds: Dataset, name: str, values: Float64, stored: Stored) -> Float64:
    item = Dataset()
    item.LUTDescriptor = ds[f"{name}PaletteColorLookupTableDescriptor"].value
    item.add_new("LUTData", "OW", ds[f"{name}PaletteColorLookupTableData"].value)
    table, first, bits = _lut(ds, item, stored.signed)
    # Some devices declare 16 bits and fill 8: the values themselves are right.
    white = 255 if bits == 16 and table.max() < 256 else (1 << bits) - 1
    return table[_index(values, first, len(table))] / white


# Grey


def of_frame(ds: Dataset, number: int) -> Dataset:
    """What the pipeline needs to know of one frame: its functional groups' word goes first.

    Per-frame groups, else shared ones, else the object itself (PS3.3 C.7.6.16.1.1).
    """
    found = Dataset()
    for keyword in (
        "PhotometricInterpretation",
        *(f"{kind}PaddingValue" for kind in ("Pixel", *PADDING.values())),
        *(f"{kind}PaddingRangeLimit" for kind in ("Pixel", *PADDING.values())),
        *MODALITY,
        *VOI,
    ):
        if keyword in ds:
            found[keyword] = ds[keyword]
    for groups in _functional_groups(ds, number):
        for macro, keywords in MACROS.items():
            if not groups.get(macro):
                continue
            item = groups[macro].value[0]
            for keyword in keywords:
                found.pop(keyword, None)
                if keyword in item:
                    found[keyword] = item[keyword]
    found.set_original_encoding(*ds.original_encoding)
    return found


def _functional_groups(ds: Dataset, number: int) -> list[Dataset]:
    shared = ds.get("SharedFunctionalGroupsSequence") or []
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or []
    return [*shared[:1], *per_frame[number - 1 : number]]


def _grey(ds: Dataset, stored: Stored) -> Float32:
    if stored.cells.dtype.kind == "f" and not np.isfinite(stored.cells).all():
        raise UnsupportedPixels("the pixel data hold values that are no numbers")
    padding = _padding(ds, stored)
    modality = _modality(ds, stored)
    voi = _voi(ds, stored) or _own_range(modality(_occurring(stored, padding)))
    # MONOCHROME1 shows the lowest value as white, after the VOI step (PS3.3 C.7.6.3.1.2).
    inverted = ds.get("PhotometricInterpretation") == "MONOCHROME1"

    def show(values: Float64) -> Float64:
        shown = voi(modality(values))
        if inverted:
            shown = 1 - shown
        # Padding is background whatever the polarity (PS3.3 C.7.5.1.1.2).
        if padding is not None:
            shown = np.where((values >= padding[0]) & (values <= padding[1]), 0.0, shown)
        return shown

    return _look_up(stored, show)


def _occurring(stored: Stored, padding: tuple[float, float] | None) -> Float64:
    """The values that occur in the image, padding left out."""
    cells = stored.cells
    if cells.dtype.kind != "f" and cells.dtype.itemsize <= 2:
        cells = np.ascontiguousarray(cells).view(f"u{cells.dtype.itemsize}")
        size = 1 << 8 * cells.dtype.itemsize
        counts = cv2.calcHist([cells], [0], None, [size], [0, size])
        cells = np.flatnonzero(counts).astype(cells.dtype)
    values = values_of(cells, stored).ravel()
    if padding is not None:
        values = values[(values < padding[0]) | (values > padding[1])]
    return values


def _own_range(values: Float64) -> Step:
    """From the lowest value, black, to the highest, white."""
    if values.size == 0:
        return np.zeros_like
    low, high = float(values.min()), float(values.max())
    return lambda given: np.clip((given - low) / ((high - low) or 1.0), 0, 1)


def _padding(ds: Dataset, stored: Stored) -> tuple[float, float] | None:
    """Stored values that are padding, from Pixel Padding Value to Pixel Padding Range Limit."""
    kind = PADDING.get(stored.cells.dtype.str[1:], "Pixel")
    value, limit = ds.get(f"{kind}PaddingValue"), ds.get(f"{kind}PaddingRangeLimit")
    if value is None or value == "":
        return None
    ends = [value, value if limit is None or limit == "" else limit]
    values = [float(end) if kind != "Pixel" else _signed(stored, int(end)) for end in ends]
    return float(min(values)), float(max(values))


def _signed(stored: Stored, value: int) -> int:
    # Read with the wrong VR, a negative value comes as a large one, and the other way round.
    size = 1 << 8 * stored.cells.dtype.itemsize
    if stored.signed:
        return value - size if value >= size // 2 else value
    return value + size if value < 0 else value


def _modality(ds: Dataset, stored: Stored) -> Step:
    """Modality LUT Sequence, else Rescale Slope and Intercept (PS3.3 C.11.1)."""
    if ds.get("ModalityLUTSequence"):
        table, first, _ = _lut(ds, ds.ModalityLUTSequence[0], stored.signed)
        return lambda values: table[_index(values, first, len(table))]
    slope = _decimal(ds, "RescaleSlope", 1.0) or 1.0
    intercept = _decimal(ds, "RescaleIntercept", 0.0)
    return lambda values: values * slope + intercept


def _voi(ds: Dataset, stored: Stored) -> Step | None:
    """The first VOI LUT, else the first window (PS3.3 C.11.2); None where there is neither."""
    if ds.get("VOILUTSequence"):
        # A modality LUT gives unsigned values (PS3.3 C.11.1.1.1).
        signed = not ds.get("ModalityLUTSequence") and (
            stored.signed or _decimal(ds, "RescaleIntercept", 0.0) < 0
        )
        table, first, bits = _lut(ds, ds.VOILUTSequence[0], signed)
        white = (1 << bits) - 1
        return lambda values: table[_index(values, first, len(table))] / white
    center, width = _decimal(ds, "WindowCenter", None), _decimal(ds, "WindowWidth", None)
    # A width of zero or less is forbidden (PS3.3 C.11.2.1.2.1) and shows nothing: as if absent.
    if center is None or width is None or width <= 0:
        return None
    function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
    return lambda values: apply_window(values, center, width, function)


def _decimal(ds: Dataset, keyword: str, default: Any) -> Any:
    """The first value as a float."""
    value = ds.get(keyword)
    if isinstance(value, (MultiValue, list)):
        value = value[0] if value else None
    if value is None or value == "":
        return default
    number = float(value)
    if not np.isfinite(number):
        raise UnsupportedPixels(f"{keyword} is not a finite number")
    return number


def apply_window(values: Float64, center: float, width: float, function: str) -> Float64:
    """LINEAR, LINEAR_EXACT or SIGMOID to 0..1 (PS3.3 C.11.2.1.2.1, C.11.2.1.3)."""
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700))))
    if function == "LINEAR_EXACT" or width < 1:  # LINEAR is defined from a width of 1 on
        return np.clip((values - center) / width + 0.5, 0, 1)
    if width == 1:
        return np.where(values <= center - 0.5, 0.0, 1.0)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


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
        entries_as_stored = np.frombuffer(data, np.uint8 if packed else np.dtype(f"{little}u2"))
    else:
        entries_as_stored = np.atleast_1d(np.asarray(data, np.int64)).astype(np.uint16)
        if len(entries_as_stored) < entries <= 2 * len(entries_as_stored):
            entries_as_stored = entries_as_stored.view(np.uint8)  # two 8-bit entries in a word
    table = entries_as_stored[:entries].astype(np.float64)
    if table.size == 0:
        raise UnsupportedPixels("a look-up table has no entries")
    # Some devices declare fewer bits than they use: the values themselves are right.
    return table, first, max(bits, int(table.max()).bit_length())


def _index(values: Float64, first: int, entries: int) -> NDArray[np.intp]:
    index: NDArray[np.intp] = np.clip(np.rint(values) - first, 0, entries - 1).astype(np.intp)
    return index
