"""The methods: what each one trains, on which images, and how it moves.

- ``ce``: cross-entropy on the noisy labels as given.
- ``clean``: cross-entropy on the trusted images alone.
- ``ce-clean``: the sum of both: EBOMLC with rho = 1, a corrector that copies, and a multiplier of 1.
- ``ebomlc``: EBOMLC as printed, in the value-function reading: grad_w Q = grad_w G(w).
- ``ebomlc-difference``: the reading of its proofs: grad_w Q = grad_w G(w) - grad_w G(w1).
- ``mlc-d``: MLC by plain BOME: rho = 1, no damping, several look-ahead steps on one batch.

A recipe is all that the training loop knows of a method. A new one is a class or a case in `build`.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR

import bilevel
from examples.noisy_labels.batches import Batch
from examples.noisy_labels.label_correction import LabelCorrection
from examples.noisy_labels.models import Corrector, classifier
from examples.noisy_labels.settings import Settings

Scalars = dict[str, Tensor]


class Recipe(abc.ABC):
    """What the training loop asks of a method, and what all methods share.

    Args:
        networks: The networks that are trained, by name; one of them is the ``classifier``.
        optimizer: What moves them and can be saved.
        schedule: Learning-rate schedule, moved on after each epoch.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer | bilevel.BilevelOptimizer,
        schedule: MultiStepLR,
    ) -> None:
        self.networks, self.optimizer, self.schedule = networks, optimizer, schedule
        self.classifier = networks["classifier"]

    @abc.abstractmethod
    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        """Take one training step; return numbers to log, still on the device."""

    @abc.abstractmethod
    def correct(self, inputs: Tensor, given: Tensor) -> Tensor:
        """Return the probability of each class to be the true one, given the image and its noisy label."""

    def end_epoch(self) -> None:
        """Move the learning-rate schedule on."""
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes."""
        parts = {**self.networks, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        parts = {**self.networks, "optimizer": self.optimizer, "schedule": self.schedule}
        for name, part in parts.items():
            part.load_state_dict(state[name])


class Supervised(Recipe):
    """Ordinary training of the classifier on the noisy images, on the clean ones, or on both with equal weight."""

    def __init__(self, settings: Settings, network: nn.Module, *, noisy: bool, clean: bool) -> None:
        self.noisy, self.clean = noisy, clean
        self.descent, schedule = descent(settings, network)
        super().__init__({"classifier": network}, self.descent, schedule)

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        losses = {}
        if self.clean:
            losses["upper_loss"] = functional.cross_entropy(self.classifier(clean.inputs)[0], clean.labels)
        if self.noisy:
            losses["lower_loss"] = functional.cross_entropy(self.classifier(noisy.inputs)[0], noisy.labels)
        self.descent.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        self.descent.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def correct(self, inputs: Tensor, given: Tensor) -> Tensor:
        """Return the classifier's own opinion: these methods have no corrector and forget the given label."""
        return functional.softmax(self.classifier(inputs)[0], dim=1)


class MetaLabelCorrection(Recipe):
    """A classifier and a corrector, moved together by a bilevel optimizer."""

    def __init__(self, settings: Settings, network: nn.Module, corrector: nn.Module) -> None:
        lower, schedule = descent(settings, network)
        upper = torch.optim.Adam(corrector.parameters(), lr=settings.meta_lr, amsgrad=True)
        self.corrector = corrector
        self.bilevel = bilevel_optimizer(settings, network, corrector, upper, lower)
        super().__init__({"classifier": network, "corrector": corrector}, self.bilevel, schedule)

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        stats = self.bilevel.step(clean, noisy)
        return {name: getattr(stats, name) for name in ("upper_loss", "lower_loss", "multiplier", "constraint")}

    def correct(self, inputs: Tensor, given: Tensor) -> Tensor:
        corrected: Tensor = self.corrector(self.classifier(inputs)[1], given)
        return corrected


def build(settings: Settings, classes: int, device: torch.device) -> Recipe:
    """Build the networks with first weights that depend on the seed alone, and the recipe around them."""
    torch.manual_seed(settings.seed)  # first weights are drawn on the CPU, so they are the same on every device
    network = classifier(settings.network, classes)
    corrector = Corrector(network.features, classes)
    network, corrector = network.to(device), corrector.to(device)
    match settings.method:
        case "ce":
            return Supervised(settings, network, noisy=True, clean=False)
        case "clean":
            return Supervised(settings, network, noisy=False, clean=True)
        case "ce-clean":
            return Supervised(settings, network, noisy=True, clean=True)
    return MetaLabelCorrection(settings, network, corrector)


def bilevel_optimizer(
    settings: Settings,
    network: nn.Module,
    corrector: nn.Module,
    upper: torch.optim.Optimizer,
    lower: torch.optim.Optimizer,
) -> bilevel.BOME | bilevel.EBOMLC:
    """Wrap the two losses and the two torch optimizers in the bilevel method that the settings name."""
    variables: dict[str, Any] = {
        "upper": corrector,
        "lower": network,
        "upper_optimizer": upper,
        "lower_optimizer": lower,
    }
    if settings.method == "mlc-d":
        losses = LabelCorrection(network, corrector, rho=1.0)
        barrier = bilevel.barrier.GradientNorm(settings.delta)
        steps = settings.inner_steps
        return bilevel.BOME(losses.upper_loss, losses.lower_loss, inner_steps=steps, barrier=barrier, **variables)
    losses = LabelCorrection(network, corrector, rho=settings.rho, mixture=settings.mixture)
    return bilevel.EBOMLC(
        losses.upper_loss,
        losses.lower_loss,
        delta=settings.delta,
        xi=settings.xi,
        value_gradient="difference" if settings.method == "ebomlc-difference" else "value_function",
        **variables,
    )


def descent(settings: Settings, network: nn.Module) -> tuple[torch.optim.SGD, MultiStepLR]:
    """Return the classifier's SGD and its schedule."""
    optimizer = torch.optim.SGD(
        network.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    return optimizer, MultiStepLR(optimizer, settings.drops, gamma=0.1)
