"""Training, from top to bottom.

Every random number follows from the recipe's seed and the place (phase, epoch, step), so that a
training which was killed ends as if it had not been.
"""

import copy
import dataclasses
import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dicomai import durable
from dicomai.errors import Misuse, Stopped
from dicomai.infer.network import HEAD, NetworkWithMaps
from dicomai.train.augment import augment
from dicomai.train.dataset import Data, at_size
from dicomai.train.evaluate import accuracy, mean_auc
from dicomai.train.losses import class_weights, lasso, plain_loss, training_loss
from dicomai.train.recipe import STAGES, Phase, Recipe

MEAN, STD = 0.5, 0.25
SAVE_SECONDS = 300.0
SCORED_AT_ONCE = 64
PLATEAU_EPOCHS, PLATEAU_FACTOR = 4, 0.3
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Epoch:
    """What an epoch reached. loss: of training; the other figures: on the validation split."""

    phase: int
    number: int
    loss: float
    val_loss: float
    accuracy: float
    auc: float
    images_per_second: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """Where a training is; of: steps in this epoch; loss: the epoch's mean so far."""

    phase: int
    epoch: int
    step: int
    of: int
    loss: float
    images_per_second: float


@dataclass
class State:
    """All that a checkpoint holds. best: the network with the smallest validation loss."""

    digest: str
    network: dict[str, Tensor]
    phase: int = 0
    epoch: int = 0
    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    rate: float = 1.0
    optimizer: dict[str, Any] | None = None
    average: dict[str, Tensor] | None = None
    best: dict[str, Tensor] | None = None
    best_loss: float = float("inf")
    waited: int = 0
    epochs: list[Epoch] = dataclasses.field(default_factory=list)


def train(
    network: NetworkWithMaps,
    learn: Data,
    check: Data,
    recipe: Recipe,
    folder: Path,
    tell: Callable[[Step | Epoch], None],
    stop: threading.Event,
) -> list[Epoch]:
    """Train a network on one split, choose its best epoch on the other; it keeps its weights.

    folder: of checkpoints, from the last of which it goes on; tell: is told each step and epoch.
    Raises Stopped, after a checkpoint, where stop is set.
    """
    device = next(network.parameters()).device
    state = _resume(folder, _digest(recipe, learn, check), network)
    for phase in recipe.phases[state.phase :]:
        network.load_state_dict(state.network)
        course = _Course(network, learn, check, recipe, phase, state, device)
        while state.epoch < phase.epochs and state.waited < recipe.patience:
            started, saved = time.monotonic() - state.seconds, time.monotonic()
            for batch in course.batches():
                state.losses.append(course.step(batch))
                state.step += 1
                tell(course.place(time.monotonic() - started))
                if stop.is_set() or time.monotonic() - saved > SAVE_SECONDS:
                    state.seconds, saved = time.monotonic() - started, time.monotonic()
                    _save(folder, course.state())
                if stop.is_set():
                    raise Stopped("training was stopped; it goes on from there")
            seconds = time.monotonic() - started
            tell(course.end_of_epoch(seconds))
            _save(folder, course.state())
        state.network = state.best or network.state_dict()
        state.phase, state.epoch, state.waited, state.rate = state.phase + 1, 0, 0, 1.0
        state.optimizer = state.average = None
        if state.phase < len(recipe.phases) and recipe.phases[state.phase].size != phase.size:
            state.best, state.best_loss = None, float("inf")  # losses at two sizes do not compare
        _save(folder, state)
    network.load_state_dict(state.network)
    return state.epochs


