"""The problem of every loop: 40 % of the labels are wrong; weights of samples are learned from a few trusted ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

Batch = list[Tensor]  # of trusted samples: inputs and labels; of the others: inputs, labels and the samples' numbers
SAMPLES, TRUSTED, WRONG = 240, 40, 0.4


class Weighted(nn.Module):
    """A classifier, one weight for each training sample, and the two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        self.weights = nn.Parameter(torch.zeros(SAMPLES))

    def upper_loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return cross_entropy(self.classifier(x), y)

    def lower_loss(self, batch: Batch) -> Tensor:
        x, y, number = batch
        each = cross_entropy(self.classifier(x), y, reduction="none")
        return (self.weights[number].sigmoid() * each).mean()


def data(seed: int = 0) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Return trusted samples, all others with their numbers, and which of those have the right label."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES + TRUSTED, 8, generator=draw)
    y = x[:, :3].argmax(1)
    wrong = torch.rand(SAMPLES, generator=draw) < WRONG
    given = torch.where(wrong, (y[TRUSTED:] + 1) % 3, y[TRUSTED:])
    trusted = TensorDataset(x[:TRUSTED], y[:TRUSTED])
    return trusted, TensorDataset(x[TRUSTED:], given, torch.arange(SAMPLES)), ~wrong


def told_apart(weights: Tensor, right: Tensor) -> str:
    """Say how far the learned weights tell right labels from wrong ones."""
    learned = weights.detach().cpu().sigmoid()
    return f"mean weight of right labels {learned[right].mean():.2f}, of wrong ones {learned[~right].mean():.2f}"
