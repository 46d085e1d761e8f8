"""Bilevel problems with known answers, for the tests, for authors of methods, and to compare methods on.

:func:`suite` builds all small ones, :func:`names` and :func:`named` find them; the functions :func:`degenerate`,
:func:`minimax`, :func:`coreset`, :func:`quadratic` and :func:`finite_sum` build single ones with more to choose, and
:func:`diabetes`, :func:`breast_cancer` and :func:`digits` learning problems on the data that scikit-learn brings along.
"""

from .data import Cleaning, breast_cancer, diabetes, digits
from .problem import Problem
from .quadratic import Quadratic, quadratic
from .stochastic import FiniteSum, finite_sum
from .suite import named, names, suite, tags
from .toys import CORESET_STARTS as CORESET_STARTS
from .toys import coreset, degenerate, minimax

__all__ = [
    "Cleaning",
    "FiniteSum",
    "Problem",
    "Quadratic",
    "breast_cancer",
    "coreset",
    "degenerate",
    "diabetes",
    "digits",
    "finite_sum",
    "minimax",
    "named",
    "names",
    "quadratic",
    "suite",
    "tags",
]
