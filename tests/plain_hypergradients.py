"""Hypergradients written down plainly, and a small network written twice: as modules, and as a function of tensors.

Nothing here comes from ``bilevel``. The formulas are those of the papers, every derivative is ``torch.autograd.grad``
of a loss that is a function of two lists of float64 tensors, and a lower step is the textbook's (``reference.move``).
The modules hold the same numbers for the library and for ``torch.optim``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from reference import Loss, Mover, State, Tensors, move

INPUTS, HIDDEN, CLASSES, SAMPLES, DROP = 3, 5, 3, 6, 0.4

# Settings of the two parameter groups of the lower optimizer: all but the last layer, and the last layer.
MOVERS: dict[str, tuple[Mover, Mover]] = {
    "sgd": (Mover(0.2), Mover(0.05)),
    "decay": (Mover(0.2, weight_decay=0.1), Mover(0.05)),
    "momentum": (Mover(0.2, momentum=0.9, weight_decay=0.02), Mover(0.05, momentum=0.5)),
    "dampening": (Mover(0.2, momentum=0.8, dampening=0.3), Mover(0.1, momentum=0.8, dampening=0.1)),
    "nesterov": (Mover(0.1, momentum=0.9, nesterov=True), Mover(0.2, momentum=0.9, weight_decay=0.1, nesterov=True)),
    "adam": (
        Mover(0.05, betas=(0.9, 0.99), adam_eps=1e-3),
        Mover(0.02, betas=(0.8, 0.9), adam_eps=1e-2, weight_decay=0.1),
    ),
    "amsgrad": (
        Mover(0.05, betas=(0.9, 0.9), adam_eps=1e-3, amsgrad=True),
        Mover(0.02, betas=(0.5, 0.9), adam_eps=1e-2, amsgrad=True),
    ),
    "adamw": (
        Mover(0.05, betas=(0.9, 0.99), adam_eps=1e-3, weight_decay=0.2, decoupled=True),
        Mover(0.1, betas=(0.9, 0.99), adam_eps=1e-3, decoupled=True),
    ),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the network, as modules --------------------------------------------------------------------------------------


class Student(nn.Module):
    """The lower level, with BatchNorm in training mode and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.drop = nn.Dropout(DROP)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.drop(torch.tanh(self.norm(self.first(x)))))
        return logits


