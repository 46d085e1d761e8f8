"""Variables that stay in a set: every method against closed forms with bounds active, and against differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bilevel
from bilevel.feasible import FeasibleSet
from bilevel.levels import Level
from bilevel.methods.bounded_barrier import Cone, Gradients, cone_multiplier, cone_products
from bilevel.projection import Ball, Box, JointProjection, Simplex
from bilevel.testing import CONTRACTS, Subject
from bilevel.vectors import Vector

F64 = torch.float64
EVERY: dict[str, tuple[Any, dict[str, Any]]] = {
    "BOME": (bilevel.BOME, {}),
    "BOME-unrolled": (bilevel.BOME, {"value_gradient": "unrolled", "inner_steps": 2}),
    "BOME-difference": (bilevel.BOME, {"value_gradient": "difference", "step_from": "lookahead"}),
    "EBOMLC": (bilevel.EBOMLC, {"xi": 1.0}),  # damped, it lets go of a bound that the lower loss alone holds
    "Unrolled": (bilevel.Unrolled, {}),
    "Unrolled-2": (bilevel.Unrolled, {"inner_steps": 2}),
    "Unrolled-real": (bilevel.Unrolled, {"virtual": False}),
    "Unrolled-real-2": (bilevel.Unrolled, {"virtual": False, "inner_steps": 2}),
    "EMLC": (bilevel.EMLC, {}),
    "EMLC-2": (bilevel.EMLC, {"inner_steps": 2}),
    "MLC": (bilevel.MLC, {}),
    "MLC-2": (bilevel.MLC, {"inner_steps": 2}),
    "FiniteDifference": (bilevel.FiniteDifference, {}),
    "SAMA": (bilevel.SAMA, {}),
    "Implicit": (bilevel.Implicit, {}),
    "Implicit-Neumann": (bilevel.Implicit, {"solver": bilevel.Neumann(3)}),
    "VPBGD": (bilevel.VPBGD, {"start": "current", "normalise": False}),
    "F2SA": (bilevel.F2SA, {}),
    "BVFSM": (bilevel.BVFSM, {"penalty": 4.0, "slack": 1.0, "regularisation": 1e-9, "decay": 0.0, "inner_steps": 2}),
    "PDBO": (bilevel.PDBO, {}),
    "GPBGD": (bilevel.GPBGD, {"normalise": False, "penalty": 1.0}),
    "SOBA": (bilevel.SOBA, {}),
    "MASOBA": (bilevel.MASOBA, {"theta": 0.5}),
    "SABA": (bilevel.SABA, {"upper_rows": 1, "lower_rows": 1}),
    "MEHA": (bilevel.MEHA, {}),
    "BSG1": (bilevel.BSG1, {}),
}
every = pytest.mark.parametrize("name", EVERY)


def built(
    name: str, upper_loss: Callable[..., Tensor], lower_loss: Callable[..., Tensor], a: Tensor, w: Any, **more: Any
) -> Any:
    method, options = EVERY[name]
    lower = list(w) if isinstance(w, (list, tuple)) else [w]
    defaults = {
        "upper_optimizer": torch.optim.SGD([a], lr=0.3),
        "lower_optimizer": torch.optim.SGD(lower, lr=0.1),
    }
    return method(upper_loss, lower_loss, upper=a, lower=lower, **{**defaults, **options, **more})


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=F64, requires_grad=True)


def held(name: str, start: float = 0.9, **more: Any) -> tuple[Any, Tensor, Tensor]:
    """F = (a - .5)^2 + w^2, G = (w - a - 2)^2, w in [0, 1]: w stays at 1 and a = 0.5."""
    a, w = scalar(0.0), scalar(start)
    more = {"lower_projection": Box(0.0, 1.0), **more}
    return built(name, lambda: (a - 0.5) ** 2 + w**2, lambda: (w - a - 2) ** 2, a, w, **more), a, w


# --- the answer of the bounded problem ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in EVERY if name != "BOME-difference"])  # whose q vanishes at w = w_T
def test_an_active_lower_bound(name: str) -> None:
    optimizer, a, w = held(name)
    for _ in range(60):
        optimizer.step()
    # GPBGD: its penalty (w - 1)^2 / 2 holds w against w^2 at 1/3, and P' = 0 leaves a alone.
    assert w.item() == pytest.approx(1 / 3 if name == "GPBGD" else 1.0, abs=1e-6)
    assert a.item() == pytest.approx(0.5, abs=1e-6)


@every
def test_an_active_upper_bound(name: str) -> None:
    """F falls in a for every method, so that a stays where it may go at most; G follows it."""
    a, w = scalar(0.0), scalar(0.0)
    options = {"penalty": 0.5} if name == "VPBGD" else {}
    optimizer = built(
        name, lambda: (w - 3) ** 2 - a, lambda: (w - a) ** 2, a, w, upper_projection=Box(-1.0, 0.25), **options
    )
    for _ in range(60):
        optimizer.step()
        assert -1.0 <= a.item() <= 0.25
    assert a.item() == 0.25


@every
def test_bounds_that_are_not_active_change_nothing(name: str) -> None:
    free, a, w = held(name, lower_projection=None)
    far, b, v = held(name, lower_projection=Box(-50.0, 50.0), upper_projection=Ball(50.0))
    for _ in range(3):
        free.step()
        far.step()
        torch.testing.assert_close((b, v), (a, w), rtol=1e-9, atol=1e-11)


# F = (a - 1)^2 + (u - 2)^2 + w^2, G = (w - 10)^2 + (u - a)^2, w <= 1 active, u in [0, 3] not. From a = 0.3, w = 1 and
# u = 0.5 a step of rate 0.1 ends at u = 0.46 with du/da = 0.2.
F_A, F_U = 2 * (0.3 - 1), 2 * (0.46 - 2)
ONE_STEP = F_A + 0.2 * F_U
U_2 = 0.46 - 0.2 * (0.46 - 0.3)
EXPECTED: dict[str, float] = {
    "Unrolled": ONE_STEP,
    "Unrolled-real": ONE_STEP,
    "Unrolled-2": F_A + 2 * (U_2 - 2) * (0.2 + 0.8 * 0.2),
    "Unrolled-real-2": F_A + 2 * (U_2 - 2) * (0.2 + 0.8 * 0.2),
    "EMLC": ONE_STEP,
    "EMLC-2": F_A + 2 * (U_2 - 2) * 0.2 * (1 + 0.9),  # the discount is 1 - lr
    "MLC": ONE_STEP,
    "FiniteDifference": ONE_STEP,
    "Implicit": F_A + F_U,  # du*/da = 1
    "Implicit-Neumann": F_A + 2 * 0.1 * (1 + 0.8 + 0.64 + 0.512) * F_U,
    "SAMA": F_A + 2 * F_U,  # the identity for the Hessian
    "BSG1": F_A + F_U,  # of the free part G_ww and its estimate of rank one are the same here
}


def partly(name: str, **more: Any) -> tuple[Any, Tensor, Tensor]:
    a, w = scalar(0.3), vector(1.0, 0.5)
    more = {"lower_projection": Box(0.0, torch.tensor([1.0, 3.0])), **more}
    return (
        built(
            name,
            lambda: (a - 1) ** 2 + (w[1] - 2) ** 2 + w[0] ** 2,
            lambda: (w[0] - 10) ** 2 + (w[1] - a) ** 2,
            a,
            w,
            **more,
        ),
        a,
        w,
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_the_upper_direction_with_one_bound_active(name: str) -> None:
    optimizer, _, _ = partly(name)
    assert optimizer.directions().upper["0"].item() == pytest.approx(EXPECTED[name], rel=1e-6)


def test_the_projection_of_mlc_is_in_its_discount() -> None:
    """Gamma = <(P' - S) g_1, g_0> / |g_0|^2 with P' = diag(0, 1), S = diag(0, 0.1): 0.9 g_1u g_0u / |g_0|^2."""
    optimizer, a, w = partly("MLC-2")
    optimizer.step()
    m = optimizer._accumulated.value[0].item()
    assert m == pytest.approx(ONE_STEP, rel=1e-9)  # nothing was accumulated before
    u = w[1].item()
    ahead = u - 0.2 * (u - a.item())
    g_0, g_1 = 2 * (u - 2), 2 * (ahead - 2)
    gamma = 0.9 * g_1 * g_0 / (g_0**2 + 2.0**2)
    expected = F_A + 0.2 * g_1 + gamma * m
    assert optimizer.directions().upper["0"].item() == pytest.approx(expected, rel=1e-9)


def test_single_loops_solve_the_system_of_the_free_variables() -> None:
    """V = -G_ww^-1 F_w on u alone, and the hypergradient of it, with w and u held where they are."""
    for name in ("SOBA", "MASOBA", "SABA"):
        optimizer, a, w = partly(name)
        for _ in range(120):
            optimizer.step()
            w.data.copy_(torch.tensor([1.0, 0.5]))
            a.data.fill_(0.3)
        if name == "SABA":
            continue  # its table remembers what it saw before they were put back: the same here, after all steps
        directions = optimizer.directions()
        assert directions.upper["0"].item() == pytest.approx(F_A + 2 * (0.5 - 2), rel=1e-6)
        assert directions.stats.residual.item() < 1e-6


# --- the multiplier -----------------------------------------------------------------------------------------------


def test_the_multiplier_of_a_barrier_with_one_bound_active() -> None:
    """Q = G(w) - G(w_T) with w_T = (1, .46): grad_a q = -.08, grad_w q = (-18, .4); grad f = (-1.4; 2, -3).

    w can only go down, where q rises: from lambda = 1/9 on it stays. What is left is a closed form in a and u:
    lambda = (delta |g|^2 - <f, g>) / |g|^2 with g = (-.08, .4). The form that knows no bound has 324 more in |g|^2.
    """
    optimizer, _, _ = partly("BOME", barrier=bilevel.barrier.GradientNorm(0.5), eps=0.0)
    found = optimizer.directions()
    squared, product = 0.08**2 + 0.4**2, 1.4 * 0.08 - 3 * 0.4
    expected = (0.5 * squared - product) / squared
    assert found.stats.multiplier.item() == pytest.approx(expected, rel=1e-9)
    assert found.stats.gradient_norm.item() == pytest.approx(squared**0.5, rel=1e-9)
    assert found.upper["0"].item() == pytest.approx(-1.4 - 0.08 * expected, rel=1e-9)
    assert found.lower["0"].tolist() == pytest.approx([0.0, -3 + 0.4 * expected], rel=1e-9)


def test_the_multiplier_that_holds_a_bound() -> None:
    """At the answer w = 1: grad f = (0, 2), grad q = (0, -3): lambda = 2/3 holds w, and nothing moves."""
    optimizer, a, _ = held("BOME", start=1.0, eps=0.0)
    a.data.fill_(0.5)
    found = optimizer.directions()
    assert found.stats.multiplier.item() == pytest.approx(2 / 3, rel=1e-9)
    assert abs(found.upper["0"].item()) + abs(found.lower["0"].item()) < 1e-9


SETS: dict[str, Any] = {
    "box": Box(-1.0, 1.0),
    "simplex": Simplex(),
    "ball": Ball(1.0),
    "own": lambda x: x.clamp(-1.0, 1.0),
}
four = st.lists(st.floats(-3, 3), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=F64))


@pytest.mark.parametrize("kind", SETS)
@settings(deadline=None, max_examples=40)
@given(x=four, f=four, q=four, f_upper=four, q_upper=four, delta=st.floats(0.0, 2.0))
def test_the_quadratic_program_on_the_cone(
    kind: str, x: Tensor, f: Tensor, q: Tensor, f_upper: Tensor, q_upper: Tensor, delta: float
) -> None:
    """The conditions of Karush, Kuhn and Tucker, which suffice for a convex program."""
    w = SETS[kind](x).requires_grad_()
    a = torch.zeros(4, dtype=F64, requires_grad=True)
    sets = []
    for side, tensor, projection in (("lower", w, SETS[kind]), ("upper", a, None)):
        level = Level("test", side, tensor, torch.optim.SGD([tensor], lr=1.0))
        sets.append(FeasibleSet("test", level, projection))
    cone = Cone(sets[1], sets[0], Vector([a.detach()]), Vector([w.detach()]))
    at = Gradients(*(Vector([v]) for v in (f_upper, f, q_upper, q)))
    squared = at.q_squared
    products = bilevel.barrier.Products(at.f_upper.dot(at.q_upper), at.f_lower.dot(at.q_lower), squared, squared)
    barrier = bilevel.barrier.GradientNorm(delta)
    products = cone_products(cone, at, products)
    weight = cone_multiplier(barrier, products, cone, at, eps=1e-9, cutoff=1e-12, maximum=None)
    assert weight >= 0
    if squared <= 1e-12:
        assert weight == 0
        return
    upper, lower = cone.descent(at.f_upper + weight * at.q_upper, at.f_lower + weight * at.q_lower)
    falls = float(at.q_upper.dot(upper) + at.q_lower.dot(lower))
    phi = float(barrier(products))
    noise = (1e-5 if kind == "own" else 1e-9) * (1 + float(weight)) * (1 + float(squared))
    assert falls >= phi - 1e-9 * float(weight) - noise  # it is met, up to eps
    if weight > 0:
        assert falls <= phi + noise or float(weight) < 1e-9  # and no more than that
    feasible = SETS[kind](w.detach() - 1e-6 * lower[0])
    torch.testing.assert_close(feasible, w.detach() - 1e-6 * lower[0], rtol=0, atol=1e-10)  # -d does not leave the set


# --- simplex and ball ---------------------------------------------------------------------------------------------

TARGET = torch.tensor([0.2, -0.4, 0.9], dtype=F64)
CURVED: dict[str, tuple[Any, Tensor]] = {
    "simplex": (Simplex(), torch.tensor([0.9, 0.6, -0.5], dtype=F64)),
    "ball": (Ball(0.5), torch.tensor([0.9, 0.6, -0.5], dtype=F64)),
    "ball elsewhere": (Ball(0.5, torch.tensor([1.0, 1.0, 0.0])), torch.tensor([0.4, 0.6, -0.5], dtype=F64)),
    "box": (Box(0.0, 0.7), torch.tensor([0.9, 0.6, -0.5], dtype=F64)),
}
every_curved = pytest.mark.parametrize("kind", CURVED)


def nearest(kind: str, name: str, matrix: Tensor, lower: Tensor, **options: Any) -> Any:
    """G = (w - a)' H (w - a) / 2 on a set, and F = |w - t|^2 / 2 + |a|^2 / 2."""
    projection, a = CURVED[kind]
    a, w = a.clone().requires_grad_(), lower.detach().clone().requires_grad_()
    return built(
        name,
        lambda: (w - TARGET).square().sum() / 2 + a.square().sum() / 2,
        lambda: (w - a) @ matrix @ (w - a) / 2,
        a,
        w,
        lower_projection=projection,
        **options,
    )


def solved(kind: str, matrix: Tensor, a: Tensor) -> Tensor:
    """The lower minimum on the set, by projected gradient descent."""
    w = CURVED[kind][0](a)
    for _ in range(400):
        w = CURVED[kind][0](w - 0.4 * matrix @ (w - a))
    return w


@every_curved
@pytest.mark.parametrize("solver", [None, bilevel.FixedPoint(400, rate=0.1, tolerance=1e-10)], ids=["cg", "fp"])
def test_the_nearest_point_of_a_curved_set(kind: str, solver: Any) -> None:
    """H = I: w* = P(a), and the hypergradient is P'(a) (w* - t) + a, also where the boundary is curved."""
    projection, a = CURVED[kind]
    jacobian = torch.autograd.functional.jacobian(projection, a)
    expected = jacobian.T @ (projection(a) - TARGET) + a
    eye = torch.eye(3, dtype=F64)
    optimizer = nearest(kind, "Implicit", eye, projection(a), inner_steps=0, solver=solver)
    directions = optimizer.directions()
    assert directions.stats.converged
    torch.testing.assert_close(directions.upper["0"], expected, rtol=1e-7, atol=1e-9)
    walked = nearest(kind, "Unrolled", eye, projection(a), inner_steps=300).directions()
    torch.testing.assert_close(walked.upper["0"], expected, rtol=1e-7, atol=1e-9)


@every_curved
def test_the_hypergradient_on_a_curved_set_against_differences(kind: str) -> None:
    """A Hessian that is not the identity: differences of the solved lower problem."""
    matrix = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.5]], dtype=F64)
    _, a = CURVED[kind]
    w = solved(kind, matrix, a)

    def value(x: Tensor) -> Tensor:
        return (solved(kind, matrix, x) - TARGET).square().sum() / 2 + x.square().sum() / 2

    e = 1e-5 * torch.eye(3, dtype=F64)
    expected = torch.stack([(value(a + u) - value(a - u)) / 2e-5 for u in e])
    options = {"inner_steps": 0, "solver": bilevel.ConjugateGradient(tolerance=1e-12)}
    optimizer = nearest(kind, "Implicit", matrix, w, **options)
    torch.testing.assert_close(optimizer.directions().upper["0"], expected, rtol=1e-6, atol=1e-8)
    # A diagonal, and a projection of one's own without a tangent: the same number.
    also = nearest(kind, "Implicit", matrix, w, preconditioner=matrix.diagonal(), **options)
    torch.testing.assert_close(also.directions().upper["0"], expected, rtol=1e-6, atol=1e-8)
    walked = nearest(kind, "Unrolled", matrix, w, inner_steps=200).directions()
    torch.testing.assert_close(walked.upper["0"], expected, rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=15)
