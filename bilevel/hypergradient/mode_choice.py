"""Which way a product of the lower loss is computed: the choice, the fallback, and whether the way can be trusted.

``auto`` is what ``benchmarks/hypergradient.py`` found to be faster and smaller. For ``G_aw v`` alone that is
``forward``: one dual evaluation through the lower model, 1.2 plain gradients on a ResNet-32 against 3.7. For both
products it is ``reverse``: 4.3 against 4.6, and half the memory. Where a loss does not allow the one, the other serves,
after one warning that says why.

``forward`` and ``difference`` do to a closure what plain autograd never does, so that both are verified
(``evaluation/verification.py``): at every step the slope of G that they see must be ``<grad_w G, v>``, and in looks the
product is compared with double backward. Where they differ, double backward serves from then on, after one warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ClosureError
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..evaluation.verification import DECIDED, out_of_memory, rounding, slope_gap, slopes_agree, truncation, vector_gap
from ..vectors import Tensors, add_scaled, dot, present, squared_norm
from .modes import NoDoubleBackward, ProductMode, Unavailable, refusal

Kind = Literal["hessian", "mixed"]
# What the slope of a difference must agree to in float64, and the noise in a difference that is worth a warning.
STRAIGHT = 1e-5
NOISY = 0.1
DISAGREEMENTS = {
    "forward": (
        "Forward mode gives lower_loss another derivative than plain autograd (by {gap:.1e}). Usual causes: "
        "torch.no_grad() inside the loss, which forward mode does not see (write .detach(), or bilevel.hold); a "
        "condition on requires_grad; a gradient hook; a parameter that is read past its module."
    ),
    "difference": (
        "A difference of lower_loss is another derivative than plain autograd's (by {gap:.1e}): something in it "
        "depends on the lower variables and is hidden from autograd. Usual causes: .detach() or torch.no_grad() in the "
        "loss (write bilevel.hold(tensor), which is a constant for both); a gradient hook."
    ),
}


@dataclass(frozen=True)
class Found:
    """A product, and what verifies it.

    Attributes:
        product: ``G_aw v``, and ``G_ww v`` where both were asked for, in one vector.
        slope: The slope of G along v as the mode saw it, and G; None where they are plain autograd's.
        gradient: ``grad_w G`` by plain autograd, where the mode computed it.
    """

    product: Tensors
    slope: tuple[Tensor, Tensor] | None = None
    gradient: Tensors | None = None


Way = Callable[[Oracle, Tensors, Tensors | None], Found]


@dataclass(frozen=True)
class Ways:
    """The three modes of a kind of product, as functions of the look, the direction and the point."""

    kind: Kind
    batch: int
    forward: Way
    reverse: Way
    difference: Way


def mode_taken(oracle: Oracle, kind: Kind, mode: ProductMode) -> str:
    """Name the mode that serves products of this kind, for ``stats``."""
    if oracle.plain:
        return "reverse"
    # Bare tensors are read from the closure's surroundings, where no substitute reaches them: no use in trying.
    first = "reverse" if kind == "hessian" or oracle.lower_level.has_bare_tensors else "forward"
    return oracle.verification.choices.get(f"{kind} product, {mode}", first if mode == "auto" else mode)


def by_mode(
    oracle: Oracle,
    ways: Ways,
    direction: Tensors,
    at: Tensors | None,
    mode: ProductMode,
    gradient: Tensors | None = None,
) -> Tensors:
    """Compute a product by its mode. If ``auto`` cannot be served, the other exact one serves from then on; what
    disagrees with plain autograd is replaced by double backward.

    ``gradient``: ``grad_w G`` at the point, where the caller has it.
    """
    oracle.refuse_hooks()
    chosen = mode_taken(oracle, ways.kind, mode)
    if chosen == "difference":
        return _verified(oracle, ways, direction, at, mode, chosen, ways.difference(oracle, direction, at), gradient)
    way, otherwise = (ways.forward, ways.reverse) if chosen == "forward" else (ways.reverse, ways.forward)
    try:
        found = way(oracle, direction, at)
    except Unavailable as problem:
        if mode != "auto":
            raise refusal(problem) from problem.__cause__
        try:
            found = otherwise(oracle, direction, at)
        except Unavailable as second:
            no_mode = problem if isinstance(problem, NoDoubleBackward) else second
            raise refusal(no_mode) from no_mode.__cause__
        chosen, name = ("reverse", "double backward") if chosen == "forward" else ("forward", "forward mode")
        oracle.verification.choices[f"{ways.kind} product, {mode}"] = chosen
        oracle.verification.say(f"{problem} Falling back to {name} for this optimizer.")
    return _verified(oracle, ways, direction, at, mode, chosen, found, gradient)


def _verified(
    oracle: Oracle,
    ways: Ways,
    direction: Tensors,
    at: Tensors | None,
    mode: ProductMode,
    chosen: str,
    found: Found,
    gradient: Tensors | None,
) -> Tensors:
    """Return the product that was found, or double backward's if they disagree."""
    if chosen == "reverse" or not oracle.watching or oracle.lower_loss.name in oracle.verification.unrepeatable:
        return found.product
    name = f"{ways.kind} product by {chosen} mode" if chosen == "forward" else f"{ways.kind} product by {chosen}"
    known = found.gradient if found.gradient is not None else gradient
    gap = math.nan
    suspicious = False
    if known is not None and found.slope is not None:
        slack = (rounding if chosen == "forward" else truncation)(oracle.dtype)
        slope, value = found.slope
        if not slopes_agree(slope, known, direction, slack):
            measured = slope_gap(slope, known, direction, value)
            suspicious = oracle.verification.suspects(name, measured, slack)
            gap = float(measured) if suspicious else gap
    plain: Found | None = None
    if oracle.comparing and not suspicious:
        try:
            with oracle.replay.silently():
                plain = ways.reverse(oracle, direction, at)
        except Unavailable:
            suspicious = chosen == "difference"  # nothing to compare with but float64
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            oracle.verification.say(f"{name}: not verified, for want of memory. Nothing else is affected.")
            return found.product
        else:
            measured = vector_gap(found.product, plain.product, _floor(oracle, known, direction))
            suspicious = oracle.verification.suspects(name, measured, 10 * rounding(oracle.dtype))
            gap = float(measured)
    if not suspicious:
        return found.product
    decided: list[_Decision] = []

    def in_float64() -> float:
        decided.append(_decide(oracle, ways, direction, at, chosen))
        return decided[-1].gap

    if not oracle.differs(
        name, gap if gap == gap else 0.0, in_float64, STRAIGHT if chosen == "difference" else DECIDED
    ):
        if chosen == "difference" and decided and oracle.dtype != torch.float64:
            _tell_noise(oracle, ways, direction, at, found, plain, decided[-1].truncation)
        return found.product
    told = DISAGREEMENTS[chosen].format(gap=decided[-1].gap if decided else gap)
    try:
        plain = plain or ways.reverse(oracle, direction, at)
    except Unavailable as problem:
        raise ClosureError(f"{told} Nothing else can serve this loss: {problem}") from problem.__cause__
    oracle.verification.choices[f"{ways.kind} product, {mode}"] = "reverse"
    oracle.verification.say(f"{told} Falling back to double backward for this optimizer.")
    return plain.product


