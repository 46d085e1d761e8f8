"""Products of the lower loss: ``d/de grad_(alpha, w) G(w + e v, alpha)`` at ``e = 0``, without a Hessian.

A *Hessian product* is both blocks, ``(G_aw v, G_ww v)``; a *mixed product* is ``G_aw v`` alone, which is cheaper.
``mode_choice.py`` says by which of three modes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..evaluation.evaluations import Evaluation
from ..evaluation.losses import leaves_of
from ..evaluation.oracle import Oracle
from ..microbatches import Sum
from ..processes.joined import Share, averaged, several
from ..vectors import Tensors, Vector, add_scaled, present, squared_norm, subtract
from .mode_choice import Found, Way, Ways, by_mode
from .modes import NoForwardMode, ProductMode, dual_numbers, refuse_wrong_rules, second_derivatives

Product = tuple[Vector, Vector]
Part = Callable[[int, int, Oracle, Tensors, Tensors | None], Found]  # of a product, on a batch's micro-batch


def hessian_product(
    oracle: Oracle, direction: Tensors, *, batch: int = 0, at: Tensors | None = None, product: ProductMode = "auto"
) -> Product:
    """Return ``(G_aw v, G_ww v)``, both blocks of the Hessian of G along v.

    Args:
        oracle: Where G is evaluated.
        direction: v, like the lower variables.
        batch: Which lower batch.
        at: The lower point; None: the current one.
        product: By which mode; see :mod:`bilevel.hypergradient.modes`.

    Raises:
        ClosureError: The mode, and with ``"auto"`` every mode, cannot serve this loss.

    Cost:
        ``forward`` one dual gradient (forward over reverse), ``reverse`` one gradient with its graph and one pass back
        through it, ``difference`` two plain gradients.

    Example:
        >>> import bilevel
        >>> from bilevel.hypergradient import hessian_product
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> with bilevel.testing.oracle(problem) as oracle:
        ...     _, product = hessian_product(oracle, oracle.point())
        >>> torch.allclose(product[0], problem.hessian @ problem.lower)
        True
    """
    forward, reverse = (partial(_joined, batch, partial(_in_parts, way, batch)) for way in (_forward, _reverse))
    ways = Ways("hessian", batch, forward, reverse, partial(_difference, batch))
    found = by_mode(oracle, ways, direction, at, product)
    size = len(oracle.upper_level.tensors)
    return Vector(found[:size], oracle.upper_level.names), Vector(found[size:], oracle.lower_level.names)


def mixed_product(
    oracle: Oracle,
    direction: Tensors,
    *,
    batch: int = 0,
    at: Tensors | None = None,
    product: ProductMode = "auto",
    gradient: Tensors | None = None,
    radius: float | None = None,
) -> Vector:
    """Return ``G_aw v`` alone, which is cheaper: forward mode then needs no reverse pass through the lower model.

    Args:
        oracle: Where G is evaluated.
        direction: v, like the lower variables.
        batch: Which lower batch.
        at: The lower point; None: the current one.
        product: By which mode; see :mod:`bilevel.hypergradient.modes`.
        gradient: ``grad_w G`` at this point, where the caller has it: it verifies the product at no cost.
        radius: Distance of the two points of a difference; None: the one that balances truncation against rounding.

    Raises:
        ClosureError: As of :func:`hessian_product`; or the lower loss depends on no upper variable.

    Cost:
        ``forward`` one dual evaluation through the lower model and one reverse pass through the upper one (reverse
        over forward), ``reverse`` one double backward, ``difference`` two evaluations that are forward-only through
        the lower model.

    Example:
        >>> import bilevel
        >>> from bilevel.hypergradient import mixed_product
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> with bilevel.testing.oracle(problem) as oracle:
        ...     product = mixed_product(oracle, oracle.point())
        >>> torch.allclose(product[0], -problem.coupling.T @ problem.lower)
        True
    """
    difference = partial(_mixed_difference, batch, radius)
    ways_in_parts = (partial(_in_parts, way, batch) for way in (_forward_mixed, _reverse_mixed))
    forward, reverse = (partial(_joined, batch, way) for way in ways_in_parts)
    ways = Ways("mixed", batch, forward, reverse, difference)
    found = Vector(by_mode(oracle, ways, direction, at, product, gradient), oracle.upper_level.names)
    oracle.check_dependence(found)
    return found


def _joined(batch: int, way: Way, oracle: Oracle, direction: Tensors, at: Tensors | None) -> Found:
    """A product of G by a way that looks at this process's batch alone: of several processes, the mean of theirs."""
    if several() is None:
        return way(oracle, direction, at)

    def share() -> Share:
        found = way(oracle, direction, at)
        return Share(found.slope or (), [*found.product, *(found.gradient or ())], rest=found)

    lower = oracle.lower_level.tensors
    mean = averaged(f"{oracle.owner}: a product", share, [*oracle.upper_level.tensors, *lower, *lower])
    size = len(mean.rest.product)
    slope = (mean.numbers[0], mean.numbers[1]) if mean.numbers else None
    return Found(mean.vector[:size], slope, mean.vector[size:] or None)


