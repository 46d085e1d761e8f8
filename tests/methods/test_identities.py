"""What the papers' formulas say of grad Q and of the multiplier, checked against numbers got without the library.

``grad_q`` reads grad Q off the directions: an F without gradient makes them ``delta * grad q``, here with delta = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, one_hot

import bilevel

CLASSES = 3
Loss = Callable[[], Tensor]


class Student(nn.Module):
    """Two layers; a corrector may read its hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Setting:
    """A student, a corrector of its features, a noisy and a clean batch, in float64."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.student = Student().double()
            self.corrector = nn.Sequential(nn.Linear(8 + CLASSES, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
            self.x, self.given = torch.randn(12, 5).double(), torch.randint(CLASSES, (12,))
            self.clean_x, self.clean_y = torch.randn(10, 5).double(), torch.randint(CLASSES, (10,))

    def target(self, features: Tensor) -> Tensor:
        label = one_hot(self.given, CLASSES).to(features.dtype)
        return self.corrector(torch.cat([features, label], 1)).softmax(1)

    def lower_loss(self) -> Tensor:
        features = self.student.features(self.x)
        return cross_entropy(self.student.head(features), self.target(bilevel.hold(features)))

    def detached_lower_loss(self) -> Tensor:
        """The same at the current point; at another point its targets are other ones."""
        features = self.student.features(self.x)
        return cross_entropy(self.student.head(features), self.target(features.detach()))

    def upper_loss(self) -> Tensor:
        return cross_entropy(self.student(self.clean_x), self.clean_y)

    def silent_upper_loss(self) -> Tensor:
        return 0.0 * sum(p.sum() for p in self.student.parameters())

    def build(self, kind: type[Any] = bilevel.BOME, upper_loss: Loss | None = None, **options: Any) -> Any:
        lower_loss = options.pop("lower_loss", self.lower_loss)
        return kind(
            upper_loss or self.upper_loss,
            lower_loss,
            upper=self.corrector,
            lower=self.student,
            upper_optimizer=torch.optim.SGD(self.corrector.parameters(), lr=0.1),
            lower_optimizer=torch.optim.SGD(self.student.parameters(), lr=0.1),
            **options,
        )

    def grad_q(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Grad Q over both levels, each flattened."""
        barrier = bilevel.barrier.GradientNorm(1.0)
        optimizer = self.build(upper_loss=self.silent_upper_loss, barrier=barrier, eps=0.0, cutoff=0.0, **options)
        directions = optimizer.directions()
        assert directions.stats.multiplier.item() == 1.0
        return flat(directions.upper.values()), flat(directions.lower.values())

    def gradients(self, loss: Loss) -> tuple[Tensor, Tensor]:
        """Plain gradients of a loss over both levels, each flattened."""
        upper, lower = list(self.corrector.parameters()), list(self.student.parameters())
        found = torch.autograd.grad(loss(), [*upper, *lower], materialize_grads=True)
        return flat(found[: len(upper)]), flat(found[len(upper) :])


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


# The gradient of Q in alpha (A20)


@pytest.mark.parametrize("reading", ["value_function", "difference"])
@pytest.mark.parametrize("seed", range(3))
def test_grad_alpha_q_is_the_corrector_pulled_by_the_change_of_log_probabilities(seed: int, reading: str) -> None:
    s, eta = Setting(seed), 0.3
    found, _ = s.grad_q(inner_lr=eta, value_gradient=reading)

    target = s.target(s.student.features(s.x).detach())
    before = s.student(s.x).log_softmax(1)
    gradient = torch.autograd.grad(-(target.detach() * before).sum(1).mean(), list(s.student.parameters()))
    moved = {n: p - eta * g for (n, p), g in zip(s.student.named_parameters(), gradient, strict=True)}
    after = torch.func.functional_call(s.student, moved, (s.x,)).log_softmax(1)
    pulled = (target * (after - before).detach()).sum(1).mean()
    expected = flat(torch.autograd.grad(pulled, list(s.corrector.parameters())))

    assert found.norm() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def test_without_hold_the_targets_move_along_and_the_identity_is_lost() -> None:
    s = Setting()
    held, _ = s.grad_q(inner_lr=0.3)
    unheld, _ = s.grad_q(inner_lr=0.3, lower_loss=s.detached_lower_loss)
    assert (held - unheld).norm() > 1e-2 * held.norm()


