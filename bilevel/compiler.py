"""Keeping out of ``torch.compile``: what exchanges values in place, or holds them, must not be traced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``function`` run as it is written, also where its caller is compiled: the trace breaks there.

    The compiler is asked only once it is loaded, because asking for it loads it, which takes longer than importing this
    library.
    """
    shielded: list[Callable[P, R]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not shielded and "torch._dynamo" in sys.modules:
            shielded.append(torch.compiler.disable(function))
        return (shielded[0] if shielded else function)(*args, **kwargs)

    return call
