"""Unrolled hypergradients: reverse mode through k lower steps (MW-Net, L2RW, MAML, iterative differentiation)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack

from torch import Tensor

from ..checks.plain import Plain
from ..directions import Directions
from ..errors import choice, count, message
from ..evaluation.evaluations import Evaluation
from ..evaluation.oracle import Oracle
from ..hypergradient import KeptGraph, Start, Unreached, adjoint, descend, leaves, start_of, through_start
from ..hypergradient.mode_choice import Kind
from ..hypergradient.modes import Route
from ..lower_steps import InnerStep
from ..optimizer.base import Common
from ..optimizer.hooks import ONLY_REAL, VIRTUAL
from ..settings import Fixed, Setting, chosen
from ..vectors import Vector, add_scaled
from .formulas import Formula, GraphStart, derivative, summed
from .sequential import HypergradientStats, Sequential

Mode = Literal["auto", "adjoint", "graph"]
KEPT_GRAPH = "the kept graph"  # as a shortcut that verification may replace


class Unrolled(Sequential[HypergradientStats]):
    r"""The exact derivative of F after k lower steps.

    .. math::
        w_0 &= w \text{ or } start(\alpha), \quad w_{t+1} = \Phi(w_t, \nabla_w G(w_t, \alpha)), \quad t < k \\
        \alpha &\leftarrow \alpha - \eta_\alpha\, \frac{d}{d\alpha} F(w_k(\alpha), \alpha)

    :math:`\Phi` is the step of your own lower optimizer from its real state (SGD with momentum, dampening, nesterov,
    weight decay; Adam; AdamW; per-group rates), or plain gradient descent.

    Args:
        upper_loss: F, called once per step, at :math:`w_k`; see :class:`bilevel.BilevelOptimizer`.
        lower_loss: G.
        inner_steps: k >= 1. Default 1, as in MW-Net and L2RW.
        inner_lr: Rate of :math:`\Phi`; default None: the lower optimizer's current rates, schedules included. Needs
            ``restore=True``.
        inner_step: ``"preview"``: :math:`\Phi` is the lower optimizer's step. ``"plain"``: gradient descent without
            momentum or weight decay, as in MW-Net; needs ``restore=True``. Default None: plain if ``inner_lr`` is
            given, else preview.
        truncate: Differentiate the last ``truncate`` steps only, 1 to k; default None: all.
        restore: True (default): the steps are virtual; w then takes its ordinary step, on the first lower batch, with
            the new upper variables. False: the k steps are the real training (hooks included, which are not
            differentiated), and the upper update follows them.
        start: A function without arguments that computes the starting lower variables from the upper ones, as a
            mapping by name or in parameter order; it is differentiated through (MAML). The lower variables themselves
            then never move, nor do the buffers of their modules.
        mode: ``"adjoint"`` stores the k points and walks back with one product of G per step: memory of one step beside
            copies of the lower variables. ``"graph"`` keeps the graph of all steps, as other libraries do: their
            memory, and no second evaluation. ``"auto"`` (default) is the faster one as measured: adjoint for one
            differentiated step, graph for more; adjoint where lower variables are in no module.
        product: Route of the products of G in adjoint mode.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off, or the lower optimizer cannot be followed; the message says what can.

    Cost:
        k gradients of G and one of F. Adjoint: one upper product of G for the first step and one mixed product for each
        later one. Graph: the way back through all of them. With ``restore=True`` one more gradient of G for the
        ordinary step.

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

    follows_maximize = True
    mode = Setting[Mode](chosen("auto", "adjoint", "graph"))
    # These are checked together, at construction.
    truncate = Fixed[int | None]()
    restore = Fixed[bool]()
    start = Fixed[Start | None]()

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        inner_steps: int = 1,
        inner_lr: float | None = None,
        inner_step: InnerStep | None = None,
        truncate: int | None = None,
        restore: bool = True,
        start: Start | None = None,
        mode: Mode = "auto",
        product: Route = "auto",
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        self.mode = mode
        choice("Unrolled", "restore", restore, (True, False))
        if truncate is not None:
            count("Unrolled", "truncate", truncate, minimum=1)
            if isinstance(inner_steps, int) and truncate > inner_steps:
                raise ValueError(
                    message("Unrolled", "truncate", truncate, f"must be at most inner_steps={inner_steps}.")
                )
        for argument, value, given in (
            ("inner_lr", inner_lr, inner_lr is not None),
            ("inner_step", inner_step, inner_step == "plain"),
        ):
            if given and not restore:
                advice = "needs restore=True: real steps are the lower optimizer's. EMLC differentiates plain ones."
                raise ValueError(message("Unrolled", argument, value, advice))
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
            inner_step=inner_step,
            product=product,
            atomic=atomic,
        )
        self._check_rule('inner_step="plain" for gradient descent' if restore else "EMLC, which follows none")
        self.__dict__.update(truncate=truncate, start=start, restore=restore)

    @property
    def _ignores_clipping(self) -> str | None:  # type: ignore[override]
        if not self.restore:
            return ONLY_REAL
        return VIRTUAL if self.inner_lr is None else None  # a rate of its own was chosen for what it is

    def _look_ahead(self, oracle: Oracle) -> Directions[HypergradientStats]:
        start = None if self.start is None else start_of("Unrolled", self.start, self._lower)
        if self._keeps_graph:
            try:
                return self._look_ahead_by_graph(oracle, start)
            except Unreached as problem:
                if self.mode != "auto":
                    raise
                oracle.verification.routes[KEPT_GRAPH] = "adjoint"
                oracle.verification.say(f"{problem} Falling back to it for this optimizer.")
                if self.start is not None:
                    start = start_of("Unrolled", self.start, self._lower)
        point = None if start is None else [x.detach().clone() for x in start]
        g = oracle.lower(at=point, wrt="lower")
        rule = self._rule()
        walk = descend(oracle, rule, g, self.inner_steps, start=point, keep=self._differentiated)
        f = oracle.upper(at=walk.end)
        through, start_bar = adjoint(oracle, rule, walk.steps, f.lower, self.product, to_start=start is not None)
        if start is not None:
            through = add_scaled(through, 1.0, through_start(start, self._upper.tensors, start_bar))
        return self._directions(oracle, f, g, through)

    def _look_ahead_by_graph(self, oracle: Oracle, start: list[Tensor] | None) -> Directions[HypergradientStats]:
        rule, skipped = self._rule(), self.inner_steps - self._differentiated
        first: Evaluation | None = None
        state = rule.start()
        at_current = start is None
        if start is None:
            point = oracle.point()
            if skipped:
                first = oracle.lower(wrt="lower")
                plain = descend(oracle, rule, first, skipped)
                point, state = plain.end, plain.state
            start = leaves(point)
        walk = KeptGraph(oracle, rule, start, state, chained=not at_current)
        for index in range(skipped, self.inner_steps):
            g = walk.step(index, current=at_current and index == 0)
            first = first or g
        assert first is not None  # at least one step is differentiated
        return self._by_graph(oracle, first, *walk.finish())

    def _train_and_look(self, oracle: Oracle, *, real: bool) -> Directions[HypergradientStats]:
        if self._keeps_graph:
            return self._train_and_look_by_graph(oracle, real=real)
        rule = self._rule()
        g, steps = self._train(oracle, real=real, rule=self._rule, keep=self._differentiated)
        f = oracle.upper()
        through, _ = adjoint(oracle, rule, steps, f.lower, self.product)
        return self._directions(oracle, f, g, through)

    def _train_and_look_by_graph(self, oracle: Oracle, *, real: bool) -> Directions[HypergradientStats]:
        """Values come from the lower optimizer, derivatives from its rule."""
        first: Evaluation | None = None
        walk: KeptGraph | None = None
        for index in range(self.inner_steps):
            if index == self.inner_steps - self._differentiated:
                rule = self._rule()
                state = [{name: s.clone() for name, s in entry.items()} for entry in rule.start()]
                walk = KeptGraph(oracle, rule, leaves(oracle.point()), state, chained=False)
            g = (
                oracle.lower(index, wrt="lower", trains=True)
                if walk is None
                else walk.step(index, current=True, trains=True)
            )
            first = first or g
            self._train_along(g, real=real, kept=walk is not None)
            if walk is not None:
                walk.follow(oracle.point(), self._rule().start())
        assert first is not None  # at least one step is taken,
        assert walk is not None  # and one differentiated
        return self._by_graph(oracle, first, *walk.finish(real=True))

    def _by_graph(self, oracle: Oracle, g: Evaluation, f: Evaluation, total: Vector) -> Directions[HypergradientStats]:
        stats = HypergradientStats(f.value, g.value, upper_aux=f.aux, lower_aux=g.aux, product="graph")
        return self._directions(oracle, f, g, total, stats)

    @property
    def trains_first(self) -> bool:  # type: ignore[override]
        """Whether the steps are real."""
        return not self.restore

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether every step is differentiated."""
        return self._differentiated == self.inner_steps

    @property
    def product_kind(self) -> Kind:  # type: ignore[override]
        """The first step alone needs no product with G_ww, unless it is differentiated back to a start."""
        return "upper" if self._differentiated == 1 and self.start is None else "both"

    @property
    def _keeps_graph(self) -> bool:
        if self.mode == "auto":
            several = self._differentiated > 1 or self.start is not None
            unfit = self._lower.has_bare_tensors or KEPT_GRAPH in self._evaluator.verification.routes
            return several and not unfit
        return self.mode == "graph"

    @property
    def _differentiated(self) -> int:
        return self.inner_steps if self.truncate is None else min(self.truncate, self.inner_steps)

    def _correct_then_train(self, oracle: Oracle) -> HypergradientStats:
        if self.start is None:
            return super()._correct_then_train(oracle)
        return self._move(self._look_ahead(oracle), oracle)  # w is computed from the upper variables: nothing to train

    @property
    def _graph_start(self) -> GraphStart:
        start = self.start
        return None if start is None else lambda: start_of("Unrolled", start, self._lower)

    def _formula(self, plain: Plain, answer: Directions[HypergradientStats]) -> Formula:
        """Back through the last ``truncate`` steps, one product after the other."""
        if not self.trains_first:
            return derivative(plain, self._rule(), self.inner_steps, last=self._differentiated, start=self._graph_start)
        steps = plain.train(self.inner_steps, self._rule)
        f = plain.upper()
        last = steps[-self._differentiated :]
        through = plain.adjoint(self._rule(), last, f.lower, as_trained=self._keeps_graph)[0]
        return summed(f.upper, 1.0, through)
