"""What ``check_directions`` compares, kind by kind: each check of a number or a vector knows how to judge itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf, isfinite, nan

import torch
from torch import Tensor

from ..vectors import Tensors, dot, squared_norm, subtract
from .constants import constants_held, recording
from .differences import BESIDE, REPEATS, Finding, Function, differentiated
from .plain import Precision
from .report import Comparison

# What a central difference may be off by where ``product="difference"`` chose its step.
DIFFERENCE = 1e-4
# A method that takes differences is off by about its radius anyway: what it sees of constants may be that much.
SEEN = 1e-2
UNREPEATABLE = "the loss is not the same function in every call: {:.1e} of its value apart at one point."
WRONG_DERIVATIVE = (
    "autograd's derivative of the loss is not its derivative. A custom Function with a wrong backward, or one that is "
    "meant to be another (straight-through)?"
)
CONSTANT = (
    "something that depends on the variables is a constant for autograd: detach(), no_grad, .item(), a norm's singular "
    "vectors. With it held they agree; bilevel.hold(tensor) holds it everywhere."
)
HELD_NOWHERE = (
    "differences see what is a constant for autograd: detach(), no_grad, .item(), a norm's singular vectors. This "
    "method takes differences, so write bilevel.hold(tensor) for it."
)


class Check(ABC):
    """Something that a method computed, and how to get it another way."""

    name: str

    @abstractmethod
    def compare(self, tolerance: float, precision: Precision) -> Comparison:
        """Get it the other way, and judge. ``precision`` is that of the losses, found out on the way."""


@dataclass(frozen=True)
class Slope(Check):
    """``computed`` is the derivative of ``along`` at 0.

    Attributes:
        along: A value of the losses as a function of the distance along a probe.
        slope: Its derivative anywhere on that line by plain autograd, or None where that cannot be had.
        tolerance: What ``computed`` may be off from plain autograd by its method, if more than the tolerance.
        by_differences: Whether the method takes differences itself, which then must be those of plain autograd.
    """

    name: str
    computed: Tensor
    along: Function
    slope: Function | None = None
    tolerance: float = 0.0
    by_differences: bool = False

    def compare(self, tolerance: float, precision: Precision) -> Comparison:
        computed = float(self.computed)
        plain = computed if self.slope is None else float(self.slope(0.0))
        off = _relative(computed, plain, 1e-14)
        if not off <= _within(max(tolerance, self.tolerance), precision):
            return Comparison(self.name, computed, plain, off, False, _said_by(self.tolerance, precision))
        if precision.dtype != torch.float64:
            note = f"a loss computes in {precision.dtype} inside, too coarse for differences."
            return Comparison(self.name, computed, plain, off, None, f"no verdict from differences: {note}")
        found = differentiated(self.along, plain, tolerance)
        if found.agrees:
            return Comparison(self.name, computed, found.difference, max(off, found.error), True)
        passed, note = self._explained(plain, tolerance, found)
        return Comparison(self.name, computed, found.difference, found.error, passed, note)

    def _explained(self, plain: float, tolerance: float, found: Finding) -> tuple[bool | None, str]:
        """Why plain autograd and differences disagree, and what follows for the verdict."""
        if not isfinite(plain) or found.error == inf:
            return False, "not finite."
        if found.noise > 0:
            return False, UNREPEATABLE.format(found.noise)
        constant: tuple[bool | None, str] = (None, f"no verdict: {CONSTANT}")
        if self.by_differences:
            constant = (False, HELD_NOWHERE) if found.error > SEEN else (None, f"no verdict: {HELD_NOWHERE}")
        if self._agrees_with_constants_held(plain, tolerance, 0.0):
            return constant
        wrong = found.agrees is False
        if self.slope is not None:  # a kink is left behind beside it, a mistake is not
            for place in BESIDE:
                there = float(self.slope(place))
                agrees = differentiated(self.along, there, tolerance, place).agrees
                if agrees:
                    wrong = False
                    break
                if self._agrees_with_constants_held(there, tolerance, place):
                    return constant
                wrong = wrong or agrees is False
        if wrong:
            return False, WRONG_DERIVATIVE
        if found.jumps:
            return None, "kink at this point, no verdict: the value jumps there."
        low, high = sorted((found.backward, found.forward))
        within = low - tolerance * abs(low) <= plain <= high + tolerance * abs(high)
        where = f"{'between' if within else 'outside'} the slopes {low:.4g} and {high:.4g} to both sides."
        return None, f"kink near this point, no verdict: {plain:.4g} lies {where}"

    def _agrees_with_constants_held(self, slope: float, tolerance: float, at: float) -> bool:
        with recording() as constants:
            self.along(at)

        def held(size: float) -> Tensor:
            with constants_held(constants):
                return self.along(size)

        try:
            return bool(constants.values) and differentiated(held, slope, tolerance, at).agrees is True
        except LookupError:
            return False


@dataclass(frozen=True)
class Same(Check):
    """``computed`` is the same vector, or number, as ``expected``.

    Attributes:
        size: Length of the terms that it was summed from, if they may cancel.
        tolerance: As in :class:`Slope`.
    """

    name: str
    computed: Tensors
    expected: Tensors
    size: float = 0.0
    tolerance: float = 0.0

    def compare(self, tolerance: float, precision: Precision) -> Comparison:
        a, b = _length(self.computed), _length(self.expected)
        apart = _length(subtract(self.computed, self.expected))
        along = float(dot(self.computed, self.expected)) / b if b > 0 else a
        shown = _number(self.computed, along), _number(self.expected, b)
        if not isfinite(apart):
            return Comparison(self.name, *shown, nan, False, "not finite.")
        error = 0.0 if apart <= 1e-14 + 1e-12 * self.size else apart / max(a, b)
        tolerance = max(tolerance, self.tolerance)
        if error <= tolerance:
            return Comparison(self.name, *shown, error, True)
        coarse = f"a loss computes in {precision.dtype} inside."
        if error <= _within(tolerance, precision):
            return Comparison(self.name, *shown, error, True, coarse)
        if torch.finfo(precision.dtype).bits < 32:
            return Comparison(self.name, *shown, error, None, f"no verdict: {coarse}")
        return Comparison(self.name, *shown, error, False, _said_by(self.tolerance, precision))


@dataclass(frozen=True)
class Measured(Check):
    """A distance from something that the method only approximates: told, without a verdict."""

    name: str
    value: Tensor
    ideal: float

    def compare(self, tolerance: float, precision: Precision) -> Comparison:
        value = float(self.value)
        return Comparison(self.name, value, self.ideal, abs(value - self.ideal), None, measured=True)


@dataclass(frozen=True)
class Unknown(Check):
    """What cannot be compared, and the reason."""

    name: str
    computed: float
    reason: str

    def compare(self, tolerance: float, precision: Precision) -> Comparison:
        return Comparison(self.name, self.computed, nan, nan, None, f"no verdict: {self.reason}")


def _length(vector: Tensors) -> float:
    return float(squared_norm(vector).sqrt())


def _number(vector: Tensors, otherwise: float) -> float:
    """The value of a vector that is a single number."""
    single = vector[0] if len(vector) == 1 else None
    return float(single) if single is not None and single.dim() == 0 else otherwise


def _relative(a: float, b: float, noise: float) -> float:
    """Relative difference, where a difference below ``noise`` cannot be told from zero."""
    difference = abs(a - b)
    return 0.0 if difference <= noise else difference / max(abs(a), abs(b))


def _within(tolerance: float, precision: Precision) -> float:
    """What two ways of computing the same may differ by where a loss itself is coarser than float64."""
    return tolerance if precision.dtype == torch.float64 else max(tolerance, 100 * precision.unit)


def _said_by(loose: float, precision: Precision) -> str:
    if precision.noise > REPEATS:
        return UNREPEATABLE.format(precision.noise)
    if loose:
        return f"expected is by plain autograd. A difference that is not one of autograd's: {HELD_NOWHERE}"
    return "expected is by plain autograd of the closure as it stands."
