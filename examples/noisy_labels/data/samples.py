"""A user's samples as a task: what they are called, who voted for what, and which are trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from examples.noisy_labels.data.randomness import generator
from examples.noisy_labels.data.task import Task, statistics


@dataclass(frozen=True, kw_only=True)
class Samples(Task):
    """A task whose noisy labels nobody knows to be right or wrong.

    Args:
        ids: What the user calls each sample.
        votes: (samples, classes), how many columns of labels name each class.
    """

    ids: tuple[str, ...]
    votes: Tensor

    @property
    def majority(self) -> Tensor:
        """Return the class with the most votes; of several, the first."""
        return self.votes.argmax(1)

    @property
    def has_given(self) -> Tensor:
        """Return which samples have a vote at all; a trusted one may have none."""
        return self.votes.sum(1) > 0

    @property
    def mistakes_known(self) -> Tensor:
        """Return for which trusted samples the label is known that they were given before they were checked."""
        return self.has_given[self.clean]


def make(samples: Tensor, votes: Tensor, labels: Tensor, *, soft: bool, **others: Any) -> Samples:
    """Return samples, standardised by what is trained on.

    Args:
        samples: Images or features.
        votes, labels: As in `Samples`.
        soft: Whether a given label is a share of each class, as of several annotators, or one class.
        others: ``ids``, ``names`` and the parts.
    """
    truth, voted = labels.clamp_min(0), votes.sum(1) > 0
    if soft:
        of_truth = functional.one_hot(truth, len(others["names"])).to(votes.dtype)
        given = torch.where(voted.unsqueeze(1), votes / votes.sum(1, keepdim=True).clamp_min(1), of_truth)
    else:
        given = torch.where(voted, votes.argmax(1), truth)
    mean, std = statistics(samples[torch.cat([others["noisy"], others["clean"]])])
    return Samples(samples=samples, votes=votes, labels=labels, given=given, mean=mean, std=std, **others)


def hold_out(labels: Tensor, trusted: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Set aside a share of the trusted samples of each class, rounded down; return those to train on, and these.

    Samples are taken in their order in the file, so a file in another order is split differently.
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
