"""Comparing times on a machine that drifts: contestants take turns, and each turn is compared with itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from time import perf_counter, process_time


@dataclass(frozen=True)
class Seconds:
    """How long one call took: by the clock on the wall, and of this process's processor time."""

    wall: float
    processor: float


@dataclass(frozen=True)
class Median:
    """A median, an interval for it, and the probability with which such intervals contain it."""

    value: float
    low: float
    high: float
    coverage: float


def take_turns(
    contestants: Mapping[str, Callable[[int], object]], rounds: int, *, wait: Callable[[], None], warm_up: int = 3
) -> dict[str, list[Seconds]]:
    """Run every contestant once a round and return their times; each contestant is given the number of the round.

    Who comes first rotates, so that none always runs on the cache, or the clock, that another left behind. ``wait``
    returns when the device has finished. Rounds of warming up come before and are not timed.
    """
    names = list(contestants)
    times: dict[str, list[Seconds]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait()
            wall, processor = perf_counter(), process_time()
            contestants[name](turn)
            wait()
            if turn >= warm_up:
                times[name].append(Seconds(perf_counter() - wall, process_time() - processor))
    return times


def median_of(values: Sequence[float], level: float = 0.95) -> Median:
    """Return the median with its sign-test interval: two order statistics, whatever the distribution.

    The true median is below the k-th smallest of n values exactly if fewer than k values are below it, which has the
    probability that fewer than k of n fair coins show heads. So the k-th smallest and the k-th largest enclose it
    except with twice that probability. Below 6 values no interval reaches 95 %: the range is given, with the coverage
    it has.
    """
    ordered, n = sorted(values), len(values)

    def coverage(k: int) -> float:
        return 1.0 - 2.0 * sum(comb(n, heads) for heads in range(k)) / float(2**n)

    k = max([k for k in range(1, (n + 1) // 2 + 1) if coverage(k) >= level], default=1)
    return Median(median(ordered), ordered[k - 1], ordered[n - k], coverage(k))


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the quotient of each round."""
    return [a / b for a, b in zip(over, under, strict=True)]
