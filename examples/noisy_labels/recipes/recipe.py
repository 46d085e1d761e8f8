"""What the training loop asks of a method, and how all methods move their classifier."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR

import bilevel
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.precision import mixed_precision
from examples.noisy_labels.run.settings import Training

Scalars = dict[str, Tensor]


class Recipe(abc.ABC):
    """What the training loop asks of a method, and what all methods share.

    Args:
        networks: The networks that are trained, by name; one of them is the ``classifier``.
        optimizer: What moves them and can be saved.
        schedules: Learning-rate schedules, moved on after each epoch; that of the classifier is the ``schedule``.
        amp: Precision inside the networks' forward passes; see `precision.py`.

    Attributes:
        phases: How often the method goes through all epochs.
        noisy_batches: How many batches of noisy images a step takes, joined into one.
        views: How often each noisy image is augmented: a noisy batch holds all its images once, then once more.
        transition_from: Where Bayes' rule takes the transition matrix of this method from; see `decoding.py`.
        shares_batches: Whether several processes can train it together, each on its part of every batch.
        needs: What its constructor is handed after the options and the classifier; see `methods.build`.
    """

    needs: tuple[str, ...] = ()
    shares_batches = False
    phases = 1
    noisy_batches = 1
    views = 1
    transition_from = "likelihood"

    def __init__(
        self,
        networks: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer | bilevel.BilevelOptimizer,
        schedules: dict[str, MultiStepLR],
        amp: str,
    ) -> None:
        self.networks, self.optimizer, self.schedules = networks, optimizer, schedules
        self.classifier = networks["classifier"]
        self.schedule = schedules["schedule"]
        self.classify = mixed_precision(self.classifier, amp)

    @abc.abstractmethod
    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        """Take one training step; return numbers to log, still on the device."""

    def correct(self, inputs: Tensor, given: Tensor) -> Tensor:
        """Return the probability of each class to be the true one, given the image and its noisy label.

        Of a method without a corrector that is the classifier's own opinion, which has forgotten the given label.
        """
        return self.predict(inputs)

    def opinion(self, inputs: Tensor, given: Tensor) -> Tensor:
        """Return the probability of each class by all that the method knows, by which labels are ranked."""
        return self.correct(inputs, given)

    def predict(self, inputs: Tensor) -> Tensor:
        """Return the probability of each class given the image alone, from which Bayes' rule starts."""
        return functional.softmax(self.classify(inputs)[0], dim=1)

    @property
    def transition(self) -> Tensor | None:
        """Return T[k, y], the probability that class k is given the label y, if the method estimates it."""
        return None

    def end_epoch(self) -> None:
        """Move the learning-rate schedules on."""
        for schedule in self.schedules.values():
            schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {**self.networks, "optimizer": self.optimizer, **self.schedules}


def descent(settings: Training, network: nn.Module) -> torch.optim.SGD:
    """Return the classifier's SGD."""
    return torch.optim.SGD(
        network.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def decay(settings: Training, optimizer: torch.optim.Optimizer) -> MultiStepLR:
    """Return the published schedule: the learning rate falls tenfold twice."""
    return MultiStepLR(optimizer, settings.decay_epochs, gamma=0.1)
