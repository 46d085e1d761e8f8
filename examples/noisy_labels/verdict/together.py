"""`together`: the mean of all ways but the given labels, each weighted by how well it did on the trusted samples.

    p(k) = sum over ways j of w_j p_j(k) / sum of w_j,      w_j = exp(-SHARPNESS (loss_j - smallest loss))

Ways err differently: a classifier forgets the given label, Bayes' rule leans on it, a way of trusted samples alone does
not know it. The sharpness was chosen on problems whose true labels were known; each verdict judges the mean like any
other way.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from examples.noisy_labels.verdict import calibration

Array = np.ndarray
TOGETHER = "together"
SHARPNESS = 5.0


def weights(probabilities: Mapping[str, Array], truth: Array) -> dict[str, float]:
    """Return how much each way counts, from its calibrated probabilities of trusted samples; they sum to 1."""
    losses = {name: calibration.log_loss(one, truth) for name, one in probabilities.items() if name != "given"}
    least = min(losses.values())
    shares = {name: float(np.exp(-SHARPNESS * (loss - least))) for name, loss in losses.items()}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def mean(probabilities: Mapping[str, Array], shares: Mapping[str, float]) -> Array:
    """Return the weighted mean."""
    return np.asarray(sum(share * probabilities[name] for name, share in shares.items()))


def cross_fitted(probabilities: Mapping[str, Array], truth: Array, fold: Array) -> Array:
    """Return the mean on each fold, weighted by what the other folds show, and calibrated by them."""
    joined = np.empty_like(next(iter(probabilities.values())))
    for one in np.unique(fold):
        inside = fold == one
        shares = weights({name: way[~inside] for name, way in probabilities.items()}, truth[~inside])
        joined[inside] = mean({name: way[inside] for name, way in probabilities.items()}, shares)
    return calibration.cross_fitted(joined, truth, fold)
