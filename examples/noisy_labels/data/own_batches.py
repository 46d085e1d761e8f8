"""Batches of a user's samples, which live on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from examples.noisy_labels.data.augment import crop_and_flip
from examples.noisy_labels.data.batches import Batch, Shuffled


class SampleBatches(Shuffled[Batch]):
    """Batches of one part of the samples.

    Args:
        inputs: All inputs, of which ``index`` takes a part.
        index: Positions of the part.
        labels: Classes or distributions over classes, in the order of ``index``.
        shown: What the corrector is told, in the order of ``index``.
        size: Samples per batch; a smaller part is one batch.
        seed, purpose: Name the random stream.
        augment: Whether to crop and mirror images at random.
        corrupt: For each sample in the order of ``index``, the probability that the corrector is told a random class.
    """

    def __init__(
        self,
        inputs: Tensor,
        index: Tensor,
        labels: Tensor,
        shown: Tensor,
        *,
        size: int,
        seed: int,
        purpose: str,
        augment: bool = False,
        corrupt: Tensor | None = None,
    ) -> None:
        super().__init__(index, size=size, seed=seed, purpose=purpose)
        self.inputs, self.labels, self.shown = inputs, labels, shown
        self.augment, self.corrupt = augment, corrupt

    def batch(self, chosen: Tensor) -> Batch:
        """Take the chosen samples, with what the corrector is told of them."""
        index = self.index[chosen]
        inputs = crop_and_flip(self.inputs, index, self.stream) if self.augment else self.inputs[index]
        return Batch(inputs, self.labels[chosen], self._told(chosen))

    def _told(self, chosen: Tensor) -> Tensor:
        shown = self.shown[chosen]
        if self.corrupt is None:
            return shown
        classes, device = shown.shape[1], shown.device
        drawn = torch.randint(classes, (len(chosen),), device=device, generator=self.stream)
        random = torch.rand(len(chosen), device=device, generator=self.stream) < self.corrupt[chosen]
        return torch.where(random.unsqueeze(1), functional.one_hot(drawn, classes).to(shown.dtype), shown)
