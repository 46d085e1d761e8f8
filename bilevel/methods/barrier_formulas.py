"""The equations of the dynamic barrier by plain autograd, for ``check_directions``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..barrier import Barrier, Products
from ..checks.check import DIFFERENCE, Check, Same, Slope, Unknown
from ..checks.checker import Checker, loss_checks
from ..checks.plain import NoReference, Plain
from ..directions import Directions
from ..evaluation.evaluations import Evaluation
from ..hypergradient import ProductMode
from ..lower_steps import Rule
from ..vectors import Tensors, Vector, add_scaled, dot
from .bounded_barrier import Cone

ValueGradient = Literal["value_function", "difference", "unrolled"]


@dataclass(frozen=True)
class Terms:
    """f and G at the current point, the inner point, q and its gradients."""

    upper: Evaluation
    lower: Evaluation
    inner_point: Vector
    constraint: Tensor
    upper_gradient: Vector
    lower_gradient: Vector


def plain_terms(
    plain: Plain,
    definition: ValueGradient,
    rule: Callable[[], Rule],
    inner_steps: int,
    end: Callable[[], Tensors] | None = None,
) -> Terms:
    """The same by plain autograd, wherever the variables are now; ``end``: the inner point, if it is known.

    Raises:
        NoReference: The definition needs second derivatives, and plain autograd has none.
    """
    g = plain.lower()
    if end is None:
        inner_point, steps = plain.walk(rule(), inner_steps)
    else:
        inner_point, steps = plain.point().like(end()).clone(), []
    ahead = plain.lower(inner_point)
    through_upper = g.upper.like([None] * len(g.upper))
    moving = g.lower.like([None] * len(g.lower))  # grad_w G(w_T), as far as w_T moves with w
    if definition == "difference":
        moving = ahead.lower
    elif definition == "unrolled":
        through_upper, moving = plain.adjoint(rule(), steps, ahead.lower)
    f = plain.upper()
    upper = g.upper - ahead.upper - through_upper
    return Terms(f, g, inner_point, g.value - ahead.value, upper, g.lower - moving)


def value_checks(
    checker: Checker,
    plain: Plain,
    terms: Terms,
    definition: ValueGradient,
    rule: Callable[[], Rule],
    inner_steps: int,
    tolerance: float,
    *,
    differentiable: bool,
) -> Iterator[Check]:
    """Directional derivatives of q in both levels at once; ``terms`` are those of the method, and plain autograd is
    asked for the same where q is ``differentiable`` by it.
    """
    walked = plain.walk(rule(), inner_steps)[0]

    for up, low in checker.probes:

        def end(size: float, low: Tensors = low) -> Tensors | None:
            if definition == "unrolled":  # the walk starts anew from the shifted point
                return None
            # w_T is a constant, or carried along with w
            return add_scaled(walked, size if definition == "difference" else 0.0, low)

        def q(size: float, up: Tensors = up, low: Tensors = low, end: Callable[..., Tensors | None] = end) -> Tensor:
            with plain.shifted(size, up, low):
                here, point = plain.lower_value(), end(size)
                return here - plain.lower_value(plain.walk(rule(), inner_steps)[0] if point is None else point)

        def slope(
            size: float, up: Tensors = up, low: Tensors = low, end: Callable[..., Tensors | None] = end
        ) -> Tensor:
            with plain.shifted(size, up, low):
                point = end(size)
                at = plain_terms(plain, definition, rule, inner_steps, None if point is None else lambda: point)
                return dot(at.upper_gradient, up) + dot(at.lower_gradient, low)

        found = dot(terms.upper_gradient, up) + dot(terms.lower_gradient, low)
        yield Slope("<grad q, u> (both levels)", found, q, slope if differentiable else None, tolerance)


def plain_products(terms: Terms) -> Products:
    """Inner products from flattened gradients on the CPU, past the kernels of ``vectors``."""

    def product(a: Tensors, b: Tensors) -> Tensor:
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        return sum(((x.double() * y.double()).sum().cpu() for x, y in pairs), torch.zeros((), dtype=torch.float64))

    both = [*terms.upper_gradient, *terms.lower_gradient]
    return Products(
        upper=product(terms.upper.upper, terms.upper_gradient),
        lower=product(terms.upper.lower, terms.lower_gradient),
        squared_norm=product(both, both),
        value=terms.constraint.cpu(),
    )


class BarrierMethod(Protocol):
    """What the equations need to know of a method."""

    inner_steps: int
    value_gradient: ValueGradient
    product: ProductMode
    barrier: Barrier
    damping: float
    eps: float
    cutoff: float
    multiplier_max: float | None

    def cone(self, current: Vector, inner_point: Vector) -> Cone | None: ...

    @property
    def upper_names(self) -> tuple[str, ...]: ...

    @property
    def lower_names(self) -> tuple[str, ...]: ...

    def inner_rule(self) -> Rule: ...


def barrier_checks(method: BarrierMethod, checker: Checker, terms: Terms, answer: Directions[Any]) -> Iterator[Check]:
    """Gradients of F, G and q, Q, the multiplier and the directions that a method found, against plain autograd's."""
    by_difference = method.value_gradient == "unrolled" and method.product == "difference"
    loose = DIFFERENCE if by_difference else 0.0
    with checker.plain() as plain:
        plainly, reason = terms, ""
        try:
            plainly = plain_terms(plain, method.value_gradient, method.inner_rule, method.inner_steps)
        except NoReference as problem:
            reason = str(problem)
        yield from loss_checks(checker, plain, terms.upper, terms.lower)
        yield from value_checks(
            checker,
            plain,
            terms,
            method.value_gradient,
            method.inner_rule,
            method.inner_steps,
            loose,
            differentiable=not reason,
        )
        point = plain.point()
        q = plainly.lower.value - plain.lower_value(plain.walk(method.inner_rule(), method.inner_steps)[0])
    yield Same("Q", [terms.constraint], [q], size=float(plainly.lower.value.abs()))
    cone = method.cone(point, plainly.inner_point)
    if cone is None:
        weight, size = _plain_multiplier(method, plain_products(plainly))
    else:
        weight, size = _multiplier_by_bisection(method, plainly, cone)
    yield Same("multiplier", [answer.stats.multiplier], [weight], size=size, tolerance=loose)
    f = plainly.upper
    upper, lower = f.upper + weight * plainly.upper_gradient, f.lower + weight * plainly.lower_gradient
    upper, lower = (upper, lower) if cone is None else cone.descent(upper, lower)
    for side, names, gradient, part, found, expected in (
        ("upper", method.upper_names, f.upper, plainly.upper_gradient, answer.upper, upper),
        ("lower", method.lower_names, f.lower, plainly.lower_gradient, answer.lower, lower),
    ):
        direction = gradient.like(found.get(name) for name in names)
        if reason:
            yield Unknown(f"{side} direction", float(direction.norm()), reason)
        else:
            terms_size = float(gradient.norm()) + float(abs(weight) * part.norm())
            yield Same(f"{side} direction", direction, expected, size=terms_size, tolerance=loose)
    if answer.start is not None:
        yield Same("inner point", [answer.start[name] for name in method.lower_names], plainly.inner_point)


