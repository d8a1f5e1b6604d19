"""The forward pass on a device."""

from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dicomai.errors import ModelDamaged, OutOfMemory
from dicomai.infer.network import build
from dicomai.infer.package import verify
from dicomai.study import Float32, Model


class Engine:
    """A model on its device; name says where and how precisely it computes."""

    def __init__(self, model: Model, device: Literal["auto", "cpu", "cuda"]) -> None:
        """Load verified weights. Raises ModelDamaged."""
        verify(model)
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.name = f"torch-{self.device.type}-fp32"
        self.activation, self.labels = model.activation, model.labels
        # Denormal numbers cost the processor up to a hundred times the time of normal ones.
        torch.set_flush_denormal(True)
        network = build(model.architecture, model.channels, len(model.labels))
        try:
            state = load_file(model.path / "weights.safetensors")
            network.load_state_dict({key: value.float() for key, value in state.items()})
        except (SafetensorError, RuntimeError) as error:
            words = " ".join(str(error).split())[:300]
            file = model.path / "weights.safetensors"
            raise ModelDamaged(f"{file} does not fit: {words}: install it again") from error
        self.network = network.eval().to(self.device).to(memory_format=torch.channels_last)
        self.biases: Float32 = network.head.bias.detach().float().cpu().numpy()

    def score(self, images: Float32) -> tuple[Float32, Float32]:
        """images: (N, C, size, size); returns probabilities (N, K) and class maps (N, K, h, w).

        Raises OutOfMemory.
        """
        try:
            return self._score(images)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        # Only here, where the failed pass holds nothing any more.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(f"out of memory on {self.device.type} with {len(images)} images at once")

    @torch.inference_mode()
    def _score(self, images: Float32) -> tuple[Float32, Float32]:
        inputs = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        logits, maps = self.network(inputs.contiguous(memory_format=torch.channels_last))
        activate = torch.sigmoid if self.activation == "sigmoid" else torch.softmax
        extra = () if self.activation == "sigmoid" else (1,)
        probabilities = activate(logits, *extra)
        found = probabilities.cpu().numpy()
        for index, label in enumerate(self.labels):
            found[:, index] = label.said(found[:, index])
        return found, maps.cpu().numpy()


# On the processor torch raises a plain RuntimeError, and oneDNN's says no more than this.
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "could not create a primitive")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )
