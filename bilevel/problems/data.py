"""Learning problems on public data: the sets that scikit-learn brings along, which these functions need installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from ..errors import count
from .problem import Problem

DIABETES_BEST, BREAST_CANCER_BEST = 0.23829, 0.05298


def _loaded(owner: str, name: str) -> tuple[Tensor, Tensor]:
    """Inputs, standardised, and targets, in a fixed random order."""
    try:
        sets: Any = import_module("sklearn.datasets")
    except ImportError as missing:
        raise ImportError(
            f"{owner}(): needs scikit-learn for its data. Install it: pip install scikit-learn."
        ) from missing
    data = getattr(sets, f"load_{name}")()
    inputs = torch.tensor(data.data.tolist(), dtype=torch.float64)
    targets = torch.tensor(data.target.tolist(), dtype=torch.float64)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0).clamp(min=1e-6)
    return inputs[order], targets[order]


def diabetes(dtype: torch.dtype = torch.float64) -> Problem:
    r"""Ridge regression with a penalty for each of ten features, chosen on held-out patients.

    .. math:: G = \tfrac12 \operatorname{mean} (x^\top w - y)^2 + \tfrac12 \sum_j e^{\alpha_j} w_j^2, \quad
        F = \tfrac12 \operatorname{mean}_{\text{held out}} (x^\top w - y)^2, \quad \alpha \in [-8, 4]^{10}

    Half of the 442 patients are held out; inputs and targets are standardised. The best value is that of scipy's
    L-BFGS-B above the normal equations, from 20 starts (the tests repeat it from fewer).

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.diabetes()
        >>> problem.upper.shape, problem.solved()
        (torch.Size([10]), False)
    """
    inputs, targets = _loaded("diabetes", "diabetes")
    targets = (targets - targets.mean()) / targets.std()
    a, b, a_out, b_out = (t.to(dtype) for t in (inputs[:221], targets[:221], inputs[221:], targets[221:]))
    alpha = torch.zeros(10, dtype=dtype, requires_grad=True)
    w = torch.zeros(10, dtype=dtype, requires_grad=True)

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((a @ y - b) ** 2).mean() + 0.5 * (x.exp() * y**2).sum()

    def lower_value(x: Tensor) -> float:
        system = a.T @ a / len(a) + torch.diag(x.exp())
        return float(lower(x, torch.linalg.solve(system, a.T @ b / len(a))))

    return Problem(
        upper=alpha,
        lower=w,
        upper_loss=lambda: 0.5 * ((a_out @ w - b_out) ** 2).mean(),
        lower_loss=lambda: lower(alpha, w),
        learning_rate=0.1,
        upper_solution=None,
        lower_solution=None,
        upper_box=(torch.full((10,), -8.0, dtype=dtype), torch.full((10,), 4.0, dtype=dtype)),
        name="diabetes",
        source="Efron et al., Least Angle Regression, 2004; scikit-learn",
        tags=frozenset({"strongly-convex", "bounds", "learning"}),
        best=DIABETES_BEST,
        tolerance=1e-3,
        lower_value=lower_value,
    )


def breast_cancer(dtype: torch.dtype = torch.float64) -> Problem:
    r"""Logistic regression with a penalty for each of thirty features, chosen on held-out patients.

    .. math:: G = \operatorname{mean} \log(1 + e^{-y x^\top w}) + \tfrac12 \sum_j e^{\alpha_j} w_j^2, \quad
        \alpha \in [-6, 2]^{30}

    F is the mean on the held-out half of the 569 patients. The best value is that of scipy's L-BFGS-B above Newton's
    method, from eight starts; there may be a lower one.

    Example:
        >>> import bilevel
        >>> bilevel.problems.breast_cancer().upper.shape
        torch.Size([30])
    """
    inputs, targets = _loaded("breast_cancer", "breast_cancer")
    signs = 2 * targets - 1
    a, a_out = ((inputs * signs[:, None]).to(dtype)[part] for part in (slice(0, 285), slice(285, None)))
    alpha = torch.zeros(30, dtype=dtype, requires_grad=True)
    w = torch.zeros(30, dtype=dtype, requires_grad=True)

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return softplus(-(a @ y)).mean() + 0.5 * (x.exp() * y**2).sum()

    def lower_value(x: Tensor) -> float:
        """By Newton's method, damped until it descends."""
        y = torch.zeros_like(w)
        for _ in range(50):
            s = torch.sigmoid(-(a @ y))
            gradient = -(a * s[:, None]).mean(0) + x.exp() * y
            hessian = (a * (s * (1 - s))[:, None]).T @ a / len(a) + torch.diag(x.exp())
            step, length = torch.linalg.solve(hessian, gradient), 1.0
            while lower(x, y - length * step) > lower(x, y) and length > 1e-6:
                length *= 0.5
            y = y - length * step
        return float(lower(x, y))

    return Problem(
        upper=alpha,
        lower=w,
        upper_loss=lambda: softplus(-(a_out @ w)).mean(),
        lower_loss=lambda: lower(alpha, w),
        learning_rate=0.1,
        upper_solution=None,
        lower_solution=None,
        upper_box=(torch.full((30,), -6.0, dtype=dtype), torch.full((30,), 2.0, dtype=dtype)),
        name="breast-cancer",
        source="Street et al., Nuclear Feature Extraction, 1993; scikit-learn",
        tags=frozenset({"strongly-convex", "bounds", "learning"}),
        best=BREAST_CANCER_BEST,
        tolerance=5e-3,
        lower_value=lower_value,
    )


