"""Penalty methods, each beside a plain loop written here from its paper, and on problems with known answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import problems
from bilevel.methods.f2sa import coefficients
from bilevel.penalty import Constant, Linear, Logarithmic, Power, Schedule, value_at
from family import LOWER_RATE, UPPER_RATE, Curved, State, assert_follows, distance, resumed, trained

# --- schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(3.0), [3.0, 3.0, 3.0, 3.0]),
        (Linear(1.0, slope=0.5), [1.0, 1.5, 2.0, 2.5]),
        (Linear(1.0, slope=0.5, maximum=1.75), [1.0, 1.5, 1.75, 1.75]),
        (Power(2.0, 0.5), [2.0, 2 * 2**0.5, 2 * 3**0.5, 4.0]),
        (Power(2.0, -1.0), [2.0, 1.0, 2 / 3, 0.5]),
        (Logarithmic(0.1, base=2.0), [0.1 / 0.6931471805599453, 0.1 / 1.3862943611198906, 0.1 / 1.791759469228055]),
    ],
)
def test_schedules(schedule: Schedule, expected: list[float]) -> None:
    assert [value_at(schedule, k) for k in range(len(expected))] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("build", "error", "pattern"),
    [
        (lambda: Linear(-1.0, slope=1.0), ValueError, r"Linear\(start=-1\.0\): must be finite and at least 0"),
        (lambda: Linear(1.0, slope=1.0, maximum=0.5), ValueError, r"Linear\(maximum=0\.5\): .* at least 1"),
        (lambda: Constant("1"), TypeError, r"Constant\(value=1\): must be a Python number"),
        (lambda: Power(1.0, float("inf")), ValueError, r"Power\(exponent=inf\): must be finite"),
        (lambda: Logarithmic(1.0, base=1.0), ValueError, r"Logarithmic\(base=1\.0\): .* greater than 1"),
        (lambda: Curved().optimizer(bilevel.VPBGD, penalty="high"), TypeError, r"VPBGD\(penalty=high\): .*schedule"),
        (lambda: Curved().optimizer(bilevel.VPBGD, penalty=-1.0), ValueError, r"VPBGD\(penalty=-1\.0\): must be"),
    ],
)
def test_wrong_schedules_are_refused(build: Any, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        build()


def test_a_penalty_may_be_set_while_training() -> None:
    one, two = Curved(), Curved()
    set_later, scheduled = (
        one.optimizer(bilevel.VPBGD, penalty=1.0),
        two.optimizer(bilevel.VPBGD, penalty=Linear(1.0, 2.0)),
    )
    for k in range(3):
        set_later.penalty = 1.0 + 2.0 * k
        assert set_later.step(0.0, 0.0).penalty == scheduled.step(0.0, 0.0).penalty == 1.0 + 2.0 * k
    assert torch.equal(one.alpha, two.alpha)


# --- V-PBGD -------------------------------------------------------------------------------------------------------

RATE = 0.03


def vpbgd(*, start: str, normalise: bool) -> Any:
    """Algorithm V-PBGD, with the scale of its code."""

    def step(
        p: Curved, w: Tensor, alpha: Tensor, state: State, upper: float, lower: list[float]
    ) -> tuple[Tensor, Tensor]:
        k = state["k"] = state.get("k", -1) + 1
        gamma = min(0.5 + 0.7 * k, 2.5)
        omega = state.get("omega", w) if start == "last" else w
        for batch in lower:
            omega = omega - RATE * p.gradients(p.g, omega, alpha, batch).lower
        state["omega"] = omega
        f, g = p.gradients(p.f, w, alpha, upper), p.gradients(p.g, w, alpha, lower[0])
        ahead = p.gradients(p.g, omega, alpha, lower[0])
        scale = min(1 / (gamma + 1e-8), 1) if normalise else 1.0
        return (
            w - LOWER_RATE * scale * (f.lower + gamma * g.lower),
            alpha - UPPER_RATE * scale * (f.upper + gamma * (g.upper - ahead.upper)),
        )

    return step


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("start", ["last", "current"])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_vpbgd_is_its_paper(inner_steps: int, start: Any, normalise: bool) -> None:
    stats = assert_follows(
        bilevel.VPBGD,
        vpbgd(start=start, normalise=normalise),
        each=inner_steps,
        inner_steps=inner_steps,
        inner_lr=RATE,
        start=start,
        normalise=normalise,
        penalty=Linear(0.5, slope=0.7, maximum=2.5),
    )
    assert stats.penalty == 2.5


def penalised(p: problems.Quadratic, gamma: float) -> tuple[Tensor, Tensor]:
    """Where ``F + gamma (G - min G)`` is smallest: its gradient is linear, as ``G - min G = |w - w*|_H^2 / 2``."""
    slope = torch.linalg.solve(p.hessian, p.coupling)  # w* = slope alpha + intercept
    intercept = torch.linalg.solve(p.hessian, p.offset)
    upper = torch.eye(len(p.anchor), dtype=torch.float64)
    rows = [
        torch.cat([p.upper_hessian + gamma * p.hessian, -gamma * p.coupling], 1),
        torch.cat([-gamma * p.coupling.T, p.weight * upper + gamma * slope.T @ p.coupling], 1),
    ]
    right = torch.cat(
        [
            p.upper_hessian @ p.target + gamma * p.offset,
            p.weight * p.anchor - gamma * slope.T @ p.hessian @ intercept,
        ]
    )
    both = torch.linalg.solve(torch.cat(rows), right)
    return both[: len(p.target)], both[len(p.target) :]


def test_the_bias_of_the_penalised_problem_is_of_order_one_over_gamma() -> None:
    p = problems.quadratic(seed=2)
    assert p.upper_solution is not None
    biases = [gamma * float((penalised(p, gamma)[1] - p.upper_solution).norm()) for gamma in (1e4, 1e5)]
    assert biases[0] == pytest.approx(biases[1], rel=1e-3)
    assert biases[1] > 0.1


@pytest.mark.thorough
@pytest.mark.parametrize("gamma", [2.0, 8.0])
def test_vpbgd_ends_at_the_minimiser_of_the_penalised_problem(gamma: float) -> None:
    problem = problems.quadratic(seed=2)
    trained(problem, bilevel.VPBGD, 900, (0.2, 0.2), penalty=gamma, inner_lr=0.2, inner_steps=2)
    w, alpha = penalised(problem, gamma)
    torch.testing.assert_close(problem.upper.detach(), alpha, rtol=0, atol=1e-7)
    torch.testing.assert_close(problem.lower.detach(), w, rtol=0, atol=1e-7)


def test_vpbgd_solves_a_problem_with_several_lower_minima() -> None:
    problem = problems.degenerate()
    trained(problem, bilevel.VPBGD, 1000, (0.2, 0.2), penalty=2.0, inner_lr=0.5)
    assert distance(problem) < 1e-6


@pytest.mark.parametrize("options", [{"penalty": Linear(0.5, slope=1.0)}, {"start": "current"}])
def test_vpbgd_resumes(options: dict[str, Any]) -> None:
    for one, two in resumed(bilevel.VPBGD, **options):
        assert torch.equal(one, two)


# --- F2SA ---------------------------------------------------------------------------------------------------------

# By hand: forward difference, central difference, and the textbook's of order 3 and 4.
QUOTIENTS = {
    1: {0: -1.0, 1: 1.0},
    2: {-1: -1 / 2, 1: 1 / 2},
    3: {-1: -1 / 3, 0: -1 / 2, 1: 1.0, 2: -1 / 6},
    4: {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12},
}


@pytest.mark.parametrize("p", QUOTIENTS)
def test_coefficients(p: int) -> None:
    found = coefficients(p)
    assert list(found) == list(QUOTIENTS[p])
    assert found == pytest.approx(QUOTIENTS[p], rel=1e-14)


def f2sa(p: int, *, normalise: bool = False, scaled: bool = False) -> Any:
    """Algorithm 1 of F2SA-p; ``scaled`` and with p = 1 that of F2SA, of step sizes alpha and gamma."""

    def step(
        problem: Curved, w: Tensor, alpha: Tensor, state: State, upper: float, lower: list[float]
    ) -> tuple[Tensor, Tensor]:
        k = state["k"] = state.get("k", -1) + 1
        nu = 1 / (1 + 0.1 * k)
        total = torch.zeros_like(alpha)
        for j, c in QUOTIENTS[p].items():
            y, rate = (w, LOWER_RATE) if j == 1 else (state.get(j, w), RATE)
            for batch in lower:
                f, g = problem.gradients(problem.f, y, alpha, upper), problem.gradients(problem.g, y, alpha, batch)
                slope = g.lower + j * nu * f.lower
                if scaled and j != 0:
                    slope = j * f.lower + g.lower / nu
                y = y - rate * slope
            state[j] = y
            f, g = problem.gradients(problem.f, y, alpha, upper), problem.gradients(problem.g, y, alpha, lower[0])
            total = total + c * (j * f.upper + g.upper / nu)
        return state[1], alpha - UPPER_RATE * (total / total.norm() if normalise else total)

    return step


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("p", QUOTIENTS)
def test_f2sa_is_its_paper(p: int, inner_steps: int) -> None:
    options: dict[str, Any] = {"p": p, "inner_steps": inner_steps, "inner_lr": RATE}
    assert_follows(bilevel.F2SA, f2sa(p), each=inner_steps, **options)
    assert_follows(bilevel.F2SA, f2sa(p, normalise=True), each=inner_steps, normalise=True, **options)
    assert_follows(bilevel.F2SA, f2sa(p, scaled=True), each=inner_steps, step_scale="penalty", **options)


def test_each_step_of_f2sa_may_have_an_upper_batch_of_its_own() -> None:
    problem = Curved()
    optimizer = problem.optimizer(bilevel.F2SA, inner_steps=2, penalty=2.0)
    w, alpha = problem.point
    y, z = w, w
    for batch in (0.3, -0.4):
        f, g = problem.gradients(problem.f, y, alpha, batch), problem.gradients(problem.g, y, alpha, 0.0)
        y, z = y - LOWER_RATE * (g.lower + f.lower / 2), z - LOWER_RATE * problem.gradients(problem.g, z, alpha).lower
    gap = problem.gradients(problem.g, y, alpha).upper - problem.gradients(problem.g, z, alpha).upper
    expected = problem.gradients(problem.f, y, alpha, 1.5).upper + 2 * gap
    found = optimizer.directions(bilevel.Batches(0.3, -0.4, 1.5), 0.0).upper["0"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_error_of_f2sa_is_of_order_p(p: int) -> None:
    """With the copies solved, the direction misses the hypergradient by a constant times nu^p."""
    errors = []
    for penalty in (20.0, 40.0):
        problem = Curved()
        frozen = torch.optim.SGD([problem.alpha], lr=0.0)
        rates = torch.optim.SGD(problem.lower, lr=0.3)
        optimizer = problem.optimizer(
            bilevel.F2SA, p=p, penalty=penalty, inner_steps=400, upper_optimizer=frozen, lower_optimizer=rates
        )
        optimizer.step(0.0, 0.0)
        found = optimizer.directions(0.0, 0.0).upper["0"]
        errors.append(float((found - hypergradient(problem)).norm()))
    assert errors[0] / errors[1] == pytest.approx(2**p, rel=0.15)


def hypergradient(problem: Curved) -> Tensor:
    """By the implicit function theorem, at the lower solution that Newton's method finds."""
    w, alpha = problem.point
    identity = torch.eye(len(w), dtype=torch.float64)
    for _ in range(30):
        hessian = torch.stack([problem.products(w, alpha, row)[1] for row in identity])
        w = w - torch.linalg.solve(hessian, problem.gradients(problem.g, w, alpha).lower)
    f = problem.gradients(problem.f, w, alpha)
    return f.upper - problem.products(w, alpha, torch.linalg.solve(hessian, f.lower))[0]


