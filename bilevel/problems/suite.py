"""The suite: all small problems with known answers, by name and by tag."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..errors import message
from . import classic, mitsos_barton, ours, smd
from .definition import Definition
from .problem import Problem
from .quadratic import quadratic
from .stochastic import finite_sum
from .toys import coreset, degenerate, minimax

TAGS = {
    "published": "from the literature, see ``source``",
    "strongly-convex": "G is strongly convex in w",
    "convex": "G is convex in w, not strongly",
    "convex-lower": "G is convex in w, F along it is not",
    "convex-lower-in-part": "G is convex in w after a change of variables",
    "linear": "G is linear in w: its minima are at bounds",
    "nonconvex": "G, or F, is not convex",
    "bounds": "variables have bounds",
    "active-bounds": "at the answer some are active",
    "several-minima": "G has several local minima, or global ones, in w",
    "many-minima": "G has infinitely many global minima in w, or hundreds",
    "several-upper-minima": "F has several local minima along the lower solution",
    "jump": "the lower solution, and with it F, jumps as alpha moves",
    "kink": "F or the lower solution has no derivative at the answer",
    "conflict": "F is better where w is worse for G",
    "ill-conditioned": "curvatures of G differ by a factor of 100 or more",
    "infinite-solution": "the answer is approached at infinity",
    "stochastic": "the losses take batches",
    "learning": "a learning problem in miniature",
    "ten": "ten variables in each level",
}

_BUILDERS: dict[str, Callable[..., Problem]] = {
    "bome-degenerate": degenerate,
    "bome-minimax": minimax,
    **{f"bome-coreset-{start}": partial(coreset, start) for start in (0, 1, 2)},
    **{f"quadratic-{seed}": partial(quadratic, seed) for seed in (0, 1)},
    "finite-sum-0": partial(finite_sum, 0),
}
_DEFINITIONS: list[Definition] = [*classic.PROBLEMS, *mitsos_barton.PROBLEMS, *smd.PROBLEMS, *ours.PROBLEMS]
_BUILDERS.update({definition.name: definition.build for definition in _DEFINITIONS})


def tags() -> dict[str, str]:
    """Return the tags of the suite and what they say.

    Example:
        >>> import bilevel
        >>> bilevel.problems.tags()["stochastic"]
        'the losses take batches'
    """
    return dict(TAGS)


def names(*tags: str) -> list[str]:
    """Return the names of the problems of the suite that have all of these tags.

    Args:
        tags: See :func:`tags`; none: all problems.

    Raises:
        ValueError: There is no such tag.

    Example:
        >>> import bilevel
        >>> bilevel.problems.names("strongly-convex", "stochastic")
        ['finite-sum-0']
        >>> len(bilevel.problems.names()) >= 40
        True
    """
    for tag in tags:
        if tag not in TAGS:
            raise ValueError(message("names", "tags", tag, f"must be one of {', '.join(sorted(TAGS))}."))
    return [name for name, build in _BUILDERS.items() if build().tags.issuperset(tags)]


def named(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    """Build a problem of the suite, with fresh variables at its start.

    Args:
        name: One of :func:`names`.
        dtype: Floating-point type of the variables.

    Raises:
        ValueError: There is no problem of this name.

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.named("mirrlees-1999")
        >>> problem.best, sorted(problem.tags)
        (1.0018, ['jump', 'nonconvex', 'published', 'several-minima'])
    """
    if name not in _BUILDERS:
        raise ValueError(message("named", "name", name, "is no problem of the suite; see bilevel.problems.names()."))
    return _BUILDERS[name](dtype=dtype)


def suite(*tags: str) -> list[Problem]:
    """Build all problems of the suite that have these tags.

    Example:
        >>> import bilevel
        >>> sum(problem.solved() for problem in bilevel.problems.suite("stochastic"))
        0
    """
    return [named(name) for name in names(*tags)]
