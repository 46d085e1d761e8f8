"""Batches of images in two views each, cropped and mirrored independently, with how far each label is believed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from examples.noisy_labels.data.batches import Shuffled
from examples.noisy_labels.data.task import Task


class Views(NamedTuple):
    """Two inputs of each image, its given label, and the probability that it is right."""

    first: Tensor
    second: Tensor
    labels: Tensor
    belief: Tensor


class ViewBatches(Shuffled[Views]):
    """Batches of some of the noisy images.

    Args:
        task: Images and given labels.
        part: Which of the noisy images, as positions among them.
        belief: Of all noisy images.
        size, seed, purpose: As of `Shuffled`.
        augment: Whether to crop and mirror at random; else the two views are one.
    """

    def __init__(
        self, task: Task, part: Tensor, belief: Tensor, *, size: int, seed: int, purpose: str, augment: bool
    ) -> None:
        super().__init__(task.noisy[part], size=size, seed=seed, purpose=purpose)
        self.task, self.labels, self.belief, self.augment = task, task.noisy_labels[part], belief[part], augment

    def batch(self, chosen: Tensor) -> Views:
        """Cut, crop and mirror the chosen images twice."""
        index = self.index[chosen]
        first, second = (self.task.inputs(index, self.stream if self.augment else None) for _ in range(2))
        return Views(first, second, self.labels[chosen], self.belief[chosen])
