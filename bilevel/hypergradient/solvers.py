"""Solvers of ``(H + damping I) x = b`` for a symmetric H that is known through its products alone.

A solver is a value: its numbers are its fields. Each returns the iterate that met the tolerance, never the one before,
and says how far it came. On the CPU an iteration that has converged ends; on an accelerator, where asking would wait
for the device, the remaining iterations run and leave the converged iterate as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import count, number
from ..processes.joined import agreed
from ..vectors import Tensors, add_scaled, dot, squared_norm, subtract

Product = Callable[[Tensors], Tensors]
Rates = Sequence[float | Tensor]


@dataclass(frozen=True)
class Solution:
    """What a solver found, as tensors on the device.

    Attributes:
        x: The iterate.
        iterations: Products with H that changed the iterate.
        residual: ``|b - (H + damping I) x| / |b|`` of this very iterate (0 for ``b = 0``).
        converged: Whether ``residual <= tolerance``.
        indefinite: Whether ``H + damping I`` is not positive definite along a direction that the iteration met; None:
            this solver does not look.
        damping: The damping that it ended with, and of which the residual speaks; None: the solver's own.
    """

    x: Tensors
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    indefinite: Tensor | None = None
    damping: Tensor | None = None


class Solver(ABC):
    """Solves ``(H + damping I) x = b``; subclasses are values with at least the fields ``iterations`` and
    ``damping``.
    """

    @abstractmethod
    def solve(self, product: Product, right: Tensors, start: Tensors | None, rates: Rates) -> Solution:
        """Solve with ``product(v) = H v`` from ``start`` (None: zero); ``rates`` are the lower learning rates.

        ``start`` is a guess of any quality: it may come from other variables, or be far worse than zero.
        """


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients, for a positive definite ``H + damping I``: at most ``n`` iterations for n distinct
    eigenvalues.

    Where a direction p shows that ``A = H + damping I`` has a negative eigenvalue, the damping is raised by ``2 |A p| /
    |p|``, with which p has positive curvature, and the iteration begins anew from where it is, without another product.
    So it goes on until no direction that it meets has negative curvature. The answer is that of the larger damping,
    ``Solution.damping``, and ``Solution.indefinite`` says so: train the lower level longer, or give the damping
    yourself. A direction with ``A p = 0``, up to rounding, ends the iteration instead, not converged: what is left of
    the right-hand side lies where A is flat, and no damping fits. A start that is no better than zero is dropped.

    Args:
        iterations: Most products with H, >= 1; default 20.
        tolerance: Relative residual at which it has converged, >= 0; default 1e-6, what float32 products can reach.
        damping: Added to H's diagonal, >= 0; default 0.

    Raises:
        TypeError, ValueError: A number is off.

    Example:
        >>> import torch, bilevel
        >>> solver = bilevel.ConjugateGradient(iterations=5)
        >>> found = solver.solve(lambda v: [2 * v[0]], [torch.tensor([2.0])], None, [0.1])  # 2 x = 2
        >>> found.x[0].item(), found.converged.item()
        (1.0, True)
    """

    iterations: int = 20
    tolerance: float = 1e-6
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check(self, self.iterations, self.damping)
        number("ConjugateGradient", "tolerance", self.tolerance, minimum=0.0)

    def solve(
        self,
        product: Product,
        right: Tensors,
        start: Tensors | None,
        rates: Rates,
        preconditioner: Product | None = None,
    ) -> Solution:
        """Run the iteration ``x += a p, r -= a (H + d) p`` with ``a = <r, z> / <p, (H + d) p>``, ``z = M r``.

        ``preconditioner`` is ``r -> M r`` for a symmetric positive definite M, the nearer to the inverse of ``H + d``
        the better; None: the identity.
        """
        damped = _damped(product, self.damping)
        scale = squared_norm(right)
        x, r = (_zeros_like(right), list(right)) if start is None else _better_start(damped, right, start, scale)
        z = r if preconditioner is None else preconditioner(r)
        p, rr = z, squared_norm(r)
        rz = rr if preconditioner is None else _positive(dot(r, z), rr)
        goal = self.tolerance**2 * scale
        zero, one = torch.zeros_like(rr), torch.ones_like(rr)
        taken, largest, raised = zero, zero, zero
        unit = max(torch.finfo(part.dtype).eps for part in right if part is not None)
        flat = torch.zeros_like(rr, dtype=torch.bool)
        for _ in range(self.iterations):
            active = (rr > goal) & ~flat
            if _may_ask(rr) and not agreed(bool(active)):
                break
            hp = add_scaled(damped(p), raised, p)
            curvature, length = dot(p, hp), squared_norm(p)
            along = curvature / torch.where(active & (length > 0), length, one)
            size = (squared_norm(hp) / torch.where(active & (length > 0), length, one)).sqrt()
            largest = torch.where(active, torch.maximum(largest, size), largest)
            curved = along > unit * largest
            # Of a semidefinite matrix size^2 <= largest * along.
            negative = active & ~curved & (size > 2 * unit**0.5 * largest)
            flat = flat | (active & ~curved & ~negative)
            steps = active & ~negative & ~flat
            a = torch.where(steps, rz / torch.where(steps, curvature, one), zero)
            # A product that is not finite says nothing about curvature: the iterate must not look as if it did.
            a = torch.where(torch.isfinite(curvature), a, torch.full_like(rr, float("nan")))
            x, r = add_scaled(x, a, p), add_scaled(r, -a, hp)
            more = torch.where(negative, 2 * size, zero)
            raised, r = raised + more, add_scaled(r, -more, x)
            z = r if preconditioner is None else preconditioner(r)
            shrunk = squared_norm(r)
            after = shrunk if preconditioner is None else _positive(dot(r, z), shrunk)
            p = add_scaled(z, torch.where(steps, after / torch.where(steps, rz, one), zero), p)
            rr, rz = torch.where(active, shrunk, rr), torch.where(active, after, rz)
            taken = taken + steps
        indefinite = (raised > 0) | (flat & (rr > goal))
        return Solution(x, taken, _relative(rr, scale), rr <= goal, indefinite, raised + self.damping)


