"""Lower trajectories ``w_0 ... w_k``: virtual ones, which move nothing, and the real training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..lower_steps import Rule, State, constant
from ..vectors import Tensors, Vector


@dataclass(frozen=True)
class Step:
    """One lower step, as it was before it was taken.

    Attributes:
        batch: Which lower batch it was on.
        point: Where it began; None: at the current values of the lower variables.
        gradient: ``grad_w G`` there.
        state: The rule's state there.
    """

    batch: int
    point: Vector | None
    gradient: Vector
    state: State


@dataclass
class Trajectory:
    """A walk of lower steps.

    Attributes:
        first: G at its first point, on the first batch.
        end: Its last point.
        state: The rule's state there; of real steps empty, as it is in the torch optimizer.
        steps: Its last steps, as far as they were kept.
    """

    first: Evaluation
    end: Vector
    state: State
    steps: list[Step] = field(default_factory=list)


def descend(
    oracle: Oracle,
    rule: Rule,
    steps: int,
    *,
    start: Tensors | None = None,
    first: Evaluation | None = None,
    keep: int = 0,
    state: State | None = None,
    batch: int = 0,
) -> Trajectory:
    """Take virtual lower steps on G, moving nothing; step ``t`` uses lower batch ``batch + t``.

    Args:
        oracle: Where G is evaluated.
        rule: The step, as ``optimizer.inner_rule()`` gives it.
        steps: How many, >= 1.
        start: Where to begin; None: at the current values of the lower variables.
        first: G at the first point on the first batch, if it is known.
        keep: How many of the last steps are recorded.
        state: The state of the rule at the start; None: as the rule starts.
        batch: The lower batch of the first step.

    Cost:
        One gradient of G a step (the first one may be known), and one copy of the lower variables, or one for each step
        that is kept.

    Example:
        >>> import torch, bilevel
        >>> from bilevel.hypergradient import descend
        >>> from bilevel.lower_steps import GradientDescent
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> with bilevel.testing.oracle(problem) as oracle:
        ...     walk = descend(oracle, GradientDescent([0.1]), 500)
        >>> torch.allclose(walk.end[0], problem.lower_optimum(problem.upper))
        True
    """
    point = oracle.point() if start is None else oracle.point().like(start)
    at = None if start is None else point
    first, rule = first or oracle.lower(at, batch=batch, wrt="lower"), constant(rule)
    state, kept = rule.start() if state is None else state, []
    gradient = first.lower
    for index in range(steps):
        if index > 0:
            gradient = oracle.lower(point, batch=batch + index, wrt="lower").lower
        if index >= steps - keep:
            kept.append(Step(batch + index, at if index == 0 else point, gradient, state))
        moved, state = rule.step(point, gradient, state)
        point = point.like(moved)
    # A variable that no gradient moved is still the parameter's own memory; the end point must survive an exchange.
    own = {tensor.data_ptr() for tensor in oracle.lower_level.parts}
    end = point.like(x if x is None or x.data_ptr() not in own else x.clone() for x in point)
    return Trajectory(first, end, state, kept)


def train(
    oracle: Oracle,
    steps: int,
    *,
    rule: Callable[[], Rule] | None = None,
    keep: int = 0,
    gradients: Literal["all", "last"] = "all",
) -> Trajectory:
    """Take real lower steps along the gradients of G, with the lower optimizer; step ``t`` uses lower batch ``t``.

    ``directions`` takes them back.

    Args:
        oracle: Where G is evaluated.
        steps: How many, >= 0.
        rule: Makes the rule that is differentiated, whose state is recorded with each step that is kept.
        keep: How many of the last steps are recorded: a copy of the point, the gradient, the rule's state.
        gradients: ``"last"``: only the last step's gradient is kept, which ``.grad`` holds anyway; the others are
            empty.

    Cost:
        One gradient of G a step, and a copy of the lower variables for each one that is kept.
    """
    first: Evaluation | None = None
    kept: list[Step] = []
    for index in range(steps):
        g = oracle.lower(batch=index, wrt="lower")
        first = first or g
        if index >= steps - keep:
            gradient = g.lower if gradients == "all" or index == steps - 1 else Vector([])
            kept.append(Step(index, oracle.point().clone(), gradient, copied(rule)))
        oracle.train(g.lower)
    return Trajectory(first or oracle.lower(wrt="lower"), oracle.point(), [], kept)


def copied(rule: Callable[[], Rule] | None) -> State:
    """Return a copy of a rule's state as it is now: real steps write into that of the torch optimizer."""
    start = rule().start() if rule is not None else []
    return [{name: s.clone() for name, s in entry.items()} for entry in start]
