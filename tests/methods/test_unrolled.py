"""``Unrolled``: closed forms, autograd through the whole walk, and differences of real ``torch.optim`` training.

The plain side is ``plain_hypergradients``: textbook steps on lists of tensors. A step of the network draws one dropout
mask for each batch, the lower ones first.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bilevel
from bilevel import problems
from plain_hypergradients import (
    MOVERS,
    Setup,
    central_difference,
    flat,
    gradient,
    leaves,
    normal,
    plain_lower,
    plain_upper,
    relative,
    settings,
    unrolled,
)
from reference import Mover, State, Tensors

LOSSES = (plain_upper, plain_lower)
SEED = 3
every_kind = pytest.mark.parametrize("kind", MOVERS)
ADJOINT, GRAPH, FORWARD = ({"differentiate": way} for way in ("adjoint", "graph", "forward"))
VIRTUAL_WAYS = [ADJOINT, GRAPH, FORWARD]
WAYS: list[dict[str, Any]] = [*VIRTUAL_WAYS, *({"virtual": False, **way} for way in VIRTUAL_WAYS)]
UPPER = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True)
WAY_NAMES = ["adjoint", "graph", "forward", "real", "real graph", "real forward"]


def found(setup: Setup, batches: Sequence[Any], seed: int = SEED, **options: Any) -> Tensors:
    """The upper direction by the library."""
    optimizer = setup.optimizer(bilevel.Unrolled, **options)
    torch.manual_seed(seed)
    return list(optimizer.directions(*batches).upper.values())


def expected(setup: Setup, batches: Sequence[Any], steps: int, seed: int = SEED, **options: Any) -> Tensors:
    """The same, plainly."""
    upper, *lower = setup.with_masks(*batches, seed=seed)
    movers = options.pop("movers", setup.movers)
    states = options.pop("states", setup.states)
    return unrolled(LOSSES, setup.alpha, setup.w, states, movers, upper, lower, steps, **options)[1]


# --- closed forms -------------------------------------------------------------------------------------------------


class Point(nn.Module):
    """The lower variable of a quadratic problem, where ``differentiate="graph"`` can substitute it."""

    def __init__(self, problem: problems.Quadratic, sign: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(problem.lower.detach().clone())
        self.problem, self.sign = problem, sign

    def upper_loss(self) -> Tensor:
        p, away = self.problem, self.w - self.problem.target
        return 0.5 * away @ p.upper_hessian @ away + 0.5 * p.weight * (p.upper - p.anchor).square().sum()

    def lower_loss(self) -> Tensor:
        p, w = self.problem, self.w
        value: Tensor = 0.5 * w @ p.hessian @ w - w @ (p.coupling @ p.upper + p.offset)
        return self.sign * value


def quadratic(lower: Callable[..., torch.optim.Optimizer], sign: float = 1.0, **options: Any) -> tuple[Point, Any]:
    """The problem and ``Unrolled`` on it; ``lower`` makes the lower optimizer."""
    problem = problems.quadratic(seed=0)
    point = Point(problem, sign)
    return point, bilevel.Unrolled(
        point.upper_loss,
        point.lower_loss,
        upper=problem.upper,
        lower=point,
        upper_optimizer=torch.optim.SGD([problem.upper], lr=0.1),
        lower_optimizer=lower(point.parameters()),
        **options,
    )


def momentum_sgd(mover: Mover) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **settings(mover))


@pytest.mark.parametrize("mode", ["adjoint", "graph", "forward"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_closed_form_of_a_quadratic(steps: int, mode: str) -> None:
    """``w_k = w* + M^k (w - w*)`` with ``M = I - a H``, so ``dw_k/dalpha = (I - M^k) H^-1 B``."""
    rate = 0.15
    point, optimizer = quadratic(momentum_sgd(Mover(rate)), inner_steps=steps, differentiate=mode)
    p = point.problem
    alpha, w = p.upper.detach(), p.lower.detach()
    power = torch.linalg.matrix_power(torch.eye(4).double() - rate * p.hessian, steps)
    end = p.lower_optimum(alpha) + power @ (w - p.lower_optimum(alpha))
    jacobian = (torch.eye(4).double() - power) @ torch.linalg.solve(p.hessian, p.coupling)
    total = jacobian.T @ p.upper_hessian @ (end - p.target) + p.weight * (alpha - p.anchor)
    directions = optimizer.directions()
    torch.testing.assert_close(directions.upper["0"], total, rtol=1e-13, atol=1e-13)
    assert directions.lower == {}
    torch.testing.assert_close(
        directions.stats.upper_loss,
        0.5 * (end - p.target) @ p.upper_hessian @ (end - p.target)
        + 0.5 * p.weight * (alpha - p.anchor).square().sum(),
    )
    torch.testing.assert_close(
        directions.stats.lower_loss, 0.5 * w @ p.hessian @ w - w @ (p.coupling @ alpha + p.offset)
    )


@pytest.mark.parametrize("warm_up", [0, 1, 4])
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize(
    "mover",
    [
        Mover(0.1, momentum=0.9),
        Mover(0.1, momentum=0.9, weight_decay=0.3),
        Mover(0.1, momentum=0.7, dampening=0.4),
        Mover(0.1, momentum=0.7, nesterov=True, weight_decay=0.1),
    ],
    ids=["momentum", "decay", "dampening", "nesterov"],
)
def test_the_closed_form_of_momentum(mover: Mover, steps: int, warm_up: int) -> None:
    """A step of momentum SGD on a quadratic is one affine map of (w, buffer), also from a buffer that is not empty.

    With ``A = H + wd I`` and ``d = A w - B alpha - c``: ``b' = m b + (1 - damp) d`` and ``w' = w - a b'``, or for
    nesterov ``w' = w - a (d + m b')``. The very first buffer is d itself, whatever the dampening.
    """
    found_at, optimizer = quadratic(momentum_sgd(mover), inner_steps=steps)
    p = found_at.problem
    for _ in range(warm_up):
        optimizer.lower_optimizer.zero_grad()
        found_at.lower_loss().backward()
        optimizer.lower_optimizer.step()
    eye = torch.eye(4, dtype=torch.float64)
    a, m, curvature = mover.lr, mover.momentum, p.hessian + mover.weight_decay * eye
    held = optimizer.lower_optimizer.state[found_at.w].get("momentum_buffer", torch.zeros(4).double())
    z, slope = torch.cat([found_at.w.detach(), held]), torch.zeros(8, 3, dtype=torch.float64)
    for t in range(steps):
        share = 1.0 if warm_up + t == 0 else 1 - mover.dampening
        buffer = torch.cat([share * curvature, m * eye], 1)  # in (w, b)
        if mover.nesterov:
            point = torch.cat([eye - a * curvature, 0 * eye], 1) - a * m * buffer
            pull = torch.cat([a * (1 + m * share) * eye, -share * eye])
        else:
            point = torch.cat([eye, 0 * eye], 1) - a * buffer
            pull = torch.cat([a * share * eye, -share * eye])
        step = torch.cat([point, buffer])
        z = step @ z + pull @ (p.coupling @ p.upper.detach() + p.offset)
        slope = step @ slope + pull @ p.coupling
    direct = p.weight * (p.upper.detach() - p.anchor)
    total = slope[:4].T @ p.upper_hessian @ (z[:4] - p.target) + direct
    torch.testing.assert_close(optimizer.directions().upper["0"], total, rtol=1e-11, atol=1e-11)


def test_many_steps_reach_the_hypergradient_of_the_solution() -> None:
    point, optimizer = quadratic(momentum_sgd(Mover(0.4)), inner_steps=60)
    exact = point.problem.hypergradient(point.problem.upper.detach())
    torch.testing.assert_close(optimizer.directions().upper["0"], exact, rtol=1e-9, atol=1e-9)


# --- autograd through the whole walk ------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("options", WAYS, ids=WAY_NAMES)
@pytest.mark.parametrize(("steps", "batches"), [(1, 1), (3, 3), (3, 1)])
@every_kind
def test_every_lower_optimizer_is_followed_from_its_real_state(
    kind: str, steps: int, batches: int, options: dict[str, Any]
) -> None:
    """BatchNorm in training mode, dropout, two groups with rates of their own, two real steps behind them."""
    setup = Setup(kind)
    data = setup.data[: batches + 1]
    total = expected(setup, data, steps)
    assert relative(found(setup, data, inner_steps=steps, **options), total) < 1e-12
    # The part through the lower steps is of the size of the whole, so it was compared indeed.
    upper, *lower = setup.with_masks(*data, seed=SEED)
    end, _ = unrolled(LOSSES, setup.alpha, setup.w, setup.states, setup.movers, upper, lower, steps)
    alpha = setup.alpha
    assert relative(gradient(plain_upper(alpha, end, upper), alpha), total) > 0.2


@pytest.mark.parametrize("warm_up", [0, 1])
@every_kind
def test_a_fresh_optimizer(kind: str, warm_up: int) -> None:
    """Without a momentum buffer, and from the first counts of Adam."""
    setup = Setup(kind, warm_up)
    for options in WAYS:
        total = found(setup, setup.data[:4], inner_steps=3, **options)
        assert relative(total, expected(setup, setup.data[:4], 3)) < 1e-12


@pytest.mark.parametrize("options", WAYS, ids=WAY_NAMES)
@pytest.mark.parametrize("truncate", [1, 2, 3])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_truncation(kind: str, truncate: int, options: dict[str, Any]) -> None:
    """The last steps only: w and the optimizer's state before them count as constants."""
    setup = Setup(kind)
    total = expected(setup, setup.data[:4], 3, truncate=truncate)
    assert relative(found(setup, setup.data[:4], inner_steps=3, truncate=truncate, **options), total) < 1e-12
    if truncate < 3:
        assert relative(total, expected(setup, setup.data[:4], 3)) > 1e-3


