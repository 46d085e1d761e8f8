"""The rules of ``lower_steps.py`` against torch's own optimizers, and their derivatives against finite differences.

An optimizer is warmed up with real steps, so that a preview starts from a real state; then rule and optimizer walk side
by side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.levels import Level
from bilevel.lower_steps import GradientDescent, OptimizerStep, Rule, current_rates

Build = Callable[[list[Tensor]], torch.optim.Optimizer]

SHAPES = ((3, 2), (4,), (), (2, 1, 2))
STEPS = 5


def sgd(**options: Any) -> Build:
    return lambda tensors: torch.optim.SGD(tensors, **{"lr": 0.1, **options})


def adam(**options: Any) -> Build:
    return lambda tensors: torch.optim.Adam(tensors, **{"lr": 0.05, **options})


def adamw(**options: Any) -> Build:
    return lambda tensors: torch.optim.AdamW(tensors, **{"lr": 0.05, **options})


def grouped(kind: type[torch.optim.Optimizer], first: dict[str, Any], second: dict[str, Any], **shared: Any) -> Build:
    """Two parameter groups that split the variables unevenly and out of order."""

    def build(tensors: list[Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": [tensors[2], tensors[0]], **first}, {"params": [tensors[1], *tensors[3:]], **second}]
        return kind(groups, **shared)

    return build


OPTIMIZERS: dict[str, Build] = {
    "sgd": sgd(),
    "sgd weight decay": sgd(weight_decay=0.3),
    "momentum": sgd(momentum=0.9),
    "momentum weight decay": sgd(momentum=0.9, weight_decay=0.3),
    "dampening": sgd(momentum=0.9, dampening=0.4),
    "nesterov": sgd(momentum=0.8, nesterov=True),
    "nesterov weight decay": sgd(momentum=0.8, nesterov=True, weight_decay=0.3),
    "momentum for loop": sgd(momentum=0.9, foreach=False),
    "momentum foreach": sgd(momentum=0.9, foreach=True),
    "sgd tensor lr": sgd(lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9),
    "sgd groups": grouped(
        torch.optim.SGD,
        {"lr": 0.2, "momentum": 0.5},
        {"lr": 0.01, "weight_decay": 0.1},
        lr=0.1,
    ),
    "adam": adam(),
    "adam betas": adam(betas=(0.7, 0.9), eps=1e-3),
    "adam weight decay": adam(weight_decay=0.3),
    "amsgrad": adam(amsgrad=True, betas=(0.5, 0.6)),
    "amsgrad weight decay": adam(amsgrad=True, betas=(0.5, 0.6), weight_decay=0.3),
    "adam tensor lr": adam(lr=torch.tensor(0.05, dtype=torch.float64)),
    "adam foreach": adam(foreach=True),
    "adam decoupled": adam(weight_decay=0.3, decoupled_weight_decay=True),
    "adam groups": grouped(
        torch.optim.Adam,
        {"lr": 0.2, "betas": (0.5, 0.9)},
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
        lr=0.1,
    ),
    "adamw": adamw(),
    "adamw weight decay": adamw(weight_decay=0.3),
    "adamw amsgrad": adamw(weight_decay=0.3, amsgrad=True, betas=(0.5, 0.6)),
    "adamw groups": grouped(
        torch.optim.AdamW,
        {"lr": 0.2, "weight_decay": 0.0},
        {"lr": 0.01, "weight_decay": 0.5},
        lr=0.1,
    ),
}


def variables(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in SHAPES]


def gradients() -> list[Tensor]:
    # Sizes that differ by 100: amsgrad's maximum and Adam's averages then have something to forget.
    size = 10.0 ** float(torch.randint(-1, 2, ()))
    return [size * torch.randn(shape, dtype=torch.float64) for shape in SHAPES]


def take(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor], gradient: Sequence[Tensor | None]) -> None:
    for tensor, g in zip(tensors, gradient, strict=True):
        tensor.grad = None if g is None else g.clone()
    optimizer.step()


def warm(name: str, steps: int) -> tuple[list[Tensor], torch.optim.Optimizer, Level]:
    tensors = variables()
    optimizer = OPTIMIZERS[name](tensors)
    for _ in range(steps):
        take(optimizer, tensors, gradients())
    return tensors, optimizer, Level("Test", "lower", tensors, optimizer)


def close(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-12, atol=1e-14)


# --- previews are the optimizers' own steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_preview_walks_with_the_optimizer(name: str, warm_up: int) -> None:
    """Five steps to 1e-12, from an empty and from a real state, every state tensor included."""
    tensors, optimizer, level = warm(name, warm_up)
    rule = OptimizerStep(level)
    assert any(rule.start()) == any(isinstance(v, Tensor) for state in optimizer.state.values() for v in state.values())
    point, state = [t.detach().clone() for t in tensors], rule.start()
    began = [x.clone() for x in point]
    for _ in range(STEPS):
        gradient = gradients()
        point, state = rule.step(point, gradient, state)
        take(optimizer, tensors, gradient)
        for x, t in zip(point, tensors, strict=True):
            assert close(x, t.detach())
        for found, t in zip(state, tensors, strict=True):
            held = {k: v for k, v in optimizer.state[t].items() if isinstance(v, Tensor)}
            assert set(found) == set(held)
            for key, value in held.items():
                assert close(found[key].to(value.dtype), value), key
    assert all(not torch.equal(x, y) for x, y in zip(point, began, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_preview_reads_and_never_writes(name: str) -> None:
    """Out of place: neither the optimizer's state, nor the point, nor the gradient, nor the state it was
    given changes.
    """
    tensors, optimizer, level = warm(name, 2)
    before = copy.deepcopy(optimizer.state_dict())
    rule = OptimizerStep(level)
    gradient = gradients()
    inputs = [t.detach().clone() for t in tensors]
    kept = [x.clone() for x in inputs]
    kept_gradient = [g.clone() for g in gradient]
    point, state = rule.step(inputs, gradient, rule.start())
    kept_state = copy.deepcopy(state)
    rule.step(point, gradient, state)
    assert all(map(torch.equal, inputs, kept))
    assert all(map(torch.equal, gradient, kept_gradient))
    for now, then in zip(state, kept_state, strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entry in before["state"].items():
        for key, value in entry.items():
            now = after["state"][index][key]
            assert torch.equal(now, value) if isinstance(value, Tensor) else now == value
    assert all(map(torch.equal, [t.detach() for t in tensors], kept))


@pytest.mark.parametrize("name", ["momentum weight decay", "amsgrad weight decay", "adamw weight decay"])
def test_a_variable_without_gradient_stays(name: str) -> None:
    """As in torch: no decay, no momentum, no count; and its later steps are those of a variable that missed some."""
    tensors, optimizer, level = warm(name, 3)
    rule = OptimizerStep(level)
    point, state = [t.detach().clone() for t in tensors], rule.start()
    for missing in (1, 2, 1, None, 0):
        gradient: list[Tensor | None] = list(gradients())
        if missing is not None:
            gradient[missing] = None
            held = point[missing], state[missing]
        point, state = rule.step(point, gradient, state)
        if missing is not None:
            assert point[missing] is held[0]
            assert state[missing] is held[1]
        take(optimizer, tensors, gradient)
        assert all(close(x, t.detach()) for x, t in zip(point, tensors, strict=True))


def test_a_preview_follows_the_scheduler() -> None:
    """Groups are read when the preview is made, once a step: a scheduler's new rate counts from the next one."""
    tensors, optimizer, level = warm("sgd groups", 1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    take(optimizer, tensors, gradients())
    scheduler.step()
    assert current_rates(level, None) == [pytest.approx(r) for r in (0.02, 0.001, 0.02, 0.001)]
    gradient = gradients()
    point, _ = OptimizerStep(level).step([t.detach() for t in tensors], gradient, OptimizerStep(level).start())
    take(optimizer, tensors, gradient)
    assert all(close(x, t.detach()) for x, t in zip(point, tensors, strict=True))


@pytest.mark.parametrize("name", ["momentum weight decay", "adam weight decay", "adamw weight decay", "adam groups"])
def test_a_rate_of_ones_own_replaces_only_the_rate(name: str) -> None:
    """``inner_lr`` with ``inner_step="optimizer"``: the optimizer with that rate in every group."""
    tensors, optimizer, level = warm(name, 2)
    gradient = gradients()
    point, _ = OptimizerStep(level, rate=0.37).step(
        [t.detach().clone() for t in tensors], gradient, OptimizerStep(level).start()
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.37
    take(optimizer, tensors, gradient)
    assert all(close(x, t.detach()) for x, t in zip(point, tensors, strict=True))


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw weight decay"])
def test_float32_previews_stay_float32(name: str) -> None:
    """Also for a variable of no dimension and a float64 learning rate: nothing widens the point."""
    torch.manual_seed(1)
    tensors = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    optimizer = OPTIMIZERS[name](tensors)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.05, dtype=torch.float64)
    level = Level("Test", "lower", tensors, optimizer)
    for rule in (OptimizerStep(level), GradientDescent(current_rates(level, None))):
        point, state = [t.detach().clone() for t in tensors], rule.start()
        for _ in range(2):
            point, state = rule.step(point, [torch.randn(shape) for shape in SHAPES], state)
        assert [x.dtype for x in point] == [torch.float32] * len(SHAPES)
        assert [x.shape for x in point] == [t.shape for t in tensors]


def test_adam_counts_exactly_in_a_long_run() -> None:
    """After 200 000 steps with beta2 = 0.999999 the correction ``1 - beta2^t`` = 0.181 would read 0.183 from a
    float32 power.
    """
    tensors = variables()
    optimizer = torch.optim.Adam(tensors, lr=0.1, betas=(0.9, 0.999999))
    take(optimizer, tensors, gradients())
    for state in optimizer.state.values():
        state["step"].fill_(200_000.0)
    rule = OptimizerStep(Level("Test", "lower", tensors, optimizer))
    gradient = gradients()
    point, _ = rule.step([t.detach().clone() for t in tensors], gradient, rule.start())
    take(optimizer, tensors, gradient)
    assert all(close(x, t.detach()) for x, t in zip(point, tensors, strict=True))


@pytest.mark.parametrize(
    ("build", "refused"),
    [
        (lambda tensors: torch.optim.RMSprop(tensors), True),
        (lambda tensors: torch.optim.NAdam(tensors), True),
        (lambda tensors: type("Mine", (torch.optim.SGD,), {})(tensors, lr=0.1), True),  # a subclass may step otherwise
        (lambda tensors: torch.optim.SGD(tensors, lr=0.1), False),
        (lambda tensors: torch.optim.Adam(tensors), False),
        (lambda tensors: torch.optim.AdamW(tensors), False),
    ],
)
def test_only_known_optimizers_are_previewed(build: Build, refused: bool) -> None:
    """A preview of another optimizer would silently be another step."""
    tensors = variables()
    alpha = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = build(tensors)

    def construct() -> bilevel.BOME:
        return bilevel.BOME(
            lambda: tensors[0].sum(),
            lambda: alpha * tensors[0].sum(),
            upper=alpha,
            lower=tensors,
            upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
            lower_optimizer=optimizer,
            inner_step="optimizer",
        )

    if not refused:
        construct()
        return
    with pytest.raises(ValueError, match="as a function") as caught:
        construct()
    text = str(caught.value)
    assert text.startswith(f"BOME(lower_optimizer={type(optimizer).__name__})")
    assert "SGD, Adam, AdamW" in text
    assert 'inner_step="gradient"' in text


# --- plain gradient descent -------------------------------------------------------------------------------------------


def test_gradient_descent_by_hand() -> None:
    """``w - lr_i g``, one rate per variable, float or tensor; no gradient, no step."""
    rule = GradientDescent([0.5, torch.tensor(0.25, dtype=torch.float64), 7.0])
    point = [torch.tensor([1.0, 2.0]), torch.tensor(3.0), torch.tensor([4.0])]
    moved, state = rule.step(point, [torch.tensor([2.0, -2.0]), torch.tensor(4.0), None], rule.start())
    assert [x.tolist() for x in moved] == [[0.0, 3.0], 2.0, [4.0]]
    assert moved[2] is point[2]
    assert list(state) == [{}, {}, {}]
    assert [x.tolist() for x in point] == [[1.0, 2.0], 3.0, [4.0]]


def test_gradient_descent_ignores_momentum_and_decay() -> None:
    """Printed in the papers: the inner step is plain whatever the lower optimizer does, at that optimizer's rates."""
    tensors, _, level = warm("momentum weight decay", 3)
    gradient = gradients()
    rule = GradientDescent(current_rates(level, None))
    moved, _ = rule.step([t.detach() for t in tensors], gradient, rule.start())
    for x, t, g in zip(moved, tensors, gradient, strict=True):
        assert close(x, t.detach() - 0.1 * g)
    assert current_rates(level, 0.7) == [0.7] * len(SHAPES)


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm_up", [0, 2])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "foreach" not in name])
def test_rules_are_differentiable(name: str, warm_up: int) -> None:
    """Two steps in a row, with respect to the point, both gradients and the state, against finite differences in
    float64.
    """
    tensors, _, level = warm(name, warm_up)
    rule = OptimizerStep(level)
    start = rule.start()
    keys = [(i, key) for i, state in enumerate(start) for key in state if key != "step"]
    count = len(SHAPES)

    def walk(*flat: Tensor) -> tuple[Tensor, ...]:
        point, one, two = (list(flat[k * count : (k + 1) * count]) for k in range(3))
        state = [dict(entry) for entry in start]
        for (i, key), value in zip(keys, flat[3 * count :], strict=True):
            state[i][key] = value
        middle, state_after = rule.step(point, one, state)
        end, state_end = rule.step(middle, two, state_after)
        return (*end, *(entry[key] for entry in state_end for key in entry if key != "step"))

    inputs = [t.detach().clone() for t in tensors] + gradients() + gradients()
    # Away from the ties of amsgrad's maximum, where only a one-sided derivative exists.
    inputs += [start[i][key] * 1.01 for i, key in keys]
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(walk, leaves, eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_gradient_descent_is_differentiable() -> None:
    rule = GradientDescent([0.5, 0.25])
    x, y = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    g, h = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = [torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([5.0, 7.0, 9.0], dtype=torch.float64)]
    moved, _ = rule.step([x, y], [g, h], rule.start())
    found = torch.autograd.grad(moved, [x, y, g, h], grad_outputs=weights)
    # dw'/dw = 1, dw'/dg = -lr
    for got, expected in zip(found, [*weights, -0.5 * weights[0], -0.25 * weights[1]], strict=True):
        assert torch.equal(got, expected)


def derivative(rule: Rule, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step's end point and the sum of its derivatives with respect to point and gradient."""
    point, gradient = x.detach().clone().requires_grad_(), g.clone().requires_grad_()
    moved, _ = rule.step([point], [gradient], rule.start())
    by_point, by_gradient = torch.autograd.grad(moved[0].sum(), [point, gradient])
    return moved[0].detach(), by_point, by_gradient


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"decoupled_weight_decay": True, "weight_decay": 0.5}])
@pytest.mark.parametrize("warm_up", [0, 3])
def test_adam_at_a_gradient_of_zero(options: dict[str, Any], warm_up: int) -> None:
    """The square root has no derivative at 0. Where no gradient was ever seen the step is 0, and its derivative is 0,
    not NaN.
    """
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], **{"lr": 0.1, **options})
    # A dead coordinate: its gradient was 0 in every step so far, and is now.
    for _ in range(warm_up):
        take(optimizer, [x], [torch.tensor([0.5, 0.0, -0.25], dtype=torch.float64)])
    before = x.detach().clone()
    g = torch.tensor([0.5, 0.0, -0.25], dtype=torch.float64)
    moved, by_point, by_gradient = derivative(OptimizerStep(Level("Test", "lower", x, optimizer)), x, g)
    kept = 1 - 0.1 * options.get("weight_decay", 0.0)
    assert moved[1].item() == pytest.approx(kept * before[1].item(), rel=1e-15)
    assert by_gradient[1].item() == 0.0
    assert by_point.tolist() == [kept] * 3
    assert torch.isfinite(by_gradient).all()
    if warm_up:
        # A step that changes with its gradient: only the dead coordinate has derivative 0.
        assert by_gradient[0].item() != 0.0
        assert by_gradient[2].item() != 0.0


