"""The loop: it learns, it stops and goes on bit for bit, and phases do what the recipe says."""

import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from dicomai.errors import Stopped
from dicomai.infer.network import NetworkWithMaps, build
from dicomai.train.augment import augment
from dicomai.train.dataset import Data
from dicomai.train.loop import Epoch, Step, train
from dicomai.train.losses import class_weights, plain_loss, training_loss
from dicomai.train.recipe import Augmentation, Loss, Recipe

SIZE = 64


def recipe(**changes: Any) -> Recipe:
    """A small one of two phases."""
    usual = {
        "architecture": "resnet18",
        "channels": 1,
        "size": SIZE,
        "kind": "multi-label",
        "start": "none",
        "seed": 1,
        "batch_size": 16,
        "half_precision": False,
        "gradient_clip": 5.0,
        "average_decay": 0.9,
        "patience": 10,
        "labels": [{"key": "disc", "code": ["1", "99TEST", "Disc"]}],
        "augmentation": {"rotation_degrees": 10, "shift": 0.1, "contrast": 0.2},
        "loss": {"label_smoothing": 0.05, "dropout": 0.2, "l1": 1e-6, "l2": 0.01},
        "judgement": {"resamples": 200},
        "phases": [
            {"fine_tune_from": "head", "epochs": 2, "learning_rate": 1e-2, "views": 2},
            {
                "fine_tune_from": "layer3",
                "epochs": 2,
                "learning_rate": 1e-3,
                "warmup_epochs": 0.5,
                "decay": "cosine",
            },
        ],
    }
    return Recipe.model_validate({**usual, **changes})


def shapes(count: int, split: str, seed: int) -> Data:
    """Discs, which are to be found, and squares."""
    rng = np.random.default_rng(seed)
    targets = (np.arange(count) % 2).astype(np.float32)[:, None]
    images = rng.integers(0, 60, (count, SIZE, SIZE)).astype(np.uint8)
    for image, is_disc in zip(images, targets[:, 0], strict=True):
        x, y = (int(value) for value in rng.integers(16, 48, 2))
        if is_disc:
            cv2.circle(image, (x, y), 9, 200, -1)
        else:
            cv2.rectangle(image, (x - 8, y - 8), (x + 8, y + 8), 200, -1)
    names = np.array([f"{split} {number}" for number in range(count)])
    return Data(
        images=images,
        targets=targets,
        names=names,
        paths=names,
        numbers=np.ones(count, np.intp),
        digests=names,
        patients=names,
        sources=np.array(["drawn"] * count),
        splits=np.array([split] * count),
        fingerprints=tuple(b"\0" * 128 for _ in range(count)),
        facts=tuple({} for _ in range(count)),
    )


LEARN, CHECK = shapes(96, "train", 1), shapes(48, "val", 2)


