"""L2RW and MW-Net on `bilevel`: training steps that give each sample a weight, learned from trusted samples.

Both move the weights by the derivative of the trusted loss after one virtual step of plain gradient descent on the
weighted loss: :class:`bilevel.Unrolled`. Then the classifier takes its ordinary step with the new weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from examples.small_images import Batch

BATCH = 100  # samples in a noisy batch
Step = Callable[[Batch, Batch], Tensor]  # takes a trusted and a noisy batch; returns the weights that it gave


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of each sample."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Train on the labels as they are."""

    def step(trusted: Batch, noisy: Batch) -> Tensor:
        optimizer.zero_grad()
        losses(model, noisy).mean().backward()
        optimizer.step()
        return torch.ones(BATCH, dtype=torch.float64)

    return step


def l2rw(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Train with weights from one step at 0 (Ren et al., ICML 2018)."""
    weights = torch.zeros(BATCH, dtype=torch.float64, requires_grad=True)
    upper_optimizer = torch.optim.SGD([weights], lr=1.0)

    def positive_part(*_: object) -> None:
        weights.data.relu_()
        weights.data /= weights.data.sum().clamp(min=1e-30)

    upper_optimizer.register_step_post_hook(positive_part)
    method = bilevel.Unrolled(
        lambda trusted: losses(model, trusted).mean(),
        lambda noisy: (weights * losses(model, noisy)).sum(),
        upper=weights,
        lower=model,
        upper_optimizer=upper_optimizer,
        lower_optimizer=optimizer,
        inner_lr=1.0,  # of the virtual step; normalising the weights cancels it
    )

    def step(trusted: Batch, noisy: Batch) -> Tensor:
        weights.data.zero_()
        method.step(trusted, noisy)  # moves the weights, then the classifier on the weighted losses
        return weights.detach().clone()

    return step


def mw_net(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Train with weights from a network that sees the sample's loss (Shu et al., NeurIPS 2019)."""
    net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()).double()

    def lower_loss(noisy: Batch) -> tuple[Tensor, Tensor]:
        each = losses(model, noisy)
        weights = net(bilevel.hold(each)[:, None]).squeeze(1)  # the loss is data here
        # Without normalising, all weights grow at first, because at first every gradient helps, and saturate.
        weights = weights / weights.sum()
        return (weights * each).sum(), weights

    method = bilevel.Unrolled(
        lambda trusted: losses(model, trusted).mean(),
        lower_loss,
        upper=net,
        lower=model,
        upper_optimizer=torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4),
        lower_optimizer=optimizer,
        inner_step="gradient",  # whatever momentum and weight decay the real step adds
    )
    return lambda trusted, noisy: method.step(trusted, noisy).lower_aux