class _Course:
    """One phase: what learns, how fast, and from what."""

    def __init__(
        self,
        network: NetworkWithMaps,
        learn: Data,
        check: Data,
        recipe: Recipe,
        phase: Phase,
        state: State,
        device: torch.device,
    ) -> None:
        self.network, self.recipe, self.phase, self._state = network, recipe, phase, state
        self._device = device
        size = phase.size or recipe.size
        self._images = at_size(learn.images, size)
        self._targets = torch.from_numpy(learn.targets).to(device)
        self._check, self._checked = check, at_size(check.images, size)
        self._weights = class_weights(self._targets.cpu(), recipe.loss.class_weights).to(device)
        self.steps = max(1, len(self._images) // recipe.batch_size)
        self._learning = _freeze(network, phase, recipe.architecture)
        self._optimizer = torch.optim.AdamW(
            self._learning, phase.learning_rate, weight_decay=recipe.loss.l2
        )
        if state.optimizer is not None:
            self._optimizer.load_state_dict(state.optimizer)
        self._average = state.average
        self._bank: dict[int, Tensor] = {}

    def batches(self) -> Iterator[NDArray[np.intp]]:
        """The images of each step that is left of this epoch; each once, in random order."""
        state = self._state
        order = self._random("order", state.epoch)
        indices = torch.randperm(len(self._images), generator=order).numpy()
        size = self.recipe.batch_size
        for step in range(state.step, self.steps):
            yield indices[step * size : (step + 1) * size]

    def step(self, chosen: NDArray[np.intp]) -> float:
        """Learn from a batch; returns its loss."""
        place = self._state.epoch * self.steps + self._state.step
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(place)
        _set_modes(self.network, self.phase, self.recipe.architecture)
        with self._autocast():
            logits = self._logits(chosen, place)
        loss = training_loss(
            logits.float(), self._targets[chosen], self._weights, self.recipe.kind, self.recipe.loss
        )
        if self.recipe.loss.l1:
            loss = loss + lasso(self._learning, self.recipe.loss.l1)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._learning, self.recipe.gradient_clip)
        self._optimizer.step()
        self._follow(place)
        return float(loss.detach())

    def _logits(self, chosen: NDArray[np.intp], place: int) -> Tensor:
        if self.phase.fine_tune_from == HEAD:
            pooled = self._view(self._state.epoch % self.phase.views)[chosen].to(self._device)
        else:
            images = self._augmented(chosen, self._random("image", place))
            pooled = self.network.features(self._normal(images)).mean((2, 3))
        if self.recipe.loss.dropout:
            keep = 1 - self.recipe.loss.dropout
            mask = torch.rand(pooled.shape, generator=self._random("drop", place)) < keep
            pooled = pooled * mask.to(self._device) / keep
        return self.network.head(pooled)  # type: ignore[no-any-return]

    def _view(self, number: int) -> Tensor:
        """What the frozen stages say of one view of every image: (N, width); computed once.

        They never change, so that a few views of each image, drawn again and again, do what new
        ones in each epoch would, and cost one forward pass each.
        """
        if number not in self._bank:
            parts = []
            with torch.inference_mode(), self._autocast():
                for start in range(0, len(self._images), SCORED_AT_ONCE):
                    chosen = np.arange(start, min(start + SCORED_AT_ONCE, len(self._images)))
                    random = self._random("view", number, start)
                    images = self._normal(self._augmented(chosen, random))
                    parts.append(self.network.features(images).float().mean((2, 3)).cpu())
            self._bank[number] = torch.cat(parts).clone()
        return self._bank[number]

    def _augmented(self, chosen: NDArray[np.intp], random: torch.Generator) -> Tensor:
        images = torch.from_numpy(self._images[chosen]).to(self._device)
        return augment(images[:, None].float() / 255, self.recipe.augmentation, random)

    def _normal(self, images: Tensor) -> Tensor:
        return normal(images, self.recipe.channels)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.recipe.half_precision)

    def _rate(self, place: int) -> float:
        """The learning rate of a step: a linear warm-up, then the decay (Loshchilov, ICLR 2017)."""
        phase = self.phase
        rate = phase.learning_rate * self._state.rate
        warm, whole = phase.warmup_epochs * self.steps, phase.epochs * self.steps
        if place < warm:
            return rate * (place + 1) / warm
        if phase.decay == "cosine":
            done = (place - warm) / max(1, whole - warm)
            return rate * (1 + float(np.cos(np.pi * done))) / 2
        return rate

    def _follow(self, place: int) -> None:
        """Average the weights exponentially over the steps (Polyak, SIAM 1992)."""
        decay = min(self.recipe.average_decay, (place + 1) / (place + 10))
        if not self.recipe.average_decay:
            return
        now = self.network.state_dict()
        if self._average is None:
            self._average = {key: value.detach().clone() for key, value in now.items()}
            return
        for key, value in now.items():
            mine = self._average[key]
            if mine.is_floating_point():
                mine.lerp_(value, 1 - decay)
            else:
                mine.copy_(value)

    def place(self, seconds: float) -> Step:
        """Where this epoch is after so many seconds."""
        state, rate = self._state, self._state.step * self.recipe.batch_size / seconds
        loss = float(np.mean(state.losses))
        return Step(state.phase, state.epoch, state.step, self.steps, loss, rate)

    def end_of_epoch(self, seconds: float) -> Epoch:
        """Judge the network on the validation split, and keep it if it is the best yet."""
        state = self._state
        weights = self._average or self.network.state_dict()
        judged = copy.deepcopy(self.network)
        judged.load_state_dict(weights)
        logits = score(judged, self._checked, self.recipe)
        targets = torch.from_numpy(self._check.targets)
        done = Epoch(
            phase=state.phase,
            number=state.epoch + 1,
            loss=float(np.mean(state.losses)),
            val_loss=plain_loss(logits, targets, self.recipe.kind),
            accuracy=accuracy(logits.numpy(), self._check.targets),
            auc=mean_auc(logits.numpy(), self._check.targets, self._check.sources),
            images_per_second=self.steps * self.recipe.batch_size / seconds,
            seconds=seconds,
        )
        if not np.isfinite([done.loss, done.val_loss]).all():
            raise Misuse("the loss is not finite any more: lower the recipe's learning_rate")
        state.epochs.append(done)
        if done.val_loss < state.best_loss:
            state.best_loss, state.waited = done.val_loss, 0
            state.best = {key: value.detach().cpu().clone() for key, value in weights.items()}
        else:
            state.waited += 1
            if self.phase.decay == "plateau" and state.waited % PLATEAU_EPOCHS == 0:
                state.rate *= PLATEAU_FACTOR
        state.epoch, state.step, state.losses, state.seconds = state.epoch + 1, 0, [], 0.0
        return done

    def state(self) -> State:
        """What a checkpoint holds now."""
        self._state.network = self.network.state_dict()
        self._state.optimizer = self._optimizer.state_dict()
        self._state.average = self._average
        return self._state

    def _random(self, *place: object) -> torch.Generator:
        words = f"{self.recipe.seed} {self._state.phase} {place}"
        number = int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(number)


