"""From arrays, as scikit-learn's users have them, to a problem: labels of any kind become positions of classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from examples.noisy_labels.verdict.problem import UNKNOWN, Problem

Array = np.ndarray
OWNER = "LabelCorrector.fit"
LARGEST = 1e30


@dataclass(frozen=True)
class Arrays:
    """What was given, checked.

    Args:
        problem: The labels.
        classes: The classes as the user writes them, sorted.
        inputs: Features, or None.
        predicted: Ready probabilities, or None.
    """

    problem: Problem
    classes: Array
    inputs: Array | None
    predicted: Array | None


def read(X: Any, y: Any, trusted: Any, *, pred_probs: Any, groups: Any, suspicious: Any) -> Arrays:
    """Check arrays against each other.

    Raises:
        ValueError: They do not fit together, or something that must be there is missing.
    """
    if X is None and pred_probs is None:
        raise ValueError(f"{OWNER}(X=None): there is nothing to learn from. Give features, or pred_probs.")
    inputs = None if X is None else features(X)
    given = np.asarray(y, dtype=object)
    given = given[:, None] if given.ndim == 1 else given
    if given.ndim != 2 or given.shape[1] == 0:
        raise ValueError(f"{OWNER}(y): has the shape {np.shape(y)}. Give (samples,) or (samples, annotators).")
    number = len(given)
    if number == 0 or (inputs is not None and len(inputs) != number):
        there = "no" if inputs is None else len(inputs)
        raise ValueError(f"{OWNER}(X, y): X has {there} rows, and y {number}. Both must name the same samples.")
    truth = _trusted(trusted, number)
    classes = _classes([*given.ravel(), *truth])
    position = {one: i for i, one in enumerate(classes.tolist())}
    annotations = np.array([[_place(one, position) for one in row] for row in given])
    answers = np.array([_place(one, position) for one in truth])
    rows = np.flatnonzero(answers != UNKNOWN)
    if len(rows) == 0:
        raise ValueError(f"{OWNER}(trusted): names no sample. Correction needs some labels that are known to be right.")
    nothing = np.flatnonzero((annotations == UNKNOWN).all(1) & (answers == UNKNOWN))
    if len(nothing):
        raise ValueError(f"{OWNER}(y): row {nothing[0]} has no label and is not trusted. Give it one, or leave it out.")
    for i, one in enumerate(classes.tolist()):
        if not (answers == i).any():
            raise ValueError(f"{OWNER}(trusted): no sample of class {one!r} is trusted. Check a few of each class.")
    names = tuple(str(one) for one in classes.tolist())
    belongs = None if groups is None else _groups(groups, number)
    problem = Problem(names, annotations, answers, _judging(suspicious, number), belongs)
    return Arrays(problem, classes, inputs, None if pred_probs is None else _probabilities(pred_probs, number, names))


def features(X: Any) -> Array:
    """Return features as finite numbers, (samples, features)."""
    try:
        inputs = np.asarray(X, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{OWNER}(X): holds what is no number. Encode text first, for example one-hot.") from None
    if inputs.ndim != 2 or inputs.shape[1] == 0:
        raise ValueError(f"{OWNER}(X): has the shape {inputs.shape}, and must have (samples, features).")
    usable = (np.abs(inputs) < LARGEST).all(1)  # False for NaN too; squares must be finite
    if not usable.all():
        rule = f"row {int(usable.argmin())} holds NaN, infinity or a number beyond {LARGEST:g}"
        raise ValueError(f"{OWNER}(X): {rule}. Fill or scale it first, for example with the mean.")
    return inputs


def _trusted(trusted: Any, number: int) -> list[Any]:
    if isinstance(trusted, Mapping):
        truth: list[Any] = [None] * number
        for place, one in trusted.items():
            if not isinstance(place, int | np.integer) or not 0 <= place < number:
                raise ValueError(f"{OWNER}(trusted): {place!r} is no position of {number} samples, counted from 0.")
            truth[int(place)] = one
        return truth
    truth = list(np.asarray(trusted, dtype=object).ravel())
    if len(truth) != number:
        rule = f"has {len(truth)} entries, and there are {number} samples"
        raise ValueError(f"{OWNER}(trusted): {rule}. Give one for each, None where it is not trusted, or a dictionary.")
    return truth


def _missing(one: Any) -> bool:
    return one is None or one == "" or (isinstance(one, float | np.floating) and bool(np.isnan(one))) or _pandas_na(one)


def _pandas_na(one: Any) -> bool:
    return type(one).__name__ in ("NAType", "NaTType")


def _classes(labels: list[Any]) -> Array:
    there = {_plain(one) for one in labels if not _missing(one)}
    try:
        classes = sorted(there)
    except TypeError:
        kinds = ", ".join(sorted({type(one).__name__ for one in there}))
        raise ValueError(f"{OWNER}(y, trusted): labels are of several kinds ({kinds}). Write them all alike.") from None
    if len(classes) < 2:
        raise ValueError(f"{OWNER}(y): the labels name {len(classes)} class(es), and two are needed.")
    return np.array(classes)


def _plain(one: Any) -> Any:
    """Return a label without numpy's types; 3.0 is 3, as arrays with missing integers write it."""
    value = one.item() if isinstance(one, np.generic) else one
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _place(one: Any, position: Mapping[Any, int]) -> int:
    return UNKNOWN if _missing(one) else position[_plain(one)]


def _groups(groups: Any, number: int) -> Array:
    belongs = np.asarray(groups)
    if belongs.shape != (number,):
        raise ValueError(f"{OWNER}(groups): has the shape {belongs.shape}, and must have ({number},).")
    return np.unique(belongs.astype(str), return_inverse=True)[1]


def _judging(suspicious: Any, number: int) -> Array:
    judging = np.ones(number, dtype=bool)
    if suspicious is None or len(suspicious) == 0:
        return judging
    chosen = np.asarray(suspicious)
    if chosen.dtype == bool and chosen.shape == (number,):
        return ~chosen
    if chosen.dtype.kind not in "iu" or chosen.min() < 0 or chosen.max() >= number:
        raise ValueError(f"{OWNER}(suspicious): must be positions of {number} samples, counted from 0, or a mask.")
    judging[chosen] = False
    return judging


def _probabilities(pred_probs: Any, number: int, names: tuple[str, ...]) -> Array:
    try:
        predicted = np.asarray(pred_probs, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{OWNER}(pred_probs): holds what is no number. Give probabilities.") from None
    if predicted.shape != (number, len(names)):
        rule = f"has the shape {predicted.shape}, and must have {(number, len(names))}"
        raise ValueError(f"{OWNER}(pred_probs): {rule}: a column for each class, in the order {', '.join(names)}.")
    if not (np.isfinite(predicted).all() and (predicted >= 0).all() and np.allclose(predicted.sum(1), 1, atol=1e-3)):
        raise ValueError(f"{OWNER}(pred_probs): a row is no distribution. They must be at least 0 and sum to 1.")
    return predicted
