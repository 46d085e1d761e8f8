"""The set that the variables of a level stay in: projections, bound to variables, and what derivatives need of them.

``P`` is the projection of all variables of a level, each by its own (or several by a joint one); a variable without one
is free. With ``z`` the point that a lower step reaches before it is projected, ``P'(z)`` is symmetric with eigenvalues
in [0, 1]; on a box it is the mask of the entries whose bound is not active.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import ClosureError, message
from .levels import Level
from .lower_steps import Rule, State
from .projection import JointProjection, Project, Projection, Projections, tangent_by_difference
from .vectors import Tensors, Vector, dot, present, squared_norm, subtract

# How far a point may be from its projection and count as a point of the set, in roots of the rounding unit.
ROUNDED = 0.1
# At how many points a projection is tried.
PROBES = 4
CONVEX = (
    "The set must be convex, which a sphere is not, and rescaling does not give its nearest point. Use "
    "bilevel.projection.Simplex, Ball or Box, or derive the nearest point."
)


@dataclass(frozen=True)
class Part:
    """Variables that are projected together, by their places in the level."""

    indices: tuple[int, ...]
    projection: Project | JointProjection

    def project(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if isinstance(self.projection, JointProjection):
            return self.projection.project(tensors)
        return [self.projection(tensors[0])]

    def tangent(self, points: Sequence[Tensor], directions: Sequence[Tensor]) -> Sequence[Tensor]:
        if isinstance(self.projection, Projection):
            return [self.projection.tangent(points[0], directions[0])]
        return tangent_by_difference(self.project, points, directions)


class FeasibleSet:
    """The set that a level's variables stay in.

    Args:
        owner: The class that errors name.
        level: The level.
        projection: What the user passed; None: every variable is free.

    Raises:
        TypeError, ValueError: It is no projection, names no variable of the level, or a variable lies outside.
    """

    def __init__(self, owner: str, level: Level, projection: Projections | None) -> None:
        self._owner, self._level, self._given = owner, level, projection
        self._argument = f"{level.side}_projection"
        self.parts: list[Part] = []
        if level.sharded and projection is not None:
            advice = "needs whole variables, and these are sharded (fully_shard). Write the bounds into the losses."
            raise TypeError(message(owner, self._argument, "...", advice))
        self.refresh()

    @property
    def bounded(self) -> bool:
        """Whether any variable has a projection."""
        return bool(self.parts)

    @property
    def places(self) -> list[int]:
        """The places of the variables that have one."""
        return sorted(i for part in self.parts for i in part.indices)

    def refresh(self) -> None:
        """Find the variables anew, as the set of them changed, and check their projections."""
        self.parts = [] if self._given is None else self._found(self._given)
        for part in self.parts:
            self._check(part)

    def project(self, point: Tensors, moved: Sequence[bool] | None = None) -> list[Tensor]:
        """Return ``P(point)``, differentiably; ``moved``: which variables are not in the set already."""
        found = present(point)
        for part in self.parts:
            if moved is None or any(moved[i] for i in part.indices):
                given = [found[i] for i in part.indices]
                for i, x, y in zip(part.indices, given, part.project(given), strict=True):
                    if x.requires_grad and not y.requires_grad:
                        raise ClosureError(self._detached(i))
                    found[i] = y
        return found

    def settle(self, direction: Tensors) -> None:
        """Project the variables themselves, in place, after a real move; those without a direction stood still."""
        with torch.no_grad():
            for part in self.parts:
                if all(direction[i] is None for i in part.indices):
                    continue
                own = [self._level.tensors[i] for i in part.indices]
                # Copies: a projection may write into what it is given, and joint ones may return one tensor twice.
                found = part.project([x.detach().clone() for x in own])
                torch._foreach_copy_([x.data for x in own], [y.detach() for y in found])

    def tangent(self, point: Tensors, direction: Vector) -> Vector:
        """Return the nearest direction along which ``point``, in the set, can move: the tangent cone's projection."""
        with torch.no_grad():
            found, at = list(direction), present(point)
            for part in self.parts:
                given = [(i, u) for i in part.indices if (u := direction[i]) is not None]
                if given:
                    points = [at[i] for i in part.indices]
                    known = dict(given)
                    along = [known.get(i, torch.zeros_like(x)) for i, x in zip(part.indices, points, strict=True)]
                    for i, v in zip(part.indices, part.tangent(points, along), strict=True):
                        found[i] = v if i in known else None
            return direction.like(found)

    def derivative(self, point: Tensors) -> Callable[[Vector], Vector]:
        """Return ``v -> P'(point) v`` at a point that is not projected yet; it is its own transpose.

        The projection is evaluated once, whatever the number of products.
        """
        at = present(point)
        taken: list[tuple[Part, list[Tensor], Sequence[Tensor]]] = []
        with torch.enable_grad():
            for part in self.parts:
                leaves = [at[i].detach().clone().requires_grad_() for i in part.indices]
                # + 0: a projection may write into what it is given.
                landed = part.project([x + 0 for x in leaves])
                detached = [i for i, y in zip(part.indices, landed, strict=True) if not y.requires_grad]
                if detached:
                    raise ClosureError(self._detached(detached[0]))
                taken.append((part, leaves, landed))

        def product(v: Vector) -> Vector:
            found = list(v)
            for part, leaves, landed in taken:
                pairs = [(y, c) for y, i in zip(landed, part.indices, strict=True) if (c := v[i]) is not None]
                if pairs:
                    outputs, weights = zip(*pairs, strict=True)
                    grads = torch.autograd.grad(
                        outputs, leaves, grad_outputs=weights, allow_unused=True, retain_graph=True
                    )
                    for i, x, g in zip(part.indices, leaves, grads, strict=True):
                        found[i] = None if v[i] is None else torch.zeros_like(x) if g is None else g
            return v.like(found)

        return product

    def _found(self, given: Projections) -> list[Part]:
        """Bind projections to variables."""
        if not isinstance(given, Mapping):
            self._refuse_others(given)
            every = tuple(range(len(self._level.tensors)))
            return [Part(every, given)] if isinstance(given, JointProjection) else [Part((i,), given) for i in every]
        parts: list[Part] = []
        for key, projection in given.items():
            self._refuse_others(projection)
            indices = tuple(self._places_of(key))
            joint = isinstance(projection, JointProjection)
            parts += [Part(indices, projection)] if joint else [Part((i,), projection) for i in indices]
        places = [i for part in parts for i in part.indices]
        twice = [self._level.names[i] for i in places if places.count(i) > 1]
        if twice:
            advice = f"gives {twice[0]} more than one projection. Write one that does both."
            raise ValueError(message(self._owner, self._argument, "{...}", advice))
        return parts

    def _places_of(self, key: object) -> list[int]:
        """Return the places of the variables that a key means: a variable, its name, a module, or a tuple of these."""
        names, tensors = self._level.names, self._level.tensors
        if isinstance(key, tuple):
            return [i for item in key for i in self._places_of(item)]
        if isinstance(key, nn.Module):
            members = {id(x) for x in key.parameters()}
            found = [i for i, x in enumerate(tensors) if id(x) in members]
        elif isinstance(key, Tensor):
            found = [i for i, x in enumerate(tensors) if x is key]
        elif isinstance(key, str):
            found = [i for i, name in enumerate(names) if name == key]
        else:
            advice = "must name variables: a parameter, its name, a module, or a tuple of these."
            raise TypeError(message(self._owner, self._argument, f"{{{type(key).__name__}: ...}}", advice))
        if not found:
            shown = (
                key
                if isinstance(key, str)
                else f"{type(key).__name__} of shape {tuple(key.shape)}"
                if isinstance(key, Tensor)
                else type(key).__name__
            )
            advice = f"is no variable of the {self._level.side} level; these are: {', '.join(names[:5])}."
            raise ValueError(message(self._owner, self._argument, f"{{{shown}: ...}}", advice))
        return found

    def _refuse_others(self, projection: object) -> None:
        if isinstance(projection, type) or not (callable(projection) or isinstance(projection, JointProjection)):
            advice = (
                "must be a projection such as bilevel.projection.Box(0, 1), a function from tensor to tensor, or a "
                "mapping from variables to these."
            )
            raise TypeError(message(self._owner, self._argument, projection, advice))

    def _check(self, part: Part) -> None:
        """See once that it is a projection on a convex set, and that its variables lie in that."""
        own = [self._level.tensors[i].detach().clone() for i in part.indices]
        for x, y in zip(own, self._landed(part, own), strict=True):
            if not _near(y, x):
                advice = (
                    f"{self._names(part)} lies outside of it, by {float((y - x).abs().max()):.2g}. Variables start "
                    "inside. Project them first: with torch.no_grad(): x.copy_(projection(x))."
                )
                raise ValueError(message(self._owner, self._argument, part.projection, advice))
        generator = torch.Generator().manual_seed(0)
        base = [x.float() if torch.finfo(x.dtype).bits < 32 else x for x in own]  # half precision tells no angles
        far = [
            [x + 2 * (1 + x.abs()) * torch.randn(x.shape, generator=generator).to(x) for x in base]
            for _ in range(PROBES)
        ]
        near = [self._landed(part, points) for points in far]
        middle = [(u + v) / 2 for u, v in zip(near[0], near[1], strict=True)]
        inside: Sequence[Tensor]
        for inside, what in ((near[0], "moves what it has projected already"), (middle, "moves points between these")):
            if not all(_near(y, x) for x, y in zip(inside, self._landed(part, inside), strict=True)):
                advice = f"{what} ({self._names(part)}). A projection leaves the points of its set alone. {CONVEX}"
                raise ValueError(message(self._owner, self._argument, part.projection, advice))
        # The nearest point p of a convex set: no point of the set lies at an acute angle to x - p.
        for start, end in zip(far, near, strict=True):
            outwards = subtract(start, end)
            for other in near:
                inwards = subtract(other, end)
                size = float(squared_norm(outwards) + squared_norm(inwards))
                if float(dot(outwards, inwards)) > max(_slack(v) for v in end) * size:
                    advice = f"does not give the nearest point of a convex set ({self._names(part)}). {CONVEX}"
                    raise ValueError(message(self._owner, self._argument, part.projection, advice))

    def _landed(self, part: Part, points: Sequence[Tensor]) -> list[Tensor]:
        """Project, and check what came back."""
        with torch.no_grad():
            found = list(part.project([x.clone() for x in points]))
        for x, y in zip(points, found, strict=False):
            if not isinstance(y, Tensor) or (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device):
                got = (tuple(y.shape), y.dtype) if isinstance(y, Tensor) else type(y).__name__
                advice = f"returned {got} for {self._names(part)}, expected {(tuple(x.shape), x.dtype)}."
                raise ValueError(message(self._owner, self._argument, part.projection, advice))
            if not bool(y.isfinite().all()):
                advice = f"returned NaN or infinity for {self._names(part)}. Every point has a nearest one in the set."
                raise ValueError(message(self._owner, self._argument, part.projection, advice))
        if len(found) != len(points):
            advice = f"returned {len(found)} tensors for {self._names(part)}, expected {len(points)}."
            raise ValueError(message(self._owner, self._argument, part.projection, advice))
        return found

    def _names(self, part: Part) -> str:
        return ", ".join(self._level.names[i] for i in part.indices[:3])

    def _detached(self, place: int) -> str:
        return (
            f"{self._owner}({self._argument}=...): what it returns for {self._level.names[place]} has no graph, and "
            "the derivative goes through it. Was it detached, or computed outside torch? Write it in torch operations."
        )


