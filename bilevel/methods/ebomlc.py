"""EBOMLC: BOME with one inner step for meta label correction (Nguyen and Ta, arXiv 2605.17833)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from ..barrier import Aligned
from ..errors import number
from .dynamic_barrier import BarrierOptions, DynamicBarrier


class EBOMLC(DynamicBarrier):
    r"""The dynamic barrier with one inner step, an alignment-aware barrier and damping.

    .. math::
        w_1 &= w - \eta_w \nabla_w G(w, \alpha), \quad Q = G(w, \alpha) - G(w_1, \alpha) & (8) \\
        \bar\phi &= \delta \|\nabla Q\|^2 + \langle \nabla_\alpha F, \nabla_\alpha Q \rangle & (10) \\
        \bar\beta &= \max\left(\delta - \frac{\langle \nabla_w F, \nabla_w Q \rangle}{\|\nabla Q\|^2}, 0\right) & (11)
        \\ w &\leftarrow w - \eta_w (\nabla_w F + \xi \bar\beta \nabla_w Q) & (13) \\
        \alpha &\leftarrow \alpha - \eta_\alpha (\nabla_\alpha F + \xi \bar\beta \nabla_\alpha Q) & (14)

    The norm in (11) is the joint one over both levels. The mixture loss (9) is the user's upper loss; see the
    noisy-label example.

    How ``grad Q`` is meant is not settled by the paper: see ``value_gradient``. With xi < 1 the barrier's constraint
    is violated whenever it is active: xi trades descent of Q for a smaller influence of the noisy labels.

    Args:
        upper_loss: F, called once per step; see :class:`bilevel.BilevelOptimizer` for the closures and the arguments
            of both levels.
        lower_loss: G, called twice per step.
        delta: Strength of the barrier, >= 0; default 0.25 (paper).
        xi: Damping of the multiplier, >= 0; default 0.5 (paper, which recommends 0.1 to 0.5). ``stats.multiplier`` is
            ``xi * beta``.
        inner_lr: Rate of the inner step; default: the lower optimizer's current learning rate, per parameter group.
        inner_step: ``"gradient"`` descent (default, as printed) or the step of the lower ``"optimizer"`` (the
            authors' code).
        value_gradient: ``"value_function"`` (default, BOME's): w_1 is a constant, ``grad_w Q = grad_w G(w)``.
            ``"difference"``: ``grad_w G(w) - grad_w G(w_1)``, which the paper's proofs and its code use; taken from w
            it learns from the clean set almost alone, so combine it with ``step_from="lookahead"``. ``"unrolled"``:
            the total derivative.
        step_from: ``"current"`` (default, as printed): the lower step starts from w. ``"lookahead"``: from w_1, as the
            authors' code does.
        eps: Added to ``|grad Q|^2``; default 1e-8, as in the authors' code.
        cutoff: beta is 0 where ``|grad Q|^2 <= cutoff``; default 1e-12.
        multiplier_max: Largest beta (before xi), or None (default).
        product: Mode of the Hessian products that ``"unrolled"`` needs.
        starts, spread: Several lower copies, as in :class:`BOME`.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        Two calls of the lower loss, the second forward-only through the lower module, and one of the upper loss.
        Memory: one copy of the lower variables beside the gradients.

    Example:
        >>> import torch, bilevel
        >>> alpha = torch.zeros((), requires_grad=True)
        >>> w = torch.zeros((), requires_grad=True)
        >>> optimizer = bilevel.EBOMLC(
        ...     lambda: (w - 1) ** 2 + (alpha - 1) ** 2,
        ...     lambda: (w - alpha) ** 2,
        ...     upper=alpha,
        ...     lower=w,
        ...     upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        ...     lower_optimizer=torch.optim.SGD([w], lr=0.1),
        ... )
        >>> for _ in range(100):
        ...     stats = optimizer.step()
        >>> print(f"{alpha.item():.3f} {w.item():.3f}")
        1.000 1.000

    References:
        Nguyen and Ta, `EBOMLC <https://arxiv.org/abs/2605.17833>`_, equations 8 to 14.
    """

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        delta: float = 0.25,
        xi: float = 0.5,
        **options: Unpack[BarrierOptions],
    ) -> None:
        self._check(delta=delta, xi=xi)
        super().__init__(upper_loss, lower_loss, barrier=Aligned(delta), inner_steps=1, damping=xi, **options)

    @property
    def delta(self) -> float:
        """Strength of the barrier; setting it replaces :attr:`barrier`."""
        if not isinstance(self.barrier, Aligned):
            raise AttributeError(f"EBOMLC has no delta with the barrier {self.barrier!r}; set optimizer.barrier.")
        return self.barrier.delta

    @delta.setter
    def delta(self, value: float) -> None:
        self._check(delta=value)
        self.barrier = Aligned(value)

    @property
    def xi(self) -> float:
        """Damping of the multiplier, under the paper's name."""
        return float(self.damping)

    @xi.setter
    def xi(self, value: float) -> None:
        self._check(xi=value)
        self.damping = value

    def _check(self, **values: float) -> None:
        for name, value in values.items():
            number(type(self).__name__, name, value, minimum=0.0)
