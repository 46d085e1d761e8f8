"""Is a number the derivative of a function of one variable? Finite differences, with kinks told from mistakes.

Near a kink (ReLU at 0) the differences to both sides disagree as long as the kink lies inside the step. So the step
shrinks until they agree, and a verdict is given there; where they never do, there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, nan

from torch import Tensor

# A central difference in float64 is best at about 1e-5; the smaller steps are for kinks in the way of that one.
STEPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
# Where a function with a kink at 0 is smooth, most likely: beside it, at no round distance.
BESIDE = (7.3e-4, -4.1e-4, 2.9e-3)
# Two values at this distance differ by rounding alone.
TOUCHING = 1e-13
# A loss that repeats its value worse than this is not one function in all its calls.
REPEATS = 1e-9

Function = Callable[[float], Tensor]


@dataclass(frozen=True)
class Finding:
    """What the differences of a function say about a number that should be its derivative.

    Attributes:
        agrees: True or False; None where the differences to both sides never agree with each other.
        difference: The central difference that decided, or that came closest.
        error: Its relative distance from the number.
        backward: The difference to the left, at the smallest step.
        forward: The difference to the right.
        noise: How far apart two values at the point are, relative to them, if that is more than rounding.
        jumps: Whether the function jumps at the point: no difference converges to anything.
    """

    agrees: bool | None
    difference: float
    error: float
    backward: float = nan
    forward: float = nan
    noise: float = 0.0
    jumps: bool = False


def differentiated(h: Function, slope: float, tolerance: float, at: float = 0.0) -> Finding:
    """Compare ``slope`` with the derivative of ``h`` at ``at``. Calls ``h`` 6 to 14 times."""
    here, again = float(h(at)), float(h(at))
    bend = float(h(at - TOUCHING)) + float(h(at + TOUCHING)) - 2 * here
    if not isfinite(slope) or not isfinite(bend):
        return Finding(False, here, inf)
    # A difference of losses may be far smaller than they are: 1e-12 is the rounding of losses of order one.
    coarse = max(REPEATS * abs(here), 1e-12 * abs(slope), 1e-12)
    if abs(here - again) > coarse:
        return Finding(None, nan, nan, noise=abs(here - again) / max(abs(here), 1e-300))
    if abs(bend) > coarse:
        return Finding(None, nan, nan, jumps=True)
    noise = max(1e-15 * abs(here), 2 * abs(here - again), 2 * abs(bend))
    closest = Finding(None, nan, inf)
    before: tuple[float, float, bool] | None = None
    for step in STEPS:
        ahead, behind = float(h(at + step)), float(h(at - step))
        forward, backward = (ahead - here) / step, (here - behind) / step
        difference, gap = (forward + backward) / 2, abs(forward - backward)
        distance, rounding = abs(slope - difference), max(noise, 1e-15 * abs(ahead)) / step
        size = max(abs(slope), abs(difference))
        error = 0.0 if distance <= rounding else distance / size if size > 0 else 0.0
        # A small step resolves little: there, what cannot be told from zero says nothing.
        if error <= tolerance and (step == STEPS[0] or rounding <= 1e-3 * size):
            agreed = Finding(True, difference, error, backward, forward)
            if closest.agrees or step < STEPS[0] or error < 1e-2 * tolerance:
                return agreed if error <= closest.error else closest
            closest = agreed  # one step more, because the error of the largest is mostly its own
            continue
        if closest.agrees:
            return closest
        # One kink inside the step spoils the central difference by half of the gap.
        apart = distance > 3 * gap + 10 * rounding
        if before is not None:
            last_difference, last_gap, last_apart = before
            settled = gap <= 0.2 * last_gap + 4 * rounding and abs(difference - last_difference) <= 0.1 * distance
            if (apart and (last_apart or step == STEPS[-1])) or (settled and distance > 10 * rounding):
                return Finding(False, difference, error, backward, forward)
        before = difference, gap, apart
        better = error < closest.error
        closest = Finding(
            None, difference if better else closest.difference, min(error, closest.error), backward, forward
        )
    return closest
