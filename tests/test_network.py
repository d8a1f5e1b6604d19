"""Class maps: what they add up to, and that they are Grad-CAM."""

import pytest
import torch

from dicomai.infer.network import ResNetWithMaps, build


@pytest.fixture(scope="module", params=[1, 3])
def network(request: pytest.FixtureRequest) -> ResNetWithMaps:
    """Random weights, two labels."""
    torch.manual_seed(7)
    return build("resnet50", request.param, 2).eval()


def images(network: ResNetWithMaps) -> torch.Tensor:
    """Two random inputs of 96 x 64 pixels: maps of 3 x 2 cells."""
    torch.manual_seed(8)
    return torch.randn(2, network.resnet.conv1.in_channels, 96, 64)


@torch.inference_mode()
def test_the_mean_of_a_map_plus_the_bias_is_the_logit(network: ResNetWithMaps) -> None:
    pixels = images(network)
    logits, maps = network(pixels)
    assert maps.shape == (2, 2, 3, 2)
    torch.testing.assert_close(maps.mean((2, 3)) + network.head.bias, logits, atol=1e-4, rtol=0)
    # torchvision's own forward pass, which pools first, is the referee.
    torch.testing.assert_close(network.resnet(pixels), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("label", [0, 1])
def test_a_map_is_grad_cam_without_its_relu(network: ResNetWithMaps, label: int) -> None:
    kept: list[torch.Tensor] = []
    hook = network.resnet.layer4.register_forward_hook(lambda _m, _i, out: kept.append(out))
    logits = network.resnet(images(network))
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, label].sum(), kept[0])
    weights = gradient.mean((2, 3), keepdim=True)  # Selvaraju et al., ICCV 2017, equation 1
    grad_cam = (weights * kept[0]).sum(1)
    with torch.no_grad():
        _, maps = network(images(network))
    cells = maps.shape[2] * maps.shape[3]
    torch.testing.assert_close(grad_cam * cells, maps[:, label], atol=1e-4, rtol=1e-4)
