"""The verdict on ways to correct labels: intervals hold as often as they say, nothing judges what it has seen."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from examples.noisy_labels.verdict import calibration, folds, intervals, judging, promise, ways
from examples.noisy_labels.verdict import decision as verdict
from examples.noisy_labels.verdict.calibration import Temperature
from examples.noisy_labels.verdict.intervals import Comparison
from examples.noisy_labels.verdict.problem import UNKNOWN, Problem
from examples.noisy_labels.verdict.together import TOGETHER, mean, weights

Array = np.ndarray
CLASSES = 4


def least(level: float, number: int) -> float:
    """Return how often something of probability ``level`` must be seen in so many draws; one in 1,000 fails by luck."""
    return float(stats.binom.ppf(0.001, number, level)) / number


class World:
    """Many samples with made-up probabilities of a classifier, true labels and given ones."""

    def __init__(self, kind: str, number: int = 3000, seed: int = 0) -> None:
        source = np.random.default_rng(seed)
        self.true = source.integers(0, CLASSES, number)
        logits = source.normal(0, 1, (number, CLASSES))
        logits[np.arange(number), self.true] += 2.2
        self.predicted = np.exp(1.5 * logits) / np.exp(1.5 * logits).sum(1, keepdims=True)
        rate, other = {
            "flip": (0.35, (self.true + 1) % CLASSES),
            "uniform": (0.4, source.integers(0, CLASSES, number)),
            "little": (0.05, source.integers(0, CLASSES, number)),
        }[kind]
        self.given = np.where(source.random(number) < rate, other, self.true)

    def problem(self, trusted: Array) -> Problem:
        truth = np.full(len(self.true), UNKNOWN)
        truth[trusted] = self.true[trusted]
        return Problem(tuple("abcd"), self.given[:, None], truth, np.ones(len(truth), dtype=bool))

    def ways(self) -> dict[str, ways.Way]:
        return ways.simple(ways.Evidence(None, {"classifier": self.predicted}, {}), 1)


# --- the coverage of the whole ---


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("flip", 200),
        *(
            pytest.param(*one, marks=pytest.mark.thorough)
            for one in [("uniform", 60), ("uniform", 200), ("little", 200)]
        ),
    ],
)
def test_what_is_promised_holds_over_redraws_of_the_trusted_samples(kind: str, size: int) -> None:
    world, redraws = World(kind), 120
    asked, given = world.ways(), world.given == world.true
    gains, errors, kept, best, wrongly = 0, 0, 0, 0, 0
    for redraw in range(redraws):
        trusted = np.random.default_rng(redraw).choice(len(world.true), size, replace=False)
        problem = world.problem(trusted)
        outcome = judging.judge(problem, asked, precision=0.9)
        rest, report = ~problem.trusted, outcome.report
        truly = {name: (way(problem).argmax(1) == world.true)[rest].mean() for name, way in asked.items()}
        joined = outcome if report.way == TOGETHER else judging.judge(problem, asked, way=TOGETHER)
        truly[TOGETHER] = (joined.labels == world.true)[rest].mean()
        gains += all(
            one.gain_low <= truly[one.name] - given[rest].mean() <= one.gain_high for one in report.verdict.scores
        )
        best += not next(one.worse for one in report.verdict.scores if truly[one.name] == max(truly.values()))
        right = (outcome.labels == world.true)[rest]
        errors += report.remaining.low <= (~right).sum() <= report.remaining.high
        decided = outcome.actions[rest] != promise.CHECK
        kept += not decided.any() or right[decided].mean() >= report.promise.bound
        wrongly += report.answer == verdict.CORRECT and right.mean() < given[rest].mean()
    bound = least(0.95, redraws)
    assert gains / redraws >= bound, "intervals of all ways at once"
    assert best / redraws >= bound, "the best way is not called clearly worse"
    assert errors / redraws >= bound, "remaining errors"
    assert kept / redraws >= bound, "precision without a check"
    assert wrongly / redraws <= 1 - bound, "correction that makes labels worse"


def test_enough_trusted_samples_find_the_right_answer() -> None:
    for kind, answer in (("flip", verdict.CORRECT), ("uniform", verdict.CORRECT)):
        world = World(kind)
        trusted = np.random.default_rng(5).choice(len(world.true), 400, replace=False)
        outcome = judging.judge(world.problem(trusted), world.ways())
        assert outcome.report.answer == answer
        unchecked = np.setdiff1d(np.arange(len(world.true)), trusted)
        right = (outcome.labels == world.true)[unchecked].mean()
        assert right > (world.given == world.true)[unchecked].mean() + 0.1


@pytest.mark.parametrize("grouped", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_intervals_of_many_ways_hold_at_once(grouped: bool) -> None:
    source, draws, number = np.random.default_rng(3), 200, 120
    shares, together, best_kept = np.array([0.6, 0.62, 0.7, 0.7, 0.72, 0.8, 0.8, 0.8]), 0, 0
    limits = stats.norm.ppf(shares)[:, None]
    for draw in range(draws):
        # Ways agree: they share most of what makes a sample hard. In groups of four, samples share most of it too.
        groups = np.arange(number) // 4 if grouped else None
        hard = source.normal(size=number)
        if groups is not None:
            hard = math.sqrt(0.7) * source.normal(size=groups.max() + 1)[groups] + math.sqrt(0.3) * hard
        right = math.sqrt(0.6) * hard + math.sqrt(0.4) * source.normal(size=(len(shares), number)) < limits
        comparison = Comparison(right, groups, 0.95, draw)
        low, high = comparison.gains(0)
        together += bool(((low <= shares - shares[0]) & (shares - shares[0] <= high)).all())
        best_kept += not comparison.clearly_worse()[5]
    assert together / draws >= least(0.95, draws)
    assert best_kept / draws >= least(0.95, draws)


def test_a_way_that_is_far_behind_is_clearly_worse() -> None:
    right = np.random.default_rng(0).random((3, 200)) < np.array([0.5, 0.9, 0.91])[:, None]
    comparison = Comparison(right, None, 0.95, 1)
    assert comparison.clearly_worse().tolist() == [True, False, False]
    assert comparison.gains(0)[0][1] > 0.2
    same = Comparison(np.repeat(right[:1], 3, 0), None, 0.95, 1)
    assert not same.clearly_worse().any()


def test_exact_intervals_solve_their_equation() -> None:
    for hits, number in ((3, 20), (17, 40), (1, 5)):
        low, high = intervals.clopper_pearson(hits, number, 0.95)
        assert stats.binom.sf(hits - 1, number, low) == pytest.approx(0.025, rel=1e-6)
        assert stats.binom.cdf(hits, number, high) == pytest.approx(0.025, rel=1e-6)
    assert intervals.clopper_pearson(0, 10, 0.95)[0] == 0
    assert intervals.clopper_pearson(10, 10, 0.95)[1] == 1
    assert intervals.clopper_pearson(0, 0, 0.95) == (0, 1)
    # All of 59 right: .95 ** 59 = .0485 < 5 %, and .95 ** 58 = .051.
    assert intervals.lower_bound(59, 59, 0.95) > 0.95 > intervals.lower_bound(58, 58, 0.95)


def test_samples_that_repeat_each_other_count_once() -> None:
    right = np.repeat(np.random.default_rng(0).random(50) < 0.7, 4)
    groups = np.repeat(np.arange(50), 4)
    assert intervals.effective(right, None) == 200
    assert intervals.effective(right, groups) == pytest.approx(50, rel=0.03)
    assert intervals.effective(np.ones(200, dtype=bool), groups) == 50


# --- calibration ---


def test_the_temperature_is_found_and_changes_no_label() -> None:
    source = np.random.default_rng(0)
    logits = source.normal(0, 2, (4000, CLASSES))
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.array([source.choice(CLASSES, p=row) for row in honest])
    boastful = honest**3 / (honest**3).sum(1, keepdims=True)
    found = calibration.fit(boastful, truth)
    assert found.value == pytest.approx(3.0, rel=0.1)
    calibrated = found(boastful)
    assert (calibrated.argmax(1) == boastful.argmax(1)).all()
    np.testing.assert_allclose(calibrated, honest, atol=0.03)
    assert calibration.log_loss(calibrated, truth) < calibration.log_loss(boastful, truth)
    # Of those stated with .7 to .9, so many are right as stated.
    stated = calibrated.max(1)
    chosen = (stated > 0.7) & (stated < 0.9)
    assert (calibrated.argmax(1) == truth)[chosen].mean() == pytest.approx(stated[chosen].mean(), abs=0.04)


def test_few_right_answers_are_no_certainty() -> None:
    sure = np.eye(2)[np.zeros(10, dtype=int)]
    found = calibration.fit(sure, np.zeros(10, dtype=int))
    assert found(sure).max() <= 1 - (1 / 12) / 2 + 1e-12
    assert calibration.fit(np.empty((0, 2)), np.empty(0, dtype=int)) == Temperature(1.0, 0.5)


def test_a_fold_is_calibrated_by_the_others() -> None:
    world = World("flip", 300)
    fold = np.arange(300) % 3
    calibrated = calibration.cross_fitted(world.predicted, world.true, fold)
    other = world.true.copy()
    other[fold == 0] = (other[fold == 0] + 1) % CLASSES
    again = calibration.cross_fitted(world.predicted, other, fold)
    np.testing.assert_array_equal(calibrated[fold == 0], again[fold == 0])
    assert not np.array_equal(calibrated[fold == 1], again[fold == 1])


# --- nothing judges what it has seen ---


def test_no_way_sees_what_it_is_judged_on() -> None:
    world = World("flip", 400)
    problem = world.problem(np.arange(0, 400, 4))
    seen: list[Array] = []

    def parrot(asked: Problem) -> Array:
        """Repeat the trusted label where it is visible; elsewhere answer the class after the true one."""
        seen.append(asked.trusted)
        answer = np.where(asked.trusted, asked.truth, (world.true + 1) % CLASSES)
        return np.asarray(np.eye(CLASSES)[answer])

    judged = verdict.cross_fit(problem, {"given": ways.given, "parrot": parrot}, verdict.trusted_folds(problem, 5, 1))
    assert len(judged.rows) == 100, "all trusted samples judge"
    assert judged.right("parrot").sum() == 0
    assert [int(one.sum()) for one in seen] == [80] * 5
    assert sum((problem.trusted & ~one).astype(int) for one in seen).tolist() == problem.trusted.astype(int).tolist()


def test_groups_are_never_torn() -> None:
    source = np.random.default_rng(1)
    groups, labels = source.integers(0, 40, 500), source.integers(0, 3, 500)
    fold = folds.assign(labels, groups, 5, seed=2)
    assert all(len(set(fold[groups == one])) == 1 for one in range(40))
    sizes = np.bincount(fold, minlength=5)
    assert sizes.min() > 60
    assert (folds.assign(labels, groups, 5, seed=2) == fold).all()
    plain = folds.assign(labels, None, 5, seed=2)
    for one in range(3):
        spread = np.bincount(plain[labels == one], minlength=5)
        assert spread.max() - spread.min() <= 1


def test_a_group_judges_only_what_its_other_samples_did_not_teach() -> None:
    world = World("flip", 400)
    problem = Problem(
        tuple("abcd"), world.given[:, None], np.where(np.arange(400) < 200, world.true, UNKNOWN),
        np.ones(400, dtype=bool), np.arange(400) % 40,
    )  # fmt: skip

    def told(asked: Problem) -> Array:
        """Answer rightly for samples whose group is visible."""
        assert asked.groups is not None
        visible = np.isin(asked.groups, asked.groups[asked.trusted])
        return np.asarray(np.eye(CLASSES)[np.where(visible, world.true, (world.true + 1) % CLASSES)])

    judged = verdict.cross_fit(problem, {"given": ways.given, "told": told}, verdict.trusted_folds(problem, 5, 1))
    assert judged.right("told").sum() == 0


def test_trusted_samples_of_one_group_judge_nothing() -> None:
    world = World("flip", 400)
    problem = world.problem(np.arange(50))
    problem = replace(problem, groups=np.where(np.arange(400) < 50, 0, np.arange(400)))
    outcome = judging.judge(problem, world.ways())
    assert outcome.report.answer == verdict.CANNOT_TELL
    assert "0 trusted samples can judge (in two groups or more)" in outcome.report.headline()
    assert np.isnan(outcome.report.remaining.value)
    assert set(outcome.actions[50:]) == {"check"}


def test_suspicious_samples_train_and_never_judge() -> None:
    world = World("flip", 400)
    wrong, chance = np.flatnonzero(world.given != world.true), np.arange(100)
    wrong = wrong[wrong >= 100][:40]
    problem = world.problem(np.union1d(wrong, chance))
    problem.judging[wrong] = False
    rows, known = verdict.judging_rows(problem)
    assert known
    assert rows.tolist() == chance.tolist()
    # They were picked for being wrong: counted, they would make every matrix look worse.
    counted = ways.transitions(problem)[0]
    problem.judging[wrong] = True
    assert np.trace(counted) > np.trace(ways.transitions(problem)[0]) + 0.1


def test_right_given_labels_of_all_trusted_samples_judge_no_correction() -> None:
    world = World("flip", 400)
    trusted = np.flatnonzero(world.given == world.true)[:80]
    outcome = judging.judge(world.problem(trusted), world.ways())
    assert outcome.report.answer == verdict.CANNOT_TELL
    assert "correction cannot be judged" in outcome.report.verdict.reason
    assert [one.name for one in outcome.report.verdict.scores] == ["classifier"], "it does not look at given labels"


def test_a_handful_judges_nothing() -> None:
    world = World("flip", 400)
    outcome = judging.judge(world.problem(np.arange(8)), world.ways())
    assert outcome.report.answer == verdict.CANNOT_TELL
    assert "8 trusted samples can judge (in two groups or more), and 10 are the least" in outcome.report.headline()


# --- the ways, promises and counts ---


def test_bayes_rule_by_hand() -> None:
    annotations = np.array([[0], [0], [1], [1], [1], [0]])
    truth = np.array([0, 0, 1, 1, 0, UNKNOWN])
    problem = Problem(("no", "yes"), annotations, truth, np.ones(6, dtype=bool))
    # Counts [[2, 1], [0, 2]]; right (4 + 1) / (5 + 2) = 5/7, so the prior row is [5/7, 2/7], and it weighs 2.
    expected = np.array([[(2 + 10 / 7) / 5, (1 + 4 / 7) / 5], [(0 + 4 / 7) / 4, (2 + 10 / 7) / 4]])
    np.testing.assert_allclose(ways.transitions(problem)[0], expected)
    predicted = np.tile([0.3, 0.7], (6, 1))
    joint = np.array([[0.3**one, 0.7**one] for one in ways.EXPONENTS]) * expected[:, 0]
    answers = joint / joint.sum(1, keepdims=True)
    found = ways.Bayes(predicted)(problem)[5]
    assert np.isclose(answers, found).all(1).any()


def test_the_better_classifier_is_taken_by_what_is_visible() -> None:
    world = World("flip", 400)
    poor = np.random.default_rng(1).dirichlet(np.ones(CLASSES), 400)
    tuned = ways.Tuned({"poor": ways.Predicted(poor), "good": ways.Predicted(world.predicted)})
    assert tuned.choice(world.problem(np.arange(100))) == "good"
    np.testing.assert_array_equal(tuned(world.problem(np.arange(100))), world.predicted)
    assert tuned.choice(world.problem(np.empty(0, dtype=int))) == "poor", "the first where nothing is visible"


def test_annotators_are_told_apart() -> None:
    world = World("flip", 600)
    other = np.where(np.arange(600) % 10 == 0, (world.true + 2) % CLASSES, world.true)
    other[1::2] = UNKNOWN
    truth = np.where(np.arange(600) < 300, world.true, UNKNOWN)
    problem = Problem(tuple("abcd"), np.stack([world.given, other], 1), truth, np.ones(600, dtype=bool))
    first, second = promise.noise_per_annotator(problem, 0.95)
    assert first.value == pytest.approx((world.given != world.true)[:300].mean())
    assert second.value == pytest.approx(0.2)  # one in ten of all, which is one in five of the even ones
    assert second.low < 0.2 < second.high
    poor, good = ways.transitions(problem)
    assert np.trace(good) > np.trace(poor)
    assert sum(np.isfinite(one.value) for one in promise.noise_per_class(problem, 0.95).values()) == CLASSES


def test_a_precision_is_promised_only_as_far_as_the_bound_allows() -> None:
    world = World("uniform")
    trusted = np.random.default_rng(0).choice(3000, 300, replace=False)
    found = [judging.judge(world.problem(trusted), world.ways(), precision=one) for one in (0.7, 0.8, 0.9, 0.999)]
    for less, more in pairwise(found):
        decided = [(one.actions == promise.CHECK).sum() for one in (less, more)]
        assert decided[0] <= decided[1]
    for one in found:
        assert not one.report.promise.kept or one.report.promise.bound >= one.report.promise.precision
    assert not found[-1].report.promise.kept
    assert found[-1].report.actions == {"keep": 0, "change": 0, "check": 2700}
    assert "cannot be promised" in str(found[-1].report)


def test_a_precision_that_is_just_missed_is_seldom_promised() -> None:
    # Labels are right in .949 of the cases wherever the threshold is, so each promise of .95 is a wrong one.
    source, draws, promised = np.random.default_rng(4), 400, 0
    for _ in range(draws):
        right = source.random(200) < 0.949
        probabilities = np.eye(2)[np.where(right, 0, 1)]
        judged = verdict.Judged(
            np.arange(200), np.arange(200) % 5, np.zeros(200, dtype=int), None, {"way": probabilities}, {}, True, {}
        )
        promised += promise.promise(judged, "way", source.random(200), 0.95, 0.95).kept
    assert promised / draws <= 1 - least(0.95, draws)
    assert promised > 0, "a bound that is never reached promises nothing to anybody"


def test_labels_to_check_next_are_the_least_sure() -> None:
    world = World("flip")
    trusted = np.random.default_rng(0).choice(3000, 200, replace=False)
    outcome = judging.judge(world.problem(trusted), world.ways(), check=100)
    assert len(outcome.check_next) == 100
    assert not np.isin(outcome.check_next, trusted).any()
    wrong = outcome.labels != world.true
    assert wrong[outcome.check_next].mean() > 3 * wrong.mean()
    ranks = outcome.suspicion[outcome.suspicion > 0]
    assert sorted(ranks) == list(range(1, 2801))
    mistaken = world.given != world.true
    first = np.flatnonzero((outcome.suspicion > 0) & (outcome.suspicion <= 300))
    assert mistaken[first].mean() > 0.9


def test_the_mean_of_all_ways_weighs_them_by_their_loss() -> None:
    truth, sure, unsure = np.array([0, 1]), np.eye(2) * 0.8 + 0.1, np.full((2, 2), 0.5)
    shares = weights({"given": sure, "one": sure, "other": unsure}, truth)
    # Losses are -log .9 and -log .5; the given labels do not count.
    assert shares["other"] / shares["one"] == pytest.approx((0.5 / 0.9) ** 5)
    assert sum(shares.values()) == pytest.approx(1)
    joined = mean({"one": sure, "other": unsure}, {"one": 0.75, "other": 0.25})
    assert joined[0] == pytest.approx([0.75 * 0.9 + 0.25 * 0.5, 0.75 * 0.1 + 0.25 * 0.5])


def test_labels_are_those_of_all_ways_together_where_that_is_no_worse() -> None:
    for kind in ("flip", "uniform"):
        world = World(kind)
        trusted = np.random.default_rng(1).choice(len(world.true), 200, replace=False)
        problem, rest = world.problem(trusted), np.setdiff1d(np.arange(len(world.true)), trusted)
        outcome = judging.judge(problem, world.ways())
        score = next(one for one in outcome.report.verdict.scores if one.name == TOGETHER)
        assert outcome.report.way == (outcome.report.verdict.way if score.worse else TOGETHER)
        right = (outcome.labels == world.true)[rest].mean()
        simplest = judging.judge(problem, world.ways(), way="verdict")
        assert right >= (simplest.labels == world.true)[rest].mean() - 0.01
        assert score.worse or "Labels written: together (the mean of" in outcome.report.headline()
    assert not score.worse, "one of the two worlds must have it"


def test_a_way_can_be_named() -> None:
    world = World("flip", 500)
    problem = world.problem(np.arange(100))
    outcome = judging.judge(problem, world.ways(), way="classifier")
    rest = ~problem.trusted
    assert (outcome.labels[rest] == world.predicted.argmax(1)[rest]).all()
    assert (outcome.labels[~rest] == world.true[~rest]).all(), "trusted samples keep their trusted label"
    assert "as you asked" in outcome.report.headline()
    simplest = judging.judge(problem, world.ways(), way="verdict").report
    assert simplest.way == simplest.verdict.way
    with pytest.raises(ValueError, match="--way magic: must be best, verdict, together, or one of given"):
        judging.judge(problem, world.ways(), way="magic")
