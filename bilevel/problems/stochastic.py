"""A finite sum: the same losses on all samples, or on batches of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import count
from .problem import Problem


@dataclass(frozen=True, kw_only=True)
class FiniteSum(Problem):
    r"""Mean squares over samples; both losses take a batch of sample numbers, or None for all. Made by
    :func:`finite_sum`.

    .. math::
        G &= \tfrac{1}{2} \operatorname{mean}_i (a_i^\top w - b_i^\top \alpha - c_i)^2 \\
        F &= \tfrac{1}{2} \operatorname{mean}_j (d_j^\top w - e_j)^2 + \tfrac{r}{2} \|\alpha\|^2

    Attributes:
        samples: How many there are, in each level.

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.finite_sum(seed=0)
        >>> upper_batch, lower_batch = problem.draw(8)
        >>> problem.lower_loss(lower_batch).shape
        torch.Size([])
    """

    samples: int
    generator: torch.Generator

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """Draw a batch of sample numbers for each level, from the problem's own generator."""
        return tuple(torch.randperm(self.samples, generator=self.generator)[:size] for _ in range(2))  # type: ignore[return-value]


def finite_sum(
    seed: int = 0, samples: int = 64, upper_size: int = 3, lower_size: int = 4, dtype: torch.dtype = torch.float64
) -> FiniteSum:
    """Draw a stochastic problem whose answer, over all samples, is known.

    Args:
        seed: Seed of generators of its own, for the problem and for its batches.
        samples: In each level, > ``lower_size``.
        upper_size: Number of upper variables, >= 1.
        lower_size: Number of lower variables, >= 1.
        dtype: Floating-point type.

    Raises:
        TypeError, ValueError: A size is off.

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.finite_sum(seed=1)
        >>> problem.solved(), problem.solved(problem.upper_solution, problem.lower_solution)
        (False, True)
    """
    count("finite_sum", "upper_size", upper_size, minimum=1)
    count("finite_sum", "lower_size", lower_size, minimum=1)
    count("finite_sum", "samples", samples, minimum=lower_size + 1)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    a, b, c = draw(samples, lower_size), draw(samples, upper_size), draw(samples)
    d, e, r = draw(samples, lower_size), draw(samples), 0.1
    # w* = K alpha + k solves the normal equations; then F is a quadratic in alpha.
    k, offset = torch.linalg.lstsq(a, b).solution, torch.linalg.lstsq(a, c[:, None]).solution[:, 0]
    seen = d @ k
    alpha_star = torch.linalg.solve(
        seen.T @ seen / samples + r * torch.eye(upper_size, dtype=dtype), seen.T @ (e - d @ offset) / samples
    )
    alpha, w = draw(upper_size).requires_grad_(), draw(lower_size).requires_grad_()

    def upper_loss(batch: Tensor | None = None) -> Tensor:
        rows = slice(None) if batch is None else batch
        return 0.5 * ((d[rows] @ w - e[rows]) ** 2).mean() + 0.5 * r * alpha.square().sum()

    def lower_loss(batch: Tensor | None = None) -> Tensor:
        rows = slice(None) if batch is None else batch
        return 0.5 * ((a[rows] @ w - b[rows] @ alpha - c[rows]) ** 2).mean()

    def lower_value(upper: Tensor) -> float:
        right = b @ upper + c
        return float(0.5 * ((a @ torch.linalg.lstsq(a, right[:, None]).solution[:, 0] - right) ** 2).mean())

    w_star = k @ alpha_star + offset
    best = 0.5 * ((d @ w_star - e) ** 2).mean() + 0.5 * r * alpha_star.square().sum()
    return FiniteSum(
        upper=alpha,
        lower=w,
        upper_loss=upper_loss,
        lower_loss=lower_loss,
        learning_rate=0.1,
        upper_solution=alpha_star,
        lower_solution=w_star,
        name=f"finite-sum-{seed}",
        source="ours",
        tags=frozenset({"strongly-convex", "stochastic"}),
        best=float(best),
        lower_value=lower_value,
        samples=samples,
        generator=torch.Generator().manual_seed(seed + 1),
    )
