"""Estimators of derivatives through the lower problem."""

from .trajectory import Trajectory, adjoint, descend

__all__ = ["Trajectory", "adjoint", "descend"]
