"""Sets that variables stay in, as projections: a box, a simplex, a ball, one of your own, one over several tensors.

A projection maps a tensor to the nearest point of a closed convex set. A value of this module is such a map, and knows
the directions in which its set can be left at a point; any other function from tensor to tensor serves as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import message, number

Project = Callable[[Tensor], Tensor]


class Projection(ABC):
    """The nearest point of a closed convex set, for one tensor.

    Any callable from tensor to tensor is a projection as well. What a subclass can add is :meth:`tangent` in closed
    form.

    Example:
        >>> import torch
        >>> from bilevel.projection import Projection
        >>> class HalfSpace(Projection):  # sum(x) <= 1
        ...     def __call__(self, x):
        ...         return x - (x.sum() - 1).clamp(min=0) / x.numel()
        >>> HalfSpace()(torch.tensor([2.0, 1.0]))
        tensor([1., 0.])
    """

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return the point of the set that is nearest to ``x``, out of place and by differentiable operations."""

    def tangent(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return the nearest direction along which ``x``, a point of the set, can move and stay in it.

        That is the projection on the tangent cone at x, which is the derivative of the projection at x along the
        direction. By default it is taken by a difference, good to about the root of the rounding unit.
        """
        (found,) = tangent_by_difference(lambda points: [self(points[0])], [x], [direction])
        return found


class JointProjection(ABC):
    """The nearest point of a closed convex set of several tensors together: a budget that layers share, weight sharing.

    Example:
        >>> import torch
        >>> from bilevel.projection import JointProjection
        >>> class Equal(JointProjection):
        ...     def project(self, tensors):
        ...         mean = torch.stack(list(tensors)).mean(0)
        ...         return [mean for _ in tensors]
        >>> Equal().project([torch.tensor(1.0), torch.tensor(3.0)])
        [tensor(2.), tensor(2.)]
    """

    @abstractmethod
    def project(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the nearest point, a tensor for each that is given: out of place, by differentiable operations."""


Projections = Project | JointProjection | Mapping[Hashable, Project | JointProjection]


@dataclass(frozen=True, eq=False)
class Box(Projection):
    """``lower <= x <= upper``, entry by entry.

    Args:
        lower: A number, or a tensor that broadcasts to the variable; None (default): no bound on this side.
        upper: The same.

    Raises:
        TypeError, ValueError: A bound is no number or NaN, there is none, or a lower one is above its upper one.

    Example:
        >>> import torch, bilevel
        >>> bilevel.projection.Box(0.0, 1.0)(torch.tensor([-1.0, 0.5, 2.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    lower: float | Tensor | None = None
    upper: float | Tensor | None = None

    def __post_init__(self) -> None:
        if self.lower is None and self.upper is None:
            raise ValueError("Box(lower=None): needs a bound on one side at least. Leave the projection out instead.")
        bounds = [_bound("Box", name, value) for name, value in (("lower", self.lower), ("upper", self.upper))]
        if bounds[0] is not None and bounds[1] is not None and bool((bounds[0] > bounds[1].to(bounds[0].device)).any()):
            raise ValueError(message("Box", "lower", self.lower, "is above upper somewhere. Were they exchanged?"))

    def __call__(self, x: Tensor) -> Tensor:
        # By where: clamp, maximum and minimum disagree about the derivative at a bound. Here it is 1 there, as inside.
        low, high = self._bounds(x)
        found = x if low is None else torch.where(x < low, low, x)
        return found if high is None else torch.where(x > high, high, found)

    def tangent(self, x: Tensor, direction: Tensor) -> Tensor:
        """Without the entries that point out of the box at a bound."""
        low, high = self._bounds(x)
        found = direction
        if low is not None:
            found = torch.where(x <= low, found.clamp(min=0.0), found)
        if high is not None:
            found = torch.where(x >= high, found.clamp(max=0.0), found)
        return found

    def _bounds(self, x: Tensor) -> list[Any]:
        return [_beside(b, x) for b in (self.lower, self.upper)]


@dataclass(frozen=True)
class Simplex(Projection):
    """``x >= 0`` with ``x.sum(dim) == radius``: each slice along ``dim`` is a distribution.

    Args:
        dim: The dimension that is summed over; default -1.
        radius: The sum, > 0; default 1.

    Raises:
        TypeError, ValueError: A number is off.

    Example:
        >>> import torch, bilevel
        >>> bilevel.projection.Simplex()(torch.tensor([1.0, 0.5, -3.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """

    dim: int = -1
    radius: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise TypeError(message("Simplex", "dim", self.dim, "must be an integer."))
        number("Simplex", "radius", self.radius, minimum=0.0, exclusive=True)

    def __call__(self, x: Tensor) -> Tensor:
        # A shift along (1, ..., 1) changes nothing but rounding.
        x = x - x.detach().amax(self.dim, keepdim=True)
        decreasing = x.sort(self.dim, descending=True).values
        excess = decreasing.cumsum(self.dim) - self.radius
        support = (decreasing * self._ranks(x) > excess).sum(self.dim, keepdim=True).clamp(min=1)
        threshold = excess.gather(self.dim, support - 1) / support
        return torch.relu(x - threshold)  # relu has derivative 0 at 0, where an entry is outside the support

    def tangent(self, x: Tensor, direction: Tensor) -> Tensor:
        """The nearest direction of sum 0 that is not negative where x is 0, up to rounding."""
        free = x > 4 * torch.finfo(x.dtype).eps * self.radius
        # As in the projection itself, with the free entries always in the support.
        order = torch.where(free, torch.inf, direction).argsort(self.dim, descending=True)
        total, ranks = direction.gather(self.dim, order).cumsum(self.dim), self._ranks(x)
        inside = free.gather(self.dim, order) | (direction.gather(self.dim, order) * ranks > total)
        support = inside.sum(self.dim, keepdim=True).clamp(min=1)
        moved = direction - total.gather(self.dim, support - 1) / support
        return torch.where(free, moved, moved.clamp(min=0.0))

    def _ranks(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return torch.arange(1, x.shape[self.dim] + 1, dtype=x.dtype, device=x.device).view(shape)


@dataclass(frozen=True, eq=False)
class Ball(Projection):
    """``|x - center| <= radius`` in the Euclidean norm over all entries of a tensor.

    Args:
        radius: > 0.
        center: A number, or a tensor that broadcasts to the variable; default 0.

    Raises:
        TypeError, ValueError: A number is off.

    Example:
        >>> import torch, bilevel
        >>> bilevel.projection.Ball(5.0)(torch.tensor([6.0, 8.0]))
        tensor([3., 4.])
    """

    radius: float
    center: float | Tensor = 0.0

    def __post_init__(self) -> None:
        number("Ball", "radius", self.radius, minimum=0.0, exclusive=True)
        center = _bound("Ball", "center", self.center)
        if center is None or not bool(center.isfinite().all()):
            raise ValueError(message("Ball", "center", self.center, "must be finite."))

    def __call__(self, x: Tensor) -> Tensor:
        offset = x - self._center(x)
        # Beyond the radius only: inside the point is returned as it is.
        length = torch.linalg.vector_norm(offset)
        return torch.where(length > self.radius, x - offset * (1 - self.radius / length.clamp(min=self.radius)), x)

    def tangent(self, x: Tensor, direction: Tensor) -> Tensor:
        """Without the part that points outwards, where x is on the sphere up to rounding."""
        offset = x - self._center(x)
        length = torch.linalg.vector_norm(offset)
        scale = torch.linalg.vector_norm(x) + self.radius  # of what was rounded
        on_sphere = length >= self.radius - 4 * torch.finfo(x.dtype).eps * scale
        normal = offset / length.clamp(min=torch.finfo(x.dtype).tiny)
        outwards = (normal * direction).sum().clamp(min=0.0)
        return torch.where(on_sphere, direction - outwards * normal, direction)

    def _center(self, x: Tensor) -> Any:
        return _beside(self.center, x)


def tangent_by_difference(
    project: Callable[[Sequence[Tensor]], Sequence[Tensor]], points: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor]:
    """Return ``(P(x + e u) - x) / e`` for a small e: the projection of u on the tangent cone at x."""
    unit = max(torch.finfo(x.dtype).eps for x in points)
    sizes = [u.detach().abs().amax() if u.numel() else u.new_zeros(()) for u in directions]
    scales = [x.detach().abs().amax() if x.numel() else x.new_zeros(()) for x in points]
    size = torch.stack([s.to(sizes[0].device, sizes[0].dtype) for s in sizes]).amax()
    scale = torch.stack([s.to(scales[0].device, scales[0].dtype) for s in scales]).amax().clamp(min=1.0)
    step = unit**0.5 * scale / torch.where(size > 0, size, 1.0)
    ahead = [x + (step.to(x.device) * u).to(x.dtype) for x, u in zip(points, directions, strict=True)]
    landed = project(ahead)
    found = [(y - x) / step.to(x.device, x.dtype) for y, x in zip(landed, points, strict=True)]
    # What the projection leaves as it is moves freely: without the rounding of the difference.
    kept = zip(landed, ahead, directions, found, strict=True)
    return [torch.where(y == z, u, v).to(u.dtype) for y, z, u, v in kept]


def _beside(value: float | Tensor | None, x: Tensor) -> Any:
    """Return a tensor where ``x`` is; a number stays one, which no device has to wait for."""
    return value.detach().to(x.device, x.dtype, non_blocking=True) if isinstance(value, Tensor) else value


def _bound(owner: str, argument: str, value: Any) -> Tensor | None:
    """Check a number or a tensor of numbers, which may be infinite."""
    if value is None:
        return None
    if isinstance(value, Tensor) and value.is_floating_point():
        found = value.detach()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        found = torch.tensor(float(value), dtype=torch.float64)
    else:
        raise TypeError(message(owner, argument, value, "must be a number or a floating-point tensor."))
    if bool(found.isnan().any()):
        raise ValueError(message(owner, argument, value, "holds NaN. Use infinity, or None, for no bound."))
    return found