def run(
    folder: Path, how: Recipe, stop_after: int | None = None
) -> tuple[list[Epoch], NetworkWithMaps]:
    """Train, or go on; stop_after: steps and epochs together."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    network = build(how.architecture, 1, 1)
    stop, told = threading.Event(), 0

    def tell(_: Step | Epoch) -> None:
        nonlocal told
        told += 1
        if told == stop_after:
            stop.set()

    return train(network, LEARN, CHECK, how, folder, tell, stop), network


def test_it_learns_what_is_shown(tmp_path: Path) -> None:
    phases = [{"fine_tune_from": "stem", "epochs": 10, "learning_rate": 2e-3, "decay": "cosine"}]
    epochs, network = run(tmp_path, recipe(phases=phases))
    assert max(epoch.auc for epoch in epochs) > 0.95
    assert all(epoch.images_per_second > 0 for epoch in epochs)
    assert not network.training


def test_stopped_five_times_it_ends_bit_for_bit_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, never = run(tmp_path / "whole", recipe())
    for stop_after in (2, 5, 3, 8, 4):
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", recipe(), stop_after)
    found, stopped = run(tmp_path / "stopped", recipe())
    assert [e.val_loss for e in found] == [e.val_loss for e in whole]
    assert min(e.val_loss for e in found) == min(e.val_loss for e in whole)
    for name, value in never.state_dict().items():
        assert torch.equal(value, stopped.state_dict()[name]), name


def test_another_recipe_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, recipe(), 8)
    epochs, _ = run(tmp_path, recipe(seed=2))
    assert [(epoch.phase, epoch.number) for epoch in epochs] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_frozen_stages_stay_as_they_were(tmp_path: Path) -> None:
    how = recipe(phases=[{"fine_tune_from": "layer3", "epochs": 1, "learning_rate": 1e-3}])
    torch.manual_seed(3)
    before = {
        key: value.clone() for key, value in build(how.architecture, 1, 1).state_dict().items()
    }
    _, network = run(tmp_path, how)
    changed = {
        key for key, value in network.state_dict().items() if not torch.equal(value, before[key])
    }
    assert {key.split(".")[1] for key in changed} == {"layer3", "layer4", "fc"}


def test_it_ends_early_where_nothing_becomes_better(tmp_path: Path) -> None:
    phases = [{"fine_tune_from": "head", "epochs": 30, "learning_rate": 50.0}]
    epochs, _ = run(tmp_path, recipe(phases=phases, patience=2))
    assert len(epochs) < 30
    best = min(range(len(epochs)), key=lambda i: epochs[i].val_loss)
    assert len(epochs) - 1 - best == 2


# What is made small


def test_what_is_not_known_weighs_nothing() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    targets = torch.tensor([[1.0, float("nan")], [float("nan"), 0.0]])
    weights = class_weights(targets, "none")
    known = torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0], [0.0]])
    expected = training_loss(*known, torch.ones(2, 1), "multi-label", Loss())
    assert training_loss(logits, targets, weights, "multi-label", Loss()) == expected
    assert plain_loss(logits, targets, "multi-label") == pytest.approx(float(expected))


def test_balanced_classes_count_the_same() -> None:
    targets = torch.tensor([[1.0]] + [[0.0]] * 9)
    weights = class_weights(targets, "balanced")
    assert weights[1, 0] == pytest.approx(5.0)
    assert weights[0, 0] == pytest.approx(10 / 18)


def test_of_several_classes_one_is_right_and_the_rest_is_not() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    right = torch.eye(3)
    both = torch.tensor([[1.0, 1.0, 0.0]]).repeat(3, 1)  # not known which
    assert plain_loss(logits, right, "multi-class") < 0.05
    weights = torch.ones(2, 3)
    assert training_loss(logits, both, weights, "multi-class", Loss()) == 0


# Augmentation


def square() -> torch.Tensor:
    """A bright square above the centre, left."""
    image = torch.zeros(1, 1, SIZE, SIZE)
    image[0, 0, 8:24, 8:24] = 1
    return image


@pytest.mark.parametrize(
    ("bounds", "turned"),
    [({"horizontal_flip": True}, [3]), ({"vertical_flip": True}, [2])],
)
def test_a_flip_is_a_mirror_image_half_of_the_time(
    bounds: dict[str, bool], turned: list[int]
) -> None:
    random = torch.Generator().manual_seed(1)
    images = square().repeat(200, 1, 1, 1)
    views = augment(images, Augmentation(**bounds), random)
    flipped = [torch.allclose(view[None], square().flip(turned), atol=1e-5) for view in views]
    kept = [torch.allclose(view[None], square(), atol=1e-5) for view in views]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 70 < sum(flipped) < 130


def test_a_shift_moves_within_its_bound_and_fills_with_what_is_near() -> None:
    random = torch.Generator().manual_seed(1)
    images = torch.full((50, 1, SIZE, SIZE), 0.3)
    images[:, :, 28:36, 28:36] = 1
    views = augment(images, Augmentation(shift=0.2), random)
    rows = (views[:, 0].amax(2) > 0.9).float().argmax(1)
    assert (rows - 28).abs().max() <= 0.2 * SIZE + 1
    assert (rows - 28).abs().max() > 0.1 * SIZE
    assert views.min() > 0.29  # no black comes in
    black = augment(images, Augmentation(shift=0.2, fill="black"), random)
    assert black.min() == 0


def test_brightness_and_contrast_stay_within_black_and_white() -> None:
    random = torch.Generator().manual_seed(1)
    views = augment(
        square().repeat(50, 1, 1, 1), Augmentation(brightness=0.5, contrast=0.5), random
    )
    assert views.min() >= 0
    assert views.max() <= 1
    assert len({round(float(view.mean()), 4) for view in views}) > 30
    assert torch.equal(augment(square(), Augmentation(), random), square())