@given(
    start=st.floats(-0.9, 0.9),
    a=st.floats(-3, 3),
    steps=st.integers(1, 4),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_k_projected_steps_against_a_walk_by_hand(start: float, a: float, steps: int, momentum: float) -> None:
    def walk(alpha: float) -> float:
        w, buffer = start, 0.0
        for _ in range(steps):
            buffer = momentum * buffer + 2 * (w - alpha)
            w = min(max(w - 0.2 * buffer, -1.0), 1.0)
        return (w - 3) ** 2

    e = 1e-6
    slopes = [(walk(a + e) - walk(a)) / e, (walk(a) - walk(a - e)) / e]
    alpha, w = scalar(a), scalar(start)
    optimizer = bilevel.Unrolled(
        lambda: (w - 3) ** 2,
        lambda: (w - alpha) ** 2,
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.2, momentum=momentum),
        inner_steps=steps,
        differentiate="adjoint",
        lower_projection=Box(-1.0, 1.0),
    )
    found = optimizer.directions().upper["0"].item()
    assert min(slopes) - 1e-4 <= found <= max(slopes) + 1e-4


class Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.tensor([0.2, 0.3, 0.5], dtype=F64))
        self.second = torch.nn.Parameter(torch.tensor([0.1, -0.2], dtype=F64))


