"""Unrolled hypergradients: reverse mode through k lower steps (MW-Net, L2RW, MAML, iterative differentiation)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from ..closures import leaves_of
from ..descent import Point
from ..directions import Directions
from ..errors import ClosureError, choice, count, message
from ..evaluator import Evaluation, Look
from ..hypergradient import adjoint, descend
from ..optimizer import Common
from ..products import Route, refuse_wrong_rules, two_derivatives
from ..variables import Level
from ..vectors import Vector, add_scaled
from .sequential import HypergradientStats, Sequential

Mode = Literal["adjoint", "graph"]
FIRST_ORDER = 'Use mode="adjoint" with product="difference", or a first-order method such as BOME or FiniteDifference.'
RECOMPUTED = (
    'A loss uses checkpointing, or other hooks on saved tensors, which mode="graph" cannot keep: what they recompute '
    'would be of other values. Use mode="adjoint", whose memory does not grow with inner_steps.'
)
Start = Callable[[], Iterable[Tensor] | Mapping[str, Tensor]]


class Unrolled(Sequential[HypergradientStats]):
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
        inner_lr: Rate of plain gradient descent for :math:`\Phi`; default None: follow the lower optimizer. Needs
            ``restore=True``.
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
    follows_maximize = True

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
        if inner_lr is not None and not restore:
            advice = "needs restore=True: real steps are those of the lower optimizer. EMLC differentiates plain ones."
            raise ValueError(message("Unrolled", "inner_lr", inner_lr, advice))
        if start is not None:
            if not callable(start):
                raise TypeError(message("Unrolled", "start", start, "must be a function of no arguments."))
            if not restore or (truncate is not None and truncate != inner_steps):
                advice = "needs restore=True and no truncation: the whole walk from it is differentiated."
                raise ValueError(message("Unrolled", "start", "...", advice))
        super().__init__(
            upper_loss,
            lower_loss,
            common,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            product=product,
            atomic=atomic,
        )
        self._check_rule()
        self.truncate = truncate
        self.start = start
        self.mode = mode
        self.trains_first = not restore
        self.exact = truncate is None or truncate == inner_steps
        # The first step alone needs no product with G_ww, unless it is differentiated back to a start.
        self.product_kind = "upper" if self._differentiated == 1 and start is None else "both"

    def _look_ahead(self, look: Look) -> Directions[HypergradientStats]:
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
        return self._directions(look, f, g, through)

    def _train_and_look(self, look: Look, *, real: bool) -> Directions[HypergradientStats]:
        rule = self._rule()
        g, steps = self._train(look, real=real, rule=self._rule, keep=self._differentiated)
        f = look.upper()
        through, _ = adjoint(look, rule, steps, f.lower, self.product)
        return self._directions(look, f, g, through)

    def _by_graph(self, look: Look, start: list[Tensor] | None) -> Directions[HypergradientStats]:
        """Keep the graph of the differentiated steps and of F at their end, and go back through it once."""
        rule, state = self._rule(), self._rule().start()
        skipped = self.inner_steps - self._differentiated
        first: tuple[Tensor, Any] | None = None
        point = look.point()
        for index in range(skipped):
            g = look.lower(index, at=None if index == 0 else point, wrt="lower")
            first = first or (g.value, g.aux)
            point, state = rule.step(point, g.lower, state)
        with torch.enable_grad(), _kept_graph():
            w = [x.detach().clone().requires_grad_() for x in point] if start is None else start
            for index in range(skipped, self.inner_steps):
                with look.lower_graph(index, substitute=w) as (value, aux), two_derivatives(FIRST_ORDER):
                    gradient = torch.autograd.grad(value, w, create_graph=True, allow_unused=True)
                if index == skipped:  # where the graph begins; later ones hold the earlier ones
                    self._check_lower_graph(value, w, gradient)
                first = first or (value.detach(), aux)
                w, state = rule.step(w, gradient, state)
            with look.upper_graph(substitute=w) as (value, aux), two_derivatives(FIRST_ORDER):
                self._refuse_unreached("upper_loss", value, w)
                found = torch.autograd.grad(value, [*self._upper.tensors, *w], allow_unused=True)
        upper, lower = found[: len(self._upper.tensors)], found[len(self._upper.tensors) :]
        self._evaluator.upper_loss.check_use("lower", lower)
        lower_loss, lower_aux = first or (value.detach(), None)
        stats = HypergradientStats(value.detach(), lower_loss, upper_aux=aux, lower_aux=lower_aux, product="graph")
        f = Evaluation(value.detach(), [None] * len(upper), lower)  # its own gradient is part of the graph's
        return self._directions(look, f, f, upper, stats)

    @property
    def _differentiated(self) -> int:
        return self.inner_steps if self.truncate is None else self.truncate

    def _start(self) -> list[Tensor] | None:
        if self.start is None:
            return None
        with torch.enable_grad():
            found = self.start()
        values = _in_order(found, self._lower.names)
        kinds, expected = _kinds(values), _kinds(self._lower.tensors)
        if kinds != expected:
            wrong = next((i for i, (a, b) in enumerate(zip(kinds, expected, strict=False)) if a != b), None)
            advice = (
                f"returned {len(kinds)} tensors for the {len(expected)} lower variables."
                if wrong is None
                else f"returned {kinds[wrong]} for {self._lower.names[wrong]}, expected {expected[wrong]}."
            )
            raise ValueError(
                message("Unrolled", "start", "...", f"{advice} Return one tensor like each lower variable.")
            )
        if not any(x.requires_grad for x in values):
            raise ValueError(message("Unrolled", "start", "...", "depends on no upper variable. Was it detached?"))
        # + 0: an upper variable that is itself the start (MAML) must not be taken for the lower variable in its place.
        with torch.enable_grad():
            return [x + 0 if x.requires_grad else x.detach().requires_grad_() for x in values]

    def _correct_then_train(self, look: Look) -> HypergradientStats:
        if self.start is None:
            return super()._correct_then_train(look)
        return self._move(self._look_ahead(look), look)  # w is computed from the upper variables: nothing to train

    def _start_point(self) -> Point | None:
        start = self._start()
        return None if start is None else [x.detach().clone() for x in start]

    def _check_lower_graph(self, value: Tensor, w: list[Tensor], gradient: Vector) -> None:
        """Check what evaluations and products check in adjoint mode."""
        loss = self._evaluator.lower_loss
        self._refuse_unreached("lower_loss", value, w)
        loss.check_use("lower", gradient)
        if self.start is None and not leaves_of(value, _names(self._upper)):
            loss.check_use("upper", [])
        refuse_wrong_rules([value, *(g for g in gradient if g is not None)], FIRST_ORDER)

    def _refuse_unreached(self, loss: str, value: Tensor, w: list[Tensor]) -> None:
        missed = leaves_of(value, _names(self._lower), beyond=w)
        if missed:
            raise ClosureError(
                f"{loss} reads {', '.join(missed)} other than from a module given as lower=, where no substitute "
                'reaches it. Read the module\'s attribute inside the loss, or use mode="adjoint".'
            )


def _in_order(found: Any, names: tuple[str, ...]) -> list[Tensor]:
    """Return what ``start`` returned, in parameter order."""
    if isinstance(found, Mapping):
        missing = [name for name in names if name not in found]
        if missing:
            advice = f"returned no {', '.join(missing[:3])}. Name every lower variable, or return them in order."
            raise ValueError(message("Unrolled", "start", "...", advice))
        values = [found[name] for name in names]
    else:
        values = list(found) if isinstance(found, Iterable) and not isinstance(found, Tensor) else [found]
    for value in values:
        if not isinstance(value, Tensor):
            advice = f"returned a {type(value).__name__} among its values. Return one tensor like each lower variable."
            raise TypeError(message("Unrolled", "start", "...", advice))
    return values


def _kinds(tensors: Iterable[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype, torch.device]]:
    return [(tuple(x.shape), x.dtype, x.device) for x in tensors]


def _names(level: Level) -> dict[int, str]:
    return dict(zip(map(id, level.tensors), level.names, strict=True))


@contextmanager
def _kept_graph() -> Iterator[None]:
    """Refuse checkpointing: recomputed at the end, a step would read the variables and not what was substituted."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTED):
            yield
    except RuntimeError as error:
        if RECOMPUTED not in str(error):
            raise
        raise ClosureError(RECOMPUTED) from error


def _chained(start: list[Tensor], upper: tuple[Tensor, ...], bars: Vector) -> Vector:
    """Pull a cotangent of the starting point back through ``start`` to the upper variables."""
    pairs = [(x, bar) for x, bar in zip(start, bars, strict=True) if bar is not None]
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, upper, grad_outputs=weights, allow_unused=True)
