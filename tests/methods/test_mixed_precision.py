"""Half precision: autocast for every method, ``GradScaler``, and differences that do not drown in rounding."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from bilevel import Directions
from methods_table import CASES, Case, over

every_case = over({n: x for n, x in CASES.items() if x.options.get("differentiate") not in ("graph", "forward")})
DIFFERENCES = ["finite-difference", "sama", "ebomlc-unrolled", "bome", "ebomlc-inner", "f2sa", "vpbgd", "meha"]


class Scene:
    """A perceptron below, a corrector of its targets above; both losses under autocast to ``dtype``, or None."""

    def __init__(self, dtype: torch.dtype | None, *, outside: bool = False, factor: float = 1.0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
            self.corrector = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
            x, label = torch.randn(3, 32, 8), torch.randint(4, (3, 32))
            self.batches = list(zip(x, nn.functional.one_hot(label, 4).float(), strict=True))
        self.dtype, self.outside, self.factor = dtype, outside, factor

    def autocast(self, on: bool) -> torch.autocast:
        return torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=on and self.dtype is not None)

    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        with self.autocast(True) if not self.outside else torch.enable_grad():
            return self.factor * cross_entropy(self.model(x), label)

    def lower_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, label = batch
        with self.autocast(True) if not self.outside else torch.enable_grad():
            return self.factor * cross_entropy(self.model(x), self.corrector(label).softmax(1))

    def optimizer(self, case: Case, **changes: Any) -> Any:
        return case.method(
            changes.pop("upper_loss", self.upper_loss),
            changes.pop("lower_loss", self.lower_loss),
            upper=self.corrector,
            lower=self.model,
            upper_optimizer=torch.optim.SGD(self.corrector.parameters(), lr=0.1),
            lower_optimizer=torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9),
            **{**case.options, **changes},
        )

    def given(self, case: Case) -> list[Any]:
        return [self.batches[0], *(self.batches[1 + i % 2] for i in range(case.inner_steps))]

    def directions(self, case: Case, **changes: Any) -> Directions[Any]:
        optimizer = self.optimizer(case, **changes)
        with self.autocast(self.outside):
            found: Directions[Any] = optimizer.directions(*self.given(case))
        return found


def flat(directions: Directions[Any], side: str) -> Tensor:
    return torch.cat([x.flatten().double() for x in getattr(directions, side).values()])


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def scaler(scale: float = 2.0**16, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


# What half precision explains: each of the few matrix products on the way rounds to the unit (4e-3 of bfloat16, 5e-4 of
# float16), errors of entries of either sign, so that a vector is a few units off.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FEW = 6


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("outside", [False, True], ids=["in the losses", "around the step"])
@every_case
def test_directions_are_those_of_float32_up_to_rounding(case: Case, outside: bool, dtype: torch.dtype) -> None:
    exact = Scene(None).directions(case)
    rough = Scene(dtype, outside=outside).directions(case)
    for side in ("upper", "lower"):
        if getattr(exact, side):
            a, b = flat(rough, side), flat(exact, side)
            # Beside what is in play, as a direction may be small (an inactive constraint: 0).
            assert float((a - b).norm()) <= FEW * UNIT[dtype] * max(float(b.norm()), 1e-3), apart(a, b)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_are_taken_in_float32(name: str) -> None:
    """At points 1 % apart the half of a difference in bfloat16 is rounding."""
    case = CASES[name]
    options = {"delta": 10.0} if case.method is bilevel.EBOMLC else {}  # an active constraint
    options |= {"barrier": bilevel.barrier.GradientNorm(10.0)} if case.method is bilevel.BOME else {}
    exact, rough = (flat(Scene(dtype).directions(case, **options), "upper") for dtype in (None, torch.bfloat16))
    assert exact.norm() > 0
    assert apart(rough, exact) < FEW * UNIT[torch.bfloat16]


@pytest.mark.thorough
@every_case
def test_scaled_directions_are_the_same(case: Case) -> None:
    """In float32, without autocast: a power of two changes no digit where nothing under- or overflows."""
    exact = Scene(None).directions(case)
    scaled = Scene(None).directions(case, scaler=scaler(2.0**10))
    assert scaled.stats.loss_scale == 2.0**10
    assert not scaled.stats.skipped
    for side in ("upper", "lower"):
        if getattr(exact, side):
            # Products along a v of another length are rounded differently.
            torch.testing.assert_close(flat(scaled, side), flat(exact, side), rtol=1e-4, atol=1e-7)


@every_case
def test_what_underflows_without_a_scale_is_right_with_one(case: Case) -> None:
    """Losses of 2^-20: in float16 their gradients are 0 or a digit or two, and at a scale of 2^20 they are those of
    losses of order one. Adam aside nothing is computed from them here that is not told of the factor.
    """
    small = 2.0**-16
    options: dict[str, Any] = {"verify": "never"}
    exact = Scene(None, factor=small).directions(case, **options)
    scaled = Scene(torch.float16, factor=small).directions(case, scaler=scaler(1 / small), **options)
    assert not scaled.stats.skipped
    side = "upper" if case.method in (bilevel.SAMA,) or not exact.lower else "lower"
    a, b = flat(scaled, side), flat(exact, side)
    if float(b.norm()) > 1e-6 * small:  # else a difference of gradients between which float32 sees none
        assert apart(a, b) < 2 * FEW * UNIT[torch.float16] + 0.02, apart(a, b)
    if case in (CASES["ebomlc"], CASES["unrolled"], CASES["emlc"]):
        assert apart(flat(Scene(torch.float16, factor=small).directions(case, **options), side), b) > 0.05


@every_case
def test_an_overflow_skips_the_step_and_lowers_the_scale(case: Case) -> None:
    scene, loss_scale = Scene(torch.float16), scaler(2.0**40)
    optimizer = scene.optimizer(case, scaler=loss_scale, on_nonfinite="raise")
    before = deepcopy([x.detach().clone() for x in (*scene.model.parameters(), *scene.corrector.parameters())])
    stats = optimizer.step(*scene.given(case))
    assert stats.skipped
    assert not stats.upper_moved
    assert (float(stats.loss_scale), loss_scale.get_scale()) == (2.0**40, 2.0**39)
    for x, kept in zip((*scene.model.parameters(), *scene.corrector.parameters()), before, strict=True):
        assert x.detach().equal(kept)
    for _ in range(40):
        stats = optimizer.step(*scene.given(case))
        if not stats.skipped:
            break
    assert stats.upper_moved
    assert stats.as_dict()["loss_scale"] == loss_scale.get_scale()


def test_enough_steps_without_an_overflow_raise_the_scale() -> None:
    scene, loss_scale = Scene(torch.float16), scaler(2.0**8, growth_interval=3)
    optimizer = scene.optimizer(CASES["ebomlc"], scaler=loss_scale)
    for _ in range(3):
        assert not optimizer.step(*scene.given(CASES["ebomlc"])).skipped
    assert loss_scale.get_scale() == 2.0**9


@pytest.mark.parametrize("name", ["ebomlc", "emlc", "unrolled"])
def test_directions_leave_the_scale_alone_and_apply_moves_it(name: str) -> None:
    case = CASES[name]
    scene, loss_scale = Scene(torch.float16), scaler(2.0**40)
    optimizer = scene.optimizer(case, scaler=loss_scale)
    found = optimizer.directions(*scene.given(case))
    assert found.stats.skipped
    assert loss_scale.get_scale() == 2.0**40
    assert Directions.mean([found, found]).stats.skipped
    before = [x.detach().clone() for x in scene.corrector.parameters()]
    stats = optimizer.apply(found)
    assert (stats.skipped, stats.upper_moved, loss_scale.get_scale()) == (True, False, 2.0**39)
    assert all(x.equal(y) for x, y in zip(scene.corrector.parameters(), before, strict=True))
    loss_scale.update(2.0**8)
    assert optimizer.apply(optimizer.directions(*scene.given(case))).upper_moved


def test_a_hidden_overflow_skips_too() -> None:
    """An infinite gradient that no direction shows."""

    class OfTheUpperLoss(bilevel.BilevelOptimizer[bilevel.Stats]):
        def compute(self, oracle: bilevel.Oracle) -> Directions[bilevel.Stats]:
            f, g = oracle.upper(), oracle.lower()
            return Directions(f.upper, f.lower, bilevel.Stats.of(f, g))

    class Overflows(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return torch.where(g.abs() > 2.0**15, torch.inf, g)

    scene = Scene(None)
    optimizer = scene.optimizer(
        Case(OfTheUpperLoss, lambda steps: "UL"),
        lower_loss=lambda batch: Overflows.apply(scene.lower_loss(batch)),
        scaler=scaler(2.0**16),
    )
    assert optimizer.step(*scene.batches[:2]).skipped
    assert not optimizer.step(*scene.batches[:2]).skipped


def test_below_every_scale_on_nonfinite_decides() -> None:
    """A gradient that is infinite at any scale is no overflow of the scale."""
    scene = Scene(None)

    def infinite(batch: Any) -> Tensor:
        return scene.lower_loss(batch) * torch.tensor(torch.inf)

    case = CASES["ebomlc"]
    optimizer = scene.optimizer(case, lower_loss=infinite, scaler=scaler(2.0**-23))
    assert [optimizer.step(*scene.given(case)).skipped for _ in range(2)] == [True, True]
    with pytest.raises(bilevel.NonFiniteError, match="held NaN or infinity"):
        optimizer.step(*scene.given(case))


def test_the_scale_is_saved_and_loaded() -> None:
    case = CASES["ebomlc"]
    runs = []
    for stop in (False, True):
        scene, loss_scale = Scene(torch.float16), scaler(2.0**30, growth_interval=2)
        optimizer = scene.optimizer(case, scaler=loss_scale)
        for _ in range(18):
            optimizer.step(*scene.given(case))
        if stop:
            state, loss_scale = optimizer.state_dict(), scaler(1.0, growth_interval=2)
            optimizer = scene.optimizer(case, scaler=loss_scale)
            optimizer.load_state_dict(state)
        for _ in range(4):
            optimizer.step(*scene.given(case))
        runs.append((loss_scale.state_dict(), [x.detach().clone() for x in scene.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(a.equal(b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_a_state_with_a_scale_needs_a_scaler_and_one_without_leaves_it() -> None:
    case = CASES["ebomlc"]
    with_scale = Scene(None).optimizer(case, scaler=scaler()).state_dict()
    with pytest.raises(ValueError, match=r"EBOMLC.load_state_dict\(scaler=...\): is the state of a GradScaler"):
        Scene(None).optimizer(case).load_state_dict(with_scale)
    loss_scale = scaler(8.0)
    Scene(None).optimizer(case, scaler=loss_scale).load_state_dict(Scene(None).optimizer(case).state_dict())
    assert loss_scale.get_scale() == 8.0


def test_a_disabled_scaler_is_none() -> None:
    case = CASES["ebomlc"]
    scene = Scene(None)
    optimizer = scene.optimizer(case, scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert optimizer.step(*scene.given(case)).loss_scale is None
    optimizer.load_state_dict(optimizer.state_dict())


def half() -> Any:
    scene = Scene(None)
    scene.model.half()
    optimizer = scene.optimizer(CASES["ebomlc"], scaler=scaler())
    optimizer.step(*scene.given(CASES["ebomlc"]))


def kept_graph() -> Any:
    scene = Scene(None)
    case = CASES["unrolled-graph"]
    scene.optimizer(case, scaler=scaler()).step(*scene.given(case))


def forward() -> Any:
    scene = Scene(None)
    case = CASES["unrolled-forward"]
    scene.optimizer(case, scaler=scaler()).step(*scene.given(case))


def set_later() -> Any:
    Scene(None).optimizer(CASES["ebomlc"]).scaler = scaler()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Scene(None).optimizer(CASES["ebomlc"], scaler=3), TypeError, "must be a torch.amp.GradScaler"),
        (half, ValueError, "some are float16. Keep them in float32"),
        (kept_graph, ValueError, "has no place where a GradScaler could scale"),
        (forward, ValueError, "has no place where a GradScaler could scale"),
        (set_later, AttributeError, "fixed at construction"),
    ],
)
def test_what_a_scaler_cannot_serve_is_refused(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_micro_batches_are_scaled_too() -> None:
    case = CASES["bome-unrolled-reverse"]
    scene = Scene(torch.float16)
    whole = scene.directions(case, scaler=scaler(2.0**8))
    parts = [bilevel.MicroBatches.split(batch, 2) for batch in scene.given(case)]
    split = scene.optimizer(case, scaler=scaler(2.0**8)).directions(*parts)
    # Matrices of other shapes are multiplied in another order, and rounded to 5e-4.
    assert apart(flat(split, "lower"), flat(whole, "lower")) < FEW * UNIT[torch.float16]