def _in_parts(way: Part, batch: int, oracle: Oracle, direction: Tensors, at: Tensors | None) -> Found:
    """A product is linear in G: sum it over the micro-batches of a batch, with one graph alive at a time."""
    weights = oracle.lower_weights(batch)
    if oracle.scaling is not None:
        way, direction = _lengthened(way, oracle, direction)
    if weights == (1.0,):
        return way(batch, 0, oracle, direction, at)
    product, slope, gradient = Sum(), Sum(), Sum()
    for part, weight in enumerate(weights):
        found = way(batch, part, oracle, direction, at)
        product.add(weight, found.product)
        if found.slope is not None:
            slope.add(weight, found.slope)
        if found.gradient is not None:
            gradient.add(weight, found.gradient)
    seen = [x for x in slope.total if x is not None]
    return Found(product.total, (seen[0], seen[1]) if seen else None, gradient.total or None)


def _lengthened(way: Part, oracle: Oracle, direction: Tensors) -> tuple[Part, Tensors]:
    """Make v as long as the lower variables, and the product as long as it was: else v underflows in half precision,
    as the gradients do that a scaler is there for.
    """
    size = squared_norm(direction).sqrt()
    factor = torch.where(size > 0, squared_norm(oracle.point()).sqrt().clamp(min=1.0) / size, 1.0)

    def shortened(batch: int, part: int, oracle: Oracle, direction: Tensors, at: Tensors | None) -> Found:
        found = way(batch, part, oracle, direction, at)
        slope = None if found.slope is None else (found.slope[0] / factor.to(found.slope[0].device), found.slope[1])
        return Found(_scaled(1.0 / factor, found.product), slope, found.gradient)

    return shortened, _scaled(factor, direction)


def _forward(batch: int, part: int, oracle: Oracle, direction: Tensors, at: Tensors | None) -> Found:
    """Forward over reverse: the gradient of dual tensors carries the product as its tangent."""
    upper, lower = oracle.upper_level.tensors, oracle.lower_level.tensors
    with dual_numbers():
        leaves = [value.detach().requires_grad_() for value in present(at if at is not None else oracle.point())]
        with oracle.lower_graph(batch, part=part, substitute=_duals(leaves, direction)) as (value, _):
            gradients: Tensors = [None] * (len(upper) + 2 * len(lower))
            if value.requires_grad:
                gradients = oracle.gradients(value, [*upper, *leaves, *lower])
        missed = zip(oracle.lower_level.names, gradients[len(upper) + len(leaves) :], strict=True)
        _refuse_unreached([name for name, g in missed if g is not None])
        found = gradients[: len(upper) + len(leaves)]
        tangents = [None if g is None else _tangent(g) for g in found]
        primals = [None if g is None else forward_ad.unpack_dual(g).primal.detach() for g in found[len(upper) :]]
        slope = _slope_of(value)
    return Found(tangents, slope, primals)


def _forward_mixed(batch: int, part: int, oracle: Oracle, direction: Tensors, at: Tensors | None) -> Found:
    """Reverse over forward: the tangent of G is ``<grad_w G, v>``, and its graph holds the upper variables alone."""
    upper = oracle.upper_level.tensors
    with dual_numbers():
        values = [value.detach() for value in present(at if at is not None else oracle.point())]
        with oracle.lower_graph(batch, part=part, substitute=_duals(values, direction)) as (value, _):
            if oracle.checking:
                names = dict(zip(map(id, oracle.lower_level.tensors), oracle.lower_level.names, strict=True))
                _refuse_unreached(leaves_of(value, names))
            tangent, slope = _tangent(value), _slope_of(value)
            if tangent is None or not tangent.requires_grad:
                return Found([None] * len(upper), slope)
            return Found(oracle.gradients(tangent, upper), slope)


def _duals(values: Sequence[Tensor], direction: Tensors) -> list[Tensor]:
    # A dual is a view: made under a caller's no_grad it would be cut off from the leaf whose gradient is wanted.
    with torch.enable_grad():
        return [
            x if v is None else forward_ad.make_dual(x, v.detach().to(x.dtype))
            for x, v in zip(values, direction, strict=True)
        ]


