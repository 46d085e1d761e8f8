"""Upper directions by plain autograd, from which ``check_directions`` gives its verdicts about sequential methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks.check import Check, Measured, Slope, Unknown
from ..checks.checker import Checker
from ..checks.plain import NoReference, Plain
from ..hypergradient import through_start
from ..lower_steps import Rule
from ..vectors import Tensors, Vector, add_scaled, dot, squared_norm, subtract

GraphStart = Callable[[], list[Tensor]] | None


@dataclass(frozen=True)
class Formula:
    """An upper direction by plain autograd, and the size of the terms that it was summed from."""

    upper: Vector
    size: float


def summed(gradient: Vector, scale: float, through: Vector) -> Formula:
    """``gradient + scale through``: F's own gradient and the part through the lower level."""
    size = float(gradient.norm()) + abs(scale) * float(through.norm())
    return Formula(gradient + scale * through, size)


def derivative(plain: Plain, rule: Rule, steps: int, *, last: int | None = None, start: GraphStart = None) -> Formula:
    """The derivative of F after virtual lower steps, back through all or the ``last`` of them and to their start.

    Raises:
        NoReference: Plain autograd has no second derivative of the lower loss.
    """
    first = None if start is None else start()
    end, taken = plain.walk(rule, steps, start=None if first is None else [x.detach() for x in first])
    f = plain.upper(end)
    through, bars = plain.adjoint(rule, taken if last is None else taken[-last:], f.lower)
    if first is not None:
        through = through + through_start(first, plain.upper_level.tensors, bars)
    return summed(f.upper, 1.0, through)


def derivative_checks(
    checker: Checker,
    rule: Callable[[], Rule],
    steps: int,
    upper: Tensors,
    *,
    exact: bool,
    compared: bool,
    tolerance: float = 0.0,
    start: GraphStart = None,
) -> Iterator[Check]:
    """The total derivative of F after virtual lower steps: an exact method's number, or how far the others are from it.

    ``compared``: whether the method's own number is what is compared with differences, or that of plain autograd.
    """
    name = "<dF/dalpha, u>" if exact else f"exact {steps}-step <dF/dalpha, u>"
    with checker.plain() as plain:
        still = [None] * len(plain.lower_level.names)
        reference: Tensors | None = None
        try:
            reference = derivative(plain, rule(), steps, start=start).upper
        except NoReference as problem:
            if not exact:
                yield Unknown(name, float("nan"), str(problem))
                return
        for up, _ in checker.probes:

            def along(size: float, up: Tensors = up) -> Tensor:
                with plain.shifted(size, up, still):
                    first = None if start is None else [x.detach() for x in start()]
                    return plain.upper_value(plain.walk(rule(), steps, start=first)[0])

            def slope(size: float, up: Tensors = up) -> Tensor:
                with plain.shifted(size, up, still):
                    return dot(derivative(plain, rule(), steps, start=start).upper, up)

            computed = upper if compared or reference is None else reference
            yield Slope(name, dot(computed, up), along, None if reference is None else slope, tolerance)
    if not exact and reference is not None:
        size = squared_norm(reference).sqrt()
        yield Measured("cosine with it", dot(upper, reference) / (squared_norm(upper).sqrt() * size), 1.0)
        yield Measured("relative error", squared_norm(subtract(upper, reference)).sqrt() / size, 0.0)


def central_difference(plain: Plain, batch: int, direction: Tensors, radius: float) -> Vector:
    """``(grad_alpha G(w + e v) - grad_alpha G(w - e v)) / 2e`` with ``e = radius / |v|``, of plain gradients."""
    length = float(squared_norm(direction).sqrt())
    if length == 0:
        return Vector([None] * len(plain.upper_level.names), plain.upper_level.names)
    e = radius / length
    v = plain.point().like(direction)
    ahead, behind = (plain.lower(plain.point() + sign * e * v, batch=batch).upper for sign in (1.0, -1.0))
    return (0.5 / e) * (ahead - behind)


def difference_checks(checker: Checker, plain: Plain, batch: int, direction: Tensors) -> Iterator[Check]:
    """Whether a difference of ``grad_alpha G`` along ``direction`` is, for a small radius, its derivative."""
    length = squared_norm(direction).sqrt()
    size = sum(x.numel() for x in direction if x is not None) ** 0.5
    along_w = add_scaled([None] * len(direction), size / torch.where(length > 0, length, 1.0), direction)
    still = [None] * len(plain.upper_level.names)
    for up, _ in checker.probes:

        def gradient(shift: float, up: Tensors = up) -> Tensor:
            with plain.shifted(shift, still, along_w):
                return dot(plain.lower(batch=batch).upper, up)

        def product(shift: float, up: Tensors = up) -> Tensor:
            with plain.shifted(shift, still, along_w):
                return dot(plain.product(along_w, batch=batch)[0], up)

        try:
            now = product(0.0)
        except NoReference as problem:
            yield Unknown("its difference, small radius", float("nan"), str(problem))
            return
        yield Slope("its difference, small radius", now, gradient, product, by_differences=True)
