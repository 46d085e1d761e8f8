"""What is special to methods that answer for the upper level and take real lower steps themselves.

``test_contract`` and its neighbours run over the table for them too. Here: options that are not in the table, steps
that fail at each stage with ``atomic`` on and off, hooks and failing optimizers, what constructors refuse, and
``check_directions``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import ConjugateGradient, FixedPoint, Neumann
from methods_table import CASES, LOOK_FIRST, TRAIN_FIRST, Case, Problem, Record, assert_same, leaves
from plain_hypergradients import Setup, relative
from test_nonfinite import POISONS

NAN = float("nan")

# Differences of float32 gradients on a batch of six are rough, which a look says.
pytestmark = pytest.mark.filterwarnings("ignore:hessian product by difference:UserWarning")


def back(steps: int) -> str:
    """Products going back: the first step's is the last, and of alpha alone."""
    return (steps - 1) * "L" + "l"


MORE: dict[str, Case] = {
    "unrolled-1": Case(bilevel.Unrolled, lambda k: "LU", **LOOK_FIRST),
    "unrolled-1-adjoint": Case(bilevel.Unrolled, lambda k: "LUl", {"differentiate": "adjoint"}, **LOOK_FIRST),
    "unrolled-3-truncated": Case(
        bilevel.Unrolled,
        lambda k: "LLLU" + back(2),
        {"inner_steps": 3, "truncate": 2, "differentiate": "adjoint"},
        **LOOK_FIRST,
    ),
    "unrolled-plain": Case(
        bilevel.Unrolled,
        lambda k: "LLU" + back(2),
        {"inner_steps": 2, "inner_lr": 0.05, "differentiate": "adjoint"},
        **LOOK_FIRST,
    ),
    "unrolled-difference": Case(
        bilevel.Unrolled,
        lambda k: "LLU" + "LL" + "ll",
        {"inner_steps": 2, "product": "difference", "differentiate": "adjoint"},
        **LOOK_FIRST,
    ),
    "unrolled-graph-truncated": Case(
        bilevel.Unrolled, lambda k: "LLLU", {"inner_steps": 3, "truncate": 1, "differentiate": "graph"}, **LOOK_FIRST
    ),
    "unrolled-preview-rate": Case(
        bilevel.Unrolled, lambda k: "LU", {"inner_step": "optimizer", "inner_lr": 0.05}, **LOOK_FIRST
    ),
    "unrolled-real-graph-truncated": Case(
        bilevel.Unrolled,
        lambda k: "LLLU",
        {"inner_steps": 3, "truncate": 1, "virtual": False, "differentiate": "graph"},
        **TRAIN_FIRST,
    ),
    "unrolled-real-truncated": Case(
        bilevel.Unrolled, lambda k: "LLLU" + back(1), {"inner_steps": 3, "truncate": 1, "virtual": False}, **TRAIN_FIRST
    ),
    "emlc-replay": Case(
        bilevel.EMLC, lambda k: k * "L" + "U" + k * "lL", {"inner_steps": 3, "memory": "replay"}, **TRAIN_FIRST
    ),
    "mlc-3": Case(bilevel.MLC, lambda k: "LUlU", {"inner_steps": 3}, upper_at="current"),
    "implicit-cg": Case(
        bilevel.Implicit,
        lambda k: k * "L" + "U" + "L" + "l",
        {"inner_steps": 3, "solver": ConjugateGradient(2, tolerance=0.0, damping=30.0), "warm_start": False},
        **TRAIN_FIRST,
    ),
    "implicit-solved": Case(
        bilevel.Implicit,
        lambda k: "LU" + "L" + "l",
        {"inner_steps": 0, "solver": Neumann(2)},
        gives_lower=False,
        upper_at="current",
    ),
    "implicit-fixed-point": Case(
        bilevel.Implicit,
        lambda k: "LU" + "L" + "l",
        {"solver": FixedPoint(2, momentum=0.5), "warm_start": False},
        **TRAIN_FIRST,
    ),
    "finite-difference-plain": Case(
        bilevel.FiniteDifference, lambda k: "LUll", {"inner_lr": 0.05, "radius": 0.1}, **LOOK_FIRST
    ),
    "sama-1": Case(bilevel.SAMA, lambda k: "LUll", {"radius": 0.1}, **TRAIN_FIRST),
}
EVERY = {name: case for name, case in CASES.items() if case.method not in (bilevel.BOME, bilevel.EBOMLC)} | MORE
more = pytest.mark.parametrize("case", MORE.values(), ids=MORE.keys())
ATOMIC = {name: case for name, case in EVERY.items() if not case.gives_lower}
every_atomic = pytest.mark.parametrize("case", ATOMIC.values(), ids=ATOMIC.keys())
every = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY.keys())
REAL = {name: case for name, case in EVERY.items() if case.real_steps}
every_real = pytest.mark.parametrize("case", REAL.values(), ids=REAL.keys())


