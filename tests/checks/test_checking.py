"""``check_directions``: it passes where the numbers are right, fails where one is wrong, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.checks.report import Comparison, Report
from bilevel.hypergradient import mixed_product
from bilevel.methods import dynamic_barrier
from bilevel.methods.barrier_formulas import Terms
from methods_table import CASES, Problem, Record, every_case, every_dtype
from test_directions import TABLE, Twins

GRADIENTS = ["<grad_alpha F, u>", "<grad_w F, u>", "<grad_alpha G, u>", "<grad_w G, u>"]
LINES = [*GRADIENTS, "<grad q, u> (both levels)", "Q", "multiplier", "upper direction", "lower direction"]


def failed(report: Report) -> list[str]:
    return [line.name for line in report.comparisons if line.passed is False]


# It passes


@pytest.mark.thorough
@every_dtype
@every_case
def test_right_directions_pass_whatever_the_dtype(case: Any, dtype: torch.dtype) -> None:
    problem = Problem(dtype)

    def upper_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        # The table's own F detaches its features, which finite differences cannot know of; held ones are constants.
        x, label = batch
        features = problem.classifier.features(x)
        mixture = 0.3 * problem.classifier.head(features).softmax(1)
        mixture = mixture + 0.7 * problem.corrector(bilevel.hold(features), label)
        return -(label * mixture.log()).sum(1).mean()

    optimizer = problem.optimizer(case, upper_loss=upper_loss)
    report = bilevel.check_directions(optimizer, *problem.batches(case.inner_steps), samples=1)
    assert report.passed, report
    assert report.method == case.method.__name__


@pytest.mark.thorough
@pytest.mark.parametrize("name", TABLE)
def test_right_directions_pass_with_every_option(name: str) -> None:
    twins = Twins(TABLE[name])
    upper_batch, lower_batches = twins.draw()
    twins.optimizer.step(upper_batch, *lower_batches)  # so that previews have a state to start from
    report = bilevel.check_directions(twins.optimizer, upper_batch, *lower_batches, samples=1)
    assert report.passed, report
    inner = ["inner point"] if twins.optimizer.step_from == "lookahead" else []
    assert [line.name for line in report.comparisons] == LINES + inner
    assert report.verdict == "all passed"
    assert max(line.error for line in report.comparisons) < 1e-6
    # Not vacuous: what is compared is not zero (F may well not depend on alpha, and the barrier be inactive).
    by_name = {line.name: line.computed for line in report.comparisons}
    assert all(by_name[line] != 0 for line in ("<grad_w F, u>", "<grad_w G, u>", "<grad_alpha G, u>", "Q"))
    assert (by_name["<grad_alpha F, u>"] != 0) == TABLE[name].mixture


def test_bare_tensors_without_a_module_pass() -> None:
    problem = bilevel.problems.quadratic(seed=4, dtype=torch.float32)
    wide = bilevel.problems.quadratic(seed=4)
    upper_optimizer, lower_optimizer = problem.optimizers()
    # float32 constants inside a closure cannot be cast by the check: these closures take theirs in the variables' type
    h, p = wide.hessian, wide.upper_hessian

    def upper_loss() -> Tensor:
        w = problem.lower
        return 0.5 * w @ p.to(w.dtype) @ w

    def lower_loss() -> Tensor:
        w, a = problem.lower, problem.upper
        return 0.5 * w @ h.to(w.dtype) @ w - w @ wide.coupling.to(w.dtype) @ a

    optimizer = bilevel.BOME(
        upper_loss,
        lower_loss,
        upper=problem.upper,
        lower=problem.lower,
        upper_optimizer=upper_optimizer,
        lower_optimizer=lower_optimizer,
        inner_steps=3,
    )
    assert bilevel.check_directions(optimizer).passed
    assert problem.lower.dtype == torch.float32


# It fails


class Wrong(torch.autograd.Function):
    """The identity, with a backward that is one part in a thousand too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 1.001 * gradient


def twins_with(fault: Callable[[Tensor, str], Tensor]) -> tuple[Twins, bilevel.BOME]:
    """EBOMLC's problem with ``fault(tensor, place)`` put into the losses; the places are their logits and labels."""
    twins = Twins(TABLE["ebomlc"])

    def upper_loss(batch: Any) -> Tensor:
        x, y = batch
        features = twins.classifier.features(x)
        logits = fault(twins.classifier.out(features), "F logits")
        guess = fault(twins.corrector(bilevel.hold(features), y), "F guess")
        p = 0.2 * logits.softmax(1) + 0.8 * guess
        return -p.gather(1, y[:, None]).log().mean()

    def lower_loss(batch: Any) -> Tensor:
        x, noisy = batch
        features = twins.classifier.features(x)
        logits = fault(twins.classifier.out(features), "G logits")
        return cross_entropy(logits, fault(twins.corrector(bilevel.hold(features), noisy), "G labels"))

    return twins, build(twins, upper_loss, lower_loss)


