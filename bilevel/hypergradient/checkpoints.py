"""A virtual walk of which every so many-th point is kept; on the way back the steps between are taken once more.

An evaluation of a batch starts from the random state of its first one (``evaluation/replay.py``), so that the steps
are the same bit for bit. With n steps and sqrt(n) points kept, about 2 sqrt(n) points are alive at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, isqrt
from typing import Literal

from ..evaluation.oracle import Oracle
from ..lower_steps import Rule, State
from ..vectors import Tensors
from .trajectory import Step, Trajectory, descend

Checkpoints = int | Literal["sqrt"]


@dataclass(frozen=True)
class Checkpoint:
    """Where a segment of the walk begins: its first batch, point and state; and how many steps it has."""

    batch: int
    point: Tensors | None
    state: State
    steps: int


class Segments:
    """The last steps of a walk, from the last to the first: each segment is walked when it is its turn."""

    def __init__(self, oracle: Oracle, rule: Rule, checkpoints: list[Checkpoint], latest: list[Step]) -> None:
        self._oracle, self._rule, self._checkpoints, self._latest = oracle, rule, checkpoints, latest

    def __len__(self) -> int:
        return sum(checkpoint.steps for checkpoint in self._checkpoints)

    def __reversed__(self) -> Iterator[Step]:
        latest, self._latest = self._latest, []  # known from the way there
        while self._checkpoints:
            checkpoint = self._checkpoints.pop()
            steps = latest or _walked(self._oracle, self._rule, checkpoint, keep=checkpoint.steps).steps
            latest = []
            while steps:
                yield steps.pop()


def descend_with_checkpoints(
    oracle: Oracle, rule: Rule, steps: int, *, start: Tensors | None, last: int, checkpoints: Checkpoints
) -> tuple[Trajectory, Segments]:
    """Take virtual lower steps as :func:`descend`; return the walk, and its ``last`` steps for one way back.

    Args:
        oracle: Where G is evaluated.
        rule: The step.
        steps: How many.
        start: Where to begin; None: at the current values of the lower variables.
        last: How many of the last steps are wanted.
        checkpoints: How many points of them are kept; ``"sqrt"``: the root of ``last``.

    Cost:
        One gradient of G a step, and one more for each of the ``last`` that is not in the last segment.
    """
    kept = isqrt(last - 1) + 1 if checkpoints == "sqrt" else min(checkpoints, last)
    length = ceil(last / kept)
    sizes = [steps - last] if steps > last else []
    sizes += [min(length, last - taken) for taken in range(0, last, length)]
    marks: list[Checkpoint] = []
    batch, point, state, first = 0, start, rule.start(), None
    for number, size in enumerate(sizes):
        mark = Checkpoint(batch, point, state, size)
        walk = _walked(oracle, rule, mark, keep=size if number == len(sizes) - 1 else 0)
        if batch >= steps - last:
            marks.append(mark)
        first = first or walk.first
        batch, point, state = batch + size, walk.end, walk.state
    return Trajectory(first or walk.first, walk.end, walk.state), Segments(oracle, rule, marks, walk.steps)


def _walked(oracle: Oracle, rule: Rule, begin: Checkpoint, *, keep: int) -> Trajectory:
    return descend(oracle, rule, begin.steps, start=begin.point, state=begin.state, batch=begin.batch, keep=keep)