@dataclass(frozen=True)
class Neumann(Solver):
    """The Neumann series ``x = a sum_{j <= n} (I - a (H + damping I))^j b``, for ``a < 2 / (largest eigenvalue)``.

    Args:
        iterations: n >= 0, the number of products with H; default 1, as in Betty. 0 gives ``a b``: the identity for H.
        rate: a > 0; default None, the lower learning rate of each variable's group.
        tolerance: Relative residual at which the series ends early, or None (default): it is then not measured before
            the end, which costs no product. The residual of the result always is: one product more.
        damping: Added to H's diagonal, >= 0; default 0.

    Raises:
        TypeError, ValueError: A number is off.

    Example:
        >>> import torch, bilevel
        >>> solver = bilevel.Neumann(iterations=2, rate=0.5)
        >>> solver.solve(lambda v: v, [torch.tensor([1.0])], None, [0.1]).x[0].item()  # 0.5 (1 + 1/2 + 1/4)
        0.875
    """

    iterations: int = 1
    rate: float | None = None
    tolerance: float | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check(self, self.iterations, self.damping, fewest=0, rate=self.rate)
        if self.tolerance is not None:
            number("Neumann", "tolerance", self.tolerance, minimum=0.0)

    def solve(self, product: Product, right: Tensors, start: Tensors | None, rates: Rates) -> Solution:
        """Run ``x += a (b - (H + d) x)``, which adds the next term of the series; it begins with ``a b``, so that a
        ``start`` means nothing to it.
        """
        rates = rates if self.rate is None else [self.rate] * len(right)
        damped = _damped(product, self.damping)
        return _stationary(damped, right, None, self.iterations, self.tolerance, rates, 0.0)


@dataclass(frozen=True)
class FixedPoint(Solver):
    """Fixed-point iteration of the adjoint of a lower step: ``p <- Phi_w^T p + b``, with ``x = a p`` solving ``H x =
    b``.

    ``Phi`` is gradient descent, or with ``momentum`` the heavy ball, whose buffer is then part of the adjoint's state.
    Contracts wherever the lower steps do. A start that is no better than zero is dropped for zero. Without momentum, n
    iterations from 0 are the Neumann series with n - 1.

    Args:
        iterations: n >= 1; default 20.
        rate: a > 0 of the lower step; default None, the lower learning rate of each variable's group.
        momentum: Of the heavy ball, in [0, 1); default 0.
        tolerance: Relative residual at which it has converged, >= 0; default 1e-6.
        damping: Added to H's diagonal, >= 0; default 0.

    Raises:
        TypeError, ValueError: A number is off.

    Example:
        >>> import torch, bilevel
        >>> solver = bilevel.FixedPoint(iterations=60, rate=0.5, tolerance=1e-5)
        >>> solver.solve(lambda v: v, [torch.tensor([1.0])], None, [0.1]).converged.item()
        True
    """

    iterations: int = 20
    rate: float | None = None
    momentum: float = 0.0
    tolerance: float = 1e-6
    damping: float = 0.0

    def __post_init__(self) -> None:
        _check(self, self.iterations, self.damping, rate=self.rate)
        number("FixedPoint", "tolerance", self.tolerance, minimum=0.0)
        number("FixedPoint", "momentum", self.momentum, minimum=0.0)
        if self.momentum >= 1:
            raise ValueError(
                f"FixedPoint(momentum={self.momentum}): must be below 1, or the iteration never contracts."
            )

    def solve(self, product: Product, right: Tensors, start: Tensors | None, rates: Rates) -> Solution:
        """Run the adjoint of the lower step; for a quadratic G it is the heavy ball on ``<x, H x>/2 - <b, x>``."""
        rates = rates if self.rate is None else [self.rate] * len(right)
        damped = _damped(product, self.damping)
        known = start is None  # the first iteration from 0
        return _stationary(damped, right, start, self.iterations - known, self.tolerance, rates, self.momentum)


