"""Whether a method can work where it is run: what its stats say over many steps, told once in words."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import fields
from statistics import median

from torch import Tensor

from .directions import Stats
from .errors import count

FALLEN = 0.5  # of the first window's median: what a residual, or a constraint, must have come down to
SMALL = 1e-3  # what counts as solved whatever it was
EXPLODED = 1e3  # times the first window's median

ADVICE = {
    "residual": (
        "the residual of the linear system stays at {last:.2g} of its right-hand side. The lower Hessian may be "
        "singular, or its rate off: raise the solver's iterations or damping; or take a method without second "
        "derivatives, such as VPBGD or BOME."
    ),
    "multiplier": (
        "the multiplier has grown from {first:.2g} to {last:.2g}. The constraint cannot be met from where w is: "
        "another lower minimum may be lower (starts=, VPBGD), or rates too large. Bound it by multiplier_max."
    ),
    "constraint": (
        "the constraint has grown from {first:.2g} to {last:.2g}. The lower level is not solved, or w is in a minimum "
        "that is not the lowest: take more inner steps, a larger penalty, or several starts."
    ),
}


class Watch:
    """Looks at the stats of a run, and warns once of each sign that the method cannot work there.

    It is given each step's stats, keeps the few numbers it needs on their device, and reads them once a window: it
    waits for the device that often, and steps never do.

    Signs: a residual (``Implicit``, ``SOBA`` and its kin) that has not halved and is above 1e-3; a multiplier (barrier
    methods, ``PDBO``) that has grown by 1,000; a constraint (penalty and barrier methods) that has doubled and is above
    1e-3. Each compares the median of a window with that of the first.

    Args:
        window: Steps in a window, >= 10. Default 100.
        patience: Windows after the first before anything is said, >= 1. Default 3.

    Attributes:
        said: What was said, by the name of the number.

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> above, below = problem.optimizers()
        >>> optimizer = bilevel.Implicit(
        ...     problem.upper_loss, problem.lower_loss, upper=problem.upper, lower=problem.lower,
        ...     upper_optimizer=above, lower_optimizer=below,
        ... )
        >>> watch = bilevel.Watch(window=10)
        >>> for _ in range(60):
        ...     watch.look(optimizer.step())
        >>> watch.said
        {}
    """

    def __init__(self, window: int = 100, patience: int = 3) -> None:
        count("Watch", "window", window, minimum=10)
        count("Watch", "patience", patience, minimum=1)
        self._window, self._patience = window, patience
        self._seen: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._first: dict[str, float] = {}
        self._windows: defaultdict[str, int] = defaultdict(int)
        self.said: dict[str, str] = {}

    def look(self, stats: Stats) -> None:
        """Take note of a step's stats; warns, at the end of a window, where a sign is seen for the first time."""
        if stats.skipped:
            return
        for entry in fields(stats):
            value = getattr(stats, entry.name)
            if entry.name in ADVICE and isinstance(value, Tensor):
                self._seen[entry.name].append(value.detach())
                if len(self._seen[entry.name]) == self._window:
                    self._judge(entry.name, median(abs(float(v)) for v in self._seen.pop(entry.name)))

    def _judge(self, name: str, last: float) -> None:
        first = self._first.setdefault(name, last)
        self._windows[name] += 1
        if self._windows[name] <= self._patience or name in self.said:
            return
        bad = {
            "residual": last > SMALL and last > FALLEN * first,
            "multiplier": last > EXPLODED * max(first, SMALL),
            "constraint": last > SMALL and last > first / FALLEN,
        }[name]
        if bad:
            self.said[name] = ADVICE[name].format(first=first, last=last)
            warnings.warn(f"Watch: {self.said[name]}", RuntimeWarning, stacklevel=3)
