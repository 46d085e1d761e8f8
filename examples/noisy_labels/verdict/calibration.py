"""Probabilities that mean what they say: of the labels stated with .9, nine in ten are right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize

Array = np.ndarray
SMALLEST = 1e-6  # below it a probability says no more, and its logarithm would say everything
HOTTEST = 4.0  # logarithm of the largest temperature, and of the inverse of the smallest


@dataclass(frozen=True)
class Temperature:
    """One number that makes probabilities milder or sharper and changes no label (Guo et al., 2017).

    Args:
        value: The temperature; above 1 it makes milder.
        doubt: Share of the uniform distribution that is mixed in. n right answers out of n do not show that the next
            one is right too; with 1 / (n + 2) the stated probabilities do not claim more than Laplace's rule.
    """

    value: float
    doubt: float

    def __call__(self, probabilities: Array) -> Array:
        """Return calibrated probabilities."""
        logits = np.log(np.maximum(probabilities, SMALLEST)) / self.value
        logits = logits - logits.max(1, keepdims=True)
        scaled = np.exp(logits)
        scaled /= scaled.sum(1, keepdims=True)
        return np.asarray((1 - self.doubt) * scaled + self.doubt / probabilities.shape[1])


def fit(probabilities: Array, truth: Array) -> Temperature:
    """Return the temperature of smallest log loss; of no sample, none at all."""
    doubt = 1 / (len(truth) + 2)
    if len(truth) == 0:
        return Temperature(1.0, doubt)

    def loss(logarithm: float) -> float:
        return log_loss(Temperature(float(np.exp(logarithm)), doubt)(probabilities), truth)

    best = optimize.minimize_scalar(loss, bounds=(-HOTTEST, HOTTEST), method="bounded")
    return Temperature(float(np.exp(best.x)), doubt)


def log_loss(probabilities: Array, truth: Array) -> float:
    """Return the mean of minus the logarithm of the true class's probability."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(truth)), truth], SMALLEST)).mean())


def cross_fitted(probabilities: Array, truth: Array, fold: Array) -> Array:
    """Return each fold's probabilities, calibrated by the temperature of the other folds."""
    calibrated = np.empty_like(probabilities)
    for one in np.unique(fold):
        inside = fold == one
        calibrated[inside] = fit(probabilities[~inside], truth[~inside])(probabilities[inside])
    return calibrated
