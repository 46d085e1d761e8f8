"""What penalty methods share: the schedule of the penalty, the count of steps, and their stats."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from torch import Tensor

from ..directions import Stats
from ..optimizer.base import BilevelOptimizer, Common
from ..penalty import Scheduled, scheduled, value_at
from ..settings import Setting
from ..vectors import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class PenaltyStats(Stats):
    """The numbers of one step of a penalty method.

    Attributes:
        penalty: The penalty of this step, from its schedule.
        constraint: What is penalised, as the method measures it: how far G is above its (estimated) minimum, or
            ``|grad_w G|^2 / 2``; float64. One that does not fall as the penalty grows means that the lower level is not
            solved: take more inner steps, or smaller ones.
        chosen: With several ``starts``, which end w moved to; 0: it stayed. Else None.

    Example:
        >>> import torch, bilevel
        >>> one = torch.tensor(1.0)
        >>> bilevel.PenaltyStats(one, one, penalty=10.0, constraint=0.5 * one).as_dict()["penalty"]
        10.0
    """

    penalty: float
    constraint: Tensor
    chosen: Tensor | None = None


if TYPE_CHECKING:
    import typing_extensions  # as in bilevel/directions.py

    P = typing_extensions.TypeVar("P", bound=Stats, default=PenaltyStats)
else:
    P = TypeVar("P", bound=Stats)


class PenaltyMethod(BilevelOptimizer[P], ABC):
    """A method with a ``penalty``, a number or a schedule, which it looks up by its count of steps."""

    penalty = Setting[Scheduled](scheduled(0.0))

    def __init__(self, *losses: Any, penalty: Scheduled, **common: Unpack[Common]) -> None:
        self.penalty = penalty
        super().__init__(*losses, **common)
        self._steps = self.scalar_state("steps")

    def scheduled(self, value: Scheduled) -> float:
        """Return a scheduled number of the current step."""
        return value_at(value, self._steps.value)

    def stepped(self) -> Mapping[str, int]:
        """Return the count of steps as it will be after this one, for ``Directions.state``."""
        return {"steps": self._steps.value + 1}


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a - b`` in the accumulation dtype: values of G that are close cancel in float32."""
    wide = accumulation_dtype(a.device)
    return a.to(wide) - b.to(wide)
