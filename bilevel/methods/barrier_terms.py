"""What the multiplier is computed from at one point, and how ``check_directions`` gets the same another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..barrier import Products
from ..checking import Claim, shifted
from ..evaluation import Evaluation
from ..evaluator import Look
from ..vectors import Vector, add_scaled, dot

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


def gradient_claims(
    look: Look, terms: Terms, reading: ValueGradient, walk: Callable[[], list[Tensor]], up: Vector, low: Vector
) -> list[Claim]:
    """Directional derivatives of F, G and q along the probes ``up`` and ``low``, and Q itself.

    ``walk`` takes the inner steps from wherever the variables are and returns the inner point.
    """

    def along(h: Callable[[float], Tensor], upper: Vector, lower: Vector) -> Callable[[float], Tensor]:
        def value(size: float) -> Tensor:
            with shifted(look, size, upper, lower):
                return h(size)

        return value

    def q(size: float) -> Tensor:
        if reading == "unrolled":  # the walk starts anew from the shifted point
            end = walk()
        else:  # w_T is a constant, or carried along with w
            shift = size if reading == "difference" else 0.0
            end = [x.clone() for x in add_scaled(terms.inner_point, shift, low) if x is not None]
        return look.lower().value - look.lower(at=end).value

    def f(_: float) -> Tensor:
        return look.upper().value

    def g(_: float) -> Tensor:
        return look.lower().value

    still_up, still_low = [None] * len(up), [None] * len(low)
    q_slope = dot(terms.upper_gradient, up) + dot(terms.lower_gradient, low)
    return [
        Claim("<grad_alpha F, u>", dot(terms.upper.upper, up), along(f, up, still_low)),
        Claim("<grad_w F, u>", dot(terms.upper.lower, low), along(f, still_up, low)),
        Claim("<grad_alpha G, u>", dot(terms.lower.upper, up), along(g, up, still_low)),
        Claim("<grad_w G, u>", dot(terms.lower.lower, low), along(g, still_up, low)),
        Claim("<grad q, u> (both levels)", q_slope, along(q, up, low)),
        Claim("Q", terms.constraint, expected=look.lower().value - look.lower(at=walk()).value),
    ]


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