def _plain_multiplier(method: BarrierMethod, products: Products) -> tuple[Tensor, float]:
    """The multiplier as the equations have it, and the size of the terms that may cancel in it."""
    phi, total, squared = float(method.barrier(products)), float(products.total), float(products.squared_norm)
    found = max(phi - total, 0.0) / (squared + method.eps) if squared > method.cutoff else 0.0
    found = found if method.multiplier_max is None else min(found, method.multiplier_max)
    weight = torch.tensor(method.damping * found, dtype=torch.float64)
    return weight, method.damping * (abs(phi) + abs(total)) / (squared + max(method.eps, 1e-300))


def _multiplier_by_bisection(method: BarrierMethod, terms: Terms, cone: Cone) -> tuple[Tensor, float]:
    """The smallest multiplier whose direction lowers q by phi, and the size of the terms that may cancel in it."""
    f, q_upper, q_lower = terms.upper, terms.upper_gradient, terms.lower_gradient

    def falls(x: float) -> tuple[Tensor, Tensor]:
        """How much both levels lower q."""
        upper, lower = cone.descent(f.upper + x * q_upper, f.lower + x * q_lower)
        return q_upper.dot(upper).cpu(), q_lower.dot(lower).cpu()

    upper, lower = cone.descent(q_upper, q_lower)
    squared = float(upper.squared_norm()) + float(lower.squared_norm())
    whole = float(q_upper.squared_norm()) + float(q_lower.squared_norm())
    like = terms.constraint.cpu()
    products = Products(*falls(0.0), squared_norm=torch.full_like(like, squared), value=like)
    phi, total = float(method.barrier(products)), float(products.total)
    size = (abs(phi) + abs(total)) / (whole + max(method.eps, 1e-300))

    def enough(x: float) -> bool:
        return float(sum(falls(x))) + method.eps * x >= phi - 1e-13 * (abs(phi) + abs(total) + x * whole)

    low, high = 0.0, max(phi - total, 0.0) / (whole + method.eps) if whole > method.cutoff else 0.0
    limit = 1e12 * high
    while high > 0 and not enough(high) and high < limit:
        low, high = high, 2 * high
    for _ in range(200 if low > 0 else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    found = high if method.multiplier_max is None else min(high, method.multiplier_max)
    return torch.tensor(method.damping * found, dtype=torch.float64), method.damping * max(size, found)
