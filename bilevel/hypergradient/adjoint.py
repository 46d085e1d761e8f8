"""Lower trajectories: walking ``w_0 ... w_k`` forwards, and pulling a cotangent of ``w_k`` back to ``(alpha, w_0)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..lower_steps import Point, Rule, State
from ..vectors import Vector, add_scaled
from .modes import Route
from .products import mixed_product, upper_product


@dataclass(frozen=True)
class Step:
    """One lower step, as it was before it was taken: lower batch, point (None: the current one), gradient, state."""

    index: int
    point: Point | None
    gradient: Vector
    state: State


@dataclass
class Trajectory:
    """The end point of a walk, the state there and, if they were kept, its steps."""

    end: list[Tensor]
    state: State
    steps: list[Step] = field(default_factory=list)


def descend(
    oracle: Oracle, rule: Rule, first: Evaluation, count: int, *, start: Point | None = None, keep: int = 0
) -> Trajectory:
    """Take ``count`` steps of ``rule`` on G from the current point or from ``start``, moving nothing.

    Step ``t`` uses lower batch ``t``. ``first`` is G at the first point on batch 0, which the caller has already, so
    the walk costs ``count - 1`` calls of the loss, and one copy of the lower variables, or one for each of the last
    ``keep`` steps, which are recorded.
    """
    point, state, gradient = oracle.point() if start is None else start, rule.start(), first.lower
    steps: list[Step] = []
    for index in range(count):
        if index > 0:
            gradient = oracle.lower(index, at=point, wrt="lower").lower
        if index >= count - keep:
            steps.append(Step(index, start if index == 0 else point, gradient, state))
        point, state = rule.step(point, gradient, state)
    # A variable that no gradient moved is still the parameter's own memory; the end point must survive an exchange.
    own = {tensor.data_ptr() for tensor in oracle.lower_level.tensors}
    return Trajectory([x.clone() if x.data_ptr() in own else x for x in point], state, steps)


def adjoint(
    oracle: Oracle,
    rule: Rule,
    steps: Sequence[Step],
    cotangent: Vector,
    route: Route,
    *,
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
        route: How the products of G are computed.
        to_start: Whether ``dh/dw_0`` is wanted; without it the first step costs an upper product alone.

    Cost: one product per step; memory of one step beside the trajectory.
    """
    upper: Vector = [None] * len(oracle.upper_level.tensors)
    point_bar: Vector = list(cotangent)
    state_bar: list[dict[str, Tensor]] = [{} for _ in cotangent]
    for step in reversed(steps):
        point = oracle.point() if step.point is None else step.point
        through_point, gradient_bar, state_bar = pull_back(rule, step, point, point_bar, state_bar)
        if step is steps[0] and not to_start:
            product = upper_product(oracle, step.index, gradient_bar, step.point, route, gradient=step.gradient)
        else:
            product, through_gradient = mixed_product(oracle, step.index, gradient_bar, step.point, route)
            point_bar = add_scaled(through_point, 1.0, through_gradient)
        upper = add_scaled(upper, 1.0, product)
    return upper, point_bar


def pull_back(
    rule: Rule, step: Step, point: Point, point_bar: Vector, state_bar: Sequence[dict[str, Tensor]]
) -> tuple[Vector, Vector, list[dict[str, Tensor]]]:
    """The transposed derivative of one step with respect to its point, gradient and state."""
    with torch.enable_grad():
        leaf_point = [x.detach().requires_grad_() for x in point]
        leaf_gradient = [None if g is None else g.detach().requires_grad_() for g in step.gradient]
        leaf_state = [
            {name: s.detach() if name == "step" else s.detach().requires_grad_() for name, s in entry.items()}
            for entry in step.state
        ]
        moved, after = rule.step(leaf_point, leaf_gradient, leaf_state)
    pairs = [(x, bar) for x, bar in zip(moved, point_bar, strict=True) if bar is not None]
    pairs += [(entry[name], bar) for entry, bars in zip(after, state_bar, strict=True) for name, bar in bars.items()]
    pairs = [(x, bar) for x, bar in pairs if x.requires_grad]
    size = len(point)
    if not pairs:
        return [None] * size, [None] * size, [{} for _ in point]
    present = [i for i, g in enumerate(leaf_gradient) if g is not None]
    places = [(i, name) for i, entry in enumerate(leaf_state) for name, s in entry.items() if s.requires_grad]
    inputs = [*leaf_point, *(g for g in leaf_gradient if g is not None), *(leaf_state[i][name] for i, name in places)]
    outputs, weights = zip(*pairs, strict=True)
    bars_found = torch.autograd.grad(outputs, inputs, grad_outputs=weights, allow_unused=True)
    new_gradient: list[Tensor | None] = [None] * size
    for i, bar in zip(present, bars_found[size : size + len(present)], strict=True):
        new_gradient[i] = bar
    new_state: list[dict[str, Tensor]] = [{} for _ in point]
    for (i, name), bar in zip(places, bars_found[size + len(present) :], strict=True):
        if bar is not None:
            new_state[i][name] = bar
    return list(bars_found[:size]), new_gradient, new_state