def test_adam_at_zero_after_a_gradient_was_seen() -> None:
    """With v > 0 the step is smooth at g = 0: ``d(x - lr/c1 m/(sqrt(v/c2) + eps))/dg = -lr/c1 (1 - beta1)/(sqrt(v/c2) +
    eps)``.
    """
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    take(optimizer, [x], [torch.tensor([2.0], dtype=torch.float64)])
    level = Level("Test", "lower", x, optimizer)
    _, _, by_gradient = derivative(OptimizerStep(level), x, torch.zeros(1, dtype=torch.float64))
    c1, c2 = 1 - 0.9**2, 1 - 0.999**2
    v = 0.999 * 0.001 * 4.0
    expected = -0.1 / c1 * 0.1 / ((v / c2) ** 0.5 + 1e-8)
    assert by_gradient.item() == pytest.approx(expected, rel=1e-12)


def test_adam_with_decay_at_zero_has_the_derivative_of_its_decay() -> None:
    """L2 decay feeds the point into the gradient: at g = 0 and x != 0 the root is not at 0, and both derivatives agree
    up to wd.
    """
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.1, weight_decay=0.5, eps=1e-2)
    _, by_point, by_gradient = derivative(
        OptimizerStep(Level("Test", "lower", x, optimizer)), x, torch.zeros(1, dtype=torch.float64)
    )
    # First step: m/c1 = d, v/c2 = d^2, so the step is lr d/(|d| + eps) with d = g + wd x = 1; its derivative lr
    # eps/(|d| + eps)^2
    slope = 0.1 * 1e-2 / (1 + 1e-2) ** 2
    assert by_gradient.item() == pytest.approx(-slope, rel=1e-9)
    assert by_point.item() == pytest.approx(1 - 0.5 * slope, rel=1e-9)
