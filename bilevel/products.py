"""Mixed products of the lower loss: ``d/de grad_(alpha, w) G(w + e v, alpha)`` at ``e = 0``, without a Hessian.

Three routes give the same numbers (the third up to its step):

* ``forward``: dual tensors. Needs a forward-mode rule of every operation (for both products, of its backward too), and
  a loss that reads the lower variables from modules.
* ``reverse``: double backward; fails through compiled closures.
* ``difference``: a central difference of two plain gradients; works for every loss, approximate.

``auto`` is what ``benchmarks/hypergradient.py`` found to be faster and smaller. For ``G_aw v`` alone that is
``forward``: one dual evaluation through the lower model, 1.3 plain gradients on a ResNet-32 against 4.0. For both
products it is ``reverse``: 4.7 against 5.5, and half the memory. Where a loss does not allow the one, the other serves,
after one warning that says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Literal, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError

from .closures import leaves_of
from .errors import ClosureError
from .evaluator import Look, Point
from .vectors import Vector, add_scaled, squared_norm, subtract

Route = Literal["auto", "forward", "reverse", "difference"]
Kind = Literal["both", "upper"]
Product = tuple[Vector, Vector]
T = TypeVar("T")
ROUTES: tuple[str, ...] = ("auto", "forward", "reverse", "difference")
FIRST_ORDER = 'Use product="reverse" or product="difference", or a first-order method such as BOME or FiniteDifference.'
DIFFERENCE = 'Use product="difference", or a first-order method such as BOME or FiniteDifference.'
# How torch says that an operation has no forward mode; or that it has, and that fails (mse_loss on torch 2.13).
ZERO_TENSORS = "ZeroTensors are immutable"
NO_FORWARD_RULE = ("forward AD", "forward-mode", ZERO_TENSORS)
# How torch says that an operation cannot be differentiated twice.
NO_SECOND_RULE = ("is not implemented", "double backward", "create_graph=False", "differentiate twice")
# Where it does not say so: the node, and what to tell.
WRONG_SECOND_RULES = {
    # The gradient's graph ends in an error node beside the path to the variables: the second derivative reads 0.
    "torch::autograd::Error": "it calls a custom function that is marked once_differentiable.",
    # The fused kernel's second derivative takes the saved norm for a constant (gradgradcheck fails on torch 2.13).
    "WeightNormInterfaceBackward0": "torch's second derivative of weight_norm is wrong.",
}


def mixed_product(look: Look, index: int, direction: Vector, at: Point | None, route: Route) -> Product:
    """Return ``(G_aw v, G_ww v)`` for lower batch ``index``, at the current lower point or ``at`` another.

    Cost: ``forward`` one dual gradient (forward over reverse), ``reverse`` one gradient with its graph and one pass
    back through it, ``difference`` two plain gradients.
    """
    return _by_route(
        look,
        "both",
        route,
        partial(_forward, look, index, direction, at),
        partial(_reverse, look, index, direction, at),
        partial(_difference, look, index, direction, at),
    )


def upper_product(look: Look, index: int, direction: Vector, at: Point | None, route: Route) -> Vector:
    """Return ``G_aw v`` alone, which is cheaper: forward mode then needs no reverse pass through the lower model.

    Cost: ``forward`` one dual evaluation through the lower model and one reverse pass through the upper one (reverse
    over forward), ``reverse`` one double backward, ``difference`` two evaluations that are forward-only through the
    lower model.
    """
    return _by_route(
        look,
        "upper",
        route,
        partial(_forward_upper, look, index, direction, at),
        partial(_reverse_upper, look, index, direction, at),
        partial(upper_difference, look, index, direction, at),
    )


def route_taken(look: Look, kind: Kind, route: Route) -> str:
    """Name the route that serves products of this kind, for ``stats``."""
    if route != "auto":
        return route
    # Bare tensors are read from the closure's surroundings, where no substitute reaches them: no use in trying.
    first = "reverse" if kind == "both" or look.lower_level.has_bare_tensors else "forward"
    return look.product_routes.get(kind, first)


def _by_route(
    look: Look,
    kind: Kind,
    route: Route,
    forward: Callable[[], T],
    reverse: Callable[[], T],
    difference: Callable[[], T],
) -> T:
    chosen = route_taken(look, kind, route)
    if chosen == "difference":
        return difference()
    ways = [("forward", forward, "forward mode"), ("reverse", reverse, "double backward")]
    (_, way, _), (other, otherwise, name) = ways if chosen == "forward" else reversed(ways)
    try:
        return way()
    except _Unserved as problem:
        if route != "auto":
            raise _refusal(problem) from problem.__cause__
        try:
            found = otherwise()
        except _Unserved as second:
            no_route = problem if isinstance(problem, _NoDoubleBackward) else second
            raise _refusal(no_route) from no_route.__cause__
        warnings.warn(f"{problem} Falling back to {name} for this optimizer.", stacklevel=2)
        look.product_routes[kind] = other
        return found


class _Unserved(Exception):
    """A route does not serve this loss; the message names the operation or the variable."""


class _NoForwardMode(_Unserved):
    pass


class _NoDoubleBackward(_Unserved):
    pass


def _refusal(problem: _Unserved) -> ClosureError:
    return ClosureError(f"{problem} {FIRST_ORDER if isinstance(problem, _NoForwardMode) else DIFFERENCE}")


@cache
def _load_forward_rules() -> None:
    """Make one dual tensor quietly: with its first one torch loads scripted rules, and warns about torch.jit itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@contextmanager
