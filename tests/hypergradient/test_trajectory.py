"""Walks of lower steps and their adjoints, against the same walk unrolled with ``create_graph``.

The plain computation below shares nothing with the library: the losses are functions of lists of tensors, the steps are
the textbook's formulas, and autograd differentiates the whole walk. A functional h of the end point is pulled back to
alpha and to w_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel.evaluation.oracle import Evaluator
from bilevel.hypergradient import Trajectory, adjoint, descend
from bilevel.hypergradient.modes import ProductMode
from bilevel.levels import Level
from bilevel.lower_steps import GradientDescent, OptimizerStep, Rule, current_rates
from bilevel.vectors import Tensors

LR = 0.1
EXACT: tuple[ProductMode, ...] = ("forward", "reverse")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# --- one problem, written twice ---------------------------------------------------------------------------------------


class Lower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


class Upper(nn.Module):
    """Weights of the samples and a decay rate per lower tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(normal(5))
        self.decay = nn.Parameter(normal(4) - 3)


Batch = tuple[Tensor, Tensor]


def plain_loss(alpha: Sequence[Tensor], w: Sequence[Tensor], batch: Batch) -> Tensor:
    """G as a function of tensors: w is (W1, b1, W2, b2), alpha is (weights, decay)."""
    x, y = batch
    out = torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]
    fit = (torch.sigmoid(alpha[0]) * ((out - y) ** 2).sum(1)).mean()
    return fit + sum((torch.exp(d) * (p**2).sum() for d, p in zip(alpha[1], w, strict=True)), torch.zeros(()))


