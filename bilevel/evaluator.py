"""The losses and their derivatives at any point: the only place that differentiates a closure.

Values of the lower variables other than the current ones reach a closure by one of two routes:

* *swap*: they are exchanged into the parameters in place, and taken out again whatever happens. It reaches every way
  of reading a parameter, and serves everything that needs no derivative *along* a direction.
* *substitute*: other tensors take their places in the modules (``substitution.py``). It carries dual tensors (forward
  mode) and graphs through the lower point, and reaches only what is read from a module.

The upper variables are never replaced: they are leaves of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .closures import MISSING, Loss, captured, sequence_number
from .errors import ClosureError
from .replay import Policy, Replay
from .substitution import Places, plain_attention
from .variables import Level
from .vectors import Vector, exchange

Wrt = Literal["both", "upper", "lower"]
Point = Sequence[Tensor]

# Looks in which every call is searched for captured values. One would miss what a loss computes in its first call and
# keeps, if it is called once a look.
CHECKED_LOOKS = 2
Graph = tuple[Tensor, Any]


@dataclass(frozen=True)
class Evaluation:
    """A loss at a point: its value and its gradients, per level (empty where it was not asked for)."""

    value: Tensor
    upper: Vector
    lower: Vector
    aux: Any = None


class Evaluator:
    """Two losses over two levels; :meth:`look` opens the look around the current point that one step takes."""

    def __init__(
        self,
        owner: str,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        upper: Level,
        lower: Level,
        modules: Sequence[tuple[nn.Module, Policy]],
    ) -> None:
        self.upper_loss = Loss(owner, "upper_loss", upper_loss)
        self.lower_loss = Loss(owner, "lower_loss", lower_loss)
        self.upper = upper
        self.lower = lower
        self.modules = modules
        self.looks_to_check = CHECKED_LOOKS
        self.product_routes: dict[str, str] = {}

    @property
    def devices(self) -> set[torch.device]:
        return {tensor.device for level in (self.upper, self.lower) for tensor in level.tensors}

    def forget_checks(self) -> None:
        """The set of variables changed: what was found out about the closures no longer holds."""
        self.looks_to_check = CHECKED_LOOKS
        self.product_routes.clear()

    @contextmanager
    def look(self, upper_batch: Any, lower_batches: Sequence[Any]) -> Iterator[Look]:
        """Look around the current point; whatever goes wrong inside, everything is as before afterwards."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "a bilevel step needs gradients, but runs under torch.inference_mode(). Leave that context first."
            )
        replay = Replay(self.devices, self.modules)
        try:
            yield Look(self, replay, upper_batch, lower_batches)
        except BaseException:
            replay.undo()
            raise
        self.looks_to_check = max(0, self.looks_to_check - 1)


