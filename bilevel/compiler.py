"""Keeping out of ``torch.compile``: what exchanges values in place, or holds them, must not be traced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

REASON = (
    "bilevel evaluates losses at several points, by values that it exchanges in place, and decides by what it sees: it "
    "runs as it is written. Compile the modules, or the losses, and leave fullgraph=True out around the step."
)
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
            shielded.append(torch.compiler.disable(function, reason=REASON))
        return (shielded[0] if shielded else function)(*args, **kwargs)

    # Without asking for the compiler: what a trace that must not break (fullgraph=True) is told.
    vars(call).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=REASON)
    return call