def test_f2sa_finds_the_solution_of_the_quadratic_problem() -> None:
    problem = problems.quadratic(seed=2)
    trained(problem, bilevel.F2SA, 150, (0.2, 0.3), p=2, penalty=100.0, inner_steps=5)
    assert distance(problem) < 2e-3


@pytest.mark.parametrize("options", [{}, {"p": 3, "inner_steps": 2}])
def test_f2sa_resumes(options: dict[str, Any]) -> None:
    for one, two in resumed(bilevel.F2SA, **options):
        assert torch.equal(one, two)


# --- BVFSM --------------------------------------------------------------------------------------------------------


def bvfsm(argument: str, slack: float, value_steps: int) -> Any:
    """The lines of the released code, or with the paper's argument of the logarithm; by plain autograd of the whole."""

    def step(
        p: Curved, w: Tensor, alpha: Tensor, state: State, upper: float, lower: list[float]
    ) -> tuple[Tensor, Tensor]:
        k = state["k"] = state.get("k", -1) + 1
        sigma, mu, theta = 0.5 / (k + 1), 0.01 / (k + 1) ** 1.1, 0.02

        def barrier(w: Tensor, alpha: Tensor, batch: float) -> Tensor:
            above = p.g(w, alpha, batch)
            held = above.detach() if argument == "released" else 0.0
            bound = p.g(z, alpha, lower[0]) + mu * z.square().sum()
            logarithm = (held + slack + bound - above).log()
            return p.f(w, alpha, upper) + theta * w.square().sum() - sigma * logarithm

        z = state.get("z", w)
        for t in range(value_steps):
            batch = lower[min(t, len(lower) - 1)]
            z = z - RATE * (p.gradients(p.g, z, alpha, batch).lower + 2 * mu * z)
        state["z"] = z
        for batch in lower:
            w = w - LOWER_RATE * p.gradients(barrier, w, alpha, batch).lower
        return w, alpha - UPPER_RATE * p.gradients(barrier, w, alpha, lower[0]).upper

    return step


