"""Which way to correct labels, judged on all trusted samples, and whether it can be told at all.

Every way is cross-fitted: the trusted samples are split into folds; those of a fold are treated as if nobody had
checked them, corrected with what the others show, and only then compared with their trusted labels. So each trusted
sample judges, and none has helped the answer it judges: neither training, nor tuning, nor calibration has seen it.

The rule: intervals of how much better than the given labels each way is hold for all ways at once, and the ways that
are *clearly worse* than another one are named such that the best is not among them (`intervals.Comparison`). The
simplest way that is not clearly worse wins. If that is a correction it must be clearly better than the given labels.
If no correction is, and one could still be better by more than `MARGIN`, the answer is that it cannot be told.

Samples that were checked because they were suspicious are no random sample: they train and never judge. Where the
given labels of trusted samples are not known, or all are right because they were corrected in the same column, nothing
shows what correction would have made of them: it cannot be judged.

The labels that are written are another question: what serves best whoever needs right labels. That is the mean of all
ways (`together.py`), which is judged like any other way, unless it is clearly worse than one of them or looks no better
than the given labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from examples.noisy_labels.verdict import calibration, folds, intervals, together
from examples.noisy_labels.verdict.calibration import Temperature
from examples.noisy_labels.verdict.intervals import Comparison
from examples.noisy_labels.verdict.problem import Problem
from examples.noisy_labels.verdict.together import TOGETHER
from examples.noisy_labels.verdict.ways import Way, needs_given

Array = np.ndarray
MARGIN = 0.02  # a difference of which less would not be worth a decision
FEW = 10  # with fewer judging samples nothing is judged at all
CORRECT, KEEP, CANNOT_TELL = "correct", "keep", "cannot tell"


@dataclass(frozen=True)
class Score:
    """How one way did on the judging samples.

    Args:
        name: The way.
        right: Share of labels that it has right.
        low, high: Interval of that share; those of all ways hold at once.
        gain: By how much it is better than the given labels.
        gain_low, gain_high: Interval of that; those of all ways hold at once.
        worse: Whether it is clearly worse than another way.
        log_loss: Of its calibrated probabilities.
        temperature: What calibrates them.
    """

    name: str
    right: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    worse: bool
    log_loss: float
    temperature: float


@dataclass(frozen=True)
class Verdict:
    """What the trusted samples say.

    Args:
        answer: ``correct``: the labels of ``way`` are clearly better than the given ones. ``keep``: no way is better
            by more than `MARGIN`. ``cannot tell``.
        way: Whose labels are written: the winner; where it cannot be told, the one that looks best.
        reason: The answer in a sentence.
        scores: Of all ways, the simplest first.
        judged: On how many samples.
    """

    answer: str
    way: str
    reason: str
    scores: tuple[Score, ...]
    judged: int


@dataclass(frozen=True)
class Judged:
    """Cross-fitted answers on the judging samples.

    Args:
        rows: Which samples judge.
        fold: The fold of each.
        truth: Their trusted labels.
        groups: Their groups.
        probabilities: Of each way, calibrated by the other folds.
        temperatures: Of each way, fitted on all.
        known: Whether their given labels are known, so that correction can be judged.
        weights: How much each way counts in the mean of all; empty where there is none.
    """

    rows: Array
    fold: Array
    truth: Array
    groups: Array | None
    probabilities: dict[str, Array]
    temperatures: dict[str, Temperature]
    known: bool
    weights: dict[str, float]

    def right(self, way: str) -> Array:
        """Return which labels a way has right."""
        return np.asarray(self.probabilities[way].argmax(1) == self.truth)


def judging_rows(problem: Problem) -> tuple[Array, bool]:
    """Return which samples judge, and whether their given labels are known.

    If all of them are right, they are taken for unknown: most likely the column of labels was corrected.
    """
    counting = np.flatnonzero(problem.counting)
    if len(counting) and (problem.given[counting] != problem.truth[counting]).any():
        return counting, True
    return np.flatnonzero(problem.trusted & problem.judging), False


def trusted_folds(problem: Problem, number: int, seed: int) -> Array:
    """Return a fold for each sample, -1 where none: trusted samples of one group come together."""
    trusted = np.flatnonzero(problem.trusted)
    groups = None if problem.groups is None else problem.groups[trusted]
    fold = np.full(len(problem.truth), -1)
    fold[trusted] = folds.assign(problem.truth[trusted], groups, number, seed)
    return fold


def cross_fit(
    problem: Problem, ways: Mapping[str, Way], fold: Array, watch: Callable[[str, int], None] = lambda *_: None
) -> Judged:
    """Ask every way for the labels of each fold as if they were not trusted.

    Args:
        problem: All labels.
        ways: The ways.
        fold: From `trusted_folds`.
        watch: Is told way and fold before each answer.
    """
    rows, known = judging_rows(problem)
    if (
        len(np.unique(fold[rows])) < 2
    ):  # few samples, or all of one group: whoever judges, nobody would be left to teach
        rows = rows[:0]
    truth = problem.truth[rows]
    answers = {name: np.full((len(rows), problem.classes), np.nan) for name in ways if known or not needs_given(name)}
    for one in np.unique(fold[rows]):
        # A fold's samples that do not judge are hidden too: they may belong to a group of those that do.
        hidden, asked = problem.hiding(fold == one), fold[rows] == one
        for name, answer in answers.items():
            watch(name, int(one))
            answer[asked] = ways[name](hidden)[rows[asked]]
    calibrated = {name: calibration.cross_fitted(one, truth, fold[rows]) for name, one in answers.items()}
    temperatures = {name: calibration.fit(one, truth) for name, one in answers.items()}
    weights = {}
    if known and len(rows) and len(calibrated.keys() - {"given"}) > 1:
        weights = together.weights(calibrated, truth)
        joined = together.mean(calibrated, weights)
        calibrated[TOGETHER] = together.cross_fitted(calibrated, truth, fold[rows])
        temperatures[TOGETHER] = calibration.fit(joined, truth)
    groups = None if problem.groups is None else problem.groups[rows]
    return Judged(rows, fold[rows], truth, groups, calibrated, temperatures, known, weights)


def decide(judged: Judged, level: float, seed: int) -> Verdict:
    """Return the verdict."""
    names = list(judged.probabilities)
    number = len(judged.rows)
    right = np.array([judged.right(name) for name in names]).reshape(len(names), number)
    best = names[int(right.sum(1).argmax())] if names else "given"
    if number < FEW:
        rule = (
            f"{number} trusted samples can judge (in two groups or more), and {FEW} are the least: nothing can be told"
        )
        return Verdict(CANNOT_TELL, best, f"{rule}. Check more samples, chosen at random", (), number)
    scores = tuple(_scores(judged, names, right, Comparison(right, judged.groups, level, seed)))
    if not judged.known:
        rule = "correction cannot be judged: what the trusted samples were called before they were checked is not known"
        advice = "Keep the given label of a sample when you check it"
        return Verdict(CANNOT_TELL, best, f"{rule}, or nothing was wrong. {advice}", scores, number)
    answer, way, reason = _answer(scores, best)
    return Verdict(answer, way, reason, scores, number)


def _answer(scores: Sequence[Score], best: str) -> tuple[str, str, str]:
    better = [one for one in scores if one.name != "given" and one.gain_low > 0]
    if better:
        # One that is not clearly worse need not be clearly better than the given labels: then the best of those counts.
        won = next((one for one in better if not one.worse), max(better, key=lambda one: one.right))
        reason = f"{won.name} is clearly better than the given labels: {_span(won)} of the labels"
        rivals = [
            f"{one.name} ({100 * one.right:.1f} %)"
            for one in scores
            if one is not won and not one.worse and one.right > won.right
        ]
        if rivals:
            reason += f"; {', '.join(rivals)} may be better still, which cannot be told yet"
        return CORRECT, won.name, reason
    corrections = [one for one in scores if one.name != "given"]
    most = max(corrections, key=lambda one: one.gain_high, default=None)
    if most is None or most.gain_high <= MARGIN:
        return KEEP, "given", f"no way is better than the given labels by more than {100 * MARGIN:.0f} points"
    leading = next((one for one in corrections if one.name == best), most)
    reason = f"whether any correction is better than the given labels cannot be told: {leading.name} {_span(leading)}"
    return CANNOT_TELL, best, f"{reason}. Keep the given labels until more samples are checked at random"


def _span(score: Score) -> str:
    return f"{100 * score.gain:+.1f} ({100 * score.gain_low:+.1f} to {100 * score.gain_high:+.1f}) points"


def _scores(judged: Judged, names: list[str], right: Array, comparison: Comparison) -> list[Score]:
    reference = names.index("given") if "given" in names else None
    lows, highs = (None, None) if reference is None else comparison.gains(reference)
    worse = comparison.clearly_worse()
    each = 1 - (1 - comparison.level) / max(1, len(names))  # Bonferroni: the intervals of all ways hold at once
    scores = []
    for i, name in enumerate(names):
        share, number = right[i].mean(), intervals.effective(right[i], judged.groups)
        low, high = intervals.clopper_pearson(share * number, number, each)
        gain = low_gain = high_gain = float("nan")
        if reference is not None and lows is not None and highs is not None:
            gain, low_gain, high_gain = float(share - right[reference].mean()), float(lows[i]), float(highs[i])
        loss = calibration.log_loss(judged.probabilities[name], judged.truth)
        heat = judged.temperatures[name].value
        scores.append(Score(name, float(share), low, high, gain, low_gain, high_gain, bool(worse[i]), loss, heat))
    return scores
