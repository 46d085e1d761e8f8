"""The first example of TorchOpt's tutorial on meta-optimizers, ported: ``python -m examples.loops.from_torchopt``.

The lower loss is a x², the upper one the same after a step of rate 1 in a; so its derivative in x is 2 a x - 4 x³.
"""

from __future__ import annotations

import torch
from torch import Tensor

import bilevel


def main() -> Tensor:
    a, x = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    optimizer = bilevel.Unrolled(
        lambda: a * x**2,
        lambda: a * x**2,
        upper=x,
        lower=a,
        upper_optimizer=torch.optim.SGD([x], lr=0.1),
        lower_optimizer=torch.optim.SGD([a], lr=1.0),
    )
    gradient = optimizer.directions().upper["0"]
    print(gradient)  # 2 · 1 · 2 - 4 · 2³ = -28
    return gradient


if __name__ == "__main__":
    main()
