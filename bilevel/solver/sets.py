"""The variables of a level as one flat vector, and the set that it stays in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..feasible import FeasibleSet
from ..levels import Level
from ..projection import Box
from ..vectors import Vector


class Space:
    """A level's variables, flattened to float64 on the CPU, and back.

    Args:
        level: The level.
        feasible: Where its variables stay.

    Attributes:
        size: Number of entries.
        low: Lower bounds of the entries, infinite where there is none; None: the set is no box.
        high: Upper bounds likewise.
    """

    def __init__(self, level: Level, feasible: FeasibleSet) -> None:
        self._level, self._feasible = level, feasible
        self.shapes = [tensor.shape for tensor in level.tensors]
        self.sizes = [tensor.numel() for tensor in level.tensors]
        self.size = sum(self.sizes)
        self.precision = max(torch.finfo(tensor.dtype).eps for tensor in level.tensors)
        self.low, self.high = self._box()
        self._sobol: torch.quasirandom.SobolEngine | None = None

    @property
    def is_box(self) -> bool:
        """Whether the set is a box, all of space included."""
        return self.low is not None

    @property
    def is_bounded(self) -> bool:
        """Whether it is a box with finite sides."""
        return self.low is not None and bool((self.low.isfinite() & self.high.isfinite()).all())  # type: ignore[union-attr]

    def flat(self, tensors: Sequence[Tensor | None] | None = None) -> Tensor:
        """Return tensors like the variables, by default their values, as one vector; what is missing is 0."""
        given = [t.detach() for t in self._level.tensors] if tensors is None else tensors
        parts = [
            torch.zeros(size, dtype=torch.float64) if t is None else t.reshape(-1).to("cpu", torch.float64)
            for t, size in zip(given, self.sizes, strict=True)
        ]
        return torch.cat(parts)

    def shaped(self, flat: Tensor) -> Vector:
        """Return a vector's entries in the variables' shapes, dtypes and places."""
        parts = flat.split(self.sizes)
        return Vector(
            [p.reshape(t.shape).to(t.device, t.dtype) for p, t in zip(parts, self._level.tensors, strict=True)],
            self._level.names,
        )

    def put(self, flat: Tensor) -> None:
        """Write a vector into the variables."""
        with torch.no_grad():
            for tensor, value in zip(self._level.tensors, self.shaped(flat), strict=True):
                if value is not None:
                    tensor.copy_(value)

    def project(self, flat: Tensor) -> Tensor:
        """Return the nearest point of the set."""
        if self.low is not None and self.high is not None:
            return flat.clamp(self.low, self.high)
        with torch.no_grad():
            return self.flat(self._feasible.project(self.shaped(flat)))

    def movable(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return which entries a step along the negative gradient moves: of a box, those not pressed on a bound."""
        if self.low is None or self.high is None:
            return torch.ones_like(x, dtype=torch.bool)
        return ~((x <= self.low) & (gradient > 0) | (x >= self.high) & (gradient < 0))

    def stationarity(self, x: Tensor, gradient: Tensor) -> float:
        """Return the size of the projected gradient step: 0 at a stationary point."""
        return float((self.project(x - gradient) - x).abs().max())

    def samples(self, number: int, centre: Tensor, scales: Sequence[float], generator: torch.Generator) -> list[Tensor]:
        """Draw points: quasi-random where an entry has two bounds, normal around a centre where it has not.

        Args:
            number: How many.
            centre: Where entries without bounds are drawn around.
            scales: By turns, how far, in units of ``1 + |centre|``.
            generator: Of random numbers.
        """
        found = []
        for index in range(number):
            scale = scales[index % len(scales)]
            normal = torch.randn(self.size, generator=generator, dtype=torch.float64)
            point = centre + scale * (1 + centre.abs()) * normal
            if self.low is not None and self.high is not None:
                uniform = self._uniform(generator)
                bounded = self.low.isfinite() & self.high.isfinite()
                point = torch.where(bounded, self.low + (self.high - self.low) * uniform, point)
            found.append(self.project(point))
        return found

    def near(self, centre: Tensor, scale: float, generator: torch.Generator) -> Tensor:
        """Draw a normal point around a centre: ``scale`` in units of an entry's box, or of ``3 (1 + |centre|)``."""
        width = 3 * (1 + centre.abs())
        if self.low is not None and self.high is not None:
            sides = self.high - self.low
            width = torch.where(sides.isfinite(), sides, width)
        normal = torch.randn(self.size, generator=generator, dtype=torch.float64)
        return self.project(centre + scale * width * normal)

    def corners(self, number: int) -> list[Tensor]:
        """Return corners of a bounded box: all of up to ``number``, or those with one sign."""
        if not self.is_bounded or self.low is None or self.high is None:
            return []
        if 2**self.size <= number:
            signs = torch.cartesian_prod(*[torch.tensor([False, True])] * self.size).reshape(-1, self.size)
            return [torch.where(sign, self.high, self.low) for sign in signs]
        return [self.low.clone(), self.high.clone()][:number]

    def _uniform(self, generator: torch.Generator) -> Tensor:
        """The next point of a quasi-random sequence in the unit box; in many dimensions a random one."""
        if self.size > 64:
            return torch.rand(self.size, generator=generator, dtype=torch.float64)
        if self._sobol is None:
            self._sobol = torch.quasirandom.SobolEngine(self.size, scramble=True, seed=generator.initial_seed())
        return self._sobol.draw(1, dtype=torch.float64)[0]

    def _box(self) -> tuple[Tensor | None, Tensor | None]:
        low = [torch.full((size,), -torch.inf, dtype=torch.float64) for size in self.sizes]
        high = [torch.full((size,), torch.inf, dtype=torch.float64) for size in self.sizes]
        for part in self._feasible.parts:
            if not isinstance(part.projection, Box):
                return None, None
            for i in part.indices:
                tensor = self._level.tensors[i]
                for bound, side in ((part.projection.lower, low), (part.projection.upper, high)):
                    if bound is not None:
                        given = torch.as_tensor(bound, dtype=torch.float64).to("cpu")
                        side[i] = given.expand(tensor.shape).reshape(-1).clone()
        return torch.cat(low), torch.cat(high)
