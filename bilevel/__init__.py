"""Bilevel optimization for PyTorch: optimizer classes that take any upper and lower loss closures."""

from . import without_numpy as without_numpy  # before anything that imports torch

# isort: split
from . import barrier, problems, testing
from .batches import Batches, Indexed
from .directions import Directions, Stats
from .errors import ClosureError, NonFiniteError
from .evaluation.hold import hold
from .evaluation.oracle import Oracle
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
from .testing.check_directions import check_directions
from .vectors import Vector

__version__ = "0.1.0"

__all__ = [
    "BOME",
    "EBOMLC",
    "EMLC",
    "MLC",
    "SAMA",
    "BarrierStats",
    "Batches",
    "BilevelOptimizer",
    "ClosureError",
    "ConjugateGradient",
    "Directions",
    "FiniteDifference",
    "FixedPoint",
    "HypergradientStats",
    "Implicit",
    "ImplicitStats",
    "Indexed",
    "Neumann",
    "NonFiniteError",
    "Oracle",
    "Stats",
    "Unrolled",
    "Vector",
    "barrier",
    "check_directions",
    "hold",
    "problems",
    "testing",
]
