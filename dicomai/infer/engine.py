"""The forward pass on a device."""

import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dicomai import durable
from dicomai.errors import Misuse, ModelDamaged, OutOfMemory
from dicomai.infer.network import NetworkWithMaps, build
from dicomai.infer.package import INT8, WEIGHTS, verify
from dicomai.study import Float32, Model

log = structlog.get_logger()

Device = Literal["cpu", "cuda", "openvino"]
Run = Callable[[Float32], tuple[Float32, Float32]]

FASTEST = "fastest.json"
TRIED_IMAGES, TRIED_SECONDS = 4, 1.0


class Engine:
    """A model on its device; name says where and how precisely it computes.

    A compressed model is int8 in OpenVINO; torch computes with the weights that it was made of.

    biases: (K,), of the last layer; activation, labels: the model's
    """

    def __init__(self, model: Model, device: Device, folder: Path | None = None) -> None:
        """Load verified weights. Raises ModelDamaged.

        folder: where converted networks are kept
        """
        self.name = f"torch-{device}-fp32"
        self.activation, self.labels = model.activation, model.labels
        self._device = device
        # Denormal numbers cost the processor up to a hundred times the time of normal ones.
        torch.set_flush_denormal(True)
        network = load_network(model)
        self.biases: Float32 = network.head.bias.detach().float().numpy()
        if device == "openvino":
            self.name, self._run = _with_openvino(network, model, folder)
        else:
            self._run = _with_torch(network, device)

    def score(self, images: Float32) -> tuple[Float32, Float32]:
        """images: (N, C, size, size); returns probabilities (N, K) and class maps (N, K, h, w).

        Raises OutOfMemory.
        """
        logits, maps = self._run(images)
        probabilities = _activated(logits, self.activation)
        for index, label in enumerate(self.labels):
            probabilities[:, index] = label.said(probabilities[:, index])
        return probabilities, maps


def load_network(model: Model) -> NetworkWithMaps:
    """A package's network with its verified weights, on the processor. Raises ModelDamaged."""
    verify(model)
    network = build(model.architecture, model.channels, len(model.labels))
    file = model.path / WEIGHTS
    try:
        state = load_file(file)
        network.load_state_dict({key: value.float() for key, value in state.items()})
    except (SafetensorError, RuntimeError) as error:
        words = " ".join(str(error).split())[:300]
        raise ModelDamaged(f"{file} does not fit: {words}: install it again") from error
    return network.eval().to(memory_format=torch.channels_last)


def try_out(model: Model) -> None:
    """Load all that it may be scored with here. Raises ModelDamaged."""
    Engine(model, "cpu")
    if model.int8 is None or not _has_openvino():
        return
    from dicomai.infer import vino

    try:
        Engine(model, "openvino")
    except vino.FAILURES as error:
        raise ModelDamaged(
            f"{model.name} {model.version}: its int8 network does not say on this processor what "
            "it said where it was made: compress it here"
        ) from error


def _with_openvino(network: NetworkWithMaps, model: Model, folder: Path | None) -> tuple[str, Run]:
    """The name and the pass: of a compressed model its own network, else what torch has."""
    from dicomai.infer import vino

    size = model.preprocessing.size
    if model.int8 is not None:
        file = model.path / INT8[0]
        return "openvino-cpu-int8", vino.answering(file, model.channels, size, model.int8.answer)
    kept = folder and folder / f"{model.sha256[:16]}.openvino-{vino.VERSION}"
    return "openvino-cpu-fp32", vino.compiled(network, model.channels, size, kept)


def _has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _with_torch(network: NetworkWithMaps, device: Device) -> Run:
    network.to(device)

    @torch.inference_mode()
    def run(images: Float32) -> tuple[Float32, Float32]:
        inputs = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        logits, maps = network(inputs.contiguous(memory_format=torch.channels_last))
        return logits.cpu().numpy(), maps.cpu().numpy()

    def guarded(images: Float32) -> tuple[Float32, Float32]:
        try:
            return run(images)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        # Only here, where the failed pass holds nothing any more.
        if device == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(f"out of memory on {device} with {len(images)} images at once")

    return guarded


def _activated(logits: Float32, activation: str) -> Float32:
    found = torch.from_numpy(logits)
    return (found.sigmoid() if activation == "sigmoid" else found.softmax(1)).numpy()


# On the processor torch raises a plain RuntimeError, and oneDNN's says no more than this.
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "could not create a primitive")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


# Which device


def open_engine(model: Model, wanted: Device | Literal["auto"], folder: Path) -> Engine:
    """A model on the wanted device; see choose(). Where "auto" fails with OpenVINO, on torch."""
    device = choose(model, wanted, folder)
    if wanted == device or device != "openvino":
        return Engine(model, device, folder)
    from dicomai.infer import vino

    try:
        return Engine(model, device, folder)
    except vino.FAILURES as error:
        _leave_out(error)
        return Engine(model, "cpu")


def _leave_out(error: Exception) -> None:
    log.error("engine_left_out", error=type(error).__name__, reason=str(error)[:300])


def choose(model: Model, wanted: Device | Literal["auto"], folder: Path) -> Device:
    """The device for "auto": CUDA where there is one, else what is fastest here with this model.

    A compressed model is measured by its int8 network.
    folder: where the answer is kept, for predictions of two engines are not mixed needlessly
    Raises Misuse where the wanted one is not installed.
    """
    has_openvino = _has_openvino()
    if wanted == "openvino" and not has_openvino:
        raise Misuse("infer.device: openvino is not installed: install dicomai[openvino]")
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    if not has_openvino:
        return "cpu"
    from dicomai.infer import vino

    here = f"{platform.machine()}, {os.cpu_count()} processors"
    key = f"{model.digest} on {here}, torch {torch.__version__}, openvino {vino.VERSION}"
    answers = _read(folder / FASTEST)
    if key not in answers:
        ours = _images_per_second(model, "cpu", folder)
        try:
            theirs = _images_per_second(model, "openvino", folder)
        except vino.FAILURES as error:
            _leave_out(error)
            theirs = 0.0
        answers[key] = "openvino" if theirs > ours else "cpu"
        log.info("measured", cpu=round(ours, 1), openvino=round(theirs, 1), unit="images/s")
        with suppress(OSError):  # then it is measured again
            durable.write(folder / FASTEST, [json.dumps(answers, indent=1).encode()])
    return "openvino" if answers[key] == "openvino" else "cpu"


def _read(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # none yet, or damaged: then it is measured again
        return {}
    return found if isinstance(found, dict) else {}


def _images_per_second(model: Model, device: Device, folder: Path) -> float:
    size = model.preprocessing.size
    random = np.random.default_rng(0)
    images = random.random((TRIED_IMAGES, model.channels, size, size), np.float32)
    engine = Engine(model, device, folder)
    engine.score(images)
    started, count = time.monotonic(), 0
    while time.monotonic() - started < TRIED_SECONDS:
        engine.score(images)
        count += len(images)
    return count / (time.monotonic() - started)
