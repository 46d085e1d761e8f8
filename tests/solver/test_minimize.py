"""The solver face: known answers, what it reports, what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import problems
from bilevel.problems import Problem
from bilevel.solver import Record, Result


def solve(problem: Problem, method: Any = "auto", **options: Any) -> Result:
    return bilevel.minimize(
        problem.upper_loss,
        problem.lower_loss,
        problem.upper,
        problem.lower,
        method,
        upper_bounds=problem.upper_bounds,
        lower_bounds=problem.lower_bounds,
        **options,
    )


QUICK = [
    "henrion-surowiec-2011",  # smooth
    "macal-hurter-1997",  # ill-conditioned
    "active-bound",  # a bound is active below
    "mirrlees-1999",  # a jump between two lower minima
    "lucchetti-etal-1987",  # an isolated answer
    "smd-6",  # a line of lower minima, and F pulls away from them
    "mitsos-barton-3.14",
    "valley",
    "quartic",  # a singular lower Hessian
    "wavy",  # upper minima
]


@pytest.mark.parametrize("name", QUICK)
def test_auto_solves(name: str) -> None:
    problem = problems.named(name)
    result = solve(problem)
    assert problem.solved(), problem.errors()
    assert result.success
    assert result.evaluations <= 3000


@pytest.mark.slow
def test_auto_solves_nearly_all_of_the_suite() -> None:
    solved = 0
    for problem in problems.suite():
        solve(problem)
        solved += problem.solved()
    assert solved >= len(problems.names()) - 3


@pytest.mark.parametrize("method", ["BOME", "Implicit", "VPBGD"])
def test_a_named_class_solves_a_smooth_problem_by_the_rule_of_step_sizes(method: str) -> None:
    problem = problems.named("henrion-surowiec-2011")
    result = solve(problem, method, evaluations=1500)
    assert problem.solved()
    assert result.method == method
    assert any("Step sizes" in reason for reason in result.reasons)


def test_the_result_is_the_pair_that_the_variables_are_left_at() -> None:
    problem = problems.quadratic(seed=2)
    records: list[Record] = []
    result = solve(problem, callback=records.append)
    assert isinstance(result.upper, Tensor)
    assert isinstance(result.lower, Tensor)
    assert torch.equal(result.upper, problem.upper.detach())
    assert torch.equal(result.lower, problem.lower.detach())
    assert result.upper_value == pytest.approx(problem.upper_loss().item(), abs=1e-12)
    assert result.lower_value == pytest.approx(problem.lower_loss().item(), abs=1e-12)
    assert problem.upper_solution is not None
    torch.testing.assert_close(result.upper, problem.upper_solution, rtol=0, atol=1e-4)
    torch.testing.assert_close(result.lower, problem.lower_optimum(result.upper), rtol=0, atol=1e-5)
    assert records == result.history
    assert result.message.endswith(".")
    values = [record.upper_value for record in result.history]
    assert values[-1] <= values[0]
    assert problem.upper.requires_grad


def test_it_repeats_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, again = (solve(problems.named("two-wells"), evaluations=600) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.history == again.history
    assert first.reasons == again.reasons
    other = solve(problems.named("two-wells"), evaluations=600, seed=1)
    assert other.history != first.history


@pytest.mark.parametrize("method", ["auto", "F2SA"])
@pytest.mark.parametrize("evaluations", [50, 137, 400])
def test_the_budget_is_kept(method: str, evaluations: int) -> None:
    problem = problems.named("eight-wells")
    calls = itertools.count()

    def counted(loss: Any) -> Any:
        return lambda: (next(calls), loss())[1]

    result = bilevel.minimize(
        counted(problem.upper_loss),
        counted(problem.lower_loss),
        problem.upper,
        problem.lower,
        method,
        evaluations=evaluations,
    )
    assert next(calls) == result.evaluations <= evaluations


def test_modules_answer_by_name_and_losses_may_return_more_than_a_value() -> None:
    """A linear model with a penalty for each feature: ridge regression that leaves the useless feature out."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 2, generator=generator)
    target = data[:, :1] + 0.3 * torch.randn(40, 1, generator=generator)
    model = nn.Linear(2, 1, bias=False)
    penalty = nn.Parameter(torch.zeros(2))

    def upper_loss() -> tuple[Tensor, int]:
        return ((model(data[20:]) - target[20:]) ** 2).mean(), 3

    def lower_loss() -> Tensor:
        return ((model(data[:20]) - target[:20]) ** 2).mean() + (penalty.exp() * model.weight**2).sum()

    before = upper_loss()[0].item()
    result = bilevel.minimize(upper_loss, lower_loss, [penalty], model, evaluations=800, upper_bounds=(-8.0, 8.0))
    assert isinstance(result.lower, dict)
    assert list(result.lower) == ["weight"]
    assert isinstance(result.upper, dict)
    assert result.upper_value < before
    # w solves the normal equations for the penalties that were found
    a, b = data[:20].double(), target[:20].double()
    system = a.T @ a / 20 + torch.diag(penalty.detach().double().exp())
    expected = torch.linalg.solve(system, a.T @ b / 20)
    torch.testing.assert_close(model.weight.detach().double().T, expected, rtol=0, atol=2e-3)


