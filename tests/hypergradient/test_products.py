"""Hessian products of the lower loss: three routes, one closed form, and what happens where a route has no rule.

``v`` is a direction in w. The products are ``G_ww v`` and ``G_aw v``, the derivative of both gradients of G along v.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, mse_loss
from torch.utils.checkpoint import checkpoint

from bilevel import ClosureError
from bilevel.evaluation.oracle import Evaluator, Oracle
from bilevel.hypergradient.mode_choice import mode_taken
from bilevel.hypergradient.modes import PRODUCT_MODES, ProductMode
from bilevel.hypergradient.products import hessian_product, mixed_product
from bilevel.levels import Level
from bilevel.vectors import Tensors

Loss = Callable[[], Tensor]
EXACT: tuple[ProductMode, ...] = ("auto", "forward", "reverse")


def evaluator(lower_loss: Callable[..., Tensor], upper: Any, lower: Any) -> Evaluator:
    """Two levels with optimizers that never step; the upper loss plays no part."""
    levels = []
    for side, variables in (("upper", upper), ("lower", lower)):
        held = variables.parameters() if isinstance(variables, nn.Module) else [t for _, t in variables]
        levels.append(Level("Test", side, variables, torch.optim.SGD(held, lr=0.1)))
    modules = [(module, "once") for level in reversed(levels) for module in level.modules]
    return Evaluator("Test", lower_loss, lower_loss, levels[0], levels[1], modules)  # type: ignore[arg-type]


class Weights(nn.Module):
    """The upper level: one weight per sample of the lower batch."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1.0, 1.5, count, dtype=torch.float64))

    def forward(self) -> Tensor:
        return torch.sigmoid(self.logits)


@dataclass
class Case:
    """A lower model, the closure that calls it, and the batch size."""

    model: nn.Module
    output: Callable[[], Tensor]
    count: int = 6

    def loss(self, weights: Weights) -> Loss:
        def lower_loss() -> Tensor:
            out = self.output().flatten(1)
            tilt = torch.sin(torch.arange(out.shape[1], dtype=out.dtype))
            value: Tensor = (weights() * (out * tilt + 0.3 * out**2).mean(1)).mean()
            return value

        return lower_loss

    def evaluator(self) -> Evaluator:
        self.model.double()
        weights = Weights(self.count)
        return evaluator(self.loss(weights), weights, self.model)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def plain(model: nn.Module, x: Tensor) -> Case:
    return Case(model, lambda: model(x), len(x))


# --- the zoo ----------------------------------------------------------------------------------------------------------


class LastOfLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.lstm(x)[0][:, -1]
        return last


class Tied(nn.Module):
    """One matrix is both embedding and output layer, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.embed(tokens)))
        return logits


class TwoHeads(nn.Module):
    """Read through a bound method, a ParameterDict, a ParameterList and a direct attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 4)
        self.heads = nn.ParameterDict({"a": nn.Parameter(normal(4, 2)), "b": nn.Parameter(normal(4, 2))})
        self.shifts = nn.ParameterList([nn.Parameter(normal(2)), nn.Parameter(normal(2))])
        self.scale = nn.Parameter(normal(1)[0])

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.stem(x))


def two_heads() -> Case:
    model, x = TwoHeads(), normal(6, 5)

    def output() -> Tensor:
        h = model.features(x)
        one, two = h @ model.heads["a"] + model.shifts[0], h @ model.heads["b"] + model.shifts[1]
        out: Tensor = model.scale * one * torch.cos(two)
        return out

    return Case(model, output)


def hooked() -> Case:
    first, last = nn.Linear(5, 4), nn.Linear(4, 2)
    first.register_forward_hook(lambda module, inputs, out: out * last.weight.sum())
    return plain(nn.Sequential(first, nn.Tanh(), last), normal(6, 5))


