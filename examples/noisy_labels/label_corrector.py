"""`LabelCorrector`: from arrays to corrected labels, a verdict on them, and the labels to check next.

Example::

    from examples.noisy_labels.label_corrector import LabelCorrector

    corrector = LabelCorrector().fit(X, y, trusted={17: "cat", 230: "dog", ...})
    print(corrector.report_)  # which way corrects best, and whether that can be told
    corrector.labels_, corrector.actions_, corrector.check_next_
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator

from examples.noisy_labels.run import evaluation
from examples.noisy_labels.run.options import METHODS, Options
from examples.noisy_labels.run.training import Run
from examples.noisy_labels.verdict import arrays, classifiers, judging, ways
from examples.noisy_labels.verdict.findings import Report
from examples.noisy_labels.verdict.network_way import NetworkWay
from examples.noisy_labels.verdict.together import TOGETHER
from examples.noisy_labels.verdict.ways import BEST, VERDICT

Array = np.ndarray
STEPS, EPOCHS = 400, 5  # of label correction, at least: five folds and the last training must end within a minute


class LabelCorrector(BaseEstimator):  # type: ignore[misc]
    """Corrects labels in several ways, simple ones first, and says which of them can be trusted.

    Args:
        classifier: What predicts labels from features: ``auto`` for logistic regression and trees, a short name
            (``logistic``, ``trees``, ``boosting``, ``neighbours``), any scikit-learn classifier, or a list of them.
        method: What is learned on top: ``ebomlc``, or None for the simple ways alone.
        folds: Parts of the trusted samples in cross-fitting.
        precision: Share of labels that shall be right among those that need no check.
        level: Probability with which all intervals hold.
        check: How many samples `check_next_` names.
        way: The way whose labels are taken: its name, ``best`` for the one that looks best, ``verdict`` for the
            simplest that is not clearly worse; None for the mean of all ways.
        seed: Of everything random.
    """

    def __init__(
        self,
        *,
        classifier: Any = "auto",
        method: str | None = "ebomlc",
        folds: int = 5,
        precision: float = 0.95,
        level: float = 0.95,
        check: int = 50,
        way: str | None = None,
        seed: int = 1,
    ) -> None:
        self.classifier, self.method, self.folds = classifier, method, folds
        self.precision, self.level, self.check, self.way, self.seed = precision, level, check, way, seed

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        trusted: Mapping[Any, Any] | Sequence[Any] | Array,
        pred_probs: Any = None,
        groups: Any = None,
        suspicious: Any = None,
    ) -> LabelCorrector:
        """Correct labels.

        Args:
            X: Features or embeddings, (samples, features); None where only ``pred_probs`` are there.
            y: Given labels, (samples,), of several annotators (samples, annotators); NaN, None or an empty text where
                a label is missing.
            trusted: Labels that are known to be right: by position, or (samples,) with missing ones as in ``y``. Give
                ``y`` as it was before they were checked.
            pred_probs: Probabilities of the classes in sorted order, (samples, classes), of any classifier that has not
                seen the label it predicts: out of cross-validation. It takes the place of ``classifier``.
            groups: What belongs together, (samples,), such as the patient: no group is in two folds.
            suspicious: Positions of trusted samples, or a mask, that were checked because they looked wrong: they
                train, but do not judge.

        Returns:
            Itself, with ``labels_``, ``probabilities_``, ``actions_`` (keep, change or check), ``suspicion_`` (1: the
            given label is the least probable), ``check_next_`` and ``report_``.
        """
        self._check()
        data = arrays.read(X, y, trusted, pred_probs=pred_probs, groups=groups, suspicious=suspicious)
        problem, inputs = data.problem, data.inputs
        if data.predicted is not None or inputs is None:
            evidence = ways.Evidence(inputs, {"classifier": np.asarray(data.predicted)}, {})
        else:
            evidence = ways.evidence(problem, inputs, classifiers.makers(self.classifier, self.seed), self.seed)
        chosen = ways.simple(evidence, self.seed)
        network = None
        if self.method is not None and inputs is not None:
            options = self._options(len(inputs))
            network = chosen[self.method] = NetworkWay(options, torch.from_numpy(inputs).float())
        outcome = judging.judge(
            problem,
            chosen,
            folds=self.folds,
            precision=self.precision,
            level=self.level,
            check=self.check,
            seed=self.seed,
            way=self.way,
        )
        self.classes_ = data.classes
        self.labels_ = data.classes[outcome.labels]
        self.probabilities_, self.actions_ = outcome.probabilities, outcome.actions
        self.suspicion_, self.check_next_ = outcome.suspicion, outcome.check_next
        self.report_: Report = outcome.report
        self.n_features_in_ = None if inputs is None else inputs.shape[1]
        self._learn(evidence, outcome.labels, network)
        return self

    def predict_proba(self, X: Any) -> Array:
        """Return probabilities of the classes for new samples, by a classifier of the corrected labels."""
        if not hasattr(self, "classes_"):
            raise ValueError("LabelCorrector.predict_proba: nothing is learned yet. Call fit first.")
        if self._model is None:
            rule = "it was fitted without features, so there is no classifier of its own"
            raise ValueError(f"LabelCorrector.predict_proba: {rule}. Use the one that pred_probs came from.")
        features = arrays.features(X)
        if features.shape[1] != self.n_features_in_:
            rule = f"has {features.shape[1]} features, and {self.n_features_in_} were learned from"
            raise ValueError(f"LabelCorrector.predict_proba(X): {rule}. Give the same columns.")
        if isinstance(self._model, Run):
            task = replace(self._model.task, samples=torch.from_numpy(features).float())
            everyone = torch.arange(len(features))
            return np.asarray(evaluation.predictions(self._model.recipe, task, everyone).double().numpy())
        probabilities = np.zeros((len(features), len(self.classes_)))
        probabilities[:, self._model.classes_.astype(int)] = self._model.predict_proba(features)
        return probabilities

    def predict(self, X: Any) -> Array:
        """Return the most probable class of new samples."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(1)])

    def _learn(self, evidence: ways.Evidence, labels: Array, network: NetworkWay | None) -> None:
        """Keep a classifier for new samples: the winner's network, or one that learned the corrected labels."""
        self._model: Any = None
        if network is not None and self.report_.way == self.method:
            self._model = network.run
        elif evidence.inputs is not None:
            made = evidence.makers or {"classifier": classifiers.makers("logistic", self.seed)["logistic"]}
            name = self.report_.classifiers.get(self.report_.way, self.report_.classifiers["classifier"])
            self._model = made[name]().fit(evidence.inputs, labels)

    def _options(self, samples: int) -> Options:
        epochs = max(EPOCHS, -(-STEPS // max(1, samples // Options.batch_size)))
        return Options(
            table="-", trusted="-", method=str(self.method), network="mlp", seed=self.seed, epochs=epochs, device="cpu"
        )

    def _check(self) -> None:
        for name, low, high in (("precision", 0, 1), ("level", 0.5, 1)):
            value = getattr(self, name)
            if not isinstance(value, float) or not low < value < high:
                raise ValueError(f"LabelCorrector({name}={value!r}): must be a number above {low} and below {high}.")
        for name, least in (("folds", 2), ("check", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"LabelCorrector({name}={value!r}): must be an integer, at least {least}.")
        if isinstance(self.classifier, list | tuple) and not self.classifier:
            raise ValueError("LabelCorrector(classifier=[]): names none. Leave it out, or name one.")
        known = (BEST, VERDICT, TOGETHER, *ways.WAYS, *([self.method] if self.method else []))
        if self.way is not None and self.way not in known:
            raise ValueError(f"LabelCorrector(way={self.way!r}): must be one of {', '.join(known)}, or None.")
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"LabelCorrector(method={self.method!r}): must be one of {', '.join(METHODS)}, or None.")
