"""Lower steps whose graph is kept: one reverse pass at the end, at the memory of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..closures import Loss, leaves_of
from ..descent import Point, Rule, State
from ..errors import ClosureError
from ..evaluator import Evaluation, Look
from ..routes import refuse_wrong_rules, two_derivatives
from ..variables import Level
from ..vectors import Vector

FIRST_ORDER = 'Use mode="adjoint" with product="difference", or a first-order method such as BOME or FiniteDifference.'
RECOMPUTED = (
    'A loss uses checkpointing, or other hooks on saved tensors, which mode="graph" cannot keep: what they recompute '
    'would be of other values. Use mode="adjoint", whose memory does not grow with inner_steps.'
)


class KeptGraph:
    """A walk of lower steps as one graph: its current point depends on the upper variables.

    Args:
        look: Where the losses are evaluated.
        rule: The lower step.
        start: The first point; leaves, or a function of the upper variables.
        state: The state of ``rule`` before the first step.
        chained: Whether ``start`` depends on the upper variables.
    """

    def __init__(self, look: Look, rule: Rule, start: Sequence[Tensor], state: State, *, chained: bool) -> None:
        self._look, self._rule, self._chained = look, rule, chained
        self._point, self._state = list(start), state
        self._first = True

    def step(self, index: int, *, current: bool = False, trains: bool = False) -> Evaluation:
        """Take a step on lower batch ``index``; return G before it. The flags are those of :meth:`Look.lower_graph`."""
        w = self._point
        with torch.enable_grad(), _hooks_refused():
            with (
                self._look.lower_graph(index, substitute=w, current=current, trains=trains) as (value, aux),
                two_derivatives(FIRST_ORDER),
            ):
                gradient = torch.autograd.grad(value, w, create_graph=True, allow_unused=True)
            if self._first and self._look.checking:  # where the graph begins; later steps hold the earlier ones
                self._check(value, gradient)
            self._first = False
            self._point, self._state = self._rule.step(w, gradient, self._state)
        return Evaluation(value.detach(), [], [None if g is None else g.detach() for g in gradient], aux)

    def follow(self, point: Point, state: State) -> None:
        """Take over the values of a real step, which hooks may have moved elsewhere; no derivative knows of them."""
        with torch.enable_grad():
            self._point = [_valued(x, value) for x, value in zip(self._point, point, strict=True)]
            self._state = [
                {name: _valued(s, real.get(name, s)) for name, s in entry.items()}
                for entry, real in zip(self._state, state, strict=True)
            ]

    def finish(self, *, real: bool = False) -> tuple[Evaluation, Vector]:
        """Evaluate F at the end; return it there, and its derivative through the whole walk.

        ``real`` says that the end is the current point, so that F may move buffers.
        """
        loss, upper = self._look.upper_loss, self._look.upper_level.tensors
        with torch.enable_grad(), _hooks_refused():
            graph = self._look.upper_graph(substitute=self._point, current=real)
            with graph as (value, aux), two_derivatives(FIRST_ORDER):
                if self._look.checking:
                    self._refuse_unreached(loss, value)
                found = torch.autograd.grad(value, [*upper, *self._point], allow_unused=True)
        loss.check_use("lower", found[len(upper) :])
        return Evaluation(value.detach(), [None] * len(upper), found[len(upper) :], aux), found[: len(upper)]

    def _check(self, value: Tensor, gradient: Vector) -> None:
        """Check what evaluations and products check in adjoint mode."""
        loss = self._look.lower_loss
        self._refuse_unreached(loss, value)
        loss.check_use("lower", gradient)
        if not self._chained and not leaves_of(value, _names(self._look.upper_level)):
            loss.check_use("upper", [])
        with two_derivatives(FIRST_ORDER):
            refuse_wrong_rules([value, *(g for g in gradient if g is not None)])

    def _refuse_unreached(self, loss: Loss, value: Tensor) -> None:
        missed = leaves_of(value, _names(self._look.lower_level), beyond=self._point)
        if missed:
            raise ClosureError(
                f"{loss.name} reads {', '.join(missed)} other than from a module given as lower=, where no substitute "
                'reaches it. Read the module\'s attribute inside the loss, or use mode="adjoint".'
            )


def leaves(point: Point) -> list[Tensor]:
    """Return copies of a point from which a graph can begin."""
    return [x.detach().clone().requires_grad_() for x in point]


def _valued(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, with the derivative of ``x``."""
    return x - x.detach() + value.detach() if x.requires_grad else value.detach().clone()


def _names(level: Level) -> dict[int, str]:
    return dict(zip(map(id, level.tensors), level.names, strict=True))


@contextmanager
def _hooks_refused() -> Iterator[None]:
    """Refuse checkpointing: recomputed at the end, a step would read the variables and not what was substituted."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTED):
            yield
    except RuntimeError as error:
        if RECOMPUTED not in str(error):
            raise
        raise ClosureError(RECOMPUTED) from error
