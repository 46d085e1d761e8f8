"""The suite: is every stated best value right? By grids, closed forms and nested solves that share no code with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bilevel import problems
from bilevel.problems import Problem
from bilevel.problems.lower_search import lowest
from bilevel.problems.ours import INPUTS, SPOILED, TARGETS

pytestmark = pytest.mark.thorough

NAMES = problems.names()
REACH = 6.0  # of a grid where a variable has no bounds; every answer lies well inside


def axis(variable: Tensor, bounds: tuple[Tensor, Tensor] | None, points: int) -> Tensor:
    low, high = (-REACH, REACH) if bounds is None else (bounds[0].item(), bounds[1].item())
    centre = 0.0 if low == -high else low
    high = min(high, centre + 4 * REACH)
    # an even number of intervals, so that the ends and the middle are points: jumps of the suite lie there
    return torch.linspace(low, high, points, dtype=torch.float64)


def best_on_a_grid(problem: Problem) -> float:
    """The optimistic value: for each x of a grid, the smallest F over all y of a grid with the smallest G."""
    assert problem.formulas is not None
    upper_loss, lower_loss = problem.formulas
    y = axis(problem.lower, problem.lower_bounds, 48_001)[None]
    values = []
    for x in axis(problem.upper, problem.upper_bounds, 961):
        g = lower_loss(x[None], y)
        f = upper_loss(x[None], y)
        values.append(f[g <= g.min() + 1e-10 * max(1.0, abs(g.min().item())) + between_points(g)].min().item())
    return min(values)


def between_points(g: Tensor) -> float:
    """By how much equal minima may differ on a grid: one lies nearer to a point than another does."""
    best = int(g.argmin())
    bend = (g[best - 1] - 2 * g[best] + g[best + 1]).item() if 0 < best < len(g) - 1 else 0.0
    return (
        bend / 4 if bend < 1e-6 else 0.0
    )  # of a smooth minimum an eighth of it, at most; a kink is no matter of points


ON_A_GRID = [
    name
    for name in NAMES
    if (p := problems.named(name)).formulas is not None and p.upper.numel() == p.lower.numel() == 1
    if name not in {"macal-hurter-1997", "henderson-quandt-1958"}  # far outside the grid; in closed form below
]


@pytest.mark.parametrize("name", ON_A_GRID)
def test_the_best_value_is_that_of_a_grid(name: str) -> None:
    problem = problems.named(name)
    found = best_on_a_grid(problem)
    assert problem.best is not None
    assert found == pytest.approx(problem.best, abs=0.6 * problem.tolerance)


# Lower solutions by hand, and with them F as a function of x alone.

LowerMap = Callable[[Tensor], list[Tensor]]


def rows(*entries: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*entries))


zero = torch.zeros((), dtype=torch.float64)
one = zero + 1
PI = torch.pi

BY_HAND: dict[str, LowerMap] = {
    "smd-1": lambda x: [rows(zero, zero, x[1].atan())],
    "smd-2": lambda x: [rows(zero, zero, x[1].exp())],
    "smd-3": lambda x: [rows(zero, zero, (x[1] ** 2).atan())],
    "smd-4": lambda x: [rows(zero, zero, x[1].abs().exp() - 1)],
    "smd-5": lambda x: [rows(one, one, sign * x[1].abs().sqrt()) for sign in (-1, 1)],
    "smd-6": lambda x: [rows(zero, t, t, x[1]) for t in torch.linspace(-5, 10, 31, dtype=torch.float64)],
    "smd-7": lambda x: [rows(zero, zero, x[1].exp())],
    "smd-8": lambda x: [rows(one, one, x[1].sign() * x[1].abs() ** (1 / 3))],
    "tp-9": lambda x: [rows(zero + 0 * x[0], zero)],
    "bvfsm-sine-2": lambda x: [
        rows(2 - PI / 2 + 2 * PI * k - x[0], 2 - PI / 2 + 2 * PI * j - x[0]) for k in range(-2, 4) for j in range(-2, 4)
    ],
    "de-silva-1978": lambda x: [x.clamp(0.5, 1.5)],
    "falk-liu-1995": lambda x: [x.clamp(0.5, 1.5)],
    "hatz-etal-2013": lambda x: [rows(x[0].clamp(min=0), zero)],
    "macal-hurter-1997": lambda x: [50 * x - 500],
    "henderson-quandt-1958": lambda x: [(50 - x / 4).clamp(min=0)],
    "valley": lambda x: [rows(t, x[0] - t) for t in torch.linspace(-2, 4, 181, dtype=torch.float64)],
    "curved-valley": lambda x: [rows(x[0], x[0] ** 2)],
    "scaled": lambda x: [x],
    "sines": lambda x: [x.sin()],
    "corner": lambda x: [(2 * x).clamp(-1, 1)],
    "eight-wells": lambda x: [
        torch.cat([-_well(x, s) for s in signs]) for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    ],
}


def _well(x: Tensor, sign: Tensor) -> Tensor:
    """The minimum of (y^2 - 1)^2 + x y / 2 near a sign, by Newton's method; the lower one where sign is that of x."""
    y = -sign * torch.ones_like(x)
    for _ in range(30):
        y = y - (4 * y * (y**2 - 1) + 0.5 * x) / (12 * y**2 - 4)
    return -y


