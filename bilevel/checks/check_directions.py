"""``check_directions``: what a method computed, against plain autograd and finite differences of the user's losses."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import count, number
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Evaluator, Oracle
from ..evaluation.precision import float64, widened, widening
from ..levels import Level
from ..optimizer.method_state import MethodState
from ..vectors import Vector, dot
from .claims import Claim, Slope
from .plain import Plain, Precision
from .report import Comparison, Report, worse

# A central difference in float64 with a step of about 1e-5 is good to some 1e-10 where third derivatives are of order
# one.
TOLERANCE = 1e-6
# How torch says that a loss mixes types.
MIXED = ("dtype", "scalar type", "Float")


class Check:
    """What a method's claims are made from: fresh looks at the losses, and probes of both levels.

    Attributes:
        probes: Random vectors of the upper and the lower level, in pairs.
    """

    def __init__(self, optimizer: Checkable, batches: Sequence[Any], samples: int) -> None:
        self._optimizer, self._batches = optimizer, batches
        self.precision = Precision()
        self._verification = deepcopy(optimizer._evaluator.verification)
        generator = torch.Generator().manual_seed(0)

        def probe(level: Level) -> list[Tensor]:
            return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in level.tensors]

        upper, lower = optimizer._levels()
        self.probes = [(probe(upper), probe(lower)) for _ in range(samples)]

    @contextmanager
    def oracle(self, *, verifies: bool = True) -> Iterator[Oracle]:
        """Look at the losses as a step would, and take everything back; each look sees the same random numbers.

        ``verifies``: with its shortcuts verified, and replaced where they are wrong, as in a look of a step.
        """
        with self._rehearsed(), self._optimizer._oracle(self._batches, verifies=verifies) as oracle:
            yield oracle
            oracle.replay.undo()

    @contextmanager
    def _rehearsed(self) -> Iterator[None]:
        """What is found out about shortcuts in the check is the check's own: its next step finds it out for itself."""
        evaluator = self._optimizer._evaluator
        own, evaluator.verification = evaluator.verification, self._verification
        self._verification.look_again()
        try:
            yield
        finally:
            evaluator.verification = own

    def repeat(self) -> None:
        """Find out how well the losses repeat."""
        with self.plain() as plain:
            for value in (plain.lower_value, plain.upper_value):
                self.precision.repeated(float(value()), float(value()))

    @contextmanager
    def plain(self) -> Iterator[Plain]:
        """The same by plain autograd."""
        with self.oracle(verifies=False) as oracle:
            yield Plain(oracle, self.precision)


class Checkable(Protocol):
    """What :func:`check_directions` needs of an optimizer; every :class:`bilevel.BilevelOptimizer` has it."""

    def _oracle(
        self, batches: Sequence[Any], upper: Any = ..., lower: Any = ..., *, verifies: bool = ...
    ) -> AbstractContextManager[Oracle]: ...

    _evaluator: Evaluator

    def _claims(self, check: Check) -> Generator[Claim, None, None]: ...

    _state: MethodState

    def _all_modules(self) -> list[nn.Module]: ...

    def _levels(self) -> tuple[Level, Level]: ...


