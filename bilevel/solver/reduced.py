r"""The upper loss as a function of the upper variables alone, with the lower problem solved from several starts.

Two functions of x, each with its gradient:

* where the lower solution is a strict minimum, :math:`\varphi(x) = F(x, y^*(x))`, differentiated by
  the implicit function theorem (:class:`bilevel.Implicit`);
* everywhere, the value-function penalty with both of its lower problems solved,

  .. math:: \Phi_\lambda(x) = \min_y \big( F + \lambda G \big) - \lambda \min_y G, \qquad
      \nabla \Phi_\lambda = \nabla_x F(y_\lambda) + \lambda (\nabla_x G(y_\lambda) - \nabla_x G(y_0))

  by Danskin's theorem: the limit of F2SA and V-PBGD with exact inner loops. It is continuous where :math:`\varphi`
  jumps, needs no second derivative, and picks, of several lower minima, the one that is best for F.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..hypergradient import ConjugateGradient
from ..methods import Implicit
from .landscape import Here, Landscape
from .quasi_newton import InverseHessian, descend

KEPT = 5  # local minima of G that are followed
MANY = 20  # of them while more are looked for
STEPS, WISHED_STEPS = 60, 12  # of one lower solve
WIDE, NARROW = (0.3, 1.0, 3.0), (0.1, 0.3, 0.03)  # how far lower starts are drawn, by turns
NEAR = 1e-2  # how far apart, relative to 1 + their size, upper points share what further lower starts found
TIE = 1e-5  # minima of G this close, relative to 1 + their size, are both global


@dataclass
class Track:
    """A local minimum of G, followed from x to x.

    Attributes:
        y: Where it is.
        value: G there.
        gradient: Its gradient in x there.
        inverse: What is known of the inverse Hessian of G around it.
        followed: Whether it was solved for at this x; if not, it is what it was, and its value an estimate.
    """

    y: Tensor
    value: float
    gradient: Tensor
    inverse: InverseHessian
    followed: bool = True


@dataclass
class Visited:
    """An upper point where the lower problem was solved, and what was found there."""

    x: Tensor
    tracks: list[Track]
    penalised: Tensor | None
    time: int


@dataclass
class Pair:
    """An upper point, a lower minimum of it, and both losses there; whether further lower starts found none lower."""

    x: Tensor
    y: Tensor
    upper_value: float
    lower_value: float
    verified: bool = False


@dataclass
class Reduced:
    """Functions of x over a landscape; the lower minima of each visited point are where the next solves start."""

    landscape: Landscape
    generator: torch.Generator
    visited: list[Visited] = field(default_factory=list)
    news: list[tuple[int, Tensor]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    tested: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        land = self.landscape
        self.tolerance = 0.5 * max(land.upper.precision, land.lower.precision) ** 0.5
        self.probes = land.lower.corners(4 if land.lower.size <= 2 else 2)
        self._implicit = Implicit(
            land.losses[0],
            land.losses[1],
            **land.common,
            **land.optimizers(),
            inner_steps=0,
            on_nonfinite="ignore",
            verify="never",
            solver=ConjugateGradient(iterations=min(2 * land.lower.size + 5, 50), tolerance=self.tolerance),
        )

    # Solving the lower problem

    def solve(self, here: Here, start: Tensor, inverse: InverseHessian | None = None) -> Track:
        """Return the local minimum of G that a descent from a start ends in."""
        last: dict[tuple[float, ...], Tensor] = {}

        def value(y: Tensor) -> tuple[float, Tensor]:
            g, in_x, in_y = here.lower_loss(y)
            last[_key(y)] = in_x
            return g, in_y

        size = self.landscape.lower.size
        inverse = InverseHessian(size) if inverse is None else inverse.copy()
        end = descend(
            value, start, self.landscape.lower, tolerance=self.tolerance, steps=STEPS, inverse=inverse, progress=1e-12
        )
        return Track(end.x, end.value, last[_key(end.x)], inverse)

    def minima(self, here: Here, x: Tensor, *, thorough: bool = False) -> list[Track]:
        """Return local minima of G at x, the lowest first: those of the nearest visited point followed to here, those
        that were found elsewhere since, and one that a probe shows to be lower.
        """
        near = self._nearest(x)
        found = self._followed(here, x, near, thorough=thorough) if near is not None and near.tracks else []
        found += [self.solve(here, y) for time, y in self.news if near is None or time > near.time]
        kept = _distinct(found)
        for probe in self.probes:
            value = here.lower_loss(probe)[0]
            if kept and value < kept[0].value - _tie(kept[0].value):
                track = self.solve(here, probe)
                self.news.append((self._time, track.y))
                kept = _distinct([track, *kept])
        return kept

    def _followed(self, here: Here, x: Tensor, near: Visited, *, thorough: bool) -> list[Track]:
        """Follow the minima of a visited point to x: the lowest, and those that may become it.

        How far one is above the lowest changes, to first order, by the difference of their gradients in x (Danskin).
        One that does not come down to half its height is left where it was, for later.
        """
        lowest, *others = near.tracks
        first = self.solve(here, lowest.y, lowest.inverse)
        found = [first]
        for track in others:
            height = track.value - lowest.value
            expected = height + float((track.gradient - lowest.gradient) @ (x - near.x))
            if thorough or expected <= 0.5 * height + _tie(lowest.value):
                found.append(self.solve(here, track.y, track.inverse))
            else:
                found.append(replace(track, value=first.value + expected, followed=False))
        return found

    def explore(self, x: Tensor, starts: Sequence[Tensor], draws: int) -> None:
        """Look for lower minima at x from further starts: the given ones, then by turns anywhere and around the lowest
        that is known, which moves on as lower ones are found. Those that change the answer are news for other points.
        """
        space = self.landscape.lower

        def question(here: Here) -> tuple[list[Track], list[Track]]:
            known = self.minima(here, x, thorough=True)
            tracks = _distinct([*known, *(self.solve(here, start) for start in starts)], keep=MANY)
            if draws > 0 and tracks:
                tracks = _distinct([*tracks, self.solve(here, self._wished(here, tracks[0].y))], keep=MANY)
            for index in range(draws):
                if index % 2 == 0 or not tracks:
                    (start,) = space.samples(
                        1, tracks[0].y if tracks else starts[0], WIDE[index // 2 % 3 :], self.generator
                    )
                else:
                    start = space.near(tracks[0].y, NARROW[index // 2 % len(NARROW)], self.generator)
                tracks = _distinct([*tracks, self.solve(here, start)], keep=MANY)
            if len(tracks) > KEPT:  # of minima that are equally low, those that are best for F
                bound = tracks[0].value + _tie(tracks[0].value)
                ties = [t for t in tracks if t.value <= bound]
                ties = sorted(ties, key=lambda t: _or_inf(here.upper_loss(t.y)[0]))
                tracks = [*ties, *tracks[len(ties) :]][:KEPT]
            return known, tracks

        known, tracks = self.landscape.at(x, question)
        before = self._nearest(x)
        self._visit(x, tracks, None if before is None or _apart(before.x, x) else before.penalised)
        if known:
            lowest = known[0].value
            fresh = [t for t in tracks if all(_apart(t.y, k.y) for k in known) and t.value <= lowest + _tie(lowest)]
            self.news += [(self._time, t.y) for t in fresh]

    def _wished(self, here: Here, y: Tensor) -> Tensor:
        """Where F would have y, with G a weak voice: of many lower minima, the best for F is near."""

        def value(at: Tensor) -> tuple[float, Tensor]:
            f, _, f_y = here.upper_loss(at)
            g, _, g_y = here.lower_loss(at)
            return f + 0.01 * g, f_y + 0.01 * g_y

        space = self.landscape.lower
        end = descend(value, y, space, tolerance=1e-3, steps=WISHED_STEPS, progress=1e-6)
        return end.x if bool(end.x.isfinite().all()) else y

    # Functions of x

    def implicit(self, x: Tensor) -> tuple[float, Tensor]:
        """Return F at the lower solution, and its gradient by the implicit function theorem.

        Raises:
            NotSmoothError: The theorem does not hold there.
        """
        land = self.landscape

        def question(here: Here) -> tuple[list[Track], Track, float]:
            tracks = self.minima(here, x)
            if not tracks:
                raise NotSmoothError("the lower loss is not finite")
            chosen, value = self._optimistic(here, x, tracks)
            return tracks, chosen, value

        tracks, chosen, value = land.at(x, question)
        self._visit(x, tracks, None)
        space = land.lower
        space.put(chosen.y)
        with warnings.catch_warnings():  # that the Hessian is indefinite is an answer here
            warnings.simplefilter("ignore", UserWarning)
            answer = self._implicit.directions()
        stats = answer.stats
        if not bool(stats.converged) or bool(stats.indefinite):
            raise NotSmoothError("the lower Hessian is not positive definite")
        return value, land.upper.flat([answer.upper.get(name) for name in self._implicit.upper_names])

    def value(self, x: Tensor) -> float:
        """Return F at the lower solution, the best for F where there are several."""

        def question(here: Here) -> tuple[list[Track], float]:
            tracks = self.minima(here, x)
            return tracks, self._optimistic(here, x, tracks)[1] if tracks else math.inf

        tracks, value = self.landscape.at(x, question)
        if tracks:
            self._visit(x, tracks, None)
        return value

    def penalty(self, x: Tensor, weight: float) -> tuple[float, Tensor]:
        """Return the penalty function with this weight, and its gradient."""

        def question(here: Here) -> tuple[list[Track], Tensor, float, Tensor]:
            tracks = self.minima(here, x)
            if not tracks:
                return [], x, math.inf, torch.zeros_like(x)
            self._optimistic(here, x, tracks)
            return (tracks, *self._penalised(here, x, tracks, weight))

        tracks, y, value, gradient = self.landscape.at(x, question)
        if tracks:
            self._visit(x, tracks, y)
        return value, gradient

    def settle(self, x: Tensor) -> float:
        """Train y again at x, from where the penalty left it; return how far the penalty had been from F there."""
        near = self._nearest(x)
        if near is None or near.penalised is None or _apart(near.x, x):
            return 0.0
        start = near.penalised

        def question(here: Here) -> float:
            f = here.upper_loss(start)[0]
            track = self.solve(here, start, near.tracks[0].inverse)
            lowest = min(track.value, near.tracks[0].value)
            if track.value <= lowest + _tie(lowest):
                trained = here.upper_loss(track.y)[0]
                self._offer(Pair(x, track.y, trained, track.value))
                return abs(trained - f)
            return math.inf

        return self.landscape.at(x, question)

    def _penalised(self, here: Here, x: Tensor, tracks: list[Track], weight: float) -> tuple[Tensor, float, Tensor]:
        """Minimise F / lambda + G over y, from the most promising known points."""
        near = self._nearest(x)
        seen: dict[tuple[float, ...], tuple[float, Tensor, float, Tensor]] = {}

        def value(y: Tensor) -> tuple[float, Tensor]:
            f, f_x, f_y = here.upper_loss(y)
            g, g_x, g_y = here.lower_loss(y)
            seen[_key(y)] = (f, f_x, g, g_x)
            return f / weight + g, f_y / weight + g_y

        starts = [t.y for t in tracks if t.followed]
        if near is not None and near.penalised is not None:
            starts.append(near.penalised)
        if len(starts) > 1:
            starts.sort(key=lambda y: _or_inf(value(y)[0]))
        inverse = tracks[0].inverse.copy()
        end = descend(
            value,
            starts[0],
            self.landscape.lower,
            tolerance=self.tolerance,
            steps=STEPS,
            inverse=inverse,
            progress=1e-12,
        )
        f, f_x, g, g_x = seen[_key(end.x)]
        lowest = tracks[0]
        if g < lowest.value - _tie(g):  # a lower minimum that no track knew
            tracks.insert(0, self.solve(here, end.x))
            self.news.append((self._time, tracks[0].y))
            lowest = tracks[0]
        return end.x, f + weight * (g - lowest.value), f_x + weight * (g_x - lowest.gradient)

    def _optimistic(self, here: Here, x: Tensor, tracks: list[Track]) -> tuple[Track, float]:
        """Of the global lower minima, take the one that is best for F."""
        lowest = tracks[0].value
        ties = [t for t in tracks if t.value <= lowest + _tie(lowest)]
        values = [_or_inf(here.upper_loss(t.y)[0]) for t in ties]
        place = min(range(len(ties)), key=values.__getitem__)
        self._offer(Pair(x, ties[place].y, values[place], ties[place].value))
        return ties[place], values[place]

    # What was found

    def _offer(self, pair: Pair) -> None:
        """Remember a pair; the tests of upper points that are near hold for it: what they found is followed to it."""
        if math.isfinite(pair.upper_value):
            pair.verified = any(
                float((pair.x - x).abs().max()) <= NEAR * (1 + float(x.abs().max())) for x in self.tested
            )
            self.pairs.append(pair)

    @property
    def best(self) -> Pair | None:
        """The pair with the smallest F, among those that no lower minimum found since makes void."""
        return min(self.pairs, key=lambda pair: pair.upper_value, default=None)

    def verify(self, draws: int, most: int) -> bool:
        """Solve the lower problem of the best pair from further starts, and of the next one if that makes it void.

        Args:
            draws: How many starts are drawn.
            most: So many pairs at most get them.

        Returns:
            Whether the best pair has stood the test.
        """
        while most > 0 and (pair := self.best) is not None and not pair.verified:
            if not self._stands(pair, 0):  # what was found elsewhere since
                continue
            most -= 1
            if self._stands(pair, draws):
                pair.verified = True
                self.tested.append(pair.x)
        return pair is not None and pair.verified

    def _stands(self, pair: Pair, draws: int) -> bool:
        """Whether no lower minimum makes a pair void; else it is forgotten, and what stands at its x is remembered."""
        self.explore(pair.x, [], draws)
        tracks = self.visited[-1].tracks
        if not tracks or pair.lower_value <= tracks[0].value + _tie(tracks[0].value):
            return True
        bound = tracks[0].value + _tie(tracks[0].value)
        self.pairs = [p for p in self.pairs if p is not pair and (_apart(p.x, pair.x) or p.lower_value <= bound)]
        self.landscape.at(pair.x, lambda here: self._optimistic(here, pair.x, tracks))
        return False

    @property
    def _time(self) -> int:
        return self.landscape.budget.used

    def _nearest(self, x: Tensor) -> Visited | None:
        if not self.visited:
            return None
        distances = [float((v.x - x).abs().max()) for v in self.visited]
        nearest = min(distances)
        # of several as near, the latest
        return next(v for v, d in zip(reversed(self.visited), reversed(distances), strict=True) if d <= nearest)

    def _visit(self, x: Tensor, tracks: list[Track], penalised: Tensor | None) -> None:
        self.visited.append(Visited(x.clone(), tracks, penalised, self._time))


class NotSmoothError(Exception):
    """The implicit function theorem does not hold at a lower solution."""


def _tie(value: float) -> float:
    return TIE * (1 + abs(value))


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _distinct(tracks: Sequence[Track], keep: int = KEPT) -> list[Track]:
    """Sort by G, drop what was found twice, keep the lowest few."""
    kept: list[Track] = []
    for track in sorted((t for t in tracks if math.isfinite(t.value)), key=lambda t: t.value):
        if all(_apart(track.y, other.y) for other in kept):
            kept.append(track)
    return kept[:keep]


def _apart(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-4 * (1 + float(b.abs().max()))


def _key(y: Tensor) -> tuple[float, ...]:
    return tuple(y.tolist())
