"""Problems of our own, each with one difficulty and an answer that can be derived."""

from __future__ import annotations

import torch
from torch import Tensor, sin
from torch.nn.functional import softplus

from .definition import UNIT, Definition, Numbers

OURS = "ours"
WIDTHS = torch.tensor([1.0, 1e2, 1e4], dtype=torch.float64)


def _scaled(x: Tensor, y: Tensor) -> Tensor:
    widths = WIDTHS.to(y.dtype).reshape(3, *[1] * (y.dim() - 1))
    return 0.5 * (widths * (y - x) ** 2).sum(0)


def _wells(x: Tensor, y: Tensor) -> Tensor:
    """Two wells in each entry of y, the lower one where x y < 0."""
    return ((y**2 - 1) ** 2 + 0.5 * x[0] * y).sum(0)


def _pattern(rows: int, columns: int, seed: float) -> Tensor:
    """Numbers that look random and are the same on every machine."""
    i = torch.arange(1, rows * columns + 1, dtype=torch.float64).reshape(rows, columns)
    return 1.7 * sin(seed * i + (i * 0.37) ** 2 % 6.0)


def _linear(rows: Tensor, w: Tensor) -> Tensor:
    """Predictions of a linear model for every sample, along the first dimension; w may hold many points."""
    return torch.einsum("nd,d...->n...", rows.to(w.dtype), w)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


INPUTS, TRUSTED = _pattern(12, 3, 1.3), _pattern(12, 3, 2.1)
WEIGHTS = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
TARGETS = INPUTS @ WEIGHTS + 0.8 * _pattern(12, 1, 0.9)[:, 0]
TRUSTED_TARGETS = TRUSTED @ WEIGHTS + 0.3 * _pattern(12, 1, 0.4)[:, 0]
SPOILED = TARGETS.clone()
SPOILED[:4] = -2 * SPOILED[:4] + 1


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    residual = _linear(INPUTS, y) - _column(TARGETS, y)
    return 0.5 * (residual**2).mean(0) + 0.5 * (x.exp() * y**2).sum(0)