def build(twins: Twins, upper_loss: Callable[[Any], Tensor], lower_loss: Callable[[Any], Tensor]) -> bilevel.BOME:
    return bilevel.BOME(
        upper_loss,
        lower_loss,
        upper=twins.corrector,
        lower=twins.classifier,
        upper_optimizer=torch.optim.SGD(twins.corrector.parameters(), lr=0.1),
        lower_optimizer=torch.optim.SGD(twins.classifier.parameters(), lr=0.1),
    )


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("F logits", ["<grad_w F, u>"]),  # plain autograd says what the method does: the directions are not blamed
        ("F guess", ["<grad_alpha F, u>"]),
        ("G logits", ["<grad_w G, u>", "<grad q, u> (both levels)"]),
        ("G labels", ["<grad_alpha G, u>", "<grad q, u> (both levels)"]),
    ],
)
def test_a_wrong_backward_in_a_loss_is_found_where_it_is(place: str, expected: list[str]) -> None:
    twins, optimizer = twins_with(lambda x, here: Wrong.apply(x) if here == place else x)
    upper_batch, lower_batches = twins.draw()
    report = bilevel.check_directions(optimizer, upper_batch, *lower_batches)
    assert not report.passed
    assert failed(report) == expected
    _, right = twins_with(lambda x, here: x)
    assert bilevel.check_directions(right, upper_batch, *lower_batches).passed


def wrong_sign(terms: Callable[..., Any]) -> Callable[..., Any]:
    """``grad_alpha q`` with the other sign."""

    def wrong(**found: Any) -> Any:
        return terms(**{**found, "upper_gradient": -found["upper_gradient"]})

    return lambda *values: wrong(**dict(zip([x.name for x in fields(Terms)], values, strict=True)))


