"""``Implicit``: ridge regression with its known Jacobian, dense linear algebra on a network, what solvers report."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import ConjugateGradient, FixedPoint, Neumann, problems
from bilevel.hypergradient import Solution, Solver
from plain_hypergradients import (
    MOVERS,
    Setup,
    batch_of,
    combined,
    flat,
    gradient,
    hessian,
    leaves,
    mixed,
    normal,
    plain_lower,
    plain_upper,
    relative,
    shaped_like,
    step,
)
from reference import Tensors

SEED = 3
CONVERGED = 1e-12
EXACT: dict[str, Callable[[float], Solver]] = {  # of the rate
    "cg": lambda rate: ConjugateGradient(60, tolerance=CONVERGED),
    "neumann": lambda rate: Neumann(500, rate=rate, tolerance=CONVERGED),
    "fixed point": lambda rate: FixedPoint(500, rate=rate, tolerance=CONVERGED),
    "heavy ball": lambda rate: FixedPoint(500, rate=rate, momentum=0.3, tolerance=CONVERGED),
}
every_solver = pytest.mark.parametrize("make", EXACT.values(), ids=EXACT.keys())


# --- ridge regression ---------------------------------------------------------------------------------------------


class Ridge:
    """``G = |X w - y|^2 / 2 + lambda |w|^2 / 2``: ``w* = (X'X + lambda I)^-1 X'y``, ``dw*/dlambda = -(...)^-1 w*``."""

    def __init__(self, penalty: float = 5.0) -> None:
        self.x, self.y = normal(12, 4, seed=1), normal(12, seed=2)
        self.penalty = torch.tensor(penalty, dtype=torch.float64, requires_grad=True)
        self.matrix = self.x.T @ self.x + penalty * torch.eye(4, dtype=torch.float64)
        self.solution = torch.linalg.solve(self.matrix, self.x.T @ self.y)
        self.jacobian = -torch.linalg.solve(self.matrix, self.solution)
        self.w = self.solution.clone().requires_grad_()

    def lower_loss(self) -> Tensor:
        value: Tensor = ((self.x @ self.w - self.y) ** 2).sum() / 2 + self.penalty * (self.w @ self.w) / 2
        return value

    def optimizer(self, upper_loss: Any, **options: Any) -> Any:
        return bilevel.Implicit(
            upper_loss,
            self.lower_loss,
            upper=self.penalty,
            lower=self.w,
            upper_optimizer=torch.optim.SGD([self.penalty], lr=0.1),
            lower_optimizer=torch.optim.SGD([self.w], lr=0.02),
            **{"inner_steps": 0, **options},
        )


@every_solver
def test_ridge_regression_entry_by_entry(make: Any) -> None:
    """With ``F = w_i`` the hypergradient is the Jacobian's entry i, at lambda = 5."""
    ridge = Ridge()
    for i in range(4):
        directions = ridge.optimizer(lambda i=i: ridge.w[i], solver=make(0.03)).directions()
        assert directions.stats.converged
        assert directions.upper["0"].item() == pytest.approx(ridge.jacobian[i].item(), rel=1e-11)


@pytest.mark.parametrize(("product", "tolerance"), [("reverse", 1e-11), ("difference", 1e-8)])
def test_ridge_regression_by_other_routes(product: str, tolerance: float) -> None:
    ridge = Ridge()
    solver = ConjugateGradient(tolerance=tolerance)
    for i in range(4):
        directions = ridge.optimizer(lambda i=i: ridge.w[i], solver=solver, product=product).directions()
        assert directions.stats.product == product
        assert directions.upper["0"].item() == pytest.approx(ridge.jacobian[i].item(), rel=10 * tolerance)


@every_solver
def test_ridge_regression_of_a_validation_loss(make: Any) -> None:
    """The Jacobian by its formula, and by differences of the solution itself."""
    ridge = Ridge()
    x, y = normal(7, 4, seed=3), normal(7, seed=4)
    total = (x.T @ (x @ ridge.solution - y)) @ ridge.jacobian
    near, far = (
        ((x @ Ridge(5 + h).solution - y).square().sum() - (x @ Ridge(5 - h).solution - y).square().sum()) / (4 * h)
        for h in (1e-3, 2e-3)
    )
    assert ((4 * near - far) / 3).item() == pytest.approx(total.item(), rel=1e-9)
    directions = ridge.optimizer(lambda: ((x @ ridge.w - y) ** 2).sum() / 2, solver=make(0.03)).directions()
    assert directions.upper["0"].item() == pytest.approx(total.item(), rel=1e-10)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [1, 3])