def candidates(problem: Problem) -> Tensor:
    """Points of the upper box: all of a line, or quasi-random ones, and many close to the stated answer."""
    size = problem.upper.numel()
    bounds = problem.upper_bounds
    low, high = (torch.full((size,), -REACH), torch.full((size,), REACH)) if bounds is None else bounds
    low, high = low.to(torch.float64), high.clamp(max=200).to(torch.float64)
    sobol = torch.quasirandom.SobolEngine(size, scramble=True, seed=1).draw(4096, dtype=torch.float64)
    points = [low + (high - low) * sobol]
    if problem.upper_solution is not None:
        noise = torch.randn(4096, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        scale = torch.logspace(-6, 0, 4096, dtype=torch.float64)[:, None]
        points += [problem.upper_solution[None], (problem.upper_solution + scale * noise).clamp(low, high)]
    return torch.cat(points)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_best_value_is_that_of_lower_solutions_by_hand(name: str) -> None:
    problem = problems.named(name)
    assert problem.formulas is not None
    assert problem.best is not None
    upper_loss, lower_loss = problem.formulas
    points = candidates(problem)
    if name in {"sines", "macal-hurter-1997", "curved-valley"}:  # separable, or of one variable: a line suffices
        line = torch.linspace(-2, 20, 220_001, dtype=torch.float64)[:, None]
        points = line.expand(-1, problem.upper.numel())
    if name == "henderson-quandt-1958":
        points = torch.linspace(0, 200, 20_001, dtype=torch.float64)[:, None]
    # the maps really are lower solutions: a search finds nothing lower
    for x in points[:: max(1, len(points) // 5)]:
        by_hand = min(lower_loss(x, y).item() for y in BY_HAND[name](x))
        if x.abs().max() < 20:
            found = lowest(lower_loss, x, BY_HAND[name](x)[:1], problem.lower_bounds)[0]
            assert by_hand <= found + 1e-6 * max(1.0, abs(found))
    x = points.T
    maps = BY_HAND[name](x)
    g = torch.stack([lower_loss(x, y) for y in maps])
    f = torch.stack([upper_loss(x, y) for y in maps]).masked_fill(g > g.min(0).values + 1e-9, torch.inf).min(0).values
    assert f.min().item() >= problem.best - 0.5 * problem.tolerance * max(1.0, abs(problem.best))
    assert f.min().item() <= problem.best + 0.5 * problem.tolerance * max(1.0, abs(problem.best))


# Learning problems: the lower solution by linear algebra, scipy above it, from many starts.


def ridge(x: Tensor) -> Tensor:
    return torch.linalg.solve(INPUTS.T @ INPUTS / 12 + torch.diag(x.exp()), INPUTS.T @ TARGETS / 12)


def cleaning(x: Tensor) -> Tensor:
    system = INPUTS.T @ (x[:, None] * INPUTS) / 12 + 0.1 * torch.eye(3, dtype=torch.float64)
    return torch.linalg.solve(system, INPUTS.T @ (x * SPOILED) / 12)


def logistic(x: Tensor) -> Tensor:
    a, w = INPUTS * TARGETS.sign()[:, None], torch.zeros(3, dtype=torch.float64)
    for _ in range(40):
        s = torch.sigmoid(-a @ w)
        hessian = (a * (s * (1 - s))[:, None]).T @ a / 12 + torch.diag(x.exp())
        w = w - torch.linalg.solve(hessian, -(a * s[:, None]).mean(0) + x.exp() * w)
    return w


@pytest.mark.parametrize(
    ("name", "solve", "starts"), [("ridge", ridge, 6), ("cleaning", cleaning, 6), ("logistic-penalties", logistic, 3)]
)
def test_the_best_value_is_that_of_scipy_above_a_solved_lower_problem(
    name: str, solve: Callable[[Tensor], Tensor], starts: int
) -> None:
    from scipy.optimize import minimize

    problem = problems.named(name)
    assert problem.formulas is not None
    assert problem.upper_bounds is not None
    upper_loss, lower_loss = problem.formulas
    low, high = problem.upper_bounds
    draws = torch.rand(starts, len(low), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(x: list[float]) -> float:
        at = torch.tensor(x, dtype=torch.float64)
        return float(upper_loss(at, solve(at)))

    box = list(zip(low.tolist(), high.tolist(), strict=True))
    found = min((minimize(value, low + (high - low) * draw, bounds=box) for draw in draws), key=lambda r: float(r.fun))
    assert found.fun == pytest.approx(problem.best, abs=1e-4)
    x = torch.tensor(found.x)
    w = solve(x).requires_grad_()
    (gradient,) = torch.autograd.grad(lower_loss(x, w), w)  # the solve is one of the suite's own lower loss
    assert gradient.abs().max().item() < 1e-8
    assert problem.solved(x, w)


def test_every_best_value_is_derived_in_one_of_these_ways() -> None:
    elsewhere = {"bome-degenerate", "bome-minimax", "bome-coreset-0", "bome-coreset-1", "bome-coreset-2"}
    elsewhere |= {"quadratic-0", "quadratic-1", "finite-sum-0"}  # test_problems.py, and below
    assert {*ON_A_GRID, *BY_HAND, "ridge", "cleaning", "logistic-penalties", *elsewhere} == set(NAMES)
    assert len(NAMES) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_a_problem_is_whole(name: str) -> None:
    problem = problems.named(name)
    assert problem.name == name
    assert problem.source
    assert problem.tags
    assert problem.tags <= set(problems.tags())
    assert not problem.solved()  # the start is not the answer
    if problem.upper_solution is not None and problem.lower_solution is not None:
        assert problem.solved(problem.upper_solution, problem.lower_solution)
    for variable, bounds in ((problem.upper, problem.upper_bounds), (problem.lower, problem.lower_bounds)):
        assert variable.is_leaf
        assert bounds is None or bool(((variable >= bounds[0]) & (variable <= bounds[1])).all())
    if problem.formulas is not None:
        f, g = (formula(problem.upper.detach(), problem.lower.detach()).item() for formula in problem.formulas)
        assert (problem.upper_loss().item(), problem.lower_loss().item()) == (f, g)


def test_a_pair_that_is_not_lower_optimal_does_not_count() -> None:
    """SMD2 rewards a y that is worse for G: F is then even below the best value."""
    problem = problems.named("smd-2")
    cheat = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    assert not problem.solved(torch.tensor([0.5, 0.0], dtype=torch.float64), cheat)
    f, g = problem.errors(torch.tensor([0.5, 0.0], dtype=torch.float64), cheat)
    assert (f, g) == pytest.approx((0.0, 0.25), abs=1e-6)


def test_a_pair_outside_its_bounds_does_not_count() -> None:
    problem = problems.named("mitsos-barton-3.15")
    outside = torch.tensor([-2.0], dtype=torch.float64)
    assert problem.errors(outside, torch.tensor([1.0], dtype=torch.float64)) == (float("inf"), float("inf"))


def test_a_problem_without_a_known_answer_says_so() -> None:
    problem = Problem(
        upper=torch.zeros(1, requires_grad=True),
        lower=torch.zeros(1, requires_grad=True),
        upper_loss=lambda: torch.zeros(()),
        lower_loss=lambda: torch.zeros(()),
        learning_rate=0.1,
        upper_solution=None,
        lower_solution=None,
    )
    with pytest.raises(ValueError, match="no known best value"):
        problem.solved()


def test_the_finite_sum_is_the_mean_of_its_batches_and_its_answer_solves_it() -> None:
    problem = problems.finite_sum(seed=3, samples=12)
    batches = torch.arange(12).split(4)
    for loss in (problem.upper_loss, problem.lower_loss):
        means = [loss(batch).item() for batch in batches]  # type: ignore[call-arg]
        assert sum(means) / 3 == pytest.approx(loss().item(), rel=1e-12)
    alpha = problem.upper_solution
    assert alpha is not None
    assert problem.lower_value is not None

    def value(at: Tensor) -> float:
        """F where the lower problem is solved by gradient descent to rounding."""
        with torch.no_grad():
            problem.upper.copy_(at)
        for _ in range(3000):
            (gradient,) = torch.autograd.grad(problem.lower_loss(), problem.lower)
            problem.lower.data -= 0.3 * gradient
        assert problem.lower_value is not None
        assert problem.lower_loss().item() == pytest.approx(problem.lower_value(at), abs=1e-10)
        return problem.upper_loss().item()

    best = value(alpha)
    assert best == pytest.approx(problem.best, rel=1e-9)
    assert all(value(alpha + 0.05 * torch.eye(3, dtype=torch.float64)[i] * s) > best for i in range(3) for s in (-1, 1))


def test_unknown_names_and_tags_are_refused() -> None:
    with pytest.raises(ValueError, match="is no problem of the suite"):
        problems.named("rosenbrok")
    with pytest.raises(ValueError, match="must be one of"):
        problems.names("convecs")
