"""A kept walk in segments: no graph reaches over processes, so each step keeps its own, and means lie between them.

Going back, each segment is one pass through what this process kept, averaged before the next one: the numbers of one
graph over the joined batch, at the memory of this process's part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..lower_steps import Rule, State
from ..processes.joined import Share, averaged
from ..vectors import Tensors, Vector
from .adjoint import through_hyperparameters, transposed
from .graph import KeptGraph, leaves, twice
from .start import through_start
from .trajectory import Step


class KeptSegments(KeptGraph):
    """As :class:`KeptGraph`, of several processes."""

    def __init__(self, oracle: Oracle, rule: Rule, start: Sequence[Tensor], state: State, *, chained: bool) -> None:
        super().__init__(oracle, rule, leaves(start), state, chained=chained)
        self._start = list(start) if chained else None
        self._segments: list[tuple[Step, list[Tensor], Tensors]] = []

    def follow(self, point: Vector, state: State) -> None:
        """Take over the values of a real step, and the state of its rule."""
        self._point = leaves(point)
        self._state = [{name: s.detach().clone() for name, s in entry.items()} for entry in state]

    def _advance(self, batch: int, gradient: Tensors, here: Evaluation) -> None:
        """Keep the gradient with its graph, and step along the mean of all processes."""
        w = self._point
        point = Vector([x.detach() for x in w], self._oracle.lower_level.names)
        self._segments.append((Step(batch, point, here.lower, self._state), w, gradient))
        with torch.no_grad():
            moved, self._state = self._rule.step(point, here.lower, self._state)
        self._point = leaves(moved)

    def _total(self, upper: Vector, end: Vector) -> Vector:
        """Go back through the segments, last to first: the adjoint of the walk, without a second evaluation."""
        total, point_bar = upper, end
        state_bar: list[dict[str, Tensor]] | None = None
        rule_bar = Vector([None] * len(self._rule.hyperparameters))
        for step, w, gradient in reversed(self._segments):
            point = point_bar.like(x.detach() for x in w)
            bars = transposed(self._rule, step, point, point_bar, state_bar)
            state_bar, rule_bar = bars.state, rule_bar + bars.hyperparameters
            mixed, hessian = self._back(w, gradient, bars.gradient)
            total, point_bar = total + mixed, bars.point + hessian
        total = total + through_hyperparameters(self._rule, self._oracle.upper_level, rule_bar)
        if self._start is not None:
            total = total + through_start(self._start, self._oracle.upper_level.tensors, point_bar)
        return total

    def _back(self, w: list[Tensor], gradient: Tensors, bar: Vector) -> tuple[Vector, Vector]:
        """The mean over the processes of one pass back through the gradient of a step."""
        upper, lower = self._oracle.upper_level, self._oracle.lower_level
        size = len(upper.tensors)

        def share() -> Share:
            pairs = [(g, v) for g, v in zip(gradient, bar, strict=True) if g is not None and v is not None]
            pairs = [(g, v) for g, v in pairs if g.requires_grad]
            if not pairs:
                return Share((), [None] * (size + len(w)))
            outputs, weights = zip(*pairs, strict=True)
            with twice():
                return Share(
                    (), torch.autograd.grad(outputs, [*upper.tensors, *w], grad_outputs=weights, allow_unused=True)
                )

        mean = averaged(f"{self._oracle.owner}: back through a kept step", share, [*upper.tensors, *lower.tensors])
        return Vector(mean.vector[:size], upper.names), Vector(mean.vector[size:], lower.names)