def _trusted_error(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * ((_linear(TRUSTED, y) - _column(TRUSTED_TARGETS, y)) ** 2).mean(0)


def _cleaning(x: Tensor, y: Tensor) -> Tensor:
    residual = _linear(INPUTS, y) - _column(SPOILED, y)
    return 0.5 * (x * residual**2).mean(0) + 0.05 * (y**2).sum(0)


def _logistic(rows: Tensor, targets: Tensor, y: Tensor) -> Tensor:
    margin = _linear(rows, y) * _column(targets.sign(), y)
    return softplus(-margin).mean(0)


def _reweighted(x: Numbers) -> tuple[Tensor, Tensor]:
    scale = torch.as_tensor(x, dtype=torch.float64)
    return INPUTS.T @ (scale[:, None] * INPUTS) / 12, INPUTS.T @ (scale * SPOILED) / 12


def _ridge_value(x: Tensor) -> float:
    x = x.detach().to(torch.float64)
    system = INPUTS.T @ INPUTS / 12 + torch.diag(x.exp())
    return float(_ridge(x, torch.linalg.solve(system, INPUTS.T @ TARGETS / 12)))


def _cleaning_value(x: Tensor) -> float:
    x = x.detach().to(torch.float64)
    matrix, right = _reweighted(x)  # type: ignore[arg-type]
    return float(_cleaning(x, torch.linalg.solve(matrix + 0.1 * torch.eye(3, dtype=torch.float64), right)))


PROBLEMS = [
    Definition(
        "active-bound",  # w = 1 wherever alpha > -1
        OURS,
        "strongly-convex bounds active-bounds kink",
        lambda x, y: (x[0] - 0.5) ** 2 + y[0] ** 2,
        lambda x, y: (y[0] - x[0] - 2) ** 2,
        start=([0.0], [0.5]),
        best=1.0,
        solution=([0.5], [1.0]),
        lower_box=(0.0, 1.0),
    ),
    Definition(
        "two-wells",  # the lower one jumps from near 1 to near -1 at x = 0
        OURS,
        "nonconvex several-minima jump",
        lambda x, y: (x[0] - 0.5) ** 2 + (y[0] - 1) ** 2,
        _wells,
        start=([1.0], [-1.0]),
        best=0.25,
        solution=([0.0], [1.0]),
    ),
    Definition(
        "eight-wells",  # the same in three lower variables
        OURS,
        "nonconvex several-minima jump",
        lambda x, y: (x[0] - 0.5) ** 2 + ((y - 1) ** 2).sum(0),
        _wells,
        start=([-1.0], [-1.0, 1.0, -1.0]),
        best=0.25,
        solution=([0.0], [1.0, 1.0, 1.0]),
    ),
    Definition(
        "valley",  # a line of lower minima; with y = x/2 on it, 2 (x - 3) + (x - 2) = 0
        OURS,
        "convex many-minima",
        lambda x, y: (x[0] - 3) ** 2 + ((y - 1) ** 2).sum(0),
        lambda x, y: (y[0] + y[1] - x[0]) ** 2,
        start=([0.0], [0.0, 0.5]),
        best=1 / 3,
        solution=([8 / 3], [4 / 3, 4 / 3]),
    ),
    Definition(
        "quartic",  # no curvature at the minimum y = x: no implicit function theorem
        OURS,
        "convex",
        lambda x, y: (y[0] - 1) ** 2 + x[0] ** 2,
        lambda x, y: (y[0] - x[0]) ** 4,
        start=([2.0], [0.0]),
        best=0.5,
        solution=([0.5], [0.5]),
    ),
    Definition(
        "curved-valley",  # Rosenbrock's function: y = (x, x^2), F = (x - 1)^2 + (x^2 - 2)^2 + x^2 / 10
        OURS,
        "nonconvex ill-conditioned",
        lambda x, y: (y[0] - 1) ** 2 + (y[1] - 2) ** 2 + 0.1 * x[0] ** 2,
        lambda x, y: (x[0] - y[0]) ** 2 + 100 * (y[1] - y[0] ** 2) ** 2,
        start=([-0.5], [-0.5, 0.0]),
        best=0.33625,
        solution=([1.3493], [1.3493, 1.8206]),
    ),
    Definition(
        "scaled",  # curvatures 1, 100, 10000: y = x
        OURS,
        "strongly-convex ill-conditioned",
        lambda x, y: ((y - 1) ** 2 + x**2).sum(0),
        _scaled,
        start=([2.0, -1.0, 0.0], [0.0, 0.0, 0.0]),
        best=1.5,
        solution=([0.5] * 3, [0.5] * 3),
    ),
    Definition(
        "sines",  # ten upper, ten lower variables, y = sin x
        OURS,
        "convex-lower nonconvex ten",
        lambda x, y: ((y - 0.5) ** 2 + 0.1 * (x - 1) ** 2).sum(0),
        lambda x, y: ((y - sin(x)) ** 2).sum(0),
        start=([0.0] * 10, [1.0] * 10),
        best=0.19942,
        solution=None,
    ),
    Definition(
        "ridge",  # a penalty for each of three features
        OURS,
        "strongly-convex bounds learning",
        _trusted_error,
        _ridge,
        start=([0.0] * 3, [0.0] * 3),
        best=0.04204,
        upper_box=(-6.0, 6.0),
        lower_value=_ridge_value,
    ),
    Definition(
        "logistic-penalties",
        OURS,
        "strongly-convex bounds learning",
        lambda x, y: _logistic(TRUSTED, TRUSTED_TARGETS, y),
        lambda x, y: _logistic(INPUTS, TARGETS, y) + 0.5 * (x.exp() * y**2).sum(0),
        start=([0.0] * 3, [0.0] * 3),
        best=0.11124,
        upper_box=(-6.0, 2.0),
    ),
    Definition(
        "cleaning",  # weights of twelve samples, four of which are spoiled
        OURS,
        "strongly-convex bounds active-bounds learning",
        _trusted_error,
        _cleaning,
        start=([0.5] * 12, [0.0] * 3),
        best=0.03314,
        upper_box=(0.0, 1.0),
        lower_value=_cleaning_value,
    ),
    Definition(
        "wavy",  # F has several local minima along y = x; F = sin(3 x) + x^2 / 10 + 1 is lowest near -0.51
        OURS,
        "strongly-convex several-upper-minima",
        lambda x, y: sin(3 * y[0]) + 0.1 * x[0] ** 2 + 1,
        lambda x, y: (y[0] - x[0]) ** 2,
        start=([3.5], [0.0]),
        best=0.02682,
        solution=([-0.5121], [-0.5121]),
        upper_box=(-5.0, 5.0),
    ),
    Definition(
        "corner",  # F = (x_1 - 2)^2 + (x_2 + 1)^2 where y = (1, 1): x_1 at its bound, x_2 where y_2 leaves its own
        OURS,
        "strongly-convex bounds active-bounds",
        lambda x, y: (x[0] + y[0] - 3) ** 2 + (x[1] - y[1] + 2) ** 2,
        lambda x, y: ((y - 2 * x) ** 2).sum(0),
        start=([0.0, 0.0], [0.0, 0.0]),
        best=3.25,
        solution=([1.0, 0.5], [1.0, 1.0]),
        upper_box=UNIT,
        lower_box=UNIT,
    ),
]
