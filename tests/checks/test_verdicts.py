"""The verdicts of ``check_directions``: right directions never fail, wrong ones never pass, also where losses have
kinks, hold back derivatives from autograd, or compute in less than float64.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool1d
from torch.nn.utils import parametrizations

import bilevel
from bilevel import methods
from bilevel.checks.constants import constants_held, constants_of_a_loss, recording
from bilevel.checks.differences import differentiated
from bilevel.checks.report import Report
from methods_table import CASES, Case, Problem, Record, every_case

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bome": (bilevel.BOME, {}),
    "bome, unrolled": (bilevel.BOME, {"value_gradient": "unrolled", "inner_steps": 2}),
    "ebomlc, inner": (bilevel.EBOMLC, {"value_gradient": "difference", "step_from": "lookahead"}),
    "unrolled": (bilevel.Unrolled, {}),
    "unrolled, 3": (bilevel.Unrolled, {"inner_steps": 3}),
    "unrolled, real": (bilevel.Unrolled, {"inner_steps": 2, "virtual": False}),
    "unrolled, truncated": (bilevel.Unrolled, {"inner_steps": 2, "truncate": 1, "differentiate": "adjoint"}),
    "emlc": (bilevel.EMLC, {"inner_steps": 2}),
    "mlc": (bilevel.MLC, {}),
    "implicit": (bilevel.Implicit, {"solver": bilevel.Neumann(2)}),
    "finite difference": (bilevel.FiniteDifference, {}),
    "sama": (bilevel.SAMA, {}),
}
every_method = pytest.mark.parametrize("name", METHODS)


def verdict(report: Report, name: str) -> bool | None:
    (line,) = [line for line in report.comparisons if line.name == name]
    return line.passed


def notes(report: Report) -> str:
    return " ".join(str(report).split())


# --- a derivative and its differences -----------------------------------------------------------------------------


def scalar(function: Callable[[Tensor], Tensor]) -> Callable[[float], Tensor]:
    return lambda size: function(torch.tensor(size, dtype=torch.float64))


@pytest.mark.parametrize("distance", [3e-3, 5e-5, 5e-6, 4e-7, 6e-8])
def test_a_kink_inside_the_first_steps_is_left_behind(distance: float) -> None:
    """``relu(x - d) + sin(x)`` has the derivative 1 at 0, and a kink at d."""
    h = scalar(lambda x: torch.relu(x - distance) + torch.sin(x))
    assert differentiated(h, 1.0, 1e-6).agrees is True
    assert differentiated(h, 1.01, 1e-6).agrees is False
    assert differentiated(h, -1.0, 1e-6).agrees is False


@pytest.mark.parametrize("curvature", [0.0, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("factor", [1.0, 1 + 1e-4, 1.01, -1.0, 0.0])
def test_a_smooth_function_always_gets_a_verdict(curvature: float, factor: float) -> None:
    """``sin(x) + c x^2 / 2`` has the derivative 1 at 0, whatever c is."""
    h = scalar(lambda x: torch.sin(x) + curvature * x**2 / 2)
    assert differentiated(h, factor, 1e-6).agrees is (factor == 1.0)


def test_a_kink_at_the_point_itself_gets_no_verdict() -> None:
    found = differentiated(scalar(lambda x: torch.relu(x) + 2 * x), 2.0, 1e-6)
    assert found.agrees is None
    assert (found.backward, found.forward) == (pytest.approx(2.0), pytest.approx(3.0))
    assert differentiated(scalar(lambda x: (x > 0) + x), 1.0, 1e-6).jumps


def test_a_function_that_does_not_repeat_gets_no_verdict() -> None:
    draw = random.Random(0)
    found = differentiated(scalar(lambda x: 1 + x + 1e-6 * draw.random()), 1.0, 1e-6)
    assert found.agrees is None
    assert 1e-9 < found.noise < 1e-5
    # Rounding of the size of a value's is no such noise.
    assert differentiated(scalar(lambda x: 1 + x + 1e-15 * draw.random()), 1.0, 1e-6).agrees is True


def test_a_zero_derivative_is_told_from_a_small_one() -> None:
    h = scalar(lambda x: 5 + 0 * x)
    assert differentiated(h, 0.0, 1e-6).agrees is True
    assert differentiated(h, 1e-6, 1e-6).agrees is False
    assert differentiated(scalar(lambda x: 5 + 1e-6 * x), 0.0, 1e-6).agrees is False


# --- what autograd takes for a constant ---------------------------------------------------------------------------


def no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.sin() + 1


def by_item(x: Tensor) -> Tensor:
    return torch.full((), x.sin().item(), dtype=torch.float64)


class Twice(torch.autograd.Function):
    """``2 x``: what a custom function computes in its forward is no constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.parametrize("cut", [Tensor.detach, no_grad, by_item, lambda x: x.data, lambda x: x.detach().mul_(1.0)])