def batches_of(problem: Problem, case: Case) -> list[Any]:
    return problem.batches(max(case.inner_steps, 1)) if case.method is not bilevel.MLC else problem.batches()


# --- options that are not in the table ----------------------------------------------------------------------------


@more
def test_directions_move_nothing(case: Case) -> None:
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    for _ in range(2):
        before = Record(problem)
        directions = optimizer.directions(*batches_of(problem, case))
        assert Record(problem).differences(before) == []
        assert len(directions.lower) == (6 if case.gives_lower else 0)
        optimizer.step(*batches_of(problem, case))


@more
def test_directions_are_what_a_step_uses(case: Case) -> None:
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    for call in range(3):
        batches = batches_of(problem, case)
        torch.manual_seed(call)
        directions = optimizer.directions(*batches)
        torch.manual_seed(call)
        stats = optimizer.step(*batches)
        assert stats.upper_moved == bool(directions.upper)
        if directions.upper:
            assert_same({n: p.grad for n, p in problem.corrector.named_parameters()}, directions.upper)
    assert directions.upper


@more
def test_calls_of_the_losses_are_the_documented_ones(case: Case) -> None:
    problem = Problem()
    optimizer = problem.optimizer(case, verify="never")
    for verb in ("directions", "step", "step"):
        problem.calls.clear()
        getattr(optimizer, verb)(*batches_of(problem, case))
        found = [call.side if call.side == "U" or call.graph else "l" for call in problem.calls]
        assert "".join(found) == case.calls_of(verb)