class Projected(Rule):
    """A lower step, then the projection on the set."""

    def __init__(self, rule: Rule, feasible: FeasibleSet) -> None:
        self.rule, self.feasible = rule, feasible

    @property
    def hyperparameters(self) -> Sequence[Tensor]:
        return self.rule.hyperparameters

    def at(self, hyperparameters: Sequence[Tensor]) -> Rule:
        return Projected(self.rule.at(hyperparameters), self.feasible)

    def start(self) -> State:
        return self.rule.start()

    def step(self, point: Tensors, gradient: Tensors, state: State) -> tuple[list[Tensor], State]:
        moved, after = self.rule.step(point, gradient, state)
        return self.feasible.project(moved, [g is not None for g in gradient]), after


class FixedPointMap:
    r"""The fixed point ``w = P(w - s grad_w G)`` of a projected lower step, for implicit differentiation.

    With ``D = P'(z)`` at ``z = w - s grad_w G`` its derivative is ``dw = D (dw - s (G_ww dw + G_wa da))``. Pulled back
    from ``grad_w F`` it asks for p with::

        p = D y,    (D (I - D) / s + D G_ww D) y = D grad_w F,    dF/da = grad_a F - G_aw p

    a symmetric system. On a box D is a mask and this is the system of the free entries. On a curved set ``D (I - D) /
    s`` is the curvature of its boundary, times the multiplier of the bound. Where nothing is bounded D = I.

    Args:
        feasible: The set.
        point: w.
        gradient: ``grad_w G`` there.
        rates: s of each variable, of which the fixed point does not depend: the lower learning rates. It says which
            bounds are taken for active: those that a lower step would cross.
    """

    def __init__(self, feasible: FeasibleSet, point: Vector, gradient: Vector, rates: Sequence[float | Tensor]) -> None:
        self._steps = [_step(rate) for rate in rates]
        for part in feasible.parts:  # one step for what is projected together
            for i in part.indices:
                self._steps[i] = self._steps[part.indices[0]]
        reached = [
            x if g is None else (x - s * g).to(x.dtype)
            for x, g, s in zip(present(point), gradient, self._steps, strict=True)
        ]
        self._derivative = feasible.derivative(reached)

    def free(self, v: Vector) -> Vector:
        """Return ``D v``."""
        return self._derivative(v)

    def system(self, y: Vector, curved: Vector) -> Vector:
        """Return ``D (I - D) y / s + D curved``, in which ``curved`` is ``G_ww D y``, with a right-hand side or not."""
        beyond = y.like(
            None if x is None else (x / s).to(x.dtype) for x, s in zip(y - self.free(y), self._steps, strict=True)
        )
        return self.free(beyond + curved)


def _step(rate: float | Tensor) -> float | Tensor:
    """A rate, or 1 where it is 0 and no step is taken."""
    return torch.where(rate > 0, rate, 1.0) if isinstance(rate, Tensor) else rate or 1.0


def _slack(x: Tensor) -> float:
    return ROUNDED * float(torch.finfo(x.dtype).eps ** 0.5)


def _near(a: Tensor, b: Tensor) -> bool:
    apart = torch.linalg.vector_norm(a.double() - b.double())
    return bool(apart <= _slack(a) * (1 + torch.linalg.vector_norm(b.double())))
