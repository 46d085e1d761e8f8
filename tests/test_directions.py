"""Directions and full steps of BOME and EBOMLC against ``tests/reference.py``, over every option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import bilevel
import reference
from bilevel.methods.dynamic_barrier import DynamicBarrier
from reference import Mover, Options

INPUTS, HIDDEN, CLASSES, SAMPLES = 3, 4, 3, 6
RHO = 0.2


class Classifier(nn.Module):
    """The lower level of the tests: two layers, whose hidden features a corrector may read."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(INPUTS, HIDDEN)
        self.out = nn.Linear(HIDDEN, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


class Corrector(nn.Module):
    """The upper level: features and a given label in, a distribution over labels out."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN + CLASSES, 5)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, features: Tensor, label: Tensor) -> Tensor:
        given = one_hot(label, CLASSES).to(features.dtype)
        return self.out(self.mix(torch.cat([features, given], 1)).tanh()).softmax(1)


@dataclass(frozen=True)
class Case:
    """One way to build an optimizer, said once for the library and once for the reference."""

    options: Options = field(default_factory=Options)
    lower: tuple[Mover, Mover] = (Mover(0.3), Mover(0.1))
    """Settings of the two parameter groups of the classifier: hidden layer and output layer."""
    upper: Mover = field(default_factory=lambda: Mover(0.2))
    mixture: bool = False
    """Whether F depends on alpha (EBOMLC's mixture) or not (plain cross-entropy)."""
    batches: int = 1
    product: str = "auto"
    seed: int = 0


SGD = (Mover(0.3), Mover(0.1))
MOMENTUM = (Mover(0.3, momentum=0.9, weight_decay=5e-2), Mover(0.1, momentum=0.9, weight_decay=5e-2))
DAMPENED = (Mover(0.3, momentum=0.8, dampening=0.3), Mover(0.1, momentum=0.7, dampening=0.3))
NESTEROV = (Mover(0.2, momentum=0.9, nesterov=True, weight_decay=1e-2), Mover(0.1, momentum=0.9, nesterov=True))
DECAYED = (Mover(0.3, weight_decay=0.2), Mover(0.1, weight_decay=0.1))
ADAM = (Mover(0.05, betas=(0.9, 0.99), weight_decay=1e-2), Mover(0.02, betas=(0.8, 0.9)))
AMSGRAD = (Mover(0.05, betas=(0.9, 0.99), amsgrad=True), Mover(0.02, betas=(0.5, 0.6), amsgrad=True))
ADAMW = (
    Mover(0.05, betas=(0.9, 0.99), weight_decay=0.3, decoupled=True),
    Mover(0.02, betas=(0.9, 0.99), weight_decay=0.1, decoupled=True),
)
LOWER = [SGD, MOMENTUM, DAMPENED, NESTEROV, DECAYED, ADAM, AMSGRAD, ADAMW]
UPPER = [Mover(0.2), Mover(0.1, momentum=0.9, weight_decay=1e-2), Mover(0.01, betas=(0.9, 0.999))]
READINGS = ["value_function", "difference", "unrolled"]


def torch_optimizer(groups: Sequence[tuple[nn.Module, Mover]]) -> torch.optim.Optimizer:
    """Build the torch optimizer that ``Mover`` describes, one parameter group a module."""
    _, first = groups[0]
    described: list[dict[str, Any]] = []
    for module, m in groups:
        group: dict[str, Any] = {"params": module.parameters(), "lr": m.lr, "weight_decay": m.weight_decay}
        if m.betas is None:
            group |= {"momentum": m.momentum, "dampening": m.dampening, "nesterov": m.nesterov}
        else:
            group |= {"betas": m.betas, "eps": m.adam_eps, "amsgrad": m.amsgrad}
        described.append(group)
    if first.betas is None:
        return torch.optim.SGD(described)
    return torch.optim.AdamW(described) if first.decoupled else torch.optim.Adam(described)


class Twins:
    """One problem twice: modules and closures for the library, lists of tensors and functions for the reference."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = torch.Generator().manual_seed(case.seed)
        with torch.random.fork_rng():
            torch.manual_seed(case.seed)
            self.classifier, self.corrector = Classifier().double(), Corrector().double()
        for parameter in (*self.classifier.parameters(), *self.corrector.parameters()):
            parameter.data.mul_(2)  # torch's default start is nearly linear
        self.optimizer = self._build()
        self.reference = reference.Reference(
            mixture if case.mixture else plain,
            corrected,
            list(self.corrector.parameters()),
            list(self.classifier.parameters()),
            [case.upper] * 4,
            [case.lower[0]] * 2 + [case.lower[1]] * 2,
            case.options,
        )

    def draw(self) -> tuple[Any, list[Any]]:
        """Fresh batches: one for F, and one or ``inner_steps`` for G."""

        def batch() -> tuple[Tensor, Tensor]:
            x = torch.randn(SAMPLES, INPUTS, generator=self.random, dtype=torch.float64)
            return x, torch.randint(CLASSES, (SAMPLES,), generator=self.random)

        return batch(), [batch() for _ in range(self.case.batches)]

    def _build(self) -> DynamicBarrier:
        o = self.case.options
        common: dict[str, Any] = {
            "upper": self.corrector,
            "lower": self.classifier,
            "upper_optimizer": torch_optimizer([(self.corrector, self.case.upper)]),
            "lower_optimizer": torch_optimizer(
                [(self.classifier.hidden, self.case.lower[0]), (self.classifier.out, self.case.lower[1])]
            ),
            "product": self.case.product,
        }
        shared = ("inner_lr", "inner_step", "value_gradient", "step_from", "eps", "cutoff", "multiplier_max")
        common |= {name: getattr(o, name) for name in shared}
        if o.barrier == "aligned" and o.inner_steps == 1:
            return bilevel.EBOMLC(self.upper_loss, self.lower_loss, delta=o.delta, xi=o.xi, **common)
        assert o.xi == 1.0, "BOME is not damped"
        barrier = {
            "gradient_norm": bilevel.barrier.GradientNorm,
            "value": bilevel.barrier.Value,
            "aligned": bilevel.barrier.Aligned,
        }[o.barrier](o.delta)
        return bilevel.BOME(self.upper_loss, self.lower_loss, barrier=barrier, inner_steps=o.inner_steps, **common)

    def upper_loss(self, batch: Any) -> Tensor:
        x, y = batch
        if not self.case.mixture:
            return cross_entropy(self.classifier(x), y)
        features = self.classifier.features(x)
        p = RHO * self.classifier.out(features).softmax(1) + (1 - RHO) * self.corrector(features, y)
        return -p.gather(1, y[:, None]).log().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        x, noisy = batch
        features = self.classifier.features(x)
        return cross_entropy(self.classifier.out(features), self.corrector(features, noisy))


def hidden(w: Sequence[Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ w[0].T + w[1])


def log_probabilities(w: Sequence[Tensor], x: Tensor) -> Tensor:
    z = hidden(w, x) @ w[2].T + w[3]
    return z - z.exp().sum(1, keepdim=True).log()


def targets(alpha: Sequence[Tensor], features: Tensor, label: Tensor) -> Tensor:
    given = torch.eye(CLASSES, dtype=torch.float64)[label]
    z = torch.tanh(torch.cat([features, given], 1) @ alpha[0].T + alpha[1]) @ alpha[2].T + alpha[3]
    return z.exp() / z.exp().sum(1, keepdim=True)


def plain(alpha: Sequence[Tensor], w: Sequence[Tensor], batch: Any) -> Tensor:
    x, y = batch
    return -log_probabilities(w, x)[torch.arange(len(y)), y].mean()


def mixture(alpha: Sequence[Tensor], w: Sequence[Tensor], batch: Any) -> Tensor:
    x, y = batch
    p = RHO * log_probabilities(w, x).exp() + (1 - RHO) * targets(alpha, hidden(w, x), y)
    return -p[torch.arange(len(y)), y].log().mean()


def corrected(alpha: Sequence[Tensor], w: Sequence[Tensor], batch: Any) -> Tensor:
    x, noisy = batch
    return -(targets(alpha, hidden(w, x), noisy) * log_probabilities(w, x)).sum(1).mean()


def compare(case: Case, *, steps: int = 4, tolerance: float = 1e-10) -> list[reference.Answer]:
    """Take ``steps`` steps on fresh batches in both worlds: each step's directions, stats and end point agree."""
    twins = Twins(case)
    answers = []
    for _ in range(steps):
        upper_batch, lower_batches = twins.draw()
        expected = twins.reference.directions(upper_batch, lower_batches)
        found = twins.optimizer.directions(upper_batch, *lower_batches)
        close(found.upper.values(), expected.upper, tolerance)
        close(found.lower.values(), expected.lower, tolerance)
        if case.options.step_from == "lookahead":
            assert found.start is not None
            close(found.start.values(), expected.start, tolerance)
        else:
            assert found.start is None
        stats = twins.optimizer.step(upper_batch, *lower_batches)
        assert isinstance(stats, bilevel.BarrierStats)
        assert stats.multiplier.item() == pytest.approx(expected.multiplier, rel=tolerance, abs=tolerance)
        assert stats.constraint.item() == pytest.approx(expected.constraint, rel=tolerance, abs=1e-14)
        assert stats.gradient_norm.item() == pytest.approx(expected.gradient_norm, rel=tolerance)
        assert stats.active.item() == (expected.multiplier > 0)
        answers.append(twins.reference.step(upper_batch, lower_batches))
        # 1e-8: Adam divides by the root of squared gradients, and so enlarges rounding errors where they are small.
        close(twins.corrector.parameters(), twins.reference.alpha, 100 * tolerance)
        close(twins.classifier.parameters(), twins.reference.w, 100 * tolerance)
    return answers


def close(found: Any, expected: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


bome, ebomlc = Case(), Case(Options(barrier="aligned", delta=0.25, xi=0.5), mixture=True)


def with_options(case: Case, **changes: Any) -> Case:
    return replace(case, options=replace(case.options, **changes))


TABLE = {
    "bome": bome,
    "ebomlc": ebomlc,
    "three steps, one batch": with_options(bome, inner_steps=3),
    "three steps, three batches": replace(with_options(bome, inner_steps=3), batches=3),
    "two steps, two batches, unrolled": replace(
        with_options(bome, inner_steps=2, value_gradient="unrolled"), batches=2
    ),
    "inner_lr": with_options(bome, inner_lr=0.05, inner_steps=2),
    "one rate for all groups": replace(bome, lower=(Mover(0.2), Mover(0.2))),
    "barrier value": with_options(bome, barrier="value", delta=0.4),
    "barrier aligned, F of alpha": replace(with_options(bome, barrier="aligned", inner_steps=2), mixture=True),
    "gradient norm, F of alpha": replace(bome, mixture=True),
    "difference": with_options(bome, value_gradient="difference", inner_steps=2),
    "unrolled": with_options(bome, value_gradient="unrolled", inner_steps=2),
    "unrolled, forward": replace(with_options(bome, value_gradient="unrolled", inner_steps=2), product="forward"),
    "unrolled, reverse": replace(with_options(bome, value_gradient="unrolled", inner_steps=2), product="reverse"),
    "step from inner": with_options(bome, step_from="lookahead", value_gradient="difference"),
    "step from inner, adam": replace(with_options(ebomlc, step_from="lookahead"), lower=ADAM),
    "preview of momentum": replace(with_options(bome, inner_step="optimizer", inner_steps=2), lower=MOMENTUM),
    "preview of dampening": replace(with_options(bome, inner_step="optimizer", inner_steps=2), lower=DAMPENED),
    "preview of nesterov": replace(with_options(bome, inner_step="optimizer", inner_steps=2), lower=NESTEROV),
    "preview of weight decay": replace(with_options(bome, inner_step="optimizer"), lower=DECAYED),
    "preview of adam": replace(with_options(bome, inner_step="optimizer", inner_steps=2), lower=ADAM),
    "preview of amsgrad": replace(with_options(bome, inner_step="optimizer", inner_steps=2), lower=AMSGRAD),
    "preview of adamw": replace(with_options(bome, inner_step="optimizer", inner_steps=2), lower=ADAMW),
    "preview with inner_lr": replace(with_options(bome, inner_step="optimizer", inner_lr=0.07), lower=ADAMW),
    "unrolled preview of momentum": replace(
        with_options(bome, inner_step="optimizer", inner_steps=3, value_gradient="unrolled"), lower=MOMENTUM
    ),
    "unrolled preview of nesterov": replace(
        with_options(bome, inner_step="optimizer", inner_steps=3, value_gradient="unrolled"), lower=NESTEROV
    ),
    "unrolled preview of adam": replace(
        with_options(bome, inner_step="optimizer", inner_steps=3, value_gradient="unrolled"), lower=ADAM
    ),
    "unrolled preview of amsgrad": replace(
        with_options(bome, inner_step="optimizer", inner_steps=3, value_gradient="unrolled"), lower=AMSGRAD
    ),
    "unrolled preview of adamw": replace(
        with_options(bome, inner_step="optimizer", inner_steps=3, value_gradient="unrolled"), lower=ADAMW
    ),
    "plain inner step beside momentum": replace(with_options(bome, inner_steps=2), lower=MOMENTUM),
    "plain inner step beside adamw": replace(with_options(bome, inner_steps=2), lower=ADAMW),
    "inactive": with_options(bome, delta=0.0),
    "eps": with_options(bome, eps=0.3),
    "eps 0": with_options(bome, eps=0.0, cutoff=0.0),
    "cutoff above the norm": with_options(bome, cutoff=1e6),
    "multiplier_max": with_options(bome, delta=2.0, multiplier_max=0.1),
    "ebomlc, multiplier_max before xi": with_options(ebomlc, delta=2.0, multiplier_max=0.1),
    "ebomlc, plain F": replace(ebomlc, mixture=False),
    "ebomlc, difference from inner": with_options(ebomlc, value_gradient="difference", step_from="lookahead"),
    "ebomlc, unrolled": with_options(ebomlc, value_gradient="unrolled"),
    "ebomlc, the paper's optimizers": replace(ebomlc, lower=MOMENTUM, upper=UPPER[2]),
    "ebomlc, preview from inner": replace(
        with_options(ebomlc, inner_step="optimizer", value_gradient="difference", step_from="lookahead"), lower=MOMENTUM
    ),
    "upper momentum": replace(bome, upper=UPPER[1]),
}


@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE.keys())
def test_four_steps_equal_the_reference(case: Case) -> None:
    compare(case)


def test_the_table_reaches_every_branch_of_the_multiplier() -> None:
    def multipliers(name: str) -> set[float]:
        return {answer.multiplier for answer in compare(TABLE[name])}

    assert all(m > 0 for m in multipliers("bome") | multipliers("ebomlc"))
    assert 0.0 in multipliers("inactive")
    assert multipliers("cutoff above the norm") == {0.0}
    assert multipliers("multiplier_max") == {0.1}
    assert multipliers("ebomlc, multiplier_max before xi") == {0.05}


def test_the_difference_route_approximates_the_reference() -> None:
    # Two gradients half a cube root of the rounding unit apart: about ten digits of the products are right.
    case = replace(TABLE["unrolled"], product="difference")
    compare(case, tolerance=1e-7)
    compare(replace(TABLE["unrolled preview of adam"], product="difference"), steps=2, tolerance=1e-6)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    aligned = draw(st.booleans())
    inner_steps = 1 if aligned else draw(st.integers(1, 3))
    options = Options(
        inner_steps=inner_steps,
        inner_lr=draw(st.sampled_from([None, 0.03, 0.2])),
        inner_step=draw(st.sampled_from(["gradient", "optimizer"])),
        barrier="aligned" if aligned else draw(st.sampled_from(["gradient_norm", "value", "aligned"])),
        delta=draw(st.sampled_from([0.0, 0.25, 1.0])),
        xi=draw(st.sampled_from([0.1, 0.5, 1.0])) if aligned else 1.0,
        value_gradient=draw(st.sampled_from(READINGS)),
        step_from=draw(st.sampled_from(["current", "lookahead"])),
        eps=draw(st.sampled_from([0.0, 1e-8, 1e-2])),
        cutoff=draw(st.sampled_from([0.0, 1e-12, 1e-3])),
        multiplier_max=draw(st.sampled_from([None, None, 0.3])),
    )
    return Case(
        options,
        lower=draw(st.sampled_from(LOWER)),
        upper=draw(st.sampled_from(UPPER)),
        mixture=draw(st.booleans()),
        batches=draw(st.sampled_from([1, inner_steps])),
        product=draw(st.sampled_from(["auto", "forward", "reverse"])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.thorough
@settings(max_examples=80, deadline=None, derandomize=True)
@given(cases())
def test_options_in_any_combination_equal_the_reference(case: Case) -> None:
    compare(case, steps=2)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, derandomize=True)
@given(cases())
def test_many_more_combinations_over_four_steps(case: Case) -> None:
    compare(case)