@more
def test_a_checkpoint_in_the_middle_gives_the_same_numbers(case: Case) -> None:
    straight, resumed = Problem(), Problem(seed=50)
    optimizer, fresh = straight.optimizer(case), resumed.optimizer(case)
    batches = [batches_of(straight, case) for _ in range(4)]
    torch.manual_seed(0)
    for some in batches[:2]:
        optimizer.step(*some)
    for name, module in resumed.modules.items():
        module.load_state_dict(straight.modules[name].state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    random = torch.get_rng_state()
    for one in (optimizer, fresh):
        torch.set_rng_state(random)
        for some in batches[2:]:
            one.step(*some)
    assert_same(resumed.parameters(), straight.parameters())
    assert_same(resumed.buffers(), straight.buffers())
    assert_same(dict(leaves(fresh.state_dict()["state"], "")), dict(leaves(optimizer.state_dict()["state"], "")))


@more
def test_buffers_move_once_for_each_real_lower_step(case: Case) -> None:
    """Of every module that the losses call, or once a step where no real step comes before F."""
    problem = Problem()
    optimizer = problem.optimizer(case)
    for _ in range(2):
        optimizer.step(*batches_of(problem, case))
    moves = {name: int(b) for name, b in problem.buffers().items() if name.endswith("num_batches_tracked")}
    assert moves == dict.fromkeys(moves, 2 * max(case.real_steps, 1))
    assert len(moves) == 3


# --- steps that fail ----------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@more
@pytest.mark.parametrize("verb", ["step", "directions"])
def test_a_loss_that_raises_at_any_call_changes_nothing(case: Case, verb: str) -> None:
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    optimizer.step(*batches_of(problem, case))
    own = optimizer.state_dict()["state"]
    batches = batches_of(problem, case)
    for at in range(len(case.calls_of(verb))):

        def after(index: int, loss: Tensor, at: int = at) -> Tensor:
            if index == at:
                raise Interrupted
            return loss

        problem.calls.clear()
        problem.after_call = after
        before = Record(problem)
        with pytest.raises(Interrupted):
            getattr(optimizer, verb)(*batches)
        assert len(problem.calls) == at + 1
        assert Record(problem).differences(before) == []
        assert_same(dict(leaves(optimizer.state_dict()["state"], "")), dict(leaves(own, "")))


@pytest.mark.thorough
@every_atomic
def test_without_atomic_a_step_that_fails_stays_half_taken(case: Case) -> None:
    """As documented: optimizer steps that were taken stay; buffers, random state and flags are given back."""
    for at in range(len(case.step_calls)):
        problem, plain = Problem().lived_in(), Problem().lived_in()
        optimizer = problem.optimizer(case, atomic=False, verify="never")
        batches = batches_of(problem, case)

        def after(index: int, loss: Tensor, at: int = at, problem: Problem = problem) -> Tensor:
            if index == at:
                problem.classifier.eval()
                raise Interrupted
            return loss

        problem.after_call = after
        before = Record(problem)
        torch.manual_seed(4)
        random = torch.get_rng_state()
        with pytest.raises(Interrupted):
            optimizer.step(*batches)
        assert torch.equal(torch.get_rng_state(), random)
        assert problem.classifier.training
        assert_same(problem.buffers(), Problem().lived_in().buffers())
        if case.real_steps and case.ordinary:
            # The real lower steps before the failure; replayed ones start again from the first.
            taken = min(at, case.real_steps)
            if case.options.get("memory") == "replay" and at > case.real_steps:
                taken = (at - case.real_steps - 1) // 2  # F, then a product and a gradient for each step
            torch.manual_seed(4)
            for batch in batches[1 : taken + 1]:
                plain.lower_optimizer.zero_grad()
                plain.lower_loss(batch)[0].backward()
                plain.lower_optimizer.step()
            assert_same(dict(problem.classifier.named_parameters()), dict(plain.classifier.named_parameters()))
            assert_same(dict(problem.corrector.named_parameters()), dict(plain.corrector.named_parameters()))
        elif at == len(case.directions_calls) and case.then:  # the upper variables have moved, the lower ones have not
            torch.manual_seed(4)
            directions = plain.optimizer(case).directions(*batches)
            for name, p in plain.corrector.named_parameters():
                p.grad = directions.upper[name]
            plain.upper_optimizer.step()
            assert_same(dict(problem.corrector.named_parameters()), dict(plain.corrector.named_parameters()))
            assert_same(dict(problem.classifier.named_parameters()), dict(plain.classifier.named_parameters()))
        elif case.ordinary:
            torch.manual_seed(4)
            differences = [d for d in Record(problem).differences(before) if d != "random.torch"]
            assert differences == []


def poison(problem: Problem, where: Callable[[int], bool], how: str = "nan loss") -> None:
    """Spoil the value, or the gradient alone, of the calls chosen by their index."""
    problem.after_call = lambda index, loss: POISONS[how](loss) if where(index) else loss


def stages(case: Case) -> list[str]:
    """Where a step of this method may meet what is not finite, and how."""
    found = ["F, nan loss", "F, nan gradient", "G at the first step, nan loss", "G at the first step, nan gradient"]
    if case.inner_steps > 1 and case.method is not bilevel.MLC:
        found += ["G at the second step, nan loss", "G at the second step, nan gradient"]
    if case.directions_calls[-1] != "U" and case.options.get("memory") != "replay":
        found.append("the last product, nan loss")
    if case.then:
        found += ["the ordinary step, nan loss", "the ordinary step, nan gradient"]
    return found


def place(stage: str, problem: Problem, batches: list[Any], case: Case) -> Callable[[int], bool]:
    """The calls that the stage means."""
    calls, last = problem.calls, len(case.directions_calls)
    places: dict[str, Callable[[int], bool]] = {
        "F": lambda index: calls[index].side == "U",
        "G at the first step": lambda index: calls[index].batch is batches[1],
        "G at the second step": lambda index: calls[index].batch is batches[2],
        "the last product": lambda index: index == last - 1,
        "the ordinary step": lambda index: index == last,
    }
    return places[stage.partition(",")[0]]


STAGES = [(name, stage) for name, case in EVERY.items() for stage in stages(case)]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_what_is_not_finite_at_any_stage_moves_nothing(name: str, stage: str) -> None:
    """``raise`` and ``skip``: variables, buffers, optimizer states and the method's own state are as before."""
    case = EVERY[name]
    for policy in ("raise", "skip"):
        problem = Problem().lived_in()
        optimizer = problem.optimizer(case, on_nonfinite=policy, verify="never")
        good = optimizer.step(*batches_of(problem, case))
        batches = batches_of(problem, case)
        problem.calls.clear()
        poison(problem, place(stage, problem, batches, case), stage.partition(", ")[2])
        own = optimizer.state_dict()["state"]
        before = Record(problem)
        if policy == "raise":
            with pytest.raises(bilevel.NonFiniteError, match=rf"{case.method.__name__}\.step: .*nothing was moved"):
                optimizer.step(*batches)
            assert Record(problem).differences(before) == []
        else:
            stats = optimizer.step(*batches)
            assert (stats.skipped, stats.upper_moved) == (True, False)
            assert type(stats) is type(good)
            assert Record(problem).differences(before) in ([], ["random.torch"])
        assert_same(dict(leaves(optimizer.state_dict()["state"], "")), dict(leaves(own, "")))
        problem.after_call = None
        assert not optimizer.step(*batches).skipped


def test_the_error_names_what_was_not_finite() -> None:
    """The gradient of the ordinary step, of a real one, and the moves that stay without ``atomic``."""
    tails = {True: "; nothing was moved.", False: "; earlier moves of this step stay (atomic=False)."}
    for atomic, tail in tails.items():
        for name in ("unrolled", "unrolled-real"):
            problem = Problem()
            case = CASES[name]
            optimizer = problem.optimizer(case, atomic=atomic, verify="never")
            last = len(case.directions_calls) if case.then else 1
            poison(problem, lambda index, last=last: index == last, "nan gradient")
            with pytest.raises(bilevel.NonFiniteError) as caught:
                optimizer.step(*batches_of(problem, case))
            start = "Unrolled.step: the direction of a lower step held NaN or infinity"
            assert str(caught.value).startswith(start + tail)


def test_without_atomic_a_skipped_step_says_what_moved() -> None:
    problem, case = Problem(), CASES["unrolled"]
    optimizer = problem.optimizer(case, atomic=False, on_nonfinite="skip", verify="never")
    before = [p.detach().clone() for p in (*problem.corrector.parameters(), *problem.classifier.parameters())]
    poison(problem, lambda index: index == len(case.directions_calls))
    stats = optimizer.step(*batches_of(problem, case))
    assert (stats.skipped, stats.upper_moved) == (True, True)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(before, (*problem.corrector.parameters(), *problem.classifier.parameters()), strict=True)
    ]
    assert moved == [True] * 6 + [False] * 8


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
@every_real
def test_a_lower_optimizer_that_fails_in_a_real_step(case: Case, when: str) -> None:
    """A hook of the user's that raises at the second real step: the first one is taken back as well."""
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    steps = 0

    def hook(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == min(2, case.real_steps):
            raise Broken

    register = f"register_step_{'pre' if when == 'before' else 'post'}_hook"
    handle = getattr(problem.lower_optimizer, register)(hook)
    before = Record(problem)
    with pytest.raises(Broken):
        optimizer.step(*batches_of(problem, case))
    assert Record(problem).differences(before) == []
    handle.remove()
    assert optimizer.step(*batches_of(problem, case)).upper_moved


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("filled", [False, True])
def test_taking_steps_back_restores_the_very_tensors(kind: str, filled: bool) -> None:
    """State that was there keeps its tensor objects, which fused kernels and users may hold; new state disappears."""
    setup = Setup(kind, warm_up=2 if filled else 0)
    optimizer = setup.optimizer(bilevel.Unrolled, inner_steps=2, virtual=False)

    def held() -> list[tuple[int, str, int]]:
        state = setup.lower_optimizer.state
        return [(id(p), name, id(v)) for p, entry in state.items() for name, v in entry.items()]

    before, count = held(), len(setup.lower_optimizer.state)
    optimizer.directions(*setup.data[:3])
    assert held() == before
    assert len(setup.lower_optimizer.state) == count
    assert bool(before) == (filled and kind != "sgd")
    assert all(p.grad is None for p in setup.student.parameters())


# --- the two orders -----------------------------------------------------------------------------------------------


@every
def test_the_order_of_real_steps(case: Case) -> None:
    """Look first: upper, lower. Train first: the lower steps, then upper. MLC: upper, lower, both decided before."""
    problem = Problem()
    order: list[str] = []
    problem.upper_optimizer.register_step_pre_hook(lambda *_: order.append("upper"))
    problem.lower_optimizer.register_step_pre_hook(lambda *_: order.append("lower"))
    optimizer = problem.optimizer(case)
    for _ in range(case.inner_steps if case.method is bilevel.MLC else 1):
        order.clear()
        optimizer.step(*batches_of(problem, case))
    twice = 2 if case.options.get("memory") == "replay" else 1
    if case.real_steps:
        assert order == ["lower"] * case.real_steps * twice + ["upper"]
    else:
        assert order == (["upper"] if case.inner_steps == 0 else ["upper", "lower"])


@every_atomic
def test_averaged_directions_move_the_upper_level_alone(case: Case) -> None:
    """Few-shot learning: directions of several tasks at one point, averaged, then applied."""
    problem = Problem().lived_in()
    optimizer = problem.optimizer(case)
    tasks = [optimizer.directions(*batches_of(problem, case)) for _ in range(3)]
    average = bilevel.Directions.mean(tasks)
    kept = Record(problem)
    assert optimizer.apply(average).upper_moved
    changed = Record(problem).differences(kept)
    assert all(path.startswith(("corrector.", "optimizer 0")) for path in changed)
    for name, p in problem.corrector.named_parameters():
        assert p.grad is not None
        mean = sum((task.upper[name] for task in tasks), torch.zeros_like(p)) / 3
        torch.testing.assert_close(p.grad, mean, rtol=1e-5, atol=1e-8)


# --- construction -------------------------------------------------------------------------------------------------

Bad = tuple[str, dict[str, Any], type[Exception], str]
RULE = "must be one of"
WRONG: dict[str, Bad] = {
    "no inner steps": ("unrolled", {"inner_steps": 0}, ValueError, r"Unrolled\(inner_steps=0\): must be at least 1"),
    "no inner steps of EMLC": ("emlc", {"inner_steps": 0}, ValueError, r"EMLC\(inner_steps=0\): must be at least 1"),
    "no inner steps of MLC": ("mlc", {"inner_steps": 0}, ValueError, r"MLC\(inner_steps=0\): must be at least 1"),
    "no inner steps of SAMA": ("sama", {"inner_steps": 0}, ValueError, r"SAMA\(inner_steps=0\): must be at least 1"),
    "negative steps": ("implicit", {"inner_steps": -1}, ValueError, r"Implicit\(inner_steps=-1\): must be at least 0"),
    "half a step": ("emlc", {"inner_steps": 1.5}, TypeError, r"EMLC\(inner_steps=1\.5\): must be an integer"),
    "steps of DARTS": ("finite-difference", {"inner_steps": 2}, TypeError, "inner_steps"),
    "a rate of 0": (
        "unrolled",
        {"inner_lr": 0.0},
        ValueError,
        r"Unrolled\(inner_lr=0\.0\): must be finite and greater",
    ),
    "a negative rate": ("finite-difference", {"inner_lr": -1.0}, ValueError, r"FiniteDifference\(inner_lr=-1\.0\)"),
    "a rate as a tensor": ("unrolled", {"inner_lr": torch.ones(())}, TypeError, "must be a Python number"),
    "a rate of EMLC": ("emlc", {"inner_lr": 0.1}, TypeError, "inner_lr"),
    "more truncated than taken": (
        "unrolled",
        {"truncate": 3},
        ValueError,
        r"Unrolled\(truncate=3\): must be at most inn",
    ),
    "truncated to nothing": ("unrolled", {"truncate": 0}, ValueError, r"Unrolled\(truncate=0\): must be at least 1"),
    "truncated in words": ("unrolled", {"truncate": "all"}, TypeError, r"truncate=all\): must be an integer"),
    "an unknown mode": (
        "unrolled",
        {"differentiate": "loop"},
        ValueError,
        r"Unrolled\(differentiate='loop'\): must be one of 'auto', ",
    ),
    "an unknown inner step": (
        "unrolled",
        {"inner_step": "adam"},
        ValueError,
        r"Unrolled\(inner_step='adam'\): must be one of 'gradient', ",
    ),
    "restore in words": ("unrolled", {"virtual": "yes"}, ValueError, r"Unrolled\(virtual='yes'\): must be one of True"),
    "a start that is no function": (
        "unrolled",
        {"start": [1]},
        TypeError,
        r"Unrolled\(start=\[1\]\): must be a function",
    ),
    "a start of real steps": (
        "unrolled",
        {"start": list, "virtual": False},
        ValueError,
        "needs virtual=True and no tr",
    ),
    "a truncated start": ("unrolled", {"start": list, "truncate": 1}, ValueError, "needs virtual=True and no trunc"),
    "an unknown route": ("unrolled", {"product": "hessian"}, ValueError, r"Unrolled\(product='hessian'\): must be one"),
    "an unknown route of EMLC": ("emlc", {"product": None}, ValueError, r"EMLC\(product=None\): must be one of 'auto'"),
    "an unknown route of MLC": ("mlc", {"product": "jvp"}, ValueError, r"MLC\(product='jvp'\): must be one of 'auto'"),
    "a route of DARTS": ("finite-difference", {"product": "auto"}, TypeError, "product"),
    "a route of SAMA": ("sama", {"product": "auto"}, TypeError, "product"),
    "atomic in words": ("sama", {"atomic": "no"}, ValueError, r"SAMA\(atomic='no'\): must be one of True, False"),
    "atomic of MLC": ("mlc", {"atomic": True}, TypeError, "atomic"),
    "an unknown memory": (
        "emlc",
        {"memory": "keep"},
        ValueError,
        r"EMLC\(memory='keep'\): must be one of 'store', 'rep",
    ),
    "a discount above 1": ("emlc", {"discount": 1.5}, ValueError, r"EMLC\(discount=1\.5\): must be at most 1"),
    "a negative discount": (
        "emlc",
        {"discount": -0.1},
        ValueError,
        r"EMLC\(discount=-0\.1\): must be finite and at le",
    ),
    "a discount of NaN": ("emlc", {"discount": NAN}, ValueError, r"EMLC\(discount=nan\): must be finite"),
    "a solver's name": (
        "implicit",
        {"solver": "cg"},
        TypeError,
        r"Implicit\(solver=cg\): must be a solver value, such",
    ),
    "a solver's class": ("implicit", {"solver": Neumann}, TypeError, "must be a solver value, such as bilevel.Conjuga"),
    "a warm start in words": ("implicit", {"warm_start": 2}, ValueError, r"Implicit\(warm_start=2\): must be one of"),
    "a radius of 0": (
        "finite-difference",
        {"radius": 0.0},
        ValueError,
        r"FiniteDifference\(radius=0\.0\): must be fin",
    ),
    "a negative radius": ("sama", {"radius": -1.0}, ValueError, r"SAMA\(radius=-1\.0\): must be finite and greater"),
    "an unknown policy": (
        "implicit",
        {"on_nonfinite": "warn"},
        ValueError,
        r"Implicit\(on_nonfinite='warn'\): must be",
    ),
    "an option that does not exist": ("emlc", {"barrier": 1}, TypeError, "barrier"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_refused(name: str) -> None:
    row, options, kind, pattern = WRONG[name]
    problem = Problem()
    before = Record(problem)
    with pytest.raises(kind, match=pattern):
        problem.optimizer(CASES[row], **{"inner_steps": 2, **options} if "truncate" in options else options)
    assert Record(problem).differences(before) == []


FOLLOWING = [
    (bilevel.Unrolled, {}, r'or inner_step="gradient" for gradient descent'),
    (bilevel.Unrolled, {"virtual": False}, "or EMLC, which follows none"),
    (bilevel.FiniteDifference, {}, r'or inner_step="gradient"'),
    (bilevel.MLC, {}, "or EMLC, which follows none"),
    (bilevel.SAMA, {}, r"or Neumann\(0\) in Implicit"),
]


@pytest.mark.parametrize(("method", "options", "advice"), FOLLOWING)
def test_an_optimizer_that_cannot_be_followed_is_refused_where_it_must_be(
    method: Any, options: dict[str, Any], advice: str
) -> None:
    setup = Setup("sgd")
    for make in (torch.optim.RMSprop, torch.optim.Adagrad):
        other = make(setup.student.parameters(), lr=0.01)
        name = make.__name__
        pattern = rf"{method.__name__}\(lower_optimizer={name}\): cannot be followed.*SGD, Adam, AdamW.*{advice}"
        with pytest.raises(ValueError, match=pattern):
            setup.optimizer(method, lower_optimizer=other, **options)


class MySGD(torch.optim.SGD):
    """A subclass may step otherwise."""


def test_a_subclass_cannot_be_followed_either() -> None:
    setup = Setup("sgd")
    with pytest.raises(ValueError, match=r"lower_optimizer=MySGD\): cannot be followed"):
        setup.optimizer(bilevel.Unrolled, lower_optimizer=MySGD(setup.student.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (bilevel.Unrolled, {"inner_lr": 0.1}),
        (bilevel.Unrolled, {"inner_step": "gradient"}),
        (bilevel.FiniteDifference, {"inner_step": "gradient"}),
        (bilevel.Unrolled, {"inner_lr": 0.1, "differentiate": "graph"}),
        (bilevel.FiniteDifference, {"inner_lr": 0.1}),
        (bilevel.EMLC, {"inner_steps": 2}),
        (bilevel.EMLC, {"inner_steps": 2, "memory": "replay"}),
        (bilevel.Implicit, {"solver": Neumann(2)}),
    ],
)
@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam])
def test_where_plain_steps_are_differentiated_any_optimizer_trains(
    make: Any, method: Any, options: dict[str, Any]
) -> None:
    ours, plain = Setup("sgd"), Setup("sgd")
    for setup in (ours, plain):
        setup.lower_optimizer = make(setup.student.parameters(), lr=0.01)
    optimizer = ours.optimizer(method, **options)
    batches = ours.data[: options.get("inner_steps", 1) + 1]
    torch.manual_seed(0)
    assert optimizer.step(*batches).upper_moved
    if method in (bilevel.EMLC, bilevel.Implicit):  # the steps came first
        torch.manual_seed(0)
        for batch in batches[1:]:
            plain.train(batch)
        for p, q in zip(ours.student.parameters(), plain.student.parameters(), strict=True):
            assert torch.equal(p, q)


def test_real_steps_with_a_rate_of_their_own_are_refused() -> None:
    """``virtual=False`` trains with the lower optimizer, so that ``inner_lr`` would differentiate other steps."""
    setup = Setup("momentum")
    with pytest.raises(ValueError, match=r"Unrolled\(inner_lr=0\.1\): needs virtual=True"):
        setup.optimizer(bilevel.Unrolled, inner_lr=0.1, virtual=False)
    with pytest.raises(ValueError, match=r"Unrolled\(inner_step=gradient\): needs virtual=True"):
        setup.optimizer(bilevel.Unrolled, inner_step="gradient", virtual=False)


# --- check_directions ---------------------------------------------------------------------------------------------

RADIUS = "its difference, small radius"
CHECKED: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "unrolled": (bilevel.Unrolled, {"inner_steps": 2}, True),
    "unrolled, graph": (bilevel.Unrolled, {"inner_steps": 2, "differentiate": "graph"}, True),
    "unrolled, real": (bilevel.Unrolled, {"inner_steps": 2, "virtual": False}, True),
    "unrolled, plain": (bilevel.Unrolled, {"inner_steps": 2, "inner_lr": 0.1}, True),
    "unrolled, truncated": (bilevel.Unrolled, {"inner_steps": 2, "truncate": 1}, False),
    "mlc": (bilevel.MLC, {}, True),
    "mlc, three steps": (bilevel.MLC, {"inner_steps": 3}, False),
    "emlc": (bilevel.EMLC, {"inner_steps": 2}, False),
    "implicit": (bilevel.Implicit, {"solver": ConjugateGradient(damping=1.0)}, False),
    "implicit, solved": (bilevel.Implicit, {"inner_steps": 0, "solver": Neumann(1)}, False),
    "finite difference": (bilevel.FiniteDifference, {}, False),
    "sama": (bilevel.SAMA, {"inner_steps": 2}, False),
}


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["momentum", "adam"])
@pytest.mark.parametrize("name", CHECKED)
def test_check_directions(name: str, kind: str, dtype: torch.dtype) -> None:
    """Every method is compared with its own formula, exact ones with the total derivative as well; of the others the
    distance from it is told, no verdict.

    In the middle of training, with the state of the optimizers and of the method; nothing moves.
    """
    method, options, exact = CHECKED[name]
    setup = Setup(kind, dtype=dtype)
    optimizer = setup.optimizer(method, **options)
    optimizer.step(*setup.data[:2])
    state = optimizer.state_dict()
    kept = [x.detach().clone() for m in (setup.student, setup.corrector) for x in (*m.parameters(), *m.buffers())]
    report = bilevel.check_directions(optimizer, *setup.data[2:4])
    assert report.passed, report
    verdicts = {line.name: line.passed for line in report.comparisons}
    assert next(iter(verdicts)) == "upper direction"
    if exact:
        assert verdicts == {"upper direction": True, "<dF/dalpha, u>": True}
        assert report.comparisons[0].error < 1e-10
        assert report.comparisons[1].error < 1e-6
    else:
        own = {bilevel.Implicit: ["residual"], bilevel.FiniteDifference: [RADIUS], bilevel.SAMA: [RADIUS]}
        assert list(verdicts)[1:-3] == own.get(method, [])
        assert list(verdicts)[-2:] == ["cosine with it", "relative error"]
        assert list(verdicts.values()) == [*[True] * (len(verdicts) - 2), None, None]
    assert report.verdict == "all passed"
    after = [x for m in (setup.student, setup.corrector) for x in (*m.parameters(), *m.buffers())]
    assert all(map(torch.equal, kept, after))
    assert {x.dtype for x in after if x.is_floating_point()} == {dtype}
    assert_same(dict(leaves(optimizer.state_dict(), "")), dict(leaves(state, "")))