def _stationary(
    product: Product,
    right: Tensors,
    start: Tensors | None,
    steps: int,
    tolerance: float | None,
    rates: Rates,
    momentum: float,
) -> Solution:
    """``v <- m v + (b - A x); x <- x + a v`` from rest at ``start``, or after its first step from 0, which is known."""
    scale = squared_norm(right)
    goal = (tolerance or 0.0) ** 2 * scale
    if start is None:
        x, v = _times(rates, right), list(right)
        r = subtract(right, product(x))
    else:
        v = _zeros_like(right)
        x, r = _better_start(product, right, start, scale)
    rr = squared_norm(r)
    taken = torch.zeros_like(rr)
    for _ in range(steps):
        active = rr > goal if tolerance is not None else torch.ones_like(rr, dtype=torch.bool)
        if _may_ask(rr) and not agreed(bool(active)):
            break
        v = add_scaled(r, momentum, v)
        x = add_scaled(x, active.to(rr.dtype), _times(rates, v))
        r = subtract(right, product(x))
        rr = squared_norm(r)
        taken = taken + active
    return Solution(x, taken, _relative(rr, scale), rr <= goal)


def _check(solver: Solver, iterations: int, damping: float, *, fewest: int = 1, rate: float | None = None) -> None:
    owner = type(solver).__name__
    count(owner, "iterations", iterations, minimum=fewest)
    number(owner, "damping", damping, minimum=0.0)
    if rate is not None:
        number(owner, "rate", rate, minimum=0.0, exclusive=True)


def _damped(product: Product, damping: float) -> Product:
    return product if damping == 0 else lambda v: add_scaled(product(v), damping, v)


def _times(rates: Rates, vector: Tensors) -> list[Tensor | None]:
    return [None if v is None else (v * rate).to(v.dtype) for rate, v in zip(rates, vector, strict=True)]


def _positive(product: Tensor, squared: Tensor) -> Tensor:
    """Return ``<r, M r>``, which is positive for the r of ``squared`` norm if M is a preconditioner.

    Else it is an error; on an accelerator NaN, as asking would wait.
    """
    if _may_ask(product) and bool((product <= 0) & (squared > 0)):
        raise ValueError(
            "ConjugateGradient.solve(preconditioner=...): is not positive definite: <r, M r> <= 0 for a residual r. "
            "It stands for the inverse of the Hessian at a minimum. Add a multiple of the identity."
        )
    return torch.where((product > 0) | (squared == 0), product, torch.full_like(product, float("nan")))


def _may_ask(value: Tensor) -> bool:
    """Whether reading a value costs nothing; on an accelerator it waits for the device."""
    return value.device.type == "cpu"


def _better_start(
    product: Product, right: Tensors, start: Tensors, scale: Tensor
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """``start`` and its residual, or zero and its: whichever is the smaller one, without asking the device.

    The last solution says nothing once the variables were set by hand, and no relative residual would ever be small
    for it where the right-hand side is zero.
    """
    found = subtract(right, product(start))
    better = squared_norm(found) < scale  # not so either where it is NaN
    x = [_if(better, s, None) for s in start]
    return x, [_if(better, r, b) for r, b in zip(found, right, strict=True)]


def _if(condition: Tensor, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    like = one if one is not None else other
    if like is None:
        return None
    zero = torch.zeros_like(like)
    where = condition.to(like.device, non_blocking=True)
    return torch.where(where, zero if one is None else one, zero if other is None else other)


def _zeros_like(vector: Tensors) -> list[Tensor | None]:
    return [None if v is None else torch.zeros_like(v) for v in vector]


def _relative(rr: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, (rr / torch.where(scale > 0, scale, torch.ones_like(scale))).sqrt(), rr.sqrt())
