"""What a search sees of two losses: their values and gradients at any pair, with every call counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..directions import Directions, Stats
from ..evaluation.oracle import Oracle
from ..levels import Variables
from ..optimizer.base import BilevelOptimizer
from ..projection import Projections
from ..vectors import Vector
from .budget import Budget
from .sets import Space

A = TypeVar("A")


class Here:
    """The two losses at one upper point: F and G as functions of a flat y, each with both gradients."""

    def __init__(self, oracle: Oracle, upper: Space, lower: Space) -> None:
        self._oracle, self._upper, self._lower = oracle, upper, lower

    def upper_loss(self, y: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return F, its gradient in x, its gradient in y."""
        at = self._oracle.upper(self._lower.shaped(y))
        return float(at.value), self._upper.flat(at.upper), self._lower.flat(at.lower)

    def lower_loss(self, y: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return G and its gradients likewise."""
        at = self._oracle.lower(self._lower.shaped(y))
        return float(at.value), self._upper.flat(at.upper), self._lower.flat(at.lower)


class Look(BilevelOptimizer[Stats]):
    """A method that moves nothing: it asks its oracle whatever it is told to."""

    question: Callable[[Oracle], Any]

    def compute(self, oracle: Oracle) -> Directions[Stats]:
        self.answer = self.question(oracle)
        nothing = Vector([None] * len(self.upper_names), self.upper_names)
        zero = torch.zeros(())
        return Directions(upper=nothing, stats=Stats(upper_loss=zero, lower_loss=zero))


class Landscape:
    """Two losses over two flat vectors x and y.

    Args:
        upper_loss: F, without a batch, counted.
        lower_loss: G likewise.
        upper: The upper variables.
        lower: The lower variables.
        upper_projection: Where they stay.
        lower_projection: The same.
        budget: Who counts.
    """

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        upper: Variables,
        lower: Variables,
        upper_projection: Projections | None,
        lower_projection: Projections | None,
        budget: Budget,
    ) -> None:
        self.losses, self.budget = (upper_loss, lower_loss), budget
        self.common: dict[str, Any] = {
            "upper": upper,
            "lower": lower,
            "upper_projection": upper_projection,
            "lower_projection": lower_projection,
            "process_group": False,  # every process solves the whole problem, if several ask
        }
        self._look = Look(upper_loss, lower_loss, **self.common, **self.optimizers(), on_nonfinite="ignore")
        self.upper = Space(self._look.upper_level, self._look.upper_set)
        self.lower = Space(self._look.lower_level, self._look.lower_set)
        # One look at each loss away from the current point: the routes that are taken from now on are verified here.
        self._look.question = lambda oracle: (oracle.lower(oracle.point()), oracle.upper(oracle.point()))
        self._look.directions()
        self._look.verify = "never"

    def optimizers(self) -> dict[str, Any]:
        """Return torch optimizers for an optimizer class that never steps them."""
        return {
            "upper_optimizer": torch.optim.SGD(tensors_of(self.common["upper"]), lr=1.0),
            "lower_optimizer": torch.optim.SGD(tensors_of(self.common["lower"]), lr=1.0),
        }

    def at(self, x: Tensor, question: Callable[[Here], A]) -> A:
        """Answer a question at an upper point, which is written into the upper variables."""
        self.upper.put(x)
        self._look.question = lambda oracle: question(Here(oracle, self.upper, self.lower))
        self._look.directions()
        answer: A = self._look.answer
        return answer


def tensors_of(variables: Any) -> list[Tensor]:
    """The trainable tensors of whatever a level may be given as."""
    if isinstance(variables, Tensor):
        return [variables]
    if isinstance(variables, torch.nn.Module):
        return [p for p in variables.parameters() if p.requires_grad]
    if isinstance(variables, tuple) and len(variables) == 2 and isinstance(variables[0], str):
        return tensors_of(variables[1])
    return [tensor for item in variables for tensor in tensors_of(item)]