def test_a_held_constant_makes_differences_those_of_autograd(cut: Callable[[Tensor], Tensor]) -> None:
    def value(size: float) -> Tensor:
        with constants_of_a_loss():
            x = torch.tensor(0.7 + size, dtype=torch.float64, requires_grad=True)
            loss = cut(x) * Twice.apply(x)  # type: ignore[no-untyped-call]
        return loss.detach()  # type: ignore[no-any-return]

    x = torch.tensor(0.7, dtype=torch.float64)
    slope = 2 * float(cut(x))
    assert differentiated(value, slope, 1e-6).agrees is False
    with recording() as constants:
        value(0.0)

    def held(size: float) -> Tensor:
        with constants_held(constants):
            return value(size)

    assert differentiated(held, slope, 1e-6).agrees is True


def test_constants_are_refused_to_another_sequence_of_operations() -> None:
    def loss(twice: bool) -> None:
        with constants_of_a_loss():
            x = torch.ones(2, requires_grad=True)
            y = x.detach()
            if twice:
                y.sum()

    with recording() as constants:
        loss(False)
    with constants_held(constants), pytest.raises(LookupError, match="other constants"):
        loss(True)


# --- networks with kinks ------------------------------------------------------------------------------------------


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-0.3, 0.5),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "max pooling": lambda x: max_pool1d(x[:, None], 3, 1, 1)[:, 0],
}


def kinked(seed: int, kink: str, name: str, *, at_zero: bool = False, near: float = 0.0) -> tuple[Any, list[Any]]:
    """A method on a network of kinks; its biases and some inputs ``at_zero``, or one unit ``near`` its kink."""
    method, options = METHODS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Linear(4, 12)
        net = nn.Sequential(first, Of(KINKS[kink]), nn.Linear(12, 12), Of(KINKS[kink]), nn.Linear(12, 3))
        corrector = nn.Sequential(nn.Linear(7, 8), Of(KINKS[kink]), nn.Linear(8, 3))
        batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
    with torch.no_grad():
        if at_zero:
            for p in (p for module in (net, corrector) for p in module.parameters() if p.dim() == 1):
                p.zero_()
            for x, _ in batches:
                x[::3] = 0
        if near:  # the first unit, on the first input of each batch
            first.bias[0] += near - float(first(batches[0][0])[0, 0])
            first.bias[1] += near - float(first(batches[1][0])[0, 1])

    def lower_loss(batch: Any) -> Tensor:
        x, y = batch
        labels = torch.eye(3, dtype=x.dtype)[y]
        return cross_entropy(net(x), corrector(torch.cat([x, labels], 1)).softmax(1))

    optimizer = method(
        lambda batch: cross_entropy(net(batch[0]), batch[1]),
        lower_loss,
        upper=corrector,
        lower=net,
        upper_optimizer=torch.optim.Adam(corrector.parameters()),
        lower_optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        **options,
    )
    return optimizer, batches


