"""Projected BFGS: descent on a function of few variables in a box, or by projected gradients in any convex set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sets import Space

Function = Callable[[Tensor], tuple[float, Tensor]]

DENSE = 64  # up to so many variables the inverse Hessian is a matrix, beyond it a list of pairs
PAIRS = 20
TRIALS = 20  # of step lengths in one line search
ARMIJO, WOLFE = 1e-4, 0.9


@dataclass
class InverseHessian:
    """An estimate of the inverse Hessian from the steps of a descent; it serves the next one as well."""

    size: int
    matrix: Tensor | None = None
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def known(self) -> bool:
        """Whether any step told something."""
        return self.matrix is not None or bool(self.pairs)

    def forget(self) -> None:
        """Begin anew: the function has changed."""
        self.matrix, self.pairs = None, []

    def copy(self) -> InverseHessian:
        """Return one that may be changed alone."""
        return InverseHessian(self.size, None if self.matrix is None else self.matrix.clone(), list(self.pairs))

    def times(self, gradient: Tensor, free: Tensor) -> Tensor:
        """Return the estimate of the free entries, times the gradient: Bertsekas' two-metric projection."""
        masked = gradient * free
        if self.matrix is not None:
            return (self.matrix @ masked) * free
        q, weights = masked.clone(), []
        pairs = [(s * free, y * free) for s, y in self.pairs]
        pairs = [(s, y) for s, y in pairs if float(s @ y) > 0]
        for s, y in reversed(pairs):
            weights.append(float(s @ q) / float(s @ y))
            q -= weights[-1] * y
        if pairs:
            s, y = pairs[-1]
            q *= float(s @ y) / float(y @ y)
        for (s, y), weight in zip(pairs, reversed(weights), strict=True):
            q += (weight - float(y @ q) / float(s @ y)) * s
        return q * free

    def update(self, s: Tensor, y: Tensor) -> None:
        """Learn from a step and the change of the gradient along it, unless the curvature there is not positive."""
        curvature = float(s @ y)
        if not curvature > 1e-10 * float(s.norm() * y.norm()):
            return
        if self.size > DENSE:
            self.pairs = [*self.pairs[-PAIRS + 1 :], (s, y)]
            return
        if self.matrix is None:
            self.matrix = torch.eye(self.size, dtype=torch.float64) * (curvature / float(y @ y))
        hy = self.matrix @ y
        outer = torch.outer(s, hy)
        scale = (1 + float(y @ hy) / curvature) / curvature
        self.matrix = self.matrix + scale * torch.outer(s, s) - (outer + outer.T) / curvature


@dataclass
class Descent:
    """Where a descent ended.

    Attributes:
        x: The best point.
        value: The function there.
        gradient: Its gradient there.
        steps: How many were taken.
        stationary: Whether the projected gradient is within the tolerance; if not, no step went on, or there were
            enough.
    """

    x: Tensor
    value: float
    gradient: Tensor
    steps: int
    stationary: bool


def descend(
    function: Function,
    start: Tensor,
    space: Space,
    *,
    tolerance: float,
    steps: int,
    inverse: InverseHessian | None = None,
    wolfe: bool = False,
    progress: float = 0.0,
) -> Descent:
    """Minimise a function from a start, by BFGS in a box and by projected gradients in another set.

    Args:
        function: Returns the value, and the gradient as a flat vector; not finite: the point is not taken.
        start: Flat; it is projected.
        space: Where the variables stay.
        tolerance: Of the projected gradient's largest entry.
        steps: Most steps.
        inverse: What is known of the inverse Hessian; it is changed.
        wolfe: Whether a step is lengthened until the slope has fallen, as functions with kinks want it (Lewis and
            Overton, 2013).
        progress: It ends where two steps after each other gain less than this, relative to 1 + the value's size.
    """
    x = space.project(start)
    value, gradient = function(x)
    inverse = InverseHessian(space.size) if inverse is None else inverse
    idle, barzilai, refused = 0, 1.0, False
    for step in range(steps):
        if not math.isfinite(value) or space.stationarity(x, gradient) <= tolerance:
            return Descent(x, value, gradient, step, math.isfinite(value))
        free = space.movable(x, gradient)
        if space.is_box:
            direction = -inverse.times(gradient, free) if inverse.known else -gradient * free
            if not float(direction @ gradient) < 0 or not bool(direction.isfinite().all()):
                inverse.forget()
                direction = -gradient * free
            length = 1.0 if inverse.known else min(1.0, 1.0 / float(direction.abs().max()))
        else:
            direction, length = space.project(x - barzilai * gradient) - x, 1.0
        found = _line_search(function, x, value, gradient, direction, length, space, wolfe=wolfe)
        if found is None:
            if inverse.known and not refused:
                inverse.forget()
                refused = True
                continue
            return Descent(x, value, gradient, step, False)
        refused = False
        moved, new_value, new_gradient = found
        s, y = moved - x, new_gradient - gradient
        inverse.update(s, y)
        curvature = float(s @ y)
        barzilai = float(s @ s) / curvature if curvature > 0 else 1.0
        idle = idle + 1 if value - new_value <= progress * (1 + abs(value)) else 0
        x, value, gradient = moved, new_value, new_gradient
        if progress > 0 and idle >= 2:
            return Descent(x, value, gradient, step + 1, space.stationarity(x, gradient) <= tolerance)
    return Descent(x, value, gradient, steps, space.stationarity(x, gradient) <= tolerance)


def _line_search(
    function: Function,
    x: Tensor,
    value: float,
    gradient: Tensor,
    direction: Tensor,
    length: float,
    space: Space,
    *,
    wolfe: bool,
) -> tuple[Tensor, float, Tensor] | None:
    """Find a step along the projected arc that lowers the function enough; None: there is none."""
    low, high = 0.0, math.inf
    best: tuple[Tensor, float, Tensor] | None = None
    rounding = 1e-14 * (1 + abs(value))
    for _ in range(TRIALS):
        moved = space.project(x + length * direction)
        s = moved - x
        if float(s.abs().max()) <= 1e-15 * (1 + float(x.abs().max())):
            return best
        slope = float(gradient @ s)
        new_value, new_gradient = function(moved)
        finite = math.isfinite(new_value) and bool(new_gradient.isfinite().all())
        enough = finite and new_value <= value + ARMIJO * slope
        if finite and not enough and abs(slope) <= rounding and new_value <= value + rounding:
            # Too small a change to be seen in the value: the gradient decides.
            enough = space.stationarity(moved, new_gradient) < space.stationarity(x, gradient)
        if enough:
            if best is None or new_value <= best[1]:
                best = (moved, new_value, new_gradient)
            flat = not wolfe or float(new_gradient @ s) >= WOLFE * slope
            if flat or length > 1e3:
                return best
            low = length
        else:
            high = length
        if high == math.inf:
            length = 2 * low
        elif low > 0:
            length = 0.5 * (low + high)
            if high - low < 0.05 * high:
                return best
        else:
            # The minimiser of the parabola through both values and the slope.
            bend = new_value - value - slope
            guess = -0.5 * slope / bend if finite and bend > 0 else 0.25
            length *= min(max(guess, 0.1), 0.5)
    return best