def _dual_numbers() -> Iterator[None]:
    """Enter forward mode, and say in one line what has no rule for it."""
    _load_forward_rules()
    try:
        with forward_ad.dual_level():
            yield
    except RuntimeError as error:
        text = _first_line(error)
        # Checkpointing counts saved tensors, and dual numbers save more in the forward than in the recomputation.
        known = isinstance(error, (NotImplementedError, CheckpointError))
        if not known and not any(mark in text for mark in NO_FORWARD_RULE):
            raise
        if ZERO_TENSORS in text:  # torch does not say where
            text = f"mse_loss, most likely: write (a - b).square().mean(). {text}"
        raise _NoForwardMode(f"lower_loss has no forward-mode product: {text}") from error


def _forward(look: Look, index: int, direction: Vector, at: Point | None) -> Product:
    """Forward over reverse: the gradient of dual tensors carries the product as its tangent."""
    upper, lower = look.upper_level.tensors, look.lower_level.tensors
    with _dual_numbers():
        leaves = [value.detach().requires_grad_() for value in (at if at is not None else look.point())]
        with look.lower_graph(index, substitute=_duals(leaves, direction)) as (value, _):
            gradients = torch.autograd.grad(value, [*upper, *leaves, *lower], allow_unused=True)
        missed = zip(look.lower_level.names, gradients[len(upper) + len(leaves) :], strict=True)
        _refuse_unreached([name for name, g in missed if g is not None])
        found = gradients[: len(upper) + len(leaves)]
        tangents = [None if g is None else _tangent(g) for g in found]
    return tangents[: len(upper)], tangents[len(upper) :]


def _forward_upper(look: Look, index: int, direction: Vector, at: Point | None) -> Vector:
    """Reverse over forward: the tangent of G is ``<grad_w G, v>``, and its graph holds the upper variables alone."""
    upper = look.upper_level.tensors
    with _dual_numbers():
        values = [value.detach() for value in (at if at is not None else look.point())]
        with look.lower_graph(index, substitute=_duals(values, direction)) as (value, _):
            if look.checking:
                names = dict(zip(map(id, look.lower_level.tensors), look.lower_level.names, strict=True))
                _refuse_unreached(leaves_of(value, names))
            tangent = _tangent(value)
            if tangent is None or not tangent.requires_grad:
                return [None] * len(upper)
            return torch.autograd.grad(tangent, upper, allow_unused=True)


def _duals(values: Point, direction: Vector) -> list[Tensor]:
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


def _refuse_unreached(missed: list[str]) -> None:
    """A parameter in the graph beside its substitute means that the closure read it past the substitute."""
    if missed:
        raise _NoForwardMode(
            f"lower_loss reads {', '.join(missed)} other than from a module given as lower=, where no substitute "
            "reaches it. Put the tensor into a module as a Parameter and read the module's attribute inside the loss."
        )


