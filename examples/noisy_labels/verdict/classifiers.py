"""Classifiers for tables, from scikit-learn: by a short name, or any of its classes by module and name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from examples.noisy_labels.verdict.cross_validation import MakeClassifier

TREES = 60


def _logistic(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=100, random_state=seed))


def _trees(seed: int) -> Any:
    from sklearn.ensemble import ExtraTreesClassifier

    # Splits at random and leaves of several samples: a wrong label does not make a leaf of its own.
    return ExtraTreesClassifier(TREES, min_samples_leaf=5, random_state=seed, n_jobs=1)


def _boosting(seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(random_state=seed)


def _neighbours(seed: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), KNeighborsClassifier(15))


NAMED: dict[str, Callable[[int], Any]] = {
    "logistic": _logistic,
    "trees": _trees,
    "boosting": _boosting,
    "neighbours": _neighbours,
}
DEFAULT = ("logistic", "trees")


def makers(chosen: Any, seed: int) -> dict[str, MakeClassifier]:
    """Return how to make the classifiers, by name.

    Args:
        chosen: ``auto`` for logistic regression and trees; a name, a class as ``sklearn.svm.SVC``, an estimator, or a
            list of those.
        seed: Of those that are made by name.

    Raises:
        ValueError: There is none of that name, or it gives no probabilities.
    """
    asked = [chosen] if isinstance(chosen, str) or not isinstance(chosen, Sequence) else list(chosen)
    if len(asked) == 1 and isinstance(asked[0], str) and asked[0] == "auto":
        asked = list(DEFAULT)
    made = [_maker(one, seed) for one in asked]
    return {_name(one, i): make for i, (one, make) in enumerate(zip(asked, made, strict=True))}


def _name(one: Any, position: int) -> str:
    name = one if isinstance(one, str) else type(one).__name__
    return name if position == 0 or name in NAMED else f"{name} ({position + 1})"


def _maker(one: Any, seed: int) -> MakeClassifier:
    from sklearn.base import clone

    estimator = _by_name(one, seed) if isinstance(one, str) else one
    if not (hasattr(estimator, "fit") and hasattr(estimator, "predict_proba")):
        rule = "gives no probabilities (predict_proba)"
        raise ValueError(f"--classifier {one}: {rule}. Of a support vector machine ask for probability=True.")

    def make() -> Any:
        return clone(estimator)

    return make


def _by_name(name: str, seed: int) -> Any:
    if name in NAMED:
        return NAMED[name](seed)
    module, _, kind = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), kind)()
    except (ImportError, AttributeError, ValueError, TypeError) as problem:
        known = ", ".join(NAMED)
        rule = f"is none of {known}, nor a class that can be made without arguments ({problem})"
        raise ValueError(f"--classifier {name}: {rule}. Give its whole name, such as sklearn.svm.SVC.") from None
