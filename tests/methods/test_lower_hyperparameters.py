"""``Unrolled(lower_hyperparameters=...)``: rates, momentum and decay of the lower optimizer as upper variables.

The plain side is ``torch.optim`` itself, run with numbers: finite differences of F after real steps of it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel

DOUBLE = torch.float64
RAW = (-1.0, 0.5, -2.0, 0.3)
Values = Callable[[Tensor], Any]


def sgd(raw: Tensor) -> dict[str, Any]:
    return {"lr": raw[0].exp(), "momentum": raw[1].sigmoid(), "weight_decay": raw[2].exp()}


def dampened(raw: Tensor) -> dict[str, Any]:
    return {"lr": raw[0].exp(), "momentum": raw[1].sigmoid(), "dampening": raw[3]}


def adam(raw: Tensor) -> dict[str, Any]:
    return {"lr": raw[0].exp(), "betas": (raw[1].sigmoid(), raw[3].sigmoid()), "weight_decay": raw[2].exp()}


def adam_eps(raw: Tensor) -> dict[str, Any]:
    return {"lr": 0.1, "betas": (0.8, raw[3].sigmoid()), "eps": raw[2].exp()}


def of_each_group(raw: Tensor) -> list[dict[str, Any]]:
    return [{"lr": raw[0].exp(), "weight_decay": raw[2].exp()}, {"lr": raw[1].exp() / 4, "momentum": raw[3].sigmoid()}]


Maker = Callable[..., torch.optim.Optimizer]
CASES: dict[str, tuple[Maker, Values]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), sgd),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True), sgd),
    "dampening": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), dampened),
    "two groups": (lambda p: torch.optim.SGD(p, lr=0.1), of_each_group),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1), adam),
    "amsgrad": (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), adam),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.1), adam),
    "adam, eps": (lambda p: torch.optim.Adam(p, lr=0.1), adam_eps),
}
WAYS: dict[str, dict[str, Any]] = {
    "adjoint": {"differentiate": "adjoint"},
    "graph": {"differentiate": "graph"},
    "forward": {"differentiate": "forward"},
    "real adjoint": {"differentiate": "adjoint", "virtual": False},
    "real graph": {"differentiate": "graph", "virtual": False},
    "real forward": {"differentiate": "forward", "virtual": False},
}
RARER = ("dampening", "amsgrad", "adam, eps")
every_case = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.thorough if name in RARER else ()) for name in CASES]
)
every_way = pytest.mark.parametrize("way", WAYS)


class World:
    """A small regression; G knows nothing of the upper variables unless it is ``weighed`` by one."""

    def __init__(self, make: Maker, values: Values, *, weighed: bool = False, warm_up: int = 2) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.x, self.y = torch.randn(2, 20, 3, dtype=DOUBLE), torch.randn(2, 20, 1, dtype=DOUBLE)
        self.raw = nn.Parameter(torch.tensor(RAW, dtype=DOUBLE))
        self.values, self.weighed = values, weighed
        first, last = [*self.net[0].parameters()], [*self.net[2].parameters()]
        self.lower_optimizer = make([{"params": first}, {"params": last}])
        for _ in range(warm_up):
            self.train()

    def error(self, half: int) -> Tensor:
        return (self.net(self.x[half]) - self.y[half]).square().mean()

    def lower_loss(self) -> Tensor:
        return self.error(0) * (self.raw[3].exp() if self.weighed else 1.0)

    def train(self) -> None:
        self.lower_optimizer.zero_grad()
        self.lower_loss().backward()
        self.lower_optimizer.step()

    def unrolled(self, **options: Any) -> bilevel.Unrolled:
        options.setdefault("lower_hyperparameters", lambda: self.values(self.raw))
        options.setdefault("upper_optimizer", torch.optim.SGD([self.raw], lr=0.1))
        return bilevel.Unrolled(
            lambda: self.error(1),
            self.lower_loss,
            upper=self.raw,
            lower=self.net,
            lower_optimizer=self.lower_optimizer,
            **options,
        )

    def after(self, raw: Tensor, steps: int) -> float:
        """F after real steps with the hyperparameters of other upper variables, taken back again."""
        kept = deepcopy((self.net.state_dict(), self.lower_optimizer.state_dict(), self.raw.detach().clone()))
        self.raw.data.copy_(raw)
        write(self.lower_optimizer, self.values(raw))
        for _ in range(steps):
            self.train()
        found = self.error(1).item()
        self.net.load_state_dict(kept[0])
        self.lower_optimizer.load_state_dict(kept[1])
        self.raw.data.copy_(kept[2])
        return found

    def differences(self, steps: int, size: float = 1e-5) -> Tensor:
        raw = self.raw.detach()
        along = [size * one for one in torch.eye(len(RAW), dtype=DOUBLE)]
        return torch.tensor(
            [(self.after(raw + e, steps) - self.after(raw - e, steps)) / (2 * size) for e in along], dtype=DOUBLE
        )


def numbers(values: Any) -> Any:
    return tuple(float(v) for v in values) if isinstance(values, tuple) else float(values)


def write(optimizer: torch.optim.Optimizer, values: Any) -> None:
    each = values if isinstance(values, list) else [values] * len(optimizer.param_groups)
    for group, own in zip(optimizer.param_groups, each, strict=True):
        group.update({name: numbers(value) for name, value in own.items()})


def groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: deepcopy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


# --- the derivative -----------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("steps", [1, 2, 5])
@every_case
def test_differences_of_real_training(case: str, steps: int, way: str) -> None:
    """From a state that is not empty; central differences are right to about 1e-10 of the value over 1e-5."""
    world = World(*CASES[case])
    found = world.unrolled(inner_steps=steps, **WAYS[way]).directions().upper["0"]
    torch.testing.assert_close(found, world.differences(steps), rtol=1e-6, atol=1e-8)
    assert found.norm() > 1e-2


@every_case
def test_every_way_gives_the_same(case: str) -> None:
    found = [World(*CASES[case]).unrolled(inner_steps=4, **way).directions().upper["0"] for way in WAYS.values()]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-13)


@every_way
def test_upper_variables_that_the_lower_loss_feels_as_well(way: str) -> None:
    """``raw[3]`` is in G and in the dampening: both parts are in the derivative."""
    world = World(*CASES["dampening"], weighed=True)
    found = world.unrolled(inner_steps=3, **WAYS[way]).directions().upper["0"]
    torch.testing.assert_close(found, world.differences(3), rtol=1e-6, atol=1e-8)


@every_way
@pytest.mark.parametrize(
    "bound", [bilevel.projection.Box(-0.3, 0.3), bilevel.projection.Ball(0.4)], ids=["box", "ball"]
)
def test_a_projection_of_the_lower_level_is_part_of_the_step(bound: Any, way: str) -> None:
    """Each step is projected, and some bounds are active; differences are of steps of ``torch.optim`` and the bound."""
    world = World(*CASES["sgd"], warm_up=0)
    project = [lambda x=x: x.data.copy_(bound(x.data)) for x in world.net.parameters()]
    for each in project:
        each()
    found = world.unrolled(inner_steps=3, lower_projection=bound, **WAYS[way]).directions().upper["0"]
    world.lower_optimizer.register_step_post_hook(lambda *_: [each() for each in project])
    torch.testing.assert_close(found, world.differences(3), rtol=1e-6, atol=1e-8)
    assert found[0].abs() > 1e-3


@every_way
def test_the_last_steps_alone(way: str) -> None:
    """``truncate=1``: ``dF/dlr = -<F_w(w_2), g(w_1)>`` of gradient descent; the value of the rate is everywhere."""
    world = World(lambda p: torch.optim.SGD(p, lr=0.1), lambda raw: {"lr": raw[0].exp()}, warm_up=0)
    found = world.unrolled(inner_steps=2, truncate=1, **WAYS[way]).directions().upper["0"]
    rate, w = world.raw[0].exp().item(), [*world.net.parameters()]
    for _ in range(2):
        slopes = torch.autograd.grad(world.error(0), w)
        with torch.no_grad():
            for x, g in zip(w, slopes, strict=True):
                x -= rate * g
    expected = -rate * sum((a * b).sum() for a, b in zip(torch.autograd.grad(world.error(1), w), slopes, strict=True))
    torch.testing.assert_close(found, torch.stack([torch.as_tensor(expected), *torch.zeros(3, dtype=DOUBLE)]))


@pytest.mark.parametrize("way", ["adjoint", "graph", "forward"])
def test_plain_steps_take_the_rate_alone(way: str) -> None:
    """``inner_step="gradient"``: ``dF/dlr = -<F_w(w_1), g>``, whatever momentum the real step has."""
    world = World(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda raw: {"lr": raw[0].exp()})
    optimizer = world.unrolled(inner_step="gradient", differentiate=way)
    found = optimizer.directions().upper["0"][0]
    rate, w = world.raw[0].exp().item(), [*world.net.parameters()]
    slopes = torch.autograd.grad(world.error(0), w)
    with torch.no_grad():
        for x, g in zip(w, slopes, strict=True):
            x -= rate * g
    expected = sum((a * b).sum() for a, b in zip(torch.autograd.grad(world.error(1), w), slopes, strict=True))
    torch.testing.assert_close(found, torch.as_tensor(-rate * expected))


@pytest.mark.parametrize("way", ["adjoint", "graph", "forward"])
def test_rates_of_a_start(way: str) -> None:
    """Meta-SGD: a learned start and a learned rate; ``w_1 = a - r (a - t)``, ``F = (w_1 - s)^2 / 2``."""
    a, r = (torch.tensor(x, dtype=DOUBLE, requires_grad=True) for x in (2.0, 0.25))
    point = nn.ParameterDict({"w": nn.Parameter(torch.zeros((), dtype=DOUBLE))})
    optimizer = bilevel.Unrolled(
        lambda: (point["w"] - 3.0).square() / 2,
        lambda: (point["w"] - 5.0).square() / 2,
        upper=[a, r],
        lower=point,
        upper_optimizer=torch.optim.SGD([a, r], lr=0.1),
        lower_optimizer=torch.optim.SGD(point.parameters(), lr=7.0),
        start=lambda: [a],
        lower_hyperparameters=lambda: {"lr": r},
        differentiate=way,
    )
    # w_1 = 2 + 0.25 * 3 = 2.75, dF/dw_1 = -0.25, dw_1/da = 1 - r = 0.75, dw_1/dr = t - a = 3.
    found = optimizer.directions().upper
    assert (found["0"].item(), found["1"].item()) == pytest.approx((-0.1875, -0.75))


@pytest.mark.parametrize("way", WAYS)
def test_a_momentum_of_exactly_zero_has_a_derivative(way: str) -> None:
    """Torch keeps no buffer at momentum 0; the real steps here do, so that all ways agree with a difference."""
    world = World(
        lambda p: torch.optim.SGD(p, lr=0.1), lambda raw: {"lr": 0.3, "momentum": raw[1], "dampening": 0.2}, warm_up=0
    )
    world.raw.data[1] = 1e-3
    near = world.unrolled(inner_steps=3, **WAYS[way]).directions().upper["0"][1]
    world.raw.data[1] = 0.0
    found = world.unrolled(inner_steps=3, **WAYS[way]).directions().upper["0"][1]
    assert found.abs() > 1e-3
    torch.testing.assert_close(found, near, rtol=1e-2, atol=0)


@every_case
@pytest.mark.parametrize("virtual", [True, False])
def test_check_directions(case: str, virtual: bool) -> None:
    world = World(*CASES[case])
    before = deepcopy(world.net.state_dict()), groups(world.lower_optimizer), world.raw.detach().clone()
    report = bilevel.check_directions(world.unrolled(inner_steps=2, virtual=virtual))
    assert report.verdict == "all passed", report
    after = deepcopy(world.net.state_dict()), groups(world.lower_optimizer), world.raw.detach().clone()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_check_directions_notices_a_wrong_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(*CASES["sgd"])
    optimizer = world.unrolled(inner_steps=2, differentiate="adjoint")
    module = import_module("bilevel.hypergradient.adjoint")  # the package has a function of that name
    wrong = lambda rule, upper, bars: [torch.ones_like(x) for x in upper.tensors]  # noqa: E731
    monkeypatch.setattr(module, "through_hyperparameters", wrong)
    assert not bilevel.check_directions(optimizer).passed


@every_case
def test_single_precision(case: str) -> None:
    """Values in float64, variables in float32: nothing changes dtype, and the direction is the same."""
    wide = World(*CASES[case])
    world = World(*CASES[case])
    world.net.float()
    world.lower_optimizer.load_state_dict(deepcopy(world.lower_optimizer.state_dict()))  # casts its state
    world.x, world.y = world.x.float(), world.y.float()
    for way in ("adjoint", "graph", "forward"):
        found = world.unrolled(inner_steps=2, differentiate=way).directions().upper["0"]
        expected = wide.unrolled(inner_steps=2, differentiate=way).directions().upper["0"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- what is done is what was differentiated ----------------------------------------------------------------------


@every_case
def test_the_ordinary_step_has_the_values_of_the_new_upper_variables(case: str) -> None:
    world, plain = World(*CASES[case]), World(*CASES[case])
    optimizer = world.unrolled(inner_steps=2)
    for _ in range(3):
        optimizer.step()
        plain.raw.data.copy_(world.raw)
        write(plain.lower_optimizer, plain.values(plain.raw.detach()))
        plain.train()
        assert groups(world.lower_optimizer) == groups(plain.lower_optimizer)
        torch.testing.assert_close(world.net.state_dict(), plain.net.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("way", ["real adjoint", "real graph", "real forward"])
@every_case
def test_real_steps_have_the_values_that_are_differentiated(case: str, way: str) -> None:
    world, plain = World(*CASES[case]), World(*CASES[case])
    optimizer = world.unrolled(inner_steps=2, **WAYS[way])
    for _ in range(3):
        write(plain.lower_optimizer, plain.values(world.raw.detach()))
        optimizer.step()
        plain.train()
        plain.train()
        torch.testing.assert_close(world.net.state_dict(), plain.net.state_dict(), rtol=0, atol=0)


@every_way
def test_directions_leave_the_groups_alone(way: str) -> None:
    world = World(*CASES["adam"])
    before = groups(world.lower_optimizer)
    world.unrolled(inner_steps=2, **WAYS[way]).directions()
    assert groups(world.lower_optimizer) == before


def test_a_rate_that_torch_keeps_as_a_tensor_is_written_into() -> None:
    world = World(lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)), lambda raw: {"lr": raw[0].exp()})
    kept = world.lower_optimizer.param_groups[0]["lr"]
    optimizer = world.unrolled()
    optimizer.directions()
    assert kept.item() == pytest.approx(0.1)
    optimizer.step()
    assert world.lower_optimizer.param_groups[0]["lr"] is kept
    assert kept.item() == pytest.approx(world.raw[0].exp().item())


@every_way
def test_a_resumed_run_goes_on(way: str) -> None:
    through, resumed = World(*CASES["adamw"]), World(*CASES["adamw"])
    one = through.unrolled(inner_steps=2, **WAYS[way])
    one.step()
    one.step()
    other = resumed.unrolled(inner_steps=2, **WAYS[way])
    resumed.net.load_state_dict(through.net.state_dict())
    resumed.raw.data.copy_(through.raw)
    other.load_state_dict(one.state_dict())
    for world, optimizer in ((through, one), (resumed, other)):
        optimizer.step()
        optimizer.step()
        assert world.raw.grad is not None
    assert torch.equal(through.raw, resumed.raw)
    torch.testing.assert_close(through.net.state_dict(), resumed.net.state_dict(), rtol=0, atol=0)
    assert groups(through.lower_optimizer) == groups(resumed.lower_optimizer)


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(values: Any, make: Maker = CASES["sgd"][0], **options: Any) -> str:
    world = World(make, lambda raw: values(raw) if callable(values) else values)
    with pytest.raises((TypeError, ValueError, bilevel.ClosureError)) as caught:
        world.unrolled(**options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (lambda raw: {"rate": raw[0].exp()}, "(lower_hyperparameters=rate): is none that the step of SGD"),
        (lambda raw: {"betas": (raw[1].sigmoid(), 0.9)}, "lr, momentum, dampening, weight_decay"),
        (lambda raw: {"lr": raw[0]}, "(lower_hyperparameters=lr: -1): must be at least 0. Did an upper step"),
        (lambda raw: {"lr": 0.1, "weight_decay": raw[0]}, "weight_decay: -1): must be at least 0"),
        (lambda raw: {"lr": raw.exp()}, "lr of shape (4,)): must be a scalar"),
        (lambda raw: {"lr": raw[0].exp().item()}, "depends on no upper variable"),
        (lambda raw: {"lr": raw[0].exp().detach()}, "depends on no upper variable"),
        (lambda raw: {"lr": "0.1"}, "lr: str): must be a scalar tensor"),
        (lambda raw: {"lr": torch.tensor(1)}, "lr: torch.int64): must be real floating point"),
        (lambda raw: raw[0].exp(), 'must return a dict such as {"lr": log_lr.exp()}'),
        (lambda raw: [{"lr": raw[0].exp()}], "returned 1 mappings for the 2 parameter groups"),
    ],
)
def test_what_is_no_hyperparameter_is_refused_by_name(values: Values, told: str) -> None:
    assert told in refused(values)


def test_betas_are_a_pair_below_one() -> None:
    assert "must be a pair" in refused(lambda raw: {"betas": raw[1].sigmoid()}, CASES["adam"][0])
    assert "must be below 1" in refused(lambda raw: {"betas": (0.5, raw[1].exp())}, CASES["adam"][0])


def test_combinations_that_mean_nothing_are_refused() -> None:
    learned = {"lr": 0.1}
    assert "needs" not in refused(learned)
    assert "goes with no lower_hyperparameters" in refused(learned, inner_lr=0.1)
    assert 'Use inner_step="optimizer"' in refused(lambda raw: {"momentum": raw[0].exp()}, inner_step="gradient")
    world = World(*CASES["sgd"])
    with pytest.raises(TypeError, match="Pass the function, without calling it"):
        world.unrolled(lower_hyperparameters=sgd(world.raw))
    optimizer = world.unrolled()
    optimizer.inner_lr = 0.1
    with pytest.raises(ValueError, match="goes with no lower_hyperparameters"):
        optimizer.step()
    with pytest.raises(AttributeError, match="is fixed at construction"):
        optimizer.lower_hyperparameters = None


def test_lower_variables_and_captured_tensors_are_refused() -> None:
    world = World(*CASES["sgd"])
    with pytest.raises(ValueError, match=r"depends on lower variable 0\.weight"):
        world.unrolled(lower_hyperparameters=lambda: {"lr": world.raw[0].exp() * world.net[0].weight.norm()})
    captured = world.raw[0].exp()
    with pytest.raises(bilevel.ClosureError, match="computed outside the call"):
        world.unrolled(lower_hyperparameters=lambda: {"lr": captured})


@pytest.mark.parametrize("virtual", [True, False])
def test_a_rate_that_an_upper_step_made_negative_changes_nothing(virtual: bool) -> None:
    """Plain ``lr``, without exp: the upper step moves it below 0, and is taken back."""
    world = World(lambda p: torch.optim.SGD(p, lr=0.1), lambda raw: {"lr": raw[1]})
    optimizer = world.unrolled(virtual=virtual)
    slope = optimizer.directions().upper["0"][1].item()
    optimizer.upper_optimizer.param_groups[0]["lr"] = 2 * world.raw[1].item() / slope  # towards -0.5
    before = deepcopy(world.net.state_dict()), world.raw.detach().clone()
    if not virtual:  # real steps come first: the next one has the new rate
        optimizer.step()
        before = deepcopy(world.net.state_dict()), world.raw.detach().clone()
    with pytest.raises(ValueError, match=r"lr: -0\.5\): must be at least 0"):
        optimizer.step()
    torch.testing.assert_close((world.net.state_dict(), world.raw.detach()), before, rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_rate_that_is_not_finite_is_left_to_the_policy(policy: Any) -> None:
    world = World(lambda p: torch.optim.SGD(p, lr=0.1), lambda raw: {"lr": raw[0].exp()})
    optimizer = world.unrolled(on_nonfinite=policy)
    with torch.no_grad():
        world.raw[0] = 1e4  # exp is inf
    before = deepcopy(world.net.state_dict())
    if policy == "raise":
        with pytest.raises(bilevel.NonFiniteError):
            optimizer.step()
    else:
        assert optimizer.step().skipped
    torch.testing.assert_close(world.net.state_dict(), before, rtol=0, atol=0)


# --- learning -----------------------------------------------------------------------------------------------------


def test_the_learned_rate_of_a_quadratic_is_that_of_exact_line_search() -> None:
    """One step on ``w'Hw/2``: the best rate is ``g'g / g'Hg``. Only upper moves are applied, so w stays."""
    h = torch.diag(torch.tensor([0.5, 1.0, 4.0], dtype=DOUBLE))
    point = nn.ParameterDict({"w": nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=DOUBLE))})
    log_lr = torch.tensor(-3.0, dtype=DOUBLE, requires_grad=True)

    def loss() -> Tensor:
        value: Tensor = point["w"] @ h @ point["w"] / 2
        return value

    optimizer = bilevel.Unrolled(
        loss,
        loss,
        upper=log_lr,
        lower=point,
        upper_optimizer=torch.optim.SGD([log_lr], lr=0.2),
        lower_optimizer=torch.optim.SGD(point.parameters(), lr=1.0),
        lower_hyperparameters=lambda: {"lr": log_lr.exp()},
    )
    for _ in range(100):
        optimizer.apply(optimizer.directions())
    g = h @ point["w"].detach()
    assert log_lr.exp().item() == pytest.approx((g @ g / (g @ h @ g)).item(), rel=1e-8)


def test_learned_rate_and_momentum_are_as_good_as_a_grid() -> None:
    """A run of 20 steps of a network from one point: F at its end, learned against 12 x 6 pairs."""
    world = World(
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.1),
        lambda raw: {"lr": raw[0].exp(), "momentum": raw[1].sigmoid()},
        warm_up=0,
    )
    raw = world.raw.detach().clone()
    grid = [
        world.after(torch.tensor([lr, m, 0.0, 0.0], dtype=DOUBLE), 20)
        for lr in torch.linspace(-5, 0, 12).tolist()
        for m in torch.linspace(-3, 3, 6).tolist()
    ]
    world.raw.data[:2] = torch.tensor([-4.0, -1.0])
    optimizer = world.unrolled(inner_steps=20, upper_optimizer=torch.optim.Adam([world.raw], lr=0.1))
    for _ in range(150):
        optimizer.apply(optimizer.directions())
    assert world.after(raw, 20) > 1.05 * min(grid), "the first guess was good already"
    assert world.after(world.raw.detach(), 20) < 1.001 * min(grid)
