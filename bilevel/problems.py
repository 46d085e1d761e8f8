"""Bilevel problems with known answers, for the tests and for authors of methods.

Each function builds a fresh problem: leaf variables at the published start, the two losses as closures without a
batch, the published settings, and the solution. The toys are those of BOME's paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import choice, count


@dataclass(frozen=True)
class Problem:
    """A problem, its start and its answer.

    Attributes:
        upper: The upper variable, a leaf at the start point.
        lower: The lower variable.
        upper_loss: F, without arguments.
        lower_loss: G, without arguments.
        learning_rate: Published rate of both levels and of the inner steps.
        upper_solution: Where the upper variable should end, or None if the minimiser is at infinity.
        lower_solution: Where the lower variable should end.
        upper_bound: The upper variable is clamped to ``[-bound, bound]`` after each step, or None.
        lower_bound: The same for the lower variable.

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
    lower_solution: Tensor
    upper_bound: float | None = None
    lower_bound: float | None = None

    def optimizers(self) -> tuple[torch.optim.SGD, torch.optim.SGD]:
        """Return plain SGD for both levels at the published rate; projections are hooks of torch's optimizers."""
        return self._sgd(self.upper, self.upper_bound), self._sgd(self.lower, self.lower_bound)

    def _sgd(self, variable: Tensor, bound: float | None) -> torch.optim.SGD:
        optimizer = torch.optim.SGD([variable], lr=self.learning_rate)
        if bound is not None:

            def project(*_: object) -> None:
                variable.data.clamp_(-bound, bound)

            optimizer.register_step_post_hook(project)
        return optimizer


def degenerate(dtype: torch.dtype = torch.float64) -> Problem:
    r"""Many lower minima (BOME's first toy): ``th_1`` does not appear in g.

    .. math:: f = (v - \theta_1)^2 / 2 + (\theta_0 - 1)^2 / 2, \quad g = \theta_0^2 / 2 - v \theta_0

    Published: start 0, all rates 0.5, lower clamp 100, ``GradientNorm(0.5)``, T = 1, 2000 steps.
    Solution ``v = 1, theta = (1, 1)``, f = 0.

    Example:
        >>> import bilevel
        >>> bilevel.problems.degenerate().lower_solution.tolist()
        [1.0, 1.0]

    References:
        Ye et al., NeurIPS 2022, toy experiments.
    """
    v = torch.zeros((), dtype=dtype, requires_grad=True)
    theta = torch.zeros(2, dtype=dtype, requires_grad=True)
    return Problem(
        upper=v,
        lower=theta,
        upper_loss=lambda: 0.5 * (v - theta[1]) ** 2 + 0.5 * (theta[0] - 1) ** 2,
        lower_loss=lambda: 0.5 * theta[0] ** 2 - v * theta[0],
        learning_rate=0.5,
        upper_solution=torch.ones((), dtype=dtype),
        lower_solution=torch.ones(2, dtype=dtype),
        lower_bound=100.0,
    )


def minimax(dtype: torch.dtype = torch.float64) -> Problem:
    r"""A saddle (BOME's second toy): :math:`f = \theta v,\; g = -\theta v`.

    Published: start (4, 4), all rates 0.05, clamp 10, ``GradientNorm(0.5)``, T = 10. Solution ``v = theta = 0``.

    Example:
        >>> import bilevel
        >>> bilevel.problems.minimax().upper.item()
        4.0

    References:
        Ye et al., NeurIPS 2022, toy experiments.
    """
    v = torch.full((), 4.0, dtype=dtype, requires_grad=True)
    theta = torch.full((), 4.0, dtype=dtype, requires_grad=True)
    return Problem(
        upper=v,
        lower=theta,
        upper_loss=lambda: theta * v,
        lower_loss=lambda: -theta * v,
        learning_rate=0.05,
        upper_solution=torch.zeros((), dtype=dtype),
        lower_solution=torch.zeros((), dtype=dtype),
        upper_bound=10.0,
        lower_bound=10.0,
    )


CORESET_STARTS = ((0.0, 3.0), (-3.0, 1.0), (3.5, -1.0))


