"""Derivatives through the lower problem: products of G, walks of lower steps and their adjoint, solvers."""

from .adjoint import Unrolling, adjoint, pull_back, through_hyperparameters, transposed, unrolled_by_adjoint
from .checkpoints import Checkpoints
from .forward import unrolled_by_forward
from .graph import KeptGraph, NoGraph, Unreached, leaves, unrolled_by_graph
from .kept import HessianProducts
from .mode_choice import mode_taken
from .modes import ProductMode
from .preconditioner import Preconditioner, check_preconditioner, preconditioned
from .products import hessian_product, mixed_product
from .segments import KeptSegments
from .solvers import ConjugateGradient, FixedPoint, Neumann, Solution, Solver
from .start import Start, start_of, through_start
from .trajectory import Step, Trajectory, copied, descend, train

__all__ = [
    "Checkpoints",
    "ConjugateGradient",
    "FixedPoint",
    "HessianProducts",
    "KeptGraph",
    "KeptSegments",
    "Neumann",
    "NoGraph",
    "Preconditioner",
    "ProductMode",
    "Solution",
    "Solver",
    "Start",
    "Step",
    "Trajectory",
    "Unreached",
    "Unrolling",
    "adjoint",
    "check_preconditioner",
    "copied",
    "descend",
    "hessian_product",
    "leaves",
    "mixed_product",
    "mode_taken",
    "preconditioned",
    "pull_back",
    "start_of",
    "through_hyperparameters",
    "through_start",
    "train",
    "transposed",
    "unrolled_by_adjoint",
    "unrolled_by_forward",
    "unrolled_by_graph",
]
