"""Micro-batches: the numbers of the joined batch, for every method and option, one graph after another."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
import methods_table
from bilevel import Batches, Indexed, MicroBatches
from methods_table import CASES, SAMPLES, Case, Problem, over

KEEPS_THE_GRAPH = [n for n, case in CASES.items() if case.options.get("differentiate") in ("graph", "forward")]
every_case = over({name: case for name, case in CASES.items() if name not in KEEPS_THE_GRAPH})
SPLIT = (4, SAMPLES - 4)
Batch = tuple[Tensor, Tensor]


def in_parts(batch: Batch) -> MicroBatches:
    """Parts of unlike sizes."""
    return MicroBatches(list(zip(*(x.split(SPLIT) for x in batch), strict=True)))


def scene(*, evaluating: bool = False) -> Problem:
    """The problem with an upper optimizer that does not divide rounding by rounding, as Adam does at gradients of 0
    (a bias before a BatchNorm); ``evaluating``: without what makes of a batch more than its samples.
    """
    problem = Problem(torch.float64)
    problem.upper_optimizer = torch.optim.SGD(problem.corrector.parameters(), lr=0.1, momentum=0.9)
    for module in problem.modules.values():
        module.train(not evaluating)
    return problem


def looped(loss: Callable[[Batch], tuple[Tensor, Any]]) -> Callable[[Batch], Tensor]:
    """The loss on the same parts, in one graph: what is to come out, dropout, BatchNorm and ``hold`` included."""

    def whole(batch: Batch) -> Tensor:
        values = [loss(part)[0] for part in in_parts(batch).parts]
        return sum((size / SAMPLES * value for size, value in zip(SPLIT, values, strict=True)), torch.zeros(()))

    return whole


def moved(problem: Problem, optimizer: Any, batches: list[list[Any]], **options: Any) -> dict[str, Tensor]:
    """The parameters after some steps, and the numbers of the last one."""
    torch.manual_seed(7)
    for batch in batches:
        stats = optimizer.step(*batch, **options)
    numbers = {k: torch.tensor(x, dtype=torch.float64) for k, x in stats.as_dict().items() if "aux" not in k}
    return {**problem.parameters(), **numbers}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        apart = (found[name] - x).abs().max() / x.abs().max().clamp(min=1.0)
        assert apart <= error, f"{name} is {apart:.1e} off"


def error_of(case: Case) -> float:
    # A difference at a relative distance of 6e-6 (the cube root of the unit, 2.2e-16) has 4e-11 of rounding.
    return 1e-9 if case.options.get("product") == "difference" else 1e-12


@pytest.mark.thorough
@every_case
def test_a_step_is_that_of_a_loss_that_goes_through_the_parts_itself(case: Case) -> None:
    """With dropout, BatchNorm in training mode, and held features: the same random numbers in the same order."""
    mine, yours = scene(), scene()
    plain = [mine.batches(case.inner_steps) for _ in range(3)]
    one = mine.optimizer(case)
    other = yours.optimizer(case, upper_loss=looped(yours.upper_loss), lower_loss=looped(yours.lower_loss))
    found = moved(mine, one, [[in_parts(x) for x in batch] for batch in plain])
    assert_close(found, moved(yours, other, plain), error_of(case))


@every_case
def test_a_step_is_that_of_the_joined_batch(case: Case) -> None:
    """Without what makes of a batch more than its samples: all modules in evaluation mode."""
    results = []
    for how in ("joined", "parts", "split"):
        problem = scene(evaluating=True)
        batches: list[list[Any]] = [list(problem.batches(case.inner_steps)) for _ in range(3)]
        if how == "parts":
            batches = [[in_parts(x) for x in batch] for batch in batches]
        options = {"microbatches": 3} if how == "split" else {}
        results.append(moved(problem, problem.optimizer(case), batches, **options))
    assert_close(results[1], results[0], error_of(case))
    assert_close(results[2], results[0], error_of(case))


@pytest.mark.thorough
@every_case
def test_directions_of_micro_batches_change_nothing(case: Case) -> None:
    problem = Problem(torch.float64).lived_in()
    optimizer = problem.optimizer(case)
    batches = [in_parts(x) for x in problem.batches(case.inner_steps)]
    before = methods_table.Record(problem)
    first = optimizer.directions(*batches)
    assert before.differences(methods_table.Record(problem)) == []
    again = optimizer.directions(*batches)  # no look: dropout of each part is the same once more
    methods_table.assert_same({**again.upper, **again.lower}, {**first.upper, **first.lower})


@pytest.mark.parametrize("name", ["ebomlc", "bome-unrolled", "unrolled", "emlc-2", "implicit", "finite-difference"])
def test_check_directions_takes_micro_batches(name: str) -> None:
    case = CASES[name]
    verdicts = []
    for parts in (False, True):
        problem = scene(evaluating=True)
        batches = [in_parts(x) if parts else x for x in problem.batches(case.inner_steps)]
        report = bilevel.check_directions(problem.optimizer(case), *batches)
        verdicts.append([(line.name, line.passed) for line in report.comparisons])
    assert verdicts[1] == verdicts[0]
    assert report.passed, str(report)


@pytest.mark.parametrize("name", KEEPS_THE_GRAPH)
def test_a_kept_graph_is_refused(name: str) -> None:
    """It would hold the graphs of all parts at once; the default takes the adjoint instead."""
    case = CASES[name]
    problem = Problem(torch.float64)
    batches = [in_parts(x) for x in problem.batches(case.inner_steps)]
    with pytest.raises(ValueError, match=r"Unrolled\(differentiate=\w+\): keeps the graphs of all micro-batches"):
        problem.optimizer(case).step(*batches)
    stats = problem.optimizer(case, differentiate="auto").step(*batches)
    assert stats.product != "graph"


@pytest.mark.parametrize("case", [CASES["bome"], CASES["unrolled-reverse"], CASES["emlc"]])
def test_no_two_graphs_are_alive_at_once(case: Case) -> None:
    alive, most = 0, 0

    class Followed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            weakref.finalize(ctx, ended)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g

    def ended() -> None:
        nonlocal alive
        alive -= 1

    problem = Problem(torch.float64)
    problem.after_call = lambda index, loss: Followed.apply(loss)
    optimizer = problem.optimizer(
        case, verify="never", **({"product": "reverse"} if case.method is bilevel.EMLC else {})
    )
    optimizer.step(*[MicroBatches.split(x, 3) for x in problem.batches(case.inner_steps)])
    assert most == 1


def test_buffers_move_to_the_mean_of_what_each_part_makes_of_them() -> None:
    """So the running mean is that of the joined batch, and the counter counts one step."""
    means = []
    for parts in (1, 2):
        model, alpha = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double(), torch.zeros(())
        model[0].register_buffer("mask", torch.tensor([0.0, -torch.inf]))  # must not become NaN
        alpha = alpha.double().requires_grad_()
        torch.manual_seed(0)
        x = torch.randn(6, 3, dtype=torch.float64)
        optimizer = bilevel.EBOMLC(
            lambda x, m=model: m(x).square().mean(),
            lambda x, m=model, a=alpha: (m(x) - a).square().mean(),
            upper=alpha,
            lower=model,
            upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
            lower_optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )
        batch = MicroBatches(x.split((4, 2))) if parts == 2 else x
        optimizer.step(batch, batch)
        assert model[0].num_batches_tracked == 1
        assert model[0].mask.tolist() == [0.0, -torch.inf]
        means.append(model[0].running_mean.clone())
    torch.testing.assert_close(means[1], means[0], rtol=1e-12, atol=1e-14)


def test_real_steps_move_the_buffers_once_each() -> None:
    case = CASES["emlc-2"]
    problem = Problem(torch.float64)
    problem.optimizer(case).step(*[in_parts(x) for x in problem.batches(2)])
    assert problem.classifier.norm.num_batches_tracked == 2


def test_what_a_loss_returns_beside_its_value_is_joined() -> None:
    alpha, w = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)

    def lower(x: Tensor) -> tuple[Tensor, Any]:
        aux = {"mean": x.mean(), "right": (x > 0).sum(), "all": x, "name": "a", "share": float(x.mean())}
        return (w - alpha - x).square().mean(), aux

    optimizer = bilevel.BOME(
        lambda: (w - 1).square(),
        lower,
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
    )
    x = torch.tensor([1.0, -2.0, 3.0, 6.0])
    aux = optimizer.step(lower=MicroBatches(x.split((3, 1)))).lower_aux
    assert (aux["mean"].item(), aux["right"].item(), aux["name"]) == (2.0, 3, ["a", "a"])
    assert abs(aux["share"] - 2.0) < 1e-6
    assert aux["all"].equal(x)


def test_sums_and_weights() -> None:
    """A loss that sums over its batch, and one whose mean is over tokens."""
    x = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 4.0]], dtype=torch.float64)
    for loss, batch in (
        (lambda w, x: (w - x).square().sum(), MicroBatches(x.split((2, 1)), reduction="sum")),
        (lambda w, x: (w - x[x != 0]).square().mean(), MicroBatches(x.split((2, 1)), weights=[3, 1])),
    ):
        found = []
        for b in (x, batch):
            alpha, w = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
            alpha.requires_grad_(), w.requires_grad_()
            optimizer = bilevel.Unrolled(
                lambda x, w=w, loss=loss: loss(w, x),
                lambda x, w=w, a=alpha, loss=loss: loss(w, x * a.exp()),
                upper=alpha,
                lower=w,
                upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
                lower_optimizer=torch.optim.SGD([w], lr=0.1),
            )
            found.append(optimizer.directions(b, b).upper["0"])
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0.0)


def test_half_precision_gradients_add_up_in_float32() -> None:
    """256 parts of gradient 1 each beside one of 1000: bf16 would lose them, as 1000 + 1 is 1000 there."""
    w, alpha = torch.zeros((), dtype=torch.bfloat16, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = bilevel.BOME(
        lambda x: (w * x.bfloat16()).sum(),
        lambda x: (w.float() * x).sum() + alpha * w.float(),
        upper=alpha,
        lower=w,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        verify="never",
    )
    parts = [torch.tensor([x]) for x in (1000.0, *[1.0] * 256)]
    direction = optimizer.directions(MicroBatches(parts, reduction="sum"), MicroBatches(parts[:1])).lower["0"]
    assert direction == torch.tensor(1256.0).bfloat16()  # q is linear in w: its gradient is 0


def test_indexed_and_several_batches_may_be_in_parts() -> None:
    x = torch.arange(4.0)
    split = bilevel.microbatches.split_batch
    assert [part.tolist() for part in split(Indexed(3, x), 2).batch.parts] == [[0.0, 1.0], [2.0, 3.0]]
    assert split(Indexed(3, x), 2).index == 3
    assert [len(b.parts) for b in split(Batches(x, MicroBatches([x])), 2).batches] == [2, 1]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: MicroBatches([]), ValueError, "needs at least one micro-batch"),
        (lambda: MicroBatches(torch.ones(4)), TypeError, "must be a list of micro-batches"),
        (lambda: MicroBatches([Indexed(0, torch.ones(2))]), TypeError, "Put MicroBatches into Indexed"),
        (lambda: MicroBatches(["a", "b"]), TypeError, "Pass weights= with the sizes"),
        (lambda: MicroBatches([1, 2], weights=[1]), ValueError, "must be 2 numbers >= 0"),
        (lambda: MicroBatches([1, 2], weights=[1, -1]), ValueError, "must be 2 numbers >= 0"),
        (lambda: MicroBatches([1, 2], weights=[0, 0]), ValueError, "not all 0"),
        (lambda: MicroBatches([1], reduction="max"), ValueError, "must be one of 'mean', 'sum'"),
        (lambda: MicroBatches.split(torch.ones(2), 3), ValueError, "one first dimension, at least 3"),
        (lambda: MicroBatches.split((torch.ones(4), torch.ones(3)), 2), ValueError, r"first dimensions \[4, 3\]"),
        (lambda: MicroBatches.split({"x": torch.ones(4), "t": "text"}, 2), TypeError, "Split it yourself"),
        (lambda: MicroBatches.split(torch.ones(4), 0), ValueError, "must be at least 1"),
    ],
)
def test_what_are_no_micro_batches_is_refused(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_an_iterator_in_a_part_is_refused() -> None:
    problem = Problem()
    upper, lower = problem.batches()
    with pytest.raises(TypeError, match="is or holds a list_iterator"):
        problem.optimizer(CASES["bome"]).step(upper, MicroBatches([lower, (iter([1]),)], weights=[1, 1]))