@pytest.mark.parametrize(("argument", "slack"), [("released", None), ("released", 8.0), ("paper", 9.0)])
@pytest.mark.parametrize(("inner_steps", "value_steps"), [(1, 1), (2, 4), (3, 1)])
def test_bvfsm_is_its_code(argument: Any, slack: float | None, inner_steps: int, value_steps: int) -> None:
    assert_follows(
        bilevel.BVFSM,
        bvfsm(argument, 5 + 1e-8 if slack is None else slack, value_steps),
        each=inner_steps,
        penalty=Power(0.5, -1.0),
        regularisation=Power(0.01, -1.1),
        decay=0.02,
        inner_steps=inner_steps,
        value_steps=value_steps,
        inner_lr=RATE,
        slack=slack,
        argument=argument,
    )


@pytest.mark.thorough
@pytest.mark.parametrize(("argument", "sigma", "slack"), [("released", 200.0, 50.0), ("paper", 2.0, 1.0)])
def test_bvfsm_ends_at_the_minimiser_of_its_barrier(argument: Any, sigma: float, slack: float) -> None:
    """There the barrier is a penalty of the weight ``sigma / A``."""
    p = problems.quadratic(seed=2)
    rates = (0.05, 0.05) if argument == "released" else (0.02, 0.02)
    options: dict[str, Any] = {"regularisation": 0.0, "decay": 0.0, "inner_lr": 0.2, "argument": argument}
    # First the lower problem, for a point inside of the barrier.
    p.lower.data.copy_(p.lower_optimum(p.upper.detach()))
    trained(p, bilevel.BVFSM, 1000, rates, penalty=sigma, slack=slack, inner_steps=5, value_steps=5, **options)
    optimum = p.lower_optimum(p.upper.detach())
    least = 0.5 * optimum @ p.hessian @ optimum - optimum @ (p.coupling @ p.upper.detach() + p.offset)
    inside = least + slack - (p.lower_loss().detach() if argument == "paper" else 0.0)
    w, alpha = penalised(p, float(sigma / inside))
    torch.testing.assert_close(p.upper.detach(), alpha, rtol=0, atol=1e-6)
    torch.testing.assert_close(p.lower.detach(), w, rtol=0, atol=1e-6)


