"""Rows of a table, or images, with what is known about their labels, in parts that share none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from examples.noisy_labels.data.randomness import generator

UNKNOWN = -1  # instead of a class, where no trusted label is there


@dataclass(frozen=True)
class Samples:
    """A data set. ``noisy``, ``trusted`` and ``held_out`` are positions in all the others, disjoint and sorted.

    Args:
        ids: What the user calls each sample.
        names: Names of the classes.
        inputs: (samples, features) of any floating dtype, or uint8 (samples, 3, height, width).
        votes: (samples, classes), how many columns of labels name each class.
        labels: (samples,), the trusted class, or `UNKNOWN`.
        noisy: Samples whose labels are to be corrected.
        trusted: Samples with a trusted label, for training.
        held_out: Samples with a trusted label that nothing is trained on.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    inputs: Tensor
    votes: Tensor
    labels: Tensor
    noisy: Tensor
    trusted: Tensor
    held_out: Tensor

    @property
    def shares(self) -> Tensor:
        """Return the distribution of each sample's votes, (samples, classes); zeros where it has none."""
        return self.votes / self.votes.sum(1, keepdim=True).clamp_min(1)

    @property
    def given(self) -> Tensor:
        """Return the class with the most votes; of several, the first."""
        return self.votes.argmax(1)

    @property
    def voted(self) -> Tensor:
        """Return which samples have a vote at all; a trusted one may have none."""
        return self.votes.sum(1) > 0

    @property
    def shown(self) -> Tensor:
        """Return what the corrector is told: the shares, or for a trusted sample without votes its trusted class."""
        truth = functional.one_hot(self.labels.clamp_min(0), len(self.names)).to(self.votes.dtype)
        return torch.where(self.voted.unsqueeze(1), self.shares, truth)

    def to(self, device: torch.device) -> Samples:
        """Return the same samples on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Samples(ids=self.ids, names=self.names, **tensors)

    def digest(self) -> str:
        """Return a fingerprint: a run is only resumed on the samples it was started on."""
        digest = hashlib.sha256(repr((self.ids, self.names)).encode())
        for tensor in (self.inputs, self.votes, self.labels, self.noisy, self.trusted, self.held_out):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def hold_out(labels: Tensor, trusted: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Set aside a share of the trusted samples of each class, rounded down; return those to train on, and these.

    Samples are dealt in their order in the file, so a file in another order is dealt differently.
    """
    stream = generator(seed, "held out")
    kept, aside = [], []
    for one in labels[trusted].unique():
        members = trusted[labels[trusted] == one]
        members = members[torch.randperm(len(members), generator=stream)]
        number = min(int(share * len(members) + 1e-9), len(members) - 1)
        aside.append(members[:number])
        kept.append(members[number:])
    return torch.cat(kept).sort().values, torch.cat(aside).sort().values