def two_weights(**options: Any) -> tuple[Any, Weights]:
    lower, a = Weights(), vector(1.5, -0.3)

    def lower_loss() -> Tensor:
        return (lower.first[:2] - a).square().sum() + (lower.second * lower.first[1] - a).pow(4).sum()

    optimizer = bilevel.Unrolled(
        lambda: (lower.first * torch.arange(3)).sum() + (lower.second - 1).square().sum(),
        lower_loss,
        upper=a,
        lower=lower,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.Adam(lower.parameters(), lr=0.05),
        inner_steps=3,
        lower_projection={"first": Simplex(), "second": Ball(0.25)},
        **options,
    )
    return optimizer, lower


ROUTES: dict[str, dict[str, Any]] = {
    "graph": {"differentiate": "graph"},
    "forward": {"differentiate": "forward"},
    "checkpoints": {"differentiate": "adjoint", "checkpoints": 2},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("truncate", [None, 1])
def test_every_route_through_projected_steps(route: str, virtual: bool, truncate: int | None) -> None:
    if route == "checkpoints" and not virtual:
        return
    found = []
    for options in ({"differentiate": "adjoint"}, ROUTES[route]):
        optimizer, lower = two_weights(virtual=virtual, truncate=truncate, **options)
        found.append(optimizer.directions().upper["0"])
        report = bilevel.check_directions(optimizer)
        assert report.passed, report
        optimizer.step()
        assert lower.first.sum().item() == pytest.approx(1.0)
        assert lower.second.norm().item() <= 0.25 + 1e-12
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("differentiate", ["adjoint", "forward"])
def test_a_learned_rate_of_projected_steps(differentiate: str) -> None:
    """W = min(max(w - r 2 (w - 3), -1), 1) twice, from -1: r = 0.05 gives -0.6 and -0.24; r = 0.3 ends at the bound."""
    for r, expected in ((0.05, None), (0.3, 0.0)):
        rate, w = scalar(r), scalar(-1.0)
        optimizer = bilevel.Unrolled(
            lambda w=w: (w - 2) ** 2,
            lambda w=w: (w - 3) ** 2,
            upper=rate,
            lower=w,
            upper_optimizer=torch.optim.SGD([rate], lr=1e-3),
            lower_optimizer=torch.optim.SGD([w], lr=0.1),
            inner_steps=2,
            differentiate=differentiate,
            lower_hyperparameters=lambda rate=rate: {"lr": rate},
            lower_projection=Box(-1.0, 1.0),
        )
        # w_2 = 3 - 4 (1 - 2 r)^2: dw_2/dr = 16 (1 - 2 r).
        end = 3 - 4 * (1 - 2 * r) ** 2
        slope = 2 * (end - 2) * 16 * (1 - 2 * r) if expected is None else expected
        assert optimizer.directions().upper["0"].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)


