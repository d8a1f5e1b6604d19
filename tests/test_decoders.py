"""Every transfer syntax gives back what went in; a header or code stream that lies is refused."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import make
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicomai.errors import Rejected, TooLarge, UnsupportedPixels
from dicomai.prepare import image
from dicomai.prepare.decoders import (
    DECODERS,
    DeflatedImageFrame,
    EncapsulatedUncompressed,
    Frames,
    frame_count,
)
from dicomai.prepare.pixels import values_of
from dicomai.study import Limits

UNKNOWN = {DeflatedImageFrame, EncapsulatedUncompressed}  # to pydicom
SPECTRAL_SELECTION = "1.2.840.10008.1.2.4.53"  # JPEG processes 6 and 8, retired
LIMITS = Limits(max_pixels=1_000_000, max_bytes=10_000_000, max_frames=10)
GREY = np.random.default_rng(1).integers(0, 4096, (40, 30)).astype(np.uint16)
RGB = np.random.default_rng(2).integers(0, 256, (40, 30, 3)).astype(np.uint8)
SMOOTH = (np.add.outer(np.arange(40), np.arange(30)) * 50).astype(np.uint16)


def described(cells: NDArray[Any], bits: int, frames: int = 1, **attributes: Any) -> Dataset:
    """An image without pixels: cells is one frame of it."""
    ds = make.chest_radiograph()
    ds.Rows, ds.Columns = cells.shape[:2]
    ds.SamplesPerPixel = 1 if cells.ndim == 2 else 3
    ds.PhotometricInterpretation = "MONOCHROME2" if cells.ndim == 2 else "RGB"
    if cells.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * cells.dtype.itemsize, bits, bits - 1
    ds.PixelRepresentation = int(cells.dtype.kind == "i")
    if frames > 1:
        ds.NumberOfFrames = frames
    del ds["WindowCenter"], ds["WindowWidth"]
    return make.change(ds, attributes)


def reread(ds: Dataset) -> Dataset:
    """As it comes from a file."""
    buffer = io.BytesIO()
    ds.preamble = b"\0" * 128
    if ds.file_meta.TransferSyntaxUID in UNKNOWN:
        how = {"force_encoding": True, "implicit_vr": False, "little_endian": True}
    else:
        how = {"enforce_file_format": True}
    pydicom.dcmwrite(buffer, ds, **how)
    return pydicom.dcmread(io.BytesIO(buffer.getvalue()))


def compressed(ds: Dataset, syntax: str, *streams: bytes) -> Dataset:
    """The image with these code streams, a frame each."""
    ds.PixelData = encapsulate(list(streams))
    ds["PixelData"].is_undefined_length = True
    ds["PixelData"].VR = "OB"
    ds.file_meta.TransferSyntaxUID = syntax
    return reread(ds)


def native(
    ds: Dataset, data: bytes, syntax: str = ExplicitVRLittleEndian, vr: str = "OW"
) -> Dataset:
    """The image with native pixel data."""
    ds.PixelData = data
    ds["PixelData"].VR = vr
    ds.file_meta.TransferSyntaxUID = syntax
    return reread(ds)


def values(ds: Dataset, number: int = 1) -> NDArray[np.float64]:
    """The stored values of a frame."""
    stored = Frames(ds, LIMITS).decode(number)
    return values_of(stored.cells, stored)


def rle(cells: NDArray[Any]) -> bytes:
    """PS3.5 annex G, by pydicom."""
    ds = native(described(cells, 8 * cells.dtype.itemsize), cells.tobytes())
    ds.compress(RLELossless)
    return next(iter(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1)))


def deflated(cells: NDArray[Any]) -> bytes:
    """A native frame, deflated without a header."""
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(cells.tobytes()) + deflater.flush()


def j2k(cells: NDArray[Any], **how: Any) -> bytes:
    """JPEG 2000, reversible, no JP2 around it."""
    return bytes(
        imagecodecs.jpeg2k_encode(cells, codecformat="j2k", reversible=True, level=0, **how)
    )


LOSSLESS: dict[str, Callable[[NDArray[Any]], bytes]] = {
    JPEGLossless: lambda c: bytes(imagecodecs.ljpeg_encode(c, bitspersample=16)),
    JPEGLosslessSV1: lambda c: bytes(imagecodecs.jpeg8_encode(c, lossless=True, bitspersample=16)),
    JPEGLSLossless: lambda c: bytes(imagecodecs.jpegls_encode(c)),
    JPEGLSNearLossless: lambda c: bytes(imagecodecs.jpegls_encode(c)),
    JPEG2000Lossless: j2k,
    JPEG2000: j2k,
    HTJ2KLossless: lambda c: bytes(imagecodecs.htj2k_encode(c, reversible=True)),
    HTJ2KLosslessRPCL: lambda c: bytes(imagecodecs.htj2k_encode(c, reversible=True)),
    HTJ2K: lambda c: bytes(imagecodecs.htj2k_encode(c, reversible=True)),
    RLELossless: rle,
    DeflatedImageFrame: deflated,
}


# What goes in comes out


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: UID(uid).keyword)
def test_a_lossless_syntax_gives_back_every_value(syntax: str) -> None:
    ds = compressed(described(GREY, 12), syntax, LOSSLESS[syntax](GREY))
    np.testing.assert_array_equal(values(ds), GREY)


@pytest.mark.parametrize(
    "syntax", [s for s in LOSSLESS if s != JPEGLossless], ids=lambda uid: UID(uid).keyword
)
def test_negative_values_survive_whatever_the_code_stream_knows_of_signs(syntax: str) -> None:
    signed = GREY.astype(np.int16) - 2048
    # A JPEG or JPEG-LS stream has no sign: the cells go in as they lie in memory (PS3.5 8.2).
    cells = signed if syntax in (JPEG2000, JPEG2000Lossless) else signed.view(np.uint16)
    ds = compressed(described(signed, 16), syntax, LOSSLESS[syntax](cells))
    np.testing.assert_array_equal(values(ds), signed)


def test_an_unsigned_jpeg_2000_stream_of_a_signed_image_is_sign_extended() -> None:
    signed = GREY.astype(np.int16) - 2048
    cells = (signed & 0x0FFF).astype(np.uint16)
    ds = compressed(described(signed, 12), JPEG2000Lossless, j2k(cells, bitspersample=12))
    np.testing.assert_array_equal(values(ds), signed)


@pytest.mark.parametrize("bits", [8, 12])
def test_jpeg_extended_may_have_12_bits(bits: int) -> None:
    cells = (SMOOTH >> (12 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    stream = bytes(imagecodecs.jpeg8_encode(cells, level=98, bitspersample=bits))
    ds = compressed(described(cells, bits), JPEGExtended12Bit, stream)
    assert np.abs(values(ds) - cells).max() <= 1 << (bits - 7)


@pytest.mark.parametrize(
    ("syntax", "vr"),
    [
        (ImplicitVRLittleEndian, "OW"),
        (ExplicitVRLittleEndian, "OW"),
        (DeflatedExplicitVRLittleEndian, "OW"),
        (ExplicitVRBigEndian, "OW"),
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4"])
def test_native_cells_of_every_width_and_byte_order(syntax: str, vr: str, dtype: str) -> None:
    cells = (GREY >> 4).astype(dtype) - (100 if dtype == "i2" else 0)
    little = syntax != ExplicitVRBigEndian
    data = cells.astype(f"{'<' if little else '>'}{dtype}").tobytes()
    if not little and dtype == "u1":
        # Words of OW hold two cells, the first one in the low byte (PS3.5 8.1.2).
        data = np.frombuffer(data, "<u2").astype(">u2").tobytes()
    ds = native(described(cells, 8 * cells.dtype.itemsize), data, syntax, vr)
    np.testing.assert_array_equal(values(ds), cells)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, DeflatedImageFrame])
def test_single_bits_are_unpacked_also_where_frames_do_not_end_with_a_byte(syntax: str) -> None:
    bits = np.random.default_rng(5).integers(0, 2, (3, 5, 7)).astype(np.uint8)
    ds = described(bits[0], 1, frames=3, BitsAllocated=1)
    if syntax == ExplicitVRLittleEndian:
        packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
        ds = native(ds, packed, vr="OB")
    else:
        # A compressed frame begins with a byte of its own.
        each = [np.packbits(frame.ravel(), bitorder="little") for frame in bits]
        ds = compressed(ds, syntax, *[LOSSLESS[syntax](frame[None]) for frame in each])
    for number, frame in enumerate(bits, 1):
        np.testing.assert_array_equal(values(ds, number), frame)


def test_cells_may_lie_in_the_upper_bits_with_an_overlay_below() -> None:
    shifted = (GREY << 4) | np.uint16(0x0005)
    ds = native(described(GREY, 12, HighBit=15), shifted.tobytes())
    np.testing.assert_array_equal(values(ds), GREY)


# Frames


@pytest.mark.parametrize("encapsulated", [True, False])
def test_every_frame_is_found_by_its_number(encapsulated: bool) -> None:
    frames = [GREY + np.uint16(i) for i in range(4)]
    ds = described(GREY, 13, frames=4)
    if encapsulated:
        ds = compressed(ds, JPEGLSLossless, *[LOSSLESS[JPEGLSLossless](f) for f in frames])
    else:
        ds = native(ds, b"".join(f.tobytes() for f in frames))
    for number in (4, 1, 3, 2):
        np.testing.assert_array_equal(values(ds, number), frames[number - 1])


def test_one_frame_may_lie_in_several_fragments() -> None:
    ds = described(GREY, 12)
    stream = LOSSLESS[JPEGLSLossless](GREY)
    ds.PixelData = encapsulate([stream], fragments_per_frame=3)
    ds["PixelData"].is_undefined_length, ds["PixelData"].VR = True, "OB"
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless
    np.testing.assert_array_equal(values(reread(ds)), GREY)


def test_an_extended_offset_table_is_used() -> None:
    frames = [GREY, GREY[::-1].copy()]
    ds = described(GREY, 12, frames=2)
    data, offsets, lengths = encapsulate_extended([LOSSLESS[JPEGLSLossless](f) for f in frames])
    ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = data, offsets, lengths
    ds["PixelData"].is_undefined_length, ds["PixelData"].VR = True, "OB"
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless
    np.testing.assert_array_equal(values(reread(ds), 2), frames[1])


@pytest.mark.parametrize(
    ("text", "count"), [("", 1), ("1A", 1), ("15", 15), (" 7 ", 7), ("x", 1), ("0", 1), ("-3", 1)]
)
def test_a_number_of_frames_that_is_none_counts_as_its_leading_digits(
    text: str, count: int
) -> None:
    ds = Dataset()
    ds.add_new("NumberOfFrames", "LO", text)
    assert frame_count(ds) == count


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless])
def test_a_lossless_stream_of_whole_cells_holds_its_values_where_the_header_says(
    syntax: str,
) -> None:
    # DCMTK's dcmcjpls encodes Bits Allocated, whatever Bits Stored says.
    upper = (GREY << 4) | np.uint16(0x0005)
    ds = compressed(described(GREY, 12, HighBit=15), syntax, LOSSLESS[syntax](upper))
    np.testing.assert_array_equal(values(ds), GREY)
    overlaid = GREY | np.uint16(0x1000)
    ds = compressed(described(GREY, 12), syntax, LOSSLESS[syntax](overlaid))
    np.testing.assert_array_equal(values(ds), GREY)
    signed = GREY.astype(np.int16) - 2048
    ds = described(signed, 12)
    ds = compressed(ds, syntax, LOSSLESS[syntax]((signed & 0x0FFF).astype(np.uint16)))
    np.testing.assert_array_equal(values(ds), signed)


def test_a_frame_may_lie_uncompressed_in_its_fragment() -> None:
    frames = [GREY, GREY[::-1].copy()]
    ds = described(GREY, 12, frames=2)
    ds = compressed(ds, EncapsulatedUncompressed, *[frame.tobytes() for frame in frames])
    np.testing.assert_array_equal(values(ds, 2), frames[1])


def test_fill_bytes_may_precede_a_marker() -> None:
    stream = LOSSLESS[JPEGLosslessSV1](GREY)
    filled = stream[:2] + b"\xff\xff" + stream[2:]
    ds = compressed(described(GREY, 12), JPEGLosslessSV1, filled)
    np.testing.assert_array_equal(values(ds), GREY)


# Colour


def shown(ds: Dataset) -> NDArray[np.float32]:
    """The display in levels of 255."""
    return image.show(ds, Frames(ds, LIMITS), 1) * 255


@pytest.mark.parametrize(
    "syntax",
    [s for s in LOSSLESS if s not in (JPEGLossless, JPEGLosslessSV1)],
    ids=lambda uid: UID(uid).keyword,
)
def test_rgb_comes_out_as_it_went_in(syntax: str) -> None:
    ds = compressed(described(RGB, 8), syntax, LOSSLESS[syntax](RGB))
    np.testing.assert_allclose(shown(ds), RGB, atol=1e-4)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("bits", [8, 16])
def test_native_rgb_by_pixel_and_by_plane(planar: int, syntax: str, bits: int) -> None:
    cells = RGB if bits == 8 else RGB.astype(np.uint16) * 257
    data = cells.transpose(2, 0, 1) if planar else cells
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    ds = native(
        described(cells, bits, PlanarConfiguration=planar),
        data.astype(f"{order}u{bits // 8}").tobytes(),
        syntax,
        "OB" if bits == 8 else "OW",
    )
    np.testing.assert_allclose(shown(ds), RGB, atol=1e-4)


def ybr(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """PS3.3 C.7.6.3.1.2, YBR_FULL, word by word."""
    r, g, b = np.moveaxis(rgb.astype(float), -1, 0)
    planes = (
        0.2990 * r + 0.5870 * g + 0.1140 * b,
        -0.1687 * r - 0.3313 * g + 0.5000 * b + 128,
        0.5000 * r - 0.4187 * g - 0.0813 * b + 128,
    )
    return np.clip(np.rint(np.stack(planes, -1)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLSLossless])
def test_ybr_full_becomes_rgb(syntax: str) -> None:
    cells = ybr(RGB)
    ds = described(RGB, 8, PhotometricInterpretation="YBR_FULL")
    if syntax == ExplicitVRLittleEndian:
        ds = native(ds, cells.tobytes(), vr="OB")
    else:
        ds = compressed(ds, syntax, LOSSLESS[syntax](cells))
    assert np.abs(shown(ds) - RGB).max() <= 2.01  # the YBR values were rounded


def test_native_ybr_full_422_shares_chrominance_between_two_pixels() -> None:
    pairs = np.repeat(RGB[:, ::2], 2, axis=1)  # equal neighbours lose nothing
    cells = ybr(pairs)
    data = np.stack([cells[:, ::2, 0], cells[:, 1::2, 0], cells[:, ::2, 1], cells[:, ::2, 2]], -1)
    ds = native(
        described(pairs, 8, PhotometricInterpretation="YBR_FULL_422"), data.tobytes(), vr="OB"
    )
    assert np.abs(shown(ds) - pairs).max() <= 2.01


@pytest.mark.parametrize(
    ("photometric", "colorspace"),
    [("YBR_FULL_422", "YCBCR"), ("YBR_FULL", "YCBCR"), ("RGB", "RGB")],
)
def test_photometric_interpretation_says_what_a_jpeg_holds(
    photometric: str, colorspace: str
) -> None:
    smooth = np.stack([SMOOTH >> 4, SMOOTH[::-1] >> 4, SMOOTH[:, ::-1] >> 4], -1).astype(np.uint8)
    stream = bytes(
        imagecodecs.jpeg8_encode(smooth, level=98, outcolorspace=colorspace, subsampling="444")
    )
    ds = described(smooth, 8, PhotometricInterpretation=photometric)
    ds = compressed(ds, JPEGBaseline8Bit, stream)
    assert np.abs(shown(ds) - smooth).mean() < 1.5


@pytest.mark.parametrize("photometric", ["YBR_RCT", "YBR_ICT"])
def test_jpeg_2000_undoes_its_own_colour_transform(photometric: str) -> None:
    stream = j2k(RGB, mct=True)
    ds = described(RGB, 8, PhotometricInterpretation=photometric)
    np.testing.assert_allclose(shown(compressed(ds, JPEG2000Lossless, stream)), RGB, atol=1e-4)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEGLSLossless, JPEG2000Lossless])
def test_white_is_what_bits_stored_can_hold(syntax: str) -> None:
    cells = RGB.astype(np.uint16) * 16 + 15  # 12 of 16 bits
    ds = described(cells, 12)
    if syntax == ExplicitVRLittleEndian:
        ds = native(ds, cells.tobytes())
    else:
        ds = compressed(ds, syntax, LOSSLESS[syntax](cells))
    np.testing.assert_allclose(shown(ds), cells / 4095 * 255, atol=1e-4)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_lossless_jpeg_in_colour_is_what_photometric_interpretation_says(photometric: str) -> None:
    cells = RGB if photometric == "RGB" else ybr(RGB)
    stream = bytes(
        imagecodecs.jpeg8_encode(cells, lossless=True, colorspace="RGB", outcolorspace="RGB")
    )
    ds = described(RGB, 8, PhotometricInterpretation=photometric)
    ds = compressed(ds, JPEGLosslessSV1, stream)
    assert np.abs(shown(ds) - RGB).max() <= (0.001 if photometric == "RGB" else 2.01)


@pytest.mark.parametrize("photometric", ["HSV", "CMYK", "YBR_PARTIAL_422", "MONOCHROME2"])
def test_three_samples_of_another_kind_are_refused(photometric: str) -> None:
    ds = native(described(RGB, 8), RGB.tobytes(), vr="OB")
    ds.PhotometricInterpretation = photometric
    with pytest.raises(UnsupportedPixels, match="3 samples a pixel can be RGB"):
        Frames(ds, LIMITS)


def palette(ds: Dataset, tables: NDArray[Any], first: int = 0, bits: int = 16) -> Dataset:
    """Palette Color Lookup Tables of (entries, 3) values."""
    ds.PhotometricInterpretation = "PALETTE COLOR"
    for name, table in zip(("Red", "Green", "Blue"), tables.T, strict=True):
        descriptor = [len(table) % 65536, first, bits]
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", descriptor)
        data = table.astype("<u2").tobytes()
        setattr(ds, f"{name}PaletteColorLookupTableData", data)
    return ds


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_palette_colour_looks_up_each_value(dtype: type) -> None:
    tables = np.random.default_rng(4).integers(0, 65536, (256, 3))
    cells = (GREY >> 4).astype(dtype)
    ds = native(palette(described(cells, 8 * cells.dtype.itemsize), tables), cells.tobytes())
    np.testing.assert_allclose(shown(ds), tables[cells] / 65535 * 255, atol=1e-4)


def test_a_palette_may_hold_8_bit_entries_in_words_or_packed_in_any_number() -> None:
    cells = (GREY >> 4).astype(np.uint8)
    ramp = np.arange(255, -1, -1)[:, None].repeat(3, 1)
    ds = native(palette(described(cells, 8), ramp, bits=8), cells.tobytes(), vr="OB")
    np.testing.assert_allclose(shown(ds), ramp[cells], atol=1e-4)
    for entries in (256, 255):
        for name in ("Red", "Green", "Blue"):
            descriptor = [entries, 0, 8]
            setattr(ds, f"{name}PaletteColorLookupTableDescriptor", descriptor)
            data = ramp[:entries, 0].astype("u1").tobytes()
            setattr(ds, f"{name}PaletteColorLookupTableData", data + b"\0" * (entries % 2))
        expected = ramp[np.minimum(cells, entries - 1)]
        np.testing.assert_allclose(shown(ds), expected, atol=1e-4)


def test_values_outside_a_palette_take_its_ends() -> None:
    tables = np.arange(256)[:, None].repeat(3, 1) * 257
    ds = native(palette(described(GREY, 12), tables, first=100), GREY.tobytes())
    expected = np.clip(GREY.astype(int) - 100, 0, 255)[..., None].repeat(3, -1)
    np.testing.assert_allclose(shown(ds), expected, atol=1e-4)


def test_a_palette_of_a_big_endian_file_is_big_endian() -> None:
    tables = np.random.default_rng(4).integers(0, 65536, (256, 3))
    cells = (GREY >> 4).astype(np.uint16)
    ds = palette(described(cells, 16), tables)
    for name, table in zip(("Red", "Green", "Blue"), tables.T, strict=True):
        setattr(ds, f"{name}PaletteColorLookupTableData", table.astype(">u2").tobytes())
    ds = native(ds, cells.astype(">u2").tobytes(), ExplicitVRBigEndian)
    np.testing.assert_allclose(shown(ds), tables[cells] / 65535 * 255, atol=1e-4)


def test_a_segmented_palette_is_expanded() -> None:
    cells = (GREY >> 4).astype(np.uint8)
    ds = native(described(cells, 8), cells.tobytes(), vr="OB")
    ds.PhotometricInterpretation = "PALETTE COLOR"
    # One discrete entry, then a linear segment of 255 to 65535 (PS3.3 C.7.9.2).
    segments = struct.pack("<6H", 0, 1, 0, 1, 255, 65535)
    for name in ("Red", "Green", "Blue"):
        ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        setattr(ds, f"Segmented{name}PaletteColorLookupTableData", segments)
    expected = np.repeat(cells[..., None], 3, -1)
    np.testing.assert_allclose(shown(reread(ds)), expected, atol=0.01)


# What is refused


@pytest.mark.parametrize(
    ("keyword", "vr"), [("WindowCenter", "LO"), ("RescaleSlope", "LO"), ("PixelPaddingValue", "LO")]
)
def test_a_reason_quotes_no_value(keyword: str, vr: str) -> None:
    ds = native(described(GREY, 12, WindowWidth="100", WindowCenter="50"), GREY.tobytes())
    ds.add_new(keyword, vr, "DOE^JOHN")
    assert "DOE" not in str(refusal(ds))


def refusal(ds: Dataset, number: int = 1) -> Rejected:
    """Why a frame has no picture."""
    with pytest.raises(Rejected) as caught:
        image.show(ds, Frames(ds, LIMITS), number)
    return caught.value


def test_a_header_that_promises_more_than_the_limit_is_refused_before_anything_is_read() -> None:
    ds = native(described(GREY, 12), GREY.tobytes())
    ds.Rows, ds.Columns = 46341, 46341
    with pytest.raises(TooLarge, match=r"46341 x 46341.*prepare\.max_pixels"):
        Frames(ds, LIMITS)


@pytest.mark.parametrize("syntax", [s for s in LOSSLESS if DECODERS[UID(s)].header])
def test_a_code_stream_of_another_size_than_the_header_is_refused_before_it_is_decoded(
    syntax: str,
) -> None:
    other = np.zeros((20, 30), np.uint16)
    ds = compressed(described(GREY, 12), syntax, LOSSLESS[syntax](other))
    assert "20 x 30" in str(refusal(ds))


def test_missing_frames_are_named() -> None:
    ds = described(GREY, 12, frames=3)
    ds = compressed(ds, JPEGLSLossless, *[LOSSLESS[JPEGLSLossless](GREY)] * 2)
    np.testing.assert_array_equal(values(ds, 2), GREY)
    assert refusal(ds, 3).code == "truncated"


def test_native_pixels_that_end_too_early_are_named() -> None:
    ds = native(described(GREY, 12, frames=2), GREY.tobytes() + GREY.tobytes()[:-2])
    np.testing.assert_array_equal(values(ds, 1), GREY)
    found = refusal(ds, 2)
    assert found.code == "truncated"
    assert "4798 bytes" in str(found)


def rendered(ds: Dataset, folder: Path) -> list[image.Rendered]:
    """What render() says of every frame."""
    (file,) = make.save(folder, [ds])
    return list(image.render(file, folder / "out", LIMITS))


def test_rendering_ends_with_the_pixels_whatever_the_number_of_frames_promises(
    tmp_path: Path,
) -> None:
    found = rendered(native(described(GREY, 12, frames=2_000_000_000), GREY.tobytes()), tmp_path)
    assert [(frame.number, frame.path is not None) for frame in found] == [(1, True), (2, False)]


def test_rendering_ends_at_the_most_frames_that_the_settings_allow(tmp_path: Path) -> None:
    one = np.zeros((1, 1), np.uint8)
    found = rendered(native(described(one, 8, frames=100_000), bytes(100_000), vr="OB"), tmp_path)
    assert len(found) == LIMITS.max_frames + 1
    assert "prepare.max_frames" in str(found[-1].reason)


def test_native_pixels_that_go_on_too_long_are_cut() -> None:
    ds = native(described(GREY, 12), GREY.tobytes() * 3)
    np.testing.assert_array_equal(values(ds), GREY)


def test_a_deflated_frame_is_inflated_no_further_than_its_size() -> None:
    bomb = deflated(np.zeros((8000, 8000), np.uint16))
    ds = compressed(described(GREY, 12), DeflatedImageFrame, bomb)
    np.testing.assert_array_equal(values(ds), 0)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: UID(uid).keyword)
@pytest.mark.parametrize("left", [0, 2, 30, 0.5, 0.99])
def test_a_truncated_code_stream_is_refused(syntax: str, left: float) -> None:
    stream = LOSSLESS[syntax](GREY)
    cut = stream[: int(len(stream) * left) if 0 < left < 1 else int(left)]
    refusal(compressed(described(GREY, 12), syntax, cut or b"\0\0"))


@pytest.mark.parametrize("padding", [b"\xff", b" ", b"\0\0\0\0"])
def test_bytes_after_the_end_of_a_code_stream_do_not_count(padding: bytes) -> None:
    stream = LOSSLESS[JPEGLosslessSV1](GREY) + padding
    np.testing.assert_array_equal(
        values(compressed(described(GREY, 12), JPEGLosslessSV1, stream)), GREY
    )


def test_a_syntax_without_a_decoder_is_named_with_those_that_have_one() -> None:
    ds = compressed(described(GREY, 12), SPECTRAL_SELECTION, b"\xff\xd8")
    words = str(refusal(ds))
    assert "1.2.840.10008.1.2.4.53" in words
    assert "JPEG 2000 Image Compression" in words


@pytest.mark.parametrize(
    "attributes",
    [
        {"SamplesPerPixel": 2},
        {"BitsAllocated": 12},
        {"BitsStored": 17},
        {"PhotometricInterpretation": "MONOCHROME3"},
        {"PhotometricInterpretation": "RGB"},
        {"PhotometricInterpretation": None},
        {"PixelRepresentation": None},
    ],
)
def test_a_description_that_makes_no_sense_is_refused(attributes: dict[str, Any]) -> None:
    ds = make.change(native(described(GREY, 12), GREY.tobytes()), attributes)
    assert refusal(ds).code == "undecodable"


def test_an_object_without_pixels_says_so() -> None:
    ds = described(GREY, 12)
    del ds.PixelData
    with pytest.raises(UnsupportedPixels, match="no pixel data"):
        Frames(reread(ds), LIMITS)
