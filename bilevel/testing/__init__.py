"""For authors of methods: the contracts of every method, and an oracle to try things with."""

from .check_method import CONTRACTS, ContractError, Subject, check_method
from .scene import Scene, oracle

__all__ = ["CONTRACTS", "ContractError", "Scene", "Subject", "check_method", "oracle"]
