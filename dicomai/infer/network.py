"""ResNet50 that gives its class maps with its logits; the only place that imports torchvision."""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

ARCHITECTURES = {"resnet50": torchvision.models.resnet50}


def class_maps(features: Tensor, weight: Tensor) -> Tensor:
    """Each cell's share of each label's logit.

    features: (N, C, h, w) last convolution; weight: (K, C)
    returns:  (N, K, h, w); mean over (h, w) plus bias is the logit
    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """
    return torch.einsum("nchw,kc->nkhw", features, weight)


class ResNetWithMaps(nn.Module):
    """A torchvision ResNet whose forward pass returns (logits (N, K), maps (N, K, h, w))."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.resnet = resnet

    @property
    def head(self) -> nn.Linear:
        """The one linear layer after the pooling."""
        head: nn.Linear = self.resnet.fc  # type: ignore[assignment]
        return head

    def features(self, images: Tensor) -> Tensor:
        """images: (N, channels, size, size); returns (N, C, size / 32, size / 32)."""
        net: Any = self.resnet
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        features: Tensor = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = class_maps(self.features(images), self.head.weight)
        return maps.mean(dim=(2, 3)) + self.head.bias, maps


def build(architecture: str, channels: int, labels: int) -> ResNetWithMaps:
    """An untrained network with an input of channels and one output a label."""
    resnet = ARCHITECTURES[architecture](weights=None, num_classes=labels)
    if channels != resnet.conv1.in_channels:
        old = resnet.conv1
        resnet.conv1 = nn.Conv2d(
            channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False
        )
        nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    return ResNetWithMaps(resnet)
