"""The methods, one a file."""

from .bome import BOME
from .dynamic_barrier import BarrierStats
from .ebomlc import EBOMLC

__all__ = ["BOME", "EBOMLC", "BarrierStats"]