def test_bvfsm_outside_of_its_barrier_is_not_finite() -> None:
    problem = Curved()
    optimizer = problem.optimizer(bilevel.BVFSM, argument="paper", slack=1e-9, value_steps=50, inner_steps=1)
    with pytest.raises(bilevel.NonFiniteError, match=r"BVFSM\.step"):
        optimizer.step(0.0, 0.0)


@pytest.mark.parametrize("options", [{}, {"inner_steps": 1, "value_steps": 2}])
def test_bvfsm_resumes(options: dict[str, Any]) -> None:
    for one, two in resumed(bilevel.BVFSM, **options):
        assert torch.equal(one, two)


# --- PDBO ---------------------------------------------------------------------------------------------------------


def pdbo(start: str, extrapolation: float) -> Any:
    """Descent in both levels, projected ascent in the multiplier."""

    def step(
        p: Curved, w: Tensor, alpha: Tensor, state: State, upper: float, lower: list[float]
    ) -> tuple[Tensor, Tensor]:
        omega = state.get("omega", w) if start == "last" else w
        for batch in lower:
            omega = omega - RATE * p.gradients(p.g, omega, alpha, batch).lower
        state["omega"] = omega
        f, g = p.gradients(p.f, w, alpha, upper), p.gradients(p.g, w, alpha, lower[0])
        ahead = p.gradients(p.g, omega, alpha, lower[0])
        c = float(g.value - ahead.value) - 0.01
        before = state.get("c", c)
        multiplier = state.get("multiplier", 0.0) + 3.0 * ((1 + extrapolation) * c - extrapolation * before)
        state["multiplier"] = multiplier = min(max(multiplier, 0.0), 0.9)
        state["c"] = c
        return (
            w - LOWER_RATE * (f.lower + multiplier * g.lower),
            alpha - UPPER_RATE * (f.upper + multiplier * (g.upper - ahead.upper)),
        )

    return step


