"""What is made small, where some labels of some images are not known."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from dicomai.train.recipe import Loss


def class_weights(targets: Tensor, how: str) -> Tensor:
    """What an absent and a present label counts: (2, K), on average 1.

    targets: (N, K) of 0, 1 and NaN. balanced: both classes of each label count the same.
    """
    present, absent = (targets == 1).sum(0).float(), (targets == 0).sum(0).float()
    if how == "none":
        return torch.ones(2, targets.shape[1])
    known = present + absent
    return torch.stack([known / (2 * absent).clamp(min=1), known / (2 * present).clamp(min=1)])


def training_loss(logits: Tensor, targets: Tensor, weights: Tensor, kind: str, how: Loss) -> Tensor:
    """Cross-entropy of a batch, smoothed and weighted; what is not known (NaN) is masked.

    logits, targets: (N, K); weights: (2, K), see class_weights()
    """
    if kind == "multi-class":
        chosen, known = classes(targets)
        if not known.any():
            return logits.sum() * 0
        return cross_entropy(
            logits[known], chosen[known], weights[1], label_smoothing=how.label_smoothing
        )
    known = ~targets.isnan()
    wanted = targets.nan_to_num()
    counts = torch.where(wanted > 0.5, weights[1], weights[0]) * known
    smooth = wanted * (1 - how.label_smoothing) + how.label_smoothing / 2
    losses = binary_cross_entropy_with_logits(logits, smooth, reduction="none")
    return (losses * counts).sum() / known.sum().clamp(min=1)


def plain_loss(logits: Tensor, targets: Tensor, kind: str) -> float:
    """Cross-entropy as it is, neither smoothed nor weighted: what epochs are compared by."""
    if kind == "multi-class":
        chosen, known = classes(targets)
        return float(cross_entropy(logits[known], chosen[known]))
    known = ~targets.isnan()
    losses = binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
    return float(losses[known].mean())


def classes(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each image, and whether it is known: exactly one label is present."""
    present = targets == 1
    return present.float().argmax(1), present.sum(1) == 1


def lasso(parameters: list[Tensor], strength: float) -> Tensor:
    """The L1 norm of weights (Tibshirani, J. R. Stat. Soc. B 58, 1996); biases are left alone."""
    return strength * torch.stack([p.abs().sum() for p in parameters if p.ndim > 1]).sum()
