"""`ce`, `clean` and `ce-clean`: ordinary training of the classifier on noisy samples, on trusted ones, or on both."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from bilevel.processes.joined import Share, averaged
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.recipe import Recipe, Scalars, decay, descent
from examples.noisy_labels.run.settings import Training


class Supervised(Recipe):
    """These methods have no corrector and forget the given label: it is corrected to what the classifier answers."""

    shares_batches = True

    def __init__(self, settings: Training, network: nn.Module) -> None:
        self.noisy, self.clean = settings.method != "clean", settings.method != "ce"
        self.clean_weight = settings.clean_weight if self.noisy else 1.0
        self.transition_from = "likelihood" if self.clean else "trusted"
        self.descent = descent(settings, network)
        super().__init__(
            {"classifier": network}, self.descent, {"schedule": decay(settings, self.descent)}, settings.amp
        )

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        losses = {}
        if self.clean:
            losses["upper_loss"] = functional.cross_entropy(self.classify(clean.inputs)[0], clean.labels)
        if self.noisy:
            losses["lower_loss"] = functional.cross_entropy(self.classify(noisy.inputs)[0], noisy.labels)
        weights = {"upper_loss": self.clean_weight, "lower_loss": 1.0}
        self.descent.zero_grad()
        torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        variables, numbers = list(self.classifier.parameters()), [loss.detach() for loss in losses.values()]
        mean = averaged("the gradient", lambda: Share(numbers, [w.grad for w in variables]), variables)
        for w, gradient in zip(variables, mean.vector, strict=True):
            w.grad = gradient
        self.descent.step()
        return dict(zip(losses, mean.numbers, strict=True))