def functional() -> Case:
    """The parameter is fetched from its module in each call and used by a functional layer."""
    model, x = nn.Linear(5, 2), normal(6, 5)
    return Case(model, lambda: torch.tanh(linear(x, model.weight, model.bias)))


ZOO: dict[str, Callable[[], Case]] = {
    "conv, batch norm, in-place relu": lambda: plain(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 2)),
        normal(6, 2, 5, 5),
    ),
    "batch norm in eval mode": lambda: plain(
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4).eval(), nn.Tanh()), normal(6, 5)
    ),
    "layer norm": lambda: plain(
        nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), normal(6, 5)
    ),
    "embedding": lambda: plain(nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 2)), torch.arange(6) % 4),
    "lstm": lambda: plain(LastOfLSTM(), normal(6, 4, 3)),
    "dropout": lambda: plain(nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)), normal(6, 5)),
    "tied weights": lambda: plain(Tied(), torch.arange(6) % 7),
    "transformer layer with dropout": lambda: plain(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True), normal(6, 3, 8)
    ),
    # Without dropout the fused kernel would serve, which has neither rule.
    "attention": lambda: plain(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), normal(6, 3, 8)),
    "max pooling": lambda: plain(nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d(2), nn.Softplus()), normal(6, 2, 5, 5)),
    "two heads": two_heads,
    "forward hook": hooked,
    "functional": functional,
}


def build(name: str) -> tuple[Evaluator, list[Tensor | None], list[Tensor]]:
    """An evaluator of the zoo, a direction and another lower point."""
    torch.manual_seed(sorted(ZOO).index(name))
    found = ZOO[name]().evaluator()
    tensors = found.lower.tensors
    return found, [normal(*t.shape) for t in tensors], [t.detach() + 0.1 * normal(*t.shape) for t in tensors]


def flat(vector: Tensors, like: Sequence[Tensor]) -> Tensor:
    parts = [torch.zeros_like(t) if x is None else x.detach() for x, t in zip(vector, like, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])


def product(
    made: Evaluator, direction: Tensors, at: Sequence[Tensor] | None, route: ProductMode, seed: int = 5
) -> tuple[Tensor, Tensor]:
    """Both products, flattened, from one look that begins with the lower loss at the current point, as in a method."""
    torch.manual_seed(seed)
    with made.oracle([], []) as oracle:
        oracle.lower()
        upper, lower = hessian_product(oracle, direction, at=at, product=route)
        alone = mixed_product(oracle, direction, at=at, product=route)
    assert relative(flat(alone, made.upper.tensors), flat(upper, made.upper.tensors)) < (
        1e-5 if route == "difference" else 1e-10
    )
    return flat(upper, made.upper.tensors), flat(lower, made.lower.tensors)