@dataclass(frozen=True, kw_only=True)
class Cleaning(Problem):
    """Data hyper-cleaning; made by :func:`digits`.

    Attributes:
        wrong: Which training labels are wrong.

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.digits(samples=50)
        >>> int(problem.wrong.sum()) > 0, len(problem.wrong) == len(problem.upper)
        (True, True)
    """

    wrong: Tensor

    def found(self) -> tuple[float, float]:
        """Return the shares of wrong, and of right labels, whose weight is below 1/2.

        Example:
            >>> import bilevel
            >>> bilevel.problems.digits(samples=50).found()  # every weight is 1/2
            (0.0, 0.0)
        """
        low = self.upper.detach() < 0.5
        return float(low[self.wrong].float().mean()), float(low[~self.wrong].float().mean())


def digits(samples: int = 300, share: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Cleaning:
    r"""Data hyper-cleaning on 8 x 8 digits: a weight in [0, 1] for each training image, some of whose labels are wrong.

    .. math:: G = \operatorname{mean} v_i\, \mathrm{CE}_i(W) + 0.001 \|W\|^2, \quad
        F = \operatorname{mean}_{\text{trusted}} \mathrm{CE}(W)

    As in BOME's paper, on a smaller set: a linear model, weights that start at 1/2, 300 trusted images. No best value
    is known; :meth:`Cleaning.found` says which labels were found to be wrong.

    Args:
        samples: Training images, >= 10.
        share: Of these with a label drawn anew, the true one included, in [0, 1].
        seed: Which, and what they become.
        dtype: Floating-point type.

    Raises:
        TypeError, ValueError: A number is off.
        ImportError: scikit-learn is not there.

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.digits(samples=100)
        >>> problem.upper.shape, problem.lower.shape
        (torch.Size([100]), torch.Size([64, 10]))
    """
    count("digits", "samples", samples, minimum=10)
    inputs, targets = _loaded("digits", "digits")
    labels = targets.long()
    train, trusted = inputs[300 : 300 + samples].to(dtype), inputs[:300].to(dtype)
    generator = torch.Generator().manual_seed(seed)
    given = labels[300 : 300 + samples].clone()
    drawn = torch.randperm(samples, generator=generator)[: round(share * samples)]
    given[drawn] = torch.randint(10, (len(drawn),), generator=generator)
    v = torch.full((samples,), 0.5, dtype=dtype, requires_grad=True)
    w = torch.zeros(64, 10, dtype=dtype, requires_grad=True)
    return Cleaning(
        upper=v,
        lower=w,
        upper_loss=lambda: cross_entropy(trusted @ w, labels[:300]),
        lower_loss=lambda: (v * cross_entropy(train @ w, given, reduction="none")).mean() + 0.001 * (w**2).sum(),
        learning_rate=0.5,
        upper_solution=None,
        lower_solution=None,
        upper_box=(torch.zeros(samples, dtype=dtype), torch.ones(samples, dtype=dtype)),
        name="digits",
        source="Ye et al., BOME, NeurIPS 2022, data hyper-cleaning; scikit-learn",
        tags=frozenset({"strongly-convex", "bounds", "learning"}),
        wrong=given != labels[300 : 300 + samples],
    )
