"""The methods, one a file."""

from .bome import BOME
from .dynamic_barrier import BarrierStats
from .ebomlc import EBOMLC
from .emlc import EMLC
from .finite_difference import FiniteDifference
from .hypergradient_method import HypergradientStats
from .implicit import Implicit, ImplicitStats
from .mlc import MLC
from .sama import SAMA
from .unrolled import Unrolled

__all__ = [
    "BOME",
    "EBOMLC",
    "EMLC",
    "MLC",
    "SAMA",
    "BarrierStats",
    "FiniteDifference",
    "HypergradientStats",
    "Implicit",
    "ImplicitStats",
    "Unrolled",
]
