r"""Several lower starts: copies of the lower variables that walk on G from points of their own.

With ``starts=n`` a method keeps n copies :math:`y_1 \dots y_n`, of which the first is the one it has anyway. In each
step all walk on G. The lowest of their ends estimates :math:`\min_w G`; and w itself moves to the end whose penalised
value

.. math:: F(y_j) + \lambda\, (G(y_j) - \min_i G(y_i))

is smaller than its own, with the :math:`\lambda` of the step: out of a lower minimum that is not the global one, and of
several global ones to that which is best for F (the optimistic choice). Nothing is read back from the device for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import count
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..vectors import Vector, accumulation_dtype

if TYPE_CHECKING:
    from ..optimizer.base import BilevelOptimizer

Walk = Callable[[Vector], Vector]


@dataclass(frozen=True)
class Found:
    """Where the copies ended.

    Attributes:
        ends: The ends of their walks, the first one that of the method itself.
        lowest: G at the lowest end.
        bound: The same with what it is regularised by, if it is: that is what the ends are compared by.
        gradient: Its gradient in the upper variables there.
        upper_values: F at each end.
        lower_values: G at each end.
    """

    ends: list[Vector]
    lowest: Tensor
    bound: Tensor
    gradient: Vector
    upper_values: list[Tensor]
    lower_values: list[Tensor]

    def better(self, oracle: Oracle, f: Evaluation, g: Evaluation, weight: Tensor | float) -> tuple[Vector, Tensor]:
        """Return the point with the smallest penalised value among w and the ends, and which it is: 0 for w."""
        wide = accumulation_dtype(g.value.device)

        def value(upper: Tensor, lower: Tensor) -> Tensor:
            here = upper.to(g.value.device, wide, non_blocking=True)
            return here + weight * (lower.to(wide) - self.lowest.to(wide))

        ends = zip(self.upper_values, self.lower_values, strict=True)
        return self.best(oracle, [value(f.value, g.value), *(value(upper, lower) for upper, lower in ends)])

    def best(self, oracle: Oracle, values: Sequence[Tensor]) -> tuple[Vector, Tensor]:
        """Return the point with the smallest value, and which it is; the values are of w (0) and of the ends."""
        chosen = _smallest(values)
        # Copies: the point of w is the parameters' own memory, which the step will write into.
        return _picked(chosen, [oracle.point(), *self.ends]), chosen


class Starts:
    """The copies beside the first one, as state of a method.

    Args:
        method: Whose state they are.
        starts: How many copies there are, the first one included.
        spread: How far, as a standard deviation, the others begin from w.
    """

    def __init__(self, method: BilevelOptimizer[Any], starts: int, spread: Callable[[], float]) -> None:
        self._method, self._spread = method, spread
        self._copies = [method.lower_state(f"start[{i}]", start="variables") for i in range(1, starts)]

    def walked(self, oracle: Oracle, first: Vector, walk: Walk) -> Found:
        """Let all copies walk, and look at both losses where they end."""
        return look(oracle, [first, *self.others(walk)])

    def others(self, walk: Walk) -> list[Vector]:
        """Let the copies beside the first one walk."""
        return [walk(self._begin(i)) for i in range(len(self._copies))]

    def state(self, found: Found) -> dict[str, Vector]:
        """What is remembered of the copies."""
        return {copy.name: end for copy, end in zip(self._copies, found.ends[1:], strict=True)}

    def _begin(self, index: int) -> Vector:
        """Where a copy goes on; at first a point around w, drawn from a generator of its own."""
        copy = self._copies[index]
        value = copy.value
        if copy.known:
            return value
        generator = torch.Generator().manual_seed(index)
        scale = self._spread()
        noisy = [
            None if x is None else x + scale * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            for x in value
        ]
        projected = self._method.lower_set.project([x for x in noisy if x is not None])
        given = iter(projected)
        return value.like(None if x is None else next(given).detach() for x in noisy)


def look(
    oracle: Oracle, ends: list[Vector], upper_batch: int = 0, regular: Callable[[Vector], Tensor] | None = None
) -> Found:
    """Look at both losses at the ends; ``regular``: what is added to G there, of the lower variables alone."""
    g = [oracle.lower(end, wrt="upper") for end in ends]
    f = [oracle.upper(end, batch=upper_batch, wrt="upper").value for end in ends]
    values = [at.value for at in g]
    if regular is not None:
        values = [value + regular(end).to(value.device) for value, end in zip(values, ends, strict=True)]
    chosen = _smallest(values)
    lowest, bound = (torch.stack(of).index_select(0, chosen.view(1))[0] for of in ([at.value for at in g], values))
    return Found(ends, lowest, bound, _picked(chosen, [at.upper for at in g]), f, [at.value for at in g])


def check_starts(owner: str, starts: int) -> None:
    """Refuse a number of starts that is none."""
    count(owner, "starts", starts, minimum=1)


def _smallest(values: Sequence[Tensor]) -> Tensor:
    """The place of the smallest value, as a tensor; what is not a number is not it."""
    return torch.stack([torch.nan_to_num(v.detach(), nan=torch.inf) for v in values]).argmin()


def _picked(chosen: Tensor, vectors: Sequence[Vector]) -> Vector:
    """One of several vectors, by a number that stays on its device."""
    parts: list[Tensor | None] = []
    for entries in zip(*vectors, strict=True):
        known = [x for x in entries if x is not None]
        if len(known) < len(entries):
            parts.append(None)
            continue
        stacked = torch.stack(known)
        parts.append(stacked.index_select(0, chosen.view(1).to(stacked.device, non_blocking=True))[0])
    return vectors[0].like(parts)
