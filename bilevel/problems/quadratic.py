"""A family of strongly convex quadratic problems whose every derivative is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import count
from .problem import Problem


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
    w_star = slope @ alpha_star + intercept

    def lower_value(upper: Tensor) -> float:
        at = torch.linalg.solve(h, b @ upper + c)
        return float(0.5 * at @ h @ at - at @ (b @ upper + c))

    best = 0.5 * (w_star - t) @ p @ (w_star - t) + 0.5 * weight * (alpha_star - s).square().sum()
    return Quadratic(
        upper=alpha,
        lower=w,
        upper_loss=lambda: 0.5 * (w - t) @ p @ (w - t) + 0.5 * weight * (alpha - s).square().sum(),
        lower_loss=lambda: 0.5 * w @ h @ w - w @ (b @ alpha + c),
        learning_rate=0.1,
        upper_solution=alpha_star,
        lower_solution=w_star,
        name=f"quadratic-{seed}",
        source="ours",
        tags=frozenset({"strongly-convex"}),
        best=float(best),
        lower_value=lower_value,
        hessian=h,
        coupling=b,
        offset=c,
        upper_hessian=p,
        target=t,
        anchor=s,
        weight=weight,
    )