def textbook_step(kind: str, w: Tensor, g: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The update rules as printed: SGD with and without momentum, Adam (Kingma and Ba, algorithm 1)."""
    if kind == "plain":
        return w - LR * g, state
    if kind == "momentum":  # with weight decay 0.05
        g = g + 0.05 * w
        buffer = 0.9 * state["momentum_buffer"] + g if "momentum_buffer" in state else g
        return w - LR * buffer, {"momentum_buffer": buffer}
    if kind == "adam with decay":  # L2: the step's derivative then depends on where it is taken
        g = g + 0.05 * w
    t = state.get("step", 0) + 1
    m = 0.9 * state.get("exp_avg", torch.zeros_like(g)) + 0.1 * g
    v = 0.99 * state.get("exp_avg_sq", torch.zeros_like(g)) + 0.01 * g**2
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.99**t)
    # 1e-300 under the root: no change in float64, and a derivative where nothing was ever seen.
    return w - LR * m_hat / ((v_hat + 1e-300).sqrt() + 1e-3), {"step": t, "exp_avg": m, "exp_avg_sq": v}


def build_optimizer(kind: str, parameters: Any) -> torch.optim.Optimizer:
    if kind.startswith("adam"):
        decay = 0.05 if kind == "adam with decay" else 0.0
        return torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.99), eps=1e-3, weight_decay=decay)
    if kind == "momentum":
        return torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=0.05)
    return torch.optim.SGD(parameters, lr=LR)


class Problem:
    """The library's side of the problem, with a lower optimizer that has ``warm_up`` real steps behind it."""

    def __init__(self, kind: str, count: int, warm_up: int = 2) -> None:
        torch.manual_seed(11)
        self.kind = kind
        self.upper, self.lower = Upper().double(), Lower().double()
        self.batches = [(normal(5, 3), normal(5, 2)) for _ in range(count)]
        self.calls = 0
        optimizer = build_optimizer(kind, self.lower.parameters())
        for _ in range(warm_up):
            optimizer.zero_grad()
            self.loss((normal(5, 3), normal(5, 2))).backward()
            optimizer.step()
        optimizer.zero_grad()
        self.upper.zero_grad()
        self.calls = 0
        upper_level = Level("Test", "upper", self.upper, torch.optim.SGD(self.upper.parameters(), lr=1.0))
        self.level = Level("Test", "lower", self.lower, optimizer)
        self.evaluator = Evaluator(
            "Test", self.loss, self.loss, upper_level, self.level, [(self.lower, "once"), (self.upper, "once")]
        )

    def loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        x, y = batch
        fit = (torch.sigmoid(self.upper.weights) * ((self.lower(x) - y) ** 2).sum(1)).mean()
        decay = [torch.exp(d) * (p**2).sum() for d, p in zip(self.upper.decay, self.lower.parameters(), strict=True)]
        value: Tensor = fit + torch.stack(decay).sum()
        return value

    def rule(self) -> Rule:
        return GradientDescent(current_rates(self.level, None)) if self.kind == "plain" else OptimizerStep(self.level)

    def states(self) -> list[dict[str, Any]]:
        if self.kind == "plain":
            return [{} for _ in self.level.tensors]
        held = [self.level.optimizer.state[t] for t in self.level.tensors]
        return [{k: v.item() if k == "step" else v.clone() for k, v in entry.items()} for entry in held]

    def walk(self, count: int, route: ProductMode, to_start: bool = True) -> tuple[Trajectory, Tensors, Tensors]:
        """The walk and the two derivatives of h at its end, by the library."""
        with self.evaluator.oracle([self.batches[0]], self.batches) as oracle:
            rule = self.rule()
            trajectory = descend(oracle, rule, count, first=oracle.lower(), keep=count)
            upper, lower = adjoint(
                oracle, rule, trajectory.steps, cotangent(trajectory.end), product=route, to_start=to_start
            )
        return trajectory, upper, lower

    def unrolled(self, count: int, truncate: int | None = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The same by autograd through the whole walk, or through its last ``truncate`` steps."""
        alpha = [p.detach().clone().requires_grad_() for p in self.upper.parameters()]
        start = [p.detach().clone().requires_grad_() for p in self.lower.parameters()]
        w, states = list(start), self.states()
        for t in range(count):
            if truncate is not None and t == count - truncate:
                start = w = [x.detach().requires_grad_() for x in w]
                states = [{k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for s in states]
            batch = self.batches[min(t, len(self.batches) - 1)]
            gradients = torch.autograd.grad(plain_loss(alpha, w, batch), w, create_graph=True)
            moved = [textbook_step(self.kind, *args) for args in zip(w, gradients, states, strict=True)]
            w, states = [x for x, _ in moved], [s for _, s in moved]
        found = torch.autograd.grad(h(w), [*alpha, *start])
        return [x.detach() for x in w], list(found[: len(alpha)]), list(found[len(alpha) :])


def h(w: Sequence[Tensor]) -> Tensor:
    """A functional of the end point that weights every entry differently."""
    flat = torch.cat([x.reshape(-1) for x in w])
    return (torch.sin(flat) * torch.linspace(-1.0, 2.0, len(flat), dtype=flat.dtype)).sum()


def cotangent(end: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in end]
    return list(torch.autograd.grad(h(leaves), leaves))


def flat(vector: Tensors) -> Tensor:
    assert all(x is not None for x in vector)
    return torch.cat([x.detach().reshape(-1) for x in vector if x is not None])


def relative(found: Tensors, expected: Tensors) -> float:
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())


# --- the walk and its adjoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", EXACT)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("warm_up", [0, 2])
@pytest.mark.parametrize("kind", ["plain", "momentum", "adam", "adam with decay"])
def test_the_adjoint_is_the_derivative_of_the_unrolled_walk(
    kind: str, warm_up: int, count: int, route: ProductMode
) -> None:
    """End point, dh/dalpha and dh/dw_0 to 1e-10, with a batch of its own for each step."""
    problem = Problem(kind, count, warm_up)
    trajectory, upper, lower = problem.walk(count, route)
    end, expected_upper, expected_lower = problem.unrolled(count)
    assert relative(trajectory.end, end) < 1e-13
    assert relative(upper, expected_upper) < 1e-10
    assert relative(lower, expected_lower) < 1e-10
    for found, expected in zip(upper, expected_upper, strict=True):
        assert found is not None
        assert expected.norm() > 1e-4  # each upper tensor matters
        assert relative([found], [expected]) < 1e-10


@pytest.mark.parametrize("kind", ["plain", "momentum", "adam", "adam with decay"])
def test_by_central_differences_to_their_accuracy(kind: str) -> None:
    problem = Problem(kind, 3)
    _, upper, lower = problem.walk(3, "difference")
    _, expected_upper, expected_lower = problem.unrolled(3)
    assert relative(upper, expected_upper) < 1e-7
    assert relative(lower, expected_lower) < 1e-7


def test_one_batch_serves_every_step() -> None:
    problem = Problem("momentum", 1)
    trajectory, upper, lower = problem.walk(3, "forward")
    end, expected_upper, expected_lower = problem.unrolled(3)
    assert relative(trajectory.end, end) < 1e-13
    assert relative(upper, expected_upper) < 1e-10
    assert relative(lower, expected_lower) < 1e-10


@pytest.mark.parametrize("kind", ["plain", "momentum", "adam", "adam with decay"])
def test_against_finite_differences_of_the_walk_itself(kind: str) -> None:
    """No autograd through the walk on either side: move alpha and w_0 in one direction, walk again, compare h."""
    problem = Problem(kind, 3)
    _, upper, lower = problem.walk(3, "forward")
    torch.manual_seed(4)
    variables = [*problem.upper.parameters(), *problem.lower.parameters()]
    direction = [normal(*p.shape) for p in variables]
    slope = sum(float((d * g).sum()) for d, g in zip(direction, [*upper, *lower], strict=True) if g is not None)

    def end_value(step: float) -> float:
        kept = [p.detach().clone() for p in variables]
        for p, d in zip(variables, direction, strict=True):
            p.data.add_(d, alpha=step)
        with problem.evaluator.oracle([problem.batches[0]], problem.batches) as oracle:
            value = h(descend(oracle, problem.rule(), 3, first=oracle.lower()).end).item()
        for p, k in zip(variables, kept, strict=True):
            p.data.copy_(k)
        return value

    # Richardson: truncation of the order of step^4 = 1e-16, rounding of 1e-16/step = 1e-12.
    step = 1e-4
    near, far = ((end_value(s) - end_value(-s)) / (2 * s) for s in (step, 2 * step))
    assert (4 * near - far) / 3 == pytest.approx(slope, rel=1e-8)


def test_a_walk_may_start_elsewhere() -> None:
    """``start=``: the same as moving the parameters there first; the parameters stay."""
    problem = Problem("momentum", 2)
    before = [p.detach().clone() for p in problem.lower.parameters()]
    start = [p + 0.1 * normal(*p.shape) for p in before]
    with problem.evaluator.oracle([problem.batches[0]], problem.batches) as oracle:
        rule = problem.rule()
        elsewhere = descend(oracle, rule, 2, start=start, keep=2)
        upper, lower = adjoint(
            oracle, rule, elsewhere.steps, cotangent(elsewhere.end), product="forward", to_start=True
        )
    assert all(map(torch.equal, [p.detach() for p in problem.lower.parameters()], before))
    for p, x in zip(problem.lower.parameters(), start, strict=True):
        p.data.copy_(x)
    end, expected_upper, expected_lower = problem.unrolled(2)
    assert relative(elsewhere.end, end) < 1e-13
    assert relative(upper, expected_upper) < 1e-10
    assert relative(lower, expected_lower) < 1e-10


@pytest.mark.parametrize("kind", ["plain", "momentum", "adam", "adam with decay"])
def test_without_the_start_the_upper_part_is_the_same(kind: str) -> None:
    problem = Problem(kind, 3)
    _, whole, _ = problem.walk(3, "forward")
    _, alone, _ = problem.walk(3, "forward", to_start=False)
    assert relative(alone, whole) < 1e-13


# --- what a walk costs and leaves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("route", "per_step"), [("forward", 1), ("reverse", 1), ("difference", 2)])
@pytest.mark.parametrize("count", [1, 3])
def test_calls_of_the_lower_loss(count: int, route: ProductMode, per_step: int) -> None:
    """``count - 1`` for the walk, because the caller has the first gradient; one product per step back."""
    problem = Problem("momentum", count)
    with problem.evaluator.oracle([problem.batches[0]], problem.batches, verifies=False) as oracle:
        rule, first = problem.rule(), oracle.lower()
        assert problem.calls == 1
        trajectory = descend(oracle, rule, count, first=first, keep=count)
        assert problem.calls == 1 + count - 1
        adjoint(oracle, rule, trajectory.steps, cotangent(trajectory.end), product=route)
        assert problem.calls == count + per_step * count


@pytest.mark.parametrize("kind", ["plain", "momentum", "adam", "adam with decay"])
def test_a_walk_moves_nothing(kind: str) -> None:
    problem = Problem(kind, 3)
    variables = [*problem.upper.parameters(), *problem.lower.parameters()]
    before = [p.detach().clone() for p in variables]
    states = problem.states()
    problem.walk(3, "forward")
    assert all(map(torch.equal, [p.detach() for p in variables], before))
    assert all(p.grad is None for p in variables)
    for old, new in zip(states, problem.states(), strict=True):
        for key, value in old.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(new[key]))


def test_only_the_steps_asked_for_are_kept() -> None:
    """The memory that the docs promise: the last ``keep`` of them, none by default."""
    problem = Problem("plain", 3)
    with problem.evaluator.oracle([problem.batches[0]], problem.batches) as oracle:
        first = oracle.lower()
        assert descend(oracle, problem.rule(), 3, first=first).steps == []
        for keep in range(4):
            steps = descend(oracle, problem.rule(), 3, first=first, keep=keep).steps
            assert [step.batch for step in steps] == [0, 1, 2][3 - keep :]


@pytest.mark.parametrize("kind", ["plain", "momentum", "adam", "adam with decay"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_truncated_walk_back(keep: int, kind: str) -> None:
    """With the last ``keep`` of three steps: w and the optimizer's state before them count as constants."""
    problem = Problem(kind, 3)
    with problem.evaluator.oracle([problem.batches[0]], problem.batches) as oracle:
        rule = problem.rule()
        trajectory = descend(oracle, rule, 3, first=oracle.lower(), keep=keep)
        upper, lower = adjoint(
            oracle, rule, trajectory.steps, cotangent(trajectory.end), product="forward", to_start=True
        )
    end, expected_upper, expected_lower = problem.unrolled(3, truncate=keep)
    assert relative(trajectory.end, end) < 1e-13
    assert relative(upper, expected_upper) < 1e-10
    assert relative(lower, expected_lower) < 1e-10  # dh/dw at the first step that was kept


class Unused(nn.Module):
    """Two tensors, of which G reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.idle = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["plain", "momentum"])
def test_a_variable_that_g_does_not_use_is_carried_along(kind: str) -> None:
    """It stays (no decay either), its end point is a copy, and its cotangent passes through unchanged."""
    upper = nn.ParameterList([nn.Parameter(torch.tensor([3.0], dtype=torch.float64))])
    lower = Unused()
    level = Level("Test", "lower", lower, build_optimizer(kind, lower.parameters()))
    upper_level = Level("Test", "upper", upper, torch.optim.SGD(upper.parameters(), lr=1.0))

    def loss(batch: None) -> Tensor:
        value: Tensor = 0.5 * upper[0].sum() * (lower.used**2).sum()
        return value

    made = Evaluator("Test", loss, loss, upper_level, level, [(lower, "once"), (upper, "once")])
    rule: Rule = GradientDescent([LR, LR]) if kind == "plain" else OptimizerStep(level)
    with made.oracle([None], [None]) as oracle:
        trajectory = descend(oracle, rule, 2, first=oracle.lower(), keep=2)
        found = adjoint(
            oracle,
            rule,
            trajectory.steps,
            [torch.ones(2, dtype=torch.float64), torch.full((1,), 7.0, dtype=torch.float64)],
            product="forward",
            to_start=True,
        )
    assert trajectory.end[1].tolist() == [5.0]
    assert trajectory.end[1].data_ptr() != lower.idle.data_ptr()
    assert found[1][1] is not None
    assert found[1][1].tolist() == [7.0]
    if kind == "plain":
        # w_2 = (1 - lr a)^2 w: dh/dw = 0.7^2, dh/da = -2 lr (1 - lr a) (w_1 + w_2)
        assert flat(found[1][:1]).tolist() == pytest.approx([0.49, 0.49])
        assert flat(found[0]).tolist() == pytest.approx([-2 * 0.1 * 0.7 * 3.0])


def test_adam_with_a_dead_coordinate() -> None:
    """A row that no token looks up has a gradient of exactly 0. The unrolled root would give NaN; its
    derivative is 0.
    """
    table = nn.Embedding(3, 2).double()
    upper = nn.ParameterList([nn.Parameter(torch.tensor([0.5, 2.0], dtype=torch.float64))])
    tokens = torch.tensor([0, 2])
    level = Level("Test", "lower", table, build_optimizer("adam", table.parameters()))
    upper_level = Level("Test", "upper", upper, torch.optim.SGD(upper.parameters(), lr=1.0))

    def loss(batch: Tensor) -> Tensor:
        value: Tensor = (upper[0][:, None] * (table(batch) - 1) ** 2).sum()
        return value

    made = Evaluator("Test", loss, loss, upper_level, level, [(table, "once"), (upper, "once")])
    with made.oracle([tokens], [tokens]) as oracle:
        trajectory = descend(oracle, OptimizerStep(level), 2, first=oracle.lower(), keep=2)
        found = adjoint(
            oracle, OptimizerStep(level), trajectory.steps, cotangent(trajectory.end), product="forward", to_start=True
        )

    alpha = upper[0].detach().clone().requires_grad_()
    start = table.weight.detach().clone().requires_grad_()
    w: Tensor = start
    state: dict[str, Any] = {}
    for _ in range(2):
        (g,) = torch.autograd.grad((alpha[:, None] * (w[tokens] - 1) ** 2).sum(), w, create_graph=True)
        w, state = textbook_step("adam", w, g, state)
    expected = torch.autograd.grad(h([w]), [alpha, start])
    assert torch.equal(trajectory.end[0][1], table.weight.detach()[1])
    assert relative(found[0], expected[:1]) < 1e-10
    assert relative(found[1], expected[1:]) < 1e-10
    assert found[1][0] is not None
    assert torch.equal(found[1][0][1], cotangent(trajectory.end)[0][1])  # the dead row is carried along


def test_a_longer_walk_forgets_the_start_of_a_contraction() -> None:
    """G = a|w - b|^2/2, lr a = 1/2: ``w_k - b = 2^-k (w_0 - b)``, so dh/dw_0 = 2^-k and dh/db = 1 - 2^-k, exactly."""
    upper = nn.ParameterList([nn.Parameter(torch.tensor([0.25], dtype=torch.float64))])
    lower = nn.ParameterList([nn.Parameter(torch.tensor([2.0], dtype=torch.float64))])
    level = Level("Test", "lower", lower, torch.optim.SGD(lower.parameters(), lr=0.5))
    upper_level = Level("Test", "upper", upper, torch.optim.SGD(upper.parameters(), lr=1.0))

    def loss(batch: None) -> Tensor:
        value: Tensor = 0.5 * ((lower[0] - upper[0]) ** 2).sum()
        return value

    made = Evaluator("Test", loss, loss, upper_level, level, [(lower, "once"), (upper, "once")])
    one = [torch.ones(1, dtype=torch.float64)]
    for count in (1, 2, 10):
        for route in EXACT:
            with made.oracle([None], [None]) as oracle:
                rule = GradientDescent([0.5])
                trajectory = descend(oracle, rule, count, first=oracle.lower(), keep=count)
                by_upper, by_lower = adjoint(oracle, rule, trajectory.steps, one, product=route, to_start=True)
            assert trajectory.end[0].tolist() == [0.25 + 1.75 * 0.5**count]
            assert flat(by_lower).tolist() == [0.5**count]
            assert flat(by_upper).tolist() == [1 - 0.5**count]
