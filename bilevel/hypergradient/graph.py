"""Lower steps whose graph is kept: one reverse pass at the end, at the memory of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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
) -> Unrolling:
    """Walk with the graph of the ``last`` steps kept, and differentiate F once, through all of them.

    Arguments as of :func:`unrolled_by_adjoint`. With ``real`` steps values come from the lower optimizer, derivatives
    from its rule.

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
        walk = KeptGraph(oracle, rule(), leaves(point), state, chained=False)
    else:
        walk = KeptGraph(oracle, rule(), start, state, chained=True)
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
        versions = [x._version for x in w]
        with torch.enable_grad(), _hooks_refused():
            with (
                self._oracle.lower_graph(batch, substitute=w, current=current) as (value, aux),
                _two_derivatives(),
            ):
                inputs = [*w, *self._oracle.lower_level.tensors]
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
            detached = Vector(gradient, self._oracle.lower_level.names).detach()
            here = Evaluation(Loss.number(value), Vector([]), detached, aux)
            self._oracle.latest_lower = here.value
            if self._first and self._oracle.comparing:
                self._compare(here, w, batch, current=current)
            self._first = False
            self._point, self._state = self._rule.step(w, gradient, self._state)
        return here

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
        loss, upper = self._oracle.upper_loss, self._oracle.upper_level.tensors
        with torch.enable_grad(), _hooks_refused():
            graph = self._oracle.upper_graph(substitute=self._point, current=real)
            with graph as (value, aux), _two_derivatives():
                inputs = [*upper, *self._point, *self._oracle.lower_level.tensors]
                found = torch.autograd.grad(value, inputs, allow_unused=True)
        total, lower = found[: len(upper)], found[len(upper) : len(upper) + len(self._point)]
        self._refuse_read(loss, found[len(upper) + len(self._point) :])
        loss.check_use("lower", lower)
        names = self._oracle.upper_level.names
        nothing = Vector([None] * len(upper), names)  # F's own gradient is in the total
        here = Evaluation(Loss.number(value), nothing, Vector(lower, self._oracle.lower_level.names), aux)
        if self._oracle.comparing:
            self._compare(here, self._point, None, current=real)
        return here, Vector(total, names)

    def _check(self, value: Tensor, gradient: Tensors) -> None:
        """Check what evaluations and products check in adjoint mode."""
        loss = self._oracle.lower_loss
        loss.check_use("lower", gradient)
        if not self._chained and not leaves_of(value, _names(self._oracle.upper_level)):
            loss.check_use("upper", [])
        with _two_derivatives():
            refuse_wrong_rules([value, *(g for g in gradient if g is not None)])

    def _compare(self, here: Evaluation, w: Sequence[Tensor], batch: int | None, *, current: bool) -> None:
        """Compare a loss on substitutes with the closure as it stands: G on a lower batch, or F."""
        oracle, name = self._oracle, "lower_loss" if batch is not None else "upper_loss"
        oracle.substitutes = {id(x): n for n, x in zip(oracle.lower_level.names, w, strict=True)}

        def gap(oracle: Oracle, point: Point, other: Evaluation | None) -> Tensor:
            at = None if current and other is not None else point
            plain = oracle.upper(at, wrt="lower") if batch is None else oracle.lower(at, batch=batch, wrt="lower")
            if other is None:
                with torch.enable_grad():
                    leaf = leaves(point)
                    graph = oracle.upper_graph(leaf) if batch is None else oracle.lower_graph(batch, substitute=leaf)
                    with graph as (value, _):
                        gradient = torch.autograd.grad(value, leaf, allow_unused=True)
                        other = Evaluation(value, Vector([]), Vector(gradient))
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
def _two_derivatives() -> Iterator[None]:
    try:
        with second_derivatives():
            yield
    except NoDoubleBackward as problem:
        raise NoGraph(f"{problem} {FIRST_ORDER}") from problem.__cause__