def relative(found: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    return float((found - expected).norm()) / size if size else float(found.norm())


# --- three routes, one answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_the_routes_agree(name: str, elsewhere: bool) -> None:
    """Forward over reverse and double backward to 1e-10, a central difference of plain gradients to 1e-5, in both
    levels.
    """
    made, direction, point = build(name)
    at = point if elsewhere else None
    reverse, forward, difference = (
        product(made, direction, at, route) for route in ("reverse", "forward", "difference")
    )
    for level in (0, 1):
        assert reverse[level].norm() > 0
        assert relative(forward[level], reverse[level]) < 1e-10
        assert relative(difference[level], reverse[level]) < 1e-5
    if elsewhere:
        here = product(made, direction, None, "reverse")
        assert relative(reverse[1], here[1]) > 1e-3  # the point matters


@pytest.mark.parametrize("name", ZOO)
def test_a_product_leaves_no_trace(name: str) -> None:
    """Parameters, buffers, .grad, flags and random state are those of before, to the bit, on every route."""
    made, direction, point = build(name)
    model = made.lower.modules[0]

    def everything() -> list[Tensor]:
        state = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
        return [x.detach().clone() for x in state]

    for route in PRODUCT_MODES:
        with made.oracle([], []) as oracle:
            oracle.lower()
            before, flags = everything(), [m.training for m in model.modules()]
            objects = [id(x) for x in (*model.parameters(), *model.buffers())]
            for at in (None, point):
                kept = [x.clone() for x in point]
                hessian_product(oracle, direction, at=at, product=route)  # type: ignore[arg-type]
                mixed_product(oracle, direction, at=at, product=route)  # type: ignore[arg-type]
                assert all(map(torch.equal, point, kept))
            assert all(map(torch.equal, everything(), before)), route
            assert [id(x) for x in (*model.parameters(), *model.buffers())] == objects
            assert [m.training for m in model.modules()] == flags
            assert all(p.grad is None and p.requires_grad and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("kind", [hessian_product, mixed_product])
@pytest.mark.parametrize("route", PRODUCT_MODES)
def test_a_product_on_a_new_batch_moves_no_statistics(route: ProductMode, kind: Callable[..., Any]) -> None:
    """A batch that was never evaluated at the current point: only ``Oracle.lower`` there moves statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    weights = Weights(6)

    def loss(x: Tensor) -> Tensor:
        value: Tensor = (weights() * model(x).sum(1)).mean()
        return value

    made = evaluator(loss, weights, model)
    direction = [normal(*t.shape) for t in made.lower.tensors]
    batches = [normal(6, 5), normal(6, 5)]
    with made.oracle([batches[0]], batches) as oracle:
        before = [b.clone() for b in model.buffers()]
        kind(oracle, direction, batch=1, at=None, product=route)
        assert all(map(torch.equal, model.buffers(), before))
        oracle.lower()
        assert not all(map(torch.equal, model.buffers(), before))  # which is what moves them


@pytest.mark.parametrize("route", PRODUCT_MODES)
def test_a_callers_no_grad_changes_nothing(route: ProductMode) -> None:
    """A step inside ``torch.no_grad()`` still needs its derivatives, and dual tensors are views of the leaves."""
    made, direction, point = build("layer norm")
    expected = product(made, direction, point, route)
    with torch.no_grad():
        found = product(made, direction, point, route)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("route", PRODUCT_MODES)
@pytest.mark.parametrize("kind", ["hessian", "mixed"])
def test_calls_of_the_lower_loss(route: ProductMode, kind: str) -> None:
    """The cost that the docs promise: one evaluation by forward and by reverse, two by difference."""
    made, direction, _ = build("layer norm")
    calls = 0
    inner = made.lower_loss._function

    def counted() -> Tensor:
        nonlocal calls
        calls += 1
        value: Tensor = inner()
        return value

    made.lower_loss._function = counted
    with made.oracle([], [], verifies=False) as oracle:
        (hessian_product if kind == "hessian" else mixed_product)(oracle, direction, product=route)
    assert calls == (2 if route == "difference" else 1)


# --- closed forms -----------------------------------------------------------------------------------------------------


class Polynomial:
    """``G = w'Aw/2 + w'Ba + |a|^2 |w|^2/2 + sum(w^3)/6``: quadratic, plus terms that tell where the product is taken.

    grad_w G = Aw + Ba + |a|^2 w + w^2/2, so ``G_ww v = Av + |a|^2 v + w*v`` and ``G_aw v = B'v + 2a <w, v>``.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        root = normal(4, 4)
        self.a = root @ root.T
        self.b = normal(4, 3)
        self.upper = nn.ParameterList([nn.Parameter(normal(3))])
        self.lower = nn.ParameterList([nn.Parameter(normal(3)), nn.Parameter(normal(1))])

    def loss(self) -> Tensor:
        w, alpha = torch.cat(list(self.lower)), self.upper[0]
        quadratic = 0.5 * w @ self.a @ w + w @ self.b @ alpha
        value: Tensor = quadratic + 0.5 * (alpha @ alpha) * (w @ w) + (w**3).sum() / 6
        return value

    def expected(self, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.upper[0].detach()
        return self.b.T @ v + 2 * alpha * (w @ v), self.a @ v + (alpha @ alpha) * v + w * v


@pytest.mark.parametrize("route", PRODUCT_MODES)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_closed_form(route: ProductMode, elsewhere: bool) -> None:
    problem = Polynomial()
    made = evaluator(problem.loss, problem.upper, problem.lower)
    direction = [normal(3), normal(1)]
    at = [normal(3), normal(1)] if elsewhere else None
    found = product(made, direction, at, route)
    w = torch.cat([t.detach() for t in (at or problem.lower)])
    for got, expected in zip(found, problem.expected(w, torch.cat(direction)), strict=True):
        # A central difference of a gradient of degree 2 has no truncation, only rounding over the step: 1e-16/6e-6.
        assert relative(got, expected) < (1e-9 if route == "difference" else 1e-14)


@pytest.mark.parametrize("route", PRODUCT_MODES)
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e6])
def test_products_are_linear_in_the_direction(route: ProductMode, size: float) -> None:
    """At every size of the direction: the central difference scales its step by it."""
    problem = Polynomial()
    made = evaluator(problem.loss, problem.upper, problem.lower)
    direction = [normal(3), normal(1)]
    unit = product(made, direction, None, route)
    scaled = product(made, [size * v for v in direction], None, route)
    for one, many in zip(unit, scaled, strict=True):
        assert relative(many, size * one) < (1e-8 if route == "difference" else 1e-13)


@pytest.mark.parametrize("route", PRODUCT_MODES)
def test_none_in_a_direction_is_zero(route: ProductMode) -> None:
    problem = Polynomial()
    made = evaluator(problem.loss, problem.upper, problem.lower)
    part = normal(3)
    expected = product(made, [part, torch.zeros(1, dtype=torch.float64)], None, route)
    found = product(made, [part, None], None, route)
    nothing = product(made, [None, None], None, route)
    for got, zeros, nil in zip(found, expected, nothing, strict=True):
        assert relative(got, zeros) < 1e-9
        assert nil.abs().max() == 0


@pytest.mark.parametrize("route", PRODUCT_MODES)
def test_a_loss_linear_in_w_has_no_product_in_w(route: ProductMode) -> None:
    """G = <a, w>: ``G_ww v = 0`` and ``G_aw v = v``; G = sum(w) + sum(a): both 0."""
    upper, lower = (nn.ParameterList([nn.Parameter(normal(3))]) for _ in range(2))
    v = normal(3)
    made = evaluator(lambda: upper[0] @ lower[0], upper, lower)
    by_upper, by_lower = product(made, [v], None, route)
    assert relative(by_upper, v) < 1e-9
    assert by_lower.abs().max() < 1e-9
    made = evaluator(lambda: upper[0].sum() + lower[0].sum(), upper, lower)
    for zeros in product(made, [v], None, route):
        assert zeros.abs().max() < 1e-9


@pytest.mark.parametrize("route", EXACT)
def test_dropout_masks_repeat(route: ProductMode) -> None:
    """``G = sum (m w)^2/2``, m in {0, 2}: the gradient ``m^2 w`` shows the mask of the step, and ``G_ww v = m^2 v`` the
    product's.
    """
    torch.manual_seed(3)
    lower = nn.ParameterList([nn.Parameter(1 + torch.rand(40, dtype=torch.float64))])
    upper = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.float64))])
    drop = nn.Dropout(0.5)
    made = evaluator(lambda: 0.5 * upper[0].sum() * (drop(lower[0]) ** 2).sum(), upper, lower)
    v = normal(40)
    with made.oracle([], []) as oracle:
        gradient = oracle.lower().lower[0]
        _, (found,) = hessian_product(oracle, [v], product=route)
    assert gradient is not None
    assert found is not None
    squares = gradient / lower[0].detach()
    assert set(squares.round().tolist()) == {0.0, 4.0}
    torch.testing.assert_close(found.detach(), squares * v, rtol=1e-12, atol=1e-12)


