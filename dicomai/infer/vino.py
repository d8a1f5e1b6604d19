"""A network compiled by OpenVINO, for processors; the only place that imports it."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import structlog
import torch

from dicomai.errors import OutOfMemory
from dicomai.infer.network import NetworkWithMaps
from dicomai.study import Float32

# Or it tells its maker of each import and each conversion. It goes without, where this is missing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino  # noqa: E402 - after that

log = structlog.get_logger()

Run = Callable[[Float32], tuple[Float32, Float32]]

VERSION = version("openvino")
FILE = "network.xml"  # beside it lies network.bin
# Full precision also where the processor would rather not; all of it for one batch at a time.
SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "PERFORMANCE_HINT": "LATENCY",
    "CPU_DENORMALS_OPTIMIZATION": True,
}
TOLERANCE = 1e-3  # of a logit, relative above 1; other orders of summing make 1e-5 of it
# The same for 8 bits, which other processors' instructions round otherwise, or saturate: 0.2 of a
# logit changes a probability by 0.05 at most.
TOLERANCE_INT8 = 0.2


class Disagrees(Exception):
    """What was compiled does not say what torch says."""


# What it raises where it cannot be used here.
FAILURES = (Disagrees, RuntimeError, OSError, ValueError, TypeError, AttributeError)


def compiled(network: NetworkWithMaps, channels: int, size: int, folder: Path | None = None) -> Run:
    """What gives the logits (N, K) and class maps (N, K, h, w) of images (N, channels, size, size).

    folder: where the converted network is kept, of whose making it takes seconds
    For one thread at a time. Raises Disagrees; what it returns raises OutOfMemory.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            return compiled(network, channels, size, Path(scratch) / "network")
    try:
        return _checked(network, channels, size, folder)
    except (Disagrees, RuntimeError) as error:  # not there yet, or damaged
        if folder.exists():
            log.warning("converted_again", folder=str(folder), reason=str(error)[:300])
    _convert(network, channels, size, folder)
    return _checked(network, channels, size, folder)


def answering(file: Path, channels: int, size: int, answer: Sequence[Sequence[float]]) -> Run:
    """A converted network as compiled() gives it, which answers the two fixed images as it did.

    answer: (2, K), logits. Raises Disagrees.
    """
    run = opened(file)
    logits, _ = run(fixed_images(channels, size))
    wanted = np.array(answer)
    most = TOLERANCE_INT8 * np.maximum(1, np.abs(wanted))
    if logits.shape != wanted.shape or not (np.abs(logits - wanted) <= most).all():
        raise Disagrees("the int8 network does not say here what it said where it was made")
    return run


def fixed_images(channels: int, size: int) -> Float32:
    """Two pictures of waves, the same everywhere: (2, channels, size, size)."""
    x = np.arange(size) * (2 * np.pi / size)
    waves = [np.outer(np.cos(a * x), np.cos(b * x)) for a, b in ((1, 2), (5, 3))]
    return np.repeat(np.stack(waves)[:, None], channels, 1).astype(np.float32)


def opened(file: Path) -> Run:
    """A converted network, compiled as it is."""
    core = openvino.Core()
    return _run(core.compile_model(core.read_model(file), "CPU", SETTINGS))


def converted(network: NetworkWithMaps, channels: int, size: int) -> openvino.Model:
    """The network as OpenVINO has it, for any number of images."""
    example = torch.zeros(2, channels, size, size)
    shapes = {"images": {0: torch.export.Dim("images", min=1)}}
    exported = torch.export.export(network, (example,), dynamic_shapes=shapes)
    return openvino.convert_model(exported)


def _convert(network: NetworkWithMaps, channels: int, size: int, folder: Path) -> None:
    converted_network = converted(network, channels, size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, suffix=".part") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        openvino.save_model(converted_network, made / FILE, compress_to_fp16=False)
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another process was quicker
            made.rename(folder)


def _checked(network: NetworkWithMaps, channels: int, size: int, folder: Path) -> Run:
    run = opened(folder / FILE)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, size, size, generator=random)
    with torch.inference_mode():
        wanted = network(images)
    for mine, other in zip(run(images.numpy()), wanted, strict=True):
        if not np.allclose(mine, other.numpy(), rtol=TOLERANCE, atol=TOLERANCE):
            raise Disagrees("OpenVINO does not say here what torch says")
    return run


def _run(network: openvino.CompiledModel) -> Run:
    request = network.create_infer_request()

    def run(images: Float32) -> tuple[Float32, Float32]:
        try:
            found = request.infer({0: np.ascontiguousarray(images)})
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and "bad_alloc" not in str(error):
                raise
        else:
            return np.array(found[0]), np.array(found[1])
        raise OutOfMemory(f"out of memory on openvino with {len(images)} images at once")

    return run
