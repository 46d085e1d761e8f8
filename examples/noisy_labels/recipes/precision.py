"""Networks in bfloat16, everything else in float32.

Autocast surrounds the networks' forward passes and nothing more: their answers come back in float32, so that softmax,
mixture, logarithm and mean are computed in it. The weights stay in float32; gradients and inner products are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

CHOICES = ("off", "bf16")


def mixed_precision(network: Callable[..., Any], amp: str) -> Callable[..., Any]:
    """Return the network as a function that computes with bfloat16 inside, if ``amp`` says so."""
    if amp == "off":
        return network

    def call(*inputs: Tensor) -> Any:
        # Left again at once: inside, casts of the weights are cached, and a look-ahead changes the weights.
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            outputs = network(*inputs)
        return tree_map_only(Tensor, at_least_float32, outputs)

    return call


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, any other as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