@pytest.mark.parametrize("extrapolation", [0.0, 0.7])
@pytest.mark.parametrize("start", ["last", "current"])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_pdbo_is_its_scheme(inner_steps: int, start: Any, extrapolation: float) -> None:
    stats = assert_follows(
        bilevel.PDBO,
        pdbo(start, extrapolation),
        steps=12,
        each=inner_steps,
        tolerance=0.01,
        dual_lr=3.0,
        multiplier_max=0.9,
        extrapolation=extrapolation,
        inner_steps=inner_steps,
        inner_lr=RATE,
        start=start,
    )
    assert 0 <= float(stats.multiplier) <= 0.9


@pytest.mark.thorough
def test_pdbo_ends_where_its_constraint_is_met_and_the_lagrangian_is_smallest() -> None:
    distances = []
    for tolerance in (0.5, 0.1):
        problem = problems.quadratic(seed=2)
        options = {"tolerance": tolerance, "inner_steps": 3, "inner_lr": 0.2, "dual_lr": 0.3}
        optimizer = trained(problem, bilevel.PDBO, 1000, (0.05, 0.05), **options)
        stats = optimizer.step()
        assert abs(float(stats.constraint)) < 1e-8
        w, alpha = penalised(problem, float(stats.multiplier))
        torch.testing.assert_close(problem.upper.detach(), alpha, rtol=0, atol=1e-7)
        torch.testing.assert_close(problem.lower.detach(), w, rtol=0, atol=1e-7)
        distances.append(distance(problem))
    assert distances[1] < 0.5 * distances[0]


