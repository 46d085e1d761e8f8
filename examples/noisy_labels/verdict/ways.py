"""The ways to correct labels, simple ones first: each gives probabilities of the true class for all samples.

- ``given``: the label as it is, of several annotators the majority;
- ``trusted``: a classifier of the trusted samples alone;
- ``classifier``: what a classifier of the given labels predicts for samples that it has not seen;
- ``cleanlab``: the given label, unless cleanlab finds it wrong; then the classifier's (Northcutt et al., 2021);
- ``bayes``: Bayes' rule: the classifier's probabilities times those of the given labels, by transition matrices that
  are counted on trusted samples, one for each annotator;

Of several classifiers, such as logistic regression and trees for tables, each of the last three ways takes the one by
which it does best on the trusted samples that it sees: inside the folds, so that the choice is judged with the way.

The classifiers learn given labels only, so that no trusted label is in their probabilities and one cross-validation
serves all folds of trusted samples. What is tuned on trusted samples is tuned on those that a fold leaves visible.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from examples.noisy_labels.verdict import calibration, folds
from examples.noisy_labels.verdict.cross_validation import MakeClassifier, cross_predicted, fitted, out_of_fold
from examples.noisy_labels.verdict.problem import UNKNOWN, Problem

Array = np.ndarray
Way = Callable[[Problem], Array]
EXPONENTS = (0.5, 1.0, 2.0, 4.0)  # sharpness of the classifier in Bayes' rule
WAYS = ("given", "trusted", "classifier", "cleanlab", "bayes")  # the simple ones, the simplest first
BEST, VERDICT = "best", "verdict"  # instead of a way: the one that looks best, the simplest that is not clearly worse
INNER_FOLDS = 3
SURE = 1e-3  # what a given label leaves to the other classes, before calibration


@dataclass(frozen=True)
class Evidence:
    """What the simple ways start from.

    Args:
        inputs: Features of all samples, or None.
        predicted: By name of a classifier, its probabilities for all samples, each from a classifier that has not seen
            that sample nor its group.
        makers: By the same names, how a new one is made; empty where only probabilities are there.
    """

    inputs: Array | None
    predicted: Mapping[str, Array]
    makers: Mapping[str, MakeClassifier]


def simple(evidence: Evidence, seed: int) -> dict[str, Way]:
    """Return the simple ways, the simplest first."""
    ways: dict[str, Way] = {"given": given}
    if evidence.makers and evidence.inputs is not None:
        ways["trusted"] = Trusted(evidence.inputs, evidence.makers, seed)
    kinds: dict[str, Callable[[Array], Way]] = {"classifier": Predicted, "cleanlab": Cleanlab, "bayes": Bayes}
    if not importlib.util.find_spec("cleanlab"):
        del kinds["cleanlab"]
    for kind, make in kinds.items():
        ways[kind] = Tuned({name: make(predicted) for name, predicted in evidence.predicted.items()})
    return ways


def evidence(problem: Problem, inputs: Array, makers: Mapping[str, MakeClassifier], seed: int) -> Evidence:
    """Return the evidence of classifiers that are cross-validated here."""
    predicted = {name: out_of_fold(problem, inputs, make, seed) for name, make in makers.items()}
    return Evidence(inputs, predicted, makers)


def needs_given(name: str) -> bool:
    """Return whether a way looks at the given label of the very sample that it corrects."""
    return name in ("given", "cleanlab", "bayes")


def given(problem: Problem) -> Array:
    """Return the shares of the votes; where nobody voted, nothing is known."""
    shares = (problem.votes + SURE) / (problem.votes + SURE).sum(1, keepdims=True)
    return np.asarray(shares)


class Tuned:
    """One way with each of several classifiers: that which has the least log loss on the visible trusted samples.

    Their probabilities are calibrated first, so that a classifier is not preferred for being rightly timid.
    """

    def __init__(self, variants: Mapping[str, Way]) -> None:
        self.variants = variants

    def __call__(self, problem: Problem) -> Array:
        return self.variants[self.choice(problem)](problem)

    def choice(self, problem: Problem) -> str:
        """Return the name of the classifier that is taken."""
        rows = np.flatnonzero(problem.trusted & problem.judging)
        if len(self.variants) == 1 or not len(rows):
            return next(iter(self.variants))
        truth, losses = problem.truth[rows], {}
        for name, way in self.variants.items():
            answer = way(problem)[rows]
            losses[name] = calibration.log_loss(calibration.fit(answer, truth)(answer), truth)
        return min(losses, key=lambda name: losses[name])


class Predicted:
    """The classifier's own opinion."""

    def __init__(self, predicted: Array) -> None:
        self.predicted = predicted

    def __call__(self, problem: Problem) -> Array:
        return self.predicted


