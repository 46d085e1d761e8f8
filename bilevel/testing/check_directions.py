"""``check_directions``: what a method computed, against plain autograd and finite differences of the user's losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks.checker import Checker
from ..checks.plain import Precision
from ..checks.report import Comparison, Report, worse
from ..errors import count, number
from ..evaluation.oracle import Oracle
from ..evaluation.precision import float64, widened, widening
from ..levels import Level
from ..optimizer.base import BilevelOptimizer
from ..processes.joined import settled

# A central difference in float64 with a step of about 1e-5 is good to some 1e-10 where third derivatives are of order
# one.
TOLERANCE = 1e-6
# How torch says that a loss mixes types.
MIXED = ("dtype", "scalar type", "Float")


def check_directions(
    optimizer: BilevelOptimizer[Any], *batches: Any, samples: int = 2, tolerance: float = TOLERANCE
) -> Report:
    """Compare what ``optimizer`` computes at the current point with plain autograd and with finite differences.

    Modules, bare variables and the floating-point tensors of the batches are cast to float64 for the check and
    restored bit for bit; nothing moves. Two questions are asked.

    *Are the directions those of the method's own formula?* Every gradient and product in it is taken once more by
    ``torch.autograd.grad`` of your closure as it stands, without any of the ways in which the library evaluates
    closures faster:

    * ``BOME``, ``EBOMLC``: gradients of F, G and q (as ``value_gradient`` reads it), Q, the multiplier, the directions
      of both levels and, with ``step_from="lookahead"``, the inner point;
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
    upper, lower = optimizer._upper, optimizer._lower
    if upper.sharded or lower.sharded:
        raise TypeError(
            "check_directions: variables are sharded (fully_shard), and shards cannot be widened to float64. Check the "
            "same losses on a model that is whole."
        )
    # The state of the optimizers and of the method as well: real lower steps are taken here, and torch mixes no dtypes.
    variables = [*upper.tensors, *lower.tensors, *_state(upper), *_state(lower), *optimizer._state.tensors()]
    modules = [module for module, _ in optimizer._evaluator.modules]
    lines: tuple[Comparison, ...] = ()
    with optimizer._acting("check_directions"), float64(modules, variables):
        look = partial(_look, optimizer, [widened(batch) for batch in batches])
        checker = Checker(look, optimizer._evaluator, samples)
        mixed: RuntimeError | None = None
        try:
            lines = _compared(optimizer, checker, tolerance)
        except RuntimeError as error:
            if not any(mark in str(error) for mark in MIXED):
                raise
            mixed = error
        if mixed is not None or checker.precision.dtype != torch.float64:
            # A cast, or a constant, inside a loss. Once more with float64 in its place, if the loss can do that.
            checker.precision = Precision()
            try:
                with widening():
                    lines = _compared(optimizer, checker, tolerance)
            except Exception:
                if mixed is not None:
                    raise mixed from None
        settled("check_directions: its end")
    return Report(type(optimizer).__name__, lines)


@contextmanager
def _look(
    optimizer: BilevelOptimizer[Any], batches: Sequence[Any], *, kind: type[Oracle], verifies: bool
) -> Iterator[Oracle]:
    with optimizer._oracle(batches, kind=kind, verifies=verifies) as oracle, optimizer._looking(oracle):
        yield oracle


def _compared(optimizer: BilevelOptimizer[Any], checker: Checker, tolerance: float) -> tuple[Comparison, ...]:
    lines: dict[str, Comparison] = {}
    checker.repeat()
    # Closed whatever happens: what is checked is judged while the look that it came from is open.
    with closing(iter(optimizer.checks(checker))) as checks:  # type: ignore[type-var]
        for check in checks:
            line = check.compare(tolerance, checker.precision)
            lines[line.name] = worse(lines[line.name], line) if line.name in lines else line
    return tuple(lines.values())


def _state(level: Level) -> list[Tensor]:
    entries = [entry for key, entry in level.optimizer.state.items() if isinstance(key, Tensor)]
    return [x for entry in entries for name, x in entry.items() if isinstance(x, Tensor) and name != "step"]
