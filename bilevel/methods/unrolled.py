"""Unrolled hypergradients: reverse mode through k lower steps (MW-Net, L2RW, MAML, iterative differentiation)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..checks.plain import Plain
from ..directions import Directions
from ..errors import choice, count, message
from ..evaluation.oracle import Oracle
from ..hypergradient import (
    Checkpoints,
    KeptSegments,
    NoGraph,
    ProductMode,
    Start,
    Unrolling,
    mode_taken,
    start_of,
    unrolled_by_adjoint,
    unrolled_by_forward,
    unrolled_by_graph,
)
from ..hypergradient.mode_choice import Kind
from ..lower_hyperparameters import Groups, Hyperparameters, LowerHyperparameters
from ..lower_steps import InnerStep, Rule, check_followed
from ..optimizer import orders
from ..optimizer.base import Common
from ..optimizer.hooks import ONLY_REAL
from ..processes.joined import several
from ..settings import Fixed, Setting, chosen
from .formulas import Formula, GraphStart, derivative, summed
from .hypergradient_method import HypergradientMethod, HypergradientStats

Differentiate = Literal["auto", "adjoint", "graph", "forward"]
MANY, TOO_MANY = 100, 1000  # upper numbers in forward mode: a warning, a refusal
KEPT_GRAPH = "the kept graph"  # as a shortcut that verification may replace


def _known_checkpoints(owner: str, name: str, value: Any) -> None:
    if value is not None and value != "sqrt":
        count(owner, name, value, minimum=1)


class Unrolled(HypergradientMethod[HypergradientStats]):
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
            ``virtual=True``.
        inner_step: ``"optimizer"``: :math:`\Phi` is the lower optimizer's step. ``"gradient"``: gradient descent
            without momentum or weight decay, as in MW-Net; needs ``virtual=True``. Default None: gradient if
            ``inner_lr`` is given, else optimizer.
        truncate: Differentiate the last ``truncate`` steps only, 1 to k; default None: all.
        virtual: True (default): the steps are virtual; w then takes its ordinary step, on the first lower batch, with
            the new upper variables. False: the k steps are the real training (hooks included, which are not
            differentiated), and the upper update follows them.
        lower_hyperparameters: A function without arguments that computes hyperparameters of the lower optimizer from
            the upper variables, which then learn them: ``lambda: {"lr": log_lr.exp(), "momentum": m.sigmoid()}``, for
            all parameter groups, or a list with one mapping for each. SGD: ``lr``, ``momentum``, ``dampening``,
            ``weight_decay``; Adam and AdamW: ``lr``, ``betas`` (a pair), ``eps``, ``weight_decay``;
            ``inner_step="gradient"``: ``lr``. It is called in each step; real lower steps use its values too, written
            into ``lower_optimizer.param_groups`` before each. G may then depend on no upper variable.
        start: A function without arguments that computes the starting lower variables from the upper ones, as a
            mapping by name or in parameter order; it is differentiated through (MAML). It may depend on none of them
            (zeros: the lower problem is solved anew in each step) if G does. The lower variables themselves
            then never move, nor do the buffers of their modules.
        differentiate: ``"adjoint"`` stores the k points and walks back with one product of G per step: memory of one
            step beside copies of the lower variables. ``"graph"`` keeps the graph of all steps, as other libraries do:
            their memory, and no second evaluation. ``"forward"`` carries the derivative of w along every upper number:
            for few of them, memory does not grow with k. ``"auto"`` (default) is the faster one as measured: the graph;
            but the adjoint for a single step where at least a third of the lower layers (linear ones and convolutions)
            are convolutions, or which is real; and where lower variables are in no module, ``checkpoints`` are set, or
            a loss cannot be walked by a graph.
        checkpoints: How many of the k points the adjoint keeps; the steps between are taken once more on the way back,
            with the same numbers: n points need the memory of n + k / n. ``"sqrt"``: the root of k. Default None: all.
            Needs ``virtual=True``; with ``differentiate="auto"`` it means the adjoint.
        product: Mode of the products of G in adjoint mode.
        atomic: Whether a step that fails half-way is taken back; see the concepts page. Default True.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off, or the lower optimizer cannot be followed; the message says what can.

    Cost:
        k gradients of G and one of F. Adjoint: one mixed product of G for the first step and one Hessian product for
        each later one. Graph: the way back through all of them. With ``virtual=True`` one more gradient of G for the
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

        The rate of the lower steps is learned. On ``G = F = 2 |w|^2`` the best one is 1/4, for any w:

        >>> model, log_lr = torch.nn.Linear(3, 1, bias=False), torch.tensor(-3.0, requires_grad=True)
        >>> loss = lambda: 2 * model.weight.square().sum()
        >>> optimizer = bilevel.Unrolled(
        ...     loss, loss, upper=log_lr, lower=model, upper_optimizer=torch.optim.Adam([log_lr], lr=0.1),
        ...     lower_optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        ...     lower_hyperparameters=lambda: {"lr": log_lr.exp()},
        ... )
        >>> for _ in range(100):
        ...     stats = optimizer.apply(optimizer.directions())  # moves the rate alone; step() would train w as well
        >>> round(log_lr.exp().item(), 2)
        0.25

    References:
        Shu et al., `Meta-Weight-Net <https://arxiv.org/abs/1902.07379>`_, NeurIPS 2019; Ren et al., `Learning to
        Reweight Examples <https://arxiv.org/abs/1803.09050>`_, ICML 2018; Finn et al., `MAML
        <https://arxiv.org/abs/1703.03400>`_, ICML 2017.
    """

    walks_virtually = True
    _warned_of_many = False
    follows_maximize = True
    differentiate = Setting[Differentiate](chosen("auto", "adjoint", "graph", "forward"))
    checkpoints = Setting[Checkpoints | None](_known_checkpoints)
    # These are checked together, at construction.
    truncate = Fixed[int | None]()
    virtual = Fixed[bool]()
    lower_hyperparameters = Fixed[Callable[[], Hyperparameters] | None]()
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
        virtual: bool = True,
        lower_hyperparameters: Callable[[], Hyperparameters] | None = None,
        start: Start | None = None,
        differentiate: Differentiate = "auto",
        checkpoints: Checkpoints | None = None,
        product: ProductMode = "auto",
        atomic: bool = True,
        **common: Unpack[Common],
    ) -> None:
        _check_together(inner_steps, inner_lr, inner_step, truncate, virtual, start)
        if lower_hyperparameters is not None:
            _refuse_rate(inner_lr)
        self.inner_steps, self.inner_lr = inner_steps, inner_lr
        self.inner_step = self._default_inner_step(inner_step)
        self.differentiate, self.product, self.atomic = differentiate, product, atomic
        self.checkpoints = checkpoints
        self._check_checkpoints(virtual)
        self.__dict__.update(
            truncate=truncate, start=start, virtual=virtual, lower_hyperparameters=lower_hyperparameters
        )
        super().__init__(upper_loss, lower_loss, **common)
        if self.inner_step == "optimizer":
            otherwise = 'inner_step="gradient" for gradient descent' if virtual else "EMLC, which follows none"
            check_followed("Unrolled", self.lower_optimizer, otherwise)
        if lower_hyperparameters is not None:
            self._learned = LowerHyperparameters(
                "Unrolled", lower_hyperparameters, self.upper_level, self.lower_level, lambda: self.inner_step
            )
            with torch.random.fork_rng([]):
                self._learned.groups()  # refuses what it can at construction
            self._evaluator.lower_loss.needs_upper = False

    def inner_rule(self) -> Rule:
        """The lower step, with the hyperparameters that the upper variables give it now."""
        if self._learned is None:
            return super().inner_rule()
        _refuse_rate(self.inner_lr)
        return self._rule_with(self._learned, self._learned.groups())

    def _rule_with(self, learned: LowerHyperparameters, groups: Groups) -> Rule:
        return self.projected(learned.rule(groups))

    @property
    def order(self) -> orders.Order:  # type: ignore[override]
        """With a ``start``, w is computed from the upper variables: there is nothing to train."""
        return orders.LOOK_THEN_TRAIN if self.virtual and self.start is None else orders.TRAIN_THEN_CORRECT

    @property
    def ignores_clipping(self) -> str | None:
        """Real steps follow a clip, and the derivative does not."""
        return super().ignores_clipping if self.virtual else ONLY_REAL

    def compute(self, oracle: Oracle) -> Directions[HypergradientStats]:
        found, product = self._unrolled(oracle)
        if self.start is not None and all(part is None for part in found.through):
            advice = "depends on no upper variable. Was it detached? If it is constant, lower_loss must depend on one."
            raise ValueError(message("Unrolled", "start", "...", advice))
        f, g = found.upper, found.lower
        return Directions(
            upper=f.upper + found.through,
            stats=HypergradientStats.of(f, g, product=product),
        )

    def _unrolled(self, oracle: Oracle) -> tuple[Unrolling, str]:
        """F after the lower steps, its derivative through the last of them, and what it was computed by."""
        last, real = self._differentiated, not self.virtual
        self._check_checkpoints(self.virtual)
        if self.differentiate == "forward" and not oracle.plain:
            self._check_few()
            self._refuse_unfit(oracle)
            return unrolled_by_forward(
                oracle, self._rule_of_one_look(), self.inner_steps, last=last, start=self._started(), real=real
            ), "reverse"
        if self._keeps_graph(oracle):
            try:
                rule, start = self._rule_of_one_look(), self._started()
                kind = None if several() is None else KeptSegments
                found = unrolled_by_graph(oracle, rule, self.inner_steps, last=last, start=start, real=real, kind=kind)
                return found, "graph"
            except NoGraph as problem:
                if self.differentiate != "auto" or real:
                    raise
                oracle.verification.choices[KEPT_GRAPH] = "adjoint"
                oracle.verification.say(f"{problem} Falling back to the adjoint for this optimizer.")
        found = unrolled_by_adjoint(
            oracle,
            self._rule_of_one_look(),
            self.inner_steps,
            last=last,
            start=self._started(),
            real=real,
            product=self.product,
            checkpoints=self.checkpoints,
        )
        return found, mode_taken(oracle, self.product_kind, self.product)

    def _rule_of_one_look(self) -> Callable[[], Rule]:
        """What makes the lower step, as it is at the moment, with hyperparameters of one call and one graph."""
        if self._learned is None:
            return self.inner_rule
        _refuse_rate(self.inner_lr)
        return partial(self._rule_with, self._learned, self._learned.groups())

    def _check_checkpoints(self, virtual: bool) -> None:
        if self.checkpoints is None:
            return
        advice = ""
        if not virtual:
            advice = "needs virtual=True: real steps are not taken twice. Truncate, or take fewer inner steps."
        elif self.differentiate in ("graph", "forward"):
            advice = f'are points of the adjoint, and differentiate="{self.differentiate}". Use "adjoint", or leave it.'
        if advice:
            raise ValueError(message("Unrolled", "checkpoints", self.checkpoints, advice))

    def _refuse_unfit(self, oracle: Oracle) -> bool:
        """Whether micro-batches or a scaler leave only the adjoint; refuse what was asked for instead."""
        if oracle.in_parts:
            reason = "keeps the graphs of all micro-batches at once, which they are there to avoid."
        elif oracle.scaling is not None:
            reason = "has no place where a GradScaler could scale and unscale: one derivative goes through all steps."
        else:
            return False
        if self.differentiate in ("graph", "forward") and not oracle.plain:
            advice = f'{reason} Use differentiate="adjoint", or "auto", which takes it here.'
            raise ValueError(message("Unrolled", "differentiate", self.differentiate, advice))
        return True

    def _check_few(self) -> None:
        """Refuse more upper scalars than forward mode is for, and warn before that."""
        count, size = (sum(x.numel() for x in level.tensors) for level in (self.upper_level, self.lower_level))
        if count <= MANY:
            return
        cost = (
            f"carries a copy of all {size} lower numbers, and of the optimizer's state, for each of {count} upper "
            f'numbers, and takes as many passes a step. Use "adjoint", with checkpoints="sqrt" if memory is short.'
        )
        if count > TOO_MANY:
            raise ValueError(message("Unrolled", "differentiate", "forward", f"{cost} At most {TOO_MANY} are allowed."))
        if not self._warned_of_many:
            self._warned_of_many = True
            warnings.warn(message("Unrolled", "differentiate", "forward", cost), stacklevel=6)

    def _started(self) -> list[Tensor] | None:
        return None if self.start is None else start_of("Unrolled", self.start, self.lower_level)

    def _keeps_graph(self, oracle: Oracle) -> bool:
        unfit = self._refuse_unfit(oracle)
        if self.differentiate != "auto" or unfit:
            return self.differentiate == "graph" and not oracle.plain
        unreached = self.lower_level.has_bare_tensors or KEPT_GRAPH in oracle.verification.choices
        if self.checkpoints is not None or unreached or oracle.plain:
            return False
        return self._differentiated > 1 or self.start is not None or self._one_step_keeps_graph()

    def _one_step_keeps_graph(self) -> bool:
        """For one step the adjoint's mixed product in forward mode is faster where convolutions are differentiated.

        Their double backward takes 3.7 gradients, and forward mode 1.2; of linear layers both are cheap, and the graph
        saves an evaluation. Real steps, which cannot be taken back here if a graph is refused, and a chosen product
        stay with the adjoint.
        """
        if self.product != "auto" or not self.virtual:
            return False
        parts = [part for module in self.lower_level.modules for part in module.modules()]
        convolutions = sum(isinstance(part, _ConvNd) for part in parts)
        linear = sum(isinstance(part, nn.Linear) for part in parts)
        return 2 * convolutions < linear or convolutions == 0

    @property
    def virtual_walk(self) -> bool:  # type: ignore[override]
        """Whether the steps are virtual."""
        return self.virtual

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether every step is differentiated."""
        return self._differentiated == self.inner_steps

    @property
    def product_kind(self) -> Kind:  # type: ignore[override]
        """The first step alone needs no product with G_ww, unless it is differentiated back to a start."""
        return "mixed" if self._differentiated == 1 and self.start is None else "hessian"

    @property
    def _differentiated(self) -> int:
        return self.inner_steps if self.truncate is None else min(self.truncate, self.inner_steps)

    @property
    def graph_start(self) -> GraphStart:
        """The function that computes the starting point."""
        start = self.start
        return None if start is None else lambda: start_of("Unrolled", start, self.lower_level)

    def formula(self, plain: Plain, answer: Directions[HypergradientStats]) -> Formula:
        """Back through the last ``truncate`` steps, one product after the other."""
        if self.virtual:
            return derivative(
                plain, self.inner_rule(), self.inner_steps, last=self._differentiated, start=self.graph_start
            )
        steps = plain.train(self.inner_steps, self.inner_rule)
        f = plain.upper()
        as_trained = answer.stats.product == "graph" or self.differentiate == "forward"
        last = steps[-self._differentiated :]
        return summed(f.upper, 1.0, plain.adjoint(self.inner_rule(), last, f.lower, as_trained=as_trained)[0])


def _refuse_rate(inner_lr: float | None) -> None:
    if inner_lr is not None:
        advice = "goes with no lower_hyperparameters: what is differentiated would not be what is done. Leave it out."
        raise ValueError(message("Unrolled", "inner_lr", inner_lr, advice))


def _check_together(
    inner_steps: Any,
    inner_lr: float | None,
    inner_step: InnerStep | None,
    truncate: int | None,
    virtual: bool,
    start: Start | None,
) -> None:
    """Refuse combinations of arguments that mean nothing."""
    choice("Unrolled", "virtual", virtual, (True, False))
    if truncate is not None:
        count("Unrolled", "truncate", truncate, minimum=1)
        if isinstance(inner_steps, int) and truncate > inner_steps:
            raise ValueError(message("Unrolled", "truncate", truncate, f"must be at most inner_steps={inner_steps}."))
    for argument, value, given in (
        ("inner_lr", inner_lr, inner_lr is not None),
        ("inner_step", inner_step, inner_step == "gradient"),
    ):
        if given and not virtual:
            advice = "needs virtual=True: real steps are the lower optimizer's. EMLC differentiates plain ones."
            raise ValueError(message("Unrolled", argument, value, advice))
    if start is not None:
        if not callable(start):
            raise TypeError(message("Unrolled", "start", start, "must be a function of no arguments."))
        if not virtual or (truncate is not None and truncate != inner_steps):
            advice = "needs virtual=True and no truncation: the whole walk from it is differentiated."
            raise ValueError(message("Unrolled", "start", "...", advice))