def off(products: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Inner products of which some are a percent too large."""
    return lambda **found: products(**{name: 1.01 * x if name in names else x for name, x in found.items()})


def scaled(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options)
        if isinstance(found, Tensor):
            return factor * found
        return tuple(factor * vector for vector in found)

    return wrapped


DIRECTIONS = ["upper direction", "lower direction"]
FAULTS: dict[str, tuple[str, str, Callable[[Any], Any], list[str]]] = {
    "sign of q": ("bome", "Terms", wrong_sign, ["<grad q, u> (both levels)", "upper direction"]),
    "sign of q, difference": ("difference", "Terms", wrong_sign, ["<grad q, u> (both levels)"]),
    "multiplier": ("bome", "multiplier", lambda f: scaled(f, 1.00001), ["multiplier", *DIRECTIONS]),
    "inner products": ("bome", "Products", lambda f: off(f, "upper", "lower"), ["multiplier", *DIRECTIONS]),
    "norm": ("ebomlc", "Products", lambda f: off(f, "squared_norm"), ["multiplier", *DIRECTIONS]),
    "adjoint": ("unrolled", "adjoint", lambda f: scaled(f, 1.0001), ["<grad q, u> (both levels)"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_method_itself_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function, damage, expected = FAULTS[fault]
    twins = Twins(TABLE[name])
    upper_batch, lower_batches = twins.draw()
    monkeypatch.setattr(dynamic_barrier, function, damage(getattr(dynamic_barrier, function)))
    report = bilevel.check_directions(twins.optimizer, upper_batch, *lower_batches)
    assert set(expected) <= set(failed(report)), report


def test_a_reading_that_is_not_the_one_named_is_found() -> None:
    twins = Twins(TABLE["unrolled"])
    upper_batch, lower_batches = twins.draw()
    original = twins.optimizer.terms

    def of_another_reading(oracle: Any) -> Any:
        twins.optimizer.value_gradient = "difference"
        try:
            return original(oracle)
        finally:
            twins.optimizer.value_gradient = "unrolled"

    twins.optimizer.terms = of_another_reading  # type: ignore[method-assign]
    found = failed(bilevel.check_directions(twins.optimizer, upper_batch, *lower_batches))
    assert found == [LINES[4], "multiplier", *DIRECTIONS]


def test_a_loss_that_is_not_finite_does_not_pass() -> None:
    twins, optimizer = twins_with(lambda x, here: x * float("nan") if here == "G logits" else x)
    upper_batch, lower_batches = twins.draw()
    report = bilevel.check_directions(optimizer, upper_batch, *lower_batches)
    assert {"<grad_w G, u>", "Q", "multiplier"} <= set(failed(report))


def test_the_tolerance_decides() -> None:
    twins, optimizer = twins_with(lambda x, here: Wrong.apply(x) if here == "F logits" else x)
    upper_batch, lower_batches = twins.draw()
    assert bilevel.check_directions(optimizer, upper_batch, *lower_batches, tolerance=1e-2).passed
    assert not bilevel.check_directions(optimizer, upper_batch, *lower_batches, tolerance=1e-4).passed


@pytest.mark.parametrize(("options", "kind"), [({"samples": 0}, ValueError), ({"samples": 1.5}, TypeError)])
def test_a_check_of_nothing_is_refused(options: dict[str, Any], kind: type[Exception]) -> None:
    twins, optimizer = twins_with(lambda x, here: x)
    upper_batch, lower_batches = twins.draw()
    with pytest.raises(kind, match=r"check_directions\(samples="):
        bilevel.check_directions(optimizer, upper_batch, *lower_batches, **options)


@pytest.mark.parametrize(("tolerance", "kind"), [(-1.0, ValueError), (float("nan"), ValueError), ("1e-6", TypeError)])
def test_a_bad_tolerance_is_refused(tolerance: Any, kind: type[Exception]) -> None:
    twins, optimizer = twins_with(lambda x, here: x)
    upper_batch, lower_batches = twins.draw()
    with pytest.raises(kind, match=r"check_directions\(tolerance="):
        bilevel.check_directions(optimizer, upper_batch, *lower_batches, tolerance=tolerance)


# It leaves no trace


@pytest.mark.thorough
@every_dtype
@every_case
def test_everything_is_restored_bit_for_bit(case: Any, dtype: torch.dtype) -> None:
    problem = Problem(dtype).lived_in()
    optimizer = problem.optimizer(case)
    batches = problem.batches(case.inner_steps)
    kept = [(x.clone(), y.clone()) for x, y in batches]
    memory = {name: t.data_ptr() for name, t in (*problem.parameters().items(), *problem.buffers().items())}
    before = Record(problem)
    bilevel.check_directions(optimizer, *batches, samples=1)
    assert before.differences(Record(problem)) == []
    assert memory == {n: t.data_ptr() for n, t in (*problem.parameters().items(), *problem.buffers().items())}
    for (x, y), (x_kept, y_kept) in zip(batches, kept, strict=True):
        assert x.dtype == x_kept.dtype == dtype
        assert torch.equal(x, x_kept)
        assert torch.equal(y, y_kept)


class BrokenLossError(Exception):
    """What a closure of the user's raises."""


def raised_at(problem: Problem, optimizer: Any, batches: Any, n: int) -> bool:
    """Check with a loss that raises in its ``n``-th call; return whether there was such a call."""

    def explode(index: int, loss: Tensor) -> Tensor:
        if index == n:
            raise BrokenLossError
        return loss

    problem.calls.clear()
    problem.after_call = explode
    try:
        bilevel.check_directions(optimizer, *batches, samples=1)
    except BrokenLossError:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "stride"), [pytest.param("ebomlc", 1, marks=pytest.mark.thorough), ("bome-unrolled", 11)]
)
def test_everything_is_restored_when_a_loss_raises_at_any_call(name: str, stride: int) -> None:
    case, problem = CASES[name], Problem(torch.float32).lived_in()
    optimizer, batches = problem.optimizer(case), problem.batches(case.inner_steps)
    before = Record(problem)
    n = 0
    while raised_at(problem, optimizer, batches, n):
        assert before.differences(Record(problem)) == [], f"call {n}"
        n += stride
    assert n > 30  # the last round went through
    assert before.differences(Record(problem)) == []


def test_a_step_after_the_check_is_the_step_without_it() -> None:
    checked, unchecked = Problem(torch.float32), Problem(torch.float32)
    results = []
    for problem in (checked, unchecked):
        optimizer = problem.optimizer(CASES["ebomlc"])
        batches = problem.batches()
        torch.manual_seed(3)
        if problem is checked:
            bilevel.check_directions(optimizer, *batches)
        optimizer.step(*batches)
        results.append(Record(problem))
    a, b = results[0]._bits, results[1]._bits
    assert [path for path in a if a[path] != b.get(path)] == []