def check_directions(optimizer: Checkable, *batches: Any, samples: int = 2, tolerance: float = TOLERANCE) -> Report:
    """Compare what ``optimizer`` computes at the current point with plain autograd and with finite differences.

    Modules, bare variables and the floating-point tensors of the batches are cast to float64 for the check and
    restored bit for bit; nothing moves. Two questions are asked.

    *Are the directions those of the method's own formula?* Every gradient and product in it is taken once more by
    ``torch.autograd.grad`` of your closure as it stands, without any of the ways in which the library evaluates
    closures faster:

    * ``BOME``, ``EBOMLC``: gradients of F, G and q (as ``value_gradient`` reads it), Q, the multiplier, the directions
      of both levels and, with ``step_from="inner"``, the inner point;
    * ``Unrolled``: the derivative back through the (last ``truncate``) lower steps, one double backward each;
    * ``EMLC``, ``MLC``: the products at their own points, with their own discount; of ``MLC`` the accumulated estimate;
    * ``Implicit``: the formula with the p that was found, and the residual of that p;
    * ``FiniteDifference``, ``SAMA``: their central difference of plain gradients; and whether, in the limit of a small
      radius, it is the derivative that plain autograd gives.

    *Is autograd's derivative of your losses their derivative?* Directional derivatives of F, G and q, or of F after
    the lower steps, against central differences. An approximate method's cosine with, and relative distance from, the
    exact derivative of its lower steps stand beside, without a verdict.

    There is no verdict, and a note says why, where a kink (ReLU at 0) lies so near that the differences to both sides
    never agree; where something that depends on the variables is a constant for autograd (``detach()``, ``no_grad``,
    the singular vectors of spectral norm), which ``bilevel.hold(tensor)`` would hold for both; where an operation has
    no second derivative; and where a loss computes in less than float64 inside. Casts that it makes itself
    (``logits.float()``, autocast) are casts to float64 here, so that this is rare. A loss that is not the same function
    in every call fails.

    Args:
        optimizer: Any optimizer of this library.
        batches: As for ``step``.
        samples: Random probes per gradient, >= 1; each costs up to a dozen loss calls per line of the report, more
            near a kink. A line shows the worst probe, and lacks a verdict only if all of them do.
        tolerance: Largest relative difference that passes, >= 0.

    Returns:
        A report; ``report.passed`` is False only on a real disagreement, ``print(report)`` shows a table with notes,
        whose first line says if nothing at all got a verdict.

    Raises:
        TypeError, ValueError: ``samples`` or ``tolerance`` is off.
        RuntimeError: From your closure, if it mixes in float32 tensors of its own that could not be cast; pass them
            through the batch or ``other=``.

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
    # The state of the optimizers and of the method as well: real lower steps are taken here, and torch mixes no dtypes.
    own = [x for x in tree_leaves(optimizer._state.values()) if isinstance(x, Tensor)]
    variables = [*upper.tensors, *lower.tensors, *_state(upper), *_state(lower), *own]
    wide = float64(optimizer._all_modules(), variables)
    lines: tuple[Comparison, ...] = ()
    with wide:
        check = Check(optimizer, [widened(batch) for batch in batches], samples)
        mixed: RuntimeError | None = None
        try:
            lines = _compared(optimizer, check, tolerance)
        except RuntimeError as error:
            if not any(mark in str(error) for mark in MIXED):
                raise
            mixed = error
        if mixed is not None or check.precision.dtype != torch.float64:
            # A cast, or a constant, inside a loss. Once more with float64 in its place, if the loss can do that.
            check.precision = Precision()
            try:
                with widening():
                    lines = _compared(optimizer, check, tolerance)
            except Exception:
                if mixed is not None:
                    raise mixed from None
    return Report(type(optimizer).__name__, lines)


def _compared(optimizer: Checkable, check: Check, tolerance: float) -> tuple[Comparison, ...]:
    lines: dict[str, Comparison] = {}
    check.repeat()
    # Closed whatever happens: a claim is judged while the look that it came from is open.
    with closing(optimizer._claims(check)) as claims:
        for claim in claims:
            line = claim.compare(tolerance, check.precision)
            lines[line.name] = worse(lines[line.name], line) if line.name in lines else line
    return tuple(lines.values())


def loss_claims(check: Check, plain: Plain, upper: Evaluation, lower: Evaluation) -> Iterator[Claim]:
    """Directional derivatives of F and G in both levels, from gradients that a method works with."""

    def loss(side: str, u: Vector, v: Vector) -> tuple[Callable[[float], Tensor], Callable[[float], Evaluation]]:
        def along(size: float) -> Tensor:
            with plain.shifted(size, u, v):
                return plain.upper_value() if side == "upper" else plain.lower_value()

        def differentiated(size: float) -> Evaluation:
            with plain.shifted(size, u, v):
                return plain.upper() if side == "upper" else plain.lower()

        return along, differentiated

    for up, low in check.probes:
        still_up, still_low = [None] * len(up), [None] * len(low)
        for name, side, gradients in (("F", "upper", upper), ("G", "lower", lower)):
            along, found = loss(side, up, still_low)
            slope = partial(_along, found, "upper", up)
            yield Slope(f"<grad_alpha {name}, u>", dot(gradients.upper, up), along, slope)
            along, found = loss(side, still_up, low)
            slope = partial(_along, found, "lower", low)
            yield Slope(f"<grad_w {name}, u>", dot(gradients.lower, low), along, slope)


def _along(found: Callable[[float], Evaluation], side: str, direction: Vector, size: float) -> Tensor:
    evaluation = found(size)
    return dot(evaluation.upper if side == "upper" else evaluation.lower, direction)


def _state(level: Level) -> list[Tensor]:
    entries = [entry for key, entry in level.optimizer.state.items() if isinstance(key, Tensor)]
    return [x for entry in entries for name, x in entry.items() if isinstance(x, Tensor) and name != "step"]