def test_any_projection_serves() -> None:
    """With x on the simplex: |x - (1, 1, -1)|^2 is lowest at (1/2, 1/2, 0), y = x below."""
    x = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.float64)
    wanted = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    result = bilevel.minimize(
        lambda: ((y - wanted) ** 2).sum(),
        lambda: ((y - x) ** 2).sum(),
        x,
        y,
        upper_projection=bilevel.projection.Simplex(),
        evaluations=1000,
    )
    assert result.success
    torch.testing.assert_close(x, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64), rtol=0, atol=1e-3)
    assert not x.requires_grad


def test_bounds_move_a_start_inside_and_may_be_on_one_side() -> None:
    x, y = torch.tensor([-3.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    bilevel.minimize(lambda: ((x + 1) ** 2 + y**2).sum(), lambda: ((y - x) ** 2).sum(), x, y, upper_bounds=(0.25, None))
    assert x.item() == pytest.approx(0.25)


def test_losses_need_not_depend_on_both_levels() -> None:
    """As in many published problems: F = x here, and G without x."""
    x, y = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    result = bilevel.minimize(lambda: x.sum(), lambda: ((y - 1) ** 2).sum(), x, y, upper_bounds=(-2.0, 2.0))
    assert (x.item(), round(y.item(), 6)) == (-2.0, 1.0)
    assert "F does not depend on the lower variables." in result.reasons
    assert "G does not depend on the upper variables." in result.reasons


def test_a_pair_that_further_starts_make_void_is_no_success() -> None:
    """Without further starts the well that y begins in is all that is seen; with them the lower one is."""

    def wells(starts: int) -> tuple[Result, float]:
        x, y = torch.tensor([0.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
        result = bilevel.minimize(
            lambda: ((x - 0.5) ** 2 + 0.1 * (y - 1) ** 2).sum(),
            lambda: ((y**2 - 1) ** 2 + 0.5 * y + 0 * x).sum(),
            x,
            y,
            starts=starts,
            evaluations=500,
        )
        return result, y.item()

    _, y_alone = wells(0)
    several, y_several = wells(8)
    assert y_alone > 0.9
    assert y_several < -1
    assert several.success


def test_only_classes_of_short_walks_get_lower_copies() -> None:
    """Elsewhere n walks of many steps take the budget; and F2SA has copies for p = 1 alone."""
    copies = {}
    for method in (bilevel.VPBGD, bilevel.PDBO, bilevel.F2SA, bilevel.BVFSM):

        class Seen(method):  # type: ignore[misc, valid-type]
            def compute(self, oracle: Any) -> Any:
                copies[type(self).__mro__[1].__name__] = self.starts
                return super().compute(oracle)

        solve(problems.named("two-wells"), Seen, evaluations=200)
    assert copies == {"VPBGD": 4, "PDBO": 4, "F2SA": 1, "BVFSM": 1}
    assert solve(problems.named("two-wells"), "F2SA", evaluations=200, options={"p": 2}).evaluations <= 200


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"evaluations": 10}, ValueError, r"minimize\(evaluations=10\): must be at least 50"),
        ({"starts": -1}, ValueError, r"minimize\(starts=-1\): must be at least 0"),
        ({"tolerance": -1.0}, ValueError, r"minimize\(tolerance=-1.0\)"),
        ({"method": "ADAM"}, ValueError, r"must be \"auto\", an optimizer class, or one of BOME"),
        ({"method": "SABA"}, ValueError, r"keeps a row for each batch"),
        ({"options": {"inner_steps": 2}}, ValueError, r"are of a named method"),
        ({"upper_bounds": (0.0, 1.0), "upper_projection": bilevel.projection.Box(0, 1)}, ValueError, "cannot both"),
        ({"lower_bounds": 3.0}, TypeError, "must be a pair"),
        ({"method": "BOME", "options": {"inner_stepz": 2}}, TypeError, "inner_stepz"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    x, y = torch.zeros(1), torch.zeros(1)
    with pytest.raises(kind, match=words):
        bilevel.minimize(lambda: ((y - 1) ** 2 + x).sum(), lambda: ((y - x) ** 2).sum(), x, y, **change)


def test_a_loss_that_fails_leaves_the_variables_where_they_were() -> None:
    x, y = torch.tensor([0.5]), torch.tensor([0.25])
    calls = itertools.count()

    def lower_loss() -> Tensor:
        if next(calls) > 100:
            raise FloatingPointError("a bad day")
        return ((y - x) ** 2).sum()

    with pytest.raises(FloatingPointError, match="a bad day"):
        bilevel.minimize(lambda: ((y - 1) ** 2).sum(), lower_loss, x, y)
    assert (x.item(), y.item()) == (0.5, 0.25)


def test_a_loss_that_is_no_scalar_is_refused_in_the_words_of_the_contract() -> None:
    x, y = torch.zeros(2), torch.zeros(2)
    with pytest.raises(bilevel.ClosureError, match="scalar"):
        bilevel.minimize(lambda: (y - 1) ** 2, lambda: ((y - x) ** 2).sum(), x, y)


def test_progress_is_shown_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.zeros(1), torch.zeros(1)
    bilevel.minimize(lambda: ((y - 1) ** 2).sum(), lambda: ((y - x) ** 2).sum(), x, y, evaluations=200, progress=True)
    assert "/200" in capsys.readouterr().err
