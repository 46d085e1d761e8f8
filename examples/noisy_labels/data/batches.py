"""Endless shuffled batches of images that live on the device, with a position that can be saved."""

from __future__ import annotations

import abc
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from examples.noisy_labels.data.augment import crop_and_flip
from examples.noisy_labels.data.pools import Task
from examples.noisy_labels.data.randomness import generator


class Batch(NamedTuple):
    """Normalised inputs, and their labels: given ones for noisy images, true ones for trusted images.

    ``shown`` is what a corrector is told to be the given label. It differs from ``labels`` only for trusted images,
    and only if some of their labels are corrupted on purpose, so that copying is not the best answer.
    """

    inputs: Tensor
    labels: Tensor
    shown: Tensor


B = TypeVar("B")


class Shuffled(abc.ABC, Generic[B]):
    """Iterates for ever over one part of a data set, reshuffled for each pass.

    What is left over at the end of a pass is dropped, because a last batch of one or two would spoil batch statistics;
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


def cut(task: Task, index: Tensor, stream: torch.Generator, *, augment: bool) -> Tensor:
    """Return the inputs of some images, cropped and mirrored at random if they are to be augmented."""
    return task.inputs(crop_and_flip(task.pixels, index, stream) if augment else task.pixels[index])


class Batches(Shuffled[Batch]):
    """Batches of the images of one part.

    Args:
        task: Images and parts.
        index: Positions of the images in ``task.pixels``.
        labels: Their labels, in the same order.
        size: Images per batch.
        seed, purpose: Name the random stream of the order and of the crops.
        augment: Whether to crop and mirror at random.
        views: How often each image of a batch is augmented; all images come once, then all once more.
        corrupt: Share of the shown labels that are drawn anew, uniformly from all classes.
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
        corrupt: float = 0.0,
    ) -> None:
        super().__init__(index, size=size, seed=seed, purpose=purpose)
        self.task, self.labels, self.augment, self.corrupt = task, labels, augment, corrupt
        self.views = views

    def batch(self, chosen: Tensor) -> Batch:
        """Cut, crop and mirror the chosen images, all at once."""
        chosen = chosen.repeat(self.views)
        inputs = cut(self.task, self.index[chosen], self.stream, augment=self.augment)
        labels = self.labels[chosen]
        return Batch(inputs, labels, self._shown(labels))

    def _shown(self, labels: Tensor) -> Tensor:
        if self.corrupt == 0:
            return labels
        device, stream = labels.device, self.stream
        drawn = torch.randint(len(self.task.names), labels.shape, device=device, generator=stream)
        return torch.where(torch.rand(labels.shape, device=device, generator=stream) < self.corrupt, drawn, labels)