def _tell_noise(
    oracle: Oracle,
    ways: Ways,
    direction: Tensors,
    at: Tensors | None,
    found: Found,
    plain: Found | None,
    truncation: float,
) -> None:
    """Warn where a difference that is right in float64 is hardly a number in the precision of the loss."""
    try:
        with oracle.replay.silently():
            plain = plain or ways.reverse(oracle, direction, at)
    except Unavailable:
        return
    apart = float(vector_gap(found.product, plain.product))
    if apart > max(NOISY, 3 * truncation):
        name = f"{ways.kind} product by difference"
        oracle.verification.say_of(
            name,
            f"{name}: {apart:.0%} of it is error of the precision that lower_loss computes in; in float64 it is right. "
            "Usual causes: a radius that is too small, half precision in compiled code, or a loss that is large beside "
            'its slopes. Use product="reverse" or a larger radius, or compute the lower loss in float32.',
        )


@dataclass(frozen=True)
class _Decision:
    """How far a mode is from plain autograd in float64; of a difference also how far its product is, by truncation."""

    gap: float
    truncation: float = math.inf


def _decide(oracle: Oracle, ways: Ways, direction: Tensors, at: Tensors | None, chosen: str) -> _Decision:
    """Compare a mode with plain autograd in float64: of differences the slope, as their product may sit on a kink."""
    with oracle.in_float64() as wide:
        v = [None if x is None else x.double() for x in direction]
        point = None if at is None else [x.double() for x in present(at)]
        here = wide.lower(point, batch=ways.batch, wrt="lower")
        gradient = here.lower
        again = (ways.forward if chosen == "forward" else ways.difference)(wide, v, point)
        try:
            plain = ways.reverse(wide, v, point)
            apart = float(vector_gap(again.product, plain.product, _floor(wide, gradient, v)))
        except Unavailable:
            apart = math.inf
        if chosen == "difference":
            gap = float(_slope_gap_of_differences(wide, ways.batch, here, v, point))
            return _Decision(min(gap, apart), apart)
        if math.isfinite(apart) or again.slope is None:
            return _Decision(apart)
        return _Decision(float(slope_gap(again.slope[0], gradient, v, here.value)))


def _slope_gap_of_differences(
    wide: Oracle, batch: int, here: Evaluation, direction: Tensors, at: Tensors | None
) -> Tensor:
    """How far the slope of G between two points is from the mean of ``<grad_w G, v>`` at the two.

    At the two points and not between them, where a kink may lie: autograd takes one side of it, a difference both.
    """
    start = at if at is not None else wide.point()
    size = squared_norm(direction).sqrt().clamp(min=1e-30)
    scale = (squared_norm(here.lower) * squared_norm(direction)).sqrt().clamp(min=1e-30)
    gaps = []
    for step in (1e-5, 1e-6):
        ahead, behind = (
            wide.lower(add_scaled(start, sign * step / size, direction), batch=batch, wrt="lower") for sign in (1, -1)
        )
        slope = (ahead.value - behind.value).to(size.device) * (size / (2 * step))
        expected = (dot(ahead.lower, direction) + dot(behind.lower, direction)) / 2
        noise = 8 * torch.finfo(torch.float64).eps * here.value.abs().to(size.device) * (size / step)
        gaps.append(((slope - expected).abs() - noise).clamp(min=0.0) / scale)
    return torch.stack(gaps).min()


def _floor(oracle: Oracle, gradient: Tensors | None, direction: Tensors) -> Tensor:
    """Return a length below which a product is taken for 0: of rounding, where large terms cancel."""
    unit = torch.finfo(oracle.dtype).eps
    size = squared_norm(oracle.point()).sqrt().clamp(min=1.0)
    scale = squared_norm(direction).sqrt() / size
    return unit * scale if gradient is None else unit * scale * squared_norm(gradient).sqrt().clamp(min=1.0)