@pytest.mark.parametrize("options", VIRTUAL_WAYS, ids=["adjoint", "graph", "forward"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_a_given_rate_is_plain_gradient_descent(kind: str, steps: int, options: dict[str, Any]) -> None:
    """``inner_lr``: no momentum, no decay, one rate for both groups, whatever the lower optimizer is."""
    setup = Setup(kind)
    batches = setup.data[: steps + 1]
    total = expected(setup, batches, steps, movers=[Mover(0.3)] * 6, states=[{}] * 6)
    assert relative(found(setup, batches, inner_steps=steps, inner_lr=0.3, **options), total) < 1e-12


@pytest.mark.parametrize("options", VIRTUAL_WAYS, ids=["adjoint", "graph", "forward"])
@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_plain_steps_go_with_the_current_rates_of_the_lower_optimizer(kind: str, options: dict[str, Any]) -> None:
    """``inner_step="gradient"``: one rate for each group, read when the step is taken, so that schedules count."""
    setup = Setup(kind)
    optimizer = setup.optimizer(bilevel.Unrolled, inner_steps=2, inner_step="gradient", **options)
    rates = [0.3 / (1 + index) for index in range(len(setup.lower_optimizer.param_groups))]
    for group, rate in zip(setup.lower_optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    movers = [Mover(group["lr"]) for group in setup.lower_optimizer.param_groups for _ in group["params"]]
    total = expected(setup, setup.data[:3], 2, movers=movers, states=[{}] * len(movers))
    torch.manual_seed(SEED)
    assert relative(list(optimizer.directions(*setup.data[:3]).upper.values()), total) < 1e-12


@pytest.mark.parametrize("options", VIRTUAL_WAYS, ids=["adjoint", "graph", "forward"])
def test_a_preview_may_have_a_rate_of_its_own(options: dict[str, Any]) -> None:
    setup = Setup("momentum")
    movers = [replace(mover, lr=0.02) for mover in setup.movers]
    total = expected(setup, setup.data[:3], 2, movers=movers)
    ours = found(setup, setup.data[:3], inner_steps=2, inner_step="optimizer", inner_lr=0.02, **options)
    assert relative(ours, total) < 1e-12


@pytest.mark.parametrize(("route", "tolerance"), [("forward", 1e-12), ("reverse", 1e-12), ("difference", 1e-6)])
@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_every_route_of_the_products(kind: str, route: str, tolerance: float) -> None:
    setup = Setup(kind)
    total = expected(setup, setup.data[:4], 3)
    assert relative(found(setup, setup.data[:4], inner_steps=3, product=route), total) < tolerance


def test_all_ways_are_the_same_to_1e_12() -> None:
    for kind in MOVERS:
        setup = Setup(kind)
        for steps in (1, 2, 5):
            one, *others = (
                found(setup, setup.data[: steps + 1], inner_steps=steps, differentiate=mode)
                for mode in ("adjoint", "graph", "forward")
            )
            assert all(relative(one, other) < 1e-12 for other in others)


def test_the_rates_of_a_scheduler_are_the_current_ones() -> None:
    setup = Setup("momentum")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(setup.lower_optimizer, 0.5)
    optimizer = setup.optimizer(bilevel.Unrolled, inner_steps=2)
    optimizer.step(*setup.data[:3])
    scheduler.step()
    movers = [replace(mover, lr=0.5 * mover.lr) for mover in setup.movers]
    total = expected(setup, setup.data[3:6], 2, movers=movers)
    torch.manual_seed(SEED)
    assert relative(list(optimizer.directions(*setup.data[3:6]).upper.values()), total) < 1e-12


@pytest.mark.parametrize("mode", ["adjoint", "graph", "forward"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_rates_that_are_tensors(kind: str, mode: str) -> None:
    setup, same = Setup(kind), Setup(kind)
    for group in setup.lower_optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    options = {"inner_steps": 2, "differentiate": mode}
    assert relative(found(setup, setup.data[:2], **options), found(same, setup.data[:2], **options)) < 1e-14


@pytest.mark.parametrize("mode", ["adjoint", "graph", "forward"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_lower_optimizer_that_walks_uphill(kind: type[torch.optim.Optimizer], mode: str) -> None:
    """``maximize=True`` on G is the ordinary step on -G."""

    def answer(sign: float) -> tuple[Tensor, Tensor]:
        def lower(parameters: Any) -> torch.optim.Optimizer:
            return kind(parameters, lr=0.05, weight_decay=0.1, maximize=sign < 0)  # type: ignore[call-arg]

        point, optimizer = quadratic(lower, sign, inner_steps=3, differentiate=mode)
        optimizer.step()
        return optimizer.directions().upper["0"], point.w.detach()

    for plain, uphill in zip(answer(1.0), answer(-1.0), strict=True):
        torch.testing.assert_close(uphill, plain, rtol=1e-13, atol=1e-13)


# --- differences of real training ---------------------------------------------------------------------------------


def trained(kind: str, steps: int, batches: int, size: float, probe: Tensors, warm_up: int = 2) -> float:
    """F after ``steps`` real steps of torch, with the upper variables moved by ``size`` along ``probe``."""
    setup = Setup(kind, warm_up)
    with torch.no_grad():
        for p, d in zip(setup.corrector.parameters(), probe, strict=True):
            p.add_(d, alpha=size)
    torch.manual_seed(SEED)
    states = []
    for t in range(steps):
        if batches == 1 and t > 0:  # the same batch: the same function, so the same mask
            after = torch.get_rng_state()
            torch.set_rng_state(states[0])
        states.append(torch.get_rng_state())
        setup.train(setup.data[1 + t] if batches > 1 else setup.data[1])
        if batches == 1 and t > 0:
            torch.set_rng_state(after)
    return setup.upper_loss(setup.data[0]).item()


@pytest.mark.thorough
@pytest.mark.parametrize("options", WAYS, ids=WAY_NAMES)
@pytest.mark.parametrize(("steps", "batches"), [(1, 1), (3, 3), (3, 1)])
@every_kind
def test_against_differences_of_real_training(kind: str, steps: int, batches: int, options: dict[str, Any]) -> None:
    """Nothing is differentiated on the other side: modules, torch.optim, F at the end. BatchNorm and dropout are on."""
    setup = Setup(kind)
    total = found(setup, setup.data[: batches + 1], inner_steps=steps, **options)
    probe = [normal(*p.shape, seed=n) for n, p in enumerate(setup.corrector.parameters())]
    slope = central_difference(lambda size: trained(kind, steps, batches, size, probe))
    assert sum(float((a * b).sum()) for a, b in zip(total, probe, strict=True)) == pytest.approx(
        slope, rel=1e-7, abs=1e-10
    )


# --- what a step does ---------------------------------------------------------------------------------------------


def numbers(*things: Any) -> list[Tensor]:
    """Copies of all tensors of modules (with buffers) and of optimizer states, in order."""
    every: list[Tensor] = []
    for thing in things:
        if isinstance(thing, nn.Module):
            every += [x.detach().clone() for x in (*thing.parameters(), *thing.buffers())]
        else:
            every += [torch.as_tensor(v).clone() for e in thing.state_dict()["state"].values() for v in e.values()]
    return every


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not torch.equal(x, y)] == []


def upper_step(setup: Setup, directions: bilevel.Directions) -> None:
    """What the upper torch optimizer does with the directions."""
    for p, d in zip(setup.corrector.parameters(), directions.upper.values(), strict=True):
        p.grad = d.clone()
    setup.upper_optimizer.step()


@pytest.mark.parametrize("mode", ["adjoint", "graph", "forward"])
@pytest.mark.parametrize("truncate", [None, 1])
@pytest.mark.parametrize("steps", [1, 3])
@every_kind
def test_without_restore_w_takes_k_plain_torch_steps(kind: str, steps: int, truncate: int | None, mode: str) -> None:
    """Bit for bit: variables, buffers, optimizer state, random state; the upper variables then follow the direction."""
    ours, plain = Setup(kind), Setup(kind)
    data = ours.data[: steps + 1]
    optimizer = ours.optimizer(
        bilevel.Unrolled, inner_steps=steps, virtual=False, truncate=truncate, differentiate=mode
    )
    torch.manual_seed(SEED)
    directions = optimizer.directions(*data)
    torch.manual_seed(SEED)
    stats = optimizer.step(*data)
    random = torch.get_rng_state()

    torch.manual_seed(SEED)
    for batch in data[1:]:
        plain.train(batch)
    assert_same_bits(numbers(ours.student, ours.lower_optimizer), numbers(plain.student, plain.lower_optimizer))
    assert torch.equal(stats.upper_loss, plain.upper_loss(data[0]).detach())
    assert torch.equal(torch.get_rng_state(), random)
    upper_step(plain, directions)
    assert_same_bits(numbers(ours.corrector, ours.upper_optimizer), numbers(plain.corrector, plain.upper_optimizer))
    assert stats.upper_moved


@pytest.mark.parametrize("options", [ADJOINT, GRAPH, {"inner_lr": 0.1}], ids=["adjoint", "graph", "inner_lr"])
@pytest.mark.parametrize("steps", [1, 3])
@every_kind
def test_with_restore_w_takes_its_ordinary_step_with_the_new_upper_variables(
    kind: str, steps: int, options: dict[str, Any]
) -> None:
    """On the first lower batch, with the mask of its first evaluation; bit for bit, buffers once."""
    ours, plain = Setup(kind), Setup(kind)
    data = ours.data[: steps + 1]
    optimizer = ours.optimizer(bilevel.Unrolled, inner_steps=steps, **options)
    torch.manual_seed(SEED)
    directions = optimizer.directions(*data)
    torch.manual_seed(SEED)
    stats = optimizer.step(*data)
    random = torch.get_rng_state()

    upper_step(plain, directions)
    torch.manual_seed(SEED)
    plain.train(data[1])
    assert_same_bits(numbers(ours.student, ours.lower_optimizer), numbers(plain.student, plain.lower_optimizer))
    assert_same_bits(numbers(ours.corrector, ours.upper_optimizer), numbers(plain.corrector, plain.upper_optimizer))
    for batch in [*data[2:], data[0]]:  # each batch draws once
        plain.lower_loss(batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert stats.upper_moved


@pytest.mark.filterwarnings("ignore:.*hook of the lower optimizer (changed|moved):UserWarning")  # right here
@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_hooks_on_real_steps_are_followed_and_not_differentiated(kind: str) -> None:
    """A projection after each step: both modes go on from where it led, with the derivative of the step alone."""
    answers = {}
    for mode in ("adjoint", "graph", "forward"):
        setup = Setup(kind)

        def project(*_: Any, setup: Setup = setup) -> None:
            with torch.no_grad():
                for p in setup.student.parameters():
                    p.clamp_(-0.05, 0.05)

        setup.lower_optimizer.register_step_post_hook(project)
        setup.lower_optimizer.register_step_pre_hook(
            lambda optimizer, *_: torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01) and None
        )
        answers[mode] = found(setup, setup.data[:4], inner_steps=3, virtual=False, differentiate=mode)
        assert relative(answers[mode], found(Setup(kind), setup.data[:4], inner_steps=3, virtual=False)) > 1e-2
    assert relative(answers["graph"], answers["adjoint"]) < 1e-12


@pytest.mark.parametrize("options", WAYS, ids=WAY_NAMES)
def test_several_steps_in_a_row(options: dict[str, Any]) -> None:
    """The library's steps are torch steps along the plain hypergradient, one after another, with momentum and Adam."""
    ours, plain = Setup("momentum"), Setup("momentum")
    optimizer = ours.optimizer(bilevel.Unrolled, inner_steps=2, **options)
    for index in range(3):
        data = [plain.data[(2 * index + n) % 8] for n in range(3)]
        total = expected(plain, data, 2, seed=index)
        torch.manual_seed(index)
        optimizer.step(*data)

        torch.manual_seed(index)
        named = dict(zip(dict(plain.corrector.named_parameters()), total, strict=True))
        directions = bilevel.Directions(named, {}, bilevel.Stats(torch.zeros(()), torch.zeros(())))
        if options.get("virtual") is False:
            plain.train(data[1])
            plain.train(data[2])
            upper_step(plain, directions)
        else:
            upper_step(plain, directions)
            plain.train(data[1])
        for a, b in zip(ours.student.parameters(), plain.student.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        for a, b in zip(ours.corrector.parameters(), plain.corrector.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# --- a starting point that depends on the upper variables ---------------------------------------------------------


@pytest.mark.parametrize("mode", ["adjoint", "graph", "forward"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_maml_on_a_quadratic(steps: int, mode: str) -> None:
    """The upper variable is the start: ``d/dalpha F(w_k(alpha)) = (I - a H)^k P (w_k - t)``, without coupling."""
    rate = 0.15
    p = problems.quadratic(seed=4, upper_size=4)
    point = Point(p)
    start = nn.Parameter(normal(4))
    optimizer = bilevel.Unrolled(
        lambda: 0.5 * (point.w - p.target) @ p.upper_hessian @ (point.w - p.target),
        lambda: 0.5 * point.w @ p.hessian @ point.w - point.w @ p.offset,
        upper=start,
        lower=point,
        upper_optimizer=torch.optim.SGD([start], lr=0.1),
        lower_optimizer=torch.optim.SGD(point.parameters(), lr=rate),
        inner_steps=steps,
        start=lambda: [start],
        differentiate=mode,  # type: ignore[arg-type]
    )
    power = torch.linalg.matrix_power(torch.eye(4).double() - rate * p.hessian, steps)
    optimum = torch.linalg.solve(p.hessian, p.offset)
    end = optimum + power @ (start.detach() - optimum)
    slope = power @ p.upper_hessian @ (end - p.target)
    torch.testing.assert_close(optimizer.directions().upper["0"], slope, rtol=1e-12, atol=1e-12)
    before, lower = start.detach().clone(), point.w.detach().clone()
    optimizer.step()
    torch.testing.assert_close(start.detach(), before - 0.1 * slope, rtol=1e-12, atol=1e-12)
    assert torch.equal(point.w, lower)
    assert point.w.grad is None


Starting = Callable[[Tensors], Tensors]
STARTS: dict[str, Starting] = {
    "the variables themselves": lambda a: list(a),
    "a function of them": lambda a: [x.sin() + 0.1 * x for x in a],
    "some of them": lambda a: [a[0], a[1].detach(), *a[2:5], torch.zeros_like(a[5])],
    "mixed": lambda a: [a[0], a[1] + a[2] * a[3], a[2], a[3], a[4] * a[5].sum(), a[5]],
}


def adapted(kind: str, name: str, **options: Any) -> tuple[Setup, nn.ParameterList, Any]:
    """MAML on the network: the upper level is another set of the student's variables."""
    setup = Setup(kind)
    meta = nn.ParameterList([p.detach() + 0.1 * normal(*p.shape, seed=9) for p in setup.student.parameters()])
    optimizer = bilevel.Unrolled(
        setup.upper_loss,
        setup.lower_loss,
        upper=meta,
        lower=setup.student,
        upper_optimizer=torch.optim.SGD(meta.parameters(), lr=0.1),
        lower_optimizer=setup.lower_optimizer,
        start=lambda: STARTS[name](list(meta)),
        **options,
    )
    return setup, meta, optimizer


@pytest.mark.parametrize("mode", ["adjoint", "graph", "forward"])
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize(("kind", "steps"), [("sgd", 1), ("sgd", 3), ("momentum", 2), ("adam", 2)])
def test_maml_on_a_network(kind: str, steps: int, name: str, mode: str) -> None:
    setup, meta, optimizer = adapted(kind, name, inner_steps=steps, differentiate=mode)
    setup.corrector.requires_grad_(False)
    data = setup.data[: steps + 1]
    corrector = [p.detach() for p in setup.corrector.parameters()]
    losses = tuple((lambda a, w, b, f=f: f(corrector, w, b)) for f in LOSSES)
    upper, *lower = setup.with_masks(*data, seed=SEED)
    alpha = leaves(list(meta))
    start = STARTS[name]
    total = unrolled(losses, alpha, setup.w, setup.states, setup.movers, upper, lower, steps, start=start)[1]  # type: ignore[arg-type]
    torch.manual_seed(SEED)
    directions = optimizer.directions(*data)
    missing = [torch.zeros_like(x) for x in meta]
    given_ = [directions.upper.get(str(i), zero) for i, zero in enumerate(missing)]
    assert relative(given_, total) < 1e-12
    before = numbers(setup.student, setup.lower_optimizer)
    optimizer.step(*data)
    after = numbers(setup.student, setup.lower_optimizer)
    assert_same_bits(before, after)


@pytest.mark.parametrize("mode", ["adjoint", "graph", "forward"])
def test_a_start_by_name(mode: str) -> None:
    setup, meta, by_order = adapted("sgd", "a function of them", inner_steps=2, differentiate=mode)
    names = [name for name, _ in setup.student.named_parameters()]
    by_name = bilevel.Unrolled(
        setup.upper_loss,
        setup.lower_loss,
        upper=meta,
        lower=setup.student,
        upper_optimizer=by_order.upper_optimizer,
        lower_optimizer=by_order.lower_optimizer,
        start=lambda: dict(reversed(list(zip(names, STARTS["a function of them"](list(meta)), strict=True)))),
        inner_steps=2,
        differentiate=mode,  # type: ignore[arg-type]
    )
    answers = []
    for optimizer in (by_order, by_name):
        torch.manual_seed(SEED)
        answers.append(list(optimizer.directions(*setup.data[:2]).upper.values()))
    assert_same_bits(*answers)


def test_a_start_and_the_check_of_directions() -> None:
    setup, _, optimizer = adapted("momentum", "a function of them", inner_steps=2)
    report = bilevel.check_directions(optimizer, *setup.data[:2])
    assert report.passed, report


@pytest.mark.parametrize("mode", ["adjoint", "graph", "auto"])
def test_a_start_that_is_the_same_for_every_step(mode: Any) -> None:
    """Ridge regression from zeros, as HPO tutorials do it: the derivative goes through the five steps alone."""
    torch.manual_seed(SEED)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    model, strength = nn.Linear(3, 1, bias=False).double(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = bilevel.Unrolled(
        lambda: (model(x[10:])[:, 0] - y[10:]).square().mean(),
        lambda: (model(x[:10])[:, 0] - y[:10]).square().mean() + (strength.exp() * model.weight[0].square()).sum(),
        upper=strength,
        lower=model,
        upper_optimizer=torch.optim.SGD([strength], lr=1.0),
        lower_optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        inner_steps=5,
        differentiate=mode,
        start=lambda: [torch.zeros_like(model.weight)],
    )
    w = torch.zeros(3, dtype=torch.float64)
    for _ in range(5):
        w = w - 0.1 * (2 / 10 * x[:10].T @ (x[:10] @ w - y[:10]) + 2 * strength.exp() * w)
    (expected,) = torch.autograd.grad((x[10:] @ w - y[10:]).square().mean(), strength)
    assert relative([optimizer.directions().upper["0"]], [expected]) < 1e-12
    assert bilevel.check_directions(optimizer).passed
    before = model.weight.clone()
    optimizer.step()
    assert torch.equal(before, model.weight)


@pytest.mark.parametrize(
    ("start", "kind", "pattern"),
    [
        (lambda meta: list(meta)[:2], ValueError, r"Unrolled\(start=\.\.\.\): returned 2 tensors for the 6 lower"),
        (
            lambda meta: [x.t() if x.dim() == 2 else x for x in meta],
            ValueError,
            r"returned \(\(3, 5\).* for first\.wei",
        ),
        (lambda meta: [x.detach() for x in meta], ValueError, "depends on no upper variable. Was it detached"),
        (lambda meta: {"first.weight": meta[0]}, ValueError, r"returned no first\.bias, norm\.weight, norm\.bias"),
        (lambda meta: [1.0, *list(meta)[1:]], TypeError, "returned a float among its values"),
        (lambda meta: [x.float() for x in meta], ValueError, r"torch\.float32.* for first\.weight, expected .*float64"),
        (lambda meta: None, TypeError, "returned a NoneType among its values"),
    ],
    ids=["too few", "shapes", "detached", "names", "numbers", "dtype", "nothing"],
)
def test_a_wrong_start_is_refused(start: Any, kind: type[Exception], pattern: str) -> None:
    setup = Setup("sgd")
    meta = nn.ParameterList([p.detach().clone() for p in setup.student.parameters()])
    optimizer = bilevel.Unrolled(
        setup.upper_loss,
        setup.lower_loss,
        upper=meta,
        lower=setup.student,
        upper_optimizer=torch.optim.SGD(meta.parameters(), lr=0.1),
        lower_optimizer=setup.lower_optimizer,
        start=lambda: start(meta),
    )
    with pytest.raises(kind, match=pattern):
        optimizer.step(*setup.data[:2])


# --- any architecture, any number of steps ------------------------------------------------------------------------


def network(widths: list[int], norm: bool, smooth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, (a, b) in enumerate(itertools.pairwise(widths)):
        # Without a bias before BatchNorm, whose gradient is 0: the plain Adam divides by its size.
        layers.append(nn.Linear(a, b, bias=not norm or n == len(widths) - 2))
        if n < len(widths) - 2:
            layers += [nn.BatchNorm1d(b)] * norm + [[nn.Tanh(), nn.Softplus(), nn.Sigmoid()][smooth]]
    return nn.Sequential(*layers).double()


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    hidden=st.lists(st.integers(1, 5), max_size=3),
    norm=st.booleans(),
    smooth=st.integers(0, 2),
    steps=st.integers(1, 4),
    several=st.booleans(),
    virtual=st.booleans(),
    kind=st.sampled_from([name for name in MOVERS if name != "amsgrad"]),
    seed=st.integers(0, 9),
)
def test_any_architecture_and_number_of_steps(
    hidden: list[int],
    norm: bool,
    smooth: int,
    steps: int,
    several: bool,
    virtual: bool,
    kind: str,
    seed: int,
) -> None:
    """Adjoint, graph and the plain unrolling agree; here ``torch.func.functional_call`` puts the plain tensors in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lower, upper = network([2, *hidden, 2], norm, smooth), nn.Linear(2, 2).double()
        batches = [
            (torch.randn(5, 2).double(), torch.randn(5, 2).double()) for _ in range(1 + (steps if several else 1))
        ]
    mover = MOVERS[kind][0]

    def loss(model: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return ((model(x) - y @ weight - bias) ** 2 * torch.sigmoid(y @ weight)).mean()

    def plain(alpha: Tensors, w: Tensors, batch: Any) -> Tensor:
        names = [name for name, _ in lower.named_parameters()]
        buffers = {name: b.clone() for name, b in lower.named_buffers()}
        values = {**dict(zip(names, w, strict=True)), **buffers}
        return loss(lambda x: torch.func.functional_call(lower, values, (x,)), alpha[0], alpha[1], batch)

    w, alpha = [p.detach().clone() for p in lower.parameters()], leaves(list(upper.parameters()))
    empty: list[State] = [{} for _ in w]
    total = unrolled((plain, plain), alpha, w, empty, [mover] * len(w), batches[0], batches[1:], steps)[1]
    maker: Any = torch.optim.SGD if mover.betas is None else torch.optim.AdamW if mover.decoupled else torch.optim.Adam
    for mode in ("adjoint", "graph", "forward"):
        optimizer = bilevel.Unrolled(
            lambda batch: loss(lower, upper.weight, upper.bias, batch),
            lambda batch: loss(lower, upper.weight, upper.bias, batch),
            upper=upper,
            lower=lower,
            upper_optimizer=torch.optim.SGD(upper.parameters(), lr=0.1),
            lower_optimizer=maker(lower.parameters(), **settings(mover)),
            inner_steps=steps,
            virtual=virtual,
            differentiate=mode,  # type: ignore[arg-type]
        )
        directions = optimizer.directions(*batches)
        size = max(float(flat(total).norm()), 1e-3)
        assert float((flat(list(directions.upper.values())) - flat(total)).norm()) < 1e-11 * size


# --- what the modes can and cannot do -----------------------------------------------------------------------------


def test_a_bare_tensor_is_unrolled_by_the_adjoint_and_refused_by_the_graph() -> None:
    def build(mode: Any) -> Any:
        p = problems.quadratic()
        upper_optimizer, lower_optimizer = p.optimizers()
        levels = {"upper_optimizer": upper_optimizer, "lower_optimizer": lower_optimizer}
        return bilevel.Unrolled(
            p.upper_loss,
            p.lower_loss,
            upper=p.upper,
            lower=[("weights", p.lower)],
            inner_steps=3,
            differentiate=mode,
            **levels,
        )

    _, in_a_module = quadratic(momentum_sgd(Mover(0.1)), inner_steps=3)
    same = build("adjoint").directions()
    torch.testing.assert_close(same.upper["0"], in_a_module.directions().upper["0"], rtol=1e-13, atol=1e-13)
    assert same.stats.product == "reverse"
    with pytest.raises(bilevel.ClosureError, match=r'lower_loss reads weights other than.*use differentiate="adjoint"'):
        build("graph").directions()


@pytest.mark.parametrize("side", ["upper_loss", "lower_loss"])
def test_a_captured_parameter_is_refused_by_the_graph_for_either_loss(side: str) -> None:
    """In adjoint mode the same loss is reached, because values are exchanged in place."""
    setup = Setup("sgd")
    bias = setup.student.last.bias
    loss = getattr(setup, side)
    changed: dict[str, Any] = {side: lambda batch: loss(batch) + bias.square().sum()}
    with pytest.raises(bilevel.ClosureError, match=rf'{side} reads last\.bias other than.*use differentiate="adjoint"'):
        found(setup, setup.data[:2], differentiate="graph", **changed)
    with_attribute: dict[str, Any] = {side: lambda batch: loss(batch) + setup.student.last.bias.square().sum()}
    adjoint = found(setup, setup.data[:2], product="reverse", **changed)
    assert relative(adjoint, found(setup, setup.data[:2], differentiate="graph", **with_attribute)) < 1e-12


@pytest.mark.parametrize("options", WAYS, ids=WAY_NAMES)
def test_a_level_that_is_not_used_where_it_must_be(options: dict[str, Any]) -> None:
    setup = Setup("sgd")

    def hard(batch: Any) -> Tensor:
        return nn.functional.cross_entropy(setup.student(batch[0]), batch[1])

    def idle(batch: Any) -> Tensor:
        return setup.corrector(*batch)[:, 0].mean()

    with pytest.raises(bilevel.ClosureError, match="lower_loss does not depend on any upper variable"):
        found(setup, setup.data[:2], lower_loss=hard, **options)
    with pytest.raises(bilevel.ClosureError, match="lower_loss does not depend on any lower variable"):
        found(setup, setup.data[:2], lower_loss=idle, **options)
    with pytest.raises(bilevel.ClosureError, match="upper_loss does not depend on any lower variable"):
        found(setup, setup.data[:2], upper_loss=idle, **options)
    # F need not depend on the upper variables.
    through = found(setup, setup.data[:2], upper_loss=hard, **options)
    assert flat(through).norm() > 1e-3


@pytest.mark.parametrize("options", WAYS, ids=WAY_NAMES)
def test_a_variable_that_no_loss_uses_has_no_direction(options: dict[str, Any]) -> None:
    setup = Setup("momentum")
    setup.corrector.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    setup.student.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    setup.upper_optimizer.add_param_group({"params": [setup.corrector.idle]})
    setup.lower_optimizer.add_param_group({"params": [setup.student.idle], "weight_decay": 0.5})
    optimizer = setup.optimizer(bilevel.Unrolled, inner_steps=2, **options)
    torch.manual_seed(SEED)
    directions = optimizer.directions(*setup.data[:3])
    assert "idle" not in directions.upper
    same = Setup("momentum")
    assert relative(list(directions.upper.values()), expected(same, same.data[:3], 2)) < 1e-12
    optimizer.step(*setup.data[:3])
    assert setup.corrector.idle.grad is None
    assert setup.student.idle.tolist() == [1.0, 1.0]  # no weight decay either, as in torch


def test_each_upper_part_of_a_batch_of_its_own() -> None:
    """Steps on batches of their own differ from steps on one batch, and the order of the batches matters."""
    setup = Setup("sgd")
    a, b, c = setup.data[:3]
    answers = [found(setup, batches, inner_steps=2) for batches in ([a, b, c], [a, c, b], [a, b], [a, b, b])]
    assert all(relative(x, answers[0]) > 1e-3 for x in answers[1:])


def test_float32_agrees_with_float64() -> None:
    narrow, wide = Setup("adam", dtype=torch.float32), Setup("adam")
    for one, other in ((narrow.student, wide.student), (narrow.corrector, wide.corrector)):
        one.drop = other.drop = nn.Identity()  # masks of the two dtypes are drawn differently
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            q.data.copy_(p.data)
    for p, q in zip(narrow.student.parameters(), wide.student.parameters(), strict=True):
        for name, value in wide.lower_optimizer.state[q].items():
            value.copy_(narrow.lower_optimizer.state[p][name])
    data = narrow.data[:3]
    for options in WAYS:
        one = narrow.optimizer(bilevel.Unrolled, inner_steps=2, **options).directions(*data)
        widened = [tuple(x.double() for x in batch) for batch in data]
        other = wide.optimizer(bilevel.Unrolled, inner_steps=2, **options).directions(*widened)
        assert {d.dtype for d in one.upper.values()} == {torch.float32}
        assert relative([d.double() for d in one.upper.values()], list(other.upper.values())) < 1e-4


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"inner_steps": 1}, "graph"),
        ({"inner_steps": 1, "product": "forward"}, "forward"),
        ({"inner_steps": 1, "product": "reverse"}, "reverse"),
        ({"inner_steps": 2}, "graph"),
        ({"inner_steps": 3, "truncate": 1}, "graph"),
        ({"inner_steps": 3, "truncate": 2}, "graph"),
        ({"inner_steps": 1, "virtual": False}, "forward"),
        ({"inner_steps": 2, "virtual": False}, "graph"),
        ({"inner_steps": 1, "start": lambda: [torch.ones(1, 3, dtype=torch.float64) * UPPER]}, "graph"),
        ({"inner_steps": 2, "differentiate": "adjoint"}, "reverse"),
        ({"inner_steps": 2, "differentiate": "adjoint", "product": "forward"}, "forward"),
        ({"inner_steps": 1, "differentiate": "graph"}, "graph"),
    ],
)
def test_the_faster_mode_is_taken_and_named(options: dict[str, Any], taken: str) -> None:
    """The graph, without convolutions also for one step unless it is real; all give the same numbers."""
    lower, x = nn.Linear(3, 1, bias=False).double(), normal(4, 3)
    levels = {
        "upper": UPPER,
        "lower": lower,
        "upper_optimizer": torch.optim.SGD([UPPER], lr=0.1),
        "lower_optimizer": torch.optim.SGD(lower.parameters(), lr=0.1),
    }
    losses = (lambda: (lower(x) - 1).tanh().square().mean(), lambda: (lower(x) - UPPER).tanh().square().mean())
    answer = bilevel.Unrolled(*losses, **levels, **options).directions()
    assert answer.stats.product == taken
    other = {"differentiate": "adjoint" if taken == "graph" else "graph", "product": "auto"}
    expected = bilevel.Unrolled(*losses, **levels, **{**options, **other}).directions()
    assert relative(list(answer.upper.values()), list(expected.upper.values())) < 1e-12


@pytest.mark.parametrize("mode", ["adjoint", "graph", "forward"])
def test_with_a_start_no_buffer_moves_but_those_of_the_upper_modules(mode: str) -> None:
    """The lower modules are only borrowed: nothing is evaluated at their own values."""
    setup = Setup("sgd")
    values = [p.detach().clone() for p in setup.student.parameters()]
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = setup.optimizer(
        bilevel.Unrolled,
        upper=factor,
        upper_optimizer=torch.optim.SGD([factor], lr=0.1),
        other=setup.corrector,
        inner_steps=2,
        differentiate=mode,
        start=lambda: [factor * value for value in values],
    )
    before = {name: b.clone() for name, b in setup.student.named_buffers()}
    assert before
    optimizer.step(*setup.data[:3])
    for name, buffer in setup.student.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_where_lower_variables_are_in_no_module_the_adjoint_serves() -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    levels = {"upper_optimizer": torch.optim.SGD([UPPER], lr=0.1), "lower_optimizer": torch.optim.SGD([w], lr=0.1)}
    losses = (lambda: (w - 1).exp().sum(), lambda: (w - UPPER).exp().sum())
    stats = bilevel.Unrolled(*losses, upper=UPPER, lower=w, inner_steps=2, **levels).directions().stats
    assert stats.product == "reverse"


def layers(convolutions: int, linear: int) -> nn.Sequential:
    """A network with these layers, which shrink nothing."""
    body = [nn.Conv1d(1, 1, 3, padding=1) for _ in range(convolutions)] + [nn.Linear(4, 4) for _ in range(linear)]
    return nn.Sequential(*body).double()


@pytest.mark.parametrize(
    ("convolutions", "linear", "taken"), [(0, 3, "graph"), (1, 0, "forward"), (1, 2, "forward"), (1, 3, "graph")]
)
def test_one_step_takes_the_graph_unless_a_third_of_the_layers_are_convolutions(
    convolutions: int, linear: int, taken: str
) -> None:
    lower, x = layers(convolutions, linear), normal(5, 1, 4)
    levels = {
        "upper": UPPER,
        "lower": lower,
        "upper_optimizer": torch.optim.SGD([UPPER], lr=0.1),
        "lower_optimizer": torch.optim.SGD(lower.parameters(), lr=0.1),
    }
    losses = (lambda: (lower(x) - 1).tanh().square().mean(), lambda: (lower(x) - UPPER).tanh().square().mean())
    for steps in (1, 2):
        answer = bilevel.Unrolled(*losses, **levels, inner_steps=steps).directions()
        assert answer.stats.product == (taken if steps == 1 else "graph")


class Once(torch.autograd.Function):
    """The square, with a forward-mode rule and no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * v


def test_the_default_falls_back_to_the_adjoint_without_second_derivatives() -> None:
    point = nn.ParameterDict({"w": nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))})
    optimizer = bilevel.Unrolled(
        lambda: point["w"].sum(),
        lambda: (Once.apply(point["w"]) * UPPER).sum(),
        upper=UPPER,
        lower=point,
        upper_optimizer=torch.optim.SGD([UPPER], lr=0.1),
        lower_optimizer=torch.optim.SGD(point.parameters(), lr=0.1),
    )
    with pytest.warns(UserWarning, match="has no double backward.*Falling back to the adjoint"):
        answer = optimizer.directions()
    assert answer.stats.product == "forward"
    # w_1 = w - 0.1 * 2 w a, so dF/da = -0.2 (1 + 2).
    assert answer.upper["0"].item() == pytest.approx(-0.6)
    assert optimizer.directions().upper["0"].item() == pytest.approx(-0.6)


# --- forward mode -------------------------------------------------------------------------------------------------


def of_many(count: int) -> bilevel.Unrolled:
    alpha = torch.full((count,), 0.5, dtype=torch.float64, requires_grad=True)
    point = nn.ParameterDict({"w": nn.Parameter(torch.ones(2, dtype=torch.float64))})
    return bilevel.Unrolled(
        lambda: point["w"].square().sum(),
        lambda: (point["w"] - alpha.sum()).square().sum(),
        upper=alpha,
        lower=point,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD(point.parameters(), lr=0.1),
        differentiate="forward",
    )


def test_forward_mode_warns_of_many_upper_numbers_once_and_refuses_more() -> None:
    of_many(100).directions()
    many = of_many(101)
    with pytest.warns(UserWarning, match="carries a copy of all 2 lower numbers.* for each of 101 upper numbers"):
        many.directions()
    many.directions()
    with pytest.raises(ValueError, match="At most 1000 are allowed"):
        of_many(1001).directions()


def test_forward_mode_keeps_nothing_of_a_step() -> None:
    """What is alive after 20 steps is what is after 2: tensors are counted when F is called, at the end of the walk."""
    at = {
        (way, k): alive_at_the_end(inner_steps=k, differentiate=way) for way in ("forward", "adjoint") for k in (2, 20)
    }
    assert at["forward", 20] == at["forward", 2]
    assert at["adjoint", 20] >= at["adjoint", 2] + 18 * 3 * 6


def test_forward_mode_finds_what_is_captured_and_refuses_a_missing_second_derivative() -> None:
    alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    point = nn.ParameterDict({"w": nn.Parameter(torch.ones(2, dtype=torch.float64))})
    captured = point["w"] * 2

    def build(lower_loss: Callable[[], Tensor]) -> bilevel.Unrolled:
        return bilevel.Unrolled(
            lambda: point["w"].square().sum(),
            lower_loss,
            upper=alpha,
            lower=point,
            upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
            lower_optimizer=torch.optim.SGD(point.parameters(), lr=0.1),
            inner_steps=2,
            differentiate="forward",
        )

    with pytest.raises(bilevel.ClosureError, match="computed outside the call"):
        build(lambda: (captured - alpha).square().sum()).directions()
    with pytest.raises(bilevel.ClosureError, match="does not depend on any upper variable"):
        build(lambda: point["w"].square().sum()).directions()


# --- checkpoints of the adjoint -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"truncate": 5}, {"inner_step": "gradient"}], ids=["all", "last", "plain"])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("kind", ["momentum", "amsgrad"])
def test_checkpoints_change_no_bit(kind: str, steps: int, options: dict[str, Any]) -> None:
    """BatchNorm, dropout, a batch for each step; also more points than steps."""
    setup = Setup(kind)
    if options.get("truncate", 0) > steps:
        return
    every = found(setup, setup.data[: steps + 1], inner_steps=steps, **ADJOINT, **options)
    for points in (2, 20, "sqrt"):
        some = found(setup, setup.data[: steps + 1], inner_steps=steps, checkpoints=points, **options)
        assert all(torch.equal(a, b) for a, b in zip(every, some, strict=True)), points


def test_checkpoints_of_a_walk_from_a_start() -> None:
    setup = Setup("momentum")
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    fixed = [p.detach().clone() for p in setup.student.parameters()]
    options = {
        "upper": [setup.corrector, scale],
        "upper_optimizer": torch.optim.SGD([*setup.corrector.parameters(), scale], lr=0.1),
        "start": lambda: [scale * p for p in fixed],
        "inner_steps": 6,
    }
    every = found(setup, setup.data[:2], **ADJOINT, **options)
    some = found(setup, setup.data[:2], checkpoints="sqrt", **options)
    assert all(torch.equal(a, b) for a, b in zip(every, some, strict=True))


@pytest.mark.parametrize(
    ("points", "calls"),
    # 9 steps: 3 + 3 + 3, of which the first two threes are walked again; 5 + 4; 9; each; and F, G for the real step.
    [("sqrt", 9 + 6), (2, 9 + 5), (1, 9), (9, 9 + 8)],
)
def test_what_checkpoints_cost(points: Any, calls: int) -> None:
    """Gradients of G on the way there and back; products are calls as well, one for each step."""
    setup, counted = Setup("sgd"), []

    def lower_loss(batch: Any) -> Tensor:
        counted.append(1)
        return setup.lower_loss(batch)

    found(setup, setup.data[:2], inner_steps=9, checkpoints=points, lower_loss=lower_loss, verify="never")
    assert len(counted) == calls + 9


def alive_at_the_end(**options: Any) -> int:
    """How many tensors there are when F is called, at the end of the walk."""
    setup, counted = Setup("momentum"), []

    def upper_loss(batch: Any) -> Tensor:
        gc.collect()
        counted.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
        return setup.upper_loss(batch)

    optimizer = setup.optimizer(bilevel.Unrolled, verify="never", upper_loss=upper_loss, **options)
    optimizer.directions(*setup.data[:2])
    return counted[0]


def test_checkpoints_keep_about_two_roots_of_the_steps() -> None:
    """Of 36 steps: 6 points and states, and the last 6 steps, with gradients; a step has 6 tensors of each kind."""
    few = alive_at_the_end(inner_steps=1, **ADJOINT)
    every, some = (alive_at_the_end(inner_steps=36, **ADJOINT, **more) for more in ({}, {"checkpoints": "sqrt"}))
    assert every - few > 34 * 3 * 6
    assert some - few < (every - few) / 2.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"checkpoints": 0}, "must be at least 1"),
        ({"checkpoints": 2, "virtual": False}, "needs virtual=True: real steps are not taken twice"),
        ({"checkpoints": 2, "differentiate": "graph"}, 'are points of the adjoint, and differentiate="graph"'),
        ({"checkpoints": "sqrt", "differentiate": "forward"}, 'and differentiate="forward"'),
    ],
)
def test_checkpoints_that_mean_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    setup = Setup("sgd")
    with pytest.raises(ValueError, match=told):
        setup.optimizer(bilevel.Unrolled, inner_steps=3, **options)
    optimizer = setup.optimizer(bilevel.Unrolled, inner_steps=3, checkpoints="sqrt")
    with pytest.raises(TypeError, match="must be an integer"):
        optimizer.checkpoints = "root"
    optimizer.differentiate = "graph"
    with pytest.raises(ValueError, match="are points of the adjoint"):
        optimizer.step(*setup.data[:2])
