"""Learning problems on scikit-learn's data: their best values by scipy above a solved lower problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import problems
from bilevel.problems import Problem
from bilevel.problems.data import _loaded


def scipy_above(value: Any, problem: Problem, starts: list[list[float]]) -> Any:
    """L-BFGS-B on a function that returns F and its gradient, from the best of some starts."""
    from scipy.optimize import minimize

    assert problem.upper_bounds is not None
    low, high = problem.upper_bounds
    box = list(zip(low.tolist(), high.tolist(), strict=True))
    found = [minimize(value, start, jac=True, bounds=box, method="L-BFGS-B") for start in starts]
    return min(found, key=lambda result: float(result.fun))


def ridge(inputs: Tensor, targets: Tensor, x: Tensor) -> Tensor:
    system = inputs.T @ inputs / len(inputs) + torch.diag(x.exp())
    return torch.linalg.solve(system, inputs.T @ targets / len(inputs))


def test_the_best_penalties_for_diabetes() -> None:
    problem = problems.diabetes()
    inputs, targets = _loaded("test", "diabetes")
    targets = (targets - targets.mean()) / targets.std()

    def value(point: list[float]) -> tuple[float, list[float]]:
        x = torch.tensor(point, dtype=torch.float64).requires_grad_()
        w = ridge(inputs[:221], targets[:221], x)
        f = 0.5 * ((inputs[221:] @ w - targets[221:]) ** 2).mean()
        return f.item(), torch.autograd.grad(f, x)[0].tolist()

    generator = torch.Generator().manual_seed(1)
    starts = [(12 * torch.rand(10, generator=generator) - 8).tolist() for _ in range(4)]
    found = scipy_above(value, problem, starts)
    assert found.fun == pytest.approx(problem.best, abs=5e-4)
    x = torch.tensor(found.x)
    assert problem.solved(x, ridge(inputs[:221], targets[:221], x))
    assert not problem.solved(x, torch.zeros(10, dtype=torch.float64))


def test_the_best_penalties_for_breast_cancer() -> None:
    problem = problems.breast_cancer()
    assert problem.best is not None
    inputs, targets = _loaded("test", "breast_cancer")
    signed = inputs * (2 * targets - 1)[:, None]
    train, held_out = signed[:285], signed[285:]
    latest: list[Tensor] = []

    def value(point: list[float]) -> tuple[float, list[float]]:
        """By Newton's method, whose last Hessian gives the hypergradient."""
        x, w = torch.tensor(point, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
        for _ in range(60):
            s = torch.sigmoid(-(train @ w))
            gradient = -(train * s[:, None]).mean(0) + x.exp() * w
            hessian = (train * (s * (1 - s))[:, None]).T @ train / len(train) + torch.diag(x.exp())
            step = torch.linalg.solve(hessian, gradient)
            w = w - step * min(1.0, 2.0 / float(step.norm()))
        latest[:] = [w]
        s = torch.sigmoid(-(held_out @ w))
        solved = torch.linalg.solve(hessian, -(held_out * s[:, None]).mean(0))
        f = torch.nn.functional.softplus(-(held_out @ w)).mean()
        return f.item(), (-(x.exp() * w) * solved).tolist()

    found = scipy_above(value, problem, [[0.0] * 30])
    value(found.x.tolist())
    assert found.fun > problem.best - 1e-4
    assert problem.solved(torch.tensor(found.x), latest[0])


def test_digits_with_wrong_labels() -> None:
    problem = problems.digits(samples=200, share=0.5, seed=3)
    # Half are drawn anew, a tenth of these by chance as they were
    assert 0.38 < problem.wrong.float().mean().item() < 0.5
    with torch.no_grad():
        problem.upper.copy_((~problem.wrong).to(problem.upper))
    assert problem.found() == (1.0, 0.0)
    assert problems.digits(share=0.0).wrong.sum().item() == 0
    # The lower loss weighs samples: those of weight 0 have no gradient
    (gradient,) = torch.autograd.grad(problem.lower_loss(), problem.upper)
    assert gradient.shape == (200,)
    assert gradient.min().item() == pytest.approx(torch.tensor(10.0).log().item() / 200)  # CE of a zero model
    with pytest.raises(ValueError, match=r"digits\(samples=3\): must be at least 10"):
        problems.digits(samples=3)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"diabetes\(\): needs scikit-learn"):
        problems.diabetes()
