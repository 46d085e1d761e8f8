"""One optimizer class on a budget: its step sizes by a race, its lower variables trained again at the end.

The rule is the same for every class. Candidates are six pairs of torch optimizers: Adam above, at the rates
:data:`UPPER_RATES`; below it gradient descent at ``1 / L``, or Adam at the rate above. ``L`` is the largest curvature
of G that differences of its gradient show around the start, and ``1 / L`` is the class's ``inner_lr`` too. All run from
the same start, the lowest lower minimum that is found there, for a twentieth of the budget each; the better two for a
tenth more; better is whose F is smaller after y has been trained again. With half of the budget the best goes on, and
then begins anew twice, from the best of some upper points that are looked at; each time its rates fall twice by a
factor of ten. Where several lower minima are seen at the start, VPBGD and PDBO get four copies.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..methods import BOME, EBOMLC
from ..optimizer.base import BilevelOptimizer
from ..watch import Watch
from .budget import SpentError
from .landscape import Landscape, tensors_of
from .reduced import Pair, Reduced

UPPER_RATES = (1.0, 0.2, 0.04)
FIRST, SECOND = 1 / 20, 1 / 10  # of the budget, for each candidate
ROUNDS = 3  # of the best: from where the race left it, then from other upper points
LOOKED_AT = 6  # of these, beside corners
COPIES = 4  # of lower variables, for classes whose constructors name ``starts`` and whose walks are short
INNER_STEPS = 5  # of classes that have them and default to fewer: from the tables of benchmarks/which_method.py
FALLS = (0.5, 0.8)  # of a round, where the rates fall
SPARE = 0.06


@dataclass
class Candidate:
    """An optimizer with its rates, and where it stands."""

    name: str
    optimizer: BilevelOptimizer[Any]
    x: Tensor
    y: Tensor
    rate: float
    kind: str
    score: float = math.inf
    lost: bool = False


@dataclass
class Race:
    """The race of a class.

    Args:
        landscape: The two losses.
        method: The class.
        options: Arguments of its constructor; they go before those of the rule.
        starts: Lower starts at the start and at the end; 0: the given y alone.
        seed: Of the points that are drawn.
        note: Called with a sentence for each decision.
        record: Called after each run.
    """

    landscape: Landscape
    method: type[BilevelOptimizer[Any]]
    options: Mapping[str, Any]
    starts: int
    seed: int
    note: Callable[[str], None]
    record: Callable[[str, Pair | None], None]

    def __post_init__(self) -> None:
        self.reduced = Reduced(self.landscape, torch.Generator().manual_seed(self.seed))
        self.points: list[tuple[float, Tensor]] = []
        self.several = False

    def run(self) -> tuple[Pair | None, str]:
        """Race until the budget is spent; return the best pair, and why it ended."""
        budget = self.landscape.budget
        reason = "the budget is spent"
        try:
            with budget.limited(int(budget.left * (1 - SPARE))):
                reason = self._race()
        except SpentError:
            pass
        try:
            self.reduced.verify(self.starts, 2)
        except SpentError:
            self.note("The budget ended while the last pair was being verified.")
        return self.reduced.best, reason

    def _race(self) -> str:
        land, budget = self.landscape, self.landscape.budget
        x = land.upper.project(land.upper.flat())
        y = land.lower.project(land.lower.flat())
        self.reduced.explore(x, [y], self.starts)
        tracks = self.reduced.visited[-1].tracks
        self.several = len(tracks) > 1
        y = tracks[0].y if tracks else y
        self._offer(x, y)
        curvature = self._curvature(x, y)
        self.note(f"The largest curvature of G around the start is {curvature:.3g}.")
        field = [self._candidate(x, y, rate, kind, curvature) for rate in UPPER_RATES for kind in ("SGD", "Adam")]
        total = budget.left
        for share, survivors in ((FIRST, 2), (SECOND, 1)):
            for candidate in field:
                self._advance(candidate, int(share * total))
            field = sorted(field, key=lambda c: c.score)[:survivors]
        (best,) = field
        if not math.isfinite(best.score):
            return "no step sizes led to finite losses"
        self.note(f"Step sizes of {self.method.__name__}: {best.name}.")
        parts = [b - a for a, b in zip((0.0, *FALLS), (*FALLS, 1.0), strict=True)]
        for left in range(ROUNDS, 0, -1):
            calls = budget.left // left
            if left < ROUNDS:
                x, y = self._elsewhere(x)
                best = self._candidate(x, y, best.rate, best.kind, curvature)
            for part in parts:
                self._advance(best, int(part * calls))
                for optimizer in (best.optimizer.upper_optimizer, best.optimizer.lower_optimizer):
                    for group in optimizer.param_groups:
                        group["lr"] *= 0.1
        return "the budget is spent"

    def _elsewhere(self, centre: Tensor) -> tuple[Tensor, Tensor]:
        """The next of some upper points, by F at their lower solutions, and its lower solution."""
        space = self.landscape.upper
        if not self.points:
            drawn = space.samples(LOOKED_AT, centre, (0.3, 1.0, 3.0), self.reduced.generator)
            corners = space.corners(4 if space.size <= 2 else 2)
            self.points = sorted(((self.reduced.value(x), x) for x in [*corners, *drawn]), key=lambda entry: entry[0])
        _, x = self.points.pop(0)
        self.reduced.value(x)
        tracks = self.reduced.visited[-1].tracks
        return x, tracks[0].y if tracks else self.landscape.lower.flat()

    def _candidate(self, x: Tensor, y: Tensor, rate: float, kind: str, curvature: float) -> Candidate:
        common = self.landscape.common
        inner = 1 / curvature
        lower = tensors_of(common["lower"])
        below = torch.optim.SGD(lower, lr=inner) if kind == "SGD" else torch.optim.Adam(lower, lr=rate)
        above = torch.optim.Adam(tensors_of(common["upper"]), lr=rate)
        arguments = signature(self.method.__init__).parameters
        rule: dict[str, Any] = {}
        if "inner_lr" in arguments or issubclass(self.method, (BOME, EBOMLC)):
            rule["inner_lr"] = inner
        short = "inner_steps" in arguments and arguments["inner_steps"].default in (0, 1)
        if short:
            rule["inner_steps"] = INNER_STEPS
        if short and "starts" in arguments and self.several:  # copies of longer walks cost more than they find
            rule["starts"] = COPIES
        optimizer = self.method(
            self.landscape.losses[0],
            self.landscape.losses[1],
            **{**common, "upper_optimizer": above, "lower_optimizer": below, "verify": "never", **rule, **self.options},
        )
        below_name = f"SGD at {inner:.3g}" if kind == "SGD" else f"Adam at {rate:g}"
        name = f"Adam at {rate:g} above, {below_name} below"
        return Candidate(name, optimizer, x, y, rate, kind)

    def _advance(self, candidate: Candidate, calls: int) -> None:
        """Run a candidate on from where it stands, for so many calls; then train y again, and score it."""
        land, budget = self.landscape, self.landscape.budget
        if candidate.lost:
            return
        land.upper.put(candidate.x)
        land.lower.put(candidate.y)
        watch, told = Watch(window=20), []
        try:
            with budget.limited(calls), warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("default")
                while True:
                    watch.look(candidate.optimizer.step())
        except SpentError:
            if budget.left <= 0:
                raise
        except NonFiniteError:
            candidate.lost = True
        for sentence in dict.fromkeys(str(warning.message) for warning in told):
            self.note(f"{candidate.name}: {sentence}")
        candidate.x, candidate.y = land.upper.flat(), land.lower.flat()
        if not bool(candidate.x.isfinite().all() and candidate.y.isfinite().all()):
            candidate.lost, candidate.score = True, math.inf
            return
        candidate.score = self._offer(candidate.x, candidate.y)
        self.record(candidate.name, self.reduced.best)

    def _offer(self, x: Tensor, y: Tensor) -> float:
        """Return F at x after y has been trained again, from itself and from the lowest known minimum."""
        reduced = self.reduced
        value = reduced.value(x)
        reduced.visited[-1].penalised = y
        reduced.settle(x)
        best = [p.upper_value for p in reduced.pairs if p.x is x]
        return min([value, *best])

    def _curvature(self, x: Tensor, y: Tensor) -> float:
        """The largest curvature of G along a few random lines through y."""
        generator = torch.Generator().manual_seed(self.seed)
        space = self.landscape.lower
        lines = torch.randn(3, space.size, generator=generator, dtype=torch.float64)

        def question(here: Any) -> float:
            gradient = here.lower_loss(y)[2]
            found = 0.0
            for line in lines:
                step = 1e-3 * line / line.norm()
                bent = here.lower_loss(y + step)[2] - gradient
                found = max(found, float(bent.norm() / step.norm()))
            return found

        found = self.landscape.at(x, question)
        return found if math.isfinite(found) and found > 0.1 else 1.0
