"""Betty's tutorial on hyperparameters of a logistic regression, ported: ``python -m examples.loops.from_betty``.

Each upper step trains a fresh model, from zeros, by a hundred lower steps, and goes back through all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel


def main(steps: int = 50) -> tuple[list[float], Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1000, 20)
    y = (x @ torch.randn(20) + 0.1 * torch.randn(1000) > 0).float()
    train, valid = (x[:500], y[:500]), (x[500:], y[500:])
    model, strength = nn.Linear(20, 1, bias=False), nn.Parameter(torch.ones(20))

    def upper_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])

    def lower_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return upper_loss(batch) + 0.5 * (strength * model.weight[0].square()).sum()

    optimizer = bilevel.Unrolled(
        upper_loss,
        lower_loss,
        upper=strength,
        lower=model,
        upper_optimizer=torch.optim.SGD([strength], lr=1.0, momentum=0.9),
        lower_optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        inner_steps=100,
        start=lambda: [torch.zeros_like(model.weight)],
    )
    losses = []
    for _ in range(steps):
        losses.append(optimizer.step(valid, train).upper_loss.item())
        strength.data.clamp_(min=1e-8)
    print(f"validation loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")
    return losses, strength


if __name__ == "__main__":
    main()