def _freeze(network: NetworkWithMaps, phase: Phase, architecture: str) -> list[Tensor]:
    """Let only the stages from fine_tune_from on learn; returns their weights."""
    network.requires_grad_(False)
    for name in _learning(phase, architecture):
        for module in network.stage(name):
            module.requires_grad_(True)
    return [p for p in network.parameters() if p.requires_grad]


def _learning(phase: Phase, architecture: str) -> tuple[str, ...]:
    stages = (*STAGES[architecture], HEAD)
    return stages[stages.index(phase.fine_tune_from) :]


def _set_modes(network: NetworkWithMaps, phase: Phase, architecture: str) -> None:
    """Frozen stages keep their batch statistics; the others do where the phase says so."""
    network.eval()
    if phase.batch_norm == "updated":
        for name in _learning(phase, architecture):
            for module in network.stage(name):
                module.train()


def normal(images: Tensor, channels: int) -> Tensor:
    """(N, 1, S, S) of 0 to 1 as the network's input (N, channels, S, S)."""
    inputs = ((images - MEAN) / STD).expand(-1, channels, -1, -1)
    return inputs.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def score(network: NetworkWithMaps, images: NDArray[np.uint8], recipe: Recipe) -> Tensor:
    """Logits of grey images (N, S, S): (N, K), on the processor."""
    network.eval()
    device = next(network.parameters()).device
    parts = []
    for start in range(0, len(images), SCORED_AT_ONCE):
        part = torch.from_numpy(images[start : start + SCORED_AT_ONCE]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.half_precision):
            logits, _ = network(normal(part[:, None].float() / 255, recipe.channels))
        parts.append(logits.float().cpu())
    return torch.cat(parts)


def _digest(recipe: Recipe, learn: Data, check: Data) -> str:
    """Of all that decides how a training goes: with another one it does not go on."""
    hasher = hashlib.sha256(recipe.model_dump_json().encode())
    for data in (learn, check):
        hasher.update(np.ascontiguousarray(data.images).tobytes())
        hasher.update(data.targets.tobytes())
    return hasher.hexdigest()


def _save(folder: Path, state: State) -> None:
    """Write a checkpoint, all or nothing."""
    buffer = io.BytesIO()
    held = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    held["epochs"] = [dataclasses.asdict(epoch) for epoch in state.epochs]
    torch.save(held, buffer)
    durable.write(folder / CHECKPOINT, [buffer.getbuffer()])


def _resume(folder: Path, digest: str, network: NetworkWithMaps) -> State:
    file = folder / CHECKPOINT
    if file.is_file():
        found = torch.load(file, map_location="cpu", weights_only=True)
        if found["digest"] == digest:
            epochs = [Epoch(**epoch) for epoch in found.pop("epochs")]
            return State(**found, epochs=epochs)
    return State(digest, network.state_dict())
