"""For authors of methods: the contracts of every method, ``check_directions``, and an oracle to try things with."""

from .check_directions import check_directions
from .check_method import CONTRACTS, ContractError, Subject, check_method
from .scene import Scene, oracle

__all__ = ["CONTRACTS", "ContractError", "Scene", "Subject", "check_directions", "check_method", "oracle"]
