"""``EMLC``: the sum of equation 11, its blocks paired in the right order, and the identities of the one-step form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import problems
from plain_hypergradients import (
    MOVERS,
    Setup,
    batch_of,
    combined,
    flat,
    gradient,
    leaves,
    logits,
    mixed,
    plain_lower,
    plain_upper,
    relative,
    step,
    targets,
)
from reference import Tensors

SEED = 3
every_memory = pytest.mark.parametrize("memory", ["store", "replay"])


def found(setup: Setup, batches: Sequence[Any], **options: Any) -> Tensors:
    optimizer = setup.optimizer(bilevel.EMLC, **options)
    torch.manual_seed(SEED)
    return list(optimizer.directions(*batches).upper.values())


def walk(setup: Setup, lower_batches: Sequence[Any], steps: int) -> list[Tensors]:
    """``w_0 ... w_k`` by the textbook step of the user's own optimizer."""
    points, states = [setup.w], setup.states
    alpha = [a.detach() for a in setup.alpha]
    for t in range(steps):
        moved, states = step(plain_lower, alpha, leaves(points[-1]), states, setup.movers, batch_of(lower_batches, t))
        points.append([x.detach() for x in moved])
        states = [{k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for s in states]
    return points


def equation_11(
    setup: Setup, batches: Sequence[Any], steps: int, discount: float | None = None, *, backwards: bool = False
) -> Tensors:
    """``f_a - sum_tau gamma^(k-1-tau) G_aw(w_tau) (lr g)``, term by term, each by double backward.

    ``backwards`` pairs the blocks as the authors' code does: the last one with the first targets.
    """
    upper, *lower = setup.with_masks(*batches, seed=SEED)
    points = walk(setup, lower, steps)
    alpha, end = setup.alpha, leaves(points[-1])
    f = plain_upper(alpha, end, upper)
    total = [x.detach() for x in gradient(f, alpha)]
    g = gradient(plain_upper(alpha, end, upper), end)
    rates = [mover.lr for mover in setup.movers]
    for tau in range(steps):
        age = tau if backwards else steps - 1 - tau
        v = [lr * (1 - lr if discount is None else discount) ** age * x for lr, x in zip(rates, g, strict=True)]
        total = combined((1.0, total), (-1.0, mixed(plain_lower, alpha, points[tau], batch_of(lower, tau), v)))
    return total


# --- the formula --------------------------------------------------------------------------------------------------


@every_memory
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("discount", [None, 0.0, 0.5, 1.0])
def test_the_closed_form_of_a_quadratic(discount: float | None, steps: int, memory: str) -> None:
    """``G_aw = -B'`` everywhere, so the sum is ``lr (1 + gamma + ... + gamma^(k-1)) B' grad_w F(w_k)``."""
    rate = 0.15
    p = problems.quadratic(seed=1)
    optimizer = bilevel.EMLC(
        p.upper_loss,
        p.lower_loss,
        upper=p.upper,
        lower=p.lower,
        upper_optimizer=torch.optim.SGD([p.upper], lr=0.1),
        lower_optimizer=torch.optim.SGD([p.lower], lr=rate),
        inner_steps=steps,
        discount=discount,
        memory=memory,  # type: ignore[arg-type]
    )
    alpha, w = p.upper.detach(), p.lower.detach()
    power = torch.linalg.matrix_power(torch.eye(4).double() - rate * p.hessian, steps)
    end = p.lower_optimum(alpha) + power @ (w - p.lower_optimum(alpha))
    gamma = 1 - rate if discount is None else discount
    weight = rate * sum(gamma**age for age in range(steps))
    through = weight * p.coupling.T @ p.upper_hessian @ (end - p.target)
    total = p.weight * (alpha - p.anchor) + through
    torch.testing.assert_close(optimizer.directions().upper["0"], total, rtol=1e-12, atol=1e-12)


@every_memory
@pytest.mark.parametrize("product", ["auto", "forward", "reverse"])
@pytest.mark.parametrize(("steps", "batches"), [(1, 1), (3, 3), (3, 1)])
def test_equation_11_on_a_network(steps: int, batches: int, product: str, memory: str) -> None:
    """BatchNorm in training mode, dropout, ``1 - lr`` of each group as the discount."""
    setup = Setup("sgd")
    data = setup.data[: batches + 1]
    total = equation_11(setup, data, steps)
    assert relative(found(setup, data, inner_steps=steps, product=product, memory=memory), total) < 1e-12
    alpha = setup.alpha
    upper, *lower = setup.with_masks(*data, seed=SEED)
    direct = gradient(plain_upper(alpha, walk(setup, lower, steps)[-1], upper), alpha)
    assert relative(direct, total) > 0.2  # the sum is a large part of the whole


@every_memory
@pytest.mark.parametrize("kind", MOVERS)
def test_real_steps_of_any_optimizer_and_the_derivative_of_plain_ones(kind: str, memory: str) -> None:
    """Momentum, decay and Adam move w; the derivative is that of gradient descent with the group's rate, as in the
    authors' code.
    """
    setup = Setup(kind)
    total = equation_11(setup, setup.data[:4], 3)
    assert relative(found(setup, setup.data[:4], inner_steps=3, memory=memory), total) < 1e-12


@every_memory
@pytest.mark.parametrize("discount", [0.0, 0.3, 1.0])
def test_a_given_discount(discount: float, memory: str) -> None:
    setup = Setup("momentum")
    total = equation_11(setup, setup.data[:4], 3, discount)
    assert relative(found(setup, setup.data[:4], inner_steps=3, discount=discount, memory=memory), total) < 1e-12
    if discount == 0:  # the last step alone counts
        last = equation_11(setup, setup.data[:4], 3, 1e-30)
        assert relative(total, last) < 1e-15


@every_memory
def test_each_block_is_paired_with_its_own_step(memory: str) -> None:
    """The authors' code pairs the last step's block with the first targets, which is another number."""
    setup = Setup("sgd")
    data = setup.data[:4]
    answer = found(setup, data, inner_steps=3, discount=0.3, memory=memory)
    assert relative(answer, equation_11(setup, data, 3, 0.3)) < 1e-12
    assert relative(answer, equation_11(setup, data, 3, 0.3, backwards=True)) > 0.1


def test_products_by_difference() -> None:
    setup = Setup("momentum")
    total = equation_11(setup, setup.data[:4], 3)
    assert relative(found(setup, setup.data[:4], inner_steps=3, product="difference"), total) < 1e-7


def test_proposition_3_sample_by_sample() -> None:
    """``(lr/n) sum_i [J_w(log p_i) g]' J_a(q_i)``: the paper's form for cross-entropy, in forward mode, per sample."""
    setup = Setup("sgd")
    for group in setup.lower_optimizer.param_groups:
        group["lr"] = 0.2
    upper, lower = setup.with_masks(*setup.data[:2], seed=SEED)
    moved = [0.2] * len(setup.w)
    at = leaves(setup.w)
    slope = gradient(plain_lower([a.detach() for a in setup.alpha], at, lower), at)
    end = leaves([w - lr * g for w, lr, g in zip(setup.w, moved, slope, strict=True)])
    g = gradient(plain_upper(setup.alpha, end, upper), end)

    x, label, mask = lower
    _, tangents = torch.func.jvp(lambda *w: logits(w, x, mask).log_softmax(1), tuple(setup.w), tuple(g))
    alpha = setup.alpha
    surrogate = 0.2 * (tangents * targets(alpha, x, label)).sum(1).mean()
    total = combined((1.0, gradient(surrogate, alpha)), (1.0, gradient(plain_upper(alpha, end, upper), alpha)))
    assert relative(found(setup, setup.data[:2]), total) < 1e-12


# --- one step -----------------------------------------------------------------------------------------------------


def test_one_step_is_that_of_unrolled_and_of_mlc() -> None:
    """With plain SGD all three are the same hypergradient, to 1e-12; EMLC reaches w_1 by a real step."""
    setup = Setup("sgd")
    answers = []
    for method, options in (
        (bilevel.EMLC, {}),
        (bilevel.EMLC, {"memory": "replay"}),
        (bilevel.EMLC, {"discount": 0.0}),  # no age, no discount
        (bilevel.MLC, {}),
        (bilevel.Unrolled, {}),
        (bilevel.Unrolled, {"differentiate": "graph"}),
        (bilevel.Unrolled, {"virtual": False}),
    ):
        optimizer = Setup("sgd").optimizer(method, **options)
        torch.manual_seed(SEED)
        answers.append(list(optimizer.directions(*setup.data[:2]).upper.values()))
    assert flat(answers[0]).norm() > 1e-2
    for answer in answers[1:]:
        assert relative(answer, answers[0]) < 1e-12


@every_memory
def test_any_lower_loss(memory: str) -> None:
    """Not only cross-entropy with soft targets: here alpha scales the inputs and decays the weights, inside the graph
    of w.
    """
    torch.manual_seed(0)
    net, scale = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(),
        nn.Parameter(torch.ones(3).double()),
    )
    x, y = torch.randn(7, 3).double(), torch.randn(7, 1).double()

    def lower_loss() -> Tensor:
        decay = (scale.exp()[:, None] * net[0].weight.T.square()).sum()
        return (net(x * scale.sin()) - y).abs().pow(1.5).mean() + 0.1 * decay

    def upper_loss() -> Tensor:
        return (net(x) - y).square().mean()

    def build(method: Any, **options: Any) -> Any:
        return method(
            upper_loss,
            lower_loss,
            upper=scale,
            lower=net,
            upper_optimizer=torch.optim.SGD([scale], lr=0.1),
            lower_optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            **options,
        )

    exact = build(bilevel.Unrolled, product="reverse").directions().upper["0"]
    torch.testing.assert_close(
        build(bilevel.EMLC, memory=memory).directions().upper["0"], exact, rtol=1e-12, atol=1e-12
    )
    # Of two steps, gamma scales the first one's part: the second one's alone is the answer to one step from w_1.
    two = [
        build(bilevel.EMLC, inner_steps=2, discount=d, memory=memory).directions().upper["0"] for d in (0.0, 0.5, 1.0)
    ]
    torch.testing.assert_close(two[1], (two[0] + two[2]) / 2, rtol=1e-12, atol=1e-12)
    build(bilevel.EMLC).lower_optimizer.zero_grad()
    lower_loss().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    torch.testing.assert_close(
        two[0], build(bilevel.Unrolled, product="reverse").directions().upper["0"], rtol=1e-12, atol=1e-12
    )


