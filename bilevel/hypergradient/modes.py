"""What the modes of a product are, and what a mode cannot serve: in one line, with the name of the operation.

Three modes give the same numbers (the third up to its step):

* ``forward``: dual tensors. Needs a forward-mode rule of every operation (for both products, of its backward too), and
  a loss that reads the lower variables from modules.
* ``reverse``: double backward, which is plain autograd; fails through compiled closures.
* ``difference``: a central difference of two plain gradients; works for every loss, approximate.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError

from ..errors import ClosureError
from ..evaluation.substitution import PROCESS_WIDE
from ..evaluation.verified import NO_GRAPH_INSIDE

ProductMode = Literal["auto", "forward", "reverse", "difference"]
PRODUCT_MODES: tuple[str, ...] = ("auto", "forward", "reverse", "difference")
FIRST_ORDER = 'Use product="reverse" or product="difference", or a first-order method such as BOME or FiniteDifference.'
DIFFERENCE = 'Use product="difference", or a first-order method such as BOME or FiniteDifference.'
# How torch says that an operation has no forward mode; or that it has, and that fails (mse_loss on torch 2.13).
ZERO_TENSORS = "ZeroTensors are immutable"
# Reverse over forward through softmax and its kin, where an upper variable is upstream (pytorch issue 162350).
OVERWRITTEN = "modified by an inplace operation"
NO_FORWARD_RULE = ("forward AD", "forward-mode", "forward mode AD", ZERO_TENSORS, OVERWRITTEN, *NO_GRAPH_INSIDE)
# How torch says that an operation cannot be differentiated twice.
NO_SECOND_RULE = ("is not implemented", "double backward", "create_graph=False", "differentiate twice")
COMPILED = ("donated buffers", "aot_autograd")
# Where it does not say so: the node, and what to tell.
WRONG_SECOND_RULES = {
    # The gradient's graph ends in an error node beside the path to the variables: the second derivative reads 0.
    "torch::autograd::Error": "it calls a custom function that is marked once_differentiable.",
    # Its backward talks to the other processes by operations that have no derivative.
    "SyncBatchNormBackward": "SyncBatchNorm has none: its backward adds over processes. Use BatchNorm or GroupNorm.",
    # The fused kernel's second derivative takes the saved norm for a constant (gradgradcheck fails on torch 2.13).
    "WeightNormInterfaceBackward0": "torch's second derivative of weight_norm is wrong.",
}


class Unavailable(Exception):
    """A mode does not serve this loss; the message names the operation or the variable."""


class NoForwardMode(Unavailable):
    """There is no forward-mode rule, or a variable is not read from a module."""


class NoDoubleBackward(Unavailable):
    """There is no second derivative, or a wrong one."""


def refusal(problem: Unavailable) -> ClosureError:
    """Phrase the error of a product that no mode serves."""
    return ClosureError(f"{problem} {FIRST_ORDER if isinstance(problem, NoForwardMode) else DIFFERENCE}")


@cache
def load_forward_rules() -> None:
    """Make one dual tensor quietly: with its first one torch loads scripted rules, and warns about torch.jit itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@contextmanager
def dual_numbers() -> Iterator[None]:
    """Enter forward mode, and say in one line what has no rule for it."""
    load_forward_rules()
    try:
        with PROCESS_WIDE, forward_ad.dual_level():
            yield
    except RuntimeError as error:
        text = _first_line(error)
        # Checkpointing counts saved tensors, and dual numbers save more in the forward than in the recomputation.
        known = isinstance(error, (NotImplementedError, CheckpointError))
        if not known and not any(mark in text for mark in NO_FORWARD_RULE):
            raise
        if OVERWRITTEN in text:
            text = f"softmax, most likely, downstream of an upper variable (a fault of torch). {text}"
        if ZERO_TENSORS in text:  # torch does not say where
            text = f"mse_loss, most likely: write (a - b).square().mean(). {text}"
        raise NoForwardMode(f"lower_loss has no forward-mode product: {text}") from error


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Say in one line what has no second derivative."""
    try:
        yield
    except ClosureError:
        raise
    except RuntimeError as error:
        text = _first_line(error)
        if not any(mark in text for mark in NO_SECOND_RULE):
            raise
        if any(mark in text for mark in COMPILED):
            text = "it calls a compiled function (torch.compile), which cannot be differentiated twice."
        raise NoDoubleBackward(f"lower_loss has no double backward: {text}") from error


@contextmanager
def two_derivatives(advice: str) -> Iterator[None]:
    """The same, with an ``advice``, as the error that users see."""
    try:
        with second_derivatives():
            yield
    except NoDoubleBackward as problem:
        raise ClosureError(f"{problem} {advice}") from problem.__cause__


def refuse_wrong_rules(values: Sequence[Tensor]) -> None:
    """Refuse, inside :func:`two_derivatives`, what torch has no second derivative of but answers with a number."""
    seen: set[Node] = set()
    stack = [value.grad_fn for value in values]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in WRONG_SECOND_RULES:
            raise NoDoubleBackward(f"lower_loss has no double backward: {WRONG_SECOND_RULES[node.name()]}")
        stack.extend(parent for parent, _ in node.next_functions)


def _first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0].rstrip()
    return line if line.endswith(".") else f"{line}."