def test_isotropic_problems(size: int, scale: float) -> None:
    """``G = scale |w - a|^2 / 2``: ``dw*/da = I``, one iteration. Peers' conjugate gradients answer 0."""
    a, w = (normal(size, seed=n).requires_grad_() for n in (1, 2))
    optimizer = bilevel.Implicit(
        lambda: (w**2).sum(),
        lambda: scale * ((w - a) ** 2).sum() / 2,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        inner_steps=0,
    )
    directions = optimizer.directions()
    torch.testing.assert_close(directions.upper["0"], 2 * w.detach(), rtol=1e-14, atol=0)
    assert directions.stats.as_dict() | {"upper_loss": 0, "lower_loss": 0} == {
        "upper_loss": 0,
        "lower_loss": 0,
        "upper_moved": 0,
        "skipped": 0,
        "iterations": 1,
        "residual": 0,
        "converged": 1,
        "indefinite": 0,
        "damping": 0,
    }


# --- quadratics ---------------------------------------------------------------------------------------------------


def quadratic(**options: Any) -> tuple[problems.Quadratic, Any]:
    p = problems.quadratic(seed=3)
    optimizer = bilevel.Implicit(
        p.upper_loss,
        p.lower_loss,
        upper=p.upper,
        lower=p.lower,
        upper_optimizer=torch.optim.SGD([p.upper], lr=0.1),
        lower_optimizer=torch.optim.SGD([p.lower], lr=0.1),
        **options,
    )
    return p, optimizer


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("steps", [0, 1, 3, 10])
def test_the_closed_form_of_a_quadratic(steps: int, damping: float) -> None:
    """``r (alpha - s) + B' (H + damping I)^-1 P (w_k - t)`` at the point that the real steps reach."""
    p, optimizer = quadratic(inner_steps=steps, solver=ConjugateGradient(tolerance=1e-13, damping=damping))
    alpha, w = p.upper.detach().clone(), p.lower.detach().clone()
    power = torch.linalg.matrix_power(torch.eye(4).double() - 0.1 * p.hessian, steps)
    end = p.lower_optimum(alpha) + power @ (w - p.lower_optimum(alpha))
    damped = p.hessian + damping * torch.eye(4).double()
    through = p.coupling.T @ torch.linalg.solve(damped, p.upper_hessian @ (end - p.target))
    total = p.weight * (alpha - p.anchor) + through
    torch.testing.assert_close(optimizer.directions().upper["0"], total, rtol=1e-11, atol=1e-11)
    optimizer.step()
    torch.testing.assert_close(p.lower.detach(), end, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.upper.detach(), alpha - 0.1 * total, rtol=1e-11, atol=1e-11)


@every_solver
def test_at_the_solution_it_is_the_hypergradient(make: Any) -> None:
    p, optimizer = quadratic(inner_steps=0, solver=make(0.4))
    p.lower.data.copy_(p.lower_optimum(p.upper.detach()))
    found = optimizer.directions()
    torch.testing.assert_close(found.upper["0"], p.hypergradient(p.upper.detach()), rtol=1e-10, atol=1e-10)
    assert found.stats.converged


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_n_fixed_point_iterations_are_n_unrolled_steps_at_the_solution(count: int, momentum: float) -> None:
    """At ``w*`` the walk stands still, and its adjoint is the iteration: gradient descent, or momentum SGD."""
    p, optimizer = quadratic(inner_steps=0, solver=FixedPoint(count, momentum=momentum, tolerance=0.0))
    p.lower.data.copy_(p.lower_optimum(p.upper.detach()))
    unrolled = bilevel.Unrolled(
        p.upper_loss,
        p.lower_loss,
        upper=p.upper,
        lower=p.lower,
        upper_optimizer=torch.optim.SGD([p.upper], lr=0.1),
        lower_optimizer=torch.optim.SGD([p.lower], lr=0.1, momentum=momentum),
        inner_steps=count,
    )
    answers = [one.directions().upper["0"] for one in (optimizer, unrolled)]
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-12, atol=1e-12)


