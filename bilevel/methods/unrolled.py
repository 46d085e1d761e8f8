"""Unrolled hypergradients: reverse mode through k lower steps (MW-Net, L2RW, MAML, iterative differentiation)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from ..closures import leaves_of
from ..directions import Directions
from ..errors import ClosureError, choice, count, message
from ..evaluator import Evaluation, Look
from ..hypergradient import adjoint, descend
from ..optimizer import Common
from ..products import Route
from ..vectors import Vector, add_scaled
from .sequential import HypergradientStats, Sequential

Mode = Literal["adjoint", "graph"]
Start = Callable[[], Iterable[Tensor] | Mapping[str, Tensor]]


class Unrolled(Sequential):
    r"""The exact derivative of F after k lower steps.

    .. math::
        w_0 &= w \text{ or } start(\alpha), \quad w_{t+1} = \Phi(w_t, \nabla_w G(w_t, \alpha)), \quad t < k \\
        \alpha &\leftarrow \alpha - \eta_\alpha\, \frac{d}{d\alpha} F(w_k(\alpha), \alpha)

    :math:`\Phi` is the step of your own lower optimizer from its real state (SGD with momentum, dampening, nesterov,
    weight decay; Adam; AdamW; per-group rates), or plain gradient descent with ``inner_lr``.

    Args:
        upper_loss: F, called once per step, at :math:`w_k`; see :class:`bilevel.BilevelOptimizer`.
        lower_loss: G.
        inner_steps: k >= 1. Default 1, as in MW-Net and L2RW.
        inner_lr: Rate of plain gradient descent for :math:`\Phi`; default None: follow the lower optimizer.
        truncate: Differentiate the last ``truncate`` steps only, 1 to k; default None: all.
        restore: True (default): the steps are virtual; w then takes its ordinary step, on the first lower batch, with
            the new upper variables. False: the k steps are the real training (hooks included, which are not
            differentiated), and the upper update follows them.
        start: A function without arguments that computes the starting lower variables from the upper ones, as a
            mapping by name or in parameter order; it is differentiated through (MAML). The lower variables themselves
            then never move.
        mode: ``"adjoint"`` (default) stores the k points and walks back with one product of G per step: memory of one
            step beside copies of the lower variables. ``"graph"`` keeps the graph of all steps, as other libraries do;
            it needs ``restore=True``.
        product: Route of the products of G in adjoint mode.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off, or the lower optimizer cannot be followed; the message says what can.

    Cost:
        k gradients of G and one of F, one upper product of G for the first step and one mixed product for each later
        one; with ``restore=True`` one more gradient of G for the ordinary step.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> upper_optimizer, lower_optimizer = problem.optimizers()
        >>> optimizer = bilevel.Unrolled(
        ...     problem.upper_loss, problem.lower_loss, upper=problem.upper, lower=problem.lower,
        ...     upper_optimizer=upper_optimizer, lower_optimizer=lower_optimizer, inner_steps=100,
        ... )
        >>> direction = optimizer.directions().upper["0"]
        >>> torch.allclose(direction, problem.hypergradient(problem.upper), atol=1e-3)
        True

    References:
        Shu et al., `Meta-Weight-Net <https://arxiv.org/abs/1902.07379>`_, NeurIPS 2019; Ren et al., `Learning to
        Reweight Examples <https://arxiv.org/abs/1803.09050>`_, ICML 2018; Finn et al., `MAML
        <https://arxiv.org/abs/1703.03400>`_, ICML 2017.
    """

    exact = True

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        inner_steps: int = 1,
        inner_lr: float | None = None,
        truncate: int | None = None,
        restore: bool = True,
        start: Start | None = None,
        mode: Mode = "adjoint",
        product: Route = "auto",
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        choice("Unrolled", "mode", mode, ("adjoint", "graph"))
        choice("Unrolled", "restore", restore, (True, False))
        if truncate is not None:
            count("Unrolled", "truncate", truncate, minimum=1)
            if isinstance(inner_steps, int) and truncate > inner_steps:
                raise ValueError(
                    message("Unrolled", "truncate", truncate, f"must be at most inner_steps={inner_steps}.")
                )
        if mode == "graph" and not restore:
            advice = 'keeps a graph of virtual steps, and needs restore=True. mode="adjoint" gives the same numbers.'
            raise ValueError(message("Unrolled", "mode", mode, advice))
        if start is not None:
            if not callable(start):
                raise TypeError(message("Unrolled", "start", start, "must be a function of no arguments."))
            if not restore or (truncate is not None and truncate != inner_steps):
                advice = "needs restore=True and no truncation: the whole walk from it is differentiated."
                raise ValueError(message("Unrolled", "start", "...", advice))
        super().__init__(
            upper_loss,
            lower_loss,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            product=product,
            atomic=atomic,
            **common,
        )
        self._check_rule()
        self.truncate = truncate
        self.start = start
        self.mode = mode
        self.trains_first = not restore
        self.exact = truncate is None or truncate == inner_steps

    def _look_ahead(self, look: Look) -> Directions:
        start = self._start()
        if self.mode == "graph":
            return self._by_graph(look, start)
        point = None if start is None else [x.detach().clone() for x in start]
        g = look.lower(at=point, wrt="lower")
        rule = self._rule()
        walk = descend(look, rule, g, self.inner_steps, start=point, keep=self._differentiated)
        f = look.upper(at=walk.end)
        through, start_bar = adjoint(look, rule, walk.steps, f.lower, self.product, to_start=start is not None)
        if start is not None:
            through = add_scaled(through, 1.0, _chained(start, self._upper.tensors, start_bar))
        return self._directions(look, f, g, add_scaled(f.upper, 1.0, through))

    def _train_and_look(self, look: Look, *, real: bool) -> Directions:
        rule = self._rule()
        g, steps = self._train(look, self._rule, real=real)
        f = look.upper()
        through, _ = adjoint(look, rule, steps[-self._differentiated :], f.lower, self.product)
        return self._directions(look, f, g, add_scaled(f.upper, 1.0, through))

    def _by_graph(self, look: Look, start: list[Tensor] | None) -> Directions:
        """Keep the graph of the differentiated steps and of F at their end, and go back through it once."""
        rule, state = self._rule(), self._rule().start()
        skipped = self.inner_steps - self._differentiated
        first: Tensor | None = None
        point = look.point()
        for index in range(skipped):
            g = look.lower(index, at=None if index == 0 else point, wrt="lower")
            first = g.value if first is None else first
            point, state = rule.step(point, g.lower, state)
        with torch.enable_grad():
            w = [x.detach().clone().requires_grad_() for x in point] if start is None else start
            for index in range(skipped, self.inner_steps):
                with look.lower_graph(index, substitute=w) as (value, _):
                    self._refuse_unreached(look, value)
                    gradient = torch.autograd.grad(value, w, create_graph=True, allow_unused=True)
                first = value.detach() if first is None else first
                w, state = rule.step(w, gradient, state)
            with look.upper_graph(substitute=w) as (value, aux):
                upper = torch.autograd.grad(value, self._upper.tensors, allow_unused=True)
        stats = HypergradientStats(
            value.detach(), first if first is not None else value, upper_aux=aux, product="graph"
        )
        evaluation = Evaluation(value.detach(), upper, [])
        return self._directions(look, evaluation, evaluation, upper, stats)

    @property
    def _differentiated(self) -> int:
        return self.inner_steps if self.truncate is None else self.truncate

    def _start(self) -> list[Tensor] | None:
        if self.start is None:
            return None
        with torch.enable_grad():
            found = self.start()
        values = [found[name] for name in self._lower.names] if isinstance(found, Mapping) else list(found)
        shapes, expected = [tuple(x.shape) for x in values], [tuple(x.shape) for x in self._lower.tensors]
        if shapes != expected:
            advice = f"returned shapes {shapes[:3]}..., expected those of the lower variables, {expected[:3]}..."
            raise ValueError(message("Unrolled", "start", "...", advice))
        if not any(x.requires_grad for x in values):
            raise ValueError(message("Unrolled", "start", "...", "depends on no upper variable. Was it detached?"))
        # + 0: an upper variable that is itself the start (MAML) must not be taken for the lower variable in its place.
        with torch.enable_grad():
            return [x + 0 if x.requires_grad else x.detach().requires_grad_() for x in values]

    def _correct_then_train(self, look: Look) -> Any:
        if self.start is None:
            return super()._correct_then_train(look)
        return self._move(self._look_ahead(look), look)  # w is computed from the upper variables: nothing to train

    def _refuse_unreached(self, look: Look, value: Tensor) -> None:
        names = dict(zip(map(id, self._lower.tensors), self._lower.names, strict=True))
        missed = leaves_of(value, names)
        if missed and self.start is None:
            raise ClosureError(
                f"lower_loss reads {', '.join(missed)} other than from a module given as lower=, where no substitute "
                'reaches it. Read the module\'s attribute inside the loss, or use mode="adjoint".'
            )


def _chained(start: list[Tensor], upper: tuple[Tensor, ...], bars: Vector) -> Vector:
    """Pull a cotangent of the starting point back through ``start`` to the upper variables."""
    pairs = [(x, bar) for x, bar in zip(start, bars, strict=True) if bar is not None]
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, upper, grad_outputs=weights, allow_unused=True)
