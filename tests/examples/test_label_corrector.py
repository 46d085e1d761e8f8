"""`LabelCorrector`: arrays in, labels, a verdict and the labels to check next out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import LinearSVC

from examples.noisy_labels.label_corrector import LabelCorrector

pytestmark = pytest.mark.thorough  # each judges by cross-fitting many classifiers

Array = np.ndarray
NAMES = np.array(["ape", "bee", "cow"])


def clouds(number: int = 600, seed: int = 0) -> tuple[Array, Array, Array]:
    """Return features, true names and given ones: of three, each is taken for the next in a third of the cases."""
    source = np.random.default_rng(seed)
    true = source.integers(0, 3, number)
    features = source.normal(0, 1, (number, 4))
    features[:, :3] += 3 * np.eye(3)[true]
    given = np.where(source.random(number) < 0.33, (true + 1) % 3, true)
    return features, NAMES[true], NAMES[given]


@pytest.fixture(scope="module")
def fitted() -> tuple[LabelCorrector, Array, Array, Array]:
    features, true, given = clouds()
    trusted = {i: true[i] for i in range(150)}
    return LabelCorrector(precision=0.8).fit(features, given, trusted=trusted), features, true, given


def test_labels_come_right(fitted: tuple[LabelCorrector, Array, Array, Array]) -> None:
    corrector, _, true, given = fitted
    assert corrector.report_.answer == "correct"
    assert (given[150:] == true[150:]).mean() < 0.72
    assert (corrector.labels_[150:] == true[150:]).mean() > 0.9
    assert (corrector.labels_[:150] == true[:150]).all()
    assert set(corrector.actions_[:150]) == {"trusted"}
    assert set(corrector.actions_[150:]) <= {"keep", "change", "check"}
    kept = corrector.actions_ == "keep"
    assert (corrector.labels_[kept] == given[kept]).all()
    changed = corrector.actions_ == "change"
    assert (corrector.labels_[changed] != given[changed]).all()
    assert (changed[150:].any(), len(corrector.check_next_)) == (True, 50)
    names = [one.name for one in corrector.report_.verdict.scores]
    simple = ["given", "trusted", "classifier", "bayes", "ebomlc", "together"]
    assert [one for one in names if "cleanlab" not in one] == simple


def test_the_report_is_read_by_people_and_programs(fitted: tuple[LabelCorrector, Array, Array, Array]) -> None:
    report = fitted[0].report_
    text = str(report)
    assert "verdict: correct." in text
    assert "wrong labels that remain among 450 nobody checked: about" in text
    assert "given labels wrong, by true class: ape" in text
    assert "classifiers: classifier by " in text
    values = json.loads(json.dumps(report.to_dict()))
    assert values["verdict"]["answer"] == "correct"
    assert values["remaining"]["low"] <= values["remaining"]["value"] <= values["remaining"]["high"]


def test_new_samples_are_predicted(fitted: tuple[LabelCorrector, Array, Array, Array]) -> None:
    features, true, _ = clouds(300, seed=9)
    probabilities = fitted[0].predict_proba(features)
    assert probabilities.shape == (300, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert (fitted[0].predict(features) == true).mean() > 0.9
    with pytest.raises(ValueError, match="has 2 features, and 4 were learned from"):
        fitted[0].predict_proba(features[:, :2])


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_labels(fitted: tuple[LabelCorrector, Array, Array, Array]) -> None:
    corrector, features, true, given = fitted
    again = clone(corrector).fit(features, given, trusted={i: true[i] for i in range(150)})
    assert (again.labels_ == corrector.labels_).all()
    np.testing.assert_array_equal(again.probabilities_, corrector.probabilities_)
    assert again.report_ == corrector.report_
    assert corrector.get_params()["precision"] == 0.8


def test_ways_to_write_the_same_thing() -> None:
    features, true, given = clouds(300)
    mask = np.array([one if i < 100 else None for i, one in enumerate(true)], dtype=object)
    first = LabelCorrector(method=None, classifier="logistic").fit(features, given, trusted=mask)
    second = LabelCorrector(method=None, classifier="logistic").fit(
        features.tolist(), given[:, None], trusted={i: true[i] for i in range(100)}
    )
    assert (first.labels_ == second.labels_).all()
    position = {name: i for i, name in enumerate(NAMES)}
    numbers = np.array([position[one] for one in given])
    floats = np.array([position[one] if i < 100 else np.nan for i, one in enumerate(true)])
    third = LabelCorrector(method=None, classifier="logistic").fit(features, numbers, trusted=floats)
    assert (NAMES[third.labels_] == first.labels_).all()


def test_ready_probabilities_take_the_place_of_a_classifier() -> None:
    features, true, given = clouds(400)
    distance = -((features[:, None, :3] - 3 * np.eye(3)[None]) ** 2).sum(2)
    predicted = np.exp(distance - distance.max(1, keepdims=True))
    predicted /= predicted.sum(1, keepdims=True)
    trusted = {i: true[i] for i in range(120)}
    corrector = LabelCorrector().fit(None, given, trusted=trusted, pred_probs=predicted)
    assert (corrector.labels_ == true).mean() > 0.9
    assert [one.name for one in corrector.report_.verdict.scores if "cleanlab" not in one.name] == [
        "given", "classifier", "bayes", "together",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="fitted without features"):
        corrector.predict_proba(features)


def test_several_annotators_some_of_whom_are_absent() -> None:
    features, true, given = clouds(400)
    source = np.random.default_rng(3)
    second = np.where(source.random(400) < 0.5, true, None)
    third = np.where(source.random(400) < 0.3, NAMES[source.integers(0, 3, 400)], "")
    said = np.stack([given, second, third], axis=1)
    corrector = LabelCorrector(method=None).fit(features, said, trusted={i: true[i] for i in range(120)})
    noise = [one.value for one in corrector.report_.noise_per_annotator]
    assert noise[1] == 0
    assert noise[0] == pytest.approx((given != true)[:120].mean())
    assert noise[2] > 0.5
    assert "wrong, by annotator: 1 " in str(corrector.report_)


@pytest.mark.parametrize("classifier", [GaussianNB(), "neighbours", "sklearn.naive_bayes.GaussianNB", ["trees"]])
def test_any_classifier_of_scikit_learn(classifier: Any) -> None:
    features, true, given = clouds(300)
    corrector = LabelCorrector(classifier=classifier, method=None)
    corrector.fit(features, given, trusted={i: true[i] for i in range(100)})
    assert (corrector.labels_ == true).mean() > 0.85
    assert corrector.predict_proba(features).shape == (300, 3)


@pytest.mark.parametrize("trusted", [[0, 1, 2], range(12)])
def test_a_handful_of_trusted_samples_gives_labels_and_no_verdict(trusted: Any) -> None:
    features, _, given = clouds(60)
    truth = {i: NAMES[j % 3] for j, i in enumerate(trusted)}
    groups = np.zeros(60) if len(trusted) > 3 else None
    corrector = LabelCorrector().fit(features, given, trusted=truth, groups=groups)
    assert corrector.report_.answer == "cannot tell"
    assert set(corrector.labels_) <= set(NAMES)
    assert np.isfinite(corrector.probabilities_).all()


X, TRUE, GIVEN = clouds(60)
GOOD: dict[str, Any] = {"X": X, "y": GIVEN, "trusted": {i: TRUE[i] for i in range(30)}}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"X": None}, "nothing to learn from. Give features, or pred_probs"),
    ({"X": X[:, 0]}, r"X\): has the shape \(60,\)"),
    ({"X": X[:50]}, "X has 50 rows, and y 60"),
    ({"X": np.where(X[7, 2] == X, np.nan, X)}, "row 7 holds NaN, infinity"),
    ({"X": GIVEN[:, None]}, "holds what is no number"),
    ({"y": np.full(60, "ape"), "trusted": {0: "ape"}}, r"name 1 class\(es\), and two are needed"),
    ({"y": np.empty((60, 0))}, r"\(y\): has the shape"),
    ({"y": np.array([*GIVEN[:59], ""])}, "row 59 has no label and is not trusted"),
    ({"y": np.array([*GIVEN[:59], 3], dtype=object)}, r"labels are of several kinds \(int, str\)"),
    ({"trusted": {}}, "names no sample"),
    ({"trusted": {60: "ape"}}, "60 is no position of 60 samples, counted from 0"),
    ({"trusted": {-1: "ape"}}, "-1 is no position"),
    ({"trusted": ["ape"]}, "has 1 entries, and there are 60 samples"),
    ({"trusted": {0: "ape"}}, "no sample of class 'bee' is trusted"),
    ({"groups": np.arange(50)}, r"groups\): has the shape \(50,\)"),
    ({"suspicious": [70]}, "must be positions of 60 samples"),
    ({"pred_probs": np.ones((60, 2))}, r"has the shape \(60, 2\), and must have \(60, 3\)"),
    ({"pred_probs": np.ones((60, 3))}, "a row is no distribution"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = GOOD | change
    features, given = arguments.pop("X"), arguments.pop("y")
    with pytest.raises(ValueError, match=message):
        LabelCorrector(method=None).fit(features, given, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": 1.0}, r"precision=1\.0\): must be a number above 0 and below 1"),
        ({"level": 0.3}, r"level=0\.3\): must be a number above 0\.5"),
        ({"folds": 1}, r"folds=1\): must be an integer, at least 2"),
        ({"classifier": "magic"}, "is none of logistic, trees"),
        ({"classifier": LinearSVC()}, "gives no probabilities"),
        ({"precision": "high"}, "must be a number above 0"),
        ({"seed": -1}, r"seed=-1\): must be an integer, at least 0"),
        ({"classifier": []}, "names none"),
        ({"method": "magic"}, r"method='magic'\): must be one of ebomlc"),
        ({"way": "magic"}, "must be one of best, verdict, together, given"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelCorrector(**{"method": None, **options}).fit(X, GIVEN, trusted=GOOD["trusted"])


def test_nothing_is_predicted_before_fitting() -> None:
    with pytest.raises(ValueError, match="Call fit first"):
        LabelCorrector().predict_proba(X)
