"""The solver face for small problems: :func:`bilevel.minimize` and what it answers with."""

from .minimize import minimize
from .result import Record, Result

__all__ = ["Record", "Result", "minimize"]
