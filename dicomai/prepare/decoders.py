"""Which library decodes which transfer syntax, and frames as they were stored.

One table serves every transfer syntax; what is not in it is refused by name.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicomai.errors import TooLarge, UnsupportedPixels
from dicomai.parse import transfer_syntax_uid
from dicomai.study import Limits

DeflatedImageFrame = UID("1.2.840.10008.1.2.8.1")  # PS3.5 A.4.13; pydicom 3.0 does not name it
EncapsulatedUncompressed = UID("1.2.840.10008.1.2.1.98")  # PS3.5 A.4.11
PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

# Photometric Interpretation (PS3.3 C.7.6.3.1.2); the retired ones are not shown.
GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """One frame as it was stored.

    cells: (rows, columns), or (rows, columns, 3) in RGB; the value lies in the bits bits from
    shift on, what lies above and below them does not count (PS3.5 8.1.1); depth: Bits Stored
    """

    cells: Array
    bits: int
    shift: int
    signed: bool
    depth: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Image Pixel module (PS3.3 C.7.6.3): what is needed to make a frame of its bytes."""

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    high: int
    signed: bool
    photometric: str

    @property
    def frame_bytes(self) -> int:
        """One native frame; of frames of single bits the last byte may be shared."""
        return -(-self.rows * self.columns * self.samples * self.allocated // 8)


@dataclass(frozen=True, slots=True)
class Header:
    """What a compressed frame says of itself."""

    rows: int
    columns: int
    components: int
    precision: int
    is_rgb: bool | None = None
    lossless: bool = False


def layout(ds: Dataset, limits: Limits) -> Layout:
    """Read and check what the header promises, before any memory is taken for it."""
    values = {}
    for name in ("Rows", "Columns", "BitsAllocated"):
        values[name] = _number(ds, name)
    samples = _number(ds, "SamplesPerPixel", 1)
    if samples not in (1, 3):
        raise UnsupportedPixels(f"{samples} samples a pixel: 1 and 3 can be shown")
    real = "PixelData" not in ds
    allocated = values["BitsAllocated"]
    stored = allocated if real else _number(ds, "BitsStored")
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= allocated:
        raise UnsupportedPixels(f"{stored} bits stored in {allocated} allocated cannot be read")
    if values["Rows"] * values["Columns"] > limits.max_pixels:
        raise TooLarge(
            f"{values['Rows']} x {values['Columns']} pixels: at most {limits.max_pixels} are taken "
            "(prepare.max_pixels)"
        )
    photometric = str(ds.get("PhotometricInterpretation") or "").strip()
    if not photometric:
        raise UnsupportedPixels("Photometric Interpretation is missing")
    if photometric not in (GREY if samples == 1 else COLOUR):
        raise UnsupportedPixels(
            f"{samples} samples a pixel can be {', '.join(GREY if samples == 1 else COLOUR)}; "
            "Photometric Interpretation says something else"
        )
    return Layout(
        values["Rows"],
        values["Columns"],
        samples,
        allocated,
        stored,
        _number(ds, "HighBit", stored - 1),
        not real and _number(ds, "PixelRepresentation", zero=True) == 1,
        photometric,
    )


def _number(ds: Dataset, keyword: str, default: int | None = None, zero: bool = False) -> int:
    value = ds.get(keyword)
    if value is None or value == "":
        if default is None:
            raise UnsupportedPixels(f"{keyword} is missing")
        return default
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise UnsupportedPixels(f"{keyword} is not a number") from None
    if number < 0 or (number == 0 and not zero and default is None):
        raise UnsupportedPixels(f"{keyword} is {number}")
    return number


class Frames:
    """The frames of one object, decoded one at a time.

    Raises UnsupportedPixels for what the header promises and the limits forbid.
    """

    def __init__(self, ds: Dataset, limits: Limits) -> None:
        present = [keyword for keyword in PIXEL_KEYWORDS if ds.get(keyword)]
        if not present:
            raise UnsupportedPixels("the object has no pixel data", "no-pixels")
        self._ds = ds
        self._element = ds[present[0]]
        self._layout = layout(ds, limits)
        self._syntax = UID(transfer_syntax_uid(ds))
        self.count = frame_count(ds)
        self._streams: list[bytes] | None = None
        self._compressed = self._element.is_undefined_length or self._syntax in DECODERS
        if self._compressed and self._syntax not in DECODERS:
            raise UnsupportedPixels(
                f"no decoder for transfer syntax {self._syntax.name} ({self._syntax}); there are "
                "decoders for " + ", ".join(uid.name for uid in DECODERS)
            )

    @property
    def display_bytes(self) -> int:
        """What one frame takes as shown, 8 bits a sample."""
        return self._layout.rows * self._layout.columns * self._layout.samples

    def decode(self, number: int) -> Stored:
        """Frame number, from 1."""
        if not self._compressed:
            return self._native(number)
        if self._streams is None:
            self._streams = list(
                generate_frames(
                    self._element.value,
                    number_of_frames=self.count,
                    extended_offsets=_extended_offsets(self._ds),
                )
            )
        if number > len(self._streams):
            raise UnsupportedPixels(
                f"the pixel data end before frame {number} of {self.count}", "truncated"
            )
        return DECODERS[self._syntax].decode(self._streams[number - 1], self._layout)

    def _native(self, number: int) -> Stored:
        shape = self._layout
        bits = shape.rows * shape.columns * shape.samples * shape.allocated
        if shape.photometric == "YBR_FULL_422":
            bits = bits * 2 // 3  # two pixels share their chrominance
        end, there = -(-bits * number // 8), len(self._element.value)
        if end > there:
            raise UnsupportedPixels(
                f"the pixel data are truncated: {there} bytes, frame {number} of {self.count} ends "
                f"at {end}",
                "truncated",
            )
        if shape.allocated == 1:  # pydicom 3.0 loses the last bits of some frames
            data = self._element.value
            if not self._syntax.is_little_endian and self._element.VR == "OW":
                data = np.frombuffer(data[: len(data) // 2 * 2], "u2").byteswap().tobytes()
            return _stored(_unpack(data, bits * (number - 1), shape), shape)
        options: Any = {
            "view_only": True,  # the look-up table takes care of unused bits, without a copy
            "correct_unused_bits": False,
            "number_of_frames": self.count,
            "rows": shape.rows,
            "columns": shape.columns,
            "samples_per_pixel": shape.samples,
            "bits_allocated": shape.allocated,
            "bits_stored": shape.stored,
            "pixel_representation": int(shape.signed),
            "photometric_interpretation": shape.photometric,
            "planar_configuration": int(self._ds.get("PlanarConfiguration") or 0),
            "pixel_keyword": self._element.keyword,
            # 8-bit cells in 16-bit words of a big endian file stand in pairs (PS3.5 8.1.2).
            "be_swap_ow": not self._syntax.is_little_endian
            and shape.allocated == 8
            and self._element.VR == "OW",
        }
        cells, _ = get_decoder(self._syntax).as_array(
            self._element.value, index=number - 1, raw=True, validate=False, **options
        )
        return _stored(_rgb(cells, shape), shape)


def frame_count(ds: Dataset) -> int:
    """Number of Frames (0028,0008); 1 where it is absent, its leading digits where it is invalid.

    DCMTK reads it so, too.
    """
    text = str(ds.get("NumberOfFrames") or "").strip()
    digits = text[: next((i for i, c in enumerate(text) if not c.isdigit()), len(text))]
    return max(1, int(digits or 1))


def _extended_offsets(ds: Dataset) -> tuple[bytes, bytes] | None:
    if "ExtendedOffsetTable" in ds and "ExtendedOffsetTableLengths" in ds:
        return ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths
    return None


def _stored(cells: Array, shape: Layout, precision: int | None = None) -> Stored:
    """precision: the code stream's; None: Bits Stored and High Bit say where the value lies."""
    if not cells.dtype.isnative:
        cells = cells.astype(cells.dtype.newbyteorder("="))
    if precision is not None:
        return Stored(cells, precision, 0, shape.signed, shape.stored)
    shift = max(0, min(shape.high + 1, shape.allocated) - shape.stored)
    return Stored(cells, shape.stored, shift, shape.signed, shape.stored)


def _rgb(cells: Array, shape: Layout) -> Array:
    """YBR_FULL (PS3.3 C.7.6.3.1.2), which is the YCbCr of JPEG, as RGB; (rows, columns, 3)."""
    if shape.samples != 3 or shape.photometric not in {"YBR_FULL", "YBR_FULL_422"}:
        return cells
    if cells.dtype.itemsize > 2:
        raise UnsupportedPixels("YBR_FULL of more than 16 bits cannot be shown")
    native = cells.astype(f"=u{cells.dtype.itemsize}")
    y_cr_cb = np.ascontiguousarray(native[..., [0, 2, 1]])
    return np.asarray(cv2.cvtColor(y_cr_cb, cv2.COLOR_YCrCb2RGB))


# Compressed frames


@dataclass(frozen=True, slots=True)
class Decoder:
    """How one transfer syntax is decoded.

    header: reads the code stream's own account; None where it has none
    run: (code stream, layout, header) to cells
    exact: the cells are those of a native image, as Bits Stored and High Bit describe them;
    otherwise they may lie somewhat outside, and are values as they are
    """

    library: str
    run: Callable[[bytes, Layout, Header | None], Array]
    header: Callable[[bytes], Header] | None
    exact: bool

    def decode(self, stream: bytes, shape: Layout) -> Stored:
        """One code stream; refused where it is not the image that the header describes."""
        header = self.header(stream) if self.header else None
        if header is not None and (header.rows, header.columns, header.components) != (
            shape.rows,
            shape.columns,
            shape.samples,
        ):
            raise UnsupportedPixels(
                f"the compressed image has {header.rows} x {header.columns} pixels of "
                f"{header.components} samples, the header says {shape.rows} x {shape.columns} of "
                f"{shape.samples}"
            )
        try:
            cells = self.run(stream, shape, header)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedPixels(f"{self.library} cannot decode the frame ({error})") from error
        wanted = (shape.rows, shape.columns) + ((3,) if shape.samples == 3 else ())
        if cells.shape != wanted:
            raise UnsupportedPixels(f"the decoder gave {cells.shape} instead of {wanted}")
        precision = None
        if header is not None and (not self.exact or header.precision < shape.stored):
            precision = header.precision
        return _stored(cells, shape, precision)


def _jpeg(stream: bytes, shape: Layout, header: Header | None) -> Array:
    """JPEG of 8, 12 and up to 16 bits; colour comes out as RGB."""
    if shape.samples == 1:
        return imagecodecs.jpeg8_decode(stream)
    if header and header.lossless:  # libjpeg-turbo does not convert colour there
        cells = imagecodecs.jpeg8_decode(stream, colorspace="RGB", outcolorspace="RGB")
        return _rgb(cells, shape)
    # Photometric Interpretation decides (PS3.5 8.2.1), unless the stream says what it is.
    says = header.is_rgb if header else None
    is_rgb = shape.photometric == "RGB" if says is None else says
    return imagecodecs.jpeg8_decode(
        stream, colorspace="RGB" if is_rgb else "YCBCR", outcolorspace="RGB"
    )


def _jpeg_ls(stream: bytes, shape: Layout, _header: Header | None) -> Array:
    return _rgb(imagecodecs.jpegls_decode(stream), shape)


def _jpeg_2000(stream: bytes, shape: Layout, _header: Header | None) -> Array:
    return _rgb(imagecodecs.jpeg2k_decode(stream, numthreads=1), shape)


def _rle(stream: bytes, shape: Layout, _header: Header | None) -> Array:
    """PS3.5 annex G: a segment for each byte of each sample, so planes come out."""
    dtype = np.dtype(f"u{max(1, shape.allocated // 8)}")
    planes = imagecodecs.dicomrle_decode(stream, dtype, out=shape.frame_bytes)
    return _native_cells(np.frombuffer(planes, np.uint8), shape, planar=True)


def _encapsulated(stream: bytes, shape: Layout, _header: Header | None) -> Array:
    """PS3.5 A.4.11: each fragment is a native frame."""
    frame = np.frombuffer(stream, np.uint8)[: shape.frame_bytes]
    if len(frame) < shape.frame_bytes:
        raise UnsupportedPixels("a frame is truncated", "truncated")
    return _native_cells(frame, shape, planar=False)


def _deflated(stream: bytes, shape: Layout, _header: Header | None) -> Array:
    """PS3.5 A.4.13: each frame is a native frame, deflated (RFC 1951)."""
    frame = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream, shape.frame_bytes)
    if len(frame) < shape.frame_bytes:
        raise UnsupportedPixels("a deflated frame is truncated", "truncated")
    return _native_cells(np.frombuffer(frame, np.uint8), shape, planar=False)


def _native_cells(data: NDArray[np.uint8], shape: Layout, planar: bool) -> Array:
    if shape.allocated == 1:
        return _unpack(data.tobytes(), 0, shape)
    cells = data.view(f"<u{shape.allocated // 8}")
    if shape.samples == 1:
        return cells.reshape(shape.rows, shape.columns)
    if planar:
        return _rgb(cells.reshape(3, shape.rows, shape.columns).transpose(1, 2, 0), shape)
    return _rgb(cells.reshape(shape.rows, shape.columns, 3), shape)


def _unpack(data: bytes, first: int, shape: Layout) -> Array:
    """Single bits from bit first on: the lowest of a byte comes first (PS3.5 8.1.1)."""
    size = shape.rows * shape.columns * shape.samples
    part = np.frombuffer(data, np.uint8)[first // 8 : (first + size + 7) // 8]
    bits = np.unpackbits(part, bitorder="little")[first % 8 : first % 8 + size]
    return bits.reshape(shape.rows, shape.columns)


def jpeg_header(stream: bytes) -> Header:
    """The first frame header of JPEG (T.81 B.2.2) or JPEG-LS (T.87 C.2.2); both look alike."""
    jfif = adobe = None
    place = 2
    while stream[:2] == b"\xff\xd8" and place + 9 < len(stream):
        if stream[place + 1] == 0xFF:  # fill bytes may precede a marker (T.81 B.1.1.2)
            place += 1
            continue
        marker, length = struct.unpack_from(">HH", stream, place)
        body = stream[place + 4 : place + 2 + length]
        if marker == 0xFFE0 and body.startswith(b"JFIF"):
            jfif = True
        elif marker == 0xFFEE and body.startswith(b"Adobe") and len(body) > 11:
            adobe = body[11]
        elif (0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC)) or (
            marker == 0xFFF7
        ):
            precision, rows, columns, components = struct.unpack_from(">BHHB", body)
            # Coded data never hold FF D9 (T.81 B.1.1.5); libjpeg would fill up with grey.
            if stream.find(b"\xff\xd9", place) < 0:
                raise UnsupportedPixels(
                    "the compressed image is truncated: it has no end (EOI marker)", "truncated"
                )
            names = bytes(body[6::3][:components])
            is_rgb: bool | None = None
            if names in (b"RGB", b"rgb") or adobe == 0:
                is_rgb = True
            elif jfif or adobe == 1:
                is_rgb = False
            return Header(rows, columns, components, precision, is_rgb, marker == 0xFFC3)
        place += 2 + length
    raise UnsupportedPixels("the compressed image has no frame header")


def jpeg_2000_header(stream: bytes) -> Header:
    """The SIZ marker segment (T.800 A.5.1), also inside a JP2 file, which does not belong here."""
    start = stream.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start < 0 or len(stream) < start + 44:
        raise UnsupportedPixels("the compressed image has no SIZ marker")
    size_x, size_y, from_x, from_y = struct.unpack_from(">4I", stream, start + 8)
    (components,) = struct.unpack_from(">H", stream, start + 40)
    return Header(size_y - from_y, size_x - from_x, components, (stream[start + 42] & 0x7F) + 1)


# The fastest that is right on every file of the test set, measured on 2500 x 2048 pixels of 12 bits
# on one core beside what pydicom knows: JPEG Lossless 35 ms (pylibjpeg 172), JPEG-LS 79 (pyjpegls
# 191, pylibjpeg 482), JPEG 2000 459 (the same library in both). Of JPEG Extended, the others do not
# decode what has the spectral selection of a progressive scan. OpenJPH takes 25 ms for HTJ2K where
# OpenJPEG takes 57, but imagecodecs 2026.3 passes over its errors and returns memory as it was.
_TURBO = "imagecodecs (libjpeg-turbo)"
_OPENJPEG = "imagecodecs (OpenJPEG)"
_CHARLS = "imagecodecs (CharLS)"
DECODERS: Mapping[UID, Decoder] = {
    JPEGBaseline8Bit: Decoder(_TURBO, _jpeg, jpeg_header, exact=False),
    JPEGExtended12Bit: Decoder(_TURBO, _jpeg, jpeg_header, exact=False),
    JPEGLossless: Decoder(_TURBO, _jpeg, jpeg_header, exact=True),
    JPEGLosslessSV1: Decoder(_TURBO, _jpeg, jpeg_header, exact=True),
    JPEGLSLossless: Decoder(_CHARLS, _jpeg_ls, jpeg_header, exact=True),
    JPEGLSNearLossless: Decoder(_CHARLS, _jpeg_ls, jpeg_header, exact=False),
    JPEG2000Lossless: Decoder(_OPENJPEG, _jpeg_2000, jpeg_2000_header, exact=True),
    JPEG2000: Decoder(_OPENJPEG, _jpeg_2000, jpeg_2000_header, exact=False),
    HTJ2KLossless: Decoder(_OPENJPEG, _jpeg_2000, jpeg_2000_header, exact=True),
    HTJ2KLosslessRPCL: Decoder(_OPENJPEG, _jpeg_2000, jpeg_2000_header, exact=True),
    HTJ2K: Decoder(_OPENJPEG, _jpeg_2000, jpeg_2000_header, exact=False),
    RLELossless: Decoder("imagecodecs", _rle, None, exact=True),
    DeflatedImageFrame: Decoder("zlib", _deflated, None, exact=True),
    EncapsulatedUncompressed: Decoder("numpy", _encapsulated, None, exact=True),
}
