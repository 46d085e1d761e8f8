"""Estimators of derivatives through the lower problem."""

from .linear import ConjugateGradient, FixedPoint, Neumann, Solution, Solver
from .trajectory import Step, Trajectory, adjoint, descend, pull_back

__all__ = [
    "ConjugateGradient",
    "FixedPoint",
    "Neumann",
    "Solution",
    "Solver",
    "Step",
    "Trajectory",
    "adjoint",
    "descend",
    "pull_back",
]
