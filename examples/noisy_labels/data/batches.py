"""Endless shuffled batches of samples that live on the device, with a position that can be saved."""

from __future__ import annotations

import abc
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from examples.noisy_labels.data.randomness import generator
from examples.noisy_labels.data.task import Task


class Batch(NamedTuple):
    """Normalised inputs, and their labels: given ones for noisy samples, true ones for trusted samples.

    ``given`` is what a corrector is told to be the given label. It differs from ``labels`` only for trusted samples:
    where their mistaken label is known, or where some are corrupted on purpose, so that copying is not the best answer.
    """

    inputs: Tensor
    labels: Tensor
    given: Tensor


B = TypeVar("B")


class Shuffled(abc.ABC, Generic[B]):
    """Iterates for ever over one part of a data set, reshuffled for each pass.

    What is left over at the end of a pass is left out, because a last batch of one or two would spoil batch statistics;
    the next shuffle brings it back. A part smaller than the batch size is one batch.

    Args:
        index: Positions of the part in the data set.
        size: Samples per batch.
        seed, purpose: Name the random stream of the order, and of what else a batch draws.
    """

    def __init__(self, index: Tensor, *, size: int, seed: int, purpose: str) -> None:
        self.index, self.size = index, min(size, len(index))
        self.stream = generator(seed, purpose, index.device)
        self.order = index.new_empty(0)
        self.position = 0

    @abc.abstractmethod
    def batch(self, chosen: Tensor) -> B:
        """Make the batch of the samples that are ``chosen``, as positions in the part."""

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        return len(self.index) // self.size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> B:
        if self.position + self.size > len(self.order):
            self.order = torch.randperm(len(self.index), device=self.index.device, generator=self.stream)
            self.position = 0
        chosen = self.order[self.position : self.position + self.size]
        self.position += self.size
        return self.batch(chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue with the very next batch."""
        return {"stream": self.stream.get_state(), "order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.stream.set_state(state["stream"].cpu())
        self.order = state["order"].to(self.index.device)
        self.position = state["position"]


class Batches(Shuffled[Batch]):
    """Batches of one part of a task.

    Args:
        task: Samples and parts.
        index: Positions of the samples in the task.
        labels: What is learned, in the same order: classes, or shares of them.
        size: Samples per batch.
        seed, purpose: Name the random stream of the order and of the crops.
        augment: Whether to crop and mirror at random.
        views: How often each sample of a batch is augmented; all come once, then all once more.
        corrupt: For each sample the probability that its given label is drawn anew, uniformly from all classes; without
            it nothing is drawn, so the stream is that of the order and the crops alone.
    """

    def __init__(
        self,
        task: Task,
        index: Tensor,
        labels: Tensor,
        *,
        size: int,
        seed: int,
        purpose: str,
        augment: bool,
        views: int = 1,
        corrupt: Tensor | None = None,
    ) -> None:
        super().__init__(index, size=size, seed=seed, purpose=purpose)
        self.task, self.labels, self.augment, self.views = task, labels, augment, views
        self.corrupt = corrupt

    def batch(self, chosen: Tensor) -> Batch:
        """Cut, crop and mirror the chosen samples, all at once."""
        chosen = chosen.repeat(self.views)
        inputs = self.task.inputs(self.index[chosen], self.stream if self.augment else None)
        return Batch(inputs, self.labels[chosen], self._given(chosen))

    def _given(self, chosen: Tensor) -> Tensor:
        given = self.task.given[self.index[chosen]]
        if self.corrupt is None:
            return given
        classes, device = len(self.task.names), given.device
        drawn = torch.randint(classes, (len(chosen),), device=device, generator=self.stream)
        random = torch.rand(len(chosen), device=device, generator=self.stream) < self.corrupt[chosen]
        if given.ndim == 1:
            return torch.where(random, drawn, given)
        return torch.where(random.unsqueeze(1), functional.one_hot(drawn, classes).to(given.dtype), given)