# --- falling back -----------------------------------------------------------------------------------------------------


def silu() -> Evaluator:
    torch.manual_seed(0)
    return plain(nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 2)), normal(6, 5)).evaluator()


def both(oracle: Oracle, made: Evaluator, direction: Tensors, route: ProductMode) -> Tensor:
    upper, lower = hessian_product(oracle, direction, product=route)
    return torch.cat([flat(upper, made.upper.tensors), flat(lower, made.lower.tensors)])


class WithJvp(torch.autograd.Function):
    """Differentiable once in reverse mode, and forwards."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        result: Tensor = 2 * ctx.saved_tensors[0] * gradients[0]
        return result

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        result: Tensor = 2 * ctx.saved_tensors[0] * tangents[0]
        return result


def with_layer(layer: nn.Module) -> Evaluator:
    torch.manual_seed(0)
    return plain(nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 2)), normal(6, 5)).evaluator()


def product_of(
    kind: Callable[..., Any], oracle: Oracle, made: Evaluator, direction: Tensors, route: ProductMode
) -> Tensor:
    if kind is hessian_product:
        return both(oracle, made, direction, route)
    return flat(mixed_product(oracle, direction, product=route), made.upper.tensors)


def test_forward_without_a_rule_is_an_error_that_shows_the_way() -> None:
    made = silu()
    direction: list[Tensor | None] = [normal(*t.shape) for t in made.lower.tensors]
    with pytest.raises(ClosureError) as caught, made.oracle([], []) as oracle:
        hessian_product(oracle, direction, product="forward")
    text = str(caught.value)
    assert "lower_loss" in text
    assert "silu_backward" in text
    assert 'product="difference"' in text
    assert "first-order" in text


class Bare:
    """A lower variable that no module holds: the closure reads the tensor itself."""

    def __init__(self) -> None:
        self.upper = nn.ParameterList([nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))])
        self.w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)

    def loss(self) -> Tensor:
        value: Tensor = (self.upper[0] * self.w**3).sum()
        return value

    def evaluator(self) -> Evaluator:
        return evaluator(self.loss, self.upper, [("bare_weight", self.w)])


@pytest.mark.parametrize("kind", [hessian_product, mixed_product])
def test_a_bare_parameter_is_served_or_named(kind: Callable[..., Any]) -> None:
    """No substitute reaches it, so forward mode would silently answer 0. It is known beforehand, so there is no
    warning.
    """
    problem = Bare()
    made = problem.evaluator()
    v = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with made.oracle([], []) as oracle:
            assert mode_taken(oracle, "hessian", "auto") == "reverse"
            found = kind(oracle, [v], product="auto")
    # G_aw v = 3 w^2 v, G_ww v = 6 a w v
    upper, lower = found if kind is hessian_product else (found, None)
    assert upper[0].tolist() == [3.0, -12.0, 54.0]
    if lower is not None:
        assert lower[0].tolist() == [3.0, -6.0, 18.0]
    with pytest.raises(ClosureError, match="bare_weight"), problem.evaluator().oracle([], []) as oracle:
        kind(oracle, [v], product="forward")


@pytest.mark.parametrize("route", ["auto", "difference"])
def test_the_mode_taken_is_told(route: ProductMode) -> None:
    """What ``stats.product`` shows: the fallback, once it happened, for the kind of product that it happened to."""
    made = with_layer(Applied(Square))
    direction: list[Tensor | None] = [normal(*t.shape) for t in made.lower.tensors]
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with made.oracle([], []) as oracle:
            for product in (hessian_product, mixed_product):
                told.append([mode_taken(oracle, kind, route) for kind in ("hessian", "mixed")])
                product(oracle, direction, product=route)
            told.append([mode_taken(oracle, kind, route) for kind in ("hessian", "mixed")])
    forwards = [["reverse", "forward"], ["reverse", "forward"], ["reverse", "reverse"]]
    assert told == (forwards if route == "auto" else [["difference", "difference"]] * 3)


@pytest.mark.parametrize("kind", [hessian_product, mixed_product])
@pytest.mark.parametrize("also_by_module", [False, True])
def test_a_captured_parameter_of_a_module_is_named(also_by_module: bool, kind: Callable[..., Any]) -> None:
    """The usual form of it: ``weight = net.weight`` outside the closure. Also where the module is called beside it."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 2).double(), normal(6, 5)
    weight = model.weight
    case = Case(model, lambda: torch.tanh(linear(x, weight) + (model(x) if also_by_module else model.bias)))
    made = case.evaluator()
    direction: list[Tensor | None] = [normal(2, 5), normal(2)]
    with pytest.raises(ClosureError, match="weight") as caught, made.oracle([], []) as oracle:
        kind(oracle, direction, product="forward")
    assert "bias" not in str(caught.value)
    with made.oracle([], []) as oracle:
        expected = flat(hessian_product(oracle, direction, product="difference")[0], made.upper.tensors)
    with warnings.catch_warnings(record=True) as caught, made.oracle([], []) as oracle:
        warnings.simplefilter("always")
        answer = kind(oracle, direction, product="auto")
    assert relative(flat(answer[0] if kind is hessian_product else answer, made.upper.tensors), expected) < 1e-8
    assert [str(warning.message).partition(" other")[0] for warning in caught] == (
        ["lower_loss reads weight"] if kind is mixed_product else []
    )


