"""The methods, one a file."""

from .bome import BOME
from .bsg1 import BSG1
from .bvfsm import BVFSM
from .dynamic_barrier import BarrierStats
from .ebomlc import EBOMLC
from .emlc import EMLC
from .f2sa import F2SA
from .finite_difference import FiniteDifference
from .gpbgd import GPBGD, GPBGDStats
from .hypergradient_method import HypergradientStats
from .implicit import Implicit, ImplicitStats
from .masoba import MASOBA
from .meha import MEHA
from .mlc import MLC
from .pdbo import PDBO, PDBOStats
from .penalty_method import PenaltyStats
from .saba import SABA
from .sama import SAMA
from .single_loop import SingleLoopStats
from .soba import SOBA
from .unrolled import Unrolled
from .vpbgd import VPBGD

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
    "FiniteDifference",
    "GPBGDStats",
    "HypergradientStats",
    "Implicit",
    "ImplicitStats",
    "PDBOStats",
    "PenaltyStats",
    "SingleLoopStats",
    "Unrolled",
]
