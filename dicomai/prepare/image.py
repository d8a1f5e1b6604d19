"""One stored object: read, select, decode, show, fit. What a decoding process does."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from dicomai import durable
from dicomai.errors import NotAccepted, TooLarge, UnsupportedPixels
from dicomai.prepare import geometry, pixels, select
from dicomai.prepare.decoders import Frames
from dicomai.study import Float32, Frame, Instance, Limits, Model, Preprocessing, UInt8

OPENCV_NO_MEMORY = -4  # cv::Error::StsNoMem
LONGEST_VALUE = 1 << 16  # bytes
FUNCTIONAL_GROUPS = 0x5200  # and what comes after them: waveforms, overlays, pixels


@dataclass(frozen=True, slots=True)
class Rendered:
    """One frame of a file on disk as PNG, or why there is none."""

    number: int
    path: Path | None
    reason: str | None


def prepare(instance: Instance, model: Model, limits: Limits) -> Iterator[Dataset | Frame]:
    """The header without what describes frames and pixels, then each frame the model wants.

    Raises Rejected with the reason where the model does not accept the image, or it cannot be
    shown; an image that fails in one frame fails.
    """
    ds = pixels.read(instance.path, limits)
    refusal = select.why_not(ds, model.accepts)
    if refusal is not None:
        raise NotAccepted(refusal[1], refusal[0])
    frames = Frames(ds, limits)
    yield header_of(ds, frames.count)
    wanted = select.frame_numbers(frames.count, model.accepts.frames)
    if len(wanted) > limits.max_frames:
        raise TooLarge(
            f"{len(wanted)} frames: at most {limits.max_frames} are taken (prepare.max_frames)"
        )
    if len(wanted) * frames.display_bytes > limits.max_bytes:
        raise TooLarge(
            f"{len(wanted)} frames of {ds.Rows} x {ds.Columns} pixels: at most {limits.max_bytes} "
            "bytes are taken (prepare.max_megabytes)"
        )
    for number in wanted:
        shown = show(ds, frames, number)
        rows, columns = shown.shape[:2]
        box = geometry.fit(rows, columns, model.preprocessing.size)
        square = geometry.letterbox(shown, box)
        pixel_input = normalize(square, model.preprocessing, model.channels)
        yield Frame(instance, number, pixel_input, to_8_bits(shown), box)


def read_header(instance: Instance, limits: Limits) -> Iterator[Dataset]:
    """The header of an object that is not shown; raises Rejected where there is none."""
    yield header_of(pixels.read(instance.path, limits), 1)


def header_of(ds: Dataset, frame_count: int) -> Dataset:
    """What results may inherit: nothing private or large, nothing that cannot be read."""
    header = Dataset()
    for tag in ds.keys():  # noqa: SIM118 - iterating the dataset itself would read the elements
        if tag.group >= FUNCTIONAL_GROUPS or tag.is_private:
            continue
        with contextlib.suppress(*pixels.DECODER_ERRORS):
            element = ds[tag]
            if element.VR == "PN" and element.VM > 1:
                # What pydicom reads holds a function that cannot go between processes.
                element = DataElement(tag, "PN", list(element.value))
            if not isinstance(element.value, (bytes, str)) or len(element.value) < LONGEST_VALUE:
                header[tag] = element
    if "NumberOfFrames" in header:
        header["NumberOfFrames"] = DataElement(header["NumberOfFrames"].tag, "IS", frame_count)
    with contextlib.suppress(*pixels.DECODER_ERRORS):
        # The grey scale that functional groups give the first frame.
        first = pixels.of_frame(ds, 1)
        for keyword in pixels.GREY_SCALE:
            if keyword in first:
                header[keyword] = first[keyword]
    return header


def render(file: Path, out: Path, limits: Limits) -> Iterator[Rendered]:
    """Write every frame's display image as out.N.png (8 bits, full size), N from 1.

    out: a path without suffix. Raises Rejected where there is no frame at all.
    """
    ds = pixels.read(file, limits)
    frames = Frames(ds, limits)
    for number in range(1, frames.count + 1):
        if number > limits.max_frames:
            yield Rendered(number, None, f"at most {limits.max_frames} frames (prepare.max_frames)")
            return
        try:
            shown = to_8_bits(show(ds, frames, number))
        except UnsupportedPixels as error:
            yield Rendered(number, None, str(error))
            if error.code == "truncated":  # those after it are missing, too
                return
            continue
        picture = cv2.cvtColor(shown, cv2.COLOR_RGB2BGR) if shown.ndim == 3 else shown
        path = out.with_name(f"{out.name}.{number}.png")
        durable.write(path, [cv2.imencode(".png", picture)[1].data])
        yield Rendered(number, path, None)


def show(ds: Dataset, frames: Frames, number: int) -> Float32:
    """Frame number as displayed, see pixels.display().

    Raises UnsupportedPixels, and MemoryError, which the pool gives its words.
    """
    try:
        return pixels.display(ds, number, frames.decode(number))
    except UnsupportedPixels:
        raise
    except pixels.DECODER_ERRORS as error:
        if isinstance(error, cv2.error) and error.code == OPENCV_NO_MEMORY:
            raise MemoryError from None
        where = f"frame {number} of {frames.count}: " if frames.count > 1 else ""
        raise UnsupportedPixels(
            f"{where}the pixel data cannot be decoded: {pixels.words(error)}"
        ) from error


def to_8_bits(shown: Float32) -> UInt8:
    """0 to 1 as 0 to 255, rounded."""
    return np.asarray(cv2.convertScaleAbs(shown, alpha=255), np.uint8)


def normalize(square: Float32, how: Preprocessing, channels: int) -> Float32:
    """(size, size[, 3]) of 0 to 1 as the network's input (channels, size, size).

    A grey image goes into every channel; of a colour image a network of one channel gets the
    luminance (ITU-R BT.601, which YBR_FULL is made of).
    """
    if square.ndim == 3 and channels == 1:
        square = np.asarray(cv2.cvtColor(square, cv2.COLOR_RGB2GRAY), np.float32)
    planes = square.transpose(2, 0, 1) if square.ndim == 3 else np.repeat(square[None], channels, 0)
    low, high = how.value_range
    mean = np.array(how.mean, np.float32)[:, None, None]
    std = np.array(how.std, np.float32)[:, None, None]
    return ((planes * np.float32(high - low) + np.float32(low) - mean) / std).astype(np.float32)
