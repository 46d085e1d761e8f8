"""``check_directions``: what a method computed, against finite differences of the user's own losses in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .errors import count, number
from .evaluator import Look
from .variables import Level
from .vectors import Vector, add_scaled, exchange

# A central difference in float64 with a step of about 1e-5 is good to some 1e-10 where third derivatives are of order
# one.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Claim:
    """One number that a method computed, and how to get it another way.

    Attributes:
        name: What it is, in the words of the class's docstring.
        computed: The number.
        along: ``e -> h(e)``: the number should be ``h'(0)``; or None.
        expected: The number computed independently; or None.
        verdict: Whether the comparison can pass or fail; False for the distance of an approximation.
    """

    name: str
    computed: Tensor
    along: Callable[[float], Tensor] | None = None
    expected: Tensor | float | None = None
    verdict: bool = True


@dataclass(frozen=True)
class Comparison:
    """One line of a report: the number as the method computed it, as it should be, and their relative difference.

    ``passed`` is None where an approximation is only measured.
    """

    name: str
    computed: float
    expected: float
    error: float
    passed: bool | None


@dataclass(frozen=True)
class Report:
    """The result of :func:`check_directions`; ``str(report)`` is a table.

    Attributes:
        method: Name of the class that was checked.
        comparisons: One line for each number that was compared.

    Example:
        >>> from bilevel.checking import Comparison, Report
        >>> Report("BOME", (Comparison("Q", 1.0, 1.0, 0.0, True),)).passed
        True
    """

    method: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every comparison that has a verdict is within its tolerance."""
        return all(line.passed is not False for line in self.comparisons)

    def __str__(self) -> str:
        width = max([len(line.name) for line in self.comparisons], default=4)
        rows = [f"{self.method}: {'all passed' if self.passed else 'FAILED'}"]
        rows.append(f"  {'what':<{width}}  {'computed':>14}  {'expected':>14}  {'error':>9}")
        for line in self.comparisons:
            mark = {True: "", False: "  <-- differs", None: "  (no verdict)"}[line.passed]
            rows.append(
                f"  {line.name:<{width}}  {line.computed:>14.7e}  {line.expected:>14.7e}  {line.error:>9.1e}{mark}"
            )
        return "\n".join(rows)


class Checkable(Protocol):
    """What :func:`check_directions` needs of an optimizer; every :class:`bilevel.BilevelOptimizer` has it."""

    def _look(
        self, batches: Sequence[Any], upper: Any = ..., lower: Any = ..., *, verifies: bool = ...
    ) -> AbstractContextManager[Look]: ...

    def _claims(self, look: Look, probe: Callable[[Level], Vector]) -> list[Claim]: ...

    def _all_modules(self) -> list[nn.Module]: ...

    def _levels(self) -> tuple[Level, Level]: ...


