r"""The dynamic barrier where variables are bounded: its quadratic program on the tangent cone.

Let T be the cone of the directions in which both levels can move from the current point and stay in their sets. The
descent direction d, along which the levels move by ``-d``, solves::

    min |d - grad f|^2   s.t.  <grad q, d> >= phi,  -d in T

For a fixed multiplier of the inequality the minimum over T is a projection, so that::

    d(lambda) = -P_T(-(grad f + lambda grad q))
    lambda    = min {lambda >= 0 : h(lambda) + eps lambda >= phi},   h(lambda) = <grad q, d(lambda)>

Inside the sets T is the whole space, h is linear, and this is the closed form of :mod:`bilevel.barrier`. At a bound it
is not: that form would ask of a variable to lower q that cannot move, or leave one alone that f pulls off a bound at
which q holds it. h rises monotonically, no faster than ``|grad q|^2``, and is piecewise linear for a polyhedral T. What
a barrier sees are the same products: of ``grad q`` with ``d(0)``, and ``|P_T(-grad q)|^2``, the most that q can fall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..barrier import Barrier, Products
from ..feasible import FeasibleSet
from ..vectors import Vector, dot

Slope = Callable[[Tensor], Tensor]
# Of the search: how many slopes it may ask for (where asking the device would wait, it asks for all of them), how
# exact it is relative to the terms that are summed, and how far above its lower bound a multiplier may be.
ITERATIONS = 60
EXACT = 1e-13
FARTHEST = 1e12


@dataclass(frozen=True)
class Cone:
    """The directions in which the levels can move from a point."""

    upper: FeasibleSet
    lower: FeasibleSet
    upper_at: Vector
    lower_at: Vector

    def descent(self, upper: Vector, lower: Vector) -> tuple[Vector, Vector]:
        """Return ``-P_T(-d)``: what of a descent direction does not leave the sets."""
        return (
            -self.upper.tangent(self.upper_at, -upper) if self.upper.bounded else upper,
            -self.lower.tangent(self.lower_at, -lower) if self.lower.bounded else lower,
        )


@dataclass(frozen=True)
class Gradients:
    """Those of f and of q, in both levels."""

    f_upper: Vector
    f_lower: Vector
    q_upper: Vector
    q_lower: Vector

    @property
    def f_squared(self) -> Tensor:
        return _sum(self.f_upper.squared_norm(), self.f_lower.squared_norm())

    @property
    def q_squared(self) -> Tensor:
        return _sum(self.q_upper.squared_norm(), self.q_lower.squared_norm())


def cone_products(cone: Cone, at: Gradients, products: Products) -> Products:
    """Return the products of a barrier with what the cone leaves of the directions."""
    upper, lower = cone.descent(at.f_upper, at.f_lower)
    q_upper, q_lower = cone.descent(at.q_upper, at.q_lower)
    like = products.squared_norm
    return replace(
        products,
        upper=at.q_upper.dot(upper).to(like.device),
        lower=at.q_lower.dot(lower).to(like.device),
        squared_norm=_sum(q_upper.squared_norm(), q_lower.squared_norm()).to(like.device),
    )


def cone_multiplier(
    barrier: Barrier,
    products: Products,
    cone: Cone,
    at: Gradients,
    *,
    eps: float,
    cutoff: float,
    maximum: float | None,
) -> Tensor:
    """Return the multiplier, a 0-dim tensor; ``products`` are those of :func:`cone_products`.

    eps, the cutoff (of the whole ``|grad q|^2``: nothing holds a variable against f where that is 0), the maximum and
    what is not finite are treated as by :func:`bilevel.barrier.multiplier`.
    """
    phi = barrier(products)
    squared = at.q_squared.to(phi.device)
    unfit = 0.0 * products.total + 0.0 * squared + 0.0 * products.value
    reach = (squared * at.f_squared.to(phi.device)).sqrt()
    slope = slope_of(cone, at)
    found = smallest(
        lambda x: slope(x).to(phi.device) + eps * x,
        phi,
        steepest=squared + eps,
        flattest=products.squared_norm + eps,
        reach=reach,
        beginning=products.total,
    )
    if maximum is not None:
        found = found.clamp(max=maximum)
    return torch.where(squared <= cutoff, torch.zeros_like(found), found) + unfit


def slope_of(cone: Cone, at: Gradients) -> Slope:
    """Return h. Of the variables that are free it is linear, and known before the search begins."""
    levels = [
        (cone.upper, cone.upper_at, at.f_upper, at.q_upper),
        (cone.lower, cone.lower_at, at.f_lower, at.q_lower),
    ]
    constant, linear = torch.zeros_like(at.q_squared), torch.zeros_like(at.q_squared)
    for feasible, _, f, q in levels:
        free = [i for i in range(len(f)) if i not in set(feasible.places)]
        f_free, q_free = [f[i] for i in free], [q[i] for i in free]
        constant, linear = _sum(constant, dot(f_free, q_free)), _sum(linear, dot(q_free, q_free))

    def bounded(vector: Vector, feasible: FeasibleSet) -> Vector:
        places = set(feasible.places)
        return vector.like(x if i in places else None for i, x in enumerate(vector))

    held = [
        (feasible, point, bounded(f, feasible), bounded(q, feasible))
        for feasible, point, f, q in levels
        if feasible.bounded
    ]

    def slope(multiplier: Tensor) -> Tensor:
        total = constant + multiplier.to(constant.device) * linear
        for feasible, point, f, q in held:
            total = _sum(total, -q.dot(feasible.tangent(point, -(f + multiplier * q))))
        return total

    return slope


def smallest(
    slope: Slope, phi: Tensor, *, steepest: Tensor, flattest: Tensor, reach: Tensor, beginning: Tensor
) -> Tensor:
    """Return the smallest x >= 0 with ``slope(x) >= phi``, for a slope that rises no faster than ``steepest``.

    Args:
        slope: A non-decreasing function.
        phi: What it is to reach.
        steepest: Its largest derivative.
        flattest: Its derivative far away; with ``reach`` it bounds x from above.
        reach: ``slope(x) >= flattest x - reach``.
        beginning: ``slope(0)``.
    """
    excess = phi - beginning
    positive = torch.ones_like(phi)
    low = torch.relu(excess) / torch.where(steepest > 0, steepest, positive)
    high = torch.where(flattest > 0, (phi + reach) / torch.where(flattest > 0, flattest, positive), torch.inf)
    high = torch.maximum(torch.minimum(high, FARTHEST * low), low)
    below, above = slope(low) - phi, slope(high) - phi
    side = torch.zeros_like(phi)
    for index in range(ITERATIONS):
        noise = EXACT * (phi.abs() + reach + low * steepest)
        met = below >= -noise
        if phi.device.type == "cpu" and bool(met | (high - low <= EXACT * high)):
            break
        # Regula falsi (Illinois), and now and then the middle of the orders of magnitude.
        rise = above - below
        chord = low - below * (high - low) / torch.where(rise > 0, rise, positive)
        middle = (low * high).sqrt() if index % 3 == 2 else chord
        guess = torch.where(met, low, torch.minimum(torch.maximum(middle, low), high))
        value = slope(guess) - phi
        enough = value >= -EXACT * (phi.abs() + reach + guess * steepest)
        high, above = torch.where(enough, guess, high), torch.where(enough, value, above)
        low, below = torch.where(enough, low, guess), torch.where(enough, below, value)
        now = torch.where(enough, 1.0, -1.0).to(side.dtype)
        again = now == side
        below = torch.where(again & enough, below / 2, below)
        above = torch.where(again & ~enough, above / 2, above)
        side = now
    noise = EXACT * (phi.abs() + reach + low * steepest)
    found = torch.where(slope(low) - phi >= -noise, low, high)
    return torch.where(excess > 0, found, torch.zeros_like(found))


def _sum(*terms: Tensor) -> Tensor:
    """Add numbers that may live on several devices."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device, non_blocking=True)
    return total
