r"""Scalable problems with boxes: two upper and three lower variables of each of the eight without constraints.

Sinha, Malo and Deb, `Test problem construction for single-objective bilevel optimization
<https://doi.org/10.1162/EVCO_a_00116>`_, Evolutionary Computation 22, 2014: SMD1 to SMD8. x = (a, b) has p = r = 1
entries, y = (c, d) has q = 2 and r = 1 (SMD6: q = 1 and s = 2 with r = 1: four). All best values are 0, with
a = b = 0. From SMD2 on, most have an F that falls where y is worse for G: a y that is not optimal looks too good.
"""

from __future__ import annotations

from math import e, pi

from torch import Tensor, cos, exp, log, sqrt, tan

from .definition import Definition
from .lower_search import Formula

SOURCE = "Sinha, Malo and Deb, Evolutionary Computation 22, 2014, "
WIDE, EDGE = (-5.0, 10.0), 1e-3  # boxes that the paper leaves open are closed a little inside


def _smd(number: int, tags: str, upper_loss: Formula, lower_loss: Formula, b: tuple[float, float], d, y) -> Definition:  # type: ignore[no-untyped-def]
    """``b`` and ``d``: boxes of the last entries; ``y``: the lower solution, of which the start keeps away."""
    others = len(y) - 1
    return Definition(
        f"smd-{number}",
        f"{SOURCE}SMD{number}",
        f"published bounds {tags}",
        upper_loss,
        lower_loss,
        start=([2.0, 0.5 * b[1]], [2.0] * others + [0.5 * (d[0] + d[1]) + 0.25]),
        best=0.0,
        solution=([0.0, 0.0], y),
        upper_box=([WIDE[0], b[0]], [WIDE[1], b[1]]),
        lower_box=([WIDE[0]] * others + [d[0]], [WIDE[1]] * others + [d[1]]),
    )


def _rastrigin(c: Tensor) -> Tensor:
    """``q + sum(c^2 - cos(2 pi c))``: many local minima, the global one at 0."""
    return len(c) + (c**2 - cos(2 * pi * c)).sum(0)


def _rosenbrock(c: Tensor) -> Tensor:
    """A curved valley: SMD5 and SMD8."""
    return ((c[1] - c[0] ** 2) ** 2) + (c[0] - 1) ** 2


def _ackley(a: Tensor) -> Tensor:
    return 20 + e - 20 * exp(-0.2 * sqrt(a**2 + 1e-300)) - exp(cos(2 * pi * a))


TANGENT = (-pi / 2 + EDGE, pi / 2 - EDGE)

PROBLEMS = [
    _smd(
        1,
        "convex-lower-in-part",
        lambda x, y: x[0] ** 2 + (y[:2] ** 2).sum(0) + x[1] ** 2 + (x[1] - tan(y[2])) ** 2,
        lambda x, y: x[0] ** 2 + (y[:2] ** 2).sum(0) + (x[1] - tan(y[2])) ** 2,
        WIDE,
        TANGENT,
        [0.0, 0.0, 0.0],
    ),
    _smd(
        2,
        "conflict",
        lambda x, y: x[0] ** 2 - (y[:2] ** 2).sum(0) + x[1] ** 2 - (x[1] - log(y[2])) ** 2,
        lambda x, y: x[0] ** 2 + (y[:2] ** 2).sum(0) + (x[1] - log(y[2])) ** 2,
        (-5.0, 1.0),
        (EDGE, e),
        [0.0, 0.0, 1.0],
    ),
    _smd(
        3,
        "nonconvex several-minima",
        lambda x, y: x[0] ** 2 + (y[:2] ** 2).sum(0) + x[1] ** 2 + (x[1] ** 2 - tan(y[2])) ** 2,
        lambda x, y: x[0] ** 2 + _rastrigin(y[:2]) + (x[1] ** 2 - tan(y[2])) ** 2,
        WIDE,
        TANGENT,
        [0.0, 0.0, 0.0],
    ),
    _smd(
        4,
        "nonconvex several-minima conflict",
        lambda x, y: x[0] ** 2 - (y[:2] ** 2).sum(0) + x[1] ** 2 - (x[1].abs() - log(1 + y[2])) ** 2,
        lambda x, y: x[0] ** 2 + _rastrigin(y[:2]) + (x[1].abs() - log(1 + y[2])) ** 2,
        (-1.0, 1.0),
        (0.0, e),
        [0.0, 0.0, 0.0],
    ),
    _smd(
        5,
        "nonconvex several-minima conflict",
        lambda x, y: x[0] ** 2 - _rosenbrock(y[:2]) + x[1] ** 2 - (x[1].abs() - y[2] ** 2) ** 2,
        lambda x, y: x[0] ** 2 + _rosenbrock(y[:2]) + (x[1].abs() - y[2] ** 2) ** 2,
        WIDE,
        WIDE,
        [1.0, 1.0, 0.0],
    ),
    _smd(
        6,
        "many-minima conflict",  # y[1] = y[2] is all that G wants of them
        lambda x, y: x[0] ** 2 - y[0] ** 2 + y[1] ** 2 + y[2] ** 2 + x[1] ** 2 - (x[1] - y[3]) ** 2,
        lambda x, y: x[0] ** 2 + y[0] ** 2 + (y[2] - y[1]) ** 2 + (x[1] - y[3]) ** 2,
        WIDE,
        WIDE,
        [0.0, 0.0, 0.0, 0.0],
    ),
    _smd(
        7,
        "nonconvex conflict",  # F has many local minima in a
        lambda x, y: 1 + x[0] ** 2 / 400 - cos(x[0]) - (y[:2] ** 2).sum(0) + x[1] ** 2 - (x[1] - log(y[2])) ** 2,
        lambda x, y: x[0] ** 3 + (y[:2] ** 2).sum(0) + (x[1] - log(y[2])) ** 2,
        (-5.0, 1.0),
        (EDGE, e),
        [0.0, 0.0, 1.0],
    ),
    _smd(
        8,
        "nonconvex conflict kink",  # Ackley's function above
        lambda x, y: _ackley(x[0]) - _rosenbrock(y[:2]) + x[1] ** 2 - (x[1] - y[2] ** 3) ** 2,
        lambda x, y: x[0].abs() + _rosenbrock(y[:2]) + (x[1] - y[2] ** 3) ** 2,
        WIDE,
        WIDE,
        [1.0, 1.0, 0.0],
    ),
]
