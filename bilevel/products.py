"""Mixed products of the lower loss: ``d/de grad_(alpha, w) G(w + e v, alpha)`` at ``e = 0``, without a Hessian.

Three routes give the same numbers (the third up to its step):

* ``forward``: one gradient of dual tensors (forward over reverse), about 1.4 plain gradients; needs a forward-mode
  rule of every operation, and a loss that reads the lower variables from modules.
* ``reverse``: double backward, 5 to 6 plain gradients on a ResNet-32; fails through compiled closures.
* ``difference``: a central difference of two plain gradients; works for every loss, approximate.

``auto`` starts with ``forward`` and falls back to ``reverse`` with one warning that says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .errors import ClosureError
from .evaluator import Look, Point
from .vectors import Vector, add_scaled, squared_norm, subtract

Route = Literal["auto", "forward", "reverse", "difference"]
Product = tuple[Vector, Vector]
ROUTES: tuple[str, ...] = ("auto", "forward", "reverse", "difference")
FIRST_ORDER = (
    'product="difference", or a first-order reading such as value_gradient="value_function", needs no such rule.'
)


def mixed_product(look: Look, index: int, direction: Vector, at: Point | None, route: Route) -> Product:
    """Return ``(G_aw v, G_ww v)`` for lower batch ``index``, at the current lower point or ``at`` another.

    Cost: one (dual) lower evaluation by ``forward``, one with a double graph by ``reverse``, two plain ones by
        ``difference``.
    """
    chosen = look.product_routes.get("lower", "forward") if route == "auto" else route
    if chosen == "difference":
        return _difference(look, index, direction, at)
    if chosen == "reverse":
        return _reverse(look, index, direction, at)
    try:
        return _forward(look, index, direction, at)
    except _NoForwardMode as problem:
        if route == "forward":
            raise ClosureError(f"{problem} {FIRST_ORDER}") from problem.__cause__
        warnings.warn(f"{problem} Falling back to double backward for this optimizer.", stacklevel=2)
        look.product_routes["lower"] = "reverse"
        return _reverse(look, index, direction, at)


class _NoForwardMode(Exception):
    """Forward mode does not serve this loss; the message names the operation or the variable."""


def _forward(look: Look, index: int, direction: Vector, at: Point | None) -> Product:
    upper, lower = look.upper_level.tensors, look.lower_level.tensors
    with forward_ad.dual_level():
        leaves = [value.detach().requires_grad_() for value in (at if at is not None else look.point())]
        duals = [
            leaf if v is None else forward_ad.make_dual(leaf, v.detach())
            for leaf, v in zip(leaves, direction, strict=True)
        ]
        try:
            with look.lower_graph(index, substitute=duals) as value:
                gradients = torch.autograd.grad(value, [*upper, *leaves, *lower], allow_unused=True)
        except (NotImplementedError, RuntimeError) as error:
            if (
                "forward AD" not in str(error)
                and "forward-mode" not in str(error)
                and not isinstance(error, NotImplementedError)
            ):
                raise
            raise _NoForwardMode(f"lower_loss has no forward-mode product: {str(error).splitlines()[0]}") from error
        _refuse_unreached(look, gradients[len(upper) + len(leaves) :])
        tangents = [
            None if g is None else forward_ad.unpack_dual(g).tangent for g in gradients[: len(upper) + len(leaves)]
        ]
    return tangents[: len(upper)], tangents[len(upper) :]


def _refuse_unreached(look: Look, gradients: Sequence[Tensor | None]) -> None:
    """A gradient for a parameter itself means that the closure read it past its substitute."""
    missed = [name for name, g in zip(look.lower_level.names, gradients, strict=True) if g is not None]
    if missed:
        raise _NoForwardMode(
            f"lower_loss reads {', '.join(missed)} other than from a module given as lower=, where no substitute "
            "reaches it. Put the tensor into a module as a Parameter and read the module's attribute inside the loss."
        )


def _reverse(look: Look, index: int, direction: Vector, at: Point | None) -> Product:
    upper, lower = look.upper_level.tensors, look.lower_level.tensors
    with look.lower_graph(index, at) as value:
        gradients = torch.autograd.grad(value, lower, create_graph=True, allow_unused=True)
        pairs = [(g, v) for g, v in zip(gradients, direction, strict=True) if g is not None and v is not None]
        pairs = [(g, v) for g, v in pairs if g.requires_grad]
        if not pairs:  # G is linear in w: no second derivatives at all
            return [None] * len(upper), [None] * len(lower)
        outputs, cotangents = zip(*pairs, strict=True)
        products = torch.autograd.grad(outputs, [*upper, *lower], grad_outputs=cotangents, allow_unused=True)
    return products[: len(upper)], products[len(upper) :]


def _difference(look: Look, index: int, direction: Vector, at: Point | None) -> Product:
    base = list(at) if at is not None else look.point()
    # The cube root of the rounding unit balances truncation against rounding in a central difference.
    unit = max(torch.finfo(value.dtype).eps for value in base) ** (1 / 3)
    size, scale = squared_norm(direction).sqrt(), squared_norm(base).sqrt()
    step = unit * scale.clamp(min=1.0) / size.clamp(min=1e-30)
    ahead = look.lower(index, at=_moved(base, step, direction))
    behind = look.lower(index, at=_moved(base, -step, direction))
    return (
        _scaled(0.5 / step, subtract(ahead.upper, behind.upper)),
        _scaled(0.5 / step, subtract(ahead.lower, behind.lower)),
    )


def _moved(point: Point, scale: Tensor, direction: Vector) -> list[Tensor]:
    return [x for x in add_scaled(point, scale, direction) if x is not None]


def _scaled(scale: Tensor, vector: Vector) -> Vector:
    return add_scaled([None] * len(vector), scale, vector)