def test_pdbo_resumes_with_its_multiplier() -> None:
    for one, two in resumed(bilevel.PDBO, dual_lr=5.0):
        assert torch.equal(one, two)
    optimizer = Curved().optimizer(bilevel.PDBO)
    state = optimizer.state_dict()
    assert state["state"]["multiplier"] is None  # nothing was remembered yet
    optimizer.load_state_dict(state)
    state["state"]["multiplier"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"the state multiplier is \(2,\), expected a floating-point tensor of shape"):
        optimizer.load_state_dict(state)


def test_the_multiplier_of_several_tasks_is_their_mean() -> None:
    optimizer = Curved().optimizer(bilevel.PDBO)
    tasks = [optimizer.directions(batch, batch) for batch in (0.5, -1.5)]
    found = bilevel.Directions.mean(tasks).state["multiplier"]
    torch.testing.assert_close(found, torch.stack([task.stats.multiplier for task in tasks]).mean())


# --- G-PBGD -------------------------------------------------------------------------------------------------------


def gpbgd(*, normalise: bool) -> Any:
    """The lines of the authors' code: plain autograd through the squared gradient."""

    def step(
        p: Curved, w: Tensor, alpha: Tensor, state: State, upper: float, lower: list[float]
    ) -> tuple[Tensor, Tensor]:
        k = state["k"] = state.get("k", -1) + 1
        gamma = min(0.2 + 0.5 * k, 1.5)
        w, alpha = w.requires_grad_(), alpha.requires_grad_()
        (slope,) = torch.autograd.grad(p.g(w, alpha, lower[0]), w, create_graph=True)
        scale = min(1 / (gamma + 1e-8), 1) if normalise else 1.0
        loss = scale * (p.f(w, alpha, upper) + gamma / 2 * slope.square().sum())
        in_w, in_alpha = torch.autograd.grad(loss, [w, alpha])
        return (w - LOWER_RATE * in_w).detach(), (alpha - UPPER_RATE * in_alpha).detach()

    return step


@pytest.mark.parametrize("product", ["auto", "reverse"])
@pytest.mark.parametrize("normalise", [True, False])
def test_gpbgd_is_its_code(normalise: bool, product: Any) -> None:
    schedule = Linear(0.2, slope=0.5, maximum=1.5)
    assert_follows(bilevel.GPBGD, gpbgd(normalise=normalise), penalty=schedule, normalise=normalise, product=product)


@pytest.mark.thorough
def test_gpbgd_comes_closer_as_its_penalty_grows() -> None:
    found = []
    for penalty in (4.0, 16.0):
        problem = problems.quadratic(seed=2)
        trained(problem, bilevel.GPBGD, 2000, (0.05, 0.05), penalty=penalty)
        found.append(distance(problem))
    assert found[1] == pytest.approx(found[0] / 4, rel=0.3)


def test_gpbgd_resumes() -> None:
    for one, two in resumed(bilevel.GPBGD, penalty=Linear(0.5, slope=1.0)):
        assert torch.equal(one, two)


# --- all ----------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (bilevel.VPBGD, {"penalty": 2.0}),
        (bilevel.F2SA, {"penalty": 2.0}),
        (bilevel.PDBO, {"tolerance": 1e-8}),
        (bilevel.GPBGD, {"penalty": 2.0, "product": "reverse"}),
        (bilevel.BVFSM, {"penalty": 2.0, "slack": 1.0, "inner_steps": 5, "value_steps": 5}),
    ],
)
def test_an_upper_loss_without_upper_variables(method: Any, options: dict[str, Any]) -> None:
    alpha, w = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = method(
        lambda: (w - 1) ** 2,
        lambda: (w - alpha) ** 2,
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        **options,
    )
    for _ in range(300):
        optimizer.step()
    torch.testing.assert_close(alpha.detach(), torch.ones(()), rtol=0, atol=1e-3)
    torch.testing.assert_close(w.detach(), torch.ones(()), rtol=0, atol=1e-3)
    assert bilevel.check_directions(optimizer).passed
