"""The order in which a step moves: how what a method computed becomes moves of the two levels.

Real lower steps that a method takes while it computes (``oracle.train``) are part of every order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

from ..directions import Directions, T
from ..evaluation.oracle import Oracle
from .moves import Moves, SkippedStep

Compute = Callable[[Oracle], Directions[T]]


class Order(ABC):
    """How one step moves both levels."""

    @abstractmethod
    def step(self, compute: Compute[T], oracle: Oracle, moves: Moves) -> T:
        """Compute, move, and return the stats."""


class AtOnce(Order):
    """Both levels move at once along their directions: barrier and penalty methods."""

    def step(self, compute: Compute[T], oracle: Oracle, moves: Moves) -> T:
        return moves.apply(compute(oracle))


class TrainThenCorrect(Order):
    """The method really trains the lower level while it computes, and answers with an upper direction: ``EMLC``,
    ``Implicit``. If the upper move fails, the whole step is taken back.
    """

    def step(self, compute: Compute[T], oracle: Oracle, moves: Moves) -> T:
        return moves.apply(compute(oracle), several=True)


class LookThenTrain(Order):
    """The upper variables move first; then the lower ones take their ordinary step, with G at the new upper variables:
    ``Unrolled``, ``FiniteDifference``.
    """

    def step(self, compute: Compute[T], oracle: Oracle, moves: Moves) -> T:
        stats = moves.apply(compute(oracle), several=True)
        if stats.skipped:
            return stats
        g = oracle.lower(wrt="lower")
        try:
            oracle.train(g.lower)
        except SkippedStep:
            moves.undo()
            return replace(stats, upper_moved=not moves.undone, skipped=True)
        return stats


AT_ONCE = AtOnce()
TRAIN_THEN_CORRECT = TrainThenCorrect()
LOOK_THEN_TRAIN = LookThenTrain()
