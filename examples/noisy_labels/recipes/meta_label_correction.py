"""A classifier and a corrector, moved together: `ebomlc` in its readings, `mlc-d`, and `mlc`.

The losses are those of `label_correction.py`. `ebomlc` and `mlc-d` are :class:`bilevel.EBOMLC` and
:class:`bilevel.BOME` on them. `mlc` is Meta Label Correction (Zheng, Awadallah and Dumais, AAAI 2021), by its code
(microsoft/MLC, 2022).

The classifier f learns the labels that the corrector g makes of the given ones; g is good if f, after its next step, is
right on trusted images. Each step, at rho = 1:

    F(w)     = mean cross-entropy of one half of the trusted batch
    G(w, a)  = mean over noisy images of -sum_c g_a(h(x'), y')[c] log softmax(f_w(x'))[c], and over the other half
               of the trusted batch, of their cross-entropy
    d        = grad_w G(w, a)
    w+       = w - lr (momentum * buffer + d + weight_decay * w)                the whole SGD step of the classifier
    m       <- -grad_a < d(w, a), lr grad_w F(w+) > + gamma m                   exact, by a second derivative
    gamma    = < (1 - lr) grad_w F(w+), grad_w F(w) > / |grad_w F(w)|^2         the Hessian of G taken for the identity
    every k steps: a <- Adam(a, m), m <- 0
    w       <- w+                                                               with labels from before the step on a

:class:`bilevel.MLC` is these lines. k (``--inner-steps``) is 1, as in the code's runs on CIFAR, where gamma plays no
part; it is 5 on Clothing1M. Adam (amsgrad), 3e-4, constant, is that of all correctors here.

That half of the trusted images trains the classifier is what the code does unless it is told otherwise, and all its
published commands; the formulation in later papers does not have it: ``--mix-clean 0``.

Deviations: in the two epochs in which the learning rate falls, its
preview has a tenth of the right rate; here it has the right one. Trusted, noisy and test images are disjoint here and
overlap there, and the last epoch is reported, not the best one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bilevel
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.recipes.label_correction import LabelCorrection, split
from examples.noisy_labels.recipes.precision import mixed_precision
from examples.noisy_labels.recipes.recipe import Recipe, Scalars, decay, descent
from examples.noisy_labels.recipes.released_sign import UpdateForGradient
from examples.noisy_labels.run import processes
from examples.noisy_labels.run.settings import Training

NUMBERS = ("upper_loss", "lower_loss", "multiplier", "constraint")  # of a bilevel step, as far as the method has them


class MetaLabelCorrection(Recipe):
    """Both networks, and the bilevel optimizer that moves them."""

    needs = ("corrector",)
    shares_batches = True

    def __init__(self, settings: Training, network: nn.Module, corrector: nn.Module) -> None:
        lower = descent(settings, network)
        upper = torch.optim.Adam(corrector.parameters(), lr=settings.meta_lr, amsgrad=True)
        self.mix_clean = settings.mix_clean
        self.bilevel = bilevel_optimizer(settings, network, corrector, upper, lower)
        schedules = {"schedule": decay(settings, lower)}
        if settings.meta_decay:
            schedules["meta_schedule"] = decay(settings, upper)
        networks = {"classifier": network, "corrector": corrector}
        super().__init__(networks, self.bilevel, schedules, settings.amp)
        self.corrected = mixed_precision(corrector, settings.amp)

    def step(self, noisy: Batch, clean: Batch) -> Scalars:
        upper, joining = split(clean, self.mix_clean)
        stats = self.bilevel.step(upper, (noisy, joining))
        return {name: getattr(stats, name) for name in NUMBERS if hasattr(stats, name)}

    def correct(self, inputs: Tensor, given: Tensor) -> Tensor:
        probabilities: Tensor = self.corrected(self.classify(inputs)[1], given)
        return probabilities

    def opinion(self, inputs: Tensor, given: Tensor) -> Tensor:
        """Return the mean of classifier and corrector.

        The two err differently: the corrector is told the given label and leans on it, the classifier is not and leans
        on its neighbours. On development seeds their mean found wrong labels at least as well as either.
        """
        return (self.predict(inputs) + self.correct(inputs, given)) / 2


def bilevel_optimizer(
    settings: Training,
    network: nn.Module,
    corrector: nn.Module,
    upper: torch.optim.Optimizer,
    lower: torch.optim.SGD,
) -> bilevel.BOME | bilevel.EBOMLC | bilevel.MLC:
    """Wrap the two losses and the two torch optimizers in the bilevel method that the settings name."""
    losses = LabelCorrection(
        mixed_precision(network, settings.amp),
        mixed_precision(corrector, settings.amp),
        rho=settings.rho,
        mixture=settings.mixture,
        features=settings.corrector_features,
    )

    upper_loss: Callable[[Batch], Tensor] = losses.upper_loss
    if settings.clean_gradient == "released":
        upper_loss = UpdateForGradient(losses, network, lower)

    def lower_loss(parts: tuple[Batch, Batch | None]) -> Tensor:
        return losses.lower_loss(*parts)

    common: dict[str, Any] = {
        "upper": corrector,
        "lower": network,
        "upper_optimizer": upper,
        "lower_optimizer": lower,
        "upper_buffers": settings.buffers,
        "lower_buffers": settings.buffers,
        "on_nonfinite": settings.policy(next(network.parameters()).device.type),
        "process_group": processes.group(),
    }
    if settings.method == "mlc":
        return bilevel.MLC(upper_loss, lower_loss, inner_steps=settings.inner_steps, **common)
    options = common | {
        "value_gradient": settings.value_gradient,
        "step_from": settings.step_from,
        "inner_step": settings.inner_step,
        "multiplier_max": settings.multiplier_max,
    }
    if settings.method == "mlc-d":
        barrier = bilevel.barrier.GradientNorm(settings.delta)
        return bilevel.BOME(upper_loss, lower_loss, inner_steps=settings.inner_steps, barrier=barrier, **options)
    return bilevel.EBOMLC(upper_loss, lower_loss, delta=settings.delta, xi=settings.xi, **options)
