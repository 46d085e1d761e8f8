"""Non-convex lower problems on [-1, 1]: jumps of the value function, several minima, flat ones.

Mitsos and Barton, *A Test Set for Bilevel Programs*, MIT, 2006: those without other constraints than bounds, under the
numbers of its examples. It names boxes and best values, no starts: ours is the corner (1, 1), or (0, 1) where x = 1 is
best.
"""

from __future__ import annotations

from .definition import UNIT, Definition

SOURCE = "Mitsos and Barton, A Test Set for Bilevel Programs, 2006, example "


def _example(number: str, tags: str, upper_loss, lower_loss, best, solution, **other):  # type: ignore[no-untyped-def]
    named = {"start": ([1.0], [1.0]), "upper_box": UNIT, "lower_box": UNIT, **other}
    tags = f"published bounds nonconvex {tags}"
    return Definition(
        f"mitsos-barton-{number}", SOURCE + number, tags, upper_loss, lower_loss, best=best, solution=solution, **named
    )


PROBLEMS = [
    _example(
        "3.12",
        "several-minima",  # y = +-sqrt(x) for x > 0, y = 0 else
        lambda x, y: -x[0] + x[0] * y[0] + 10 * y[0] ** 2,
        lambda x, y: -x[0] * y[0] ** 2 + 0.5 * y[0] ** 4,
        0.0,
        ([0.0], [0.0]),
    ),
    _example(
        "3.13",
        "jump",  # at x = 0, where every y is optimal
        lambda x, y: x[0] - y[0],
        lambda x, y: 0.5 * x[0] * y[0] ** 2 - x[0] * y[0] ** 3,
        -1.0,
        ([0.0], [1.0]),
    ),
    _example(
        "3.14",
        "several-minima jump",
        lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2,
        lambda x, y: y[0] ** 3 / 3 - x[0] * y[0],
        0.25,
        ([0.25], [0.5]),
    ),
    _example(
        "3.15",
        "several-minima jump",
        lambda x, y: x[0] + y[0],
        lambda x, y: 0.5 * x[0] * y[0] ** 2 - y[0] ** 3 / 3,
        0.0,
        ([-1.0], [1.0]),
    ),
    _example(
        "3.16",
        "several-minima jump",  # (-1, 0) and (-1/2, -1) are both best
        lambda x, y: 2 * x[0] + y[0],
        lambda x, y: -0.5 * x[0] * y[0] ** 2 - 0.25 * y[0] ** 4,
        -2.0,
        ([-1.0], [0.0]),
    ),
    _example(
        "3.17",
        "several-minima",
        lambda x, y: (x[0] + 0.5) ** 2 + 0.5 * y[0] ** 2,
        lambda x, y: 0.5 * x[0] * y[0] ** 2 + 0.25 * y[0] ** 4,
        3 / 16,
        ([-0.25], [0.5]),
    ),
    _example(
        "3.18",
        "several-minima jump",
        lambda x, y: -(x[0] ** 2) + y[0] ** 2,
        lambda x, y: x[0] * y[0] ** 2 - 0.5 * y[0] ** 4,
        -1.0,
        ([1.0], [0.0]),
        start=([0.0], [1.0]),
    ),
    _example(
        "3.19",
        "several-minima",
        lambda x, y: x[0] * y[0] - y[0] + 0.5 * y[0] ** 2,
        lambda x, y: -x[0] * y[0] ** 2 + 0.5 * y[0] ** 4,
        -0.2580,
        ([0.1886], [0.4343]),
    ),
    _example(
        "3.20",
        "several-minima jump",
        lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2,
        lambda x, y: y[0] ** 3 / 3 - x[0] ** 2 * y[0],
        0.3125,
        ([0.5], [0.5]),
    ),
    _example(
        "3.21",
        "several-minima jump",
        lambda x, y: (x[0] + 0.6) ** 2 + y[0] ** 2,
        lambda x, y: (
            y[0] ** 4
            + (4 / 30) * (1 - x[0]) * y[0] ** 3
            + (-0.02 * x[0] ** 2 + 0.16 * x[0] - 0.4) * y[0] ** 2
            + (0.004 * x[0] ** 3 - 0.036 * x[0] ** 2 + 0.08 * x[0]) * y[0]
        ),
        0.2095,
        ([-0.5545], [0.4554]),
    ),
    _example(
        "3.24",
        "several-minima",
        lambda x, y: x[0] ** 2 - y[0],
        lambda x, y: ((y[0] - 1 - 0.1 * x[0]) ** 2 - 0.5 - 0.5 * x[0]) ** 2,
        -1.7551,
        ([0.2106], [1.7990]),
        upper_box=(0.0, 1.0),
        lower_box=(0.0, 3.0),
    ),
]