class Corrector(nn.Module):
    """The upper level: soft targets from an input and a given label."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(INPUTS + CLASSES, 4)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(torch.cat([x, label], 1)))).softmax(1)


Batch = tuple[Tensor, Tensor]


class Setup:
    """Modules, their torch optimizers with ``warm_up`` real steps behind them, and batches; the same for each call."""

    def __init__(self, kind: str = "sgd", warm_up: int = 2, dtype: torch.dtype = torch.float64) -> None:
        self.kind = kind
        self.calls = ""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.student, self.corrector = Student().to(dtype), Corrector().to(dtype)
            self.lower_optimizer = self._lower_optimizer()
            self.upper_optimizer = torch.optim.Adam(self.corrector.parameters(), lr=1e-2)
            self.data = [self._batch(dtype) for _ in range(8)]
            for index in range(warm_up):
                self.train(self._batch(dtype))
                self.student.norm.running_mean.add_(0.1 * index)  # type: ignore[operator]
        self.student.zero_grad()
        self.corrector.zero_grad()
        self.calls = ""

    def _batch(self, dtype: torch.dtype) -> Batch:
        x = torch.randn(SAMPLES, INPUTS, dtype=torch.float64).to(dtype)
        return x, torch.eye(CLASSES, dtype=dtype)[torch.randint(CLASSES, (SAMPLES,))]

    def _lower_optimizer(self) -> torch.optim.Optimizer:
        body = [*self.student.first.parameters(), *self.student.norm.parameters()]
        groups = [
            {"params": parameters, **settings(mover)}
            for parameters, mover in zip((body, [*self.student.last.parameters()]), MOVERS[self.kind], strict=True)
        ]
        one = MOVERS[self.kind][0]
        maker: Any = torch.optim.SGD if one.betas is None else torch.optim.AdamW if one.decoupled else torch.optim.Adam
        made: torch.optim.Optimizer = maker(groups)
        return made

    def upper_loss(self, batch: Batch) -> Tensor:
        self.calls += "U"
        x, label = batch
        return cross_entropy(self.student(x), label) + 0.1 * self.corrector(x, label)[:, 0].mean()

    def lower_loss(self, batch: Batch) -> Tensor:
        self.calls += "L"
        x, label = batch
        return cross_entropy(self.student(x), self.corrector(x, label))

    def train(self, batch: Batch) -> None:
        """One plain torch training step."""
        self.lower_optimizer.zero_grad()
        self.lower_loss(batch).backward()
        self.lower_optimizer.step()

    def optimizer(self, method: Any, **options: Any) -> Any:
        """Build a method of the library on the modules."""
        arguments: dict[str, Any] = {
            "upper": self.corrector,
            "lower": self.student,
            "upper_optimizer": self.upper_optimizer,
            "lower_optimizer": self.lower_optimizer,
            **options,
        }
        losses = [arguments.pop("upper_loss", self.upper_loss), arguments.pop("lower_loss", self.lower_loss)]
        return method(*losses, **arguments)

    # What the plain side reads: the numbers, without the modules.

    @property
    def alpha(self) -> Tensors:
        return [p.detach().clone().requires_grad_() for p in self.corrector.parameters()]

    @property
    def w(self) -> Tensors:
        return [p.detach().clone() for p in self.student.parameters()]

    @property
    def movers(self) -> list[Mover]:
        one, other = MOVERS[self.kind]
        return [other if name.startswith("last") else one for name, _ in self.student.named_parameters()]

    @property
    def states(self) -> list[State]:
        names = {"momentum_buffer": "buffer", "exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "largest"}
        held = [self.lower_optimizer.state.get(p, {}) for p in self.student.parameters()]
        found = [{names[k]: v.clone() for k, v in entry.items() if k in names} for entry in held]
        for state, entry in zip(found, held, strict=True):
            if "step" in entry:
                state["t"] = int(entry["step"])
        return found

    def with_masks(self, upper: Batch, *lower: Batch, seed: int) -> list[Any]:
        """The batches with the dropout masks of a step that begins with ``torch.manual_seed(seed)``.

        The first evaluation of each batch draws one; the lower batches come first.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ones = torch.ones(SAMPLES, HIDDEN, dtype=torch.float64)
            masked = [(*batch, dropout(ones, DROP)) for batch in (*lower, upper)]
        return [masked[-1], *masked[:-1]]


def settings(mover: Mover) -> dict[str, Any]:
    """The options of a parameter group of ``torch.optim``."""
    common = {"lr": mover.lr, "weight_decay": mover.weight_decay}
    if mover.betas is None:
        return {**common, "momentum": mover.momentum, "dampening": mover.dampening, "nesterov": mover.nesterov}
    return {**common, "betas": mover.betas, "eps": mover.adam_eps, "amsgrad": mover.amsgrad}


# --- the network, as a function -----------------------------------------------------------------------------------


def logits(w: Sequence[Tensor], x: Tensor, mask: Tensor) -> Tensor:
    hidden = x @ w[0].T + w[1]
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt() * w[2] + w[3]
    return (torch.tanh(hidden) * mask) @ w[4].T + w[5]


def targets(alpha: Sequence[Tensor], x: Tensor, label: Tensor) -> Tensor:
    mixed = torch.tanh(torch.cat([x, label], 1) @ alpha[0].T + alpha[1]) @ alpha[2].T + alpha[3]
    return mixed.exp() / mixed.exp().sum(1, keepdim=True)


def soft_cross_entropy(out: Tensor, target: Tensor) -> Tensor:
    return -(target * (out - out.exp().sum(1, keepdim=True).log())).sum(1).mean()


def plain_upper(alpha: Tensors, w: Tensors, batch: Any) -> Tensor:
    x, label, mask = batch
    return soft_cross_entropy(logits(w, x, mask), label) + 0.1 * targets(alpha, x, label)[:, 0].mean()


def plain_lower(alpha: Tensors, w: Tensors, batch: Any) -> Tensor:
    x, label, mask = batch
    return soft_cross_entropy(logits(w, x, mask), targets(alpha, x, label))


