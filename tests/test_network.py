"""Class maps: what they add up to, and that they are Grad-CAM, in every architecture."""

from typing import Any

import numpy as np
import pytest
import torch

from dicomai.analyze import local
from dicomai.infer.network import ARCHITECTURES, HEAD, NetworkWithMaps, build


@pytest.fixture(
    scope="module", params=[("resnet50", 3), *((name, 1) for name in ARCHITECTURES)], ids=str
)
def network(request: pytest.FixtureRequest) -> NetworkWithMaps:
    """Random weights, two labels."""
    torch.manual_seed(7)
    name, channels = request.param
    return build(name, channels, 2).eval()


def images(network: NetworkWithMaps) -> torch.Tensor:
    """Two random inputs of 96 x 64 pixels: maps of 3 x 2 cells."""
    torch.manual_seed(8)
    first: Any = network.net.get_submodule(network.architecture.first)
    return torch.randn(2, first.in_channels, 96, 64)


@torch.inference_mode()
def test_the_mean_of_a_map_plus_the_bias_is_the_logit(network: NetworkWithMaps) -> None:
    pixels = images(network)
    logits, maps = network(pixels)
    assert maps.shape == (2, 2, 3, 2)
    torch.testing.assert_close(maps.mean((2, 3)) + network.head.bias, logits, atol=1e-4, rtol=0)
    if network.architecture.prefix != "vgg":  # which does not pool globally
        # torchvision's own forward pass, which pools first, is the referee.
        torch.testing.assert_close(network.net(pixels), logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_what_is_said_of_a_place_is_what_an_image_like_it_would_get(activation: str) -> None:
    biases, maps = np.array([0.5, -1, 0], "f4"), np.zeros((3, 2, 2), "f4")
    maps[:, 0, 0] = 2, 1, -1
    cells = local(maps, biases, activation)
    logits = torch.tensor([2.5, 0.0, -1.0])
    expected = logits.sigmoid() if activation == "sigmoid" else logits.softmax(0)
    np.testing.assert_allclose(cells[:, 0, 0], expected, rtol=1e-5)
    assert cells.shape == maps.shape


@pytest.mark.parametrize("label", [0, 1])
def test_a_map_is_grad_cam_without_its_relu(network: NetworkWithMaps, label: int) -> None:
    kept: list[torch.Tensor] = []
    features = network.features

    def keep(pixels: torch.Tensor) -> torch.Tensor:
        kept.append(features(pixels))
        return kept[0]

    network.features = keep  # type: ignore[method-assign]
    try:
        logits, maps = network(images(network))
    finally:
        del network.features  # type: ignore[method-assign]
    (gradient,) = torch.autograd.grad(logits[:, label].sum(), kept[0])
    weights = gradient.mean((2, 3), keepdim=True)  # Selvaraju et al., ICCV 2017, equation 1
    grad_cam = (weights * kept[0]).sum(1)
    cells = maps.shape[2] * maps.shape[3]
    torch.testing.assert_close(grad_cam * cells, maps[:, label], atol=1e-4, rtol=1e-4)


def test_the_stages_hold_every_weight_once(network: NetworkWithMaps) -> None:
    found = [
        id(parameter)
        for name in (*network.architecture.stages, HEAD)
        for module in network.stage(name)
        for parameter in module.parameters()
    ]
    left = [p for name, p in network.named_parameters() if id(p) not in set(found)]
    assert len(found) == len(set(found))
    assert left == []
