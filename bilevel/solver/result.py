"""What ``minimize`` answers with."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

Values = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Record:
    """What was known at one moment of a search.

    Attributes:
        evaluations: Calls of both losses so far.
        upper_value: F at the best pair so far; infinite: none was found yet.
        lower_value: G there.
        what: What had just been done.

    Example:
        >>> from bilevel.solver import Record
        >>> Record(evaluations=120, upper_value=0.5, lower_value=0.0, what="descent from the start").upper_value
        0.5
    """

    evaluations: int
    upper_value: float
    lower_value: float
    what: str


@dataclass(frozen=True)
class Result:
    """The pair that :func:`bilevel.minimize` found, and how.

    Attributes:
        upper: Value of the upper variable; by name if there are several, or they were given as a module.
        lower: The same of the lower variables, trained again for these upper ones.
        upper_value: F there.
        lower_value: G there.
        method: The class that found it, or ``"auto"``.
        evaluations: Calls of the two losses: each is at most one gradient, or one product with a second derivative.
        success: Whether the lower variables stood the test: descents on G from further starts found nothing lower.
        message: Why the search ended.
        history: What was known when, from the start to the end.
        reasons: What was decided on the way, and why.

    Example:
        >>> import bilevel, torch
        >>> x, y = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> result = bilevel.minimize(lambda: ((y - 1) ** 2 + x**2).sum(), lambda: ((y - x) ** 2).sum(), x, y)
        >>> print(f"{result.upper.item():.3f} {result.upper_value:.3f} {result.success}")
        0.500 0.500 True
    """

    upper: Values
    lower: Values
    upper_value: float
    lower_value: float
    method: str
    evaluations: int
    success: bool
    message: str
    history: list[Record] = field(repr=False)
    reasons: list[str] = field(repr=False)