# --- what a step does ---------------------------------------------------------------------------------------------


@every_memory
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_a_step_trains_then_moves_the_upper_variables(kind: str, memory: str) -> None:
    """The lower side as k plain torch steps, bit for bit, buffers included; in ``replay`` too."""
    ours, plain = Setup(kind), Setup(kind)
    optimizer = ours.optimizer(bilevel.EMLC, inner_steps=3, memory=memory)
    torch.manual_seed(SEED)
    directions = optimizer.directions(*ours.data[:4])
    torch.manual_seed(SEED)
    stats = optimizer.step(*ours.data[:4])
    random = torch.get_rng_state()
    torch.manual_seed(SEED)
    for batch in plain.data[1:4]:
        plain.train(batch)
    for a, b in zip([*ours.student.parameters()], [*plain.student.parameters()], strict=True):
        assert torch.equal(a, b)
        held, expected = ours.lower_optimizer.state[a], plain.lower_optimizer.state[b]
        assert all(torch.equal(held[k], v) for k, v in expected.items() if isinstance(v, Tensor))
    for a, b in zip(ours.student.buffers(), plain.student.buffers(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(stats.upper_loss, plain.upper_loss(plain.data[0]).detach())
    assert torch.equal(torch.get_rng_state(), random)
    for p, d in zip(plain.corrector.parameters(), directions.upper.values(), strict=True):
        p.grad = d
    plain.upper_optimizer.step()
    for a, b in zip(ours.corrector.parameters(), plain.corrector.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize(("steps", "batches"), [(1, 1), (3, 3), (3, 1)])
def test_replay_is_store_bit_for_bit(steps: int, batches: int, kind: str) -> None:
    """Over three steps of training: both levels, both optimizers, buffers, random state."""
    store, replay = Setup(kind), Setup(kind)
    for memory, setup in (("store", store), ("replay", replay)):
        optimizer = setup.optimizer(bilevel.EMLC, inner_steps=steps, memory=memory)
        torch.manual_seed(SEED)
        for index in range(3):
            optimizer.step(*setup.data[index : index + batches + 1])
        setup.random = torch.get_rng_state()  # type: ignore[attr-defined]
    assert torch.equal(store.random, replay.random)  # type: ignore[attr-defined]
    for name in ("student", "corrector"):
        one, other = getattr(store, name), getattr(replay, name)
        for a, b in zip((*one.parameters(), *one.buffers()), (*other.parameters(), *other.buffers()), strict=True):
            assert torch.equal(a, b), name
    for name in ("lower_optimizer", "upper_optimizer"):
        states = [getattr(setup, name).state_dict()["state"] for setup in (store, replay)]
        for a, b in zip(states[0].values(), states[1].values(), strict=True):
            assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize(("memory", "times"), [("store", 1), ("replay", 2)])
def test_hooks_of_the_lower_optimizer(memory: str, times: int) -> None:
    """They see the real steps; ``replay`` takes them twice, as documented."""
    setup = Setup("sgd")
    seen: list[int] = []
    setup.lower_optimizer.register_step_post_hook(lambda *_: seen.append(1))
    setup.optimizer(bilevel.EMLC, inner_steps=3, memory=memory).step(*setup.data[:4])
    assert len(seen) == 3 * times


def test_the_discount_follows_a_scheduler() -> None:
    setup = Setup("sgd")
    optimizer = setup.optimizer(bilevel.EMLC, inner_steps=3)
    for group in setup.lower_optimizer.param_groups:
        group["lr"] *= 0.5
    rates = [group["lr"] for group in setup.lower_optimizer.param_groups]
    same = Setup("sgd")
    for group, rate in zip(same.lower_optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.tensor(rate, dtype=torch.float64)  # tensors do as well
    answers = []
    for one in (optimizer, same.optimizer(bilevel.EMLC, inner_steps=3)):
        torch.manual_seed(SEED)
        answers.append(list(one.directions(*setup.data[:4]).upper.values()))
    assert relative(answers[0], answers[1]) < 1e-14
    assert relative(answers[0], found(Setup("sgd"), setup.data[:4], inner_steps=3)) > 0.01


def test_an_optimizer_that_nothing_can_follow_is_no_obstacle() -> None:
    """EMLC differentiates plain steps, so RMSprop may take the real ones."""
    setup = Setup("sgd")
    optimizer = setup.optimizer(
        bilevel.EMLC, inner_steps=2, lower_optimizer=torch.optim.RMSprop(setup.student.parameters(), lr=0.01)
    )
    before = [p.detach().clone() for p in setup.corrector.parameters()]
    assert optimizer.step(*setup.data[:3]).upper_moved
    assert not any(map(torch.equal, before, setup.corrector.parameters()))


def test_a_corrector_that_is_not_used_is_an_error() -> None:
    setup = Setup("sgd")

    def hard(batch: Any) -> Tensor:
        return nn.functional.cross_entropy(setup.student(batch[0]), batch[1])

    for product in ("auto", "reverse", "difference"):
        for memory in ("store", "replay"):
            with pytest.raises(bilevel.ClosureError, match="lower_loss does not depend on any upper variable"):
                found(setup, setup.data[:2], lower_loss=hard, product=product, memory=memory)
