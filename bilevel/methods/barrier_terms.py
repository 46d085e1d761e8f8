"""What the multiplier is computed from at one point, and the same by plain autograd, for ``check_directions``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..barrier import Products
from ..checks.check_directions import Check
from ..checks.claims import Claim, Slope
from ..checks.plain import Plain
from ..evaluation.evaluations import Evaluation
from ..lower_steps import Point, Rule
from ..vectors import Vector, add_scaled, dot, subtract

ValueGradient = Literal["value_function", "difference", "unrolled"]


@dataclass(frozen=True)
class Terms:
    """f and G at the current point, the inner point, q and its gradients."""

    upper: Evaluation
    lower: Evaluation
    inner_point: list[Tensor]
    constraint: Tensor
    upper_gradient: Vector
    lower_gradient: Vector


def plain_terms(
    plain: Plain,
    reading: ValueGradient,
    rule: Callable[[], Rule],
    inner_steps: int,
    end: Callable[[], Point] | None = None,
) -> Terms:
    """The same by plain autograd, wherever the variables are now; ``end``: the inner point, if it is known.

    Raises:
        NoReference: The reading needs second derivatives, and plain autograd has none.
    """
    g = plain.lower()
    if end is None:
        inner_point, steps = plain.walk(rule(), inner_steps)
    else:
        inner_point, steps = [x.detach().clone() for x in end()], []
    ahead = plain.lower(at=inner_point)
    through_upper: Vector = [None] * len(g.upper)
    moving: Vector = [None] * len(g.lower)  # grad_w G(w_T), as far as w_T moves with w
    if reading == "difference":
        moving = ahead.lower
    elif reading == "unrolled":
        through_upper, moving = plain.adjoint(rule(), steps, ahead.lower)
    upper = add_scaled(subtract(g.upper, ahead.upper), -1.0, through_upper)
    f = plain.upper()
    return Terms(f, g, inner_point, g.value - ahead.value, upper, subtract(g.lower, moving))


def value_claims(
    check: Check,
    plain: Plain,
    terms: Terms,
    reading: ValueGradient,
    rule: Callable[[], Rule],
    inner_steps: int,
    tolerance: float,
    *,
    differentiable: bool,
) -> Iterator[Claim]:
    """Directional derivatives of q in both levels at once; ``terms`` are those of the method, and plain autograd is
    asked for the same where q is ``differentiable`` by it.
    """
    walked = plain.walk(rule(), inner_steps)[0]

    for up, low in check.probes:

        def end(size: float, low: Vector = low) -> Point | None:
            if reading == "unrolled":  # the walk starts anew from the shifted point
                return None
            # w_T is a constant, or carried along with w
            return [x for x in add_scaled(walked, size if reading == "difference" else 0.0, low) if x is not None]

        def q(size: float, up: Vector = up, low: Vector = low, end: Callable[..., Point | None] = end) -> Tensor:
            with plain.shifted(size, up, low):
                here, point = plain.lower_value(), end(size)
                return here - plain.lower_value(at=plain.walk(rule(), inner_steps)[0] if point is None else point)

        def slope(size: float, up: Vector = up, low: Vector = low, end: Callable[..., Point | None] = end) -> Tensor:
            with plain.shifted(size, up, low):
                point = end(size)
                at = plain_terms(plain, reading, rule, inner_steps, None if point is None else lambda: point)
                return dot(at.upper_gradient, up) + dot(at.lower_gradient, low)

        found = dot(terms.upper_gradient, up) + dot(terms.lower_gradient, low)
        yield Slope("<grad q, u> (both levels)", found, q, slope if differentiable else None, tolerance)


def plain_products(terms: Terms) -> Products:
    """Inner products from flattened gradients on the CPU, past the kernels of ``vectors``."""

    def product(a: Vector, b: Vector) -> Tensor:
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        return sum(((x.double() * y.double()).sum().cpu() for x, y in pairs), torch.zeros((), dtype=torch.float64))

    both = [*terms.upper_gradient, *terms.lower_gradient]
    return Products(
        upper=product(terms.upper.upper, terms.upper_gradient),
        lower=product(terms.upper.lower, terms.lower_gradient),
        squared_norm=product(both, both),
        value=terms.constraint.cpu(),
    )
