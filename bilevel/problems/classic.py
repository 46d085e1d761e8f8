"""Small problems of the literature without other constraints than bounds.

Most are in the collection of Zhou, Zemkoho and Tin, `BOLIB: Bilevel Optimization LIBrary of Test Problems
<https://arxiv.org/abs/1812.00230>`_, under these names. Most sources state no start; these are ours. The tests
derive every best value anew, by a grid or in closed form.
"""

from __future__ import annotations

from math import pi

from torch import Tensor, cos, exp, log, sin

from .definition import NONNEGATIVE, UNIT, Definition

BOLIB = "BOLIB (Zhou, Zemkoho and Tin, 2018): "


def _griewank(y: Tensor) -> Tensor:
    """1 + |y|^2 / 4000 - prod cos(y_i / sqrt(i)): local minima, the lowest at 0."""
    return 1 + (y**2).sum(0) / 4000 - cos(y[0]) * cos(y[1] / 2**0.5)


PROBLEMS = [
    Definition(
        "mirrlees-1999",
        f"{BOLIB}Mirrlees1999",
        "published nonconvex several-minima jump",  # at x = 1 the lowest y changes from near 1 to near -1
        lambda x, y: (x[0] - 2) ** 2 + (y[0] - 1) ** 2,
        lambda x, y: -x[0] * exp(-((y[0] + 1) ** 2)) - exp(-((y[0] - 1) ** 2)),
        start=([0.0], [0.0]),
        best=1.0018,
        solution=([1.0], [0.9575]),
    ),
    Definition(
        "dempe-etal-2012",
        f"{BOLIB}DempeEtal2012",
        "published bounds linear jump",
        lambda x, y: x[0] + 0 * y[0],
        lambda x, y: x[0] * y[0],
        start=([0.0], [0.0]),
        best=-1.0,
        solution=([-1.0], [1.0]),
        upper_box=UNIT,
        lower_box=(0.0, 1.0),
    ),
    Definition(
        "lucchetti-etal-1987",
        f"{BOLIB}LucchettiEtal1987",
        "published bounds linear jump",  # the best pair is an isolated point: at x = 1 every y is optimal
        lambda x, y: 0.5 * (1 - x[0]) + x[0] * y[0],
        lambda x, y: (x[0] - 1) * y[0],
        start=([0.5], [0.5]),
        best=0.0,
        solution=([1.0], [0.0]),
        upper_box=(0.0, 1.0),
        lower_box=(0.0, 1.0),
    ),
    Definition(
        "morgan-patrone-2006a",
        f"{BOLIB}MorganPatrone2006a",
        "published bounds linear jump",
        lambda x, y: -(x[0] + y[0]),
        lambda x, y: x[0] * y[0],
        start=([0.25], [0.5]),
        best=-1.0,
        solution=([0.0], [1.0]),
        upper_box=(-0.5, 0.5),
        lower_box=UNIT,
    ),
    Definition(
        "paulavicius-etal-2017a",
        f"{BOLIB}PaulaviciusEtal2017a",
        "published bounds nonconvex several-minima jump",
        lambda x, y: x[0] ** 2 + y[0] ** 2,
        lambda x, y: x[0] * y[0] ** 2 - 0.5 * y[0] ** 4,
        start=([-0.5], [0.5]),
        best=0.25,
        solution=([0.5], [0.0]),
        upper_box=UNIT,
        lower_box=UNIT,
    ),
    Definition(
        "paulavicius-etal-2017b",
        f"{BOLIB}PaulaviciusEtal2017b",
        "published bounds nonconvex several-minima jump",
        lambda x, y: x[0] + y[0],
        lambda x, y: 0.5 * x[0] * y[0] ** 2 - x[0] * y[0] ** 3,
        start=([0.5], [0.5]),
        best=-2.0,
        solution=([-1.0], [-1.0]),
        upper_box=UNIT,
        lower_box=UNIT,
    ),
    Definition(
        "henrion-surowiec-2011",
        f"{BOLIB}HenrionSurowiec2011, c = 1",
        "published strongly-convex",
        lambda x, y: x[0] ** 2 + y[0],
        lambda x, y: 0.5 * y[0] ** 2 - x[0] * y[0],
        start=([1.0], [0.0]),
        best=-0.25,
        solution=([-0.5], [-0.5]),
    ),
    Definition(
        "macal-hurter-1997",
        f"{BOLIB}MacalHurter1997",
        "published strongly-convex ill-conditioned",  # y = 50 x - 500
        lambda x, y: (x[0] - 1) ** 2 + (y[0] - 1) ** 2,
        lambda x, y: 0.5 * y[0] ** 2 + 500 * y[0] - 50 * x[0] * y[0],
        start=([1.0], [1.0]),
        best=81.3279,
        solution=([10.0164], [0.8197]),
    ),
    Definition(
        "de-silva-1978",
        f"{BOLIB}DeSilva1978",
        "published strongly-convex bounds active-bounds kink",
        lambda x, y: (x**2 - 2 * x + y**2).sum(0),
        lambda x, y: ((y - x) ** 2).sum(0),
        start=([0.0, 0.0], [1.0, 1.0]),
        best=-1.0,
        solution=([0.5, 0.5], [0.5, 0.5]),
        lower_box=(0.5, 1.5),
    ),
    Definition(
        "falk-liu-1995",
        f"{BOLIB}FalkLiu1995, with its bounds alone",
        "published strongly-convex bounds",
        lambda x, y: (x**2 - 3 * x + y**2).sum(0),
        lambda x, y: ((y - x) ** 2).sum(0),
        start=([0.0, 0.0], [1.0, 1.0]),
        best=-2.25,
        solution=([0.75, 0.75], [0.75, 0.75]),
        lower_box=(0.5, 1.5),
    ),
    Definition(
        "hatz-etal-2013",
        f"{BOLIB}HatzEtal2013",
        "published strongly-convex bounds active-bounds kink",
        lambda x, y: -x[0] + 2 * y[0] + y[1],
        lambda x, y: (x[0] - y[0]) ** 2 + y[1] ** 2,
        start=([1.0], [2.0, 2.0]),
        best=0.0,
        solution=([0.0], [0.0, 0.0]),
        lower_box=NONNEGATIVE,
    ),
    Definition(
        "yezza-1996-4.1",
        f"{BOLIB}YezzaEx41",
        "published strongly-convex bounds",
        lambda x, y: 0.5 * (y[0] - 2) ** 2 + 0.5 * (x[0] - y[0] - 2) ** 2,
        lambda x, y: 0.5 * y[0] ** 2 + x[0] - y[0],
        start=([0.0], [0.0]),
        best=0.5,
        solution=([3.0], [1.0]),
        upper_box=NONNEGATIVE,
        lower_box=NONNEGATIVE,
    ),
    Definition(
        "henderson-quandt-1958",
        f"{BOLIB}HendersonQuandt1958",
        "published strongly-convex bounds",  # a duopoly
        lambda x, y: 0.5 * x[0] ** 2 + 0.5 * x[0] * y[0] - 95 * x[0],
        lambda x, y: y[0] ** 2 + (0.5 * x[0] - 100) * y[0],
        start=([0.0], [0.0]),
        best=-3266.67,
        solution=([93.3333], [26.6667]),
        upper_box=(0.0, 200.0),
        lower_box=NONNEGATIVE,
    ),
    Definition(
        "tp-9",
        "Sinha, Malo and Deb, EMO 2013, test problem 9, with two variables in each level",
        "published bounds nonconvex several-minima kink",
        lambda x, y: ((x - 1).abs() + y.abs()).sum(0),
        lambda x, y: exp(_griewank(y) * (x**2).sum(0)),
        start=([0.3, 0.3], [1.0, 1.0]),
        best=0.0,
        solution=([1.0, 1.0], [0.0, 0.0]),
        upper_box=(-1.0, 2.0),
        lower_box=(-pi, pi),
    ),
    Definition(
        "v-pbgd-toy",
        "Shen and Chen, On Penalty-based Bilevel Gradient Descent Method, ICML 2023",
        "published bounds nonconvex",
        lambda x, y: cos(4 * y[0] + 2) / (1 + exp(2 - 4 * x[0])) + 0.5 * log((4 * x[0] - 2) ** 2 + 1),
        lambda x, y: (x[0] + y[0]) ** 2 + x[0] * sin(x[0] + y[0]) ** 2,
        start=([2.0], [0.0]),
        best=0.19991,
        solution=None,
        upper_box=(0.0, 3.0),
    ),
    Definition(
        "bvfsm-sine-1",
        "Liu et al., Value-Function-based Sequential Minimization, TPAMI 2023, a = c = 2, n = 1",
        "published nonconvex many-minima",  # y = c - x - pi/2 + 2 pi k; F = (C - 4)^2 / 2, C = 3 pi / 2
        lambda x, y: (x[0] - 2) ** 2 + ((y - 4) ** 2).sum(0),
        lambda x, y: sin(x[0] + y - 2).sum(0),
        start=([6.0], [0.0]),
        best=(1.5 * pi - 4) ** 2 / 2,
        solution=([2 + (1.5 * pi - 4) / 2], [4 + (1.5 * pi - 4) / 2]),
    ),
    Definition(
        "bvfsm-sine-2",
        "Liu et al., Value-Function-based Sequential Minimization, TPAMI 2023, a = c = 2, n = 2",
        "published nonconvex many-minima",  # F = n (C - 4)^2 / (n + 1)
        lambda x, y: (x[0] - 2) ** 2 + ((y - 4) ** 2).sum(0),
        lambda x, y: sin(x[0] + y - 2).sum(0),
        start=([6.0], [0.0, 0.0]),
        best=2 * (1.5 * pi - 4) ** 2 / 3,
        solution=([2 + 2 * (1.5 * pi - 4) / 3], [4 + (1.5 * pi - 4) / 3] * 2),
    ),
]