@pytest.mark.thorough
@pytest.mark.parametrize("block", range(6))
def test_networks_with_kinks_get_their_verdict(block: int) -> None:
    """Sixty networks: none is called wrong, and every line has a verdict."""
    for seed in range(10 * block, 10 * block + 10):
        kink, name = list(KINKS)[seed % len(KINKS)], list(METHODS)[seed % len(METHODS)]
        optimizer, batches = kinked(seed, kink, name)
        report = bilevel.check_directions(optimizer, *batches, samples=1)
        assert report.verdict == "all passed", f"{seed} {kink} {name}\n{report}"


@pytest.mark.thorough
@every_method
@pytest.mark.parametrize("near", [5e-6, -5e-6, 3e-5])
def test_a_unit_that_is_near_its_kink_fails_nothing(name: str, near: float) -> None:
    for seed in range(3):
        optimizer, batches = kinked(seed, "relu", name, near=near)
        report = bilevel.check_directions(optimizer, *batches)
        assert report.passed, f"{seed}\n{report}"
        assert verdict(report, "upper direction") is True


@pytest.mark.thorough
@every_method
def test_units_at_their_kink_fail_nothing(name: str) -> None:
    for seed, kink in enumerate(KINKS):
        optimizer, batches = kinked(seed, kink, name, at_zero=True)
        report = bilevel.check_directions(optimizer, *batches, samples=1)
        assert report.passed, f"{kink}\n{report}"
        assert verdict(report, "upper direction") is True


def test_a_kink_at_the_point_is_told() -> None:
    optimizer, batches = kinked(1, "relu", "bome", at_zero=True)
    report = bilevel.check_directions(optimizer, *batches)
    assert verdict(report, "<grad_w F, u>") is None
    assert "kink near this point, no verdict: " in notes(report)


