"""The three toy problems of BOME's paper, as pictures: ``python -m examples.toys``.

Each has a known answer and defeats a simpler idea. *Degenerate*: G leaves one variable free, so its Hessian cannot be
inverted. *Minimax*: a saddle, from which gradient descent of both players spirals outwards. *Coreset*: the upper
minimiser lies at infinity. :class:`bilevel.BOME` runs with the paper's settings from the paper's starts.

Measured (deterministic; 41 s of one CPU core): degenerate v = 0.99999, θ = (1.00000, 0.99999) after 2000 steps; minimax
v = 0.049, θ = -0.016 after 200; coreset from all three starts within 0.02 of θ = (1.8, 0.4) and 0.004 of the weights
(0, 0.8, 0, 0.2) after 5000, with F = 0.709 just below the solution's 0.72, because Q is still 1e-3.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import bilevel
from bilevel.problems import Problem

HULL = np.array([[1.0, 3.0], [3.0, 1.0], [-3.0, -2.0], [-2.0, 2.0], [1.0, 3.0]])  # the coreset's points, in a ring
TARGET = np.array([3.0, -2.0])


@dataclass(frozen=True)
class Run:
    """One row per step, the start included, and the losses at the end."""

    upper: np.ndarray
    lower: np.ndarray
    upper_loss: float
    constraint: float


def follow(problem: Problem, steps: int, inner_steps: int, eps: float = 1e-8) -> Run:
    """Take steps of BOME with the problem's published rate and projections."""
    upper_optimizer, lower_optimizer = problem.optimizers()
    optimizer = bilevel.BOME(
        problem.upper_loss,
        problem.lower_loss,
        upper=problem.upper,
        lower=problem.lower,
        upper_optimizer=upper_optimizer,
        lower_optimizer=lower_optimizer,
        inner_steps=inner_steps,
        barrier=bilevel.barrier.GradientNorm(0.5),
        eps=eps,
    )
    upper, lower = [problem.upper.detach().clone()], [problem.lower.detach().clone()]
    for _ in range(steps):
        optimizer.step()
        upper.append(problem.upper.detach().clone())
        lower.append(problem.lower.detach().clone())
    end = optimizer.directions().stats.as_dict()  # the losses at the end point; moves nothing
    return Run(torch.stack(upper).numpy(), torch.stack(lower).numpy(), end["upper_loss"], end["constraint"])


def both_descend(steps: int, rate: float = 0.05) -> np.ndarray:
    """On the minimax toy, let each player follow its own gradient: what BOME is compared with."""
    points = [np.array([4.0, 4.0])]
    for _ in range(steps):
        v, theta = points[-1]
        points.append(np.clip([v - rate * theta, theta + rate * v], -10, 10))
    return np.stack(points)


def draw(file: Path, degenerate: Run, minimax: Run, coresets: list[Run]) -> None:
    """Draw the trajectories, one problem a panel."""
    figure = Figure((12, 3.8), layout="constrained")
    first, second, third = panels = figure.subplots(1, 3)
    shown = min(60, len(degenerate.upper))
    for values, name in zip((degenerate.upper, *degenerate.lower.T), ("v", "θ₀", "θ₁"), strict=True):
        first.plot(values[:shown], label=name)
    first.axhline(1, color="0.7", linestyle=":", label="solution")
    first.set(title="Degenerate", xlabel="step")
    second.plot(*both_descend(200).T, color="0.7", label="both descend")
    second.plot(minimax.upper, minimax.lower, label="BOME")
    second.plot(0, 0, "k*", markersize=10, label="solution")
    second.set(title="Minimax", xlabel="v", ylabel="θ")
    third.fill(*HULL.T, color="0.9", label="convex hull of the points")
    third.plot(*TARGET, "ks", label="x₀")
    for run in coresets:
        third.plot(*run.lower.T, color="tab:blue", label="BOME, θ" if run is coresets[0] else None)
        third.plot(*run.lower[0], "o", color="tab:blue")
    third.plot(1.8, 0.4, "k*", markersize=10, label="solution")
    third.set(title="Coreset", xlabel="θ₀", ylabel="θ₁", aspect="equal")
    for panel in panels:
        panel.legend(fontsize=8)
    figure.savefig(file, dpi=75)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the three toys, print where they end, draw them, and return the distances to the solutions."""
    parser = argparse.ArgumentParser(description="The three toy problems of BOME's paper, as pictures.")
    parser.add_argument("--out", type=Path, default=Path("runs/toys"), help="folder of the picture")
    parser.add_argument("--smoke", action="store_true", help="fewer steps and one coreset start: seconds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    many = 400 if options.smoke else 2000
    degenerate = follow(bilevel.problems.degenerate(), many, inner_steps=1)
    v, theta = degenerate.upper[-1], degenerate.lower[-1]
    print(f"degenerate, {many} steps: v = {v:.5f}, θ = ({theta[0]:.5f}, {theta[1]:.5f}); solution 1, (1, 1)")
    minimax = follow(bilevel.problems.minimax(), 200, inner_steps=10)
    print(f"minimax, 200 steps: v = {minimax.upper[-1]:.3f}, θ = {minimax.lower[-1]:.3f}; solution 0, 0")
    many = 500 if options.smoke else 5000
    coresets = []
    for start in range(1 if options.smoke else 3):
        run = follow(bilevel.problems.coreset(start), many, inner_steps=10, eps=1e-4)
        weights = ", ".join(f"{w:.3f}" for w in torch.softmax(torch.from_numpy(run.upper[-1]), 0).tolist())
        print(
            f"coreset from {run.lower[0]}, {many} steps: θ = ({run.lower[-1, 0]:.3f}, {run.lower[-1, 1]:.3f}), "
            f"weights ({weights}), F = {run.upper_loss:.3f}, Q = {run.constraint:.1e}; "
            "solution (1.8, 0.4), (0, 0.8, 0, 0.2), 0.72, 0"
        )
        coresets.append(run)
    draw(options.out / "toys.png", degenerate, minimax, coresets)
    distances = {
        "degenerate": float(np.abs(np.append(theta, v) - 1).max()),
        "minimax": float(max(abs(minimax.upper[-1]), abs(minimax.lower[-1]))),
        "coreset": float(max(np.abs(run.lower[-1] - [1.8, 0.4]).max() for run in coresets)),
    }
    found = ", ".join(f"{name} {distance:.1e}" for name, distance in distances.items())
    print(f"toys: largest distance to the solution: {found}; {time.perf_counter() - began:.0f} s")
    return distances


if __name__ == "__main__":
    main()
