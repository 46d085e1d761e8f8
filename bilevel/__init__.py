"""Bilevel optimization for PyTorch: optimizer classes that take any upper and lower loss closures."""

from . import without_numpy as without_numpy  # before anything that imports torch

# isort: split
from . import barrier, penalty, problems, projection, testing
from .batches import Batches, Indexed
from .directions import Directions, Stats
from .errors import ClosureError, NonFiniteError, ProcessError
from .evaluation.hold import hold
from .evaluation.oracle import Oracle
from .hypergradient import ConjugateGradient, FixedPoint, Neumann
from .methods import (
    BOME,
    BSG1,
    BVFSM,
    EBOMLC,
    EMLC,
    F2SA,
    GPBGD,
    MASOBA,
    MEHA,
    MLC,
    PDBO,
    SABA,
    SAMA,
    SOBA,
    VPBGD,
    BarrierStats,
    FiniteDifference,
    GPBGDStats,
    HypergradientStats,
    Implicit,
    ImplicitStats,
    PDBOStats,
    PenaltyStats,
    SingleLoopStats,
    Unrolled,
)
from .microbatches import MicroBatches
from .optimizer.base import BilevelOptimizer
from .solver import minimize
from .testing.check_directions import check_directions
from .vectors import Vector
from .watch import Watch

__version__ = "0.1.0"

__all__ = [
    "BOME",
    "BSG1",
    "BVFSM",
    "EBOMLC",
    "EMLC",
    "F2SA",
    "GPBGD",
    "MASOBA",
    "MEHA",
    "MLC",
    "PDBO",
    "SABA",
    "SAMA",
    "SOBA",
    "VPBGD",
    "BarrierStats",
    "Batches",
    "BilevelOptimizer",
    "ClosureError",
    "ConjugateGradient",
    "Directions",
    "FiniteDifference",
    "FixedPoint",
    "GPBGDStats",
    "HypergradientStats",
    "Implicit",
    "ImplicitStats",
    "Indexed",
    "MicroBatches",
    "Neumann",
    "NonFiniteError",
    "Oracle",
    "PDBOStats",
    "PenaltyStats",
    "ProcessError",
    "SingleLoopStats",
    "Stats",
    "Unrolled",
    "Vector",
    "Watch",
    "barrier",
    "check_directions",
    "hold",
    "minimize",
    "penalty",
    "problems",
    "projection",
    "testing",
]