class Off(torch.autograd.Function):
    """The identity, with a backward that is one part in a hundred too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 1.01 * gradient


@pytest.mark.parametrize("at_zero", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kink", KINKS)
def test_a_wrong_backward_fails_also_next_to_kinks(kink: str, at_zero: bool) -> None:
    """No verdict at a kink is no way out: beside it, the same backward is still wrong."""
    for seed in range(4):
        optimizer, batches = kinked(seed, kink, "bome", at_zero=at_zero, near=0.0 if at_zero else 5e-6)
        optimizer._lower.modules[0][1].function = lambda x, f=KINKS[kink]: Off.apply(f(x))
        report = bilevel.check_directions(optimizer, *batches)
        assert verdict(report, "<grad_w F, u>") is False, f"{seed}\n{report}"
        assert "autograd's derivative of the loss is not its derivative" in notes(report)


# --- faults in the methods ----------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a percent more": lambda x: 1.01 * x,
    "the wrong sign": lambda x: -x,
    "a millionth more": lambda x: (1 + 5e-6) * x,
    "nothing": torch.zeros_like,
}


def spoil(optimizer: Any, fault: Callable[[Tensor], Tensor]) -> None:
    """Let the method answer with a wrong upper direction."""
    if isinstance(optimizer, bilevel.MLC):
        estimate = optimizer._estimate

        def wrong_estimate(oracle: Any) -> Any:
            answer, found = estimate(oracle)
            return answer, found.like(fault(d) for d in found)

        optimizer._estimate = wrong_estimate  # type: ignore[method-assign]
        return
    original = optimizer.compute

    def wrong_answer(oracle: Any) -> Any:
        answer = original(oracle)
        if oracle.plain:  # the reference of methods that are checked against themselves by plain autograd
            return answer
        return replace(answer, upper={name: fault(d) for name, d in answer.upper.items()})

    optimizer.compute = wrong_answer


@pytest.mark.thorough
@pytest.mark.parametrize("at_zero", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_direction_fails_on_networks_with_kinks(fault: str, at_zero: bool) -> None:
    for seed in range(12):
        kink, name = list(KINKS)[seed % len(KINKS)], list(METHODS)[seed % len(METHODS)]
        if METHODS[name][0] in (
            bilevel.BOME,
            bilevel.EBOMLC,
        ):  # F does not contain alpha there: with an inactive barrier the upper direction is 0
            continue
        optimizer, batches = kinked(seed, kink, name, at_zero=at_zero, near=0.0 if at_zero else 5e-6)
        spoil(optimizer, FAULTS[fault])
        report = bilevel.check_directions(optimizer, *batches, samples=1)
        assert not report.passed, f"{seed} {kink} {name}\n{report}"
        assert verdict(report, "upper direction") is False


@every_case
@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=() if fault == "a percent more" else pytest.mark.thorough) for fault in FAULTS]
)
def test_a_wrong_direction_fails(case: Case, fault: str) -> None:
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    batches = problem.batches(case.inner_steps)
    assert bilevel.check_directions(optimizer, *batches, samples=1).passed
    spoil(optimizer, FAULTS[fault])
    loose = 1e-4 if case.options.get("product") == "difference" else 0.0
    report = bilevel.check_directions(optimizer, *batches, samples=1)
    assert verdict(report, "upper direction") is (fault == "a millionth more" and loose > 0)


def scaled(vector: Any) -> Any:
    return 1.01 * vector


# Which product of each method is made a percent too large; a method may take it by one of several functions.
PRODUCTS: dict[Any, tuple[str, str]] = {
    bilevel.BOME: ("dynamic_barrier", "adjoint"),
    bilevel.EBOMLC: ("dynamic_barrier", "adjoint"),
    bilevel.Unrolled: ("unrolled", "unrolled_by_adjoint"),
    bilevel.EMLC: ("emlc", "mixed_product"),
    bilevel.MLC: ("mlc", "mixed_product"),
    bilevel.Implicit: ("implicit.HessianProducts", "mixed"),
    bilevel.FiniteDifference: ("finite_difference", "mixed_product"),
    bilevel.SAMA: ("sama", "mixed_product"),
}
WITH_PRODUCTS = {
    name: case
    for name, case in CASES.items()
    if case.method in PRODUCTS
    and (case.method not in (bilevel.BOME, bilevel.EBOMLC) or case.options.get("value_gradient") == "unrolled")
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_a_wrong_product_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = WITH_PRODUCTS[name]
    module, function = PRODUCTS[case.method]
    target = attrgetter(module)(methods)
    if (way := case.options.get("differentiate")) in ("graph", "forward"):
        function = f"unrolled_by_{way}"
    original = getattr(target, function)

    def damaged(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        if module == "unrolled":
            return replace(found, through=scaled(found.through))
        return tuple(map(scaled, found)) if function == "adjoint" else scaled(found)

    problem = Problem().lived_in()
    optimizer, batches = problem.optimizer(case), problem.batches(case.inner_steps)
    monkeypatch.setattr(target, function, damaged)
    report = bilevel.check_directions(optimizer, *batches, samples=1)
    barrier = case.method in (bilevel.BOME, bilevel.EBOMLC)
    assert verdict(report, "<grad q, u> (both levels)" if barrier else "upper direction") is False


def test_a_wrong_hessian_product_fails_by_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    products = methods.implicit.HessianProducts
    original = products.__call__
    monkeypatch.setattr(products, "__call__", lambda self, v: scaled(original(self, v)))
    problem = Problem()
    solver = bilevel.ConjugateGradient(3, damping=1.0)
    optimizer = problem.optimizer(CASES["implicit"], solver=solver, product="reverse")
    report = bilevel.check_directions(optimizer, *problem.batches())
    assert verdict(report, "residual") is False


def test_a_wrong_discount_and_a_missing_slope_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    optimizer = problem.optimizer(CASES["emlc-2"])
    original = optimizer._weighted
    monkeypatch.setattr(optimizer, "_weighted", lambda g, rates, age: original(g, rates, 0))
    assert verdict(bilevel.check_directions(optimizer, *problem.batches(2)), "upper direction") is False
    adam = torch.optim.Adam(problem.classifier.parameters(), lr=1e-2)
    optimizer = problem.optimizer(CASES["sama"], lower_optimizer=adam)
    assert bilevel.check_directions(optimizer, *problem.batches(2)).passed
    monkeypatch.setattr(optimizer, "_adapted", lambda last, upper: upper)
    assert verdict(bilevel.check_directions(optimizer, *problem.batches(2)), "upper direction") is False


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::UserWarning")  # bfloat16 is too coarse for differences
@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_in_the_middle_of_training_it_passes_and_leaves_no_trace(case: Case, dtype: torch.dtype) -> None:
    problem = Problem(dtype).lived_in()
    optimizer = problem.optimizer(case, on_nonfinite="ignore")
    batches = problem.batches(case.inner_steps)
    optimizer.step(*batches)
    before = Record(problem)
    report = bilevel.check_directions(optimizer, *batches, samples=1)
    assert report.passed, report
    assert before.differences(Record(problem)) == []


# --- losses that hold something back from autograd ----------------------------------------------------------------


class Weights(nn.Module):
    """MW-Net: a weight for each loss."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(1, 6), nn.Linear(6, 1)

    def forward(self, losses: Tensor) -> Tensor:
        weights: Tensor = self.out(torch.tanh(self.hidden(losses[:, None])))[:, 0].sigmoid()
        return weights