# --- a network ----------------------------------------------------------------------------------------------------


class System:
    """The linear system of one step on the network, dense: at w_k, on the last lower batch, with its mask."""

    def __init__(self, setup: Setup, batches: Sequence[Any], steps: int) -> None:
        upper, *lower = setup.with_masks(*batches, seed=SEED)
        self.point, states = setup.w, setup.states
        constants = [a.detach() for a in setup.alpha]
        for t in range(steps):
            moved, states = step(plain_lower, constants, leaves(self.point), states, setup.movers, batch_of(lower, t))
            self.point = [x.detach() for x in moved]
            states = [{k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for s in states]
        self.alpha, self.batch, at = setup.alpha, lower[-1], leaves(self.point)
        self.h = hessian(plain_lower, self.alpha, self.point, self.batch)
        self.b = flat(gradient(plain_upper(self.alpha, at, upper), at))
        self.direct = gradient(plain_upper(self.alpha, at, upper), self.alpha)
        self.rates = torch.cat(
            [torch.full((w.numel(),), m.lr, dtype=torch.float64) for w, m in zip(setup.w, setup.movers, strict=True)]
        )

    def answer(self, p: Tensor) -> Tensors:
        product = mixed(plain_lower, self.alpha, self.point, self.batch, shaped_like(p, self.point))
        return combined((1.0, self.direct), (-1.0, product))


def found(setup: Setup, batches: Sequence[Any], **options: Any) -> bilevel.Directions:
    optimizer = setup.optimizer(bilevel.Implicit, **options)
    torch.manual_seed(SEED)
    directions: bilevel.Directions = optimizer.directions(*batches)
    return directions


@pytest.mark.parametrize("product", ["auto", "reverse"])
@pytest.mark.parametrize(("steps", "batches"), [(0, 1), (1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_conjugate_gradients_on_a_network(kind: str, steps: int, batches: int, product: str) -> None:
    """BatchNorm, dropout and a Hessian that only damping makes definite; real steps by the user's own optimizer."""
    setup = Setup(kind)
    data = setup.data[: batches + 1]
    system = System(setup, data, steps)
    damping = 0.1 + max(0.0, -float(torch.linalg.eigvalsh(system.h)[0]))
    p = torch.linalg.solve(system.h + damping * torch.eye(len(system.b)).double(), system.b)
    solver = ConjugateGradient(100, tolerance=1e-13, damping=damping)
    directions = found(setup, data, inner_steps=steps, solver=solver, product=product)
    assert directions.stats.converged
    assert relative(list(directions.upper.values()), system.answer(p)) < 1e-10
    assert relative(system.direct, system.answer(p)) > 0.2


@pytest.mark.parametrize("terms", [0, 1, 4])
def test_neumann_on_a_network(terms: int) -> None:
    """``p = A sum_j (I - H A)^j f_w`` with the rate of each group in A; not converged, and it says so."""
    setup = Setup("momentum")
    system = System(setup, setup.data[:3], 2)
    shrink = torch.eye(len(system.b)).double() - system.h @ torch.diag(system.rates)
    p = sum((torch.linalg.matrix_power(shrink, j) @ system.b for j in range(terms + 1)), torch.zeros(()))
    p = system.rates * p
    directions = found(setup, setup.data[:3], inner_steps=2, solver=Neumann(terms))
    assert relative(list(directions.upper.values()), system.answer(p)) < 1e-11
    residual = (system.b - system.h @ p).norm() / system.b.norm()
    assert directions.stats.residual.item() == pytest.approx(residual.item(), rel=1e-9)
    assert not directions.stats.converged
    assert directions.stats.iterations == terms


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_fixed_point_on_a_network(momentum: float) -> None:
    setup = Setup("sgd")
    system = System(setup, setup.data[:2], 1)
    v, p = torch.zeros_like(system.b), torch.zeros_like(system.b)
    for _ in range(5):
        v = momentum * v + system.b - system.h @ p
        p = p + 0.3 * v
    solver = FixedPoint(5, rate=0.3, momentum=momentum)
    directions = found(setup, setup.data[:2], solver=solver)
    assert relative(list(directions.upper.values()), system.answer(p)) < 1e-11


def test_a_solver_that_has_not_converged_is_told_and_used() -> None:
    setup = Setup("sgd")
    system = System(setup, setup.data[:2], 1)
    directions = found(setup, setup.data[:2], solver=ConjugateGradient(1, damping=1.0))
    hb = system.h @ system.b + system.b
    p = (system.b @ system.b) / (system.b @ hb) * system.b  # one step of steepest descent
    assert relative(list(directions.upper.values()), system.answer(p)) < 1e-11
    stats = directions.stats
    assert not stats.converged
    assert stats.iterations == 1
    assert stats.residual.item() == pytest.approx(((system.b - p - system.h @ p).norm() / system.b.norm()).item())


def saddle(curvature: Tensor, **options: Any) -> bilevel.Implicit:
    """``G = sum(c w^2) / 2 - a' w`` and ``F = sum(w)``: G_aw = -I, so that the hypergradient is +p."""
    a, w = (normal(len(curvature), seed=n).requires_grad_() for n in (1, 2))
    return bilevel.Implicit(
        lambda: w.sum(),
        lambda: (curvature * w**2).sum() / 2 - a @ w,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        inner_steps=0,
        **options,
    )


def test_a_saddle_raises_the_damping_and_says_so_once() -> None:
    """``diag(1, -1) p = (1, 1)``: |A b|/|b| = 1 raises the damping by 2, and p = 1 / (c + 2) = (1/3, 1)."""
    curvature = torch.tensor([1.0, -1.0], dtype=torch.float64)
    raised = saddle(curvature, solver=ConjugateGradient(tolerance=1e-12))
    with pytest.warns(UserWarning, match=r"no strict minimum.*stats\.indefinite, stats\.damping"):
        directions = raised.directions()
    torch.testing.assert_close(directions.upper["0"], 1 / (curvature + 2), rtol=1e-12, atol=0)
    numbers = directions.stats.as_dict()
    assert (numbers["indefinite"], numbers["damping"], numbers["converged"]) == (1.0, pytest.approx(2.0), 1.0)
    raised.directions()  # and is silent
    damped = saddle(curvature, solver=ConjugateGradient(damping=2.0, tolerance=1e-12)).directions()
    assert not damped.stats.indefinite
    torch.testing.assert_close(damped.upper["0"], 1 / (curvature + 2), rtol=1e-12, atol=0)


def test_the_check_knows_of_the_raised_damping() -> None:
    with pytest.warns(UserWarning, match="no strict minimum"):
        report = bilevel.check_directions(saddle(torch.tensor([1.0, -3.0], dtype=torch.float64)))
    assert report.passed, report


def test_a_flat_direction_ends_the_solver_with_a_finite_answer() -> None:
    flat = saddle(torch.tensor([1.0, 0.0], dtype=torch.float64))
    with pytest.warns(UserWarning, match="or ended there"):
        directions = flat.directions()
    assert not directions.stats.converged
    assert directions.stats.damping == 0
    assert directions.upper["0"].isfinite().all()


# --- a preconditioner ---------------------------------------------------------------------------------------------

CURVATURE = torch.logspace(0, 6, 12, dtype=torch.float64)
DIAGONALS: dict[str, Any] = {
    "a tensor": CURVATURE,
    "one for each": [CURVATURE],
    "by name": {"0": CURVATURE},
    "a function": lambda v: v.like([v[0] / CURVATURE]),
}


@pytest.mark.parametrize("kind", DIAGONALS)
def test_the_diagonal_of_a_diagonal_hessian_solves_at_once(kind: str) -> None:
    plain = saddle(CURVATURE, solver=ConjugateGradient(5)).directions().stats
    assert not plain.converged
    directions = saddle(CURVATURE, preconditioner=DIAGONALS[kind]).directions()
    assert directions.stats.iterations == 1
    torch.testing.assert_close(directions.upper["0"], 1 / CURVATURE, rtol=1e-12, atol=0)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "text": ("jacobi", TypeError, "must be a tensor or several"),
    "no tensors": ([1.0, 2.0], TypeError, "must be a tensor or several"),
    "zero": (torch.tensor([1.0, 0.0]), ValueError, r"holds 0; the diagonal must be positive"),
    "negative": (torch.tensor([1.0, -2.0]), ValueError, "holds -2; the diagonal must be positive"),
    "nan": (torch.tensor([1.0, float("nan")]), ValueError, "must be positive and finite"),
    "shape": (torch.ones(3), ValueError, r"has the shapes \[\(3,\)\], expected \[\(2,\)\]"),
    "too many": ([torch.ones(2), torch.ones(2)], ValueError, "expected"),
    "another name": ({"w": torch.ones(2)}, ValueError, "entry for each lower variable"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_preconditioner_that_does_not_fit_is_refused(case: str) -> None:
    value, kind, text = WRONG[case]
    with pytest.raises(kind, match=text) as error:
        saddle(torch.ones(2, dtype=torch.float64), preconditioner=value)
    assert str(error.value).startswith("Implicit(preconditioner=")
    later = saddle(torch.ones(2, dtype=torch.float64))

    def set_later() -> None:
        later.preconditioner = value
        later.directions()

    with pytest.raises(kind, match=text):
        set_later()


@pytest.mark.parametrize("returned", [lambda v: [v[0]], lambda v: v.like([v[0][:1]]), lambda v: None])
def test_what_a_preconditioner_returns_is_checked(returned: Any) -> None:
    with pytest.raises(ValueError, match=r"Implicit\(preconditioner=.*expected a Vector like the lower variables"):
        saddle(torch.ones(2, dtype=torch.float64), preconditioner=returned).directions()


def test_a_preconditioner_that_is_not_positive_moves_nothing() -> None:
    with pytest.raises(ValueError, match="is not positive definite"):
        saddle(torch.tensor([1.0, 2.0], dtype=torch.float64), preconditioner=lambda v: -1.0 * v).step()


def test_only_conjugate_gradients_are_preconditioned() -> None:
    with pytest.raises(ValueError, match="is used by ConjugateGradient alone"):
        saddle(torch.ones(2), preconditioner=torch.ones(2), solver=Neumann(3))
    later = saddle(torch.ones(2), preconditioner=torch.ones(2))
    later.solver = Neumann(3)
    with pytest.raises(ValueError, match="is used by ConjugateGradient alone"):
        later.directions()


def test_f_of_a_part_of_the_lower_variables() -> None:
    """The rest still matters, through the Hessian."""
    setup = Setup("sgd")

    def head_only(batch: Any) -> Tensor:
        return (setup.student.last.weight * normal(3, 5)).sum() + setup.corrector(*batch)[:, 0].mean()

    solver = ConjugateGradient(100, tolerance=1e-13, damping=3.0)
    directions = found(setup, setup.data[:2], upper_loss=head_only, solver=solver)
    system = System(setup, setup.data[:2], 1)
    b = torch.zeros_like(system.b)
    sizes = [w.numel() for w in system.point]
    b[sum(sizes[:4]) : sum(sizes[:5])] = normal(3, 5).reshape(-1)
    p = torch.linalg.solve(system.h + 3.0 * torch.eye(len(b)).double(), b)
    through = mixed(plain_lower, system.alpha, system.point, system.batch, shaped_like(p, system.point))
    x, label = setup.data[0]
    direct = torch.autograd.grad(setup.corrector(x, label)[:, 0].mean(), [*setup.corrector.parameters()])
    assert relative(list(directions.upper.values()), combined((1.0, direct), (-1.0, through))) < 1e-10


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", MOVERS)
def test_real_steps_are_plain_torch_steps(kind: str, steps: int) -> None:
    """Bit for bit, buffers and random state included; F is evaluated after them."""
    ours, plain = Setup(kind), Setup(kind)
    data = ours.data[: steps + 1]
    optimizer = ours.optimizer(bilevel.Implicit, inner_steps=steps, solver=Neumann(1))
    torch.manual_seed(SEED)
    stats = optimizer.step(*data)
    random = torch.get_rng_state()
    torch.manual_seed(SEED)
    for batch in data[1:]:
        plain.train(batch)
    for a, b in zip([*ours.student.parameters()], [*plain.student.parameters()], strict=True):
        assert torch.equal(a, b)
        held, expected = ours.lower_optimizer.state[a], plain.lower_optimizer.state[b]
        assert all(torch.equal(held[k], v) for k, v in expected.items() if isinstance(v, Tensor))
    for a, b in zip(ours.student.buffers(), plain.student.buffers(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(stats.upper_loss, plain.upper_loss(data[0]).detach())
    assert torch.equal(torch.get_rng_state(), random)


def test_without_inner_steps_the_lower_level_is_left_alone() -> None:
    """Solved by other means: no step, no gradient, no state, no hook; the buffers move once, by the one evaluation."""
    setup = Setup("momentum")
    setup.lower_optimizer.register_step_pre_hook(lambda *_: pytest.fail("the lower optimizer stepped"))
    kept = [p.detach().clone() for p in setup.student.parameters()]
    state = [v.clone() for e in setup.lower_optimizer.state.values() for v in e.values()]
    other = Setup("momentum")
    other.lower_loss(setup.data[1])
    setup.calls = ""
    stats = setup.optimizer(bilevel.Implicit, inner_steps=0, solver=Neumann(2), verify="never").step(*setup.data[:2])
    assert setup.calls == "LU" + "L" + "L"  # G once, F, the graph of all products with the Hessian, one mixed product
    assert stats.upper_moved
    assert all(map(torch.equal, kept, setup.student.parameters()))
    assert all(p.grad is None for p in setup.student.parameters())
    assert all(map(torch.equal, state, [v for e in setup.lower_optimizer.state.values() for v in e.values()]))
    assert all(map(torch.equal, setup.student.buffers(), other.student.buffers()))


@pytest.mark.parametrize(
    ("solver", "products"),
    [(ConjugateGradient(4, tolerance=0.0, damping=20.0), 4), (Neumann(4), 5), (FixedPoint(4), 4)],
    ids=["cg", "neumann", "fixed point"],
)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("mode", "each", "mixed"), [("auto", 0, 1), ("reverse", 0, 0), ("forward", 1, 1), ("difference", 2, 2)]
)
def test_calls_of_the_losses(steps: int, solver: Solver, products: int, mode: str, each: int, mixed: int) -> None:
    """Of G k gradients, of F one; the graph of all products, or calls for each (Neumann: one more); the mixed product,
    which goes through that graph as well where its mode is reverse.
    """
    # Dropout masks: with a damping of 5 one in ten made the Hessian indefinite, which raises the damping.
    torch.manual_seed(SEED)
    setup = Setup("sgd")
    options = {"inner_steps": steps, "solver": solver, "warm_start": False, "verify": "never", "product": mode}
    optimizer = setup.optimizer(bilevel.Implicit, **options)
    for _ in range(2):
        setup.calls = ""
        optimizer.step(*setup.data[: steps + 1])
        assert setup.calls == "L" * steps + "U" + "L" * (each * products if each else 1) + "L" * mixed


def test_a_warm_start_of_other_variables_is_dropped() -> None:
    """G = h(w) w^2/2 - alpha w with a curvature that is 1 at first and 0.01 after w was set by hand: p goes 1 to 100,
    and back. F = w at the first point, -w at the second: the last p is worse than none.
    """
    curvature, sign = 1.0, 1.0
    w, a = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.0, 0.0))
    optimizer = bilevel.Implicit(
        lambda: sign * w,
        lambda: curvature * w**2 / 2 - a * w,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.0),
        lower_optimizer=torch.optim.SGD([w], lr=0.0),
        inner_steps=0,
        solver=FixedPoint(1, rate=0.5),
    )
    optimizer.step()
    curvature, sign = 4.0, -1.0  # p = 1/2 leaves the residual |-1 - 2| = 3
    stats = optimizer.step()
    assert stats.residual.item() == pytest.approx(1.0)  # from 0 one step of 0.5 gives p = -1/2, residual |-1 + 2|
    assert stats.indefinite is None


def test_a_warm_start_continues_from_the_last_p() -> None:
    """Two steps on a system that does not change: the second finds it solved; ``directions`` changes nothing in it."""
    iterations = {}
    for warm_start in (True, False):
        p, optimizer = quadratic(inner_steps=0, warm_start=warm_start, solver=ConjugateGradient(tolerance=1e-9))
        optimizer.upper_optimizer.param_groups[0]["lr"] = 0.0
        looked = [optimizer.directions().stats.iterations.item() for _ in range(2)]
        stepped = [optimizer.step().iterations.item() for _ in range(3)]
        iterations[warm_start] = looked + stepped
        torch.testing.assert_close(
            optimizer.directions().upper["0"],
            quadratic(inner_steps=0, solver=ConjugateGradient(tolerance=1e-9))[1].directions().upper["0"],
            rtol=1e-8,
            atol=1e-8,
        )
        assert p.lower.grad is None
    assert iterations[True] == [4.0, 4.0, 4.0, 0.0, 0.0]
    assert iterations[False] == [4.0] * 5


@every_solver
def test_a_warm_start_does_not_change_what_a_converged_solver_answers(make: Any) -> None:
    answers = []
    for warm_start in (True, False):
        p, optimizer = quadratic(inner_steps=2, warm_start=warm_start, solver=make(0.4))
        for _ in range(4):
            assert optimizer.step().converged
        answers.append(p.upper.detach().clone())
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", [Neumann(0, rate=1.0), FixedPoint(1, rate=1.0), Neumann(3, rate=1.0)])
def test_an_answer_is_never_that_of_another_point(solver: Any) -> None:
    """With the Hessian 1 these solvers are exact; a warm start must not keep them at the first answer."""
    w, alpha = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = bilevel.Implicit(
        lambda: (w - 1).square().sum() / 2,
        lambda: (w - alpha).square().sum() / 2,
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        inner_steps=0,
        solver=solver,
    )
    optimizer.step()
    w.data.fill_(3)
    torch.testing.assert_close(optimizer.directions().upper["0"], torch.full((2,), 2.0).double())


@pytest.mark.parametrize("stop", [1, 3])
def test_the_warm_start_is_in_the_checkpoint(stop: int) -> None:
    """Stopping in the middle changes no bit, with a solver that never converges; without the start it would."""
    solver = ConjugateGradient(2, damping=2.0)
    straight, resumed = Setup("momentum"), Setup("momentum", warm_up=0)
    optimizer = straight.optimizer(bilevel.Implicit, inner_steps=2, solver=solver)
    for index in range(5):
        if index == stop:
            file = io.BytesIO()
            modules = [straight.student.state_dict(), straight.corrector.state_dict()]
            torch.save([optimizer.state_dict(), *modules], file)
            file.seek(0)
            state, student, corrector = torch.load(file)
        torch.manual_seed(0)
        optimizer.step(*straight.data[:3])  # the same batches and masks: the last p is a good start
    resumed.student.load_state_dict(student)
    resumed.corrector.load_state_dict(corrector)
    again, cold = (resumed.optimizer(bilevel.Implicit, inner_steps=2, solver=solver) for _ in range(2))
    cold.load_state_dict({**state, "state": {"last": {}}})
    again.load_state_dict(state)
    looked = []
    for one in (again, cold):
        torch.manual_seed(0)
        looked.append(list(one.directions(*resumed.data[:3]).upper.values()))
    assert relative(*looked) > 1e-3  # the warm start does matter here
    for _ in range(stop, 5):
        torch.manual_seed(0)
        again.step(*resumed.data[:3])
    for p, q in zip(straight.corrector.parameters(), resumed.corrector.parameters(), strict=True):
        assert torch.equal(p, q)
    assert list(state["state"]["last"]) == [name for name, _ in straight.student.named_parameters()]


def test_a_skipped_step_keeps_the_warm_start_and_reports_like_any_other() -> None:
    setup = Setup("sgd")
    factor = 1.0
    lower_loss = setup.lower_loss
    optimizer = setup.optimizer(
        bilevel.Implicit,
        lower_loss=lambda batch: factor * lower_loss(batch),
        inner_steps=2,
        on_nonfinite="skip",
        solver=ConjugateGradient(damping=20.0),
    )
    optimizer.step(*setup.data[:3])
    kept = optimizer.state_dict()["state"]["last"]
    factor = float("nan")
    stats = optimizer.step(*setup.data[:3])
    assert isinstance(stats, bilevel.ImplicitStats)
    assert stats.skipped
    assert not stats.converged
    assert stats.residual.isnan()
    assert all(torch.equal(kept[k], v) for k, v in optimizer.state_dict()["state"]["last"].items())


def test_an_optimizer_that_nothing_can_follow_is_no_obstacle() -> None:
    setup = Setup("sgd")
    lower_optimizer = torch.optim.RMSprop(setup.student.parameters(), lr=0.01)
    solver = ConjugateGradient(damping=20.0)
    optimizer = setup.optimizer(bilevel.Implicit, inner_steps=2, lower_optimizer=lower_optimizer, solver=solver)
    assert optimizer.step(*setup.data[:3]).upper_moved


@dataclass(frozen=True)
class Scaled(Solver):
    """A solver of one's own: the identity for H, times a factor."""

    factor: float

    def solve(self, product: Any, right: Any, start: Any, rates: Any) -> Solution:
        one = torch.ones(())
        return Solution([self.factor * x for x in right], 0 * one, one, one > 2)


def test_a_solver_of_ones_own() -> None:
    setup = Setup("sgd")
    system = System(setup, setup.data[:2], 1)
    directions = found(setup, setup.data[:2], solver=Scaled(0.5))
    assert relative(list(directions.upper.values()), system.answer(0.5 * system.b)) < 1e-12


def test_float32() -> None:
    """The solver's numbers are accumulated in float64, the answer is float32."""
    p = problems.quadratic(seed=3, dtype=torch.float32)
    optimizer = bilevel.Implicit(
        p.upper_loss,
        p.lower_loss,
        upper=p.upper,
        lower=p.lower,
        upper_optimizer=torch.optim.SGD([p.upper], lr=0.1),
        lower_optimizer=torch.optim.SGD([p.lower], lr=0.1),
        inner_steps=0,
    )
    p.lower.data.copy_(p.lower_optimum(p.upper.detach()))
    directions = optimizer.directions()
    assert directions.upper["0"].dtype == torch.float32
    assert directions.stats.residual.dtype == torch.float64
    assert directions.stats.converged
    torch.testing.assert_close(directions.upper["0"], p.hypergradient(p.upper.detach()), rtol=1e-5, atol=1e-5)


def test_a_corrector_that_is_not_used_is_an_error() -> None:
    setup = Setup("sgd")

    def hard(batch: Any) -> Tensor:
        return nn.functional.cross_entropy(setup.student(batch[0]), batch[1])

    for product in ("auto", "reverse", "difference"):
        with pytest.raises(bilevel.ClosureError, match="lower_loss does not depend on any upper variable"):
            found(setup, setup.data[:2], lower_loss=hard, product=product, solver=Neumann(0))


@pytest.mark.parametrize("solver", [ConjugateGradient(3, damping=5.0), Neumann(2), FixedPoint(2, momentum=0.5)])
def test_variables_that_join_or_leave_between_steps(solver: Solver) -> None:
    """The last p has no entry for a variable that was frozen, and one too many when it is frozen again."""
    setup = Setup("momentum")
    optimizer = setup.optimizer(bilevel.Implicit, solver=solver)
    setup.student.last.bias.requires_grad_(False)
    for frozen in (True, False, True):
        setup.student.last.bias.requires_grad_(not frozen)
        assert optimizer.step(*setup.data[:2]).upper_moved
        last = optimizer.state_dict()["state"]["last"]
        assert ("last.bias" in last) == (not frozen)
        assert all(x.isfinite().all() for x in last.values())
