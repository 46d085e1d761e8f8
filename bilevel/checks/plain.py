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

from ..evaluation.evaluations import Evaluation
from ..evaluation.losses import Loss
from ..evaluation.oracle import Oracle
from ..evaluation.substitution import plain_attention
from ..hypergradient import Step, pull_back
from ..hypergradient.modes import NoDoubleBackward, refuse_wrong_rules
from ..lower_steps import Point, Rule
from ..optimizer.apply import hand_over
from ..vectors import Vector, add_scaled, exchange
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


class Plain:
    """F and G around a look, with the random states, buffers and held values that the look replays."""

    def __init__(self, oracle: Oracle, precision: Precision | None = None) -> None:
        self._oracle = oracle
        self._precision = precision
        self._noted: set[str] = set()
        self._before: dict[int, Buffers] = {}  # by real step: the buffers it was taken with
        self.upper_level = oracle.upper_level
        self.lower_level = oracle.lower_level

    def point(self) -> list[Tensor]:
        """Return copies of the current lower variables."""
        return [tensor.detach().clone() for tensor in self.lower_level.tensors]

    def upper(self, at: Point | None = None) -> Evaluation:
        """F and both its gradients."""
        with self._upper(at) as value:
            return self._differentiated(value)

    def lower(self, index: int = 0, at: Point | None = None, *, trains: bool = False) -> Evaluation:
        """G on lower batch ``index``, and both its gradients; ``trains`` as in :meth:`Oracle.lower`."""
        with self._lower(index, at, trains) as value:
            return self._differentiated(value)

    def upper_value(self, at: Point | None = None) -> Tensor:
        with self._upper(at) as value:
            return value.detach().clone()  # a loss may be a view of a variable, F = w[0]

    def lower_value(self, index: int = 0, at: Point | None = None) -> Tensor:
        with self._lower(index, at) as value:
            return value.detach().clone()  # a loss may be a view of a variable, F = w[0]

    def product(
        self, index: int, direction: Vector, at: Point | None = None, buffers: Buffers | None = None
    ) -> Product:
        """Return ``(G_aw v, G_ww v)``, by double backward; ``buffers``: what the modules hold meanwhile.

        Raises:
            NoReference: There is no second derivative, or torch's is known to be wrong.
        """
        upper, lower = self.upper_level.tensors, self.lower_level.tensors
        with plain_attention(), self._lower(index, at, buffers=buffers) as value:
            try:
                gradients = torch.autograd.grad(value, lower, create_graph=True, allow_unused=True)
                pairs = [(g, v) for g, v in zip(gradients, direction, strict=True) if g is not None and v is not None]
                pairs = [(g, v.to(g.dtype)) for g, v in pairs if g.requires_grad]
                if not pairs:
                    return [None] * len(upper), [None] * len(lower)
                refuse_wrong_rules([value, *(g for g, _ in pairs)])
                outputs, weights = zip(*pairs, strict=True)
                found = torch.autograd.grad(outputs, [*upper, *lower], grad_outputs=weights, allow_unused=True)
            except (RuntimeError, NoDoubleBackward) as error:
                raise NoReference(str(error).partition("\n")[0]) from error
        return found[: len(upper)], found[len(upper) :]

    def walk(self, rule: Rule, count: int, *, start: Point | None = None) -> tuple[list[Tensor], list[Step]]:
        """Take ``count`` virtual lower steps from the current point, or from ``start``; return the end, and the
        steps.
        """
        point: Point = self.point() if start is None else start
        state, steps = rule.start(), []
        for index in range(count):
            at = None if index == 0 and start is None else point
            gradient = self.lower(index, at).lower
            steps.append(Step(index, at, gradient, state))
            point, state = rule.step(point, gradient, state)
        return [x.detach().clone() for x in point], steps

    def train(self, count: int, rule: Callable[[], Rule]) -> list[Step]:
        """Take ``count`` real lower steps; return them, with the state of the ``rule`` that is differentiated."""
        steps = []
        for index in range(count):
            point = self.point()
            state = [{name: s.clone() for name, s in entry.items()} for entry in rule().start()]
            self._before[index] = [(b, b.detach().clone()) for module in self._modules() for b in module.buffers()]
            gradient = self.lower(index, trains=True).lower
            steps.append(Step(index, point, gradient, state))
            hand_over(self.lower_level, [None if g is None else g.clone() for g in gradient])
        return steps

    def adjoint(self, rule: Rule, steps: Sequence[Step], cotangent: Vector, *, as_trained: bool = False) -> Product:
        """Pull ``dh/dw_k`` back through ``steps``; return ``(dh/dalpha, dh/dw_0)``: one double backward a step.

        ``as_trained``: with the buffers that each real step was taken with, which only the graph of the walk knows;
        else with those of the batch's first evaluation, as wherever the library evaluates a batch again.
        """
        upper: Vector = [None] * len(self.upper_level.tensors)
        point_bar: Vector = cotangent
        state_bar: list[dict[str, Tensor]] = [{} for _ in cotangent]
        for step in reversed(steps):
            point = self.point() if step.point is None else step.point
            through_point, gradient_bar, state_bar = pull_back(rule, step, point, point_bar, state_bar)
            mixed, hessian = self.product(
                step.index, gradient_bar, step.point, self._before.get(step.index) if as_trained else None
            )
            upper, point_bar = add_scaled(upper, 1.0, mixed), add_scaled(through_point, 1.0, hessian)
        return upper, point_bar

    @contextmanager
    def shifted(self, size: float, upper: Vector, lower: Vector) -> Iterator[None]:
        """Move both levels by ``size`` along a direction for the duration."""
        tensors = [*self.upper_level.tensors, *self.lower_level.tensors]
        moved = [x.clone() for x in add_scaled([t.detach() for t in tensors], size, [*upper, *lower]) if x is not None]
        exchange(tensors, moved)
        try:
            yield
        finally:
            exchange(tensors, moved)

    @contextmanager
    def _upper(self, at: Point | None) -> Iterator[Tensor]:
        oracle = self._oracle
        with self._called(oracle.upper_loss, "upper", oracle._upper_batch, at) as value:
            yield value

    @contextmanager
    def _lower(
        self, index: int, at: Point | None, trains: bool = False, buffers: Buffers | None = None
    ) -> Iterator[Tensor]:
        index, batch = self._oracle._lower_batch(index)
        with self._called(self._oracle.lower_loss, ("lower", index), batch, at, trains, buffers) as value:
            yield value

    @contextmanager
    def _called(
        self,
        loss: Loss,
        key: Any,
        batch: Any,
        at: Point | None,
        trains: bool = False,
        buffers: Buffers | None = None,
    ) -> Iterator[Tensor]:
        own = self.lower_level.tensors
        values = None if at is None else [x.detach().clone() for x in at]  # the exchange must not reach the caller's
        replayed = self._oracle.replay.evaluation(key, current=at is None, trains=trains)
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

    def _differentiated(self, value: Tensor) -> Evaluation:
        upper = self.upper_level.tensors
        found = torch.autograd.grad(value, [*upper, *self.lower_level.tensors], allow_unused=True)
        return Evaluation(value.detach().clone(), found[: len(upper)], found[len(upper) :])
