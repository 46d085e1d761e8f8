"""The toys of BOME's paper.

Each function builds a fresh problem: leaf variables at the published start, the two losses as closures without a
batch, the published settings, and the solution.
"""

from __future__ import annotations

import torch

from ..errors import choice
from .problem import Problem


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
        name="bome-degenerate",
        source="Ye et al., BOME, NeurIPS 2022",
        tags=frozenset({"published", "bounds", "convex", "many-minima"}),
        best=0.0,
        lower_value=lambda x: float(-0.5 * x[0] ** 2),
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
        name="bome-minimax",
        source="Ye et al., BOME, NeurIPS 2022",
        tags=frozenset({"published", "bounds", "linear", "jump"}),
        best=0.0,
        lower_value=lambda x: float(-10 * x[0].abs()),
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
        name=f"bome-coreset-{start}",
        source="Ye et al., BOME, NeurIPS 2022",
        tags=frozenset({"published", "strongly-convex", "infinite-solution"}),
        best=0.72,
        lower_value=lambda _: 0.0,
    )