# --- a projection of one's own ------------------------------------------------------------------------------------


class Both(JointProjection):
    """Both variables in one ball."""

    def project(self, tensors: Any) -> list[Tensor]:
        joined = torch.cat([x.reshape(-1) for x in tensors])
        landed = Ball(0.5)(joined)
        return [
            part.reshape(x.shape) for part, x in zip(landed.split([x.numel() for x in tensors]), tensors, strict=True)
        ]


@pytest.mark.parametrize(
    "name", [name for name in EVERY if name != "BSG1"]
)  # where the free gradient is 0 it knows none
def test_a_joint_ball_is_a_ball(name: str) -> None:
    """The same numbers for one tensor in a ball and for its parts under a joint projection."""
    whole, a = CURVED["ball"][0], vector(0.9, 0.6, -0.5)
    runs = []
    for split in (False, True):
        up, w = a.detach().clone().requires_grad_(), whole(a.detach()).requires_grad_()
        parts = [w[:1].detach().clone().requires_grad_(), w[1:].detach().clone().requires_grad_()]
        lower = parts if split else [w]

        def joined(lower: list[Tensor] = lower) -> Tensor:
            return torch.cat(lower)

        optimizer = built(
            name,
            lambda joined=joined, up=up: (joined() - TARGET).square().sum() / 2 + up.square().sum() / 2,
            lambda joined=joined, up=up: (joined() - up).square().sum() / 2,
            up,
            lower,
            lower_projection=Both() if split else whole,
        )
        for _ in range(2):
            optimizer.step()
        runs.append((up.detach(), joined().detach()))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)