def test_losses_see_float64_and_nested_batches_are_cast_too() -> None:
    seen: set[torch.dtype] = set()
    model = nn.Linear(2, 1)
    penalty = nn.Parameter(torch.zeros(2))

    def upper_loss(batch: Any) -> Tensor:
        x = batch["inputs"][0]
        seen.update((x.dtype, model.weight.dtype, batch["index"].dtype))
        assert batch["name"] == "clean"
        return model(x).square().mean()

    def lower_loss(batch: Any) -> Tensor:
        seen.update((batch.dtype, penalty.dtype))
        return (model(batch) - 1).square().mean() + (penalty.exp() * model.weight.square()).sum()

    optimizer = bilevel.BOME(
        upper_loss,
        lower_loss,
        upper=penalty,
        lower=model,
        upper_optimizer=torch.optim.SGD([penalty], lr=0.1),
        lower_optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    upper_batch = {"inputs": [torch.ones(3, 2)], "index": torch.arange(3), "name": "clean"}
    assert bilevel.check_directions(optimizer, upper_batch, torch.ones(4, 2)).passed
    assert seen == {torch.float64, torch.int64}
    assert upper_batch["inputs"][0].dtype == torch.float32  # type: ignore[index]


# What it says


def test_the_report_is_a_table_with_one_line_for_each_number() -> None:
    twins, optimizer = twins_with(lambda x, here: Wrong.apply(x) if here == "F logits" else x)
    upper_batch, lower_batches = twins.draw()
    report = bilevel.check_directions(optimizer, upper_batch, *lower_batches)
    head, columns, *rows = str(report).splitlines()
    rows, notes = rows[: len(LINES)], rows[len(LINES) :]
    assert head == "BOME: FAILED"
    assert " ".join(" ".join(notes).split()).startswith("<grad_w F, u>: autograd's derivative of the loss is not its")
    assert columns.split() == ["what", "computed", "expected", "error"]
    assert [row.strip().startswith(name) for row, name in zip(rows, LINES, strict=True)] == [True] * len(LINES)
    assert [row.endswith("<-- differs") for row in rows] == [name == "<grad_w F, u>" for name in LINES]
    assert len({row.index("e") for row in rows if "differs" not in row}) >= 1
    line = report.comparisons[1]
    assert f"{line.computed:.7e}" in rows[1]
    assert f"{line.expected:.7e}" in rows[1]
    assert line.error == pytest.approx(1e-3, rel=0.01)


def test_a_passed_report_says_so() -> None:
    good = Comparison("Q", 1.0, 1.0, 0.0, True)
    assert str(Report("EBOMLC", (good,))).startswith("EBOMLC: all passed\n")
    assert not Report("EBOMLC", (good, replace(good, passed=False))).passed
    # An approximation is measured without a verdict, and fails nothing.
    measured = Report("SAMA", (good, replace(good, name="cosine", passed=None, measured=True)))
    assert measured.passed
    assert measured.verdict == "all passed"
    assert "(no verdict)" in str(measured)


def test_a_report_says_how_much_of_it_has_no_verdict() -> None:
    good = Comparison("Q", 1.0, 1.0, 0.0, True)
    unknown = replace(good, name="multiplier", passed=None, note="no verdict: a reason.")
    some, none = Report("BOME", (good, unknown)), Report("BOME", (unknown,))
    assert some.passed
    assert str(some).startswith("BOME: passed, 1 without a verdict\n")
    assert str(some).endswith("  multiplier: no verdict: a reason.")
    assert none.passed  # no disagreement was found, and nothing else either
    assert str(none).startswith("BOME: NO VERDICT\n")


class OneProduct(bilevel.BilevelOptimizer[bilevel.Stats]):
    """A method of an author's own, which says nothing about how it is to be checked."""

    def compute(self, oracle: bilevel.Oracle) -> bilevel.Directions:
        f = oracle.upper()
        g_aw = mixed_product(oracle, f.lower, product="forward")
        return bilevel.Directions(upper=f.upper - 0.1 * g_aw, lower=f.lower, stats=bilevel.Stats(f.value, f.value))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_method_is_compared_with_itself_by_plain_autograd(hidden: bool) -> None:
    """``hidden``: the lower loss hides a part from autograd that forward mode sees."""
    net, a = nn.Linear(3, 1).double(), torch.ones(3, dtype=torch.float64, requires_grad=True)

    def lower_loss() -> Tensor:
        with torch.no_grad():
            size = net.weight.square().sum()
        size = size if hidden else size.new_ones(())
        return (size * (net.weight[0] * a).sum()).square() + net.bias.square().sum()

    optimizer = OneProduct(
        lambda: (net.weight[0] - a).square().sum() + net.bias.square().sum(),
        lower_loss,
        upper=a,
        lower=net,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        verify="never",
    )
    report = bilevel.check_directions(optimizer)
    assert [line.name for line in report.comparisons] == [*GRADIENTS, *DIRECTIONS]
    assert failed(report) == (["upper direction"] if hidden else [])
    assert report.comparisons[-1].passed