def coreset(start: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    r"""Weights of four points whose mean comes close to a fifth (BOME's third toy).

    .. math:: f = 0.1 \|\theta - x_0\|^2, \quad g = \|X^\top \mathrm{softmax}(v) - \theta\|^2

    Published: ``v = 0``, three starts of theta, rates 0.05, ``GradientNorm(0.5)``, T = 10, eps 1e-4, 5000 steps.
    The solution is the projection of ``x_0`` on the convex hull, ``theta = (1.8, 0.4)``, f = 0.72; its weights
    (0, 0.8, 0, 0.2) lie at infinity in v.

    Args:
        start: Which of the three published starts, 0 to 2.
        dtype: Floating-point type of the variables.

    Example:
        >>> import bilevel
        >>> bilevel.problems.coreset(start=2).lower.tolist()
        [3.5, -1.0]

    References:
        Ye et al., NeurIPS 2022, toy experiments.
    """
    choice("coreset", "start", start, (0, 1, 2))
    points = torch.tensor([[1.0, 3.0], [3.0, 1.0], [-2.0, 2.0], [-3.0, -2.0]], dtype=dtype)
    target = torch.tensor([3.0, -2.0], dtype=dtype)
    v = torch.zeros(4, dtype=dtype, requires_grad=True)
    theta = torch.tensor(CORESET_STARTS[start], dtype=dtype, requires_grad=True)
    return Problem(
        upper=v,
        lower=theta,
        upper_loss=lambda: 0.1 * (theta - target).square().sum(),
        lower_loss=lambda: (points.T @ torch.softmax(v, 0) - theta).square().sum(),
        learning_rate=0.05,
        upper_solution=None,
        lower_solution=torch.tensor([1.8, 0.4], dtype=dtype),
    )


@dataclass(frozen=True, kw_only=True)
class Quadratic(Problem):
    r"""A strongly convex quadratic problem whose every derivative is known; made by :func:`quadratic`.

    .. math::
        G &= w^\top H w / 2 - w^\top (B \alpha + c), \quad w^*(\alpha) = H^{-1} (B \alpha + c) \\
        F &= (w - t)^\top P (w - t) / 2 + r \|\alpha - s\|^2 / 2

    Attributes:
        hessian: H, symmetric positive definite, with eigenvalues in [1, 4].
        coupling: B.
        offset: c.
        upper_hessian: P.
        target: t.
        anchor: s.
        weight: r.

    Example:
        >>> import bilevel, torch
        >>> problem = bilevel.problems.quadratic(seed=1)
        >>> slope = problem.hypergradient(problem.upper_solution)
        >>> torch.allclose(slope, torch.zeros_like(slope), atol=1e-12)
        True
    """

    hessian: Tensor
    coupling: Tensor
    offset: Tensor
    upper_hessian: Tensor
    target: Tensor
    anchor: Tensor
    weight: float

    def lower_optimum(self, alpha: Tensor) -> Tensor:
        """Return ``w*(alpha)``."""
        optimum: Tensor = torch.linalg.solve(self.hessian, self.coupling @ alpha + self.offset)
        return optimum

    def hypergradient(self, alpha: Tensor) -> Tensor:
        """Return ``d/dalpha F(w*(alpha), alpha) = B^T H^-1 P (w* - t) + r (alpha - s)``."""
        upper = self.upper_hessian @ (self.lower_optimum(alpha) - self.target)
        through_lower: Tensor = self.coupling.T @ torch.linalg.solve(self.hessian, upper)
        return through_lower + self.weight * (alpha - self.anchor)


def quadratic(seed: int = 0, upper_size: int = 3, lower_size: int = 4, dtype: torch.dtype = torch.float64) -> Quadratic:
    """Draw a strongly convex quadratic problem with known solution, lower optimum and hypergradient.

    Args:
        seed: Seed of a generator of its own; torch's random state is not touched.
        upper_size: Number of upper variables, >= 1.
        lower_size: Number of lower variables, >= 1.
        dtype: Floating-point type.

    Raises:
        TypeError, ValueError: A size is not a positive integer.

    Example:
        >>> import bilevel
        >>> bilevel.problems.quadratic(seed=3, upper_size=2).upper.shape
        torch.Size([2])
    """
    count("quadratic", "upper_size", upper_size, minimum=1)
    count("quadratic", "lower_size", lower_size, minimum=1)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def positive(size: int) -> Tensor:
        rotation = torch.linalg.qr(draw(size, size))[0]
        eigenvalues = 1 + 3 * torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)
        matrix: Tensor = rotation @ torch.diag(eigenvalues) @ rotation.T
        return matrix

    h, p = positive(lower_size), positive(lower_size)
    b, c, t, s = draw(lower_size, upper_size), draw(lower_size), draw(lower_size), draw(upper_size)
    weight = 1.0
    # d/dalpha F(K alpha + k, alpha) = K^T P (K alpha + k - t) + r (alpha - s) = 0, with w* = K alpha + k.
    slope, intercept = torch.linalg.solve(h, b), torch.linalg.solve(h, c)
    system = slope.T @ p @ slope + weight * torch.eye(upper_size, dtype=dtype)
    alpha_star = torch.linalg.solve(system, slope.T @ p @ (t - intercept) + weight * s)
    alpha, w = draw(upper_size).requires_grad_(), draw(lower_size).requires_grad_()
    return Quadratic(
        upper=alpha,
        lower=w,
        upper_loss=lambda: 0.5 * (w - t) @ p @ (w - t) + 0.5 * weight * (alpha - s).square().sum(),
        lower_loss=lambda: 0.5 * w @ h @ w - w @ (b @ alpha + c),
        learning_rate=0.1,
        upper_solution=alpha_star,
        lower_solution=slope @ alpha_star + intercept,
        hessian=h,
        coupling=b,
        offset=c,
        upper_hessian=p,
        target=t,
        anchor=s,
        weight=weight,
    )