def _tangent(dual: Tensor) -> Tensor | None:
    """Return the tangent, or None where it is zero: torch then has a symbol without memory, which nothing can add
    to.
    """
    tangent = forward_ad.unpack_dual(dual).tangent
    return None if tangent is None or tangent._is_zerotensor() else tangent


def _slope_of(value: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(value).primal.detach(), _tangent(value)
    return (torch.zeros_like(primal) if tangent is None else tangent.detach()), primal


def _refuse_unreached(missed: list[str]) -> None:
    """A parameter in the graph beside its substitute means that the closure read it past the substitute."""
    if missed:
        raise NoForwardMode(
            f"lower_loss reads {', '.join(missed)} other than from a module given as lower=, where no substitute "
            "reaches it. Put the tensor into a module as a Parameter and read the module's attribute inside the loss."
        )


def _reverse(batch: int, part: int, oracle: Oracle, direction: Tensors, at: Tensors | None) -> Found:
    upper, lower = oracle.upper_level.tensors, oracle.lower_level.tensors
    return Found(_double_backward(oracle, batch, part, direction, at, [*upper, *lower]))


def _reverse_mixed(batch: int, part: int, oracle: Oracle, direction: Tensors, at: Tensors | None) -> Found:
    return Found(_double_backward(oracle, batch, part, direction, at, oracle.upper_level.tensors))


def _double_backward(
    oracle: Oracle, batch: int, part: int, direction: Tensors, at: Tensors | None, inputs: Sequence[Tensor]
) -> Tensors:
    with oracle.lower_graph(batch, at, part=part) as (value, _), second_derivatives():
        if not value.requires_grad:  # of this process's part of the batch
            return [None] * len(inputs)
        gradients = oracle.gradients(value, oracle.lower_level.tensors, create_graph=True)
        pairs = [(g, v) for g, v in zip(gradients, direction, strict=True) if g is not None and v is not None]
        pairs = [(g, v) for g, v in pairs if g.requires_grad]
        if not pairs:  # G is linear in w: no second derivatives at all
            return [None] * len(inputs)
        if oracle.checking:
            refuse_wrong_rules([value, *(g for g, _ in pairs)])
        outputs, cotangents = zip(*pairs, strict=True)
        return oracle.gradients(outputs, inputs, cotangents)


def _difference(batch: int, oracle: Oracle, direction: Tensors, at: Tensors | None) -> Found:
    step, points = _around(at if at is not None else oracle.point(), direction)
    with oracle.precisely():
        ahead, behind = (oracle.lower(point, batch=batch) for point in points)
    found = _scaled(0.5 / step, subtract([*ahead.upper, *ahead.lower], [*behind.upper, *behind.lower]))
    # The mean of the two gradients is the one in the middle, up to the square of the step.
    return Found(found, _slope(ahead, behind, step), _scaled(0.5, add_scaled(ahead.lower, 1.0, behind.lower)))


def _mixed_difference(
    batch: int, radius: float | None, oracle: Oracle, direction: Tensors, at: Tensors | None
) -> Found:
    """A central difference of two gradients in alpha alone."""
    step, points = _around(at if at is not None else oracle.point(), direction, radius)
    with oracle.precisely():
        ahead, behind = (oracle.lower(point, batch=batch, wrt="upper") for point in points)
    return Found(_scaled(0.5 / step, subtract(ahead.upper, behind.upper)), _slope(ahead, behind, step))


def _slope(ahead: Evaluation, behind: Evaluation, step: Tensor) -> tuple[Tensor, Tensor]:
    rise = ahead.value.to(step.device, step.dtype) - behind.value.to(step.device, step.dtype)
    return rise * (0.5 / step), ahead.value


def _around(point: Tensors, direction: Tensors, radius: float | None = None) -> tuple[Tensor, list[list[Tensor]]]:
    """Return the step of a central difference and the two points."""
    # The cube root of the rounding unit balances truncation against rounding.
    unit = max(torch.finfo(value.dtype).eps for value in present(point)) ** (1 / 3)
    size, scale = squared_norm(direction).sqrt(), squared_norm(point).sqrt()
    step = (unit * scale.clamp(min=1.0) if radius is None else radius) / size.clamp(min=1e-30)
    return step, [_moved(point, sign * step, direction) for sign in (1, -1)]


def _moved(point: Tensors, scale: Tensor, direction: Tensors) -> list[Tensor]:
    return present(add_scaled(point, scale, direction))


def _scaled(scale: Tensor | float, vector: Tensors) -> Tensors:
    return add_scaled([None] * len(vector), scale, vector)
