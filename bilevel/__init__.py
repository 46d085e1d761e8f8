"""Bilevel optimization for PyTorch: optimizer classes that take any upper and lower loss closures."""

from . import barrier, problems
from .checking import check_directions
from .directions import Directions, Stats
from .errors import ClosureError, NonFiniteError
from .methods import BOME, EBOMLC, BarrierStats
from .optimizer import BilevelOptimizer
from .replay import hold

__version__ = "0.1.0"

__all__ = [
    "BOME",
    "EBOMLC",
    "BarrierStats",
    "BilevelOptimizer",
    "ClosureError",
    "Directions",
    "NonFiniteError",
    "Stats",
    "barrier",
    "check_directions",
    "hold",
    "problems",
]
