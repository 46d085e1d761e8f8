"""Hyperparameter search by gradient, one for each feature: ``python -m examples.learned_regularisation``.

A linear regression with 60 features of which six matter. The lower problem fits 80 samples under the penalty
``exp(v_j) w_j^2``; the upper problem moves v so that the fit does well on 80 others. :class:`bilevel.Implicit` and
:class:`bilevel.Unrolled` are compared with the grid search that everybody does, over one strength for all features.

Everything is known here: the fit and the exact hypergradient in closed form, the error on new samples from the true
weights, and the error of a fit that is told which features matter.

Measured, excess error, mean of seeds 1 to 3 (24 s of one CPU core): grid search 1.49, Implicit 0.35, Unrolled 0.32,
told 0.12. At the end the hypergradient of Implicit is 0.01 to 0.05 % off the exact one, that of Unrolled, which sees
the last 20 steps only, 7 to 34 %. Some features that do not matter keep a small penalty.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import bilevel

FEATURES, MATTER, SAMPLES = 60, 6, 80
METHODS: dict[str, Callable[..., bilevel.BilevelOptimizer]] = {
    "Implicit": partial(bilevel.Implicit, inner_steps=20),
    "Unrolled": partial(bilevel.Unrolled, inner_steps=20, virtual=False),  # the steps are real: w goes on from there
}


@dataclass(frozen=True)
class Problem:
    """Samples for the fit and for the upper problem, and the weights that made them."""

    x: Tensor
    y: Tensor
    upper_x: Tensor
    upper_y: Tensor
    truth: Tensor

    def fit(self, v: Tensor) -> Tensor:
        """Return the lower solution in closed form; differentiable in v."""
        system = self.x.T @ self.x / SAMPLES + torch.diag(v.exp())
        return system.inverse() @ self.x.T @ self.y / SAMPLES

    def lower_loss(self, w: Tensor, v: Tensor) -> Tensor:
        return (self.x @ w - self.y).square().mean() + (v.exp() * w.square()).sum()

    def upper_loss(self, w: Tensor) -> Tensor:
        return (self.upper_x @ w - self.upper_y).square().mean()

    def excess(self, w: Tensor) -> float:
        """Return the expected squared error on new samples beyond the noise."""
        return float((w - self.truth).square().sum())


def random_problem(seed: int) -> Problem:
    """Draw samples and weights; the features that matter come first."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth = torch.cat([torch.linspace(0.5, 1.5, MATTER) * normal(MATTER).sign(), torch.zeros(FEATURES - MATTER)])
    x, upper_x = normal(SAMPLES, FEATURES), normal(SAMPLES, FEATURES)
    return Problem(x, x @ truth + normal(SAMPLES), upper_x, upper_x @ truth + normal(SAMPLES), truth)


def grid_search(problem: Problem) -> Tensor:
    """Return the fit under the one strength, out of 37, that does best on the upper samples."""
    strengths = torch.linspace(-6, 3, 37, dtype=torch.float64)
    return min((problem.fit(v.expand(FEATURES)) for v in strengths), key=lambda w: float(problem.upper_loss(w)))


def told(problem: Problem) -> Tensor:
    """Return the least-squares fit on the features that matter: the mark to aim at."""
    w = torch.linalg.lstsq(problem.x[:, :MATTER], problem.y[:, None]).solution.squeeze(1)
    return torch.cat([w, torch.zeros(FEATURES - MATTER)])


def learn(problem: Problem, name: str, steps: int) -> tuple[Tensor, Tensor, float]:
    """Learn v by one of the methods; return w, v and the relative error of its hypergradient at the end."""
    v, w = (torch.full((FEATURES,), start, dtype=torch.float64, requires_grad=True) for start in (-2.0, 0.0))
    upper_optimizer = torch.optim.Adam([v], lr=0.1)

    def keep_stable(*_: object) -> None:  # lower steps diverge where the rate times the curvature exceeds 2
        v.data.clamp_(-6, 1)

    upper_optimizer.register_step_post_hook(keep_stable)
    optimizer = METHODS[name](
        lambda: problem.upper_loss(w),
        lambda: problem.lower_loss(w, v),
        upper=v,
        lower=w,
        upper_optimizer=upper_optimizer,
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
    )
    for _ in range(steps):
        optimizer.step()
    (exact,) = torch.autograd.grad(problem.upper_loss(problem.fit(v)), v)
    error = (optimizer.directions().upper["0"] - exact).norm() / exact.norm()
    return w.detach(), v.detach(), float(error)


def draw(file: Path, learned: dict[str, Tensor]) -> None:
    """Draw the learned strength of each feature."""
    panel = (figure := Figure((8, 3.4), layout="constrained")).subplots()
    panel.axvspan(-0.5, MATTER - 0.5, color="0.9", label="features that matter")
    for (name, v), marker in zip(learned.items(), "ox", strict=True):
        panel.semilogy(v.exp(), marker, label=name)
    panel.set(xlabel="feature", ylabel="strength exp(v)")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(file, dpi=80)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Learn on each seed, print and return mean results, and draw the first seed's strengths."""
    parser = argparse.ArgumentParser(description="A penalty for each feature, learned by gradient.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/learned_regularisation"), help="folder of the picture")
    parser.add_argument("--smoke", action="store_true", help="the first seed and 50 upper steps: seconds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds, steps = (options.seeds[:1], 50) if options.smoke else (options.seeds, 200)
    began, rows = time.perf_counter(), []
    for seed in seeds:
        problem, learned = random_problem(seed), {}
        row = {"grid": problem.excess(grid_search(problem)), "told": problem.excess(told(problem))}
        for name in METHODS:
            w, learned[name], row[f"{name} hypergradient"] = learn(problem, name, steps)
            row[name] = problem.excess(w)
        rows.append(row)
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.2g}" for name, value in row.items()))
        if seed == seeds[0]:
            draw(options.out / "strengths.png", learned)
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    found = ", ".join(f"{name} {mean[name]:.2f}" for name in ("grid", *METHODS, "told"))
    print(f"learned regularisation, excess error, mean of seeds {seeds}: {found}; {time.perf_counter() - began:.0f} s")
    return mean


if __name__ == "__main__":
    main()
