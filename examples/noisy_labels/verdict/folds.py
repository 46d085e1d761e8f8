"""Parts of a data set for cross-fitting: what judges a part has not seen it, nor anything of its groups."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def assign(labels: Array, groups: Array | None, number: int, seed: int) -> Array:
    """Return a fold for each sample: classes spread evenly, no group in two folds.

    Args:
        labels: Class of each sample.
        groups: Group of each sample, kept together.
        number: Number of folds.
        seed: Decides what comes together.
    """
    source = np.random.default_rng(seed)
    fold = np.empty(len(labels), dtype=int)
    if groups is None:
        turn = 0
        for one in np.unique(labels):
            members = source.permutation(np.flatnonzero(labels == one))
            fold[members] = (turn + np.arange(len(members))) % number
            turn += len(members)  # the next class goes on where this one ended, so that folds are of one size
        return fold
    _, classes = np.unique(labels, return_inverse=True)
    names, position = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), classes.max() + 1))
    np.add.at(counts, (position, classes), 1)
    shuffled = source.permutation(len(names))
    held = np.zeros((number, counts.shape[1]))
    chosen = np.empty(len(names), dtype=int)
    # The largest group first, each to the fold that has the least of its classes.
    for one in shuffled[np.argsort(-counts[shuffled].sum(1), kind="stable")]:
        burden = held @ counts[one] / max(1.0, counts[one].sum()) + 1e-3 * held.sum(1)
        chosen[one] = int(burden.argmin())
        held[chosen[one]] += counts[one]
    return chosen[position]