class Cleanlab:
    """The given label unless cleanlab flags it. It knows no trusted label, so it is asked once."""

    def __init__(self, predicted: Array) -> None:
        self.predicted, self.answer = predicted, np.empty(0)

    def __call__(self, problem: Problem) -> Array:
        if not len(self.answer):
            from cleanlab.filter import find_label_issues  # imports for a second

            rows, labels = np.flatnonzero(problem.voted), problem.given
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is loud about classes that are rare
                issues = find_label_issues(labels[rows], self.predicted[rows], n_jobs=1)
            kept = rows[~issues]
            self.answer = self.predicted.copy()
            self.answer[kept] /= 2
            self.answer[kept, labels[kept]] += 0.5
        return self.answer


class Bayes:
    """Bayes' rule. How sharp the classifier's probabilities are is chosen on the visible trusted samples."""

    def __init__(self, predicted: Array) -> None:
        self.predicted = predicted

    def __call__(self, problem: Problem) -> Array:
        evidence = _of_annotators(problem)
        visible = np.flatnonzero(problem.counting)
        logits = np.log(np.maximum(self.predicted, calibration.SMALLEST))

        def answer(exponent: float, rows: Array | slice) -> Array:
            joint = exponent * logits[rows] + evidence[rows]
            joint = np.exp(joint - joint.max(1, keepdims=True))
            return np.asarray(joint / joint.sum(1, keepdims=True))

        if not len(visible):
            return answer(1.0, slice(None))
        losses = [calibration.log_loss(answer(one, visible), problem.truth[visible]) for one in EXPONENTS]
        return answer(EXPONENTS[int(np.argmin(losses))], slice(None))


class Trusted:
    """A classifier of the trusted samples: of several kinds that which is the best in an inner cross-validation."""

    def __init__(self, inputs: Array, makers: Mapping[str, MakeClassifier], seed: int) -> None:
        self.inputs, self.makers, self.seed = inputs, makers, seed

    def __call__(self, problem: Problem) -> Array:
        rows = np.flatnonzero(problem.trusted)
        truth = problem.truth[rows]
        make = next(iter(self.makers.values()))
        if len(self.makers) > 1:
            groups = None if problem.groups is None else problem.groups[rows]
            fold = folds.assign(truth, groups, INNER_FOLDS, self.seed)
            losses = []
            for one in self.makers.values():
                inner = cross_predicted(one, self.inputs[rows], truth, fold, problem.classes)
                losses.append(float((inner.argmax(1) != truth).mean()))
            make = list(self.makers.values())[int(np.argmin(losses))]
        return fitted(make, self.inputs[rows], truth, self.inputs, problem.classes)


def transitions(problem: Problem) -> list[Array]:
    """Return for each annotator T[k, y], the probability that he calls class k by the label y.

    Counted on the trusted samples that judge: those that were checked because they were suspicious would show more
    mistakes than there are. Few counts lean on what all annotators together do, and that on one rate of mistakes.
    """
    classes, rows = problem.classes, np.flatnonzero(problem.counting)
    counts = np.zeros((problem.annotations.shape[1], classes, classes))
    for one, column in enumerate(problem.annotations.T):
        there = rows[column[rows] != UNKNOWN]
        np.add.at(counts[one], (problem.truth[there], column[there]), 1)
    together = counts.sum(0)
    right = (np.trace(together) + 1) / (together.sum() + 2)
    prior = np.full((classes, classes), (1 - right) / max(1, classes - 1))
    np.fill_diagonal(prior, right)
    pooled = (together + 2 * prior) / (together.sum(1, keepdims=True) + 2)
    if len(counts) == 1:
        return [pooled]
    return [np.asarray((one + 4 * pooled) / (one.sum(1, keepdims=True) + 4)) for one in counts]


def _of_annotators(problem: Problem) -> Array:
    """Return for each class that may be the true one the log probability of what the annotators answered."""
    total = np.zeros((len(problem.truth), problem.classes))
    for column, transition in zip(problem.annotations.T, transitions(problem), strict=True):
        there = np.flatnonzero(column != UNKNOWN)
        total[there] += np.log(np.maximum(transition.T[column[there]], calibration.SMALLEST))
    return total
