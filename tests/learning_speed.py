"""How fast each phase learns, beside the plain way, on real radiographs; `make learning-speed`.

The plain way is the loop that everybody writes: torchvision's transforms in a DataLoader, the whole
network for every image in every epoch, full precision. Both see the same images in batches of one
size and as many epochs; validation loss at the end says whether the fast way learns the same.
"""

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import make
import numpy as np
import torch
from learning import collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dicomai.infer import package
from dicomai.infer.network import HEAD, NetworkWithMaps
from dicomai.settings import shipped
from dicomai.train.dataset import Data
from dicomai.train.loop import MEAN, STD, Epoch, Step, score, train
from dicomai.train.losses import class_weights, plain_loss, training_loss
from dicomai.train.recipe import STAGES, Phase, Recipe, load
from dicomai.train.start import begin


@dataclass(frozen=True)
class Reached:
    """What a way of training reached; seconds: of all epochs, judging them included."""

    images_per_second: float
    val_loss: float
    seconds: float


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """One image at a time, changed by torchvision."""

    def __init__(self, data: Data, recipe: Recipe, is_changed: bool) -> None:
        bounds = recipe.augmentation
        self._images, self._targets = data.images, torch.from_numpy(data.targets)
        changes = [
            v2.RandomAffine(
                bounds.rotation_degrees,
                (bounds.shift, bounds.shift),
                (1 - bounds.zoom, 1 + bounds.zoom),
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            v2.RandomHorizontalFlip(0.5 if bounds.horizontal_flip else 0),
            v2.ColorJitter(bounds.brightness, bounds.contrast),
        ]
        last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([MEAN], [STD])]
        self._transform = v2.Compose([*(changes if is_changed else []), *last])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(np.asarray(self._images[index]))[None]
        return self._transform(image), self._targets[index]


def plain(network: NetworkWithMaps, learn: Data, check: Data, recipe: Recipe) -> Reached:
    """The loop that everybody writes."""
    (phase,) = recipe.phases
    torch.manual_seed(recipe.seed)
    learning = _freeze(network, phase, recipe)
    optimizer = torch.optim.Adam(learning, phase.learning_rate)
    weights = class_weights(torch.from_numpy(learn.targets), recipe.loss.class_weights)
    loader = DataLoader(
        Pictures(learn, recipe, True),
        recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
    )
    started, best, count = time.perf_counter(), float("inf"), 0
    training = 0.0
    for _ in range(phase.epochs):
        begun = time.perf_counter()
        network.train()
        if phase.batch_norm == "frozen" or phase.fine_tune_from == HEAD:
            network.eval()
        for images, targets in loader:
            logits, _ = network(images)
            loss = training_loss(logits, targets, weights, recipe.kind, recipe.loss)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learning, recipe.gradient_clip)
            optimizer.step()
            count += len(images)
        training += time.perf_counter() - begun
        best = min(best, _judge(network, check, recipe))
    return Reached(count / training, best, time.perf_counter() - started)


def _freeze(network: NetworkWithMaps, phase: Phase, recipe: Recipe) -> list[Tensor]:
    stages = (*STAGES[recipe.architecture], HEAD)
    network.requires_grad_(False)
    for name in stages[stages.index(phase.fine_tune_from) :]:
        for module in network.stage(name):
            module.requires_grad_(True)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _judge(network: NetworkWithMaps, check: Data, recipe: Recipe) -> float:
    exact = recipe.model_copy(update={"half_precision": False})
    logits = score(network, check.images, exact)
    return plain_loss(logits, torch.from_numpy(check.targets), recipe.kind)


def ours(network: NetworkWithMaps, learn: Data, check: Data, recipe: Recipe) -> Reached:
    """dicomai's loop."""
    epochs: list[Epoch] = []

    def tell(what: Step | Epoch) -> None:
        if isinstance(what, Epoch):
            epochs.append(what)

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(network, learn, check, recipe, Path(folder), tell, threading.Event())
    seconds = time.perf_counter() - started
    images = len(epochs) * (len(learn.images) // recipe.batch_size) * recipe.batch_size
    return Reached(images / sum(e.seconds for e in epochs), _judge(network, check, recipe), seconds)


def main() -> None:
    """Each phase of the shipped recipe, from the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="to learn from")
    parser.add_argument("--recipe", type=Path, default=shipped("config/recipe.toml"))
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    recipe = load(given.recipe)
    data = collection(recipe)
    learn, check = data.of("train"), data.of("val")
    chosen = np.random.default_rng(1).permutation(len(learn))[: given.images]
    learn = learn.where(sorted(chosen.tolist()))
    active = package.read(make.STARTER)
    for number, phase in enumerate(recipe.phases, 1):
        alone = recipe.model_copy(update={"phases": (phase,), "average_decay": 0.0})
        ways = {"plain": plain, "dicomai": ours}
        found = {name: way(begin(alone, active), learn, check, alone) for name, way in ways.items()}
        for name, reached in found.items():
            print(
                f"phase {number} from {phase.fine_tune_from}, {phase.epochs} epochs, {name}: "
                f"{reached.images_per_second:.1f} images/s, validation loss "
                f"{reached.val_loss:.4f}, {reached.seconds:.0f} s"
            )
        ratio = found["dicomai"].images_per_second / found["plain"].images_per_second
        worse = found["dicomai"].val_loss / found["plain"].val_loss - 1
        print(f"phase {number}: {ratio:.1f} times as fast, validation loss {worse:+.1%}")


if __name__ == "__main__":
    main()
