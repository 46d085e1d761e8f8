"""Endless shuffled batches of samples that live on the device, with a position that can be saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from examples.noisy_labels.augment import crop_and_flip
from examples.noisy_labels.batches import Batch
from examples.noisy_labels.randomness import generator


class SampleBatches:
    """Iterates for ever over one part of the samples, reshuffled for each pass; what is left of a pass is dropped.

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
        self.inputs, self.index, self.labels, self.shown = inputs, index, labels, shown
        self.augment, self.corrupt = augment, corrupt
        self.size = min(size, len(index))
        self.stream = generator(seed, purpose, index.device)
        self.order = index.new_empty(0)
        self.position = 0

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        return len(self.index) // self.size

    def __iter__(self) -> SampleBatches:
        return self

    def __next__(self) -> Batch:
        if self.position + self.size > len(self.order):
            self.order = torch.randperm(len(self.index), device=self.index.device, generator=self.stream)
            self.position = 0
        chosen = self.order[self.position : self.position + self.size]
        self.position += self.size
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

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue with the very next batch."""
        return {"stream": self.stream.get_state(), "order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.stream.set_state(state["stream"].cpu())
        self.order = state["order"].to(self.index.device)
        self.position = state["position"]
