"""What is known about the labels of a data set, as arrays: given labels, trusted ones, and which of them may judge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from examples.noisy_labels.data.task import UNKNOWN

__all__ = ["UNKNOWN", "Problem"]
Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """Labels of all samples, as positions of classes.

    Args:
        names: Names of the classes.
        annotations: (samples, annotators), what each annotator answered, or `UNKNOWN`.
        truth: (samples,), the trusted label, or `UNKNOWN`.
        judging: (samples,), which trusted samples may judge: those that were chosen at random.
        groups: (samples,), what belongs together, such as pictures of one patient; None if nothing does.
    """

    names: tuple[str, ...]
    annotations: Array
    truth: Array
    judging: Array
    groups: Array | None = None

    @property
    def classes(self) -> int:
        """Return the number of classes."""
        return len(self.names)

    @cached_property
    def votes(self) -> Array:
        """Return how many annotators name each class, (samples, classes)."""
        counts = np.zeros((len(self.truth), self.classes))
        for column in self.annotations.T:
            there = np.flatnonzero(column != UNKNOWN)
            counts[there, column[there]] += 1
        return counts

    @property
    def given(self) -> Array:
        """Return the class with the most votes, of several the first; `UNKNOWN` where nobody voted."""
        return np.where(self.voted, self.votes.argmax(1), UNKNOWN)

    @property
    def voted(self) -> Array:
        """Return which samples have a given label."""
        return np.asarray(self.votes.sum(1) > 0)

    @property
    def trusted(self) -> Array:
        """Return which samples have a trusted label."""
        return np.asarray(self.truth != UNKNOWN)

    @property
    def counting(self) -> Array:
        """Return which samples show how often labels are wrong: judging ones whose given label is known."""
        return np.asarray(self.trusted & self.judging & self.voted)

    def hiding(self, rows: Array) -> Problem:
        """Return the same problem before these rows were checked; they are to be corrected like all the others."""
        truth = self.truth.copy()
        truth[rows] = UNKNOWN
        return replace(self, truth=truth)
