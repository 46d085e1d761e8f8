"""Forward mode through lower steps: one tangent of ``w`` for each upper scalar, carried along; nothing is stored.

With ``Z = dw/dalpha``, a column for each upper scalar, and ``g = grad_w G(w, alpha)``::

    dg = G_ww Z + G_wa,    Z <- step_w Z + step_g dg + step_s S + step_h dh/dalpha    (S: that of the rule's state)
    dF/dalpha = F_a + Z^T F_w

A column of ``dg`` is the lower half of the Hessian of G along ``(z, e)``, by double backward: plain autograd of the
closure as it stands. Memory is that of one step and of ``Z`` and ``S``, whatever the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..evaluation.evaluations import Evaluation
from ..evaluation.losses import Loss
from ..evaluation.oracle import Oracle
from ..lower_steps import Rule, State, constant
from ..processes.joined import Share, averaged
from ..vectors import Tensors, Vector, accumulation_dtype, present
from .adjoint import Unrolling
from .modes import load_forward_rules, refuse_wrong_rules, two_derivatives
from .trajectory import copied

FIRST_ORDER = 'Use differentiate="adjoint" with product="difference", or a first-order method such as BOME.'
Columns = list[Tensor | None]  # for each of some tensors, its tangents along all upper scalars; None: zero


def unrolled_by_forward(
    oracle: Oracle,
    rule: Callable[[], Rule],
    steps: int,
    *,
    last: int,
    start: list[Tensor] | None = None,
    real: bool = False,
) -> Unrolling:
    """Walk, and carry the derivative of the point along; arguments as of :func:`unrolled_by_adjoint`.

    Cost: a step is one gradient of G with its graph, and one pass back through it for each upper scalar.
    """
    walk = Tangents(oracle, rule, start)
    first: Evaluation | None = None
    for index in range(steps):
        g = walk.step(index, real=real, differentiated=index >= steps - last)
        first = first or g
    f = oracle.upper() if real else oracle.upper(walk.end())
    return Unrolling(f, first or f, walk.pulled(f.lower))


class Tangents:
    """A lower point, the state of its rule, and their derivatives along every upper scalar."""

    def __init__(self, oracle: Oracle, rule: Callable[[], Rule], start: list[Tensor] | None) -> None:
        self._oracle, self._make, self._from_start = oracle, rule, start is not None
        self._rule = constant(rule())
        upper, lower = oracle.upper_level.tensors, oracle.lower_level.tensors
        self._sizes = [x.numel() for x in upper]
        self._felt = [False] * len(upper)  # which upper variables anything depends on
        self._state: State = self._rule.start()
        self._along_state: list[dict[str, Tensor]] = [{} for _ in lower]
        self._along_rule = self._columns(rule().hyperparameters)
        self._at: Vector | None = None  # where the walk is, if not at the current point
        self._along: Columns = [None] * len(lower)
        if start is not None:
            self._at = oracle.point().like(x.detach().clone() for x in start)
            self._along = self._columns(start)

    @property
    def _count(self) -> int:
        return sum(self._sizes)

    def end(self) -> Vector:
        """Return where the walk is."""
        return self._oracle.point() if self._at is None else self._at

    def step(self, batch: int, *, real: bool, differentiated: bool) -> Evaluation:
        """Take a step on a lower batch, virtual or real; return G before it."""
        oracle = self._oracle
        if real:
            self._state = copied(self._make)
        point = self.end().clone() if real else self.end()
        if differentiated:
            g, along_gradient = self._gradient(batch)
            self._push(point, g.lower, along_gradient)
        else:
            g = oracle.lower(self._at, batch=batch, wrt="lower")
        if real:
            oracle.train(g.lower)
        else:
            moved, self._state = self._rule.step(point, g.lower, self._state)
            self._at = point.like(moved)
        return g

    def pulled(self, cotangent: Tensors) -> Vector:
        """Return ``Z^T cotangent``, like the upper variables."""
        found: Tensor | None = None
        for z, bar in zip(self._along, cotangent, strict=True):
            if z is None or bar is None:
                continue
            wide = accumulation_dtype(bar.device)
            part = z.reshape(self._count, -1).to(wide) @ bar.flatten().to(wide)
            found = part if found is None else found + part.to(found.device)
        upper = self._oracle.upper_level
        if found is None:
            return Vector([None] * len(upper.tensors), upper.names)
        parts = found.split(self._sizes)
        return Vector(
            (
                part.reshape(x.shape).to(x.device, x.dtype) if felt else None
                for part, x, felt in zip(parts, upper.tensors, self._felt, strict=True)
            ),
            upper.names,
        )

    def _gradient(self, batch: int) -> tuple[Evaluation, Columns]:
        """Return G and its lower gradient, and the tangents of that gradient."""
        oracle, loss = self._oracle, self._oracle.lower_loss
        if oracle.comparing and batch == 0:
            with oracle.replay.silently():  # finds what is captured, and what does not repeat
                oracle.lower(self._at, batch=batch, wrt="lower")
        upper, lower = oracle.upper_level.tensors, oracle.lower_level.tensors
        stacks = [x.detach().unsqueeze(0).expand(self._count, *x.shape) for x in lower]
        place = f"{oracle.owner}: a gradient and its tangents"
        mean = averaged(place, lambda: self._gradient_here(batch), [*lower, *upper, *stacks])
        gradient, mixed = mean.vector[: len(lower)], mean.vector[len(lower) : -len(lower)]
        loss.check_use("lower", gradient)
        if not self._from_start:
            loss.check_use("upper", mixed)
        self._felt = [felt or g is not None for felt, g in zip(self._felt, mixed, strict=True)]
        here = Evaluation(mean.numbers[0], Vector([]), Vector(gradient, oracle.lower_level.names), mean.rest)
        oracle.latest_lower = here.value
        return here, list(mean.vector[-len(lower) :])

    def _gradient_here(self, batch: int) -> Share:
        """G, its gradients in both levels, and the tangents of the lower one, on this process."""
        oracle = self._oracle
        upper, lower = oracle.upper_level.tensors, oracle.lower_level.tensors
        graph = oracle.lower_graph(batch, self._at, current=self._at is None)
        with torch.enable_grad(), graph as (value, aux), two_derivatives(FIRST_ORDER):
            gradients: Tensors = [None] * (len(lower) + len(upper))
            if value.requires_grad:
                gradients = torch.autograd.grad(value, [*lower, *upper], create_graph=True, allow_unused=True)
            if oracle.checking:
                refuse_wrong_rules([value, *(g for g in gradients if g is not None)])
            gradient, mixed = gradients[: len(lower)], gradients[len(lower) :]
            columns = [self._column(column, gradient, mixed) for column in self._directions()]
            detached = [g if g is None else g.detach() for g in gradients]
            return Share([Loss.number(value)], [*detached, *_stacked(columns, len(lower))], rest=aux)

    def _directions(self) -> Iterator[tuple[int, int, int]]:
        """Yield the number of each upper scalar, its variable and its place there."""
        number = 0
        for index, size in enumerate(self._sizes):
            for place in range(size):
                yield number, index, place
                number += 1

    def _column(self, column: tuple[int, int, int], gradient: Tensors, mixed: Tensors) -> Columns:
        """Return ``G_ww z + G_wa e`` for one upper scalar."""
        number, index, place = column
        pairs = [
            (g, z[number].to(g.dtype))
            for g, z in zip(gradient, self._along, strict=True)
            if g is not None and z is not None and g.requires_grad
        ]
        own = mixed[index]
        if own is not None and own.requires_grad:
            one = torch.zeros_like(own)
            one.view(-1)[place] = 1.0
            pairs.append((own, one))
        if not pairs:
            return [None] * len(gradient)
        outputs, along = zip(*pairs, strict=True)
        lower = self._oracle.lower_level.tensors
        found = torch.autograd.grad(outputs, lower, grad_outputs=along, allow_unused=True, retain_graph=True)
        return [None if x is None else x.detach() for x in found]

    def _push(self, point: Vector, gradient: Vector, along_gradient: Columns) -> None:
        """Carry the tangents through the rule's step: elementwise operations, all columns at once."""
        names = [[name for name in entry if name != "step"] for entry in self._state]
        places = [(i, name) for i, own in enumerate(names) for name in own]
        rule = list(self._rule.hyperparameters)
        values = [*present(point), *gradient, *(self._state[i][name] for i, name in places), *rule]
        along = [*self._along, *along_gradient, *(self._along_state[i].get(n) for i, n in places), *self._along_rule]
        moving = [i for i, (x, t) in enumerate(zip(values, along, strict=True)) if x is not None and t is not None]
        if not moving:
            return
        kept: list[list[str]] = []

        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            now = list(values)
            for i, x in zip(moving, inputs, strict=True):
                now[i] = x
            w, g, rest = now[: len(point)], now[len(point) : 2 * len(point)], now[2 * len(point) :]
            state = [dict(entry) for entry in self._state]
            for (i, name), x in zip(places, rest, strict=False):
                state[i][name] = x
            h = rest[len(places) :]
            moved, after = self._rule.at(present(h)).step(w, g, state)
            kept[:] = [[name for name in entry if name != "step"] for entry in after]
            return (*moved, *(entry[name] for entry, own in zip(after, kept, strict=True) for name in own))

        primals = tuple(x for i in moving if (x := values[i]) is not None)
        tangents = tuple(t.to(x.dtype) for i, x in zip(moving, primals, strict=True) if (t := along[i]) is not None)
        found = _pushed(step, primals, tangents)
        self._along = list(found[: len(point)])
        others = iter(found[len(point) :])
        self._along_state = [{name: next(others) for name in own} for own in kept]

    def _columns(self, tensors: Sequence[Tensor]) -> Columns:
        """Return the derivatives of ``tensors``, which have a graph, along every upper scalar, by double backward."""
        upper, outputs = self._oracle.upper_level.tensors, [x for x in tensors if x.requires_grad]
        if not outputs:
            return [None] * len(tensors)
        with torch.enable_grad():
            weights = [torch.zeros_like(x, requires_grad=True) for x in outputs]
            pulled = torch.autograd.grad(
                outputs, upper, grad_outputs=weights, create_graph=True, allow_unused=True, retain_graph=True
            )
        self._felt = [felt or g is not None for felt, g in zip(self._felt, pulled, strict=True)]
        columns: list[Columns] = []
        for _, index, place in self._directions():
            own = pulled[index]
            if own is None or not own.requires_grad:
                columns.append([None] * len(outputs))
                continue
            one = torch.zeros_like(own)
            one.view(-1)[place] = 1.0
            columns.append(list(torch.autograd.grad(own, weights, one, allow_unused=True, retain_graph=True)))
        found = iter(_stacked(columns, len(outputs)))
        return [next(found) if x.requires_grad else None for x in tensors]


def _pushed(
    step: Callable[..., tuple[Tensor, ...]], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return the derivative of ``step`` along every column; one by one where a step branches on values."""

    def along(*column: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.func.jvp(step, primals, column)[1]
        return found

    load_forward_rules()
    try:
        return torch.func.vmap(along)(*tangents)
    except RuntimeError:
        columns = [along(*column) for column in zip(*tangents, strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*columns, strict=True))


def _stacked(columns: Sequence[Columns], size: int) -> Columns:
    """Return, for each of ``size`` tensors, its tangents in one; None where all of them are zero."""
    found: Columns = []
    for i in range(size):
        some = next((column[i] for column in columns if column[i] is not None), None)
        if some is None:
            found.append(None)
            continue
        found.append(torch.stack([torch.zeros_like(some) if (x := column[i]) is None else x for column in columns]))
    return found
