"""Stored pixels to display: each rule of PS3.3 C.11 against arithmetic written down here."""

import io
import math
from typing import Any

import numpy as np
import pydicom
import pytest
from make import add_file_meta
from numpy.typing import ArrayLike, NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)

from dicomai.errors import UnsupportedPixels
from dicomai.prepare import image as prepared
from dicomai.prepare.decoders import Frames, frame_count
from dicomai.scoring import limits
from dicomai.settings import Settings

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16  # 0 to 4080, 12 bits


def image(
    pixels: NDArray[Any], bits: int = 12, syntax: str = ExplicitVRLittleEndian, **attributes: Any
) -> Dataset:
    """A grey image as it comes back from a file; a third axis of pixels is its frames."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    if pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.BitsAllocated = pixels.dtype.itemsize * 8
    if pixels.dtype.kind == "f":
        ds.FloatPixelData = pixels.tobytes()
    else:
        ds.BitsStored, ds.HighBit = bits, bits - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        big = syntax == ExplicitVRBigEndian
        ds.PixelData = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
        ds["PixelData"].VR = "OB" if ds.BitsAllocated == 8 else "OW"
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    add_file_meta(ds, syntax)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    buffer.seek(0)
    return pydicom.dcmread(buffer)


def lut(entries: ArrayLike, first: int, bits: int, packed: bool = False, vr: str = "US") -> Dataset:
    """One item of a LUT Sequence; packed: two 8-bit entries in a word."""
    table = np.asarray(entries)
    item = Dataset()
    item.add_new("LUTDescriptor", vr, [len(table) % 65536, first, bits])
    data = table.astype("u1" if packed else "<u2").tobytes()
    item.add_new("LUTData", "OW", data + b"\0" * (len(data) % 2))
    item.LUTExplanation = "test"
    return item


def window(x: float, center: float, width: float, function: str = "LINEAR") -> float:
    """PS3.3 C.11.2.1.2.1 and C.11.2.1.3, word by word, with ymin 0 and ymax 1."""
    if function == "SIGMOID":
        return 1 / (1 + math.exp(-4 * (x - center) / width))
    if function == "LINEAR":
        if x <= center - 0.5 - (width - 1) / 2:
            return 0
        if x > center - 0.5 + (width - 1) / 2:
            return 1
        return (x - (center - 0.5)) / (width - 1) + 0.5
    if x <= center - width / 2:
        return 0
    if x > center + width / 2:
        return 1
    return (x - center) / width + 0.5


def windowed(values: NDArray[Any], *how: Any) -> NDArray[np.float64]:
    """window() of every pixel."""
    return np.vectorize(lambda x: window(float(x), *how), otypes=[float])(values)


def own_range(values: NDArray[Any]) -> NDArray[np.float64]:
    """From the lowest value, black, to the highest, white."""
    x = values.astype(float)
    return np.asarray((x - x.min()) / (x.max() - x.min()))


def display(ds: Dataset, number: int = 1) -> NDArray[np.float32]:
    """A frame as the pipeline shows it, from the object as it lies on disk."""
    return prepared.show(ds, Frames(ds, limits(Settings())), number)


def shows(ds: Dataset, expected: ArrayLike, number: int = 1) -> None:
    """The display is the expectation, to the precision of float32."""
    shown = display(ds, number)
    assert shown.dtype == np.float32
    np.testing.assert_allclose(shown, expected, atol=2e-7)


# VOI windows


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(2000, 1000), (100.5, 33.3), (4000, 4096), (40, 2)])
def test_windows_follow_their_formula(function: str, center: float, width: float) -> None:
    ds = image(RAMP, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    shows(ds, windowed(RAMP, center, width, function))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_pydicom_shows_the_same_but_for_polarity(function: str, photometric: str) -> None:
    ds = image(RAMP, WindowCenter=1800, WindowWidth=1500, VOILUTFunction=function)
    ds.PhotometricInterpretation = photometric
    referee = apply_voi_lut(apply_modality_lut(RAMP.astype(np.float64), ds), ds) / 4095
    shows(ds, 1 - referee if photometric == "MONOCHROME1" else referee)


def test_a_width_of_one_is_a_step() -> None:
    shows(image(RAMP, WindowCenter=1600.5, WindowWidth=1), RAMP > 1600)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_width_of_zero_is_as_if_absent(function: str) -> None:
    ds = image(RAMP + 15, WindowCenter=40, WindowWidth=0, VOILUTFunction=function)
    shows(ds, own_range(RAMP))


@pytest.mark.parametrize("function", ["", None])
def test_an_empty_function_is_linear(function: str | None) -> None:
    ds = image(RAMP, WindowCenter=2000, WindowWidth=1000, VOILUTFunction=function)
    shows(ds, windowed(RAMP, 2000, 1000))


def test_an_empty_window_is_as_if_absent() -> None:
    shows(image(RAMP, WindowCenter=None, WindowWidth=None), own_range(RAMP))


def test_of_several_windows_the_first_counts() -> None:
    ds = image(RAMP, WindowCenter=["2000", "300"], WindowWidth=["1000", "50"])
    shows(ds, windowed(RAMP, 2000, 1000))


def test_without_a_voi_the_image_shows_its_own_range() -> None:
    shows(image(RAMP // 2 + 700), own_range(RAMP // 2))


def test_an_image_of_one_value_is_finite() -> None:
    shows(image(np.full((4, 4), 77, np.uint16)), np.zeros((4, 4)))


# Polarity


def test_monochrome1_is_inverted_once_after_the_voi() -> None:
    ds = image(
        RAMP,
        PhotometricInterpretation="MONOCHROME1",
        PresentationLUTShape="INVERSE",  # redundant, no second inversion
        WindowCenter=1000,
        WindowWidth=500,
    )
    shows(ds, 1 - windowed(RAMP, 1000, 500))


def test_a_wrong_presentation_lut_shape_does_not_invert() -> None:
    ds = image(RAMP, PresentationLUTShape="INVERSE", WindowCenter=1000, WindowWidth=500)
    shows(ds, windowed(RAMP, 1000, 500))


# Modality step


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (2.5, 10), (-1, 4095)])
def test_rescale_comes_before_the_window(slope: float, intercept: float) -> None:
    ds = image(RAMP, RescaleSlope=slope, RescaleIntercept=intercept)
    ds.WindowCenter, ds.WindowWidth = 40, 400
    shows(ds, windowed(RAMP.astype(float) * slope + intercept, 40, 400))


def test_a_falling_slope_without_a_voi_turns_the_range_round() -> None:
    shows(image(RAMP, RescaleSlope=-1, RescaleIntercept=4095), 1 - own_range(RAMP))


def test_signed_pixels_keep_their_sign() -> None:
    signed = RAMP.astype(np.int16) - 2048
    shows(image(signed, WindowCenter=-500, WindowWidth=700), windowed(signed, -500, 700))


def test_bits_above_bits_stored_do_not_count() -> None:
    overlaid = RAMP | np.uint16(0x8000)
    shows(image(overlaid, WindowCenter=2000, WindowWidth=1000), windowed(RAMP, 2000, 1000))


def test_a_modality_lut_may_be_12_bits_deep() -> None:
    table = np.rint(4095 * np.sqrt(np.arange(4096) / 4095)).astype(int)
    ds = image(RAMP, ModalityLUTSequence=[lut(table, 0, 12)])
    ds.ModalityLUTSequence[0].ModalityLUTType = "OD"
    ds.WindowCenter, ds.WindowWidth = 2000, 1500
    shows(ds, windowed(table[RAMP], 2000, 1500))


def test_a_modality_lut_without_a_voi_shows_the_range_of_what_it_gives() -> None:
    hump = 2048 - abs(np.arange(4096) - 2048)
    ds = image(RAMP, ModalityLUTSequence=[lut(hump, 0, 12)])
    shows(ds, own_range(hump[RAMP]))


# VOI LUT


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("packed", [True, False])
def test_an_8_bit_voi_lut_may_have_more_than_256_entries(packed: bool, syntax: str) -> None:
    table = np.arange(4096) // 16
    ds = image(RAMP, syntax=syntax, VOILUTSequence=[lut(table, 0, 8, packed)])
    shows(ds, table[RAMP] / 255)


def test_a_voi_lut_of_a_big_endian_file() -> None:
    table = np.arange(4096)[::-1]
    item = lut(table, 0, 12)
    item.LUTData = table.astype(">u2").tobytes()
    shows(image(RAMP, syntax=ExplicitVRBigEndian, VOILUTSequence=[item]), table[RAMP] / 4095)


def test_a_voi_lut_deeper_than_it_declares_is_not_cut() -> None:
    table = np.arange(4096) * 16  # 16 bits
    shows(image(RAMP, VOILUTSequence=[lut(table, 0, 12)]), table[RAMP] / 65535)


def test_a_voi_lut_of_65536_entries_declares_zero() -> None:
    full = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    table = np.arange(65536)[::-1]
    shows(image(full, bits=16, VOILUTSequence=[lut(table, 0, 16)]), table[full] / 65535)


def test_values_outside_a_voi_lut_take_its_ends() -> None:
    table = np.linspace(200, 3000, 1000).astype(int)
    expected = table[np.clip(RAMP.astype(int) - 1500, 0, 999)] / 4095
    shows(image(RAMP, VOILUTSequence=[lut(table, 1500, 12)]), expected)


@pytest.mark.parametrize(("vr", "first"), [("SS", -2048), ("US", 65536 - 2048)])
@pytest.mark.parametrize("least", [-2048, 100])  # whether this image has negative values or not
def test_the_first_input_of_a_voi_lut_is_signed_where_the_pixels_are(
    vr: str, first: int, least: int
) -> None:
    signed = np.clip(RAMP.astype(np.int16) - 2048, least, None)
    table = np.arange(4096)
    ds = image(signed, VOILUTSequence=[lut(table, first, 12, vr=vr)])
    shows(ds, table[signed.astype(int) + 2048] / 4095)


def test_a_voi_lut_goes_before_a_window() -> None:
    table = np.arange(4096)[::-1]
    ds = image(RAMP, VOILUTSequence=[lut(table, 0, 12)], WindowCenter=9, WindowWidth=9)
    shows(ds, table[RAMP] / 4095)


def test_a_voi_lut_after_a_modality_lut_begins_with_an_unsigned_value() -> None:
    signed = RAMP.astype(np.int16) - 2048
    modality = np.linspace(0, 65535, 4096).astype(int)
    voi = np.arange(4096)
    ds = image(signed, ModalityLUTSequence=[lut(modality, -2048, 16, vr="SS")])
    ds.VOILUTSequence = [lut(voi, 40000, 12)]
    given = modality[signed.astype(int) + 2048]
    shows(ds, np.clip(given - 40000, 0, 4095) / 4095)


# Padding


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_outside_the_statistics(photometric: str) -> None:
    pixels = RAMP // 4 + 1000
    pixels[0], pixels[-1] = 0, 5
    ds = image(pixels, PixelPaddingValue=0, PixelPaddingRangeLimit=5)
    ds.PhotometricInterpretation = photometric
    inside = own_range(pixels[1:-1])
    expected = np.zeros(pixels.shape)
    expected[1:-1] = 1 - inside if photometric == "MONOCHROME1" else inside
    shows(ds, expected)


def test_padding_that_was_read_as_signed_is_that_of_unsigned_pixels() -> None:
    pixels = RAMP + np.uint16(100)
    pixels[0] = 65536 - 2000
    ds = image(pixels, bits=16)
    ds.add_new("PixelPaddingValue", "SS", -2000)
    expected = np.zeros(pixels.shape)
    expected[1:] = own_range(pixels[1:])
    shows(ds, expected)


def test_padding_of_signed_pixels_is_signed() -> None:
    pixels = RAMP.astype(np.int16)
    pixels[0] = -2000
    expected = np.zeros(pixels.shape)
    expected[1:] = own_range(pixels[1:])
    shows(image(pixels, bits=16, PixelPaddingValue=-2000), expected)


def test_an_empty_padding_limit_is_as_if_absent() -> None:
    pixels = RAMP + 10
    pixels[0] = 0
    expected = np.zeros(pixels.shape)
    expected[1:] = own_range(pixels[1:])
    shows(image(pixels, PixelPaddingValue=0, PixelPaddingRangeLimit=None), expected)


def test_an_image_of_nothing_but_padding_is_black() -> None:
    shows(image(np.full((4, 4), 9, np.uint16), PixelPaddingValue=9), np.zeros((4, 4)))


def test_float_pixels_have_padding_of_their_own() -> None:
    real = RAMP.astype(np.float32) / 1000 - 1.5
    real[0] = -9999
    ds = image(real, FloatPixelPaddingValue=-9999.0)
    expected = np.zeros(real.shape)
    expected[1:] = own_range(real[1:])
    shows(ds, expected)


# Functional groups


def group(**macros: dict[str, Any]) -> Dataset:
    """One item of a functional groups sequence."""
    item = Dataset()
    for keyword, attributes in macros.items():
        macro = Dataset()
        for name, value in attributes.items():
            setattr(macro, name, value)
        setattr(item, keyword, [macro])
    return item


def test_each_frame_has_the_window_and_rescale_of_its_own_functional_group() -> None:
    windows, slopes = [(1000, 500), (2000, 3000)], [(1, 0), (2, -1024)]
    ds = image(np.stack([RAMP, RAMP]), WindowCenter=9, WindowWidth=9, RescaleSlope=9)
    ds.PerFrameFunctionalGroupsSequence = [
        group(
            FrameVOILUTSequence={"WindowCenter": center, "WindowWidth": width},
            PixelValueTransformationSequence={"RescaleSlope": slope, "RescaleIntercept": offset},
        )
        for (center, width), (slope, offset) in zip(windows, slopes, strict=True)
    ]
    for number, ((center, width), (slope, offset)) in enumerate(zip(windows, slopes, strict=True)):
        rescaled = RAMP.astype(float) * slope + offset
        shows(ds, windowed(rescaled, center, width), number + 1)


def test_a_shared_functional_group_holds_for_every_frame_that_has_none() -> None:
    ds = image(np.stack([RAMP, RAMP]))
    shared = {"WindowCenter": 1000, "WindowWidth": 500, "VOILUTFunction": "SIGMOID"}
    ds.SharedFunctionalGroupsSequence = [group(FrameVOILUTSequence=shared)]
    own = {"WindowCenter": 2000, "WindowWidth": 900}
    ds.PerFrameFunctionalGroupsSequence = [Dataset(), group(FrameVOILUTSequence=own)]
    shows(ds, windowed(RAMP, 1000, 500, "SIGMOID"), 1)
    shows(ds, windowed(RAMP, 2000, 900), 2)


def test_frames_without_functional_groups_have_the_objects_own_window() -> None:
    ds = image(np.stack([RAMP, RAMP]), WindowCenter=1000, WindowWidth=500)
    ds.PerFrameFunctionalGroupsSequence = [Dataset()]  # one too few
    shows(ds, windowed(RAMP, 1000, 500), 2)


# Colour


def test_a_window_does_not_touch_colour() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    ds = image(rgb[..., 0], bits=8, WindowCenter=40, WindowWidth=10)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.PixelData = rgb.tobytes()
    shows(ds, rgb / 255)


# Precision and shape


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_looking_up_is_as_exact_as_arithmetic_on_every_pixel(dtype: type) -> None:
    low = np.iinfo(dtype).min
    every = (np.arange(65536) + low).astype(dtype).reshape(256, 256)
    ds = image(every, bits=16, RescaleSlope=0.37, RescaleIntercept=-3.1, VOILUTFunction="SIGMOID")
    ds.WindowCenter, ds.WindowWidth = 1234.5, 7777
    exact = 1 / (1 + np.exp(-4 * ((every * 0.37 - 3.1) - 1234.5) / 7777))
    np.testing.assert_array_max_ulp(display(ds, 1), exact.astype(np.float32), 1)


def test_a_range_too_wide_for_a_table_is_computed() -> None:
    wide = RAMP.astype(np.uint32) << 18
    ds = image(wide, bits=32, WindowCenter=2**29, WindowWidth=2**28)
    shows(ds, windowed(wide, 2**29, 2**28))


def test_float_pixels_are_computed() -> None:
    real = RAMP.astype(np.float32) / 1000 - 1.5
    shows(image(real), own_range(real))


def test_each_frame_is_shown_by_its_number() -> None:
    frames = np.stack([RAMP, RAMP[::-1], RAMP.T])
    ds = image(frames, WindowCenter=2000, WindowWidth=1000)
    assert frame_count(ds) == 3
    for number, frame in enumerate(frames, 1):
        shows(ds, windowed(frame, 2000, 1000), number)


def test_an_image_without_a_number_of_frames_has_one() -> None:
    assert frame_count(image(RAMP)) == 1


# Refusals


@pytest.mark.parametrize("left", [0, 2, 510])
def test_truncated_pixels_are_refused(left: int) -> None:
    ds = image(RAMP)
    ds.PixelData = ds.PixelData[:left]
    with pytest.raises(UnsupportedPixels):
        display(ds, 1)


@pytest.mark.parametrize("keyword", ["Rows", "BitsAllocated", "PhotometricInterpretation"])
def test_pixels_without_their_description_are_refused(keyword: str) -> None:
    ds = image(RAMP)
    del ds[keyword]
    with pytest.raises(UnsupportedPixels):
        display(ds, 1)
