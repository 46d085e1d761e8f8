"""Both losses by plain autograd: the closure as it stands, and no shortcut.

The values are put into the variables themselves, every variable requires its gradient, gradients are
``torch.autograd.grad`` and products are double backward. It costs what it costs; ``check_directions`` takes it for the
truth about a closure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.evaluations import Evaluation, Key, Part, Point, Wrt
from ..evaluation.oracle import Oracle
from ..evaluation.substitution import plain_attention
from ..hypergradient import Step, copied, through_hyperparameters, transposed
from ..hypergradient.modes import NoDoubleBackward, refuse_wrong_rules
from ..lower_steps import Rule, constant
from ..microbatches import Sum
from ..processes.joined import Share, averaged
from ..vectors import Tensors, Vector, add_scaled, exchange, present
from .constants import constants_of_a_loss

Product = tuple[Vector, Vector]
Buffers = list[tuple[Tensor, Tensor]]


class NoReference(Exception):
    """Plain autograd has no second derivative here; the message is the reason."""


class Precision:
    """How well the losses can be compared: the coarsest floating-point type that they were seen to compute in, and how
    far apart two calls at one point are, relative to their value.
    """

    def __init__(self) -> None:
        self.dtype = torch.float64
        self.noise = 0.0

    @property
    def unit(self) -> float:
        return torch.finfo(self.dtype).eps

    def repeated(self, value: float, again: float) -> None:
        self.noise = max(self.noise, abs(value - again) / max(abs(value), 1e-300))

    def note(self, value: Tensor) -> None:
        """Search the graph of a loss for what was computed in less than float64."""
        seen: set[Any] = set()
        stack: list[Any] = [value.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            for entry in getattr(node, "_input_metadata", ()):
                if entry.dtype.is_floating_point and torch.finfo(entry.dtype).eps > self.unit:
                    self.dtype = entry.dtype
            stack.extend(parent for parent, _ in node.next_functions)


class PlainOracle(Oracle):
    """An oracle that answers by plain autograd of the closures as they stand, and by nothing else."""

    plain = True

    def _evaluate(self, key: Key, at: Point | None, wrt: Wrt) -> Evaluation:
        return self._evaluate_as(key, at, "both")


class Plain:
    """F and G around a look, with the random states, buffers and held values that the look replays."""

    def __init__(self, oracle: Oracle, precision: Precision | None = None) -> None:
        self._oracle = oracle
        self._precision = precision
        self._noted: set[str] = set()
        self._before: dict[int, Buffers] = {}  # by real step: the buffers it was taken with
        self.upper_level = oracle.upper_level
        self.lower_level = oracle.lower_level

    def point(self) -> Vector:
        """Return copies of the current lower variables."""
        return self._oracle.point().clone()

    def upper(self, at: Tensors | None = None) -> Evaluation:
        """F and both its gradients."""
        return self._differentiated(self._oracle._key("upper", 0), at)

    def lower(self, at: Tensors | None = None, *, batch: int = 0) -> Evaluation:
        """G on a lower batch, and both its gradients."""
        return self._differentiated(self._oracle._key("lower", batch), at, trains=True)

    def upper_value(self, at: Tensors | None = None) -> Tensor:
        return self._value(self._oracle._key("upper", 0), at)

    def lower_value(self, at: Tensors | None = None, *, batch: int = 0) -> Tensor:
        return self._value(self._oracle._key("lower", batch), at)

    def product(
        self, direction: Tensors, *, batch: int = 0, at: Tensors | None = None, buffers: Buffers | None = None
    ) -> Product:
        """Return ``(G_aw v, G_ww v)``, by double backward; ``buffers``: what the modules hold meanwhile.

        Raises:
            NoReference: There is no second derivative, or torch's is known to be wrong.
        """
        variables = [*self.upper_level.tensors, *self.lower_level.tensors]

        def share() -> Share:
            total = Sum()
            for part, weight in self._oracle._parts(self._oracle._key("lower", batch)):
                total.add(weight, self._product_here(part, direction, at, buffers))
            return Share((), total.total)

        return self._vectors(averaged("a plain product", share, variables).vector)

    def _product_here(self, part: Part, direction: Tensors, at: Tensors | None, buffers: Buffers | None) -> Tensors:
        """The product of this process's loss on one micro-batch."""
        upper, lower = self.upper_level.tensors, self.lower_level.tensors
        nothing: Tensors = [None] * (len(upper) + len(lower))
        with plain_attention(), self._called(part, at, buffers=buffers) as value:
            if not value.requires_grad:
                return nothing
            try:
                gradients = torch.autograd.grad(value, lower, create_graph=True, allow_unused=True)
                pairs = [(g, v) for g, v in zip(gradients, direction, strict=True) if g is not None and v is not None]
                pairs = [(g, v.to(g.dtype)) for g, v in pairs if g.requires_grad]
                if not pairs:
                    return nothing
                refuse_wrong_rules([value, *(g for g, _ in pairs)])
                outputs, weights = zip(*pairs, strict=True)
                return torch.autograd.grad(outputs, [*upper, *lower], grad_outputs=weights, allow_unused=True)
            except (RuntimeError, NoDoubleBackward) as error:
                raise NoReference(str(error).partition("\n")[0]) from error

    def walk(self, rule: Rule, count: int, *, start: Tensors | None = None) -> tuple[Vector, list[Step]]:
        """Take ``count`` virtual lower steps from the current point, or from ``start``; return the end, and the
        steps.
        """
        point = self.point() if start is None else self.point().like(start)
        rule = constant(rule)
        state, steps = rule.start(), []
        for index in range(count):
            at = None if index == 0 and start is None else point
            gradient = self.lower(at, batch=index).lower
            steps.append(Step(index, at, gradient, state))
            moved, state = rule.step(point, gradient, state)
            point = point.like(moved)
        return point.clone(), steps

    def train(self, count: int, rule: Callable[[], Rule]) -> list[Step]:
        """Take ``count`` real lower steps; return them, with the state of the ``rule`` that is differentiated."""
        steps = []
        for index in range(count):
            point = self.point()
            state = copied(rule)
            self._before[index] = [(b, b.detach().clone()) for module in self._modules() for b in module.buffers()]
            gradient = self.lower(batch=index).lower
            steps.append(Step(index, point, gradient, state))
            self._oracle.train(gradient.clone())
        return steps

    def adjoint(self, rule: Rule, steps: Sequence[Step], cotangent: Tensors, *, as_trained: bool = False) -> Product:
        """Pull ``dh/dw_k`` back through ``steps``; return ``(dh/dalpha, dh/dw_0)``: one double backward a step.

        ``as_trained``: with the buffers that each real step was taken with, which only the graph of the walk knows;
        else with those of the batch's first evaluation, as wherever the library evaluates a batch again.
        """
        upper, _ = self._vectors([None] * (len(self.upper_level.tensors) + len(self.lower_level.tensors)))
        point_bar = self.point().like(cotangent)
        state_bar: list[dict[str, Tensor]] | None = None
        rule_bar = Vector([None] * len(rule.hyperparameters))
        for step in reversed(steps):
            point = self.point() if step.point is None else step.point
            bars = transposed(rule, step, point, point_bar, state_bar)
            state_bar, rule_bar = bars.state, rule_bar + bars.hyperparameters
            buffers = self._before.get(step.batch) if as_trained else None
            mixed, hessian = self.product(bars.gradient, batch=step.batch, at=step.point, buffers=buffers)
            upper, point_bar = upper + mixed, bars.point + hessian
        return upper + through_hyperparameters(rule, self.upper_level, rule_bar), point_bar

    @contextmanager
    def shifted(self, size: float, upper: Tensors, lower: Tensors) -> Iterator[None]:
        """Move both levels by ``size`` along a direction for the duration."""
        tensors = [*self.upper_level.tensors, *self.lower_level.tensors]
        moved = [x.clone() for x in add_scaled([t.detach() for t in tensors], size, [*upper, *lower]) if x is not None]
        exchange(tensors, moved)
        try:
            yield
        finally:
            exchange(tensors, moved)

    @contextmanager
    def _called(
        self, part: Part, at: Tensors | None, trains: bool = False, buffers: Buffers | None = None
    ) -> Iterator[Tensor]:
        loss, batch = self._oracle._called(part)
        own = self.lower_level.tensors
        values = (
            None if at is None else [x.detach().clone() for x in present(at)]
        )  # the exchange must not reach the caller's
        replayed = self._oracle.replay.evaluation(part, current=at is None, trains=trains)
        with replayed, torch.enable_grad():
            torch.clear_autocast_cache()
            for buffer, value in buffers or ():
                buffer.data.copy_(value)
            if values is not None:
                exchange(own, values)
            try:
                with constants_of_a_loss():
                    value, _ = loss(batch, self._oracle._devices)
                if self._precision is not None and loss.name not in self._noted:
                    self._noted.add(loss.name)
                    self._precision.note(value)
                yield value
            finally:
                if values is not None:
                    exchange(own, values)
                torch.clear_autocast_cache()

    def _modules(self) -> list[nn.Module]:
        return [module for module, _ in self._oracle._evaluator.modules]

    def _value(self, key: Key, at: Tensors | None) -> Tensor:
        def share() -> Share:
            total = Sum()
            for part, weight in self._together(key):
                with self._called(part, at) as value:
                    total.add(weight, [value.detach().clone()])  # a loss may be a view of a variable, F = w[0]
                del value
            return Share(present(total.total))

        return averaged("a plain value", share).numbers[0]

    def _differentiated(self, key: Key, at: Tensors | None, *, trains: bool = False) -> Evaluation:
        variables = [*self.upper_level.tensors, *self.lower_level.tensors]

        def share() -> Share:
            total, found = Sum(), [None] * len(variables)
            for part, weight in self._together(key):
                with self._called(part, at, trains) as value:
                    gradients: Tensors = found
                    if value.requires_grad:
                        gradients = torch.autograd.grad(value, variables, allow_unused=True)
                    total.add(weight, [value.detach().clone(), *gradients])
                del value
            here, *mean = total.total
            return Share(present([here]), mean)

        mean = averaged("plain autograd", share, variables)
        return Evaluation(mean.numbers[0], *self._vectors(mean.vector))

    def _together(self, key: Key) -> Iterator[tuple[Part, float]]:
        """The micro-batches of a batch, which move buffers together."""
        parts = self._oracle._parts(key)
        with self._oracle.replay.together([weight for _, weight in parts]):
            yield from parts

    def _vectors(self, both: Tensors) -> Product:
        size = len(self.upper_level.tensors)
        return Vector(both[:size], self.upper_level.names), Vector(both[size:], self.lower_level.names)