# --- checks and contracts -----------------------------------------------------------------------------------------


@every
def test_directions_are_checked_at_active_bounds(name: str) -> None:
    optimizer, _, _ = partly(name)
    optimizer.step()
    report = bilevel.check_directions(optimizer, samples=1)
    assert report.passed, report


@pytest.mark.thorough
@every_curved
@every
def test_directions_are_checked_on_curved_sets(kind: str, name: str) -> None:
    matrix = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.5]], dtype=F64)
    optimizer = nearest(kind, name, matrix, CURVED[kind][0](CURVED[kind][1]))
    optimizer.step()
    report = bilevel.check_directions(optimizer, samples=1)
    assert report.passed, report


def bounded(method: Any) -> Any:
    """Builds it on the networks of a scene, with sets of which the lower one holds."""

    def build(*losses: Any, upper: Any, lower: Any, **options: Any) -> Any:
        size = float(lower[1].weight.detach().norm())
        first = float(upper[0].weight.detach().abs().max())
        return method(
            *losses,
            upper=upper,
            lower=lower,
            upper_projection={"0.weight": Box(-1.001 * first, 1.001 * first)},
            lower_projection={"1.weight": Ball(1.0001 * size), "1.bias": lambda x: x.clamp(-0.41, 0.41)},
            **options,
        )

    return build