class Look:
    """The losses of one step, evaluated around the current point on the batches of that step."""

    def __init__(self, evaluator: Evaluator, replay: Replay, upper_batch: Any, lower_batches: Sequence[Any]) -> None:
        self._evaluator = evaluator
        self._upper_batch = upper_batch
        self._lower_batches = lower_batches or [MISSING]
        self.replay = replay
        self.upper_level = evaluator.upper
        self.lower_level = evaluator.lower
        self._devices = evaluator.devices
        self.upper_loss = evaluator.upper_loss
        self.lower_loss = evaluator.lower_loss

    @property
    def product_routes(self) -> dict[str, str]:
        """Which route serves mixed products of a loss, once one was found to fail; kept from step to step."""
        return self._evaluator.product_routes

    @property
    def checking(self) -> bool:
        """Whether this look searches the graphs of the losses for what it cannot serve: the first looks do, and the
        first after the set of variables changed.
        """
        return self._evaluator.looks_to_check > 0

    def point(self) -> list[Tensor]:
        """Return the current values of the lower variables: views, not copies."""
        return [tensor.detach() for tensor in self.lower_level.tensors]

    def upper(self, at: Point | None = None, wrt: Wrt = "both") -> Evaluation:
        """Evaluate F at the current point, or with the lower variables ``at`` other values. One call of the loss."""
        loss = self.upper_loss
        evaluation = self._evaluate(loss, "upper", self._upper_batch, at, wrt)
        if wrt != "upper":
            loss.check_use("lower", evaluation.lower)
        return evaluation

    def lower(self, index: int = 0, at: Point | None = None, wrt: Wrt = "both", *, trains: bool = False) -> Evaluation:
        """Evaluate G on lower batch ``index``; a single batch serves every index. One call of the loss.

        ``trains`` marks the gradient of a real lower step: buffers move even if the batch was evaluated before.
        """
        index, batch = self._lower_batch(index)
        loss = self.lower_loss
        evaluation = self._evaluate(loss, ("lower", index), batch, at, wrt, trains)
        if wrt != "upper":
            loss.check_use("lower", evaluation.lower)
        if wrt != "lower":
            loss.check_use("upper", evaluation.upper)
        return evaluation

    @contextmanager
    def lower_graph(
        self,
        index: int,
        at: Point | None = None,
        substitute: Point | None = None,
        *,
        current: bool = False,
        trains: bool = False,
    ) -> Iterator[Graph]:
        """Build the graph of G, and its aux, for derivatives of higher order, to be taken inside the ``with``.

        Args:
            index: Which lower batch, as in :meth:`lower`.
            at: Values to swap in.
            substitute: Instead, tensors to put in the places of the lower variables: dual tensors, or a graph.
            current: Whether these have the current values, so that buffers move as in :meth:`lower`.
            trains: Whether a real lower step is taken along the gradient, as there.
        """
        index, batch = self._lower_batch(index)
        with self._graph(self.lower_loss, ("lower", index), batch, at, substitute, current, trains) as graph:
            yield graph

    @contextmanager
    def upper_graph(self, substitute: Point, *, current: bool = False) -> Iterator[Graph]:
        """Build the graph of F with other tensors in the places of the lower variables, as in :meth:`lower_graph`.

        ``current``: as there.
        """
        with self._graph(self.upper_loss, "upper", self._upper_batch, None, substitute, current) as graph:
            yield graph

    @contextmanager
    def _graph(
        self,
        loss: Loss,
        key: Any,
        batch: Any,
        at: Point | None,
        substitute: Point | None,
        current: bool = False,
        trains: bool = False,
    ) -> Iterator[Graph]:
        # Copies: a training-mode BatchNorm would write tangents into the user's own buffers, and a kept graph may hold
        # what the next evaluation changes.
        copied = substitute is not None and not current
        with self._prepared(key, at, current=current, trains=trains, copied=copied), plain_attention():
            if substitute is None:
                graph = loss(batch, self._devices)
            else:
                frozen = not any(value.requires_grad for value in substitute)
                with self._places.holding(substitute, copy_buffers=copied):
                    graph = loss(batch, self._devices, frozen=frozen)
            yield graph

    @cached_property
    def _places(self) -> Places:
        return Places([module for module, _ in self._evaluator.modules], self.lower_level.tensors)

    def _lower_batch(self, index: int) -> tuple[int, Any]:
        index = min(index, len(self._lower_batches) - 1)
        return index, self._lower_batches[index]

    def _evaluate(
        self, loss: Loss, key: Any, batch: Any, at: Point | None, wrt: Wrt, trains: bool = False
    ) -> Evaluation:
        upper = list(self.upper_level.tensors) if wrt != "lower" else []
        lower = list(self.lower_level.tensors) if wrt != "upper" else []
        with self._prepared(key, at, current=at is None, freeze=not lower, trains=trains):
            since = sequence_number() if self.checking else 0
            value, aux = loss(batch, self._devices, frozen=not lower)
            if self.checking:
                self._refuse_captured(loss, value, since)
            gradients = torch.autograd.grad(value, upper + lower, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None and gradient.layout != torch.strided:
                raise ClosureError(
                    f"{loss.name} gives {self._names(wrt)[index]} a gradient of layout {gradient.layout}; directions "
                    "are dense. Usual cause: Embedding(sparse=True). Build the layer with sparse=False."
                )
        return Evaluation(value.detach(), gradients[: len(upper)], gradients[len(upper) :], aux)

    def _names(self, wrt: Wrt) -> list[str]:
        upper = [f"upper variable {name}" for name in self.upper_level.names]
        lower = [f"lower variable {name}" for name in self.lower_level.names]
        return {"both": upper + lower, "upper": upper, "lower": lower}[wrt]

    def _refuse_captured(self, loss: Loss, value: Tensor, since: int) -> None:
        variables = (*self.upper_level.tensors, *self.lower_level.tensors)
        names = captured(value, since, dict(zip(map(id, variables), self._names("both"), strict=True)))
        if names:
            raise ClosureError(
                f"{loss.name} reads {', '.join(names)} through a tensor that was computed outside the call, so it "
                "would be evaluated at the wrong point when the variable moves. Compute that tensor inside the loss, "
                "from the variable itself."
            )

    @contextmanager
    def _prepared(
        self,
        key: Any,
        at: Point | None,
        *,
        current: bool,
        freeze: bool = False,
        trains: bool = False,
        copied: bool = False,
    ) -> Iterator[None]:
        """Surround one evaluation: replay what the batch's first one saw, swap ``at`` in and out.

        ``copied`` says that the evaluation gets copies of the buffers.
        """
        variables = [*self.upper_level.tensors, *self.lower_level.tensors]
        parameters = self.lower_level.tensors
        replayed = self.replay.evaluation(key, current=current, trains=trains, copied=copied)
        with replayed, torch.enable_grad():
            # An autocast region around the step would go on to serve casts of the values before the exchange.
            torch.clear_autocast_cache()
            if at is not None:
                exchange(parameters, at)
            try:
                if freeze:
                    # Without gradients for the lower variables this is forward-only through the lower model.
                    for parameter in parameters:
                        parameter.requires_grad_(False)
                yield
            finally:
                for variable in variables:
                    if not variable.requires_grad:
                        variable.requires_grad_(True)
                if at is not None:
                    exchange(parameters, at)
                torch.clear_autocast_cache()