def test_checkpointing_has_no_forward_mode() -> None:
    """Activation checkpointing counts the saved tensors, of which dual numbers save more: an error of its own kind."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), normal(6, 5)
    made = Case(model, lambda: model[2](checkpoint(model[:2], x, use_reentrant=False))).evaluator()
    direction: list[Tensor | None] = [normal(*t.shape) for t in made.lower.tensors]
    with made.oracle([], []) as oracle:
        expected = both(oracle, made, direction, "reverse")
        assert torch.equal(both(oracle, made, direction, "auto"), expected)
    with pytest.raises(ClosureError, match="checkpoint"), made.oracle([], []) as oracle:
        hessian_product(oracle, direction, product="forward")


def test_mse_loss_falls_back() -> None:
    """A rule exists and fails inside torch ("ZeroTensors are immutable"): regression, also on learned
    targets, is served.
    """
    torch.manual_seed(0)
    model, x = nn.Linear(5, 1).double(), normal(6, 5)
    weights = Weights(6)
    made = evaluator(lambda: mse_loss(torch.tanh(model(x)).flatten(), weights()), weights, model)
    direction: list[Tensor | None] = [normal(*t.shape) for t in made.lower.tensors]
    with made.oracle([], []) as oracle:
        expected = both(oracle, made, direction, "reverse")
        assert relative(both(oracle, made, direction, "difference"), expected) < 1e-8
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with made.oracle([], []) as oracle:
            assert relative(both(oracle, made, direction, "auto"), expected) < 1e-12
    assert len(caught) <= 1  # none once torch is mended
    with made.oracle([], []) as oracle:
        alone = mixed_product(oracle, direction, product="forward")
    assert relative(flat(alone, made.upper.tensors), expected[:6]) < 1e-12


class Square(torch.autograd.Function):
    """A custom function without a forward-mode rule, differentiable twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = 2 * x * gradients[0]
        return result


