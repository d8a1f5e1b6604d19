"""Networks that give class maps with their logits; the only place that imports torchvision."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import relu

HEAD = "head"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A torchvision network up to its last convolution.

    prefix: of its keys in a package's weights; first: its first convolution; last: its classifier;
    stages: name -> modules, from the image on; features: network and images -> (N, width, h, w)
    """

    build: Callable[..., nn.Module]
    prefix: str
    width: int
    first: str
    last: str
    stages: dict[str, tuple[str, ...]]
    features: Callable[[Any, Tensor], Tensor]


def _resnet(net: Any, images: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    features: Tensor = net.layer4(net.layer3(net.layer2(net.layer1(x))))
    return features


def _densenet(net: Any, images: Tensor) -> Tensor:
    return relu(net.features(images))


def _vgg(net: Any, images: Tensor) -> Tensor:
    features: Tensor = net.features(images)
    return features


RESNET_STAGES: dict[str, tuple[str, ...]] = {
    "stem": ("conv1", "bn1"),
    **{f"layer{number}": (f"layer{number}",) for number in range(1, 5)},
}
DENSENET_STAGES: dict[str, tuple[str, ...]] = {
    "stem": ("features.conv0", "features.norm0"),
    **{f"block{n}": (f"features.denseblock{n}", f"features.transition{n}") for n in range(1, 4)},
    "block4": ("features.denseblock4", "features.norm5"),
}
# VGG16's convolutions between its poolings (Simonyan and Zisserman, ICLR 2015, table 1, column D).
VGG_CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG_STAGES = {
    f"block{n}": tuple(f"features.{i}" for i in indices)
    for n, indices in enumerate(VGG_CONVOLUTIONS, 1)
}
_models = torchvision.models
ARCHITECTURES = {
    "resnet18": Architecture(
        _models.resnet18, "resnet", 512, "conv1", "fc", RESNET_STAGES, _resnet
    ),
    "resnet50": Architecture(
        _models.resnet50, "resnet", 2048, "conv1", "fc", RESNET_STAGES, _resnet
    ),
    "densenet121": Architecture(
        _models.densenet121,
        "densenet",
        1024,
        "features.conv0",
        "classifier",
        DENSENET_STAGES,
        _densenet,
    ),
    "vgg16": Architecture(_models.vgg16, "vgg", 512, "features.0", "classifier", VGG_STAGES, _vgg),
}


def class_maps(features: Tensor, weight: Tensor) -> Tensor:
    """Each cell's share of each label's logit.

    features: (N, C, h, w) last convolution; weight: (K, C)
    returns:  (N, K, h, w); mean over (h, w) plus bias is the logit
    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """
    return torch.einsum("nchw,kc->nkhw", features, weight)


class NetworkWithMaps(nn.Module):
    """A torchvision network, global average pooling and one linear layer.

    Its forward pass returns logits (N, K) and class maps (N, K, h, w).
    """

    def __init__(self, architecture: str, channels: int, labels: int) -> None:
        super().__init__()
        self.architecture = ARCHITECTURES[architecture]
        net = self.architecture.build(weights=None)
        setattr(net, self.architecture.last, nn.Linear(self.architecture.width, labels))
        _fit_channels(net, self.architecture.first, channels)
        self.add_module(self.architecture.prefix, net)

    @property
    def net(self) -> nn.Module:
        """The torchvision network."""
        return self.get_submodule(self.architecture.prefix)

    @property
    def head(self) -> nn.Linear:
        """The one linear layer after the pooling."""
        head: nn.Linear = getattr(self.net, self.architecture.last)
        return head

    def stage(self, name: str) -> Iterator[nn.Module]:
        """The modules of a stage, see Architecture.stages, or the head."""
        if name == HEAD:
            yield self.head
            return
        for path in self.architecture.stages[name]:
            yield self.net.get_submodule(path)

    def features(self, images: Tensor) -> Tensor:
        """images: (N, channels, size, size); returns (N, width, size / 32, size / 32)."""
        return self.architecture.features(self.net, images)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = class_maps(self.features(images), self.head.weight)
        return maps.mean(dim=(2, 3)) + self.head.bias, maps


def _fit_channels(net: nn.Module, path: str, channels: int) -> None:
    old = net.get_submodule(path)
    assert isinstance(old, nn.Conv2d)
    if old.in_channels == channels:
        return
    size: Any = old.kernel_size
    stride: Any = old.stride
    padding: Any = old.padding
    new = nn.Conv2d(channels, old.out_channels, size, stride, padding, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, new)


def build(architecture: str, channels: int, labels: int) -> NetworkWithMaps:
    """An untrained network with an input of channels and one output a label."""
    return NetworkWithMaps(architecture, channels, labels)
