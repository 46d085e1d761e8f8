"""Losses evaluated at other points than the current one: the ways in which a loss may read a variable, and those in
which it may not.

The oracle is a step written down here: the variables are moved by hand, and put back by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize
from torch.nn.utils import parametrizations, parametrize

import bilevel

INPUTS, WIDTH, CLASSES, SAMPLES = 4, 5, 3, 6
RATE, DELTA = 0.3, 30.0  # a delta so large that q counts everywhere


@dataclass
class Zoo:
    """One way to write two losses: what to pass as the levels, and the losses themselves."""

    upper: Any
    lower: Any
    upper_loss: Callable[[Tensor], Tensor]
    lower_loss: Callable[[Tensor], Tensor]
    other: tuple[nn.Module, ...] = ()
    forward: bool = True  # whether forward mode reaches and serves it


def tensors(variables: Any) -> list[Tensor]:
    items = [variables] if isinstance(variables, (nn.Module, Tensor)) else list(variables)
    found: dict[int, Tensor] = {}
    for item in items:
        part = item[1] if isinstance(item, tuple) else item
        members = part.parameters() if isinstance(part, nn.Module) else [part]
        found.update({id(t): t for t in members if t.requires_grad})
    return list(found.values())


def build(zoo: Zoo, method: type[bilevel.BilevelOptimizer] = bilevel.BOME, **options: Any) -> Any:
    arguments: dict[str, Any] = {"inner_lr": RATE, "eps": 0.0, "cutoff": 0.0, "other": zoo.other, **options}
    return method(
        zoo.upper_loss,
        zoo.lower_loss,
        upper=zoo.upper,
        lower=zoo.lower,
        upper_optimizer=torch.optim.SGD(tensors(zoo.upper), lr=0.1),
        lower_optimizer=torch.optim.SGD(tensors(zoo.lower), lr=0.1),
        **arguments,
    )


def by_hand(zoo: Zoo, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """BOME's directions for one inner step and ``phi = DELTA |grad q|^2``."""
    alpha, w = tensors(zoo.upper), tensors(zoo.lower)

    def gradients(loss: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found = torch.autograd.grad(loss(x), alpha + w, allow_unused=True)
        full = [torch.zeros_like(t) if g is None else g for t, g in zip(alpha + w, found, strict=True)]
        return full[: len(alpha)], full[len(alpha) :]

    g_alpha, g_w = gradients(zoo.lower_loss)
    kept = [t.detach().clone() for t in w]
    with torch.no_grad():
        for t, g in zip(w, g_w, strict=True):
            t -= RATE * g
    ahead, _ = gradients(zoo.lower_loss)
    with torch.no_grad():
        for t, value in zip(w, kept, strict=True):
            t.copy_(value)
    f_alpha, f_w = gradients(zoo.upper_loss)
    q = [a - b for a, b in zip(g_alpha, ahead, strict=True)] + g_w
    squared = sum((y.double() ** 2).sum() for y in q)
    inner = sum((a.double() * b.double()).sum() for a, b in zip(f_alpha + f_w, q, strict=True))
    weight = torch.relu(DELTA * squared - inner) / squared
    d = [a + weight.to(b.dtype) * b for a, b in zip(f_alpha + f_w, q, strict=True)]
    return d[: len(alpha)], d[len(alpha) :]


def net(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, CLASSES))


