"""How a problem of the suite is written down: two formulas, a start, bounds, the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .lower_search import Formula
from .problem import Bounds, Problem

Numbers = Sequence[float]
Box = tuple[float | Numbers, float | Numbers]


@dataclass(frozen=True)
class Definition:
    """A problem as its source states it; :meth:`build` makes fresh variables and closures.

    Attributes:
        name: Short, with the source's number.
        source: Where it was published, or ``"ours"``.
        tags: See :func:`bilevel.problems.tags`.
        upper_loss: F of the values x and y, along their first dimension.
        lower_loss: G of the same.
        start: x and y at the start.
        best: The smallest F at a lower optimal pair.
        solution: x and y there; None: infinitely many, or not needed.
        upper_box: Lower and upper bounds of x, for all entries or one each.
        lower_box: The same of y.
        lower_value: ``min_y G`` of x, where it is known.
    """

    name: str
    source: str
    tags: str
    upper_loss: Formula
    lower_loss: Formula
    start: tuple[Numbers, Numbers]
    best: float
    solution: tuple[Numbers, Numbers] | None = None
    upper_box: Box | None = None
    lower_box: Box | None = None
    lower_value: Callable[[Tensor], float] | None = None

    def build(self, dtype: torch.dtype = torch.float64) -> Problem:
        """Return the problem with fresh variables at the start."""
        x = torch.tensor(self.start[0], dtype=dtype, requires_grad=True)
        y = torch.tensor(self.start[1], dtype=dtype, requires_grad=True)
        x_star, y_star = self.solution or (None, None)
        return Problem(
            upper=x,
            lower=y,
            upper_loss=lambda: self.upper_loss(x, y),
            lower_loss=lambda: self.lower_loss(x, y),
            learning_rate=0.05,
            upper_solution=None if x_star is None else torch.tensor(x_star, dtype=dtype),
            lower_solution=None if y_star is None else torch.tensor(y_star, dtype=dtype),
            upper_box=_box(self.upper_box, x),
            lower_box=_box(self.lower_box, y),
            name=self.name,
            source=self.source,
            tags=frozenset(self.tags.split()),
            best=self.best,
            formulas=(self.upper_loss, self.lower_loss),
            lower_value=self.lower_value,
        )


def _box(box: Box | None, variable: Tensor) -> Bounds | None:
    if box is None:
        return None
    low, high = (torch.as_tensor(side, dtype=variable.dtype).expand_as(variable).clone() for side in box)
    return low, high


UNIT: Box = (-1.0, 1.0)
NONNEGATIVE: Box = (0.0, inf)
