"""Intervals that hold: for one share, and for the differences of many shares at once."""

from __future__ import annotations

import numpy as np
from scipy import stats

Array = np.ndarray
DRAWS = 10_000


def clopper_pearson(hits: float, number: float, level: float) -> tuple[float, float]:
    """Return the exact two-sided interval of a share; of no sample, all that a share can be.

    Numbers need not be integers: samples in groups count less than their number, see `effective`.
    """
    if number <= 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, hits, number - hits + 1)) if hits > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, number - hits)) if hits < number else 1.0
    return low, high


def lower_bound(hits: float, number: float, level: float) -> float:
    """Return the exact one-sided lower bound of a share."""
    return clopper_pearson(hits, number, 2 * level - 1)[0]


def effective(right: Array, groups: Array | None) -> float:
    """Return how many independent samples are worth as much as these, of which those of a group are alike.

    That is the number divided by the design effect: the variance of the mean with the groups told, over the variance
    without. Groups never make samples worth more than their number.
    """
    number = len(right)
    if number == 0:
        return 0.0
    plain = right.var() * number
    if groups is None or plain == 0:
        return float(number if groups is None else len(np.unique(groups)))
    sums = _sums(right[None] - right.mean(), groups)[0]
    grouped = (sums**2).sum() * len(sums) / max(1, len(sums) - 1)
    return float(number / max(1.0, grouped / plain))


class Comparison:
    """Ways judged on the same samples: by how much each is better than one of them, and which may be the best.

    Differences are taken sample by sample. The standard error of a difference is that of Agresti and Min (2005): half
    a sample is added to each of the four outcomes of a pair, so that it is not 0 where few samples tell two ways
    apart. How much wider intervals must be to hold at once is a quantile of the largest difference in standard errors
    (max-t), in draws from the normal distribution with the covariance of the ways. Ways that err together need less
    than Bonferroni's widening, which knows nothing of that. Samples of a group count together: the covariance is that
    of the groups' sums, and the draws are of Student's t with the number of groups less one, so that few groups give
    wide intervals.

    Args:
        right: Whether each way was right on each sample, (ways, samples).
        groups: Group of each sample.
        level: Probability with which all statements about the ways hold.
        seed: Of the draws.
    """

    def __init__(self, right: Array, groups: Array | None, level: float, seed: int) -> None:
        ways, self.number = right.shape
        self.level, self.totals = level, right.sum(1)
        deviations = right.astype(float) - right.mean(1, keepdims=True)
        sums = deviations if groups is None else _sums(deviations, groups)
        count = sums.shape[1]
        # Half a sample in each outcome of a pair adds 1 to the variance of its sum: 1/2 to each way's.
        covariance = sums @ sums.T * count / max(1, count - 1) + 0.5 * np.eye(ways)
        variance = covariance.diagonal()[:, None] + covariance.diagonal()[None] - 2 * covariance
        np.fill_diagonal(variance, 1.0)
        self.errors = np.sqrt(variance)
        source, freedom = np.random.default_rng(seed), max(1, count - 1)
        drawn = source.standard_normal((DRAWS, ways)) @ np.linalg.cholesky(covariance).T
        self.drawn = drawn / np.sqrt(source.chisquare(freedom, (DRAWS, 1)) / freedom)

    def gains(self, reference: int) -> tuple[Array, Array]:
        """Return lower and upper ends of the differences from one way, which hold at once for all ways (Dunnett)."""
        errors = self.errors[:, reference]
        ratios = np.abs(self.drawn - self.drawn[:, reference, None]) / errors
        half = float(np.quantile(ratios.max(1), self.level)) * errors
        half[reference] = 0.0
        centre = (self.totals - self.totals[reference]) / (self.number + 2)
        return centre - half / (self.number + 2), centre + half / (self.number + 2)

    def clearly_worse(self) -> Array:
        """Return which ways are clearly worse than another one.

        The best of all is not among them, with probability ``level``: each way is the reference of its own one-sided
        comparison, and only that of the best way can be mistaken about it, whichever that is (Hsu's multiple
        comparisons with the best). So to look at all ways and take one that is left costs nothing more.
        """
        worse = np.zeros(len(self.totals), dtype=bool)
        for one, total in enumerate(self.totals):
            errors = self.errors[:, one]
            limit = float(np.quantile(((self.drawn - self.drawn[:, one, None]) / errors).max(1), self.level))
            worse[one] = bool(((self.totals - total) / errors > limit).any())
        return worse


def _sums(values: Array, groups: Array) -> Array:
    """Return the sums within each group, (rows, groups)."""
    _, position = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(values), position.max() + 1))
    for row, one in zip(sums, values, strict=True):
        np.add.at(row, position, one)
    return sums