# --- derivatives --------------------------------------------------------------------------------------------------


def leaves(tensors: Sequence[Tensor]) -> Tensors:
    return [x.detach().clone().requires_grad_() for x in tensors]


def gradient(value: Tensor, at: Sequence[Tensor], *, graph: bool = False) -> Tensors:
    return list(torch.autograd.grad(value, at, create_graph=graph, materialize_grads=True))


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tensors if x is not None])


def relative(found: Sequence[Tensor] | Tensor, expected: Sequence[Tensor] | Tensor) -> float:
    a = found if isinstance(found, Tensor) else flat(found)
    b = expected if isinstance(expected, Tensor) else flat(expected)
    return float((a - b).norm() / b.norm())


def batch_of(batches: Sequence[Any], step: int) -> Any:
    """A single batch serves every step."""
    return batches[step] if len(batches) > 1 else batches[0]


def step(lower_loss: Loss, alpha: Tensors, w: Tensors, states: Any, movers: Any, batch: Any) -> tuple[Tensors, Any]:
    """One lower step with its graph."""
    moved = [
        move(*terms)
        for terms in zip(w, gradient(lower_loss(alpha, w, batch), w, graph=True), states, movers, strict=True)
    ]
    return [x for x, _ in moved], [s for _, s in moved]


def unrolled(
    losses: tuple[Loss, Loss],
    alpha: Tensors,
    w: Tensors,
    states: Sequence[State],
    movers: Sequence[Mover],
    upper_batch: Any,
    lower_batches: Sequence[Any],
    steps: int,
    *,
    truncate: int | None = None,
    start: Callable[[Tensors], Tensors] | None = None,
) -> tuple[Tensors, Tensors]:
    """``w_k`` and ``d/dalpha F(w_k(alpha), alpha)``, by autograd through the last ``truncate`` steps at once."""
    # + 0: the gradient in one starting value must not count what another one was computed from.
    point = leaves(w) if start is None else [x + 0 if x.requires_grad else x.requires_grad_() for x in start(alpha)]
    states = list(states)
    for t in range(steps):
        if truncate is not None and t == steps - truncate:
            point = leaves(point)
            states = [{k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for s in states]
        point, states = step(losses[1], alpha, point, states, movers, batch_of(lower_batches, t))
    return [x.detach() for x in point], gradient(losses[0](alpha, point, upper_batch), alpha)


def mixed(lower_loss: Loss, alpha: Tensors, w: Tensors, batch: Any, v: Sequence[Tensor]) -> Tensors:
    """``G_aw v``, by double backward."""
    at = leaves(w)
    pairing = sum((g * x).sum() for g, x in zip(gradient(lower_loss(alpha, at, batch), at, graph=True), v, strict=True))
    assert isinstance(pairing, Tensor)
    return gradient(pairing, alpha)


def hessian(lower_loss: Loss, alpha: Tensors, w: Tensors, batch: Any) -> Tensor:
    """``G_ww`` as a matrix, row by row."""
    at = leaves(w)
    entries = torch.cat([g.reshape(-1) for g in gradient(lower_loss(alpha, at, batch), at, graph=True)])
    rows = [torch.autograd.grad(e, at, retain_graph=True, materialize_grads=True) for e in entries]
    return torch.stack([flat(row) for row in rows])


def shaped_like(vector: Tensor, like: Sequence[Tensor]) -> Tensors:
    parts = vector.split([x.numel() for x in like])
    return [part.reshape(x.shape) for part, x in zip(parts, like, strict=True)]


def combined(*terms: tuple[float, Sequence[Tensor]]) -> Tensors:
    """The sum of ``factor * vector``."""
    (factor, first), *rest = terms
    total = [factor * x for x in first]
    for factor, vector in rest:
        total = [t + factor * x for t, x in zip(total, vector, strict=True)]
    return total


def central_difference(function: Callable[[float], float], size: float = 1e-4) -> float:
    """``function'(0)`` by differences of sixth order: no truncation is left at this size, rounding is about 1e-12."""
    d1, d2, d3 = ((function(k * size) - function(-k * size)) / (2 * k * size) for k in (1, 2, 3))
    return (15 * d1 - 6 * d2 + d3) / 10