def test_check_directions_measures_how_far_an_approximation_is() -> None:
    """Cosine and relative error of DARTS with a coarse radius, against the exact direction."""
    setup = Setup("sgd")
    coarse = setup.optimizer(bilevel.FiniteDifference, radius=0.5)
    exact = setup.optimizer(bilevel.Unrolled)
    answers = []
    for optimizer in (coarse, exact):
        torch.manual_seed(0)
        answers.append(list(optimizer.directions(*setup.data[:2]).upper.values()))
    torch.manual_seed(0)
    lines = {line.name: line.computed for line in bilevel.check_directions(coarse, *setup.data[:2]).comparisons}
    assert lines["relative error"] == pytest.approx(relative(*answers), rel=1e-9)
    a, b = (torch.cat([x.reshape(-1) for x in answer]) for answer in answers)
    assert lines["cosine with it"] == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-12)
    assert 1e-3 < lines["relative error"] < 0.5


def test_check_directions_finds_a_wrong_hypergradient(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("momentum")
    optimizer = setup.optimizer(bilevel.Unrolled, inner_steps=2)
    assert bilevel.check_directions(optimizer, *setup.data[:3]).passed
    # What it computes, while it still calls itself exact.
    monkeypatch.setattr(bilevel.Unrolled, "_differentiated", property(lambda self: 1))
    monkeypatch.setattr(bilevel.Unrolled, "exact", True)
    report = bilevel.check_directions(optimizer, *setup.data[:3])
    assert not report.passed
    assert "<-- differs" in str(report)
