"""Means, ranks, and differences to a reference method that are taken seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy import stats

from examples.noisy_labels.report import published
from examples.noisy_labels.run.cells import Cell

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Quantity:
    """What is compared: its name, its words, and where it stands in the result of a run."""

    name: str
    title: str
    place: tuple[str, ...]
    larger_is_better: bool = True

    def of(self, result: dict[str, Any]) -> float:
        """Return its value in a run, as a share."""
        value: Any = result
        for key in self.place:
            value = value[key]
        return float(value)


QUANTITIES = (
    Quantity("test_accuracy", "Test accuracy of the classifier", ("test_accuracy",)),
    Quantity("right", "Labels right, by each method's own rule", ("own", "right")),
    Quantity("bayes_right", "Labels right, by Bayes' rule", ("bayes", "right")),
    Quantity("recovered", "Wrong labels recovered, own rule", ("own", "recovered")),
    Quantity("bayes_recovered", "Wrong labels recovered, Bayes' rule", ("bayes", "recovered")),
    Quantity("broken", "Right labels broken, own rule", ("own", "broken"), larger_is_better=False),
    Quantity("bayes_broken", "Right labels broken, Bayes' rule", ("bayes", "broken"), larger_is_better=False),
)


@dataclass(frozen=True)
class Entry:
    """One quantity of one method in one column, over seeds. Shares are in %; what cannot be computed is None.

    Attributes:
        quantity, column, method: What it is of.
        seeds: Those whose runs are finished.
        mean, deviation: Over these seeds; the standard deviation of a sample.
        rank: Among the methods of the column, by the mean; equal ones share it.
        difference, low, high: Mean of (method - reference) on the seeds that both have, and its 95 % interval.
        p, p_holm: Of the paired t-test, and adjusted by Holm for all differences of this quantity in the table.
        time: Training time relative to the reference, mean of the ratios on those seeds.
        published: The printed number, for test accuracy.
    """

    quantity: str
    column: str
    method: str
    seeds: tuple[int, ...]
    mean: float | None
    deviation: float | None
    rank: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    time: float | None
    published: float | None


def entries(cells: Sequence[Cell], reference: str) -> list[Entry]:
    """Return one entry for each quantity, column and method, in the order of the cells."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    methods = list(dict.fromkeys(cell.settings.method for cell in cells))
    printed = {(cell.column, cell.settings.method): published.accuracy(cell.settings) for cell in cells}
    runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for cell in cells:
        result = cell.result()
        if result is not None:
            runs.setdefault((cell.column, cell.settings.method), {})[cell.settings.seed] = result
    found = []
    for quantity in QUANTITIES:
        values = {
            place: {seed: 100 * quantity.of(result) for seed, result in by_seed.items()}
            for place, by_seed in runs.items()
        }
        ranks = {column: _ranks(values, column, methods, quantity.larger_is_better) for column in columns}
        places = [(column, method) for column in columns for method in methods if (column, method) in printed]
        compared = {
            place: paired(values.get(place, {}), values.get((place[0], reference), {}))
            for place in places
            if place[1] != reference
        }
        adjusted = dict(zip(compared, holm([one.p for one in compared.values()]), strict=True))
        for place in places:
            column, method = place
            own, paired_with = values.get(place, {}), compared.get(place, Paired())
            numbers = list(own.values())
            found.append(
                Entry(
                    quantity=quantity.name,
                    column=column,
                    method=method,
                    seeds=tuple(sorted(own)),
                    mean=mean(numbers) if numbers else None,
                    deviation=stdev(numbers) if len(numbers) > 1 else None,
                    rank=ranks[column].get(method),
                    difference=paired_with.difference,
                    low=paired_with.low,
                    high=paired_with.high,
                    p=paired_with.p,
                    p_holm=adjusted.get(place),
                    time=relative_time(runs.get(place, {}), runs.get((column, reference), {})),
                    published=printed[place] if quantity.name == "test_accuracy" else None,
                )
            )
    return found


@dataclass(frozen=True)
class Paired:
    """A mean difference, its confidence interval and its p-value, as far as the seeds allow."""

    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def paired(values: dict[int, float], reference: dict[int, float]) -> Paired:
    """Compare on the seeds that both have, by the paired t-test.

    With one seed there is a difference and no test; nor is there one where all differences are equal.
    """
    both = sorted(values.keys() & reference.keys())
    if not both:
        return Paired()
    differences = [values[seed] - reference[seed] for seed in both]
    middle = mean(differences)
    # Differences that are equal up to rounding have no spread to test against.
    if len(both) < 2 or float(np.ptp(differences)) <= 1e-9 * max(1.0, abs(middle)):
        return Paired(middle)
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Paired(middle, float(interval.low), float(interval.high), float(test.pvalue))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values so that the chance of any false finding among them stays below the level (Holm, 1979).

    The smallest of m is multiplied by m, the next by m - 1, ..., and none falls below one before it.
    """
    known = sorted((value, place) for place, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        adjusted[place] = largest
    return adjusted


def relative_time(runs: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]) -> float | None:
    """Return the mean ratio of training times. An epoch counts with the median, which disturbances do not move."""
    both = sorted(runs.keys() & reference.keys())
    if not both:
        return None
    ratios = [
        runs[seed]["epochs"]
        * runs[seed]["seconds_per_epoch"]
        / (reference[seed]["epochs"] * reference[seed]["seconds_per_epoch"])
        for seed in both
    ]
    return mean(map(float, ratios))


def _ranks(
    values: dict[tuple[str, str], dict[int, float]], column: str, methods: Sequence[str], larger_is_better: bool
) -> dict[str, float]:
    means = {method: mean(values[column, method].values()) for method in methods if values.get((column, method))}
    sign = -1 if larger_is_better else 1
    ranks = stats.rankdata([sign * round(one, 9) for one in means.values()])
    return dict(zip(means, ranks.tolist(), strict=True))
