"""Sample weights learned from trusted images: what `l2rw`, `mwnet` and `pmwnet` share.

    lower, on noisy images:    G(w, a) = weighted cross-entropy, with weights that depend on the upper variables a
    upper, on trusted images:  F(w)    = mean cross-entropy
    a moves along d/da F(w - lr grad_w G(w, a)), then w takes its ordinary step with the new weights

The virtual step is plain gradient descent, the ordinary one has momentum and weight decay; the derivative is exact:
:class:`bilevel.Unrolled` with one step. None of the three corrects labels: reported is what the classifier predicts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import bilevel
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.precision import at_least_float32
from examples.noisy_labels.recipes.recipe import Recipe, decay, descent
from examples.noisy_labels.run import processes
from examples.noisy_labels.run.settings import Training

HIDDEN = 100  # units of a weight net, in the papers of mwnet and pmwnet
RATE, WEIGHT_DECAY = 1e-3, 1e-4  # of their Adam, in the codes of both


class WeightNet(nn.Module):
    """From the loss of an image to one number: 1 - 100 - 1 units, the last through ``activation``."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1), activation)

    def forward(self, losses: Tensor) -> Tensor:
        """Return a number for each loss."""
        numbers: Tensor = self.layers(losses.unsqueeze(1)).squeeze(1)
        return at_least_float32(numbers)


def adam(weights: nn.Module) -> torch.optim.Adam:
    """Return what moves weight nets."""
    return torch.optim.Adam(weights.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)


class Reweighting(Recipe):
    """A classifier, and what moves the weights of its noisy images.

    Args:
        settings: Options.
        network: The classifier.
        upper: What the weights depend on.
        upper_optimizer: What moves it.
        inner_lr: Rate of the virtual step; None: the classifier's.
        others: Networks that are saved, beside the classifier.
    """

    def __init__(
        self,
        settings: Training,
        network: nn.Module,
        upper: nn.Module | Tensor,
        upper_optimizer: torch.optim.Optimizer,
        *,
        inner_lr: float | None = None,
        **others: nn.Module,
    ) -> None:
        self.descent = descent(settings, network)
        self.bilevel = bilevel.Unrolled(
            self.upper_loss,
            self.lower_loss,
            upper=upper,
            lower=network,
            upper_optimizer=upper_optimizer,
            lower_optimizer=self.descent,
            inner_lr=inner_lr,
            inner_step="gradient",
            on_nonfinite=settings.policy(next(network.parameters()).device.type),
            process_group=processes.group(),
        )
        networks = {"classifier": network, **others}
        super().__init__(networks, self.bilevel, {"schedule": decay(settings, self.descent)}, settings.amp)

    def upper_loss(self, batch: Any) -> Tensor:
        """Return F."""
        return self.losses(batch).mean()

    def lower_loss(self, batch: Any) -> Any:
        """Return G, and beside it what the step logs, if anything."""
        raise NotImplementedError

    def losses(self, batch: Batch) -> Tensor:
        """Return the cross-entropy of each image."""
        return functional.cross_entropy(self.classify(batch.inputs)[0], batch.labels, reduction="none")
