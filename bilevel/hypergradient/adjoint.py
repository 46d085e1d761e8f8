"""The adjoint of a lower trajectory: a cotangent of ``w_k`` pulled back to ``(alpha, w_0)``, one step after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..levels import Level
from ..lower_steps import Rule
from ..vectors import Tensors, Vector, present
from .checkpoints import Checkpoints, descend_with_checkpoints
from .modes import ProductMode
from .products import hessian_product, mixed_product
from .start import through_start
from .trajectory import Step, descend, train


@dataclass(frozen=True)
class Unrolling:
    """F after lower steps, and its derivative through them.

    Attributes:
        upper: F at the end of the walk, with its own gradient in the upper variables.
        lower: G at the beginning, on the first batch.
        through: The derivative of F in the upper variables through the lower steps.
    """

    upper: Evaluation
    lower: Evaluation
    through: Vector


def unrolled_by_adjoint(
    oracle: Oracle,
    rule: Callable[[], Rule],
    steps: int,
    *,
    last: int,
    start: list[Tensor] | None = None,
    real: bool = False,
    product: ProductMode = "auto",
    checkpoints: Checkpoints | None = None,
) -> Unrolling:
    """Walk, keeping points, and pull F's gradient back: memory of one step beside copies of the lower variables.

    Args:
        oracle: Where the losses are evaluated.
        rule: Makes the lower step that is differentiated, as it is at the moment.
        steps: How many lower steps.
        last: How many of them are differentiated.
        start: Where they begin, with its graph in the upper variables; None: at the current point.
        real: Whether they are the real training.
        product: By which mode the products of G are computed.
        checkpoints: How many of the points of virtual steps are kept; None: all.
    """
    fixed = rule()
    steps_back: Steps
    if real:
        walk = train(oracle, steps, rule=rule, keep=last)
        steps_back, f = walk.steps, oracle.upper()
    else:
        begin = None if start is None else [x.detach().clone() for x in start]
        if checkpoints is None:
            walk = descend(oracle, fixed, steps, start=begin, keep=last)
            steps_back = walk.steps
        else:
            walk, steps_back = descend_with_checkpoints(
                oracle, fixed, steps, start=begin, last=last, checkpoints=checkpoints
            )
        f = oracle.upper(walk.end)
    through, bar = adjoint(oracle, fixed, steps_back, f.lower, product=product, to_start=start is not None)
    if start is not None:
        through = through + through_start(start, oracle.upper_level.tensors, bar)
    return Unrolling(f, walk.first, through)


class Steps(Protocol):
    """Steps that can be gone through backwards."""

    def __len__(self) -> int: ...

    def __reversed__(self) -> Iterator[Step]: ...


def adjoint(
    oracle: Oracle,
    rule: Rule,
    steps: Steps,
    cotangent: Tensors,
    *,
    product: ProductMode = "auto",
    to_start: bool = False,
) -> tuple[Vector, Vector]:
    """Pull ``cotangent = dh/dw_k`` back through ``steps``; return ``(dh/dalpha, dh/dw_0)``.

    With ``w' = step(w, g, s)`` and ``g = grad_w G(w, alpha)``, each step back is one product in elementwise
    operations, which splits the cotangent over ``w``, ``g`` and ``s``, and one product of G along the part of ``g``::

        alpha_bar += G_aw g_bar,    w_bar <- w_bar + G_ww g_bar

    Args:
        oracle: Where G is evaluated.
        rule: The step that was taken.
        steps: The trajectory's steps, first to last.
        cotangent: ``dh/dw_k``.
        product: By which mode the products of G are computed.
        to_start: Whether ``dh/dw_0`` is wanted; without it the first step costs a mixed product alone.

    Cost: one product per step; memory of one step beside the trajectory.
    """
    upper = Vector([None] * len(oracle.upper_level.names), oracle.upper_level.names)
    point_bar = oracle.point().like(cotangent)
    state_bar: list[dict[str, Tensor]] | None = None
    rule_bar = Vector([None] * len(rule.hyperparameters))
    for left, step in zip(reversed(range(len(steps))), reversed(steps), strict=True):
        point = oracle.point() if step.point is None else step.point
        bars = transposed(rule, step, point, point_bar, state_bar)
        gradient_bar, state_bar, rule_bar = bars.gradient, bars.state, rule_bar + bars.hyperparameters
        if left == 0 and not to_start:
            mixed = mixed_product(
                oracle, gradient_bar, batch=step.batch, at=step.point, product=product, gradient=step.gradient
            )
        else:
            mixed, hessian = hessian_product(oracle, gradient_bar, batch=step.batch, at=step.point, product=product)
            point_bar = bars.point + hessian
        upper = upper + mixed
    if not to_start:
        oracle.check_dependence(upper)
    return upper + through_hyperparameters(rule, oracle.upper_level, rule_bar), point_bar


class Bars(NamedTuple):
    """Cotangents of what a step starts from."""

    point: Vector
    gradient: Vector
    state: list[dict[str, Tensor]]
    hyperparameters: Vector


def pull_back(
    rule: Rule, step: Step, point: Vector, point_bar: Tensors, state_bar: Sequence[dict[str, Tensor]] | None = None
) -> tuple[Vector, Vector, list[dict[str, Tensor]]]:
    """The transposed derivative of one step: cotangents of its point, gradient and state; as :func:`transposed`."""
    return transposed(rule, step, point, point_bar, state_bar)[:3]


def transposed(
    rule: Rule, step: Step, point: Vector, point_bar: Tensors, state_bar: Sequence[dict[str, Tensor]] | None = None
) -> Bars:
    """The transposed derivative of one step: cotangents of its point, gradient, state and hyperparameters.

    Args:
        rule: The step that was taken.
        step: Where from.
        point: The point it was taken at.
        point_bar: The cotangent of the point it led to.
        state_bar: The cotangent of the rule's state there; None: zero.
    """
    state_bar = [{} for _ in point] if state_bar is None else state_bar
    with torch.enable_grad():
        leaf_point = [x.detach().requires_grad_() for x in present(point)]
        leaf_gradient = [None if g is None else g.detach().requires_grad_() for g in step.gradient]
        leaf_state = [
            {name: s.detach() if name == "step" else s.detach().requires_grad_() for name, s in entry.items()}
            for entry in step.state
        ]
        leaf_rule = [value.detach().requires_grad_() for value in rule.hyperparameters]
        moved, after = rule.at(leaf_rule).step(leaf_point, leaf_gradient, leaf_state)
    pairs = [(x, bar) for x, bar in zip(moved, point_bar, strict=True) if bar is not None]
    pairs += [(entry[name], bar) for entry, bars in zip(after, state_bar, strict=True) for name, bar in bars.items()]
    pairs = [(x, bar) for x, bar in pairs if x.requires_grad]
    size, still = len(point), point.like([None] * len(point))
    if not pairs:
        return Bars(still, still, [{} for _ in point], Vector([None] * len(leaf_rule)))
    given = [i for i, g in enumerate(leaf_gradient) if g is not None]
    places = [(i, name) for i, entry in enumerate(leaf_state) for name, s in entry.items() if s.requires_grad]
    inputs = [*leaf_point, *(g for g in leaf_gradient if g is not None), *(leaf_state[i][name] for i, name in places)]
    inputs += leaf_rule
    outputs, weights = zip(*pairs, strict=True)
    bars_found = torch.autograd.grad(outputs, inputs, grad_outputs=weights, allow_unused=True)
    new_gradient: list[Tensor | None] = [None] * size
    for i, bar in zip(given, bars_found[size : size + len(given)], strict=True):
        new_gradient[i] = bar
    new_state: list[dict[str, Tensor]] = [{} for _ in point]
    rest = size + len(given) + len(places)
    for (i, name), bar in zip(places, bars_found[size + len(given) : rest], strict=True):
        if bar is not None:
            new_state[i][name] = bar
    return Bars(point.like(bars_found[:size]), point.like(new_gradient), new_state, Vector(bars_found[rest:]))


def through_hyperparameters(rule: Rule, upper: Level, bars: Tensors) -> Tensors:
    """Pull the cotangent of a rule's hyperparameters back through their graph to the upper variables."""
    pairs = [(x, bar) for x, bar in zip(rule.hyperparameters, bars, strict=True) if bar is not None and x.requires_grad]
    if not pairs:
        return [None] * len(upper.tensors)
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, upper.tensors, grad_outputs=weights, allow_unused=True)