def _reverse(look: Look, index: int, direction: Vector, at: Point | None) -> Product:
    upper, lower = look.upper_level.tensors, look.lower_level.tensors
    products = _double_backward(look, index, direction, at, [*upper, *lower])
    return products[: len(upper)], products[len(upper) :]


def _reverse_upper(look: Look, index: int, direction: Vector, at: Point | None) -> Vector:
    return _double_backward(look, index, direction, at, look.upper_level.tensors)


def _double_backward(look: Look, index: int, direction: Vector, at: Point | None, inputs: Sequence[Tensor]) -> Vector:
    with look.lower_graph(index, at) as (value, _), _second_derivatives():
        gradients = torch.autograd.grad(value, look.lower_level.tensors, create_graph=True, allow_unused=True)
        pairs = [(g, v) for g, v in zip(gradients, direction, strict=True) if g is not None and v is not None]
        pairs = [(g, v) for g, v in pairs if g.requires_grad]
        if not pairs:  # G is linear in w: no second derivatives at all
            return [None] * len(inputs)
        if look.checking:
            refuse_wrong_rules([value, *(g for g, _ in pairs)])
        outputs, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, inputs, grad_outputs=cotangents, allow_unused=True)


@contextmanager
def two_derivatives(advice: str) -> Iterator[None]:
    """Say in one line what has no second derivative, and what to do instead."""
    try:
        with _second_derivatives():
            yield
    except _NoDoubleBackward as problem:
        raise ClosureError(f"{problem} {advice}") from problem.__cause__


@contextmanager
def _second_derivatives() -> Iterator[None]:
    try:
        yield
    except ClosureError:
        raise
    except RuntimeError as error:
        text = _first_line(error)
        if not any(mark in text for mark in NO_SECOND_RULE):
            raise
        raise _NoDoubleBackward(f"lower_loss has no double backward: {text}") from error


def refuse_wrong_rules(values: Sequence[Tensor]) -> None:
    """Refuse, inside :func:`two_derivatives`, what torch has no second derivative of but answers with a number."""
    seen: set[Node] = set()
    stack = [value.grad_fn for value in values]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in WRONG_SECOND_RULES:
            raise _NoDoubleBackward(f"lower_loss has no double backward: {WRONG_SECOND_RULES[node.name()]}")
        stack.extend(parent for parent, _ in node.next_functions)


def _first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0].rstrip()
    return line if line.endswith(".") else f"{line}."


def _difference(look: Look, index: int, direction: Vector, at: Point | None) -> Product:
    step, points = _around(at if at is not None else look.point(), direction)
    ahead, behind = (look.lower(index, at=point) for point in points)
    return (
        _scaled(0.5 / step, subtract(ahead.upper, behind.upper)),
        _scaled(0.5 / step, subtract(ahead.lower, behind.lower)),
    )


def upper_difference(
    look: Look, index: int, direction: Vector, at: Point | None, *, radius: float | None = None
) -> Vector:
    """Return ``G_aw v`` by a central difference between two points at distance ``radius`` from the point.

    Cost: two evaluations of G that are forward-only through the lower model. ``radius`` None: the one that balances
    truncation against rounding.
    """
    step, points = _around(at if at is not None else look.point(), direction, radius)
    ahead, behind = (look.lower(index, at=point, wrt="upper").upper for point in points)
    return _scaled(0.5 / step, subtract(ahead, behind))


def _around(point: Point, direction: Vector, radius: float | None = None) -> tuple[Tensor, list[list[Tensor]]]:
    """Return the step of a central difference and the two points."""
    # The cube root of the rounding unit balances truncation against rounding.
    unit = max(torch.finfo(value.dtype).eps for value in point) ** (1 / 3)
    size, scale = squared_norm(direction).sqrt(), squared_norm(point).sqrt()
    step = (unit * scale.clamp(min=1.0) if radius is None else radius) / size.clamp(min=1e-30)
    return step, [_moved(point, sign * step, direction) for sign in (1, -1)]


def _moved(point: Point, scale: Tensor, direction: Vector) -> list[Tensor]:
    return [x for x in add_scaled(point, scale, direction) if x is not None]


def _scaled(scale: Tensor, vector: Vector) -> Vector:
    return add_scaled([None] * len(vector), scale, vector)
