"""Feature visualisation: which picture a channel of the last stage responds to most."""

import numpy as np
import torch
from torch import Tensor

from dicomai.infer.network import NetworkWithMaps
from dicomai.study import Float32

SIZE = 128  # pixels; enough for what repeats, and a third of the time of 224
STEPS = 48
JITTER = 8  # pixels: what depends on the exact place is no feature
SMOOTH = 0.5  # weight of the total variation against the channel's response


def strongest_channels(network: NetworkWithMaps, label: int, count: int) -> list[tuple[int, float]]:
    """The channels that speak most for a label (half of count), and most against it.

    Returns (channel, its weight in the last layer), the highest weight first.
    """
    weights = network.head.weight.detach().float().cpu().numpy()[label]
    order = np.argsort(weights)[::-1]
    against = count // 2
    chosen = [*order[: count - against], *order[len(order) - against :]]
    return [(int(channel), float(weights[channel])) for channel in chosen]


def respond_to(
    network: NetworkWithMaps, channels: list[int], input_channels: int, steps: int = STEPS
) -> Float32:
    """Pictures that make channels of the last stage respond: (len(channels), SIZE, SIZE), 0 to 1.

    Gradient ascent on the input from noise of a fixed seed, with jitter and total variation (Olah,
    Mordvintsev and Schubert, Feature Visualization, Distill 2017).
    """
    random = torch.Generator().manual_seed(1)
    noise = torch.randn((len(channels), 1, SIZE, SIZE), generator=random) * 0.1
    picture = noise.to(network.head.weight.device).requires_grad_()
    optimizer = torch.optim.Adam([picture], lr=0.05)
    network.requires_grad_(False)
    for _ in range(steps):
        shift = torch.randint(-JITTER, JITTER + 1, (2,), generator=random).tolist()
        shifted = torch.roll(picture, (shift[0], shift[1]), (2, 3))
        response = responses(network, shifted.expand(-1, input_channels, -1, -1), channels)
        optimizer.zero_grad()
        (SMOOTH * _roughness(picture) - response).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found: Float32 = ((torch.tanh(picture.detach()[:, 0]) + 1) / 2).cpu().numpy()
    return found


def responses(network: NetworkWithMaps, pictures: Tensor, channels: list[int]) -> Tensor:
    """How much picture i makes channels[i] respond, on average over its places: (N,).

    pictures: (N, input channels, SIZE, SIZE), any value; tanh keeps them within two deviations.
    """
    features = network.features(torch.tanh(pictures) * 2)
    return torch.stack([features[i, channel].mean() for i, channel in enumerate(channels)])


def _roughness(pictures: Tensor) -> Tensor:
    down = pictures.diff(dim=2).abs().mean((1, 2, 3))
    right = pictures.diff(dim=3).abs().mean((1, 2, 3))
    return down + right
