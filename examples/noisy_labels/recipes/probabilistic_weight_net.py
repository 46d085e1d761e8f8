"""`pmwnet`: Probabilistic Meta-Weight-Net (Zhao et al., TNNLS 2021; code: xjtushujun/Probabilistic-MW-Net).

Meta-Weight-Net with a distribution for each weight instead of a number. Two weight nets give the weight v_i of a noisy
image with loss l_i the posterior Beta(a_i, b_i); the loss is data here. Each step:

    a_i, b_i = A(l_i), B(l_i)                                1 - 100 - 1 units, softplus
    w^       = w - lr grad_w 1/n sum_i v_i l_i(w)            v_i drawn from Beta(a_i, b_i), differentiably
    F        = mean trusted cross-entropy at w^ + 1e-3 mean_i KL( Beta(a_i, b_i) | prior_i )
    A, B    <- Adam along the derivative of F                1e-3, weight decay 1e-4, constant
    prior_i  = Beta(1, 1) in the first step, then what the nets before their last move say of l_i               (27)
    w       <- SGD's step on 1/n sum_i E[v_i] l_i(w),        E[v_i] = a_i / (a_i + b_i)                         (25)

The derivative is that of :class:`bilevel.Unrolled` with one virtual step of gradient descent; that of a draw is the
implicit one of its distribution, which is right in the mean. The ordinary step has another loss than the virtual one,
the mean weight for a drawn one, so it is taken here, after ``apply(directions(...))``. That also puts random states
back; draws are therefore seeded by the number of the step.

Deviations: equations and code differ, and these are the equations. The code weighs KL by 1e-3 lr, takes one prior for
all images, of mean a and b of the batch, begins anew with it each epoch, and trains w with drawn weights. Its runs take
60 epochs; here as many as all methods. A and B are at least 1e-3, without which draws underflow. To know l_i, the noisy
batch passes once more through the classifier, so that BatchNorm's averages see it twice. The last epoch is reported.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Beta, kl_divergence

from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.data.randomness import generator
from examples.noisy_labels.recipes.precision import mixed_precision
from examples.noisy_labels.recipes.recipe import Scalars
from examples.noisy_labels.recipes.reweighting import Reweighting, WeightNet, adam
from examples.noisy_labels.run.settings import Training

KL_WEIGHT = 1e-3
SMALLEST = 1e-3  # a and b


class PosteriorNet(nn.Module):
    """A and B."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = WeightNet(nn.Softplus()), WeightNet(nn.Softplus())

    def forward(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b of each loss."""
        return self.a(losses) + SMALLEST, self.b(losses) + SMALLEST


class Trusted(NamedTuple):
    """What F needs: the trusted images, and of the noisy ones their losses and the priors of their weights."""

    clean: Batch
    losses: Tensor
    prior: tuple[Tensor, Tensor]


class Noisy(NamedTuple):
    """What G needs: the noisy images, their losses, and the number of the step, which decides what is drawn."""

    images: Batch
    losses: Tensor
    step: int


class ProbabilisticWeightNet(Reweighting):
    """Classifier, posterior, and the posterior from before its last move."""

    def __init__(self, settings: Training, network: nn.Module) -> None:
        posterior = PosteriorNet().to(next(network.parameters()))
        self.weights, self.before = posterior, copy.deepcopy(posterior).requires_grad_(False)
        self.seed, self.steps = settings.seed, 0
        self.posterior = mixed_precision(posterior, settings.amp)
        self.posterior_before = mixed_precision(self.before, settings.amp)
        super().__init__(settings, network, posterior, adam(posterior), weights=posterior)

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        with torch.no_grad():
            losses = self.losses(noisy)
            flat = torch.ones_like(losses)
            prior = self.posterior_before(losses) if self.steps else (flat, flat)
        directions = self.bilevel.directions(Trusted(clean, losses, prior), Noisy(noisy, losses, self.steps))
        self.before.load_state_dict(self.weights.state_dict())
        self.bilevel.apply(directions)
        self.steps += 1

        with torch.no_grad():
            a, b = self.posterior(losses)
        weights = a / (a + b)
        loss = (weights * self.losses(noisy)).mean()
        self.descent.zero_grad()
        loss.backward()
        self.descent.step()
        return {"upper_loss": directions.stats.upper_loss, "lower_loss": loss.detach(), "weight": weights.mean()}

    def lower_loss(self, batch: Noisy) -> Tensor:
        """Return G with drawn weights."""
        a, b = self.posterior(batch.losses)
        weights = draw(a, b, generator(self.seed, f"weights {batch.step}", batch.losses.device))
        return (weights * self.losses(batch.images)).mean()

    def upper_loss(self, batch: Trusted) -> Tensor:
        """Return F."""
        a, b = self.posterior(batch.losses)
        prior_a, prior_b = batch.prior
        apart = kl_divergence(Beta(a, b, validate_args=False), Beta(prior_a, prior_b, validate_args=False))
        return self.losses(batch.clean).mean() + KL_WEIGHT * apart.mean()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes."""
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.steps = state["steps"]

    def _parts(self) -> dict[str, Any]:
        return super()._parts() | {"before": self.before}


def draw(a: Tensor, b: Tensor, stream: torch.Generator) -> Tensor:
    """Draw from Beta(a, b), differentiably: the share of one gamma variable in the sum of two."""
    smallest = torch.finfo(a.dtype).tiny
    one, other = (torch._standard_gamma(shape, generator=stream).clamp_min(smallest) for shape in (a, b))
    return one / (one + other)