def losses(
    predict: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``F``: the prediction should be class 0; ``G``: it should be the target, which holds the upper variables."""

    def upper_loss(x: Tensor) -> Tensor:
        return cross_entropy(predict(x), torch.zeros(len(x), dtype=torch.int64))

    def lower_loss(x: Tensor) -> Tensor:
        return cross_entropy(predict(x), target(x).softmax(1))

    return upper_loss, lower_loss


def of(lower: Any, predict: Callable[[Tensor], Tensor], *, forward: bool = True, other: Any = ()) -> Zoo:
    upper = nn.Linear(INPUTS, CLASSES)
    return Zoo(upper, lower, *losses(predict, upper), other=other, forward=forward)


# --- the zoo ------------------------------------------------------------------------------------------------------


def plain_module() -> Zoo:
    model = net()
    return of(model, model)


def tied_weights() -> Zoo:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(INPUTS, INPUTS)
            self.decode = nn.Linear(INPUTS, INPUTS, bias=False)
            self.decode.weight = self.encode.weight
            self.head = nn.Linear(INPUTS, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.decode(self.encode(x).tanh()))
            return logits

    model = Tied()
    return of(model, model)


def bound_method() -> Zoo:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)

        def features(self, x: Tensor) -> Tensor:
            return self.hidden(x).tanh()

    model = Split()
    features = model.features  # bound before the step
    return of(model, lambda x: model.head(features(x)))


def submodules() -> Zoo:
    model = net()
    first, last = model[0], model[2]
    return of(model, lambda x: last(first(x).tanh()))


def attributes() -> Zoo:
    model = net()
    return of(model, lambda x: linear(linear(x, model[0].weight, model[0].bias).tanh(), model[2].weight, model[2].bias))


def hooks() -> Zoo:
    model, seen = net(), []
    model[0].register_forward_hook(lambda module, inputs, out: seen.append(out))
    model[2].register_forward_hook(lambda module, inputs, out: 2 * out)

    def predict(x: Tensor) -> Tensor:
        seen.clear()
        out = model(x)
        return out + seen[-1][:, :CLASSES]

    return of(model, predict)


def parameter_list() -> Zoo:
    weights = nn.ParameterList([torch.randn(INPUTS, WIDTH), torch.randn(WIDTH, CLASSES)])
    return of(weights, lambda x: (x @ weights[0]).tanh() @ weights[1])


def parameter_dict() -> Zoo:
    weights = nn.ParameterDict({"in": torch.randn(INPUTS, WIDTH), "out": torch.randn(WIDTH, CLASSES)})
    return of(weights, lambda x: (x @ weights["in"]).tanh() @ weights["out"])


def bare_tensors() -> Zoo:
    first = torch.randn(INPUTS, WIDTH, requires_grad=True)
    last = torch.randn(WIDTH, CLASSES, requires_grad=True)
    return of([first, last], lambda x: (x @ first).tanh() @ last, forward=False)


def captured_parameters() -> Zoo:
    model = net()
    weights = list(model.parameters())  # the parameters themselves, which is fine
    return of(model, lambda x: linear(linear(x, weights[0], weights[1]).tanh(), weights[2], weights[3]), forward=False)


def parameters_only() -> Zoo:
    model = net()
    return of(list(model.parameters()), model, forward=False)


def parameters_and_their_module() -> Zoo:
    model = net()
    return of(list(model.named_parameters()), model, other=(model,))


def two_modules() -> Zoo:
    body, head = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
    return of([body, head], lambda x: head(body(x).tanh()))


def weight_norm() -> Zoo:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(INPUTS, WIDTH)), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    return of(model, model, forward=False)


def orthogonal() -> Zoo:
    class Skew(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mT) @ x

    layer = nn.Linear(INPUTS, INPUTS)
    parametrize.register_parametrization(layer, "weight", Skew())
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(INPUTS, CLASSES))
    return of(model, model)


def functional_call() -> Zoo:
    model = net()
    return of(model, lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)))


def functional_call_with_other_values() -> Zoo:
    model = net()
    return of(model, lambda x: torch.func.functional_call(model, {n: 2 * p for n, p in model.named_parameters()}, (x,)))


def gradient_penalty() -> Zoo:
    model, upper = net(), nn.Linear(INPUTS, CLASSES)
    upper_loss, lower_loss = losses(model, upper)

    def penalised(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
        return lower_loss(x) + slope.square().sum()

    return Zoo(upper, model, upper_loss, penalised)


def in_place_operations() -> Zoo:
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.LeakyReLU(inplace=True), nn.Linear(WIDTH, CLASSES))
    return of(model, lambda x: model(x).mul_(2))


def checkpointed() -> Zoo:
    model = net()
    return of(model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), forward=False)


def convolution_in_channels_last() -> Zoo:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES)
    ).to(memory_format=torch.channels_last)
    return of(model, lambda x: model(x[:, :, None].expand(-1, -1, 4).reshape(len(x), 2, 2, 4).contiguous()))


def embedding_and_norm() -> Zoo:
    table, norm, head = nn.Embedding(7, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
    ids = torch.tensor([0, 1, 1, 2, 6, 0])
    return of([table, norm, head], lambda x: head(norm(table(ids))) + x[:, :CLASSES])


def attention() -> Zoo:
    layer = nn.TransformerEncoderLayer(INPUTS, 2, dim_feedforward=WIDTH, dropout=0.0, batch_first=True)
    head = nn.Linear(INPUTS, CLASSES)
    return of([layer, head], lambda x: head(layer(x[:, None].expand(-1, 3, -1)).mean(1)))


def scalar_and_empty_variables() -> Zoo:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 3))
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.body(x) * self.scale + self.empty.sum()
            return logits

    model = Odd()
    return of(model, model)


def a_shared_normaliser() -> Zoo:
    # A frozen module that both levels pass through, and an upper module nested in a container with other things.
    frozen = nn.Linear(INPUTS, INPUTS).requires_grad_(False)
    model, upper = net(), nn.ModuleDict({"target": nn.Linear(INPUTS, CLASSES), "frozen": frozen})
    upper_loss, lower_loss = losses(lambda x: model(normalize(frozen(x))), lambda x: upper["target"](frozen(x)))
    return Zoo(upper, model, upper_loss, lower_loss)


ZOO: dict[str, Callable[[], Zoo]] = {
    make.__name__: make
    for make in (
        plain_module, tied_weights, bound_method, submodules, attributes, hooks, parameter_list, parameter_dict,
        bare_tensors, captured_parameters, parameters_only, parameters_and_their_module, two_modules, weight_norm,
        orthogonal, functional_call, functional_call_with_other_values, gradient_penalty, in_place_operations,
        checkpointed, convolution_in_channels_last, embedding_and_norm, attention, scalar_and_empty_variables,
        a_shared_normaliser,
    )
}  # fmt: skip
every_zoo = pytest.mark.parametrize("make", ZOO.values(), ids=ZOO.keys())


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """Modules of the zoo are in float64, and always the same."""
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inputs() -> Tensor:
    return torch.randn(SAMPLES, INPUTS)


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_zoo
def test_directions_are_those_computed_by_hand(make: Callable[[], Zoo]) -> None:
    zoo, x = make(), inputs()
    optimizer = build(zoo, barrier=bilevel.barrier.GradientNorm(DELTA))
    for _ in range(2):  # the checks of the first look are not in the way, nor needed
        upper, lower = by_hand(zoo, x)
        found = optimizer.directions(x, x)
        assert found.stats.multiplier > 0
        close(found.upper.values(), upper)
        close(found.lower.values(), lower)


@every_zoo
def test_substituting_and_swapping_agree(make: Callable[[], Zoo]) -> None:
    # Products of G at the inner point: by the substitute (forward mode), by the swap (two gradients apart).
    zoo, x = make(), inputs()
    options: dict[str, Any] = {"value_gradient": "unrolled", "inner_steps": 2}
    expected = build(zoo, product="difference", **options).directions(x, x)
    forward = build(zoo, product="forward", **options)
    if not zoo.forward:
        with pytest.raises(bilevel.ClosureError, match="lower_loss"):
            forward.directions(x, x)
        return
    found = forward.directions(x, x)
    assert found.stats.product == "forward"
    close(found.upper.values(), expected.upper.values(), 2e-6)
    close(found.lower.values(), expected.lower.values(), 2e-6)


@every_zoo
def test_no_evaluation_leaves_a_trace(make: Callable[[], Zoo]) -> None:
    zoo, x = make(), inputs()
    held = {id(t): (t, t.detach().clone(), t._version) for t in (*tensors(zoo.upper), *tensors(zoo.lower))}
    build(zoo, value_gradient="difference", inner_steps=2).directions(x, x)
    for tensor, value, version in held.values():
        assert torch.equal(tensor, value)
        assert tensor._version == version  # a graph that the user keeps stays valid
        assert tensor.grad is None


def test_a_graph_of_the_users_survives_a_look() -> None:
    zoo, x = plain_module(), inputs()
    value = zoo.lower_loss(x)
    expected = torch.autograd.grad(value, tensors(zoo.lower), retain_graph=True)
    build(zoo).directions(x, x)
    close(torch.autograd.grad(value, tensors(zoo.lower)), expected, 0.0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module(backend: str) -> None:
    torch._dynamo.reset()
    model, x = net(), inputs()
    compiled = torch.compile(model, backend=backend)
    zoo = of(model, compiled)
    optimizer = build(zoo, barrier=bilevel.barrier.GradientNorm(DELTA))
    for _ in range(2):
        upper, lower = by_hand(zoo, x)
        found = optimizer.directions(x, x)
        close(found.upper.values(), upper)
        close(found.lower.values(), lower)
    by_wrapper = build(of(compiled, compiled)).directions(x, x)
    assert len(by_wrapper.lower) == 4


# Dynamo looks at .grad of whatever a graph break carries over, and torch warns about that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_loss_that_holds() -> None:
    torch._dynamo.reset()
    model, upper, x = net(), nn.Linear(CLASSES, CLASSES), inputs()

    def lower_loss(x: Tensor) -> Tensor:
        logits = model(x)
        return cross_entropy(logits, upper(bilevel.hold(logits)).softmax(1))

    zoo = Zoo(upper, model, lambda x: model(x).square().mean(), lower_loss)
    expected = build(zoo).directions(x, x)
    zoo.lower_loss = torch.compile(lower_loss, backend="eager")
    found = build(zoo).directions(x, x)
    close(found.upper.values(), expected.upper.values())
    close(found.lower.values(), expected.lower.values())


def test_mixed_products_need_no_forward_rule() -> None:
    model, upper, x = net(), nn.Linear(INPUTS, CLASSES), inputs()
    zoo = Zoo(
        upper, model, lambda x: model(x).square().mean(), lambda x: nn.functional.mse_loss(model(x), upper(x).tanh())
    )
    found = build(zoo, value_gradient="unrolled").directions(x, x)
    assert found.stats.product == "reverse"
    expected = build(zoo, value_gradient="unrolled", product="difference").directions(x, x)
    close(found.upper.values(), expected.upper.values(), 2e-6)
    with pytest.raises(bilevel.ClosureError, match=r"no forward-mode product.*product="):
        build(zoo, value_gradient="unrolled", product="forward").directions(x, x)


def test_captured_parameters_take_double_backward_without_a_word() -> None:
    zoo, x = captured_parameters(), inputs()
    optimizer = build(zoo, value_gradient="unrolled")
    found = optimizer.directions(x, x)
    with pytest.raises(bilevel.ClosureError, match=r"reads 0\.weight, 0\.bias, 2\.weight, 2\.bias other than from a"):
        build(zoo, value_gradient="unrolled", product="forward").directions(x, x)
    expected = build(zoo, value_gradient="unrolled", product="difference").directions(x, x)
    close(found.upper.values(), expected.upper.values(), 2e-6)


@pytest.mark.parametrize("make", [bare_tensors, parameters_only])
def test_bare_tensors_take_double_backward_without_a_word(make: Callable[[], Zoo]) -> None:
    zoo, x = make(), inputs()
    found = build(zoo, value_gradient="unrolled").directions(x, x)
    assert found.stats.product == "reverse"
    expected = build(zoo, value_gradient="unrolled", product="difference").directions(x, x)
    close(found.upper.values(), expected.upper.values(), 2e-6)


# --- dtypes -------------------------------------------------------------------------------------------------------


def test_several_dtypes_in_one_level() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(INPUTS, WIDTH).to(torch.float64)
            self.last = nn.Linear(WIDTH, CLASSES).to(torch.float32)
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(self.first(x).tanh().float()) * self.scale.float()
            return logits

    model, upper, x = Mixed(), nn.Linear(INPUTS, CLASSES).to(torch.float64), inputs()
    zoo = Zoo(upper, model, *losses(model, lambda x: upper(x).float()))
    optimizer = build(zoo, barrier=bilevel.barrier.GradientNorm(DELTA))
    found = optimizer.directions(x, x)
    assert [d.dtype for d in found.lower.values()] == [t.dtype for t in model.parameters()]
    expected_upper, expected_lower = by_hand(zoo, x)
    for a, b in zip((*found.upper.values(), *found.lower.values()), (*expected_upper, *expected_lower), strict=True):
        tolerance = 1e-2 if a.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    optimizer.step(x, x)
    assert [t.dtype for t in model.parameters()] == [torch.bfloat16, *[torch.float64] * 2, *[torch.float32] * 2]


@contextmanager
def cast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


def narrow_zoo(inside: bool) -> tuple[Zoo, Tensor]:
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float32)
    model, upper, x = net(16), nn.Linear(INPUTS, CLASSES), inputs()
    upper_loss, lower_loss = losses(model, upper)

    def inner(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def wrapped(x: Tensor) -> Tensor:
            with cast():
                return loss(x).float()

        return wrapped if inside else loss

    return Zoo(upper, model, inner(upper_loss), inner(lower_loss)), x


@pytest.mark.parametrize(
    "options",
    [{}, {"inner_steps": 3}, {"value_gradient": "difference"}, {"value_gradient": "unrolled", "product": "reverse"}],
    ids=["plain", "3", "difference", "unrolled"],
)
def test_autocast_around_a_step_gives_what_autocast_inside_the_losses_gives(options: dict[str, Any]) -> None:
    inside, x = narrow_zoo(inside=True)
    expected = build(inside, **options).directions(x, x)
    outside, x = narrow_zoo(inside=False)
    optimizer = build(outside, **options)
    with cast():
        outside.lower_loss(x)  # fills the cache of casts, as an evaluation before the step would
        found = optimizer.directions(x, x)
    for a, b in zip(
        (*found.upper.values(), *found.lower.values()),
        (*expected.upper.values(), *expected.lower.values()),
        strict=True,
    ):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert torch.equal(found.stats.constraint, expected.stats.constraint)
    assert found.stats.constraint != 0  # a stale cache of casts would make the look-ahead equal the current point


def test_after_a_step_the_autocast_cache_holds_no_look_ahead_values() -> None:
    zoo, x = narrow_zoo(inside=False)
    plain, values = zoo.lower_loss, []

    def fail_ahead(x: Tensor) -> Tensor:
        values.append(plain(x))
        if len(values) == 2:
            raise KeyError("in the look-ahead evaluation, so that none at the current point follows")
        return values[-1]

    zoo.lower_loss = fail_ahead
    optimizer = build(zoo, value_gradient="difference")
    with cast():
        before = plain(x).detach()
        with pytest.raises(KeyError):
            optimizer.directions(x, x)
        assert torch.equal(plain(x).detach(), before)


def test_the_arithmetic_of_directions_is_not_autocast() -> None:
    # Squares of about 1e-8 in bfloat16 would lose all but two digits.
    zoo, x = narrow_zoo(inside=True)
    expected = build(zoo).directions(x, x)
    with cast():
        found = build(zoo).directions(x, x)
    assert found.stats.multiplier == expected.stats.multiplier
    assert found.stats.gradient_norm == expected.stats.gradient_norm


# --- what a substitution would not reach --------------------------------------------------------------------------


def test_a_captured_value_of_a_lower_variable_is_refused() -> None:
    model, upper, x = net(), nn.Linear(INPUTS, CLASSES), inputs()
    weight = 2 * model[0].weight  # computed once, outside
    upper_loss, lower_loss = losses(lambda x: model[2](linear(x, weight, model[0].bias).tanh()), upper)
    with pytest.raises(bilevel.ClosureError, match=r"lower_loss reads lower variable 0\.weight through a tensor that"):
        build(Zoo(upper, model, upper_loss, lower_loss)).directions(x, x)
    with pytest.raises(bilevel.ClosureError, match=r"upper_loss reads lower variable 0\.weight through"):
        build(Zoo(upper, model, upper_loss, losses(model, upper)[1])).directions(x, x)


def test_a_captured_value_of_an_upper_variable_is_refused() -> None:
    model, upper, x = net(), nn.Linear(INPUTS, CLASSES), inputs()
    rate = upper.weight.exp()
    upper_loss, _ = losses(model, upper)
    zoo = Zoo(upper, model, upper_loss, lambda x: cross_entropy(model(x), linear(x, rate, upper.bias).softmax(1)))
    with pytest.raises(bilevel.ClosureError, match="lower_loss reads upper variable weight through"):
        build(zoo).directions(x, x)


def test_features_computed_outside_and_passed_as_a_batch_are_refused() -> None:
    model, upper, x = net(), nn.Linear(INPUTS, CLASSES), inputs()
    zoo = Zoo(
        upper,
        model,
        lambda x: model(x).square().mean(),
        lambda batch: cross_entropy(model[2](batch[0]), upper(batch[1]).softmax(1)),
    )
    hidden = model[0](x).tanh()
    with pytest.raises(
        bilevel.ClosureError, match=r"lower_loss reads lower variable 0\.\w+, lower variable 0\.\w+ thr"
    ):
        build(zoo).directions(x, (hidden, x))
    build(zoo).directions(x, (hidden.detach(), x))  # a constant is a constant


def test_a_value_that_a_loss_keeps_from_its_first_call_is_refused() -> None:
    model, upper, x = net(), nn.Linear(INPUTS, CLASSES), inputs()
    kept: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        if not kept:
            kept.append(model[0].weight + model[0].weight)  # keeps nothing that backward would free
        return model[2](linear(x, kept[0], model[0].bias).tanh())

    upper_loss, _ = losses(model, upper)
    zoo = Zoo(upper, model, upper_loss, losses(predict, upper)[1])
    with pytest.raises(bilevel.ClosureError, match=r"lower_loss reads lower variable 0\.weight through"):
        build(zoo).directions(x, x)


def test_a_value_that_the_upper_loss_keeps_from_its_first_step_is_refused() -> None:
    model, upper, x = net(), nn.Linear(INPUTS, CLASSES), inputs()
    kept: list[Tensor] = []

    def upper_loss(x: Tensor) -> Tensor:
        if not kept:
            kept.append(model[2].weight + model[2].weight)
        return linear(model[1](model[0](x)), kept[0]).square().mean()

    optimizer = build(Zoo(upper, model, upper_loss, losses(model, upper)[1]))
    with pytest.raises(bilevel.ClosureError, match=r"upper_loss reads lower variable 2\.weight through"):
        optimizer.step(x, x)  # whose look calls it a second time
    kept.clear()
    unverified = build(Zoo(upper, model, upper_loss, losses(model, upper)[1]), verify="never")
    unverified.step(x, x)
    with pytest.raises(bilevel.ClosureError, match=r"upper_loss reads lower variable 2\.weight through"):
        unverified.step(x, x)


def test_a_cached_parametrization_is_refused() -> None:
    zoo, x = orthogonal(), inputs()
    optimizer = build(zoo)
    with parametrize.cached(), pytest.raises(bilevel.ClosureError, match=r"parametrizations\.weight\.original through"):
        optimizer.directions(x, x)
    found = optimizer.directions(x, x)
    upper, _ = by_hand(zoo, x)
    assert len(found.upper) == len(upper)


def test_a_variable_that_joins_later_is_checked_too() -> None:
    model, upper, x = net(), nn.Linear(INPUTS, CLASSES), inputs()
    model[0].weight.requires_grad_(False)
    doubled: list[Tensor] = []
    upper_loss, lower_loss = losses(
        lambda x: model[2](linear(x, doubled[0] if doubled else model[0].weight, model[0].bias).tanh()), upper
    )
    zoo = Zoo(upper, model, upper_loss, lower_loss)
    optimizer = build(zoo)
    for _ in range(3):
        optimizer.step(x, x)
    model[0].weight.requires_grad_(True)
    optimizer.lower_optimizer.add_param_group({"params": [model[0].weight]})
    doubled.append(2 * model[0].weight)
    with pytest.raises(bilevel.ClosureError, match=r"lower variable 0\.weight through"):
        optimizer.step(x, x)


def test_frozen_features_computed_outside_are_fine() -> None:
    backbone = nn.Linear(INPUTS, INPUTS)  # of neither level, but with a graph
    model, upper, x = net(), nn.Linear(INPUTS, CLASSES), inputs()
    zoo = Zoo(upper, model, *losses(model, upper))
    found = build(zoo).directions(backbone(x), backbone(x))
    assert len(found.lower) == 4
    assert backbone.weight.grad is None
