"""How fast images are scored, beside torch as it comes and ONNX Runtime; class maps included."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blobs
import cv2
import make
import numpy as np
import torch
from daemon import command
from peers import FOLDER, shared

from dicomai.compressing import KEPT_WHOLE
from dicomai.demo.radiographs import pixels, radiographs
from dicomai.infer import package
from dicomai.infer.engine import Engine, load_network
from dicomai.study import Float32, Model
from dicomai.train.judge import as_input

SECONDS = 3.0
Score = Callable[[Float32], Any]


def torch_eager() -> Score:
    """The network as torchvision makes it, in its usual memory format."""
    network = load_network(package.read(make.STARTER)).to(memory_format=torch.contiguous_format)

    @torch.inference_mode()
    def score(images: Float32) -> Any:
        return network(torch.from_numpy(images))

    return score


def onnx_runtime(folder: Path) -> Score:
    """The same network, exported; as many threads as there are processors."""
    import onnxruntime

    network = load_network(package.read(make.STARTER))
    file = folder / "network.onnx"
    axes = {"images": {0: "n"}, "logits": {0: "n"}, "maps": {0: "n"}}
    torch.onnx.export(
        network,
        (torch.zeros(1, 1, 224, 224),),
        str(file),
        input_names=["images"],
        output_names=["logits", "maps"],
        dynamic_axes=axes,
        dynamo=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def without_maps() -> Score:
    """OpenVINO as our engine has it, of a network that gives the logits alone."""
    from dicomai.infer import vino

    network = load_network(package.read(make.STARTER))

    class Logits(torch.nn.Module):
        """In the maps' place what they are made of, pooled: the engine wants two outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pooled = self.network.features(images).mean((2, 3))
            return self.network.head(pooled), pooled

    return vino.compiled(Logits().eval(), 1, 224)  # type: ignore[arg-type]


def compressed(folder: Path) -> Model:
    """The starter in 8 bits, as `dicomai model compress` makes it; it prints what was compared."""
    config, examples = blobs.site(folder / "site"), shared() / "data/cxr"
    blobs.add(config, examples)
    done = command(config, "model", "compress", "chest-starter", seconds=900)
    assert done.returncode == 0, done.stderr
    print(done.stderr + done.stdout)
    return package.read(folder / "site/data/models/chest-starter/2-int8")


def without_comparison(folder: Path) -> Score:
    """The starter in 8 bits, calibrated with the radiographs of the repository, where no others
    are: too few to say how much it loses.
    """
    from dicomai.infer import int8, vino

    model = package.read(make.STARTER)
    size = model.preprocessing.size
    squares = [cv2.resize(pixels(one), (size, size)) for one in radiographs()]
    images = [as_input(model, square) for square in squares]
    whole = KEPT_WHOLE[0]
    int8.make(load_network(model), model.channels, size, images, whole, folder)
    return vino.opened(folder / package.INT8[0])


def int8_score(folder: Path) -> Score:
    """What scores in 8 bits."""
    if FOLDER.is_dir():
        return Engine(compressed(folder), "openvino").score
    return without_comparison(folder)


def engines(folder: Path) -> dict[str, Score]:
    """Name -> what scores images (N, 1, 224, 224)."""
    model = package.read(make.STARTER)
    return {
        "torch, eager": torch_eager(),
        "ONNX Runtime": onnx_runtime(folder),
        "dicomai, torch": Engine(model, "cpu").score,
        "dicomai, OpenVINO": Engine(model, "openvino").score,
        "dicomai, OpenVINO, without maps": without_maps(),
        "dicomai, int8": int8_score(folder),
    }


def rate(score: Score, batch: int) -> float:
    """Images/s."""
    images = np.random.default_rng(0).random((batch, 1, 224, 224), np.float32)
    score(images)
    count, began = 0, time.monotonic()
    while time.monotonic() - began < SECONDS:
        score(images)
        count += batch
    return count / (time.monotonic() - began)
