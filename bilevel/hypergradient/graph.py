"""Lower steps whose graph is kept: one reverse pass at the end, at the memory of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ClosureError
from ..evaluation.evaluations import Evaluation
from ..evaluation.inspection import changed_in_place
from ..evaluation.losses import Loss, leaves_of
from ..evaluation.oracle import Oracle
from ..evaluation.verification import out_of_memory, rounding, value_gap, vector_gap
from ..levels import Level
from ..lower_steps import Point, Rule, State
from ..processes.joined import Share, averaged, several
from ..vectors import Tensors, Vector, present
from .adjoint import Unrolling
from .modes import NoDoubleBackward, refuse_wrong_rules, second_derivatives
from .trajectory import copied, descend, train

FIRST_ORDER = (
    'Use differentiate="adjoint" with product="difference", or a first-order method such as BOME or FiniteDifference.'
)
RECOMPUTED = (
    'A loss uses checkpointing, or other hooks on saved tensors, which differentiate="graph" cannot keep: what they '
    'recompute would be of other values. Use differentiate="adjoint", whose memory does not grow with inner_steps.'
)


class NoGraph(ClosureError):
    """A loss cannot be walked by a kept graph: it has no second derivative, or recomputes what it saved."""


class Unreached(NoGraph):
    """Substitution gives another function than the closure."""


def unrolled_by_graph(
    oracle: Oracle,
    rule: Callable[[], Rule],
    steps: int,
    *,
    last: int,
    start: list[Tensor] | None = None,
    real: bool = False,
    kind: type[KeptGraph] | None = None,
) -> Unrolling:
    """Walk with the graph of the ``last`` steps kept, and differentiate F once, through all of them.

    Arguments as of :func:`unrolled_by_adjoint`. With ``real`` steps values come from the lower optimizer, derivatives
    from its rule. ``kind``: how the graph is kept.

    Raises:
        Unreached: A loss is another function of tensors that take the places of the lower variables.
    """
    skipped, first = steps - last, None
    state, current = rule().start(), start is None
    if start is None:
        point = oracle.point()
        if skipped and real:
            first = train(oracle, skipped).first
        elif skipped:
            plain = descend(oracle, rule(), skipped)
            first, point, state, current = plain.first, plain.end, plain.state, False
        state = copied(rule) if real else state
        walk = (kind or KeptGraph)(oracle, rule(), leaves(point), state, chained=False)
    else:
        walk = (kind or KeptGraph)(oracle, rule(), start, state, chained=True)
    for index in range(skipped, steps):
        g = walk.step(index, current=current)
        first = first or g
        current = real
        if real:
            oracle.train(g.lower)
            walk.follow(oracle.point(), rule().start())
    f, total = walk.finish(real=real)
    return Unrolling(f, first or f, total)  # at least one step is differentiated


class KeptGraph:
    """A walk of lower steps as one graph: its current point depends on the upper variables.

    Args:
        oracle: Where the losses are evaluated.
        rule: The lower step.
        start: The first point; leaves, or a function of the upper variables.
        state: The state of ``rule`` before the first step.
        chained: Whether ``start`` depends on the upper variables.
    """

    def __init__(self, oracle: Oracle, rule: Rule, start: Sequence[Tensor], state: State, *, chained: bool) -> None:
        oracle.refuse_hooks()
        self._oracle, self._rule, self._chained = oracle, rule, chained
        self._point, self._state = list(start), state
        self._first = True

    def step(self, batch: int, *, current: bool = False) -> Evaluation:
        """Take a step on a lower batch; return G before it. ``current`` as in :meth:`Oracle.lower_graph`."""
        w = self._point

        def share() -> Share:
            value, gradient, aux = self._look(w, batch, current=current)
            detached = [None if g is None else g.detach() for g in gradient]
            return Share([Loss.number(value)], detached, rest=(gradient, aux))

        mean = averaged(f"{self._oracle.owner}: a kept step", share, self._oracle.lower_level.tensors)
        gradient, aux = mean.rest
        here = Evaluation(mean.numbers[0], Vector([]), Vector(mean.vector, self._oracle.lower_level.names), aux)
        self._oracle.latest_lower = here.value
        if self._first and self._oracle.checking:
            self._oracle.lower_loss.check_use("lower", here.lower)
        if self._first and self._oracle.comparing:
            self._compare(here, w, batch, current=current)
        self._first = False
        self._advance(batch, gradient, here)
        return here

    def _look(self, w: list[Tensor], batch: int, *, current: bool) -> tuple[Tensor, Tensors, Any]:
        """Return G of this process, its gradient with its graph, and its aux."""
        versions = [x._version for x in w]
        with torch.enable_grad(), _hooks_refused():
            with (
                self._oracle.lower_graph(batch, substitute=w, current=current) as (value, aux),
                twice(),
            ):
                inputs = [*w, *self._oracle.lower_level.tensors]
                found: Tensors = [None] * len(inputs)
                if value.requires_grad:
                    found = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
            if versions != [x._version for x in w]:
                name = next(
                    n for n, x, v in zip(self._oracle.lower_level.names, w, versions, strict=True) if x._version != v
                )
                raise changed_in_place("lower_loss", f"lower variable {name}", "variable")
            gradient = found[: len(w)]
            self._refuse_read(self._oracle.lower_loss, found[len(w) :])
            if self._first and self._oracle.checking:  # where the graph begins; later steps hold the earlier ones
                self._check(value, gradient)
        return value, gradient, aux

    def _advance(self, batch: int, gradient: Tensors, here: Evaluation) -> None:
        """Take the step along a gradient that has its graph."""
        with torch.enable_grad():
            self._point, self._state = self._rule.step(self._point, gradient, self._state)

    def follow(self, point: Vector, state: State) -> None:
        """Take over the values of a real step, which hooks may have moved elsewhere; no derivative knows of them."""
        with torch.enable_grad():
            self._point = [_valued(x, value) for x, value in zip(self._point, present(point), strict=True)]
            self._state = [
                {name: _valued(s, real.get(name, s)) for name, s in entry.items()}
                for entry, real in zip(self._state, state, strict=True)
            ]

    def finish(self, *, real: bool = False) -> tuple[Evaluation, Vector]:
        """Evaluate F at the end; return it there, and its derivative through the whole walk.

        ``real`` says that the end is the current point, so that F may move buffers.
        """
        size, names = len(self._oracle.upper_level.tensors), self._oracle.upper_level.names

        def share() -> Share:
            value, found, aux = self._differentiated(real)
            return Share([Loss.number(value)], found, rest=aux)

        like = [*self._oracle.upper_level.tensors, *self._oracle.lower_level.tensors]
        mean = averaged(f"{self._oracle.owner}: the end of a kept walk", share, like)
        total, lower = mean.vector[:size], mean.vector[size:]
        self._oracle.upper_loss.check_use("lower", lower)
        nothing = Vector([None] * size, names)  # F's own gradient is in the total
        here = Evaluation(mean.numbers[0], nothing, Vector(lower, self._oracle.lower_level.names), mean.rest)
        if self._oracle.comparing:
            self._compare(here, self._point, None, current=real)
        return here, self._total(Vector(total, names), here.lower)

    def _differentiated(self, real: bool) -> tuple[Tensor, Tensors, Any]:
        """Return F at the end, of this process, its gradients in the upper variables and the end, and its aux."""
        loss, upper = self._oracle.upper_loss, self._oracle.upper_level.tensors
        with torch.enable_grad(), _hooks_refused():
            graph = self._oracle.upper_graph(substitute=self._point, current=real)
            with graph as (value, aux), twice():
                inputs = [*upper, *self._point, *self._oracle.lower_level.tensors]
                found: Tensors = [None] * len(inputs)
                if value.requires_grad:
                    found = torch.autograd.grad(value, inputs, allow_unused=True)
        self._refuse_read(loss, found[len(upper) + len(self._point) :])
        return value, found[: len(upper) + len(self._point)], aux

    def _total(self, upper: Vector, end: Vector) -> Vector:
        """Return the derivative through the walk: autograd went back through all of it."""
        return upper

    def _check(self, value: Tensor, gradient: Tensors) -> None:
        """Check what evaluations and products check in adjoint mode."""
        loss = self._oracle.lower_loss
        used = self._chained or several() is not None or leaves_of(value, _names(self._oracle.upper_level))
        if not used:
            loss.check_use("upper", [])
        with twice():
            refuse_wrong_rules([value, *(g for g in gradient if g is not None)])

    def _compare(self, here: Evaluation, w: Sequence[Tensor], batch: int | None, *, current: bool) -> None:
        """Compare a loss on substitutes with the closure as it stands: G on a lower batch, or F."""
        oracle, name = self._oracle, "lower_loss" if batch is not None else "upper_loss"
        oracle.substitutes = {id(x): n for n, x in zip(oracle.lower_level.names, w, strict=True)}

        def substituted(oracle: Oracle, point: Point) -> Share:
            with torch.enable_grad():
                leaf = leaves(point)
                graph = oracle.upper_graph(leaf) if batch is None else oracle.lower_graph(batch, substitute=leaf)
                with graph as (value, _):
                    return Share([value.detach()], torch.autograd.grad(value, leaf, allow_unused=True))

        def gap(oracle: Oracle, point: Point, other: Evaluation | None) -> Tensor:
            at = None if current and other is not None else point
            plain = oracle.upper(at, wrt="lower") if batch is None else oracle.lower(at, batch=batch, wrt="lower")
            if other is None:
                mean = averaged(f"{oracle.owner}: on substitutes", lambda: substituted(oracle, point), point)
                other = Evaluation(mean.numbers[0], Vector([]), Vector(mean.vector))
            values = value_gap(plain.value, other.value)
            return torch.maximum(values, vector_gap(plain.lower, other.lower).to(values.device))

        point = [x.detach() for x in w]
        try:
            with oracle.replay.silently():
                found = gap(oracle, [x.clone() for x in point], here)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            oracle.verification.say(f"{name}, substituted: not verified, for want of memory. Nothing else is affected.")
            return
        shortcut = f"{name}, substituted"
        if name in oracle.verification.unrepeatable:
            return
        if not oracle.verification.suspects(shortcut, found, rounding(oracle.dtype)):
            return

        def in_float64() -> float:
            with oracle.in_float64() as wide:
                return float(gap(wide, [x.double() for x in point], None))

        if oracle.differs(shortcut, float(found), in_float64):
            raise Unreached(
                f"{name} is another function of tensors that take the parameters' places (by {float(found):.1e}). "
                "Usual causes: a condition on the kind or identity of a parameter, or on requires_grad, or a gradient "
                'hook. Use differentiate="adjoint".'
            )

    def _refuse_read(self, loss: Loss, past: Tensors) -> None:
        """A variable that has a gradient beside its substitute was read past it."""
        missed = [name for name, g in zip(self._oracle.lower_level.names, past, strict=True) if g is not None]
        if missed:
            raise Unreached(
                f"{loss.name} reads {', '.join(missed)} other than from a module given as lower=, where no substitute "
                'reaches it. Read the module\'s attribute inside the loss, or use differentiate="adjoint".'
            )


def leaves(point: Tensors) -> list[Tensor]:
    """Return copies of a point from which a graph can begin."""
    return [x.detach().clone().requires_grad_() for x in present(point)]


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
        raise NoGraph(RECOMPUTED) from error


@contextmanager
def twice() -> Iterator[None]:
    """Say in one line what has no second derivative, and what else serves."""
    try:
        with second_derivatives():
            yield
    except NoDoubleBackward as problem:
        raise NoGraph(f"{problem} {FIRST_ORDER}") from problem.__cause__
