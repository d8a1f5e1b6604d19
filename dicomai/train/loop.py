"""Training, from top to bottom."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dicomai.infer.network import ResNetWithMaps, build
from dicomai.study import Float32
from dicomai.train.dataset import Sample, augment, batches, load_images, targets
from dicomai.train.evaluate import auc
from dicomai.train.recipe import Phase, Recipe

log = structlog.get_logger()

MEAN, STD = 0.5, 0.25


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch reached; auc: the mean over sources of the validation AUC."""

    size: int
    number: int
    loss: float
    auc: float


@dataclass(frozen=True, slots=True)
class Trained:
    """The best network on the validation split, and its input size (pixels)."""

    network: ResNetWithMaps
    size: int
    epochs: tuple[Epoch, ...]


def train(
    samples: tuple[Sample, ...],
    recipe: Recipe,
    device: torch.device,
    progress: Callable[[int, int, float], None],
) -> Trained:
    """Train on the split "train", choose the epoch of the last phase on "val".

    progress is told (step, steps of the epoch, loss) after each step.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    network = build(recipe.architecture, recipe.channels, len(recipe.labels)).to(device)
    network = network.to(memory_format=torch.channels_last)
    epochs: list[Epoch] = []
    for phase in recipe.phases:
        best, reached = _train_phase(network, samples, recipe, phase, rng, device, progress)
        epochs += reached
        network.load_state_dict(best.state_dict())
    return Trained(network.eval(), recipe.phases[-1].size, tuple(epochs))


def _train_phase(
    network: ResNetWithMaps,
    samples: tuple[Sample, ...],
    recipe: Recipe,
    phase: Phase,
    rng: np.random.Generator,
    device: torch.device,
    progress: Callable[[int, int, float], None],
) -> tuple[torch.nn.Module, list[Epoch]]:
    learn = tuple(s for s in samples if s.split == "train")
    check = tuple(s for s in samples if s.split == "val")
    images, checked = load_images(learn, phase.size), load_images(check, phase.size)
    truth = targets(learn)
    steps = len(learn) // recipe.batch_size
    optimizer = torch.optim.AdamW(
        network.parameters(), phase.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, phase.learning_rate, total_steps=phase.epochs * steps
    )
    averaging = get_ema_multi_avg_fn(recipe.average_decay)  # type: ignore[no-untyped-call]
    average = AveragedModel(network, multi_avg_fn=averaging, use_buffers=True)
    best: torch.nn.Module = network
    best_auc, reached = -1.0, list[Epoch]()
    for number in range(1, phase.epochs + 1):
        network.train()
        losses = []
        for step, chosen in enumerate(batches(len(learn), recipe.batch_size, rng), 1):
            views = [augment(images[i], recipe.augmentation, rng) for i in chosen]
            inputs = to_inputs(np.stack(views), device)
            wanted = torch.from_numpy(truth[chosen]).to(device)[:, None]
            wanted = wanted * (1 - recipe.label_smoothing) + recipe.label_smoothing / 2
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.half_precision):
                logits, _ = network(inputs)
            loss = binary_cross_entropy_with_logits(logits.float(), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            losses.append(loss.item())
            progress(step, steps, losses[-1])
        candidate = average.module
        scores = score(candidate, checked, device, recipe.half_precision)
        figure = mean_auc(check, scores)
        reached.append(Epoch(phase.size, number, float(np.mean(losses)), figure))
        log.info("epoch", size=phase.size, number=number, loss=reached[-1].loss, auc=figure)
        if figure > best_auc:
            best, best_auc = copy.deepcopy(candidate), figure
    return best, reached


def to_inputs(images: Float32, device: torch.device) -> torch.Tensor:
    """(N, size, size) of 0 to 1 as the network's input (N, 1, size, size)."""
    tensor = torch.from_numpy((images - MEAN) / STD)[:, None].to(device)
    return tensor.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def score(
    network: torch.nn.Module,
    images: NDArray[np.uint8],
    device: torch.device,
    half_precision: bool,
) -> NDArray[np.float64]:
    """Probability of each grey image (N, size, size): (N,)."""
    network.eval()
    parts = []
    for start in range(0, len(images), 32):
        inputs = to_inputs(images[start : start + 32].astype(np.float32) / np.float32(255), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half_precision):
            logits, _ = network(inputs)
        parts.append(torch.sigmoid(logits[:, 0].double()).cpu().numpy())
    return np.concatenate(parts)


def mean_auc(samples: tuple[Sample, ...], scores: NDArray[np.float64]) -> float:
    """The mean over sources, so that no source can be traded for another."""
    truth = targets(samples).astype(np.float64)
    sources = np.array([sample.source for sample in samples])
    return float(
        np.mean([auc(truth[sources == s], scores[sources == s]) for s in np.unique(sources)])
    )
