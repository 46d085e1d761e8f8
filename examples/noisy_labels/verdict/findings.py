"""The report of a verdict: what was found, as numbers to read on and as lines to read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from examples.noisy_labels.verdict.decision import CANNOT_TELL, CORRECT, Verdict
from examples.noisy_labels.verdict.promise import Interval, Promise
from examples.noisy_labels.verdict.together import TOGETHER

SHOWN = 12  # classes or annotators in a line


@dataclass(frozen=True)
class Report:
    """What is known about the labels, and how well.

    Args:
        verdict: Which way is the best, and whether that can be told.
        way: Whose labels were taken.
        asked: Whether the user named that way.
        classifiers: Of the simple ways, by which classifier each is done.
        weights: How much each way counts in `together`.
        promise: Which labels need no check.
        actions: How many labels are to keep, to change, to check.
        remaining: How many labels of samples that nobody checked are wrong after correction.
        unchecked: How many such samples there are.
        noise_per_class: How often the given label of each true class is wrong.
        noise_per_annotator: How often each annotator is wrong.
        level: Probability with which intervals hold.
        check: How many samples are named for checking.
    """

    verdict: Verdict
    way: str
    asked: bool
    classifiers: dict[str, str]
    weights: dict[str, float]
    promise: Promise
    actions: dict[str, int]
    remaining: Interval
    unchecked: int
    noise_per_class: dict[str, Interval]
    noise_per_annotator: list[Interval]
    level: float
    check: int

    @property
    def answer(self) -> str:
        """Return ``correct``, ``keep`` or ``cannot tell``."""
        return self.verdict.answer

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        plain: dict[str, Any] = _known(asdict(self))
        return plain

    def table(self) -> list[str]:
        """Return the scores of all ways, a line each."""
        scores = self.verdict.scores
        if not scores:
            return []
        width = max(len(one.name) for one in scores)
        head = f"{'way'.ljust(width)}  labels right           better than given      log loss"
        lines = [f"{head}   ({self.verdict.judged} trusted samples judge; intervals hold at once, {self.level:.0%})"]
        for one in scores:
            right = f"{100 * one.right:5.1f} ({100 * one.low:.1f} to {100 * one.high:.1f})"
            gain = f"{100 * one.gain:+5.1f} ({100 * one.gain_low:+.1f} to {100 * one.gain_high:+.1f})"
            gain = "" if one.gain != one.gain or one.name == "given" else gain
            mark = "  clearly worse" if one.worse else ""
            lines.append(f"{one.name.ljust(width)}  {right:<21}  {gain:<21}  {one.log_loss:8.3f}{mark}")
        return lines

    def lines(self) -> list[str]:
        """Return the report in words."""
        return [*self.table(), self.headline(), *self._promised(), *self._noise()]

    def headline(self) -> str:
        """Return the verdict in one line."""
        words = {CORRECT: "correct", CANNOT_TELL: "cannot tell"}.get(self.answer, "keep the given labels")
        taken = "the verdict's" if self.answer != CANNOT_TELL else "a best guess"
        if self.way == TOGETHER:
            shares = [f"{name} {100 * share:.0f} %" for name, share in self.weights.items() if share >= 0.005]
            taken = f"the mean of {', '.join(shares)}, for the verdict's: way = verdict"
        if self.asked:
            taken = "as you asked"
        return f"verdict: {words}. {self.verdict.reason}. Labels written: {self.way} ({taken})."

    def summary(self) -> str:
        """Return the verdict in a clause: before, after, what remains."""
        scores = {one.name: one for one in self.verdict.scores}
        parts = []
        if "given" in scores and self.way in scores:
            after = scores[self.way]
            parts.append(
                f"labels of {self.verdict.judged} trusted samples: {100 * scores['given'].right:.1f} % right as given, "
                f"{100 * after.right:.1f} % ({100 * after.low:.1f} to {100 * after.high:.1f}) by {self.way}"
            )
        left = self.remaining
        if left.value == left.value:
            parts.append(f"about {left.value:.0f} wrong ones remain ({left.low:.0f} to {left.high:.0f})")
        words = {CORRECT: "correct", CANNOT_TELL: "cannot tell"}.get(self.answer, "keep the given labels")
        return "; ".join([*parts, f"verdict: {words}, see verdict.txt"])

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _promised(self) -> list[str]:
        kept, level = self.promise, f"{self.level:.0%}"
        counts = ", ".join(f"{number} to {name}" for name, number in self.actions.items())
        if kept.kept:
            line = f"labels: {counts}; of those to keep or change at least {100 * kept.bound:.1f} % are right ({level})"
        else:
            line = f"labels: {counts}; a precision of {100 * kept.precision:g} % cannot be promised"
            line += f" (at most {100 * kept.bound:.1f} % can), so all are to check"
        left = self.remaining
        errors = f"wrong labels that remain among {self.unchecked} nobody checked: "
        if left.value == left.value:
            errors += f"about {left.value:.0f} ({left.low:.0f} to {left.high:.0f})"
        else:
            errors += "unknown"
        return [line, errors, f"check these {self.check} next: the least sure first; then name them as suspicious"]

    def _noise(self) -> list[str]:
        built = ", ".join(f"{way} by {name}" for way, name in self.classifiers.items())
        lines = [f"classifiers: {built}"] if set(self.classifiers.values()) - {"classifier"} else []
        if any(one.value == one.value for one in self.noise_per_class.values()):
            lines.append(f"given labels wrong, by true class: {_shares(self.noise_per_class)}")
        if len(self.noise_per_annotator) > 1:
            lines.append(
                f"wrong, by annotator: {_shares({str(i + 1): one for i, one in enumerate(self.noise_per_annotator)})}"
            )
        return lines


def _known(value: Any) -> Any:
    """Return a value with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _known(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and value != value else value


def _shares(shares: dict[str, Interval]) -> str:
    known = [
        f"{name} {100 * one.value:.0f} % ({100 * one.low:.0f} to {100 * one.high:.0f})"
        for name, one in list(shares.items())[:SHOWN]
        if one.value == one.value
    ]
    return ", ".join(known) + (", ..." if len(shares) > SHOWN else "")
