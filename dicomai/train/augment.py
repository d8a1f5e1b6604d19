"""Random changes of a batch of images at once, on whatever device it lies."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from dicomai.train.recipe import Augmentation

PADDING = {"nearest": "border", "black": "zeros"}


def augment(images: Tensor, bounds: Augmentation, random: torch.Generator) -> Tensor:
    """Another view of each image: (N, 1, S, S) of 0 to 1, and so is what comes back.

    One resampling for rotation, shift, zoom, aspect and flips; then brightness and contrast.
    random: on the processor, so that every device changes the same images the same way.
    """
    moved = images
    if bounds.model_copy(update={"brightness": 0, "contrast": 0, "fill": "nearest"}) != NOTHING:
        places = _places(len(images), bounds, random).to(images.device)
        grid = affine_grid(places, list(images.shape), align_corners=False)
        moved = grid_sample(images, grid, "bilinear", PADDING[bounds.fill], align_corners=False)
    if bounds.contrast or bounds.brightness:
        factor = 1 + _uniform(len(images), random, bounds.contrast).to(images.device)
        offset = _uniform(len(images), random, bounds.brightness * 0.5).to(images.device)
        mean = moved.mean((1, 2, 3), keepdim=True)
        moved = (moved - mean) * factor.view(-1, 1, 1, 1) + mean + offset.view(-1, 1, 1, 1)
        moved = moved.clamp(0, 1)
    return moved


NOTHING = Augmentation()


def _uniform(count: int, random: torch.Generator, bound: float) -> Tensor:
    return (torch.rand(count, generator=random) * 2 - 1) * bound


def _places(count: int, bounds: Augmentation, random: torch.Generator) -> Tensor:
    """Where in the source each pixel comes from: (N, 2, 3), in halves of the side."""
    angle = _uniform(count, random, math.radians(bounds.rotation_degrees))
    scale = 1 / (1 + _uniform(count, random, bounds.zoom))
    aspect = 1 / (1 + _uniform(count, random, bounds.aspect))
    across, down = (_uniform(count, random, 2 * bounds.shift) for _ in range(2))
    mirrored, upside_down = (
        torch.where(torch.rand(count, generator=random) < 0.5 * flip, -1.0, 1.0)
        for flip in (bounds.horizontal_flip, bounds.vertical_flip)
    )
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = (
        torch.stack([cos * scale * mirrored, -sin * scale * aspect * upside_down, across], 1),
        torch.stack([sin * scale * mirrored, cos * scale * aspect * upside_down, down], 1),
    )
    return torch.stack(rows, 1)
