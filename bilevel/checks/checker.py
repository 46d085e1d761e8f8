"""Fresh looks at the losses for what a method wants compared, and the checks that any method can be put to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..directions import Directions
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Evaluator, Oracle
from ..hypergradient.modes import Unavailable
from ..levels import Level
from ..vectors import Tensors, Vector, dot, squared_norm
from .check import Check, Same, Slope, Unknown
from .plain import Plain, PlainOracle, Precision


class Look(Protocol):
    """Opens an oracle of some kind as a step would, and takes everything back."""

    def __call__(self, *, kind: type[Oracle], verifies: bool) -> AbstractContextManager[Oracle]: ...


class Checker:
    """What a method's checks are made from: fresh looks at the losses, and probes of both levels.

    Attributes:
        probes: Random vectors of the upper and the lower level, in pairs.
        precision: How well the losses can be compared, found out on the way.
    """

    def __init__(self, look: Look, evaluator: Evaluator, samples: int) -> None:
        self._look, self._evaluator = look, evaluator
        self.precision = Precision()
        self._verification = deepcopy(evaluator.verification)
        generator = torch.Generator().manual_seed(0)

        def probe(level: Level) -> Vector:
            shapes = [(t.shape, t.device) for t in level.tensors]
            found = (torch.randn(s, generator=generator, dtype=torch.float64).to(d) for s, d in shapes)
            return Vector(found, level.names)

        self.probes = [(probe(evaluator.upper), probe(evaluator.lower)) for _ in range(samples)]

    @contextmanager
    def oracle(self, *, verifies: bool = True, kind: type[Oracle] = Oracle) -> Iterator[Oracle]:
        """Look at the losses as a step would, and take everything back; each look sees the same random numbers.

        ``verifies``: with its shortcuts verified, and replaced where they are wrong, as in a look of a step.
        """
        with self._rehearsed(), self._look(kind=kind, verifies=verifies) as oracle:
            yield oracle

    @contextmanager
    def plain(self) -> Iterator[Plain]:
        """Evaluations, products and walks by plain autograd, for formulas that are written out once more."""
        with self.oracle(verifies=False) as oracle:
            yield Plain(oracle, self.precision)

    def plain_oracle(self) -> AbstractContextManager[Oracle]:
        """An oracle that answers by plain autograd of the closures alone, for the method's own ``compute``."""
        return self.oracle(verifies=False, kind=PlainOracle)

    def repeat(self) -> None:
        """Find out how well the losses repeat."""
        with self.plain() as plain:
            for value in (plain.lower_value, plain.upper_value):
                self.precision.repeated(float(value()), float(value()))

    @contextmanager
    def _rehearsed(self) -> Iterator[None]:
        """What is found out about shortcuts in the check is the check's own: its next step finds it out for itself."""
        own, self._evaluator.verification = self._evaluator.verification, self._verification
        self._verification.look_again()
        try:
            yield
        finally:
            self._evaluator.verification = own


def method_checks(
    checker: Checker,
    compute: Callable[[Oracle], Directions[Any]],
    losses: Callable[[Oracle], tuple[Evaluation, Evaluation]],
) -> Iterator[Check]:
    """The gradients of F and G; and what ``compute`` answers, against its answer to an oracle of plain autograd."""
    with checker.oracle() as oracle:
        lower, upper = losses(oracle)
    with checker.oracle() as oracle:
        answer = compute(oracle)
    with checker.plain() as plain:
        plain.lower_value()  # the lower loss first, as in a step
        yield from loss_checks(checker, plain, upper, lower)
    found = _parts(answer)
    try:
        with checker.plain_oracle() as oracle:
            expected = _parts(compute(oracle))
    except Unavailable as problem:
        yield from (Unknown(name, _length(part), str(problem)) for name, part in found.items())
        return
    for name, part in found.items():
        other = expected.get(name, {})
        names = list(dict.fromkeys([*part, *other]))
        one, two = ([named.get(n) for n in names] for named in (part, other))
        yield Same(name, one, two, _length(other))


def _parts(answer: Directions[Any]) -> dict[str, dict[str, Tensor]]:
    """Name the vectors that a method answered with."""
    parts = {"upper direction": dict(answer.upper), "lower direction": dict(answer.lower)}
    if answer.start is not None:
        parts["inner point"] = dict(answer.start)
    for name, value in answer.state.items():
        if isinstance(value, Tensor):
            parts[f"state {name}"] = {name: value}
        elif not isinstance(value, int):
            parts[f"state {name}"] = {str(k): x for k, x in value.items() if isinstance(x, Tensor)}
    return {name: part for name, part in parts.items() if part}


def _length(named: dict[str, Tensor]) -> float:
    return float(squared_norm(list(named.values())).sqrt())


def loss_checks(checker: Checker, plain: Plain, upper: Evaluation, lower: Evaluation) -> Iterator[Check]:
    """Directional derivatives of F and G in both levels, from gradients that a method works with."""

    def loss(side: str, u: Tensors, v: Tensors) -> tuple[Callable[[float], Tensor], Callable[[float], Evaluation]]:
        def along(size: float) -> Tensor:
            with plain.shifted(size, u, v):
                return plain.upper_value() if side == "upper" else plain.lower_value()

        def differentiated(size: float) -> Evaluation:
            with plain.shifted(size, u, v):
                return plain.upper() if side == "upper" else plain.lower()

        return along, differentiated

    for up, low in checker.probes:
        still_up, still_low = [None] * len(up), [None] * len(low)
        for name, side, gradients in (("F", "upper", upper), ("G", "lower", lower)):
            along, found = loss(side, up, still_low)
            slope = partial(_along, found, "upper", up)
            yield Slope(f"<grad_alpha {name}, u>", dot(gradients.upper, up), along, slope)
            along, found = loss(side, still_up, low)
            slope = partial(_along, found, "lower", low)
            yield Slope(f"<grad_w {name}, u>", dot(gradients.lower, low), along, slope)


def _along(found: Callable[[float], Evaluation], side: str, direction: Tensors, size: float) -> Tensor:
    evaluation = found(size)
    return dot(evaluation.upper if side == "upper" else evaluation.lower, direction)
