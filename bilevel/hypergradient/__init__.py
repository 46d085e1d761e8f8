"""Estimators of derivatives through the lower problem."""

from .kept_graph import KeptGraph, Unreached, leaves
from .linear import ConjugateGradient, FixedPoint, Neumann, Solution, Solver
from .start import Start, start_of, through_start
from .trajectory import Step, Trajectory, adjoint, descend, pull_back

__all__ = [
    "ConjugateGradient",
    "FixedPoint",
    "KeptGraph",
    "Neumann",
    "Solution",
    "Solver",
    "Start",
    "Step",
    "Trajectory",
    "Unreached",
    "adjoint",
    "descend",
    "leaves",
    "pull_back",
    "start_of",
    "through_start",
]