@pytest.mark.parametrize("reading", ["value_function", "difference", "unrolled"])
@pytest.mark.parametrize("kind", [bilevel.BOME, bilevel.EBOMLC])
@pytest.mark.parametrize("fault", ["detached", "hard labels", "argmax", "no_grad"])
def test_a_target_that_carries_no_gradient_is_refused(fault: str, kind: type[Any], reading: str) -> None:
    s = Setting()

    def lower_loss() -> Tensor:
        if fault == "hard labels":
            return cross_entropy(s.student(s.x), s.given)
        if fault == "no_grad":
            with torch.no_grad():
                return cross_entropy(s.student(s.x), s.target(s.student.features(s.x)))
        target = s.target(s.student.features(s.x).detach())
        return cross_entropy(s.student(s.x), target.detach() if fault == "detached" else target.argmax(1))

    before = flat([*s.student.parameters(), *s.corrector.parameters()])
    message = "without a graph" if fault == "no_grad" else "lower_loss does not depend on any upper variable"
    with pytest.raises(bilevel.ClosureError, match=message):
        s.build(kind, lower_loss=lower_loss, value_gradient=reading).step()
    assert torch.equal(flat([*s.student.parameters(), *s.corrector.parameters()]), before)


# The three readings of grad Q (A1)


def test_unrolled_is_twice_difference_as_the_inner_rate_vanishes_in_both_levels() -> None:
    s = Setting()
    distances = []
    for eta in (1e-2, 1e-3, 1e-4):
        difference, unrolled = (s.grad_q(inner_lr=eta, value_gradient=r) for r in ("difference", "unrolled"))
        distances.append([float((c - 2 * b).norm() / b.norm()) for b, c in zip(difference, unrolled, strict=True)])
    for level in zip(*distances, strict=True):
        assert level[0] < 0.1
        # first order in eta: each tenth of the rate leaves a tenth of the distance from the factor 2
        assert level[1] / level[0] == pytest.approx(0.1, rel=0.05)
        assert level[2] / level[1] == pytest.approx(0.1, rel=0.05)


def test_difference_and_unrolled_are_of_the_order_of_the_inner_rate() -> None:
    s = Setting()
    for reading in ("difference", "unrolled"):
        sizes = [torch.cat(s.grad_q(inner_lr=eta, value_gradient=reading)).norm().item() for eta in (1e-2, 1e-3)]
        assert sizes[1] / sizes[0] == pytest.approx(0.1, rel=0.05)


def test_grad_w_of_the_value_function_is_grad_g_whatever_the_inner_rate() -> None:
    s = Setting()
    _, grad_w = s.gradients(s.detached_lower_loss)
    for eta in (1.0, 0.1, 1e-3):
        for inner_steps in (1, 3):
            _, found = s.grad_q(inner_lr=eta, inner_steps=inner_steps)
            assert torch.equal(found, grad_w)


# What the constraint does to the direction (5.7)


def setting_of_the_constraint(**options: Any) -> dict[str, float]:
    """Products of one EBOMLC direction with an independently computed grad q."""
    s, eta = Setting(), 0.2

    def upper_loss() -> Tensor:  # EBOMLC's mixture: depends on both levels
        features = s.student.features(s.clean_x)
        guess = s.corrector(torch.cat([features.detach(), one_hot(s.clean_y, CLASSES).double()], 1)).softmax(1)
        p = 0.2 * s.student.head(features).softmax(1) + 0.8 * guess
        return -p.gather(1, s.clean_y[:, None]).log().mean()

    q_upper, q_lower = s.grad_q(inner_lr=eta)
    f_upper, f_lower = s.gradients(upper_loss)
    options = {"delta": 1.0, "eps": 0.0, "cutoff": 0.0, "inner_lr": eta, **options}
    directions = s.build(bilevel.EBOMLC, upper_loss, **options).directions()
    assert directions.stats.active.item(), "the barrier must be active here"
    n2 = float(q_upper @ q_upper + q_lower @ q_lower)
    return {
        "q.d": float(q_upper @ flat(directions.upper.values()) + q_lower @ flat(directions.lower.values())),
        "phi": options["delta"] * n2 + float(f_upper @ q_upper),
        "n2": n2,
        "beta": max(options["delta"] - float(f_lower @ q_lower) / n2, 0.0),
        "multiplier": directions.stats.multiplier.item(),
    }


