"""``MLC``: the accumulated estimate of its authors' code (``m <- first term + gamma m``), call by call."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import problems
from plain_hypergradients import (
    MOVERS,
    Batch,
    Setup,
    combined,
    flat,
    gradient,
    leaves,
    mixed,
    plain_lower,
    plain_upper,
    relative,
)
from reference import Mover, State, Tensors, move

UPPER = Mover(1e-2, betas=(0.9, 0.999))  # the upper optimizer of a Setup
KINDS = [kind for kind in MOVERS if kind != "amsgrad"]


class Plain:
    """MLC written down: both levels, the state of their optimizers, and m, one call at a time."""

    def __init__(self, setup: Setup, inner_steps: int) -> None:
        self.alpha, self.w = setup.alpha, setup.w
        self.states, self.movers = setup.states, setup.movers
        self.upper_states: list[State] = [{} for _ in self.alpha]
        self.inner_steps, self.calls = inner_steps, 0
        self.m: Tensors | None = None
        self.gamma = 0.0

    def call(self, upper: Any, lower: Any) -> None:
        """The estimate m takes in the batches, w steps with the gradient at the old alpha, alpha moves in its turn."""
        at = leaves(self.w)
        d = leaves(gradient(plain_lower(self.alpha, at, lower), at))
        moved = [move(*terms) for terms in zip(self.w, d, self.states, self.movers, strict=True)]
        ahead, here = leaves([x for x, _ in moved]), leaves(self.w)
        g1 = gradient(plain_upper(self.alpha, ahead, upper), ahead)
        g0 = gradient(plain_upper(self.alpha, here, upper), here)
        # S = -d(moved)/d(d), a diagonal: autograd reads it off the optimizer's own formula.
        pull = sum(((x * g).sum() for (x, _), g in zip(moved, g1, strict=True)), torch.zeros(()))
        s_g1 = [-x for x in gradient(pull, d)]
        direct = gradient(plain_upper(self.alpha, ahead, upper), self.alpha)
        first = combined((1.0, direct), (-1.0, mixed(plain_lower, self.alpha, self.w, lower, s_g1)))
        self.gamma = float(flat(combined((1.0, g1), (-1.0, s_g1))) @ flat(g0) / (flat(g0) @ flat(g0)))
        self.m = first if self.m is None else combined((1.0, first), (self.gamma, self.m))
        self.w = [x.detach() for x, _ in moved]
        self.states = [{k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for _, s in moved]
        self.calls += 1
        if self.calls % self.inner_steps == 0:
            pairs = [
                move(a.detach(), m, s, UPPER) for a, m, s in zip(self.alpha, self.m, self.upper_states, strict=True)
            ]
            self.alpha, self.upper_states = leaves([a for a, _ in pairs]), [s for _, s in pairs]
            self.m = None


def batches_of(setup: Setup, call: int) -> tuple[Batch, Batch]:
    """A fresh clean batch and a fresh noisy one."""
    return setup.data[call % 8], setup.data[(3 * call + 1) % 8]


def seeded(call: int) -> int:
    return 100 + call


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_several_upper_updates_call_by_call(kind: str, inner_steps: int) -> None:
    """Directions, both levels and m against the plain one, over seven calls with fresh batches and masks each."""
    setup = Setup(kind)
    plain = Plain(setup, inner_steps)
    optimizer = setup.optimizer(bilevel.MLC, inner_steps=inner_steps)
    gammas = []
    for call in range(7):
        batches = batches_of(setup, call)
        upper, lower = setup.with_masks(*batches, seed=seeded(call))
        plain.call(upper, lower)
        gammas.append(plain.gamma)
        torch.manual_seed(seeded(call))
        stats = optimizer.step(*batches)
        assert stats.upper_moved == ((call + 1) % inner_steps == 0)
        assert relative([p.detach() for p in setup.student.parameters()], plain.w) < 1e-11
        assert relative([p.detach() for p in setup.corrector.parameters()], plain.alpha) < 1e-9  # Adam near 0
        held = optimizer.state_dict()["state"]["accumulated"]
        if plain.m is None:
            assert held == {}
        else:
            assert relative(list(held.values()), plain.m) < 1e-11
    if inner_steps > 1:
        assert any(abs(gamma) > 0.1 for gamma in gammas)  # what was accumulated did count


def test_the_numbers_of_the_papers_code() -> None:
    """``s = lr (1 - dampening)``, for nesterov ``lr (1 + momentum (1 - dampening))``, from a buffer in use; by hand on
    numbers: G = (w - a)^2 / 2, so ``G_aw = -1`` and the first term is ``s g1``.
    """
    for dampening, nesterov in ((0.0, False), (0.4, False), (0.0, True)):
        w, a = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 0.5))
        sgd = torch.optim.SGD([w], lr=0.1, momentum=0.5, dampening=dampening, nesterov=nesterov, weight_decay=0.2)
        sgd.state[w]["momentum_buffer"] = torch.tensor(0.3, dtype=torch.float64)
        optimizer = bilevel.MLC(
            lambda: (w - 1) ** 3,  # noqa: B023 (called within this round)
            lambda: (w - a) ** 2 / 2,  # noqa: B023
            upper=a,
            lower=w,
            upper_optimizer=torch.optim.SGD([a], lr=1.0),
            lower_optimizer=sgd,
            inner_steps=2,
        )
        s = 0.1 * (1 + 0.5 if nesterov else 1 - dampening)
        buffer, m, at = 0.3, 0.0, 2.0
        for call in range(2):
            d = (at - 0.5) + 0.2 * at
            buffer = 0.5 * buffer + (1 - dampening) * d
            ahead = at - 0.1 * (d + 0.5 * buffer if nesterov else buffer)
            g0, g1 = 3 * (at - 1) ** 2, 3 * (ahead - 1) ** 2
            gamma = (1 - s) * g1 * g0 / g0**2
            m = s * g1 + gamma * m
            if call == 1:
                assert optimizer.directions().upper["0"].item() == pytest.approx(m, rel=1e-12)
            optimizer.step()
            at = ahead
            assert w.item() == pytest.approx(at, rel=1e-12)
        assert a.item() == pytest.approx(0.5 - m, rel=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_the_closed_form_of_one_step_on_a_quadratic(rate: float) -> None:
    p = problems.quadratic(seed=2)
    optimizer = bilevel.MLC(
        p.upper_loss,
        p.lower_loss,
        upper=p.upper,
        lower=p.lower,
        upper_optimizer=torch.optim.SGD([p.upper], lr=0.1),
        lower_optimizer=torch.optim.SGD([p.lower], lr=rate),
    )
    alpha, w = p.upper.detach(), p.lower.detach()
    ahead = w - rate * (p.hessian @ w - p.coupling @ alpha - p.offset)
    total = rate * p.coupling.T @ p.upper_hessian @ (ahead - p.target) + p.weight * (alpha - p.anchor)
    torch.testing.assert_close(optimizer.directions().upper["0"], total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_w_takes_ordinary_steps_with_the_old_upper_variables(kind: str) -> None:
    """Bit for bit as in plain torch training, also in the call that moves the upper variables: d came before."""
    ours, plain = Setup(kind), Setup(kind)
    optimizer = ours.optimizer(bilevel.MLC, inner_steps=2)
    for call in range(4):
        upper, lower = batches_of(ours, call)
        torch.manual_seed(call)
        optimizer.step(upper, lower)
        torch.manual_seed(call)
        plain.train(lower)
        for p, q in zip(ours.student.parameters(), plain.student.parameters(), strict=True):
            assert torch.equal(p, q)
        for b, c in zip(ours.student.buffers(), plain.student.buffers(), strict=True):
            assert torch.equal(b, c)  # moved once, by the lower loss
        for p, q in zip(ours.corrector.parameters(), plain.corrector.parameters(), strict=True):
            q.data.copy_(p.data)  # from here on with the new ones


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_calls_of_the_losses(inner_steps: int) -> None:
    """One gradient of G and one mixed product; one gradient of F, and a second one only where gamma needs it."""
    setup = Setup("momentum")
    optimizer = setup.optimizer(bilevel.MLC, inner_steps=inner_steps, verify="never")
    for call in range(4):
        setup.calls = ""
        optimizer.step(*batches_of(setup, call))
        assert setup.calls == ("LUL" if inner_steps == 1 else "LULU")


def test_directions_have_an_upper_part_when_its_turn_has_come() -> None:
    setup = Setup("sgd")
    optimizer = setup.optimizer(bilevel.MLC, inner_steps=2)
    names = [name for name, _ in setup.corrector.named_parameters()]
    seen = []
    for call in range(4):
        directions = optimizer.directions(*batches_of(setup, call))
        optimizer.directions(*batches_of(setup, call))  # looking twice accumulates nothing
        seen.append(list(directions.upper))
        assert list(directions.lower) == [name for name, _ in setup.student.named_parameters()]
        torch.manual_seed(call)
        looked = optimizer.directions(*batches_of(setup, call))
        before = [p.detach().clone() for p in setup.corrector.parameters()]
        torch.manual_seed(call)
        moved = optimizer.step(*batches_of(setup, call)).upper_moved
        assert moved == bool(looked.upper)
        same = all(map(torch.equal, before, setup.corrector.parameters()))
        assert same != moved
        for p, d in zip(setup.corrector.parameters(), looked.upper.values(), strict=False):
            assert p.grad is not None
            assert torch.equal(p.grad, d)
    assert seen == [[], names, [], names]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_checkpoint_between_two_calls(stop: int) -> None:
    """The estimate m and the count of calls are part of the state: stopping anywhere changes no bit."""
    straight, resumed = Setup("momentum"), Setup("momentum", warm_up=0)
    optimizer = straight.optimizer(bilevel.MLC, inner_steps=3)
    for call in range(7):
        if call == stop:
            file = io.BytesIO()
            torch.save([optimizer.state_dict(), straight.student.state_dict(), straight.corrector.state_dict()], file)
            file.seek(0)
            state, student, corrector = torch.load(file)
        torch.manual_seed(call)
        optimizer.step(*batches_of(straight, call))
    resumed.student.load_state_dict(student)
    resumed.corrector.load_state_dict(corrector)
    again = resumed.optimizer(bilevel.MLC, inner_steps=3)
    again.load_state_dict(state)
    for call in range(stop, 7):
        torch.manual_seed(call)
        again.step(*batches_of(resumed, call))
    for p, q in zip(straight.corrector.parameters(), resumed.corrector.parameters(), strict=True):
        assert torch.equal(p, q)
    one, other = optimizer.state_dict()["state"], again.state_dict()["state"]
    assert one["calls"] == other["calls"] == 1
    assert all(torch.equal(one["accumulated"][name], m) for name, m in other["accumulated"].items())
    assert len(one["accumulated"]) == 4


def test_where_the_upper_gradient_vanishes_gamma_is_zero() -> None:
    """At the minimum of F there is nothing to project on: m starts anew, instead of NaN."""
    w, a = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.0, 0.5))
    optimizer = bilevel.MLC(
        lambda: (w - 1) ** 2,
        lambda: (w - a) ** 2 / 2,
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=1.0),
        lower_optimizer=torch.optim.SGD([w], lr=0.5),
        inner_steps=2,
        on_nonfinite="raise",
    )
    optimizer.step()  # w = 0.75; g0 = 0, g1 = -0.5, first term s g1 = -0.25
    assert optimizer.state_dict()["state"]["accumulated"]["0"].item() == -0.25
    w.data.fill_(1.0)
    assert optimizer.directions().upper["0"].item() == -0.25  # the same once more, and 0 times m


class Broken(torch.autograd.Function):
    """The identity with a gradient of NaN: the loss looks well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_gradient_is_not_accumulated(bad: int) -> None:
    """Also in a call whose estimate is not due: it would spoil every later one."""
    setup, good = Setup("sgd"), Setup("sgd")
    upper_loss = setup.upper_loss
    broken = False

    def sometimes(batch: Any) -> Tensor:
        value = upper_loss(batch)
        return Broken.apply(value) if broken else value  # type: ignore[no-any-return]

    optimizer = setup.optimizer(bilevel.MLC, upper_loss=sometimes, inner_steps=2, on_nonfinite="skip")
    expected = good.optimizer(bilevel.MLC, inner_steps=2)
    for call in range(4):
        if call == bad:
            broken = True
            before = [p.detach().clone() for p in (*setup.student.parameters(), *setup.corrector.parameters())]
            stats = optimizer.step(*batches_of(setup, call))
            assert (stats.skipped, stats.upper_moved) == (True, False)
            after = [*setup.student.parameters(), *setup.corrector.parameters()]
            assert all(map(torch.equal, before, after))
            broken = False
        for one in (optimizer, expected):
            torch.manual_seed(call)
            assert not one.step(*batches_of(setup, call)).skipped
    for p, q in zip(setup.corrector.parameters(), good.corrector.parameters(), strict=True):
        assert torch.equal(p, q)

    broken = True
    optimizer = setup.optimizer(bilevel.MLC, upper_loss=sometimes, inner_steps=2)
    with pytest.raises(bilevel.NonFiniteError, match=r"MLC\.step: the accumulated estimate held NaN"):
        optimizer.step(*batches_of(setup, 0))
    assert optimizer.state_dict()["state"] == {"accumulated": {}, "calls": 0}


def test_a_corrector_that_is_not_used_is_an_error() -> None:
    setup = Setup("sgd")

    def hard(batch: Any) -> Tensor:
        return nn.functional.cross_entropy(setup.student(batch[0]), batch[1])

    for product in ("auto", "reverse", "difference"):
        with pytest.raises(bilevel.ClosureError, match="lower_loss does not depend on any upper variable"):
            setup.optimizer(bilevel.MLC, lower_loss=hard, product=product).step(*setup.data[:2])


@pytest.mark.parametrize(("product", "tolerance"), [("forward", 1e-12), ("reverse", 1e-12), ("difference", 1e-7)])
def test_every_route_of_the_product(product: str, tolerance: float) -> None:
    answers = []
    for route in ("auto", product):
        setup = Setup("momentum")
        optimizer = setup.optimizer(bilevel.MLC, product=route)
        torch.manual_seed(0)
        directions = optimizer.directions(*setup.data[:2])
        assert directions.stats.product == ("forward" if route == "auto" else route)
        answers.append(list(directions.upper.values()))
    assert relative(*answers) < tolerance
