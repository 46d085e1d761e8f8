"""Training on noisy and trusted images together: what `ce-mixed`, `glc` and `em` share, and the first of them itself.

A step sends the noisy batch and a few trusted images through the classifier at once, as if all images were one training
set, so that batch statistics are those of both:

    L(w) = mean over the noisy images of their loss + clean_weight * mean cross-entropy of the trusted images

A weight of the order of (trusted images / noisy images) lets every image count once. More makes the classifier learn
the few trusted images by heart, and whatever is computed from its predictions suffers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.recipe import Recipe, Scalars, decay, descent
from examples.noisy_labels.run.settings import Training

TRUSTED_SHARE = 0.2  # trusted images in a step, for each noisy one; how much they count is the weight's business


class Mixed(Recipe):
    """``ce-mixed``: cross-entropy on all labels. Kin methods have another loss for the noisy images."""

    def __init__(self, settings: Training, network: nn.Module, **others: nn.Module) -> None:
        self.clean_weight = settings.clean_weight
        self.descent = descent(settings, network)
        networks = {"classifier": network, **others}
        super().__init__(networks, self.descent, {"schedule": decay(settings, self.descent)}, settings.amp)

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        trusted = max(1, round(TRUSTED_SHARE * len(noisy.labels)))
        images, labels = clean.inputs[:trusted], clean.labels[:trusted]
        logits, _ = self.classify(torch.cat([noisy.inputs, images]))
        of_noisy, of_trusted = logits.split([len(noisy.labels), len(labels)])
        lower_loss = self.noisy_loss(of_noisy, noisy)
        upper_loss = functional.cross_entropy(of_trusted, labels)
        self.descent.zero_grad()
        numbers = self.backward(lower_loss, upper_loss)
        self.descent.step()
        return {"upper_loss": upper_loss.detach(), "lower_loss": lower_loss.detach()} | numbers

    def backward(self, lower_loss: Tensor, upper_loss: Tensor) -> Scalars:
        """Leave the gradient of the weighted sum with the weights; return further numbers to log."""
        (lower_loss + self.clean_weight * upper_loss).backward()
        return {}

    def noisy_loss(self, logits: Tensor, noisy: Batch) -> Tensor:
        """Return the mean loss of the noisy images, from their logits."""
        return functional.cross_entropy(logits, noisy.labels)