class SquareOnce(torch.autograd.Function):
    """The same, differentiable once: what most hand-written kernels are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = 2 * x * gradients[0]
        return result


@pytest.mark.parametrize(
    ("kind", "function", "other", "words"),
    [
        (hessian_product, WithJvp, "forward", ("double backward", "once_differentiable", "to forward mode for")),
        (mixed_product, Square, "reverse", ("forward-mode", "jvp", "to double backward for")),
    ],
    ids=["mixed", "upper"],
)
def test_auto_falls_back_once_and_says_why(
    kind: Callable[..., Any], function: Any, other: ProductMode, words: Sequence[str]
) -> None:
    made = with_layer(Applied(function))
    direction: list[Tensor | None] = [normal(*t.shape) for t in made.lower.tensors]
    with made.oracle([], []) as oracle:
        expected = product_of(kind, oracle, made, direction, other)
        assert relative(expected, product_of(kind, oracle, made, direction, "difference")) < 1e-8
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):  # in a step, and in the next ones
                with made.oracle([], []) as oracle:
                    for _ in range(2):
                        assert torch.equal(product_of(kind, oracle, made, direction, "auto"), expected)
        (warning,) = caught
        text = str(warning.message)
        assert text.startswith("lower_loss has no ")
        assert all(word in text for word in words)
        made.forget_checks()  # a new set of variables: both routes are tried again


def test_a_custom_function_without_jvp() -> None:
    torch.manual_seed(0)
    made = plain(nn.Sequential(nn.Linear(5, 2), Applied(Square)), normal(6, 5)).evaluator()
    direction: list[Tensor | None] = [normal(*t.shape) for t in made.lower.tensors]
    with made.oracle([], []) as oracle:
        expected = both(oracle, made, direction, "difference")
        assert relative(both(oracle, made, direction, "auto"), expected) < 1e-8


WITHOUT_EITHER: dict[str, tuple[Callable[[], Case], str]] = {
    "cdist": (lambda: plain(nn.Sequential(nn.Linear(5, 4), Distances()), normal(6, 5)), "cdist"),
    "embedding bag": (lambda: plain(nn.EmbeddingBag(7, 4), torch.arange(12).reshape(6, 2) % 7), "embedding_bag"),
    "hardsigmoid": (lambda: plain(nn.Sequential(nn.Linear(5, 4), nn.Hardsigmoid()), normal(6, 5)), "hardsigmoid"),
    "a function differentiable once": (
        lambda: plain(nn.Sequential(nn.Linear(5, 4), Applied(SquareOnce)), normal(6, 5)),
        "once_differentiable",
    ),
    "weight norm": (
        lambda: plain(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), normal(6, 5)),
        "weight_norm",
    ),
}


class Distances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x.flip(0))


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function.apply(x)
        return result


@pytest.mark.parametrize("name", WITHOUT_EITHER)
@pytest.mark.parametrize("route", ["auto", "reverse"])
def test_without_either_rule_an_error_shows_the_way(route: ProductMode, name: str) -> None:
    """Never a wrong number in silence.

    Torch raises for the first three; it answers 0 for a function that is differentiable once, and the second derivative
    of its fused weight norm is wrong in the first digit (it takes the saved norm for a constant;
    ``torch.autograd.gradgradcheck`` fails on it).
    """
    torch.manual_seed(0)
    make, operation = WITHOUT_EITHER[name]
    made = make().evaluator()
    direction: list[Tensor | None] = [normal(*t.shape) for t in made.lower.tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ClosureError) as caught, made.oracle([], []) as oracle:
            hessian_product(oracle, direction, product=route)
    text = str(caught.value)
    assert "lower_loss" in text
    assert operation in text
    assert 'product="difference"' in text
    # and the way works
    with made.oracle([], []) as oracle:
        assert torch.isfinite(both(oracle, made, direction, "difference")).all()


@pytest.mark.parametrize("error", [RuntimeError("boom"), RuntimeError(), ValueError("boom"), KeyError("boom")])
@pytest.mark.parametrize("route", PRODUCT_MODES)
def test_an_error_of_the_closure_is_the_closures(route: ProductMode, error: Exception) -> None:
    """It is neither taken for a missing rule, nor wrapped, and leaves everything as it was."""
    problem = Polynomial()
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return problem.loss()

    made = evaluator(loss, problem.upper, problem.lower)
    before = [t.detach().clone() for t in problem.lower]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(error)) as caught:
            product(made, [normal(3), normal(1)], [normal(3), normal(1)], route)
    assert caught.value is error
    assert made.verification.choices == {}
    assert all(map(torch.equal, [t.detach() for t in problem.lower], before))
    assert all(t.requires_grad for t in (*problem.lower, *problem.upper))


def test_routes_are_the_documented_ones() -> None:
    assert PRODUCT_MODES == get_args(ProductMode) == ("auto", "forward", "reverse", "difference")


# --- the evaluator's two routes to another point ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_swap_and_substitute_agree(name: str) -> None:
    """The same value and the same gradients at another point, whether the values are exchanged in place or put in by
    torch.func.
    """
    made, _, point = build(name)
    torch.manual_seed(7)
    with made.oracle([], []) as oracle:
        here = oracle.lower()
        swapped = oracle.lower(at=point)
        leaves = [x.clone().requires_grad_() for x in point]
        with oracle.lower_graph(0, substitute=leaves) as (value, _):
            gradients = torch.autograd.grad(value, [*made.upper.tensors, *leaves], allow_unused=True)
        with oracle.lower_graph(0, at=point) as (again, _):
            repeated = torch.autograd.grad(again, [*made.upper.tensors, *made.lower.tensors], allow_unused=True)
    size = len(made.upper.tensors)
    assert (value - here.value).abs() > 1e-6  # another point indeed
    for other, found in ((value, gradients), (again, repeated)):
        assert relative(other.detach(), swapped.value) < 1e-13
        assert relative(flat(found[:size], made.upper.tensors), flat(swapped.upper, made.upper.tensors)) < 1e-12
        assert relative(flat(found[size:], made.lower.tensors), flat(swapped.lower, made.lower.tensors)) < 1e-12


def test_a_substituted_graph_reaches_the_substitutes_themselves() -> None:
    """Not copies of them: the derivative of ``G(w - t g)`` in t is ``-<grad G, g>``, by hand."""
    problem = Polynomial()
    made = evaluator(problem.loss, problem.upper, problem.lower)
    g = [normal(3), normal(1)]
    t = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    with made.oracle([], []) as oracle:
        moved = [w - t * part for w, part in zip(oracle.point(), g, strict=True)]
        with oracle.lower_graph(0, substitute=moved) as (value, _):
            (found,) = torch.autograd.grad(value, [t])
    w, alpha = torch.cat([x.detach() for x in moved]), problem.upper[0].detach()
    gradient = problem.a @ w + problem.b @ alpha + (alpha @ alpha) * w + 0.5 * w**2
    assert found.item() == pytest.approx(-(gradient @ torch.cat(g)).item(), rel=1e-12)


def test_embedding_rows_that_are_not_looked_up_have_no_product() -> None:
    """By hand: tokens 0 and 2 of three rows; row 1 neither feels v nor answers it."""
    table = nn.ParameterList([nn.Parameter(torch.arange(6.0, dtype=torch.float64).reshape(3, 2))])
    upper = nn.ParameterList([nn.Parameter(torch.tensor([2.0, 3.0], dtype=torch.float64))])
    tokens = torch.tensor([0, 2])
    made = evaluator(lambda: (upper[0][:, None] * embedding(tokens, table[0]) ** 2).sum(), upper, table)
    v = torch.ones(3, 2, dtype=torch.float64)
    for route in EXACT:
        by_upper, by_lower = product(made, [v], None, route)
        # G = sum_i a_i |row_i|^2: G_ww v = 2 a_i v, G_aw v = 2 <row_i, v>
        assert by_lower.tolist() == [4.0, 4.0, 0.0, 0.0, 6.0, 6.0]
        assert by_upper.tolist() == [2.0 * (0 + 1), 2.0 * (4 + 5)]