class Weighted:
    """A network trained on weighted losses; ``seen`` is what the weight network sees of them."""

    def __init__(self, seen: str = "held", net: nn.Module | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)) if net is None else net
            self.net.double()
            self.weights = Weights().double()
            self.batches = [(torch.randn(16, 4).double(), torch.randint(3, (16,))) for _ in range(2)]
        self.seen = seen

    def upper_loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def lower_loss(self, batch: Any) -> Tensor:
        x, y = batch
        losses = cross_entropy(self.net(x), y, reduction="none")
        if self.seen == "no_grad":
            with torch.no_grad():
                seen = cross_entropy(self.net(x), y, reduction="none")
        else:
            seen = losses.detach()
        if self.seen == "held":
            seen = bilevel.hold(seen)
        loss = (self.weights(seen) * losses).mean()
        if self.seen == "requires_grad":
            loss = loss + 0.1 * self.weights.out.bias.exp().sum() * sum(
                p.square().sum() for p in self.net.parameters() if p.requires_grad
            )
        return loss

    def optimizer(self, method: Any, **options: Any) -> Any:
        return method(
            self.upper_loss,
            self.lower_loss,
            upper=self.weights,
            lower=self.net,
            upper_optimizer=torch.optim.SGD(self.weights.parameters(), lr=0.1),
            lower_optimizer=torch.optim.SGD(self.net.parameters(), lr=0.1),
            **options,
        )

    def one_step_hypergradient(self) -> Tensor:
        """``-lr G_aw(w) grad_w F(w - lr grad_w G(w))`` by plain autograd, written down here."""
        w, alpha = list(self.net.parameters()), list(self.weights.parameters())
        gradient = torch.autograd.grad(self.lower_loss(self.batches[1]), w)
        moved = [0.1 * g for g in gradient]
        for p, step in zip(w, moved, strict=True):
            p.data.sub_(step)
        outer = torch.autograd.grad(self.upper_loss(self.batches[0]), w)
        for p, step in zip(w, moved, strict=True):
            p.data.add_(step)
        gradient = torch.autograd.grad(self.lower_loss(self.batches[1]), w, create_graph=True)
        found = torch.autograd.grad(gradient, alpha, grad_outputs=[-0.1 * x for x in outer], allow_unused=True)
        zeros = (torch.zeros_like(p) if g is None else g for g, p in zip(found, alpha, strict=True))
        return torch.cat([x.reshape(-1) for x in zeros])


