"""An image to learn from: shown as the network will see it, with what subgroups are made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pydicom.dataset import Dataset

from dicomai.errors import NotAccepted, TooLarge, UnsupportedPixels
from dicomai.prepare import geometry, image, pixels, select
from dicomai.prepare.decoders import Frames
from dicomai.prepare.fingerprint import fingerprint
from dicomai.study import Accepts, Float32, Limits, UInt8

PICTURES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One frame: pixels (size, size), grey, letterboxed; fingerprint of the whole frame.

    facts: sex, age_years, view, manufacturer, as far as the header says them
    """

    number: int
    pixels: UInt8
    fingerprint: bytes
    facts: Mapping[str, str | float]


def sample(file: Path, accepts: Accepts | None, size: int, limits: Limits) -> Iterator[Sample]:
    """Every frame of a stored object that a model would accept, or a picture (PNG, JPEG).

    accepts: None takes whatever can be shown. Raises Rejected with the reason.
    """
    if file.suffix.lower() in PICTURES:
        yield _sample(1, read_picture(file, limits), size, {})
        return
    ds = pixels.read(file, limits)
    refusal = select.why_not(ds, accepts) if accepts is not None else None
    if refusal is not None:
        raise NotAccepted(refusal[1], refusal[0])
    frames = Frames(ds, limits)
    wanted = select.frame_numbers(frames.count, accepts.frames if accepts else "all")
    if len(wanted) > limits.max_frames:
        raise TooLarge(f"{len(wanted)} frames: at most {limits.max_frames} (prepare.max_frames)")
    facts = facts_of(ds)
    for number in wanted:
        yield _sample(number, image.show(ds, frames, number), size, facts)


def read_picture(file: Path, limits: Limits) -> Float32:
    """A PNG or JPEG file as grey of 0 to 1, whatever its depth and colours."""
    data = np.frombuffer(file.read_bytes(), np.uint8)
    try:
        how = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH
        found = cv2.imdecode(data, how) if data.size else None
    except cv2.error:  # more pixels than OpenCV takes
        found = None
    if found is None:
        raise UnsupportedPixels("the picture cannot be decoded")
    if found.size > limits.max_pixels:
        raise TooLarge(f"{found.size} pixels: at most {limits.max_pixels} (prepare.max_pixels)")
    whole = 65535 if found.dtype == np.uint16 else 255
    return np.asarray(found, np.float32) / np.float32(whole)


def _sample(number: int, shown: Float32, size: int, facts: Mapping[str, str | float]) -> Sample:
    colour = shown.ndim == 3
    grey = np.asarray(cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY) if colour else shown, np.float32)
    rows, columns = grey.shape
    square = geometry.letterbox(grey, geometry.fit(rows, columns, size))
    return Sample(number, image.to_8_bits(square), fingerprint(grey), facts)


def facts_of(ds: Dataset) -> dict[str, str | float]:
    """What subgroups are made of, as far as it is said."""
    age = select.age_years(ds)
    words = {
        "sex": str(ds.get("PatientSex") or "")[:1].upper(),
        "view": select.view(ds)[:16],
        "manufacturer": str(ds.get("Manufacturer") or "")[:64],
    }
    found: dict[str, str | float] = {key: value for key, value in words.items() if value}
    return found if age is None else {**found, "age_years": age}
