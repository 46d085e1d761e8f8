"""What may be promised about corrected labels: which need no check, how many errors remain, how often labels are wrong.

A label is kept or changed without a check where its calibrated probability reaches a threshold, and the threshold is
the lowest for which the trusted samples show the precision that was asked for: the exact lower bound (Clopper and
Pearson) of the share of right labels among the judging samples above it. Which thresholds are tried in which order is
decided by their probabilities alone, not by which labels are right. A chain of them is gone along until one fails:
each may then be tested at the level of the whole chain, because the first wrong promise would have been the first test
of it (fixed-sequence testing). If no bound reaches the precision nothing is promised, and everything is to be checked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from examples.noisy_labels.verdict import intervals
from examples.noisy_labels.verdict.decision import Judged
from examples.noisy_labels.verdict.problem import UNKNOWN, Problem

Array = np.ndarray
# Shares of the judging samples above the thresholds that are tried, and what part of the error each chain may use. With
# 200 samples the first begins where few mistakes can be told from many; the second is for tasks that are hard or large.
CHAINS = ((0.6, (0.6, 0.75, 0.9, 1.0)), (0.4, (0.25, 0.4)))
KEEP, CHANGE, CHECK = "keep", "change", "check"


@dataclass(frozen=True)
class Interval:
    """A share or a number, and where it may lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Promise:
    """Which labels need no check.

    Args:
        precision: What was asked for.
        threshold: Least probability of a label that needs no check; above 1 if nothing can be promised.
        bound: Lower bound of the precision above the threshold; if nothing can be promised, the best of all bounds.
        shown: Share of right labels among the judging samples above the threshold.
    """

    precision: float
    threshold: float
    bound: float
    shown: float

    @property
    def kept(self) -> bool:
        """Return whether anything is promised."""
        return self.threshold <= 1


NOTHING = Promise(1.0, 2.0, 0.0, float("nan"))


def promise(judged: Judged, way: str, confidence: Array, precision: float, level: float) -> Promise:
    """Return the lowest threshold at which the bound reaches the precision.

    Args:
        judged: The cross-fitted answers.
        way: Whose labels are promised.
        confidence: How sure they are, of each judging sample.
        precision: What is asked for.
        level: Probability with which the bound holds.
    """
    right = judged.right(way)
    best, most, promised = 0.0, 0.0, Promise(precision, 2.0, 0.0, float(right.mean()))
    for part, coverages in CHAINS:
        each = 1 - part * (1 - level)
        for coverage in coverages:
            threshold = float(np.quantile(confidence, 1 - coverage, method="lower"))
            above = confidence >= threshold
            number = intervals.effective(right[above], None if judged.groups is None else judged.groups[above])
            share = float(right[above].mean())
            bound = intervals.lower_bound(share * number, number, each)
            best = max(best, bound)
            if bound < precision:
                break
            if coverage > most:
                # If it holds above all that judged, it holds for everything.
                most, promised = coverage, Promise(precision, 0.0 if coverage == 1 else threshold, bound, share)
    return promised if promised.kept else replace(promised, bound=best)


def actions(probabilities: Array, given: Array, labels: Array, promised: Promise) -> Array:
    """Return ``keep``, ``change`` or ``check`` for each sample."""
    sure = probabilities[np.arange(len(labels)), labels] >= promised.threshold
    return np.where(~sure, CHECK, np.where(labels == given, KEEP, CHANGE))


def remaining_errors(judged: Judged, way: str, unchecked: int, level: float) -> Interval:
    """Return how many labels of the samples that nobody checked are wrong after correction.

    The way was picked for how well it did, so its interval is one of those that hold for all ways at once.
    """
    if way not in judged.probabilities:
        return Interval(float("nan"), 0.0, unchecked)
    right = judged.right(way)
    number = intervals.effective(right, judged.groups)
    wrong = 1 - right.mean() if len(right) else np.nan
    each = 1 - (1 - level) / max(1, len(judged.probabilities))
    low, high = intervals.clopper_pearson(wrong * number if len(right) else 0, number, each)
    return Interval(unchecked * float(wrong), unchecked * low, unchecked * high)


def noise_per_class(problem: Problem, level: float) -> dict[str, Interval]:
    """Return for each true class how often its given label is wrong, counted on judging samples."""
    rows = np.flatnonzero(problem.counting)
    wrong, truth = problem.given[rows] != problem.truth[rows], problem.truth[rows]
    return {name: _share(wrong[truth == i], level) for i, name in enumerate(problem.names)}


def noise_per_annotator(problem: Problem, level: float) -> list[Interval]:
    """Return how often each annotator is wrong, counted on the judging samples that he saw."""
    rows, shares = np.flatnonzero(problem.counting), []
    for column in problem.annotations.T:
        there = rows[column[rows] != UNKNOWN]
        shares.append(_share(column[there] != problem.truth[there], level))
    return shares


def _share(hits: Array, level: float) -> Interval:
    low, high = intervals.clopper_pearson(int(hits.sum()), len(hits), level)
    return Interval(float(hits.mean()) if len(hits) else float("nan"), low, high)
