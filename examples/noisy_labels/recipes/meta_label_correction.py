"""`mlc`: Meta Label Correction (Zheng, Awadallah and Dumais, AAAI 2021), by its code (microsoft/MLC, 2022).

The classifier f learns the labels that the corrector g makes of the given ones; g is good if f, after its next step, is
right on trusted images. Each step, with the two losses of `label_correction.py` at rho = 1:

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

import bilevel


def optimizer(
    upper_loss: Callable[..., Any], lower_loss: Callable[..., Any], *, inner_steps: int, **common: Any
) -> bilevel.MLC:
    """Return what moves both networks by the lines above."""
    return bilevel.MLC(upper_loss, lower_loss, inner_steps=inner_steps, **common)
