"""A problem of noisy labels: samples that live on the device, in trusted, noisy and test parts that share none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from examples.noisy_labels.data.augment import crop_and_flip
from examples.noisy_labels.data.noise import realised_rate

UNKNOWN = -1  # instead of a class, where the true one is not known


@dataclass(frozen=True)
class Task:
    """Samples and their labels. ``clean``, ``noisy`` and ``test`` are positions in all samples.

    Args:
        samples: Images, uint8 (samples, channels, height, width), or features, (samples, features).
        labels: The true class of each sample, or `UNKNOWN`; of the noisy ones only for measuring.
        given: The label that each sample was given: a class, or of several annotators the shares of the classes. Where
            it is not known, that of a trusted sample is the true one.
        clean, noisy, test: The parts.
        names: Of the classes.
        mean, std: What is subtracted from the samples, and what they are then divided by.
        memory_format: Order in memory of the inputs.
    """

    samples: Tensor
    labels: Tensor
    given: Tensor
    clean: Tensor
    noisy: Tensor
    test: Tensor
    names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    memory_format: torch.memory_format = torch.preserve_format

    def __post_init__(self) -> None:
        if self.overlap:
            raise ValueError(f"Task(overlap={self.overlap}): a sample is in two of clean, noisy and test. Split again.")

    @property
    def overlap(self) -> int:
        """Return how many positions occur in more than one part, or twice in one."""
        together = torch.cat([self.clean, self.noisy, self.test])
        return len(together) - len(together.unique())

    @property
    def noisy_labels(self) -> Tensor:
        """Return the given labels of the noisy samples."""
        return self.given[self.noisy]

    @property
    def true_labels(self) -> Tensor:
        """Return the true labels of the noisy samples; only for measuring, no method sees them."""
        return self.labels[self.noisy]

    @property
    def wrong(self) -> float | None:
        """Return the share of noisy labels that are wrong; None where nobody knows."""
        true = self.true_labels
        return None if (true == UNKNOWN).any() else realised_rate(true, self.noisy_labels)

    @property
    def has_given(self) -> Tensor:
        """Return which samples were given a label by those whose mistakes are to be corrected."""
        return torch.isin(torch.arange(len(self.labels), device=self.noisy.device), self.noisy)

    @property
    def mistakes_known(self) -> Tensor:
        """Return for which trusted samples the label is known that they were given before they were checked."""
        return torch.zeros_like(self.clean, dtype=torch.bool)

    def inputs(self, index: Tensor, stream: torch.Generator | None = None) -> Tensor:
        """Return normalised inputs of the samples at these positions; with a stream, cropped and mirrored at random."""
        raw = self.samples[index] if stream is None else crop_and_flip(self.samples, index, stream)
        if raw.ndim == 4:
            raw = raw.to(memory_format=self.memory_format)  # while a pixel is still one byte
        return (raw.to(self.mean.dtype) - self.mean) / self.std

    def to(self, device: torch.device) -> Self:
        """Return the same task on a device."""
        values: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        moved: dict[str, Any] = {name: one.to(device) for name, one in values.items() if isinstance(one, Tensor)}
        return replace(self, **moved)

    def digest(self) -> str:
        """Return a fingerprint: a run is only resumed on the samples that it was started on."""
        digest = hashlib.sha256()
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                digest.update(value.cpu().contiguous().numpy().tobytes())
            elif isinstance(value, tuple):  # names; the order in memory is an option, and compared as such
                digest.update(repr(value).encode())
        return digest.hexdigest()


def statistics(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each feature, or of each channel of images; 1 where nothing varies."""
    if samples.ndim == 2:
        mean, std = samples.double().mean(0), samples.double().std(0, correction=0)
    else:  # in integers: exact, without a copy of all images in floating point
        count = samples.numel() / samples.shape[1]
        total = samples.sum((0, 2, 3), dtype=torch.int64).double()
        squares = torch.stack([one.long().square().sum((1, 2)) for one in samples]).sum(0).double()
        mean = (total / count).view(-1, 1, 1)
        std = (squares.view(-1, 1, 1) / count - mean.square()).clamp_min(0).sqrt()
    return mean.float(), std.where(std > 0, 1.0).float()
