"""A classifier's probabilities for samples that it has not seen, nor anything of their groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from examples.noisy_labels.verdict import folds
from examples.noisy_labels.verdict.problem import UNKNOWN, Problem

Array = np.ndarray
MakeClassifier = Callable[[], "Classifier"]
PARTS = 5  # of all samples


class Classifier:
    """What is asked of a classifier: scikit-learn's `fit`, `predict_proba` and `classes_`."""

    classes_: Array

    def fit(self, X: Array, y: Array) -> Classifier:
        """Learn."""
        raise NotImplementedError

    def predict_proba(self, X: Array) -> Array:
        """Return probabilities, with a column for each of ``classes_``."""
        raise NotImplementedError


def out_of_fold(problem: Problem, inputs: Array, make: MakeClassifier, seed: int) -> Array:
    """Return a classifier's probabilities for all samples, learned from the given labels of the other folds."""
    labels = problem.given
    fold = folds.assign(labels, problem.groups, PARTS, seed)
    return cross_predicted(make, inputs, labels, fold, problem.classes)


def fitted(make: MakeClassifier, inputs: Array, labels: Array, asked: Array, classes: int) -> Array:
    """Return the probabilities of all classes, also of those that the training labels lack."""
    there = np.unique(labels)
    probabilities = np.zeros((len(asked), classes))
    if len(there) < 2:
        probabilities[:, there] = 1.0
        return probabilities if len(there) else probabilities + 1 / classes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # iterations that end early cost little here, and are no news to the user
        classifier = make().fit(inputs, labels)
    probabilities[:, classifier.classes_.astype(int)] = classifier.predict_proba(asked)
    return probabilities


def cross_predicted(make: MakeClassifier, inputs: Array, labels: Array, fold: Array, classes: int) -> Array:
    """Return probabilities of each sample by a classifier of the other folds; unlabelled samples teach nothing."""
    probabilities = np.empty((len(labels), classes))
    for one in np.unique(fold):
        inside = fold == one
        learned = ~inside & (labels != UNKNOWN)
        if not learned.any():
            probabilities[inside] = 1 / classes
            continue
        probabilities[inside] = fitted(make, inputs[learned], labels[learned], inputs[inside], classes)
    return probabilities