ONE_STEP: dict[str, tuple[Any, dict[str, Any]]] = {
    "unrolled": (bilevel.Unrolled, {}),
    "unrolled, reverse": (bilevel.Unrolled, {"product": "reverse"}),
    "unrolled, difference": (bilevel.Unrolled, {"product": "difference"}),
    "emlc": (bilevel.EMLC, {}),
    "mlc": (bilevel.MLC, {}),
    "mlc, difference": (bilevel.MLC, {"product": "difference"}),
    "finite difference": (bilevel.FiniteDifference, {"radius": 1e-3}),
}


@pytest.mark.parametrize("seen", ["held", "detached", "no_grad", "requires_grad"])
@pytest.mark.parametrize("name", ONE_STEP)
def test_the_verdict_is_the_truth(name: str, seen: str) -> None:
    """Whatever a route makes of a closure: what is not plain autograd's fails, and what is passes."""
    method, options = ONE_STEP[name]
    problem = Weighted(seen)
    truth = problem.one_step_hypergradient()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the library itself finds out about the closure
        try:
            found = problem.optimizer(method, **options).directions(*problem.batches).upper
            report = bilevel.check_directions(problem.optimizer(method, **options), *problem.batches)
        except bilevel.ClosureError:  # refused is not passed either
            assert seen != "held"
            return
    answer = torch.cat([found.get(n, torch.zeros_like(p)).reshape(-1) for n, p in problem.weights.named_parameters()])
    right = float((answer - truth).norm()) < 1e-3 * float(truth.norm())
    assert report.passed is right, report
    assert verdict(report, "upper direction") is right or name == "finite difference"
    if seen in ("held", "detached") and "difference" not in name:
        assert right


@pytest.mark.parametrize("seen", ["detached", "held"])
def test_a_detached_part_of_a_loss_is_told_and_a_held_one_needs_no_word(seen: str) -> None:
    problem = Weighted(seen)
    report = bilevel.check_directions(problem.optimizer(bilevel.BOME), *problem.batches)
    assert report.passed, report
    assert verdict(report, "<grad_w G, u>") is (True if seen == "held" else None)
    assert verdict(report, "<grad_alpha G, u>") is True
    assert ("bilevel.hold(tensor) holds it" in notes(report)) is (seen == "detached")


@pytest.mark.parametrize("method", [bilevel.FiniteDifference, bilevel.SAMA])
def test_differences_of_a_detached_part_fail_and_say_hold(method: Any) -> None:
    problem = Weighted("detached")
    report = bilevel.check_directions(problem.optimizer(method, verify="never"), *problem.batches)
    assert not report.passed
    assert verdict(report, "upper direction") is True  # the difference that it means to take, of what should be held
    assert verdict(report, "its difference, small radius") is False
    assert "write bilevel.hold(tensor)" in notes(report)
    with pytest.warns(UserWarning, match="Falling back to double backward"):  # as a verified step does
        report = bilevel.check_directions(problem.optimizer(method), *problem.batches)
    assert report.passed, report
    assert verdict(report, "upper direction") is True
    problem = Weighted("held")
    assert bilevel.check_directions(problem.optimizer(method), *problem.batches).verdict == "all passed"


@pytest.mark.thorough
@every_method
@pytest.mark.parametrize("old", [False, True], ids=["parametrization", "old style"])
def test_spectral_norm_fails_nothing_without_a_reason(name: str, old: bool) -> None:
    norm: Any = nn.utils.spectral_norm if old else parametrizations.spectral_norm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), norm(nn.Linear(6, 3)))
        for _ in range(20):  # the singular vectors settle
            net(torch.ones(1, 4))
    problem = Weighted("held", net)
    before = {key: vars(net[0]).get(key) for key in ("weight",)}
    method, options = METHODS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no forward mode through a norm; the old style is deprecated
        report = bilevel.check_directions(problem.optimizer(method, **options), *problem.batches)
    assert report.passed, report
    assert verdict(report, "upper direction") is True
    assert all(line.note for line in report.comparisons if line.passed is None and not line.measured)
    assert vars(net[0]).get("weight") is before["weight"]


