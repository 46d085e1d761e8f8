"""Bilevel optimization for PyTorch: optimizer classes that take any upper and lower loss closures."""

from . import without_numpy as without_numpy  # before anything that imports torch

# isort: split
from . import barrier, problems
from .checks.check_directions import check_directions
from .directions import Directions, Stats
from .errors import ClosureError, NonFiniteError
from .evaluation.hold import hold
from .hypergradient import ConjugateGradient, FixedPoint, Neumann
from .methods import (
    BOME,
    EBOMLC,
    EMLC,
    MLC,
    SAMA,
    BarrierStats,
    FiniteDifference,
    HypergradientStats,
    Implicit,
    ImplicitStats,
    Unrolled,
)
from .optimizer.base import BilevelOptimizer

__version__ = "0.1.0"

__all__ = [
    "BOME",
    "EBOMLC",
    "EMLC",
    "MLC",
    "SAMA",
    "BarrierStats",
    "BilevelOptimizer",
    "ClosureError",
    "ConjugateGradient",
    "Directions",
    "FiniteDifference",
    "FixedPoint",
    "HypergradientStats",
    "Implicit",
    "ImplicitStats",
    "Neumann",
    "NonFiniteError",
    "Stats",
    "Unrolled",
    "barrier",
    "check_directions",
    "hold",
    "problems",
]
