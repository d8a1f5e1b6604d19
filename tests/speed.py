"""How fast an image is prepared, beside the plain way, in one run: `make speed`.

One image of 2500 x 2048 pixels, 12 of 16 bits, with a window that clips; one thread. From the
parsed object to the network's square; ours makes the 8-bit display image for the overlay besides.
The plain way: pydicom's pixel_array, apply_modality_lut, apply_voi_lut in float64, cv2.resize.
"""

import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import make
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from dicomai.infer import package
from dicomai.prepare import geometry, image, pixels
from dicomai.prepare.decoders import Frames
from dicomai.prepare.pool import Pool
from dicomai.receive import inbox
from dicomai.scoring import limits
from dicomai.settings import Settings

LIMITS = limits(Settings())
SIZE = 224
REPEATS = 9


def detector_image() -> Dataset:
    """A real radiograph at a detector's size, with noise so that it compresses like one."""
    ds = make.large_radiograph()
    stored = ds.pixel_array.astype(np.float32)
    noise = np.random.default_rng(3).normal(0, 6, stored.shape)
    ds.PixelData = np.clip(np.rint(stored + noise), 0, 4095).astype("<u2").tobytes()
    ds.PhotometricInterpretation, ds.PresentationLUTShape = "MONOCHROME2", "IDENTITY"
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.WindowCenter, ds.WindowWidth = 2200, 1800
    return ds


def reread(ds: Dataset) -> Dataset:
    """As it comes from a file."""
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return pydicom.dcmread(io.BytesIO(buffer.getvalue()))


def plain(ds: Dataset) -> NDArray[np.float64]:
    """(size, size) of 0 to 1, the image in its middle."""
    ds._pixel_array = None  # pydicom keeps what it decoded
    values = apply_modality_lut(ds.pixel_array, ds).astype(np.float64)
    shown = apply_voi_lut(values, ds) / (2**ds.BitsStored - 1)
    box = geometry.fit(*shown.shape, SIZE)
    inner = cv2.resize(shown, (box.width, box.height), interpolation=cv2.INTER_AREA)
    square = np.zeros((SIZE, SIZE))
    square[box.top : box.top + box.height, box.left : box.left + box.width] = inner
    return square


def ours(ds: Dataset) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The same, and the display image."""
    shown = image.show(ds, Frames(ds, LIMITS), 1)
    box = geometry.fit(*shown.shape, SIZE)
    return geometry.letterbox(shown, box), image.to_8_bits(shown)


def seconds(work: Callable[[], Any]) -> float:
    """The best of several runs: what else runs on the machine only ever adds."""
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


@dataclass(frozen=True)
class Figures:
    """Seconds for one image, and how far the result is from full precision (1 is the range)."""

    plain: float
    ours: float
    mean: float
    largest: float


def figures(ds: Dataset) -> Figures:
    """Both ways on the same object."""
    difference = np.abs(ours(ds)[0] - plain(ds))
    return Figures(
        seconds(lambda: plain(ds)),
        seconds(lambda: ours(ds)),
        float(difference.mean()),
        float(difference.max()),
    )


def compressed(ds: Dataset) -> dict[str, Dataset]:
    """The same image in other transfer syntaxes, losslessly."""
    cells = ds.pixel_array
    streams = {
        JPEGLosslessSV1: imagecodecs.jpeg8_encode(cells, lossless=True, bitspersample=12),
        JPEGLSLossless: imagecodecs.jpegls_encode(cells),
        JPEG2000Lossless: imagecodecs.jpeg2k_encode(
            cells, codecformat="j2k", reversible=True, level=0, bitspersample=12
        ),
        HTJ2KLossless: imagecodecs.htj2k_encode(cells, reversible=True),
    }
    found = {}
    for uid, stream in streams.items():
        copy = reread(ds)
        copy.PixelData = encapsulate([bytes(stream)])
        copy["PixelData"].is_undefined_length = True
        copy.file_meta.TransferSyntaxUID = uid
        found[uid.name] = reread(copy)
    rle = reread(ds)
    rle.compress(RLELossless)
    return {**found, RLELossless.name: reread(rle)}


def throughput(ds: Dataset, workers: int, images: int = 60) -> float:
    """Images a second from files through the decoding processes, as the daemon does it."""
    model = package.read(make.STARTER)
    with tempfile.TemporaryDirectory() as folder, Pool(workers, 60, 1024) as pool:
        file = Path(folder) / "image.dcm"
        pydicom.dcmwrite(file, ds, enforce_file_format=True)
        instance = inbox.read_file(file)[1]
        list(pool.map(image.prepare, [(instance, model, LIMITS)] * workers))  # they have started
        started = time.perf_counter()
        for done in pool.map(image.prepare, [(instance, model, LIMITS)] * images):
            assert isinstance(done, list), done
        return images / (time.perf_counter() - started)


def main() -> None:
    """Print all figures."""
    cv2.setNumThreads(1)
    ds = reread(detector_image())
    print(f"{'transfer syntax':60} {'plain':>9} {'ours':>9} {'ratio':>6}  mean, largest difference")
    for name, item in {ds.file_meta.TransferSyntaxUID.name: ds, **compressed(ds)}.items():
        f = figures(item)
        print(
            f"{name:60} {f.plain * 1e3:6.1f} ms {f.ours * 1e3:6.1f} ms {f.plain / f.ours:6.1f}  "
            f"{f.mean:.2e}, {f.largest:.2e}"
        )
    shown = image.show(ds, Frames(ds, LIMITS), 1)
    box = geometry.fit(*shown.shape, SIZE)
    for name, work in {
        "decode": lambda: Frames(ds, LIMITS).decode(1),
        "look up": lambda: pixels.display(ds, 1, Frames(ds, LIMITS).decode(1)),
        "letterbox": lambda: geometry.letterbox(shown, box),
        "8 bits": lambda: image.to_8_bits(shown),
    }.items():
        print(f"  of which {name}: {seconds(work) * 1e3:.2f} ms")
    for workers in (1, 2):
        print(f"from files, {workers} processes: {throughput(ds, workers):.0f} images/s")


if __name__ == "__main__":
    main()