def test_an_active_barrier_meets_its_constraint_with_equality() -> None:
    s = setting_of_the_constraint(xi=1.0)
    assert s["q.d"] == pytest.approx(s["phi"], rel=1e-12)
    assert s["multiplier"] == pytest.approx(s["beta"], rel=1e-12)


@pytest.mark.parametrize("xi", [0.1, 0.5, 0.9])
def test_damping_violates_the_constraint_by_what_it_takes_away(xi: float) -> None:
    s = setting_of_the_constraint(xi=xi)
    assert s["multiplier"] == pytest.approx(xi * s["beta"], rel=1e-12)
    assert s["q.d"] < s["phi"]
    assert s["q.d"] == pytest.approx(s["phi"] - (1 - xi) * s["beta"] * s["n2"], rel=1e-12)


def test_an_inactive_barrier_leaves_grad_f_alone() -> None:
    s = Setting()
    # The lower loss is the upper one, of the same labels: the levels agree, and delta = 0 asks for nothing more.
    lower_loss = lambda: s.upper_loss() + 0.0 * s.lower_loss()  # noqa: E731
    directions = s.build(barrier=bilevel.barrier.GradientNorm(0.0), lower_loss=lower_loss).directions()
    assert not directions.stats.active.item()
    assert torch.equal(flat(directions.lower.values()), s.gradients(s.upper_loss)[1])


@pytest.mark.parametrize("kind", [bilevel.BOME, bilevel.EBOMLC])
def test_the_multiplier_tends_to_delta_as_the_lower_gradient_grows(kind: type[Any]) -> None:
    s, delta = Setting(), 0.25
    own = {"delta": delta, "xi": 1.0} if kind is bilevel.EBOMLC else {"barrier": bilevel.barrier.GradientNorm(delta)}
    multipliers, norms = [], []
    for scale in (1e1, 1e2, 1e3, 1e4):
        options = {"eps": 0.0, "inner_lr": 0.1 / scale, **own}  # the inner point, and so the shape of q, stays
        stats = s.build(kind, lower_loss=lambda k=scale: k * s.lower_loss(), **options).directions().stats
        multipliers.append(stats.multiplier.item())
        norms.append(stats.gradient_norm.item())
    gaps = [abs(m - delta) for m in multipliers]
    assert gaps[0] > 1e-4
    for larger, smaller in pairwise(gaps):
        assert smaller == pytest.approx(larger / 10, rel=1e-6)
    # so the pull of q does not fade, as the EBOMLC paper says it would: it grows like delta |grad q|
    assert multipliers[-1] * norms[-1] == pytest.approx(delta * norms[-1], rel=1e-3)
    assert norms[-1] == pytest.approx(1000 * norms[0], rel=1e-12)


# What grad_alpha Q teaches (5.7, item 12)


def test_free_soft_labels_trained_on_q_alone_go_to_the_students_predictions() -> None:
    s = Setting()
    free = nn.Parameter(torch.randn(12, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    adam = torch.optim.Adam([free], lr=0.05)
    optimizer = bilevel.BOME(
        s.silent_upper_loss,
        lambda: cross_entropy(s.student(s.x), free.softmax(1)),
        upper=free,
        lower=s.student,
        upper_optimizer=adam,
        lower_optimizer=torch.optim.SGD(s.student.parameters(), lr=0.1),
    )

    def divergence() -> float:
        return kl_div(free.log_softmax(1), s.student(s.x).softmax(1), reduction="batchmean").item()

    student = flat(s.student.parameters())
    first, far = optimizer.directions().stats.constraint.item(), divergence()
    for _ in range(300):
        directions = optimizer.directions()
        optimizer.apply(replace(directions, lower={}))  # the labels move, the student stays
    last = optimizer.directions().stats.constraint.item()
    assert torch.equal(flat(s.student.parameters()), student)
    assert first > 1e-3
    assert 0 < last < 1e-3 * first
    assert divergence() < 0.5 * far
