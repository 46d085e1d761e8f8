"""BOME: bilevel optimization made easy (Ye, Liu, Wright, Stone and Liu, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from ..barrier import Barrier, GradientNorm
from .dynamic_barrier import BarrierOptions, DynamicBarrier


class BOME(DynamicBarrier):
    r"""First-order bilevel descent with a dynamic barrier on the value function.

    .. math::
        w_0 &= w, \quad w_{t+1} = w_t - a\,\nabla_w G(w_t, \alpha), \quad t < T \\
        q(w, \alpha) &= G(w, \alpha) - G(w_T, \alpha), \quad w_T \text{ constant} \\
        \lambda &= \frac{\max(\phi - \langle \nabla F, \nabla q \rangle, 0)}{\|\nabla q\|^2 + \varepsilon},
        \quad \phi = \delta \|\nabla q\|^2 \text{ or } \delta q \\
        (w, \alpha) &\leftarrow (w, \alpha) - \eta\,(\nabla F + \lambda \nabla q)

    Inner products and norms run over both levels jointly; both levels move simultaneously, from gradients at the same
    point; the inner iterate is thrown away. Differences from the paper's code: q is evaluated on one batch however
    many there are; the torch optimizers that you pass take the step; the inner rate defaults to the lower optimizer's.

    Args:
        upper_loss: F, called once per step; see :class:`bilevel.BilevelOptimizer` for the closures and the arguments
            of both levels.
        lower_loss: G, called ``inner_steps + 1`` times per step.
        inner_steps: T >= 1, descent steps on G per update. More steps, a better estimate of the lower optimum, more
            time. Default 1, the cheapest; the paper's experiments use 1 to 20.
        inner_lr: a > 0. Default: the lower optimizer's current learning rate, per parameter group.
        inner_step: ``"gradient"`` descent (default, as in the paper) or ``"optimizer"``: the step that the lower
            optimizer (SGD with momentum, Adam, AdamW) would take from its real state, weight decay included.
        barrier: phi. Default ``GradientNorm(0.5)``, as in the paper's toy experiments; its hyperparameter experiments
            use ``Value``.
        value_gradient: How q is differentiated. ``"value_function"`` (default, BOME): w_T is a constant, ``grad_w q =
            grad_w G(w)``. ``"difference"``: ``grad_w G(w) - grad_w G(w_T)``. ``"unrolled"``: the total derivative,
            through the inner steps, in both levels.
        step_from: ``"current"`` (default): the lower step starts from w. ``"lookahead"``: it starts from w_T.
        eps: Added to ``|grad q|^2``; default 1e-8, as in the paper's code.
        cutoff: lambda is 0 where ``|grad q|^2 <= cutoff``; default 1e-12.
        multiplier_max: Largest lambda, or None (default).
        product: Mode of the Hessian products that ``"unrolled"`` needs: ``"auto"``, ``"forward"``, ``"reverse"``,
            ``"difference"``.
        starts: Lower copies that walk from points of their own and go on from step to step, the walk from w among them;
            default 1. With more, the lowest end takes the place of w_T, and w moves to the end with the smallest ``f +
            lambda (G - min G)`` where its own is larger: for lower problems with several minima. Fixed at construction;
            with the first ``value_gradient`` and ``step_from`` alone.
        spread: How far from w the further copies begin, as a standard deviation; default 1.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off; the message says which and what to do.

    Cost:
        ``inner_steps + 1`` calls of the lower loss, the last forward-only through the lower module, and one of the
        upper loss. Memory: one copy of the lower variables beside the gradients. ``"difference"`` adds one backward
        pass; ``"unrolled"`` adds that, one Hessian product per inner step, and ``inner_steps`` copies.

    Example:
        >>> import torch, bilevel
        >>> alpha = torch.zeros((), requires_grad=True)
        >>> w = torch.zeros((), requires_grad=True)
        >>> optimizer = bilevel.BOME(
        ...     lambda: (w - 1) ** 2,
        ...     lambda: (w - alpha) ** 2,
        ...     upper=alpha,
        ...     lower=w,
        ...     upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        ...     lower_optimizer=torch.optim.SGD([w], lr=0.1),
        ... )
        >>> for _ in range(300):
        ...     stats = optimizer.step()
        >>> print(f"{alpha.item():.3f} {w.item():.3f}")
        1.000 1.000

    References:
        Ye et al., `BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach
        <https://arxiv.org/abs/2209.08709>`_, NeurIPS 2022.
    """

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        inner_steps: int = 1,
        barrier: Barrier | None = None,
        **options: Unpack[BarrierOptions],
    ) -> None:
        barrier = GradientNorm(0.5) if barrier is None else barrier
        super().__init__(upper_loss, lower_loss, barrier=barrier, inner_steps=inner_steps, **options)
