"""The losses and their derivatives at any point: the only place that calls a closure and differentiates it.

Values of the lower variables other than the current ones reach a closure by one of two routes:

* *swap*: they are exchanged into the parameters in place, and taken out again whatever happens. It reaches every way
  of reading a parameter, and serves everything that needs no derivative *along* a direction.
* *substitute*: other tensors take their places in the modules (``substitution.py``). It carries dual tensors (forward
  mode) and graphs through the lower point, and reaches only what is read from a module.

The upper variables are never replaced: they are leaves of the graph. Where only their gradient is wanted, an evaluation
is *forward-only* through the lower model: the lower variables' flags are off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..batches import MISSING
from ..errors import ClosureError
from ..levels import Level
from ..microbatches import MicroBatches, Sum, joined, parts_of, weights_of
from ..processes.joined import Share, agreed, averaged, several
from ..shards import gradients_by_backward, part_of
from ..vectors import Tensors, Vector, place, present
from .inspection import explained
from .losses import Loss, sequence_number, stale_variables
from .precision import float32
from .replay import Replay
from .scaling import Scaling
from .substitution import Places, plain_attention

Wrt = Literal["both", "upper", "lower"]
Side = Literal["upper", "lower"]
Key = tuple[Side, int]  # of a batch: which loss it is for, and its number
Part = tuple[Side, int, int]  # of a micro-batch: also which one of its batch
Point = Sequence[Tensor]
Graph = tuple[Tensor, Any]


@dataclass(frozen=True)
class Evaluation:
    """A loss at a point, and its gradients.

    Attributes:
        value: The loss, a detached scalar.
        upper: Its gradient in the upper variables; empty where it was not asked for.
        lower: Its gradient in the lower variables, likewise.
        aux: What the loss returned beside its value, detached.
    """

    value: Tensor
    upper: Vector
    lower: Vector
    aux: Any = None


@dataclass(frozen=True)
class Subject:
    """What is evaluated: two losses over two levels, and the modules that they are known to call."""

    owner: str
    upper_loss: Loss
    lower_loss: Loss
    upper: Level
    lower: Level
    modules: Sequence[nn.Module]

    @property
    def devices(self) -> set[torch.device]:
        return {tensor.device for tensor in self.variables}

    @property
    def variables(self) -> list[Tensor]:
        return [*self.upper.tensors, *self.lower.tensors]

    @property
    def named_variables(self) -> list[tuple[str, Tensor]]:
        """The variables of both levels, as errors call them."""
        return [
            (f"{level.side} variable {name}", tensor)
            for level in (self.upper, self.lower)
            for name, tensor in zip(level.names, level.tensors, strict=True)
        ]


class Evaluations:
    """The losses of one step, evaluated around the current point on the batches of that step.

    Args:
        subject: The losses and levels.
        replay: What evaluations must leave as it was.
        upper_batches: The batches of F.
        lower_batches: The batches of G. A side without a batch is called without arguments.
    """

    def __init__(
        self, subject: Subject, replay: Replay, upper_batches: Sequence[Any], lower_batches: Sequence[Any]
    ) -> None:
        self._subject = subject
        self._batches: dict[Side, Sequence[Any]] = {
            "upper": upper_batches or [MISSING],
            "lower": lower_batches or [MISSING],
        }
        self._devices = subject.devices
        self.owner = subject.owner
        self.substitutes: dict[int, str] = {}  # names of tensors that stood in the places of variables, by id
        self.latest_lower: Tensor | None = None  # the last value of G
        self.scaling: Scaling | None = None  # against underflow of half precision
        self._precise = False
        self.replay = replay
        self.upper_level = subject.upper
        self.lower_level = subject.lower
        self.upper_loss = subject.upper_loss
        self.lower_loss = subject.lower_loss

    @property
    def checking(self) -> bool:
        """Whether the graphs of the losses are searched for what cannot be served."""
        return False

    @contextmanager
    def precisely(self) -> Iterator[None]:
        """Inside the ``with``, losses that compute in half precision (autocast, casts) compute in float32.

        For evaluations of which a difference will be taken: at points near each other it would be of their rounding.
        """
        before, self._precise = self._precise, True
        try:
            yield
        finally:
            self._precise = before

    def gradients(
        self,
        outputs: Tensor | Sequence[Tensor],
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
        *,
        create_graph: bool = False,
    ) -> Tensors:
        """``torch.autograd.grad`` of what is scaled where the step has a scaler, and unscaled again.

        ``outputs``: a loss, or its slope, scaled here; or a gradient that was taken with ``create_graph`` and is scaled
        already, with its ``cotangents``.
        """
        if cotangents is None and self.scaling is not None and isinstance(outputs, Tensor):
            cotangents = [self.scaling.cotangent(outputs)]
        found: Tensors = torch.autograd.grad(
            outputs, inputs, grad_outputs=cotangents, create_graph=create_graph, allow_unused=True
        )
        return found if create_graph or self.scaling is None else self.scaling.unscaled(found)

    def point(self) -> Vector:
        """Return the current values of the lower variables: views, not copies."""
        return self.lower_level.vector(tensor.detach() for tensor in self.lower_level.parts)

    def upper(self, at: Tensors | None = None, *, batch: int = 0, wrt: Wrt = "both") -> Evaluation:
        """Evaluate F, and differentiate it. One call of the loss.

        Args:
            at: Values of the lower variables; None: the current ones.
            batch: Which of the step's upper batches; a single one serves every number.
            wrt: Which gradients: of both levels, or of one. ``"upper"`` is forward-only through the lower model.
        """
        evaluation = self._evaluate(self._key("upper", batch), self._point(at), wrt)
        if wrt != "upper":
            self.upper_loss.check_use("lower", evaluation.lower)
        return evaluation

    def lower(self, at: Tensors | None = None, *, batch: int = 0, wrt: Wrt = "both") -> Evaluation:
        """Evaluate G, and differentiate it; arguments as of :meth:`upper`. One call of the loss."""
        loss = self.lower_loss
        evaluation = self._evaluate(self._key("lower", batch), self._point(at), wrt)
        self.latest_lower = evaluation.value
        if wrt != "upper":
            loss.check_use("lower", evaluation.lower)
        if wrt != "lower":
            loss.check_use("upper", evaluation.upper)
        return evaluation

    def lower_precisely(self, known: Evaluation, *, wrt: Wrt = "upper") -> Evaluation:
        """Return G at the current point, from which G at another one is to be subtracted: as it is ``known``, or
        evaluated once more in float32 if the loss computes in half precision.
        """
        if not self._computes_in_half(self.lower_loss):
            return known
        with self.precisely():
            return self.lower(wrt=wrt)

    def check_dependence(self, product: Tensors) -> None:
        """Refuse a lower loss that depends on no upper variable; its mixed derivative alone may well be absent."""
        if self.lower_loss.needs_upper and all(part is None for part in product):
            self.lower(wrt="upper")

    @contextmanager
    def lower_graph(
        self,
        batch: int = 0,
        at: Tensors | None = None,
        substitute: Point | None = None,
        *,
        part: int = 0,
        current: bool = False,
    ) -> Iterator[Graph]:
        """Build the graph of G, and its aux, for derivatives of higher order, to be taken inside the ``with``.

        Args:
            batch: Which lower batch, as in :meth:`lower`.
            part: Which of its micro-batches, out of :meth:`lower_weights`.
            at: Values to swap in.
            substitute: Instead, tensors to put in the places of the lower variables: dual tensors, or a graph.
            current: Whether these have the current values, so that buffers move as in :meth:`lower`.
        """
        key = self._key("lower", batch)
        with self._graph((*key, part), self._point(at), substitute, current) as graph:
            yield graph

    def lower_weights(self, batch: int = 0) -> tuple[float, ...]:
        """Return how much each micro-batch of a lower batch counts; of a batch that is not in parts, 1."""
        return weights_of(self._batch(self._key("lower", batch)))

    @property
    def in_parts(self) -> bool:
        """Whether a batch of this step is in micro-batches."""
        return any(isinstance(batch, MicroBatches) for side in self._batches.values() for batch in side)

    @contextmanager
    def upper_graph(self, substitute: Point, *, batch: int = 0, current: bool = False) -> Iterator[Graph]:
        """Build the graph of F with other tensors in the places of the lower variables, as in :meth:`lower_graph`."""
        key = self._key("upper", batch)
        with self._graph((*key, 0), None, substitute, current) as graph:
            yield graph

    @contextmanager
    def _graph(self, key: Part, at: Point | None, substitute: Point | None, current: bool = False) -> Iterator[Graph]:
        # Copies: a training-mode BatchNorm would write tangents into the user's own buffers, and a kept graph may hold
        # what the next evaluation changes.
        copied = substitute is not None and not current
        loss, batch = self._called(key)
        prepared = self._prepared(key, at, current=current, trains=current, substituted=substitute is not None)
        with prepared, plain_attention(), explained(loss.name):
            if substitute is None:
                graph = loss(batch, self._devices)
            else:
                frozen = not any(value.requires_grad for value in substitute)
                with self._places.holding(substitute, copy_buffers=copied):
                    graph = loss(batch, self._devices, frozen=frozen)
            yield graph

    def _apart(self, aux: Any) -> Any:
        """Return ``aux`` with copies of what is a variable or a buffer, or a view of one: those will move."""
        if aux is None:
            return None

        def apart(leaf: Any) -> Any:
            own = isinstance(leaf, Tensor) and leaf.layout == torch.strided
            return leaf.clone() if own and leaf.untyped_storage().data_ptr() in self._live else leaf

        return tree_map(apart, aux)

    @cached_property
    def _live(self) -> set[int]:
        modules = self._subject.modules
        buffers = [buffer for module in modules for buffer in module.buffers()]
        return {part_of(x).untyped_storage().data_ptr() for x in (*self._subject.variables, *buffers)}

    def _needs_backward(self, wrt: Wrt) -> bool:
        """Whether some of the gradients are of shards."""
        return (self.upper_level.sharded and wrt != "lower") or (self.lower_level.sharded and wrt != "upper")

    @cached_property
    def _differentiable(self) -> list[Tensor]:
        """What else a backward pass may leave a gradient in."""
        return [p for module in self._subject.modules for p in module.parameters() if p.requires_grad]

    @cached_property
    def _places(self) -> Places:
        return Places(self._subject.modules, self.lower_level.tensors)

    def _key(self, side: Side, batch: int) -> Key:
        return side, min(batch, len(self._batches[side]) - 1)

    def _batch(self, key: Key) -> Any:
        side, index = key
        return self._batches[side][index]

    def _loss(self, side: Side) -> Loss:
        return self.upper_loss if side == "upper" else self.lower_loss

    def _parts(self, key: Key) -> list[tuple[Part, float]]:
        """Return the micro-batches of a batch, and how much each counts; a batch that is not in parts is the only
        one.
        """
        return [((*key, part), weight) for part, weight in enumerate(weights_of(self._batch(key)))]

    def _called(self, part: Part) -> tuple[Loss, Any]:
        """Return the loss and the micro-batch of an evaluation."""
        side, index, which = part
        return self._loss(side), parts_of(self._batches[side][index])[which]

    @staticmethod
    def _point(at: Tensors | None) -> list[Tensor] | None:
        return None if at is None else present(at)

    def _evaluate(self, key: Key, at: Point | None, wrt: Wrt) -> Evaluation:
        return self._evaluate_as(key, at, wrt, freeze=wrt == "upper")

    def _evaluate_as(self, key: Key, at: Point | None, wrt: Wrt, *, freeze: bool = False) -> Evaluation:
        """Evaluate the loss of all processes, the mean of theirs; ``freeze``: with the lower variables' flags off."""
        if several() is None:
            own = self._evaluate_here(key, at, wrt, freeze=freeze)
            self._hear(self._has_news(key))
            return own
        upper = self.upper_level.tensors if wrt != "lower" else ()
        lower = self.lower_level.tensors if wrt != "upper" else ()

        def share() -> Share:
            own = self._evaluate_here(key, at, wrt, freeze=freeze)
            return Share([own.value], [*own.upper, *own.lower], self._has_news(key), own)

        found = averaged(self._place(key, wrt), share, [*upper, *lower])
        self._hear(found.flag)
        if self.checking:
            self._agree_precision(self._loss(key[0]))
        return Evaluation(
            found.numbers[0],
            found.rest.upper.like(found.vector[: len(upper)]),
            found.rest.lower.like(found.vector[len(upper) :]),
            found.rest.aux,
        )

    def _has_news(self, key: Key) -> bool:
        """Whether an evaluation showed that the closure may mean something else than before."""
        return False

    def _hear(self, news: bool) -> None:
        """Take note of such news, on this or another process."""

    def _place(self, key: Key, what: str) -> str:
        """Name a place in the step, the same on all processes."""
        return f"{self.owner}: {self._loss(key[0]).name}, batch {key[1]}, {what}"

    def _evaluate_here(self, key: Key, at: Point | None, wrt: Wrt, *, freeze: bool = False) -> Evaluation:
        """Call the loss of this process, and differentiate.

        Of micro-batches one after another: the graph of one is gone before the next one's is made.
        """
        batch = self._batch(key)
        if not isinstance(batch, MicroBatches):
            return self._evaluate_part((*key, 0), at, wrt, freeze=freeze)
        total, found = Sum(), []
        with self.replay.together(batch.weights):
            for part, weight in self._parts(key):
                one = self._evaluate_part(part, at, wrt, freeze=freeze)
                total.add(weight, [one.value, *one.upper, *one.lower])
                found.append((one.aux, len(one.upper)))
        value, *gradients = total.total
        aux, size = joined([aux for aux, _ in found], batch), found[0][1]
        assert value is not None
        return Evaluation(value, one.upper.like(gradients[:size]), one.lower.like(gradients[size:]), aux)

    def _evaluate_part(self, key: Part, at: Point | None, wrt: Wrt, *, freeze: bool = False) -> Evaluation:
        """The same for one micro-batch."""
        loss, batch = self._called(key)
        upper = list(self.upper_level.tensors) if wrt != "lower" else []
        lower = list(self.lower_level.tensors) if wrt != "upper" else []
        with self._prepared(key, at, current=at is None, freeze=freeze, trains=bool(lower)):
            since = sequence_number() if self.checking else 0
            value, aux = loss(batch, self._devices, frozen=not lower)
            if self.checking:
                self._refuse_stale(loss, value, since)
                self._note_precision(loss, value)
            with explained(loss.name):
                # F may well not depend on the upper variables: without the lower ones it then has no graph.
                gradients: Tensors = [None] * len(upper)
                if value.requires_grad and self._needs_backward(wrt):
                    agreed(False, f"{loss.name}: before FSDP's backward pass")  # which waits for all processes
                    gradients = self._sharded_gradients(value, upper + lower)
                elif value.requires_grad:
                    gradients = self.gradients(value, upper + lower)
            number, aux = loss.number(value), self._apart(aux)  # before swapped values are taken out again
        for index, gradient in enumerate(gradients):
            if gradient is not None and gradient.layout != torch.strided:
                raise ClosureError(
                    f"{loss.name} gives {self._names(wrt)[index]} a gradient of layout {gradient.layout}; directions "
                    "are dense. Usual cause: Embedding(sparse=True). Build the layer with sparse=False."
                )
        return Evaluation(
            number,
            self.upper_level.vector(gradients[: len(upper)]) if upper else Vector([]),
            self.lower_level.vector(gradients[len(upper) :]) if lower else Vector([]),
            aux,
        )

    def _sharded_gradients(self, value: Tensor, variables: Sequence[Tensor]) -> Tensors:
        """The same as :meth:`gradients`, by ``.backward()``, of this process's shards."""
        scaling = self.scaling
        if scaling is None:
            return gradients_by_backward(value, variables, self._differentiable)
        return scaling.unscaled(
            gradients_by_backward(value * scaling.cotangent(value), variables, self._differentiable)
        )

    def _note_precision(self, loss: Loss, value: Tensor) -> None:
        """A look found in which precision a loss computes."""

    def _agree_precision(self, loss: Loss) -> None:
        """Of several processes, count a loss as one of half precision if it is on any."""

    def _computes_in_half(self, loss: Loss) -> bool:
        """Whether a look found that a loss computes in half precision."""
        return False

    def _names(self, wrt: Wrt) -> list[str]:
        upper = [f"upper variable {name}" for name in self.upper_level.names]
        lower = [f"lower variable {name}" for name in self.lower_level.names]
        return {"both": upper + lower, "upper": upper, "lower": lower}[wrt]

    def _refuse_stale(self, loss: Loss, value: Tensor, since: int) -> None:
        variables = {id(tensor): name for name, tensor in self._subject.named_variables}
        names = stale_variables(value, since, variables | self.substitutes)
        if names:
            raise ClosureError(
                f"{loss.name} reads {', '.join(names)} through a tensor that was computed outside the call, so it "
                "would be evaluated at the wrong point when the variable moves. Compute that tensor inside the loss, "
                "from the variable itself."
            )

    @contextmanager
    def _prepared(
        self,
        key: Part,
        at: Point | None,
        *,
        current: bool,
        freeze: bool = False,
        trains: bool = False,
        substituted: bool = False,
    ) -> Iterator[None]:
        """Surround one evaluation: replay what the batch's first one saw, swap ``at`` in and out.

        ``trains`` says that the evaluation gives the lower gradient, along which a real step may be taken;
        ``substituted`` that other tensors stand in the places of the lower variables meanwhile; except at the
        current point, copies in those of the buffers too.
        """
        variables = [*self.upper_level.tensors, *self.lower_level.tensors]
        parameters, parts = self.lower_level.tensors, self.lower_level.parts
        trains = trains and key[0] == "lower"
        replayed = self.replay.evaluation(key, current=current, trains=trains, copied=substituted and not current)
        wide = float32(self._devices) if self._precise and self._computes_in_half(self._loss(key[0])) else nullcontext()
        with replayed, torch.enable_grad(), wide:
            # An autocast region around the step would go on to serve casts of the values before the exchange.
            torch.clear_autocast_cache()
            take_out = place(parts, at) if at is not None else None
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
                if take_out is not None:
                    take_out()
                torch.clear_autocast_cache()