class Cast(Weighted):
    """Autocast, casts, and float32 constants inside the loss, as mixed-precision training has them."""

    constant = torch.full((3,), 0.5)

    def lower_loss(self, batch: Any) -> Tensor:
        x, y = batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.net(x)
        logits = logits.float() + torch.zeros(3) @ torch.eye(3) + self.constant.float()
        losses = cross_entropy(logits.to(torch.float32), y, reduction="none")
        weights = self.weights(bilevel.hold(losses.detach()))
        return (weights * losses).mean().float()


@every_method
def test_casts_inside_a_loss_are_casts_to_float64(name: str) -> None:
    problem = Cast()
    problem.net.float()
    problem.weights.float()
    problem.batches = [(x.float(), y) for x, y in problem.batches]
    method, options = METHODS[name]
    optimizer = problem.optimizer(method, **options)
    report = bilevel.check_directions(optimizer, *problem.batches)
    assert report.verdict == "all passed", report
    assert torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in problem.net.parameters()} == {torch.float32}


def test_a_closure_that_cannot_be_cast_raises_its_own_error() -> None:
    problem = Weighted("held")
    calls: list[torch.dtype] = []

    def strict(batch: Any) -> Tensor:
        calls.append(batch[0].dtype)
        raise RuntimeError(f"call {len(calls)}: expected scalar type Float but found Double")

    problem.lower_loss = strict  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="call 1: expected scalar type"):
        bilevel.check_directions(problem.optimizer(bilevel.BOME), *problem.batches)
    assert len(calls) == 2  # a second time with casts widened
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.filterwarnings("ignore:A difference of lower_loss is another")  # bfloat16 is noise to differences
def test_a_loss_in_less_than_float64_gets_no_verdict_from_differences() -> None:
    """A cast that is not seen as one, because it names the type by a string."""
    for dtype, kind in ((torch.float32, "torch.FloatTensor"), (torch.bfloat16, "torch.BFloat16Tensor")):
        for name, (method, options) in METHODS.items():
            problem = Weighted("held")
            plain = problem.lower_loss
            problem.lower_loss = lambda batch, f=plain, k=kind: f(batch).type(k)  # type: ignore[method-assign]
            report = bilevel.check_directions(problem.optimizer(method, **options), *problem.batches, samples=1)
            assert report.passed, f"{name} {dtype}\n{report}"
            assert f"a loss computes in {dtype} inside" in notes(report)


def test_a_loss_that_does_not_repeat_fails_and_is_named() -> None:
    problem = Weighted("held")
    plain, draw = problem.lower_loss, random.Random(0)
    problem.lower_loss = lambda batch: plain(batch) * (1 + 1e-3 * draw.random())  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = bilevel.check_directions(problem.optimizer(bilevel.BOME), *problem.batches)
    assert not report.passed
    assert "the loss is not the same function in every call" in notes(report)


class Once(torch.autograd.Function):
    """tanh with a right first derivative, and none of second order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


@pytest.mark.parametrize("name", ["bome", "finite difference", "sama", "unrolled, difference"])
def test_without_a_second_derivative_there_is_no_verdict_by_it(name: str) -> None:
    method, options = {**METHODS, **ONE_STEP}[name]
    once = nn.Sequential(nn.Linear(4, 6), Of(Once.apply), nn.Linear(6, 3))  # type: ignore[arg-type]
    problem = Weighted("held", once)
    report = bilevel.check_directions(problem.optimizer(method, **options), *problem.batches)
    assert report.passed, report
    if name == "bome":  # of first order
        assert report.verdict == "all passed"
    elif name == "unrolled, difference":
        assert verdict(report, "upper direction") is None
        assert verdict(report, "<dF/dalpha, u>") is True  # differences say what plain autograd cannot
    else:
        assert verdict(report, "upper direction") is True
        assert verdict(report, "its difference, small radius") is None
    assert ("no verdict: " in notes(report)) is (name != "bome")
