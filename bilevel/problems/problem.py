"""``Problem``: two losses, a start, and the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .lower_search import Formula, lowest

Bounds = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A problem, its start and its answer.

    Attributes:
        upper: The upper variable, a leaf at the start point.
        lower: The lower variable.
        upper_loss: F, without arguments.
        lower_loss: G, without arguments.
        learning_rate: Published rate of both levels and of the inner steps.
        upper_solution: Where the upper variable should end, or None if the minimiser is at infinity, or not unique.
        lower_solution: Where the lower variable should end, or None likewise.
        upper_bound: The upper variable is clamped to ``[-bound, bound]`` after each step, or None.
        lower_bound: The same for the lower variable.
        upper_box: Its bounds otherwise, a lower and an upper one like the variable (infinite where there is none).
        lower_box: The same for the lower variable.
        name: Its name in the suite.
        source: Where it was published, or ``"ours"``.
        tags: What is hard about it; see :func:`bilevel.problems.tags`.
        best: The smallest F at a pair whose lower variable is a global minimum of G (the optimistic value).
        tolerance: How far from the best value, and from the minimum of G, a solved pair may be; of values above 1 in
            size, relative.
        formulas: F and G as functions of the variables' values, flat, along their first dimension: further dimensions
            are independent points. None where the losses are not that simple.
        lower_value: ``min_w G(w, alpha)`` of a flat alpha, where it is known otherwise than by search.

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.degenerate()
        >>> upper_optimizer, lower_optimizer = problem.optimizers()
        >>> optimizer = bilevel.BOME(
        ...     problem.upper_loss, problem.lower_loss, upper=problem.upper, lower=problem.lower,
        ...     upper_optimizer=upper_optimizer, lower_optimizer=lower_optimizer,
        ... )
        >>> for _ in range(200):
        ...     stats = optimizer.step()
        >>> print(f"{problem.upper.item():.4f}")
        1.0000
    """

    upper: Tensor
    lower: Tensor
    upper_loss: Callable[[], Tensor]
    lower_loss: Callable[[], Tensor]
    learning_rate: float
    upper_solution: Tensor | None
    lower_solution: Tensor | None
    upper_bound: float | None = None
    lower_bound: float | None = None
    upper_box: Bounds | None = None
    lower_box: Bounds | None = None
    name: str = ""
    source: str = ""
    tags: frozenset[str] = frozenset()
    best: float | None = None
    tolerance: float = 1e-2
    formulas: tuple[Formula, Formula] | None = None
    lower_value: Callable[[Tensor], float] | None = None

    @property
    def upper_bounds(self) -> Bounds | None:
        """The bounds of the upper variable, however they were given; None: it has none."""
        return _bounds(self.upper, self.upper_bound, self.upper_box)

    @property
    def lower_bounds(self) -> Bounds | None:
        """The same of the lower variable."""
        return _bounds(self.lower, self.lower_bound, self.lower_box)

    def optimizers(self) -> tuple[torch.optim.SGD, torch.optim.SGD]:
        """Return plain SGD for both levels at the published rate; projections are hooks of torch's optimizers."""
        return self._sgd(self.upper, self.upper_bounds), self._sgd(self.lower, self.lower_bounds)

    def _sgd(self, variable: Tensor, bounds: Bounds | None) -> torch.optim.SGD:
        optimizer = torch.optim.SGD([variable], lr=self.learning_rate)
        if bounds is not None:

            def project(*_: object) -> None:
                variable.data.clamp_(*bounds)

            optimizer.register_step_post_hook(project)
        return optimizer

    def errors(self, upper: Tensor | None = None, lower: Tensor | None = None) -> tuple[float, float]:
        """Return how far a pair's F is from the best value, and its G above the minimum; a point that leaves the bounds
        is infinitely far.

        Args:
            upper: Value of the upper variable; None: its current one.
            lower: Value of the lower variable; None: its current one.

        Raises:
            ValueError: The problem has no known best value.

        Cost:
            A search of the whole lower box by a few ten thousand values of G, where ``lower_value`` is not known.
        """
        if self.best is None:
            raise ValueError(f"Problem(name={self.name!r}): has no known best value to compare with.")
        alpha = (self.upper if upper is None else upper).detach().to(self.upper)
        w = (self.lower if lower is None else lower).detach().to(self.lower)
        if not (_inside(alpha, self.upper_bounds) and _inside(w, self.lower_bounds)):
            return float("inf"), float("inf")
        f, g = self._values(alpha, w)
        lowest_g = min(self._lowest(alpha, w), g)
        return abs(f - self.best) / max(1.0, abs(self.best)), (g - lowest_g) / max(1.0, abs(lowest_g))

    def solved(self, upper: Tensor | None = None, lower: Tensor | None = None) -> bool:
        """Whether a pair, by default the variables as they are, has the best upper value and is lower optimal, both
        within ``tolerance``.

        Example:
            >>> import bilevel
            >>> problem = bilevel.problems.named("mitsos-barton-3.14")
            >>> problem.solved(), problem.solved(problem.upper_solution, problem.lower_solution)
            (False, True)
        """
        return max(self.errors(upper, lower)) <= self.tolerance

    def _values(self, alpha: Tensor, w: Tensor) -> tuple[float, float]:
        """F and G at a pair; the variables are put back as they were."""
        kept = self.upper.detach().clone(), self.lower.detach().clone()
        with torch.no_grad():
            try:
                self.upper.copy_(alpha.reshape(self.upper.shape))
                self.lower.copy_(w.reshape(self.lower.shape))
                return float(self.upper_loss()), float(self.lower_loss())
            finally:
                self.upper.copy_(kept[0])
                self.lower.copy_(kept[1])

    def _lowest(self, alpha: Tensor, w: Tensor) -> float:
        if self.lower_value is not None:
            return self.lower_value(alpha.flatten())
        if self.formulas is None:
            raise ValueError(f"Problem(name={self.name!r}): the minimum of its lower loss is not known.")
        starts = [w] if self.lower_solution is None else [w, self.lower_solution]
        return lowest(self.formulas[1], alpha.flatten(), [start.flatten() for start in starts], self.lower_bounds)[0]


def _bounds(variable: Tensor, bound: float | None, box: Bounds | None) -> Bounds | None:
    if box is not None or bound is None:
        return box
    limit = torch.full_like(variable.detach(), bound)
    return -limit, limit


def _inside(value: Tensor, bounds: Bounds | None) -> bool:
    """Up to rounding: a bound reached by arithmetic is a bound."""
    slack = 1e-6
    return bounds is None or bool(((value >= bounds[0] - slack) & (value <= bounds[1] + slack)).all())