def check_directions(optimizer: Checkable, *batches: Any, samples: int = 2, tolerance: float = TOLERANCE) -> Report:
    """Compare what ``optimizer`` computes at the current point with finite differences of your losses.

    Modules, bare variables and the floating-point tensors of the batches are cast to float64 for the check and
    restored bit for bit; nothing moves. Barrier methods: directional derivatives of F, G and q in both levels (q as
    ``value_gradient`` reads it), Q, and the multiplier from independently computed products. Exact hypergradients
    (``Unrolled`` without truncation, ``MLC`` of one call): the derivative of F after the lower steps. The others:
    cosine and relative error between them and the exact derivative through as many lower steps, without a verdict.

    Args:
        optimizer: Any optimizer of this library.
        batches: As for ``step``.
        samples: Random probes per gradient, >= 1; each costs up to a dozen loss calls per line of the report.
        tolerance: Largest relative difference that passes, >= 0. Kinks (ReLU at 0) near the point can exceed it: check
            at another batch. A ``.detach()`` inside a loss hides from autograd what finite differences see: write
            ``bilevel.hold(tensor)`` instead, which is a constant for both.

    Returns:
        A report; ``report.passed`` is the verdict, ``print(report)`` shows a table.

    Raises:
        TypeError, ValueError: ``samples`` or ``tolerance`` is off.
        RuntimeError: From your closure, if it mixes in float32 tensors of its own; pass them through the batch or
            ``other=``.

    Example:
        >>> import torch, bilevel
        >>> a, w = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        >>> optimizer = bilevel.BOME(
        ...     lambda: (w - 1).square().sum(), lambda: (w - a.sin()).square().sum(), upper=a, lower=w,
        ...     upper_optimizer=torch.optim.SGD([a], lr=0.1), lower_optimizer=torch.optim.SGD([w], lr=0.1),
        ... )
        >>> bilevel.check_directions(optimizer).passed
        True
    """
    count("check_directions", "samples", samples, minimum=1)
    number("check_directions", "tolerance", tolerance, minimum=0.0)
    upper, lower = optimizer._levels()
    generator = torch.Generator().manual_seed(0)

    def probe(level: Level) -> Vector:
        return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in level.tensors]

    # The optimizers' state as well: methods that take real lower steps take them here, and torch mixes no dtypes.
    wide = _float64(optimizer._all_modules(), [*upper.tensors, *lower.tensors, *_state(upper), *_state(lower)])
    lines: dict[str, Comparison] = {}
    with wide, optimizer._look([_widened(batch) for batch in batches], verifies=False) as look:
        for _ in range(samples):
            for claim in optimizer._claims(look, probe):
                line = _compare(claim, tolerance)
                if claim.name not in lines or line.error > lines[claim.name].error:
                    lines[claim.name] = line  # report the worst probe
        look.replay.undo()
    return Report(type(optimizer).__name__, tuple(lines.values()))


@contextmanager
def shifted(look: Look, size: float, upper: Vector, lower: Vector) -> Iterator[None]:
    """Move both levels by ``size`` along a probe for the duration."""
    tensors = [*look.upper_level.tensors, *look.lower_level.tensors]
    moved = [x.clone() for x in add_scaled([t.detach() for t in tensors], size, [*upper, *lower]) if x is not None]
    exchange(tensors, moved)
    try:
        yield
    finally:
        exchange(tensors, moved)


def _compare(claim: Claim, tolerance: float) -> Comparison:
    computed = float(claim.computed)
    if claim.along is None:
        expected = float(claim.expected) if claim.expected is not None else float("nan")
        error = _relative(computed, expected, 1e-14)
        return Comparison(claim.name, computed, expected, error, error <= tolerance if claim.verdict else None)
    best, expected = float("inf"), float("nan")
    for step in (1e-4, 1e-5, 1e-6):  # the best of three: truncation, rounding and kinks each spoil another one
        ahead, behind = float(claim.along(step)), float(claim.along(-step))
        difference = (ahead - behind) / (2 * step)
        rounding = 1e-15 * max(abs(ahead), abs(behind)) / step
        error = _relative(computed, difference, rounding)
        if error < best:
            best, expected = error, difference
    return Comparison(claim.name, computed, expected, best, best <= tolerance)


def _relative(a: float, b: float, noise: float) -> float:
    """Relative difference, where a difference below ``noise`` cannot be told from zero."""
    difference = abs(a - b)
    return 0.0 if difference <= noise else difference / max(abs(a), abs(b))


def _widened(batch: Any) -> Any:
    def widen(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(widen, batch)


def _state(level: Level) -> list[Tensor]:
    entries = [entry for key, entry in level.optimizer.state.items() if isinstance(key, Tensor)]
    return [x for entry in entries for name, x in entry.items() if isinstance(x, Tensor) and name != "step"]


@contextmanager
def _float64(modules: Iterable[nn.Module], variables: Iterable[Tensor]) -> Iterator[None]:
    """Give every floating-point tensor a float64 copy of its data, and its own data back afterwards."""
    tensors: dict[int, Tensor] = {id(t): t for t in variables}
    for module in modules:
        tensors.update((id(t), t) for t in (*module.parameters(), *module.buffers()))
    kept = [(t, t.data, t.grad) for t in tensors.values() if t.is_floating_point()]
    try:
        for tensor, data, _ in kept:
            tensor.grad = None
            tensor.data = data.double()
        yield
    finally:
        for tensor, data, grad in kept:
            tensor.data = data
            tensor.grad = grad
