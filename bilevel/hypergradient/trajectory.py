"""Lower trajectories: walking ``w_0 ... w_k`` forwards, and pulling a cotangent of ``w_k`` back to ``(alpha, w_0)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..descent import Point, Rule, State
from ..evaluator import Evaluation, Look
from ..products import Route, mixed_product
from ..vectors import Vector, add_scaled


@dataclass
class Trajectory:
    """The end point of a walk and, if it was kept, each step's point, gradient and state before the step."""

    end: list[Tensor]
    steps: list[tuple[Point, Vector, State]] = field(default_factory=list)


def descend(look: Look, rule: Rule, first: Evaluation, count: int, *, keep: bool = False) -> Trajectory:
    """Take ``count`` steps of ``rule`` on G from the current point, moving nothing.

    Step ``t`` uses lower batch ``t``. ``first`` is G at the current point on batch 0, which the caller has already,
    so the walk costs ``count - 1`` calls of the loss, and one copy of the lower variables (``count`` copies with
    ``keep``).
    """
    point, state = look.point(), rule.start()
    gradient = first.lower
    trajectory = Trajectory(point)
    for index in range(count):
        if index > 0:
            gradient = look.lower(index, at=point, wrt="lower").lower
        if keep:
            trajectory.steps.append((point, gradient, state))
        point, state = rule.step(point, gradient, state)
    # A variable that no gradient moved is still the parameter's own memory; the end point must survive an exchange
    # with it.
    own = {tensor.data_ptr() for tensor in look.lower_level.tensors}
    trajectory.end = [x.clone() if x.data_ptr() in own else x for x in point]
    return trajectory


def adjoint(look: Look, rule: Rule, trajectory: Trajectory, cotangent: Vector, route: Route) -> tuple[Vector, Vector]:
    """Pull ``cotangent = dh/dw_k`` back through the steps; return ``(dh/dalpha, dh/dw_0)``.

    With ``w' = step(w, g, s)`` and ``g = grad_w G(w, alpha)``, each step back is one product in elementwise
    operations, which splits the cotangent over ``w``, ``g`` and ``s``, and one mixed product of G along the part of
    ``g``::

        alpha_bar += G_aw g_bar,    w_bar <- w_bar + G_ww g_bar

    Cost: one mixed product per step; memory of one step beside the trajectory.
    """
    upper: Vector = [None] * len(look.upper_level.tensors)
    point_bar: Vector = list(cotangent)
    state_bar: list[dict[str, Tensor]] = [{} for _ in trajectory.end]
    for index, (point, gradient, state) in reversed(list(enumerate(trajectory.steps))):
        point_bar, gradient_bar, state_bar = _pull_back(rule, point, gradient, state, point_bar, state_bar)
        at = None if index == 0 else point
        product_upper, product_lower = mixed_product(look, index, gradient_bar, at, route)
        upper = add_scaled(upper, 1.0, product_upper)
        point_bar = add_scaled(point_bar, 1.0, product_lower)
    return upper, point_bar


def _pull_back(
    rule: Rule,
    point: Point,
    gradient: Vector,
    state: State,
    point_bar: Vector,
    state_bar: Sequence[dict[str, Tensor]],
) -> tuple[Vector, Vector, list[dict[str, Tensor]]]:
    """The transposed derivative of one step with respect to its point, gradient and state."""
    with torch.enable_grad():
        leaf_point = [x.detach().requires_grad_() for x in point]
        leaf_gradient = [None if g is None else g.detach().requires_grad_() for g in gradient]
        leaf_state = [
            {name: s.detach() if name == "step" else s.detach().requires_grad_() for name, s in entry.items()}
            for entry in state
        ]
        moved, after = rule.step(leaf_point, leaf_gradient, leaf_state)
        outputs: list[Tensor] = []
        weights: list[Tensor] = []
        for x, bar in zip(moved, point_bar, strict=True):
            if bar is not None and x.requires_grad:
                outputs.append(x)
                weights.append(bar)
        for entry, bars in zip(after, state_bar, strict=True):
            for name, bar in bars.items():
                if entry[name].requires_grad:
                    outputs.append(entry[name])
                    weights.append(bar)
    places = [(i, name) for i, entry in enumerate(leaf_state) for name, s in entry.items() if s.requires_grad]
    present = [i for i, g in enumerate(leaf_gradient) if g is not None]
    inputs = [*leaf_point, *(g for g in leaf_gradient if g is not None), *(leaf_state[i][name] for i, name in places)]
    if not outputs:
        return [None] * len(point), [None] * len(point), [{} for _ in point]
    bars_found = torch.autograd.grad(outputs, inputs, grad_outputs=weights, allow_unused=True)
    new_point = list(bars_found[: len(point)])
    new_gradient: list[Tensor | None] = [None] * len(point)
    for i, bar in zip(present, bars_found[len(point) : len(point) + len(present)], strict=True):
        new_gradient[i] = bar
    new_state: list[dict[str, Tensor]] = [{} for _ in point]
    for (i, name), bar in zip(places, bars_found[len(point) + len(present) :], strict=True):
        if bar is not None:
            new_state[i][name] = bar
    return new_point, new_gradient, new_state
