"""Estimators of derivatives through the lower problem."""

from .adjoint import Step, Trajectory, adjoint, descend, pull_back
from .graph import KeptGraph, Unreached, leaves
from .solvers import ConjugateGradient, FixedPoint, Neumann, Solution, Solver
from .start import Start, start_of, through_start

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
