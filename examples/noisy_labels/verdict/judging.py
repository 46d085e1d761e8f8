"""From ways to an outcome: cross-fit them, decide, and correct with the one that won."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from examples.noisy_labels.verdict import decision as verdict
from examples.noisy_labels.verdict import promise as promises
from examples.noisy_labels.verdict import together
from examples.noisy_labels.verdict.calibration import Temperature
from examples.noisy_labels.verdict.decision import CANNOT_TELL, KEEP, Judged, Verdict
from examples.noisy_labels.verdict.findings import Report
from examples.noisy_labels.verdict.problem import UNKNOWN, Problem
from examples.noisy_labels.verdict.together import TOGETHER
from examples.noisy_labels.verdict.ways import BEST, VERDICT, Tuned, Way

Array = np.ndarray
FOLDS = 5
TRUSTED = "trusted"
AS_IT_IS = Temperature(1.0, 0.0)


@dataclass(frozen=True)
class Outcome:
    """Labels and what is known about them; trusted samples have their trusted label.

    Args:
        labels: Position of the class of each sample.
        probabilities: Calibrated probabilities of the classes.
        actions: ``keep``, ``change`` or ``check``; ``trusted``.
        suspicion: Rank of each sample that is not trusted by how improbable its given label is, from 1 on; trusted: 0.
        check_next: Positions of the samples whose label is the least sure, the least sure first.
        report: The verdict, in numbers and words.
    """

    labels: Array
    probabilities: Array
    actions: Array
    suspicion: Array
    check_next: Array
    report: Report


def judge(
    problem: Problem,
    ways: Mapping[str, Way],
    *,
    folds: int = FOLDS,
    precision: float = 0.95,
    level: float = 0.95,
    check: int = 50,
    seed: int = 1,
    way: str | None = None,
    finished: Mapping[str, Array] | None = None,
    watch: Callable[[str, int], None] = lambda *_: None,
) -> Outcome:
    """Judge all ways and correct with the winner, or with the one that is named.

    Args:
        problem: All labels.
        ways: The ways, simple ones first.
        folds: Parts of the trusted samples.
        precision: Asked for of labels that need no check.
        level: Probability with which intervals hold.
        check: How many samples to name for checking.
        seed: Of folds and draws.
        way: The way whose labels are taken, `BEST` or `VERDICT`; None for the mean of all ways, see `decision.py`.
        finished: Answers of ways, for all samples, that are there already.
        watch: Is told way and fold before each answer.

    Raises:
        ValueError: There is no way of that name.
    """
    if way is not None and way not in (*ways, TOGETHER, BEST, VERDICT):
        raise ValueError(f"--way {way}: must be {BEST}, {VERDICT}, {TOGETHER}, or one of {', '.join(ways)}.")
    judged = verdict.cross_fit(problem, ways, verdict.trusted_folds(problem, folds, seed), watch)
    found = verdict.decide(judged, level, seed)
    chosen = _chosen(way, judged, found, ways)
    ranking = _ranking(judged, ways)
    answers = dict(finished or {})
    wanted = dict.fromkeys((chosen, ranking))
    for name in [*judged.weights, *wanted] if TOGETHER in wanted else wanted:
        if name not in answers and name != TOGETHER:
            watch(name, -1)
            answers[name] = ways[name](problem)
    if TOGETHER in wanted:
        parts = {name: judged.temperatures[name](answers[name]) for name in judged.weights}
        answers[TOGETHER] = together.mean(parts, judged.weights)
    calibrated = {name: judged.temperatures.get(name, AS_IT_IS)(answers[name]) for name in (chosen, ranking)}
    labels = calibrated[chosen].argmax(1)
    probabilities = calibrated[ranking if chosen == "given" else chosen].copy()
    known = problem.trusted
    labels[known] = problem.truth[known]
    probabilities[known] = np.eye(problem.classes)[problem.truth[known]]
    sure = _confidence(judged, chosen, ranking)
    promised = promises.promise(judged, chosen, sure, precision, level) if sure is not None else promises.NOTHING
    actions = promises.actions(probabilities, problem.given, labels, promised).astype(object)
    actions[known] = TRUSTED
    unknown = np.flatnonzero(~known & problem.voted)
    given = np.where(problem.given == UNKNOWN, labels, problem.given)
    of_given = calibrated[ranking][unknown, given[unknown]]
    suspicion = np.zeros(len(labels), dtype=int)
    suspicion[unknown[of_given.argsort(kind="stable")]] = np.arange(1, len(unknown) + 1)
    doubt = probabilities[unknown, labels[unknown]]
    check_next = unknown[doubt.argsort(kind="stable")][:check]
    report = Report(
        verdict=found,
        classifiers={name: one.choice(problem) for name, one in ways.items() if isinstance(one, Tuned)},
        weights=judged.weights,
        way=chosen,
        asked=way is not None,
        promise=promised,
        actions={name: int((actions == name).sum()) for name in (promises.KEEP, promises.CHANGE, promises.CHECK)},
        remaining=promises.remaining_errors(judged, chosen, len(unknown), level),
        unchecked=len(unknown),
        noise_per_class=promises.noise_per_class(problem, level),
        noise_per_annotator=promises.noise_per_annotator(problem, level),
        level=level,
        check=len(check_next),
    )
    return Outcome(labels, probabilities, actions, suspicion, check_next, report)


def _chosen(way: str | None, judged: Judged, found: Verdict, ways: Mapping[str, Way]) -> str:
    """Return the way whose labels are written: the one that is asked for, or the mean of all unless that is no good."""
    if way == BEST:
        return max(judged.probabilities, key=lambda name: judged.right(name).sum(), default=list(ways)[-1])
    if way == TOGETHER and not judged.weights:
        rule = "nothing judges the ways, so they cannot be weighted. Name one of them"
        raise ValueError(f"--way {TOGETHER}: {rule}.")
    if way not in (None, VERDICT):
        return str(way)
    if found.answer == CANNOT_TELL and not judged.known:
        return list(ways)[-1]  # nothing can be told, so what was asked for: the last way is the most elaborate
    score = next((one for one in found.scores if one.name == TOGETHER), None)
    if way is None and score is not None and found.answer != KEEP and not score.worse and score.gain > 0:
        return TOGETHER
    return found.way if found.way in (*ways, TOGETHER) else "given"


def _ranking(judged: Judged, ways: Mapping[str, Way]) -> str:
    """Return the way that ranks given labels: that of least log loss; the given labels do not rank themselves."""
    losses = {
        name: float(-np.log(np.maximum(one[np.arange(len(one)), judged.truth], 1e-6)).mean())
        for name, one in judged.probabilities.items()
        if name != "given" and len(one)
    }
    return min(losses, key=lambda name: losses[name]) if losses else list(ways)[-1]


def _confidence(judged: Judged, chosen: str, ranking: str) -> Array | None:
    """Return how sure the chosen way's labels are on the judging samples; None where it was not judged."""
    if chosen not in judged.probabilities or not len(judged.rows):
        return None
    labels = judged.probabilities[chosen].argmax(1)
    source = ranking if chosen == "given" else chosen
    return np.asarray(judged.probabilities[source][np.arange(len(labels)), labels])
