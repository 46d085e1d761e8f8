"""Derivatives through the lower problem: products of G, walks of lower steps and their adjoint, solvers."""

from .adjoint import Unrolling, adjoint, pull_back, unrolled_by_adjoint
from .graph import KeptGraph, Unreached, leaves, unrolled_by_graph
from .mode_choice import mode_taken
from .modes import ProductMode
from .products import hessian_product, mixed_product
from .segments import KeptSegments
from .solvers import ConjugateGradient, FixedPoint, Neumann, Solution, Solver
from .start import Start, start_of, through_start
from .trajectory import Step, Trajectory, copied, descend, train

__all__ = [
    "ConjugateGradient",
    "FixedPoint",
    "KeptGraph",
    "KeptSegments",
    "Neumann",
    "ProductMode",
    "Solution",
    "Solver",
    "Start",
    "Step",
    "Trajectory",
    "Unreached",
    "Unrolling",
    "adjoint",
    "copied",
    "descend",
    "hessian_product",
    "leaves",
    "mixed_product",
    "mode_taken",
    "pull_back",
    "start_of",
    "through_start",
    "train",
    "unrolled_by_adjoint",
    "unrolled_by_graph",
]
