"""The multiplier of the dynamic barrier: its closed form, and the functions that say how strongly Q must fall.

The direction ``d = grad f + lambda grad q`` solves ``min |d - grad f|^2  s.t.  <grad q, d> >= phi``; the solution is
the projection of ``grad f`` on a half-space, hence ``lambda = max((phi - <grad f, grad q>) / |grad q|^2, 0)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import number


@dataclass(frozen=True)
class Products:
    """What a barrier may look at; 0-dim tensors, accumulated in float64 where the device has it.

    Attributes:
        upper: ``<grad_alpha f, grad_alpha q>``, over the upper variables.
        lower: ``<grad_w f, grad_w q>``, over the lower variables.
        squared_norm: ``|grad q|^2`` over both levels jointly.
        value: ``q`` itself, the value of the constraint.

    Example:
        >>> import torch
        >>> from bilevel.barrier import GradientNorm, Products, multiplier
        >>> one = torch.tensor(1.0, dtype=torch.float64)
        >>> products = Products(upper=0 * one, lower=-one, squared_norm=2 * one, value=one)
        >>> multiplier(GradientNorm(0.5), products, eps=0.0, cutoff=0.0).item()
        1.0
    """

    upper: Tensor
    lower: Tensor
    squared_norm: Tensor
    value: Tensor

    @property
    def total(self) -> Tensor:
        """``<grad f, grad q>`` over both levels jointly."""
        return self.upper + self.lower


class Barrier(ABC):
    """The right-hand side phi of ``<grad q, d> >= phi``. Subclass it and write ``__call__`` for a barrier of your own.

    Example:
        >>> from bilevel.barrier import Barrier
        >>> class Constant(Barrier):
        ...     def __call__(self, products):
        ...         return 0 * products.value + 1e-3
    """

    @abstractmethod
    def __call__(self, products: Products) -> Tensor:
        """Return phi as a 0-dim tensor."""


@dataclass(frozen=True)
class GradientNorm(Barrier):
    """``phi = delta |grad q|^2`` (BOME, the default of its paper and toys).

    Args:
        delta: Strength of the barrier, >= 0. With orthogonal gradients the multiplier is delta.

    Raises:
        TypeError, ValueError: ``delta`` is not a finite number >= 0.

    Example:
        >>> import bilevel
        >>> bilevel.barrier.GradientNorm(0.25)
        GradientNorm(delta=0.25)

    References:
        Ye et al., `BOME! Bilevel Optimization Made Easy <https://arxiv.org/abs/2209.08709>`_, NeurIPS 2022.
    """

    delta: float

    def __post_init__(self) -> None:
        number(type(self).__name__, "delta", self.delta, minimum=0.0)

    def __call__(self, products: Products) -> Tensor:
        return self.delta * products.squared_norm


@dataclass(frozen=True)
class Value(Barrier):
    """``phi = delta max(q, 0)`` (BOME's hyperparameter experiments).

    The estimate of q is negative when the inner steps overshoot or on noisy batches; phi is clamped at 0 there,
    because a negative phi would ask for an increase of q. BOME's code does not clamp.

    Args:
        delta: Strength of the barrier, >= 0, in units of ``|grad q|^2 / q``: twice the curvature along the gradient
            on a quadratic.

    Raises:
        TypeError, ValueError: ``delta`` is not a finite number >= 0.

    Example:
        >>> import bilevel
        >>> bilevel.barrier.Value(0.1)
        Value(delta=0.1)

    References:
        Ye et al., `BOME! Bilevel Optimization Made Easy <https://arxiv.org/abs/2209.08709>`_, NeurIPS 2022, and its
        code.
    """

    delta: float

    def __post_init__(self) -> None:
        number(type(self).__name__, "delta", self.delta, minimum=0.0)

    def __call__(self, products: Products) -> Tensor:
        return self.delta * products.value.clamp(min=0.0)


@dataclass(frozen=True)
class Aligned(Barrier):
    """``phi = delta |grad q|^2 + <grad_alpha f, grad_alpha q>`` (EBOMLC, equation 10).

    Agreement of the levels on alpha raises the barrier, conflict lowers it, so that alpha drops out of the numerator
    (equation 11): ``lambda = max(delta - <grad_w f, grad_w q> / |grad q|^2, 0)``, with the *joint* norm. phi may be
    negative; descent of q is then not asked for.

    Args:
        delta: Strength of the barrier, >= 0.

    Raises:
        TypeError, ValueError: ``delta`` is not a finite number >= 0.

    Example:
        >>> import bilevel
        >>> bilevel.barrier.Aligned(0.25)
        Aligned(delta=0.25)

    References:
        Nguyen and Ta, `EBOMLC <https://arxiv.org/abs/2605.17833>`_, equations 10 and 11.
    """

    delta: float

    def __post_init__(self) -> None:
        number(type(self).__name__, "delta", self.delta, minimum=0.0)

    def __call__(self, products: Products) -> Tensor:
        return self.delta * products.squared_norm + products.upper


def multiplier(
    barrier: Barrier, products: Products, *, eps: float = 1e-8, cutoff: float = 1e-12, maximum: float | None = None
) -> Tensor:
    """Return ``lambda = relu(phi - <grad f, grad q>) / (|grad q|^2 + eps)``, a 0-dim tensor, without synchronising.

    With ``eps = 0`` it solves the quadratic program exactly. As ``|grad q| -> 0`` the exact multiplier is unbounded
    while ``lambda |grad q| <= delta |grad q| + |grad f|`` stays bounded; below ``cutoff`` (and at ``|grad q| = 0``
    whatever the cutoff) lambda is 0, because the constraint then holds or cannot be improved. A non-finite product,
    overflow included, gives a non-finite or NaN lambda: it is never turned into 0, so ``on_nonfinite`` sees it.

    Args:
        barrier: phi.
        products: Inner products of the gradients.
        eps: Added to ``|grad q|^2``, >= 0; 1e-8 as in the code of both papers. Biases lambda by a relative ``eps /
            |grad q|^2``.
        cutoff: lambda is 0 for ``|grad q|^2 <= cutoff``, >= 0.
        maximum: Largest multiplier, or None.

    Raises:
        Nothing: the numbers are checked where they enter, in the constructor of the method.

    Example:
        >>> import torch
        >>> from bilevel.barrier import Aligned, Products, multiplier
        >>> x = torch.tensor(1.0, dtype=torch.float64)
        >>> multiplier(Aligned(0.25), Products(upper=3 * x, lower=-x, squared_norm=4 * x, value=x), eps=0.0).item()
        0.5

    References:
        Ye et al., NeurIPS 2022; Nguyen and Ta, equation 7.
    """
    squared = products.squared_norm
    # 0 where every product is finite, else NaN: relu, the cutoff and the maximum would each turn some infinity into a
    # number.
    unfit = 0.0 * products.total + 0.0 * squared + 0.0 * products.value
    excess = torch.relu(barrier(products) - products.total)
    negligible = squared <= cutoff
    # The inner where keeps 0/0 out of the quotient that the outer one discards.
    found = excess / (torch.where(negligible, torch.ones_like(squared), squared) + eps)
    if maximum is not None:
        found = found.clamp(max=maximum)
    return torch.where(negligible, torch.zeros_like(found), found) + unfit
