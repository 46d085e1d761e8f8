"""Schedules: numbers that a method changes from step to step, such as the weight of a penalty.

A schedule is a value: it maps the number of a step to a number. Wherever a method takes one, it takes a plain number as
well, which stays. The count of steps is part of the method's state, so that a run that is resumed goes on where it was.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from .errors import message, number
from .settings import Check


class Schedule(ABC):
    """A number for each step. Subclass it and write ``__call__`` for a schedule of your own.

    Example:
        >>> from bilevel.penalty import Schedule
        >>> class Halving(Schedule):
        ...     def __call__(self, step):
        ...         return 0.5**step
        >>> Halving()(2)
        0.25
    """

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the number for a step; the first one is step 0."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The same number in every step, as a plain number would be.

    Args:
        value: The number, >= 0.

    Raises:
        TypeError, ValueError: ``value`` is not a finite number >= 0.

    Example:
        >>> import bilevel
        >>> bilevel.penalty.Constant(2.0)(100)
        2.0
    """

    value: float

    def __post_init__(self) -> None:
        number(type(self).__name__, "value", self.value, minimum=0.0)

    def __call__(self, step: int) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Linear(Schedule):
    """``start + slope k``, at most ``maximum``: V-PBGD's code, and F2SA with differences of one size.

    Args:
        start: The number of the first step, >= 0.
        slope: What each step adds, >= 0.
        maximum: The largest number, >= ``start``; None: it grows without bound.

    Raises:
        TypeError, ValueError: An argument is not such a number.

    Example:
        >>> import bilevel
        >>> schedule = bilevel.penalty.Linear(0.0, slope=0.5, maximum=2.0)
        >>> [schedule(k) for k in (0, 1, 10)]
        [0.0, 0.5, 2.0]
    """

    start: float
    slope: float
    maximum: float | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        number(owner, "start", self.start, minimum=0.0)
        number(owner, "slope", self.slope, minimum=0.0)
        if self.maximum is not None:
            number(owner, "maximum", self.maximum, minimum=self.start)

    def __call__(self, step: int) -> float:
        value = self.start + self.slope * step
        return value if self.maximum is None else min(value, self.maximum)


@dataclass(frozen=True)
class Power(Schedule):
    """``start (k + 1)^exponent``: the penalty of MEHA (exponent below 1/2), the regularisation of BVFSM (negative).

    Args:
        start: The number of the first step, >= 0.
        exponent: How it grows, or falls if it is negative.

    Raises:
        TypeError, ValueError: An argument is not a finite number, or ``start`` is negative.

    Example:
        >>> import bilevel
        >>> bilevel.penalty.Power(2.0, 0.5)(3)
        4.0
    """

    start: float
    exponent: float

    def __post_init__(self) -> None:
        number(type(self).__name__, "start", self.start, minimum=0.0)
        number(type(self).__name__, "exponent", self.exponent, minimum=-math.inf)

    def __call__(self, step: int) -> float:
        return float(self.start * (step + 1) ** self.exponent)


@dataclass(frozen=True)
class Logarithmic(Schedule):
    """``start / log(base (k + 1))``: the slowest decay in BVFSM's code.

    Args:
        start: >= 0; the first step's number is ``start / log(base)``.
        base: > 1; default 1.1, as in that code.

    Raises:
        TypeError, ValueError: An argument is not such a number.

    Example:
        >>> import bilevel
        >>> print(f"{bilevel.penalty.Logarithmic(0.01)(0):.4f}")
        0.1049
    """

    start: float
    base: float = 1.1

    def __post_init__(self) -> None:
        number(type(self).__name__, "start", self.start, minimum=0.0)
        number(type(self).__name__, "base", self.base, minimum=1.0, exclusive=True)

    def __call__(self, step: int) -> float:
        return self.start / math.log(self.base * (step + 1))


Scheduled = float | Schedule


def value_at(scheduled: Scheduled, step: int) -> float:
    """Return the number of a step: a plain number is the same in each.

    Example:
        >>> from bilevel.penalty import Linear, value_at
        >>> value_at(3.0, 7), value_at(Linear(0.0, 1.0), 7)
        (3.0, 7.0)
    """
    return scheduled(step) if isinstance(scheduled, Schedule) else float(scheduled)


def scheduled(minimum: float, *, exclusive: bool = False) -> Check:
    """Check for a schedule or a number; the numbers of a schedule are its own business.

    Example:
        >>> from bilevel.penalty import scheduled
        >>> scheduled(0.0)("VPBGD", "penalty", 2.0)
    """

    def check(owner: str, argument: str, value: object) -> None:
        if isinstance(value, Schedule):
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            advice = "must be a number or a schedule, such as bilevel.penalty.Linear(0.0, slope=0.01, maximum=10.0)."
            raise TypeError(message(owner, argument, value, advice))
        number(owner, argument, value, minimum=minimum, exclusive=exclusive)

    return check