CONTRACTED = ["BOME", "Implicit-Neumann", "Unrolled-real", "EMLC-2", "MLC-2", "SAMA", "GPBGD", "SOBA", "SABA", "F2SA"]


@pytest.mark.thorough
@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("name", CONTRACTED)
def test_the_contracts_hold_with_projections(name: str, contract: Any) -> None:
    method, options = EVERY[name]
    contract(Subject(bounded(method), options))


def test_the_walk_back_needs_its_points() -> None:
    with pytest.raises(ValueError, match=r"EMLC\(memory=replay\): .*Use memory=\"store\""):
        held("EMLC", memory="replay")
    optimizer, _, _ = held("EMLC")
    optimizer.memory = "replay"
    with pytest.raises(ValueError, match='Use memory="store"'):
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop])
def test_any_lower_optimizer_is_projected(kind: Any) -> None:
    w = scalar(0.9)
    a = scalar(0.0)
    optimizer = bilevel.EMLC(
        lambda: (a - 0.5) ** 2 + w**2,
        lambda: (w - a - 2) ** 2,
        upper=a,
        lower=w,
        upper_optimizer=kind([a], lr=0.1),
        lower_optimizer=kind([w], lr=0.3),
        inner_steps=2,
        lower_projection=Box(0.0, 1.0),
    )
    for _ in range(5):
        optimizer.step()
        assert 0.0 <= w.item() <= 1.0
