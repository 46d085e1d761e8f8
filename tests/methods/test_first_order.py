"""``FiniteDifference`` (DARTS) and ``SAMA``: their own formulas, written down beside the papers' code."""

from __future__ import annotations

import copy
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
    mixed,
    plain_lower,
    plain_upper,
    relative,
    step,
    unrolled,
)
from reference import Mover, State, Tensors, move

SEED = 3
every_kind = pytest.mark.parametrize("kind", MOVERS)


def found(setup: Setup, method: Any, batches: Sequence[Any], **options: Any) -> Tensors:
    optimizer = setup.optimizer(method, **options)
    torch.manual_seed(SEED)
    return list(optimizer.directions(*batches).upper.values())


def difference(setup: Setup, w: Tensors, direction: Tensors, size: float, batch: Any) -> Tensors:
    """``(G_a(w + size * direction) - G_a(w - size * direction)) / (2 size)``."""
    alpha = setup.alpha
    ahead, behind = (
        gradient(plain_lower(alpha, combined((1.0, w), (sign * size, direction)), batch), alpha) for sign in (1, -1)
    )
    return combined((0.5 / size, ahead), (-0.5 / size, behind))


def detached(states: Sequence[State]) -> list[State]:
    return [{k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for s in states]


class Entries(nn.Module):
    """Lower variables whose gradient in alpha is the identity, so that the direction shows D itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("maker", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.3}, {"amsgrad": True}, {"amsgrad": True, "weight_decay": 0.1}]
)
def test_sama_has_the_slope_of_the_real_adam_step(maker: Any, options: dict[str, Any]) -> None:
    """Of its change in each entry of the gradient, by differences of ``torch.optim`` steps; up to the bias corrections,
    one factor for all entries, which SAMA leaves out.
    """
    entries, alpha = Entries(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    pulls = iter([4.0, 2.0, 1.0, 0.5] + 4 * [0.4])  # falling gradients: the maximum of v is an old one

    def gradient_at(w: Tensor) -> Tensor:
        return w.cos() * torch.tensor([1.0, 3.0, 0.3], dtype=torch.float64)

    lower = maker(entries.parameters(), lr=0.01, **options)
    for pull in list(pulls)[:6]:
        entries.w.grad = pull * gradient_at(entries.w.detach())
        lower.step()
    state, before = copy.deepcopy(lower.state_dict()), entries.w.detach().clone()

    def moved(gradient: Tensor) -> Tensor:
        other = Entries()
        other.w.data.copy_(before)
        optimizer = maker(other.parameters(), lr=0.01, **options)
        optimizer.load_state_dict(copy.deepcopy(state))
        other.w.grad = gradient
        optimizer.step()
        return before - other.w.detach()

    g = gradient_at(before)
    slope = (moved(g + 1e-6) - moved(g - 1e-6)) / 2e-6
    weights = torch.tensor([1.0, 3.0, 0.3], dtype=torch.float64)
    method = bilevel.SAMA(
        lambda: entries.w.sum(),
        lambda: (entries.w.sin() * weights).sum() + (alpha * entries.w).sum(),
        upper=alpha,
        lower=entries,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=lower,
        radius=1e-3,
    )
    ratio = -method.directions().upper["0"] / slope
    assert ratio.std() < 1e-5 * ratio.mean().abs()
    assert 1 < ratio.mean() < 10


# --- DARTS --------------------------------------------------------------------------------------------------------


def darts(setup: Setup, batches: Sequence[Any], radius: float = 0.01, rate: float | None = None) -> Tensors:
    """The paper's code for SGD: ``w' = w - lr (momentum buf + g + wd w)``, ``r = radius / |u|``, minus lr times the
    difference around w at ``r u``; with rates per group and other optimizers, u times the step's derivative in g.
    """
    upper, lower = setup.with_masks(*batches, seed=SEED)
    alpha, w = setup.alpha, setup.w
    at = leaves(w)
    g = leaves(gradient(plain_lower(alpha, at, lower), at))
    movers = setup.movers if rate is None else [Mover(rate)] * len(w)
    moved = [
        move(*terms)[0] for terms in zip(w, g, setup.states if rate is None else [{}] * len(w), movers, strict=True)
    ]
    ahead = leaves(moved)
    u = gradient(plain_upper(alpha, ahead, upper), ahead)
    v = gradient(sum(((x * y).sum() for x, y in zip(moved, u, strict=True)), torch.zeros(())), g)
    if rate is not None:  # the printed form
        size = radius / float(flat(u).norm())
        through = combined((-rate, difference(setup, w, u, size, lower)))
    else:
        through = difference(setup, w, v, radius / float(flat(v).norm()), lower)
    return combined((1.0, gradient(plain_upper(alpha, ahead, upper), alpha)), (1.0, through))


@pytest.mark.parametrize("radius", [0.01, 0.1, 1e-4])
@every_kind
def test_darts(kind: str, radius: float) -> None:
    setup = Setup(kind)
    expected = darts(setup, setup.data[:2], radius)
    assert relative(found(setup, bilevel.FiniteDifference, setup.data[:2], radius=radius), expected) < 1e-9


@pytest.mark.parametrize("rate", [0.05, 0.3])
@pytest.mark.parametrize("radius", [0.01, 0.1])
def test_darts_as_printed_with_a_given_rate(radius: float, rate: float) -> None:
    """``-lr (G_a(w + r u) - G_a(w - r u)) / (2 r)``, ``r = radius / |u|``, whatever the lower optimizer is."""
    for kind in ("sgd", "adam"):
        setup = Setup(kind)
        expected = darts(setup, setup.data[:2], radius, rate)
        answer = found(setup, bilevel.FiniteDifference, setup.data[:2], radius=radius, inner_lr=rate)
        assert relative(answer, expected) < 1e-9


@every_kind
def test_darts_is_close_to_the_exact_one_step_hypergradient(kind: str) -> None:
    """Its error falls with the square of the radius: a central difference."""
    setup = Setup(kind)
    upper, lower = setup.with_masks(*setup.data[:2], seed=SEED)
    losses = (plain_upper, plain_lower)
    exact = unrolled(losses, setup.alpha, setup.w, setup.states, setup.movers, upper, [lower], 1)[1]
    errors = [
        relative(found(setup, bilevel.FiniteDifference, setup.data[:2], radius=radius), exact)
        for radius in (0.02, 0.01)
    ]
    assert errors[1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_darts_is_exact_on_a_quadratic() -> None:
    p = problems.quadratic(seed=1)
    answers = []
    for method in (bilevel.FiniteDifference, bilevel.Unrolled):
        optimizer = method(
            p.upper_loss,
            p.lower_loss,
            upper=p.upper,
            lower=p.lower,
            upper_optimizer=torch.optim.SGD([p.upper], lr=0.1),
            lower_optimizer=torch.optim.SGD([p.lower], lr=0.1, momentum=0.9),
        )
        answers.append(optimizer.directions().upper["0"])
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-11, atol=1e-11)


# --- SAMA ---------------------------------------------------------------------------------------------------------


def sama(setup: Setup, batches: Sequence[Any], steps: int, radius: float) -> Tensors:
    """``f_a - (G_a(w + e u) - G_a(w - e u)) / (2 e)`` at ``w_k``, ``u = D f_w``, ``e = R / |u|``."""
    upper, *lower = setup.with_masks(*batches, seed=SEED)
    alpha, w, states = setup.alpha, setup.w, setup.states
    constants = [a.detach() for a in alpha]
    for t in range(steps):
        batch, at = batch_of(lower, t), leaves(w)
        g, before = gradient(plain_lower(constants, at, batch), at), states
        decays = [0.0 if mover.decoupled else mover.weight_decay for mover in setup.movers]
        g = [slope + decay * x for slope, decay, x in zip(g, decays, w, strict=True)]  # what the moments are of
        moved, after = step(plain_lower, constants, leaves(w), states, setup.movers, batch)
        w, states = [x.detach() for x in moved], detached(after)
    at = leaves(w)
    u = []
    for f_w, slope, state, mover in zip(
        gradient(plain_upper(alpha, at, upper), at), g, before, setup.movers, strict=True
    ):
        if mover.betas is None:
            u.append(f_w)
            continue
        (b1, b2), m, v = mover.betas, state.get("m", 0 * f_w), state.get("v", 0 * f_w)
        now = b2 * v + (1 - b2) * slope**2
        d = mover.lr * ((1 - b1) * b2 * v - b1 * (1 - b2) * slope * m) / (now.sqrt() + mover.adam_eps) ** 3
        if mover.amsgrad and "largest" in state:
            old = state["largest"]
            d = torch.where(old > now, mover.lr * (1 - b1) / (old.sqrt() + mover.adam_eps), d)
        u.append(d * f_w)
    through = difference(setup, w, u, radius / float(flat(u).norm()), batch_of(lower, steps - 1))
    return combined((1.0, gradient(plain_upper(alpha, at, upper), alpha)), (-1.0, through))


@pytest.mark.parametrize("radius", [1.0, 0.01])
@pytest.mark.parametrize(("steps", "batches"), [(1, 1), (3, 3), (3, 1)])
@every_kind
def test_sama(kind: str, steps: int, batches: int, radius: float) -> None:
    """For Adam with the moments before the last gradient; the difference is on the last lower batch."""
    setup = Setup(kind)
    data = setup.data[: batches + 1]
    expected = sama(setup, data, steps, radius)
    assert relative(found(setup, bilevel.SAMA, data, inner_steps=steps, radius=radius), expected) < 1e-9


def test_sama_leaves_the_rate_of_sgd_out() -> None:
    """D is the identity, as in the code: a small difference is the Hessian product with f_w itself."""
    setup = Setup("sgd")
    upper, lower = setup.with_masks(*setup.data[:2], seed=SEED)
    moved, _ = step(plain_lower, [a.detach() for a in setup.alpha], leaves(setup.w), setup.states, setup.movers, lower)
    at, alpha = leaves(moved), setup.alpha
    f_w = gradient(plain_upper(alpha, at, upper), at)
    exact = combined(
        (1.0, gradient(plain_upper(alpha, at, upper), alpha)), (-1.0, mixed(plain_lower, alpha, at, lower, f_w))
    )
    assert relative(found(setup, bilevel.SAMA, setup.data[:2], radius=1e-4), exact) < 1e-6


def test_samas_matrix_is_the_derivative_of_adams_step() -> None:
    """D by autograd: of ``lr m / (sqrt(v) + eps)`` in the last gradient, without bias correction, up to the eps in
    ``(sqrt(v) + eps)^3``, which the paper's closed form has there for ``sqrt(v) (sqrt(v) + eps)^2``.
    """
    g = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    m, v, lr, b1, b2 = 0.2, 0.5, 0.1, 0.9, 0.99
    update = lr * (b1 * m + (1 - b1) * g) / (b2 * v + (1 - b2) * g**2).sqrt()
    slope = torch.autograd.grad(update.sum(), g)[0]
    closed = lr * ((1 - b1) * b2 * v - b1 * (1 - b2) * g * m) / (b2 * v + (1 - b2) * g**2).sqrt() ** 3
    torch.testing.assert_close(slope, closed.detach(), rtol=1e-12, atol=0)


def test_sama_with_a_fresh_adam_knows_nothing_yet() -> None:
    """Before the first gradient both moments are 0, and so is D: the direction is that of F alone, not NaN."""
    setup = Setup("adam", warm_up=0)
    answer = found(setup, bilevel.SAMA, setup.data[:2])
    upper, lower = setup.with_masks(*setup.data[:2], seed=SEED)
    moved, _ = step(plain_lower, [a.detach() for a in setup.alpha], leaves(setup.w), setup.states, setup.movers, lower)
    alpha = setup.alpha
    assert relative(answer, gradient(plain_upper(alpha, [x.detach() for x in moved], upper), alpha)) < 1e-12


# --- both ---------------------------------------------------------------------------------------------------------

BOTH = {
    "finite difference": (bilevel.FiniteDifference, {}),
    "finite difference, plain": (bilevel.FiniteDifference, {"inner_lr": 0.1}),
    "sama": (bilevel.SAMA, {}),
    "sama, three steps": (bilevel.SAMA, {"inner_steps": 3}),
}
both = pytest.mark.parametrize(("method", "options"), BOTH.values(), ids=BOTH.keys())


@pytest.mark.parametrize("kind", ["momentum", "adam"])
@both
def test_the_lower_steps_are_plain_torch_steps(method: Any, options: dict[str, Any], kind: str) -> None:
    """DARTS: one, after the upper variables moved; SAMA: k, before. Bit for bit, buffers included."""
    ours, plain = Setup(kind), Setup(kind)
    data = ours.data[: options.get("inner_steps", 1) + 1]
    optimizer = ours.optimizer(method, **options)
    torch.manual_seed(SEED)
    directions = optimizer.directions(*data)
    torch.manual_seed(SEED)
    stats = optimizer.step(*data)
    assert stats.product == "difference"
    steps: list[Any] = [lambda batch=batch: plain.train(batch) for batch in data[1:]]

    def upper() -> None:
        for p, d in zip(plain.corrector.parameters(), directions.upper.values(), strict=True):
            p.grad = d.clone()
        plain.upper_optimizer.step()

    order = [*steps, upper] if method is bilevel.SAMA else [upper, *steps]
    torch.manual_seed(SEED)
    for action in order:
        action()
    for name in ("student", "corrector"):
        one, other = getattr(ours, name), getattr(plain, name)
        for a, b in zip((*one.parameters(), *one.buffers()), (*other.parameters(), *other.buffers()), strict=True):
            assert torch.equal(a, b)


@both
def test_the_points_of_the_difference(method: Any, options: dict[str, Any]) -> None:
    """They are the parameters' own values plus and minus the radius, on copies: adding a perturbation to a parameter
    and taking it off again, as peers do, would not give its bits back.
    """
    setup = Setup("sgd")
    seen: list[list[Tensor]] = []
    inner = setup.lower_loss

    def lower_loss(batch: Any) -> Tensor:
        seen.append([p.detach().clone() for p in setup.student.parameters()])
        return inner(batch)

    optimizer = setup.optimizer(method, lower_loss=lower_loss, **options, verify="never")
    before = [p.detach().clone() for p in setup.student.parameters()]
    optimizer.directions(*setup.data[:2])
    assert all(map(torch.equal, before, setup.student.parameters()))
    middle = [flat(point) for point in seen[-2:]]
    centre = flat(seen[0]) if method is bilevel.FiniteDifference else None
    if centre is not None:
        torch.testing.assert_close((middle[0] + middle[1]) / 2, centre, rtol=1e-12, atol=1e-12)
        assert (middle[0] - centre).norm().item() == pytest.approx(0.01, rel=1e-9)  # the radius
    else:
        assert ((middle[0] - middle[1]) / 2).norm().item() == pytest.approx(1.0, rel=1e-9)


@both
def test_calls_of_the_losses(method: Any, options: dict[str, Any]) -> None:
    """DARTS: G four times and F once. SAMA: G k + 2 times and F once. The differences are forward-only through w."""
    setup = Setup("momentum")
    graphs: list[bool] = []
    inner = setup.student.forward

    def forward(x: Tensor) -> Tensor:
        out = inner(x)
        graphs.append(out.requires_grad)
        return out

    setup.student.forward = forward  # type: ignore[method-assign]
    steps = options.get("inner_steps", 1)
    optimizer = setup.optimizer(method, **options, verify="never")
    for _ in range(2):
        setup.calls = ""
        graphs.clear()
        optimizer.step(*setup.data[: steps + 1])
        if method is bilevel.SAMA:
            assert setup.calls == "L" * steps + "U" + "LL"
            assert graphs == [True] * (steps + 1) + [False] * 2
        else:
            assert setup.calls == "LU" + "LL" + "L"
            assert graphs == [True, True, False, False, True]


@both
def test_it_works_where_nothing_can_be_differentiated_twice(method: Any, options: dict[str, Any]) -> None:
    """``cdist`` and ``EmbeddingBag`` have neither a forward-mode nor a second-order rule."""
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(7, 4).double(), nn.Linear(6, 1).double()
    lower = nn.ModuleList([bag, head])
    weights = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    tokens = torch.arange(12).reshape(6, 2) % 7

    def output() -> Tensor:
        embedded = bag(tokens)
        return head(torch.cdist(embedded, bilevel.hold(embedded.flip(0).detach()) + 1))

    optimizer = method(
        lambda: (output() - 1).square().mean(),
        lambda: (torch.sigmoid(weights)[:, None] * output().square()).mean(),
        upper=weights,
        lower=lower,
        upper_optimizer=torch.optim.SGD([weights], lr=0.1),
        lower_optimizer=torch.optim.SGD(lower.parameters(), lr=0.1),
        **options,
    )
    assert optimizer.step().upper_moved
    assert weights.grad is not None
    assert weights.grad.norm() > 1e-4


@pytest.mark.parametrize("method", [bilevel.FiniteDifference, bilevel.SAMA])
def test_an_optimizer_that_cannot_be_followed_is_refused(method: Any) -> None:
    setup = Setup("sgd")
    rms = torch.optim.RMSprop(setup.student.parameters())
    with pytest.raises(ValueError, match=r"lower_optimizer=RMSprop\): cannot be followed as a function.*SGD, Adam, Ad"):
        setup.optimizer(method, lower_optimizer=rms)


def test_plain_darts_takes_any_optimizer() -> None:
    setup = Setup("sgd")
    rms = torch.optim.RMSprop(setup.student.parameters(), lr=0.01)
    assert (
        setup.optimizer(bilevel.FiniteDifference, lower_optimizer=rms, inner_lr=0.1).step(*setup.data[:2]).upper_moved
    )


@both
def test_a_corrector_that_is_not_used_is_an_error(method: Any, options: dict[str, Any]) -> None:
    setup = Setup("sgd")

    def hard(batch: Any) -> Tensor:
        return nn.functional.cross_entropy(setup.student(batch[0]), batch[1])

    with pytest.raises(bilevel.ClosureError, match="lower_loss does not depend on any upper variable"):
        found(setup, method, setup.data[:2], lower_loss=hard, **options)


@both
def test_float32_is_float64_to_the_accuracy_of_a_difference(method: Any, options: dict[str, Any]) -> None:
    narrow, wide = Setup("momentum", dtype=torch.float32), Setup("momentum")
    for one, other in ((narrow.student, wide.student), (narrow.corrector, wide.corrector)):
        one.drop = other.drop = nn.Identity()
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            q.data.copy_(p.data)
    for p, q in zip(narrow.student.parameters(), wide.student.parameters(), strict=True):
        wide.lower_optimizer.state[q]["momentum_buffer"].copy_(narrow.lower_optimizer.state[p]["momentum_buffer"])
    data = narrow.data[: options.get("inner_steps", 1) + 1]
    one = found(narrow, method, data, **options)
    other = found(wide, method, [tuple(x.double() for x in batch) for batch in data], **options)
    assert {x.dtype for x in one} == {torch.float32}
    assert relative([x.double() for x in one], other) < 1e-3
