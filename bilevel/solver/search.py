"""``method="auto"``: descents on the reduced function from several upper points, lower problems from several starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .budget import SpentError
from .landscape import Landscape
from .quasi_newton import descend
from .reduced import NotSmoothError, Pair, Reduced

FIRST_PENALTY, RAISED, LAST_PENALTY = 10.0, 30.0, 1e6
FEW = 5  # upper variables, for a compass search
SHARE = 0.3  # of the budget, for one descent, and for looking around before the second
FOUND_AGAIN = 6  # descents after each other that find nothing better: it ends
UPPER_SCALES = (0.3, 1.0, 3.0)
REPEATS = 3  # of a descent, where lower minima are found at its end that it did not know
SPARE = 0.12  # of the budget, for the last digits: best pairs often lie where F jumps or has a kink


@dataclass
class Search:
    """The search, its log, and what it found.

    Args:
        landscape: The two losses.
        starts: Lower starts wherever the lower problem is looked at anew.
        tolerance: Of F: gains below it do not count.
        seed: Of the points that are drawn.
        note: Called with a sentence for each decision.
        record: Called after each descent.
    """

    landscape: Landscape
    starts: int
    tolerance: float
    seed: int
    note: Callable[[str], None]
    record: Callable[[str, Pair | None], None]
    screened: list[tuple[float, Tensor]] = field(default_factory=list)
    ended: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.reduced = Reduced(self.landscape, self.generator)
        self.unit = 1.0

    def run(self) -> tuple[Pair | None, str]:
        """Search until the budget is spent or nothing better is found; return the best pair, and why it ended."""
        budget = self.landscape.budget
        reason = "the budget is spent"
        try:
            with budget.limited(int(budget.left * (1 - SPARE))):
                reason = self._search()
        except SpentError:
            pass
        try:
            with budget.limited(budget.left // 2):
                self._refine()
        except SpentError:
            pass
        try:
            self.reduced.verify(self.starts, 3)
        except SpentError:
            self.note("The budget ended while the last pair was being verified.")
        return self.reduced.best, reason

    def _search(self) -> str:
        land, budget = self.landscape, self.landscape.budget
        x = land.upper.project(land.upper.flat())
        y = land.lower.project(land.lower.flat())
        self._scale(x, y)
        self.reduced.explore(x, [y], self.starts)
        minima = len(self.reduced.visited[-1].tracks)
        self.note(f"Local minima of G that {self.starts + 2} descents found at the start: {minima}.")
        self._descend(x, "the start")
        self._look_around(x)
        again = 0
        while True:
            best = self.reduced.best
            begin, why = self._next(best)
            if begin is None:
                return "there is no further point to start from"
            self._descend(begin, why)
            after = self.reduced.best
            gained = best is None or (
                after is not None
                and after.upper_value < best.upper_value - self.tolerance * (1 + abs(best.upper_value))
            )
            again = 0 if gained or (after is not best and not (after and after.verified)) else again + 1
            if again >= FOUND_AGAIN:
                return f"{again} descents after each other found nothing better"
            if budget.left <= 0:
                raise SpentError

    def _refine(self) -> None:
        """A compass search around the best pair: it needs no slope, and walks up to kinks and jumps."""
        size = self.landscape.upper.size
        if size > FEW or self.reduced.best is None:
            return
        step = 1e-2
        while step > 1e-6 and (best := self.reduced.best) is not None:
            for entry in range(2 * size):
                x = best.x.clone()
                x[entry // 2] += step * (1 - 2 * (entry % 2)) * (1 + float(x[entry // 2].abs()))
                self.reduced.value(self.landscape.upper.project(x))
                if self.reduced.best is not best:
                    break
            step *= 1.5 if self.reduced.best is not best else 0.25

    def _scale(self, x: Tensor, y: Tensor) -> None:
        """Choose the unit of the penalty: how much more F varies than G, over a few lower points."""
        points = self.landscape.lower.samples(5, y, (1.0,), self.generator)
        values = self.landscape.at(
            x, lambda here: [(here.upper_loss(p)[0], here.lower_loss(p)[0]) for p in [y, *points]]
        )
        f, g = (torch.tensor(v, dtype=torch.float64) for v in zip(*values, strict=True))
        ratio = float((f.max() - f.min()) / (g.max() - g.min()).clamp(min=1e-12))
        self.unit = min(max(ratio, 1.0), 1e3) if math.isfinite(ratio) else 1.0

    def _descend(self, x: Tensor, why: str) -> None:
        """One descent: by implicit differentiation while that holds, then on the penalty, raised as it goes."""
        budget, reduced = self.landscape.budget, self.reduced
        used = budget.used
        try:
            with budget.limited(int(SHARE * budget.total)):
                for _ in range(REPEATS):
                    x, solved = self._by_implicit(x)
                    x = x if solved else self._by_penalty(x)
                    known = len(reduced.news)
                    reduced.verify(self.starts, 2)
                    if len(reduced.news) == known or reduced.best is None:
                        break
                    x = reduced.best.x  # a lower minimum was found that the descent did not know
        except SpentError:
            if budget.left <= 0:
                raise
        self.ended.append(x)
        reduced.verify(self.starts, 2)
        self.record(f"descent from {why}, {budget.used - used} evaluations", reduced.best)

    def _by_implicit(self, x: Tensor) -> tuple[Tensor, bool]:
        """Return where this descent ended, and whether that is a stationary point."""
        space, last = self.landscape.upper, x

        def value(at: Tensor) -> tuple[float, Tensor]:
            nonlocal last
            found = self.reduced.implicit(at)
            last = at
            return found

        try:
            end = descend(value, x, space, tolerance=1e-6, steps=10 * space.size + 20, progress=1e-9)
        except NotSmoothError as reason:
            self.note(f"Penalty instead of implicit differentiation: {reason}.")
            best = self.reduced.best
            return best.x if best is not None and not self.ended else last, False
        return end.x, end.stationary

    def _by_penalty(self, x: Tensor) -> Tensor:
        space, reduced = self.landscape.upper, self.reduced
        weight = FIRST_PENALTY * self.unit
        while weight <= LAST_PENALTY:
            end = descend(
                lambda at: reduced.penalty(at, weight),  # noqa: B023
                x,
                space,
                tolerance=1e-6,
                steps=8 * space.size + 10,
                wolfe=True,
                progress=1e-8,
            )
            x = end.x
            if reduced.settle(x) <= 0.1 * self.tolerance * (1 + abs(end.value)):
                break
            weight *= RAISED
        return x

    def _look_around(self, x: Tensor) -> None:
        """Evaluate the penalty at corners and drawn points: where later descents may start."""
        space, budget = self.landscape.upper, self.landscape.budget
        number = 12 if space.size == 1 else 16
        points = [*space.corners(4 if space.size <= 2 else 2), *space.samples(number, x, UPPER_SCALES, self.generator)]
        try:
            with budget.limited(int(SHARE * budget.total)):
                for point in points:
                    value, _ = self.reduced.penalty(point, FIRST_PENALTY * self.unit)
                    if math.isfinite(value):
                        self.screened.append((value, point))
        except SpentError:
            if budget.left <= 0:
                raise
        self.record(f"{len(self.screened)} upper points looked at", self.reduced.best)

    def _next(self, best: Pair | None) -> tuple[Tensor | None, str]:
        """The most promising point that was looked at and is not near the end of a descent; or one near the best."""
        space = self.landscape.upper
        self.screened.sort(key=lambda entry: entry[0])
        while self.screened:
            _, point = self.screened.pop(0)
            if all(float((point - end).abs().max()) > 0.02 * (1 + float(end.abs().max())) for end in self.ended):
                return point, "a point that was looked at"
        centre = best.x if best is not None else space.flat()
        noise = torch.randn(space.size, generator=self.generator, dtype=torch.float64)
        scale = UPPER_SCALES[len(self.ended) % len(UPPER_SCALES)]
        return space.project(centre + scale * noise * (1 + centre.abs())), "a point near the best"
