"""SABA: SOBA with the variance reduction of SAGA (Dagréou, Ablin, Vaiter and Moreau, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Unpack

from ..directions import Directions
from ..errors import count
from ..evaluation.oracle import Oracle
from ..hypergradient import ProductMode
from ..optimizer.base import Common
from ..optimizer.method_state import LevelState
from ..optimizer.table_state import TableState
from ..settings import Fixed
from ..vectors import Vector
from .single_loop import SingleLoop, SingleLoopStats


@dataclass(frozen=True)
class Memory:
    """What one term was on each batch when it was last seen there, and the mean of these."""

    table: TableState
    mean: LevelState

    def reduced(self, new: Vector, index: int) -> tuple[Vector, dict[str, Any]]:
        """Return ``new - table[index] + mean``, and the state that remembers ``new``."""
        # A variable that the term does not have stays without one: its row is empty.
        old = new.like(None if x is None else row for x, row in zip(new, self.table[index], strict=True))
        change, mean = new - old, self.mean.value
        state = {self.table.name: {index: new}, self.mean.name: mean + (1 / self.table.rows) * change}
        return mean + change, state


class SABA(SingleLoop):
    r""":class:`SOBA` on finite sums, with a table of the last value of each term on each batch: the noise vanishes.

    .. math::
        D_w &= S[\nabla_w G], \qquad D_v = S[G_{ww} v] + S[\nabla_w F], \qquad
            D_\alpha = S[G_{\alpha w} v] + S[\nabla_\alpha F] \\
        S[\phi]_i &= \phi_i - \text{table}_i + \tfrac{1}{n} \sum_j \text{table}_j, \qquad
            \text{table}_i \leftarrow \phi_i

    w, v and :math:`\alpha` then move as in :class:`SOBA`. i is the batch of this step, its five terms are computed at
    the current w, v and :math:`\alpha`. With step sizes that do not decrease it converges to the solution, where SOBA
    stays in a ball around it; linearly under the Polyak-Łojasiewicz inequality (the paper's result).

    Differences from the paper: rows belong to batches, as in ``benchopt/benchmark_bilevel``, and to samples if batches
    are samples; batches count equally. Tables begin at 0, as that code's do by default. w and :math:`\alpha` move by
    your torch optimizers, of which plain SGD is the paper's.

    Args:
        upper_loss: F, called once per step; see :class:`bilevel.BilevelOptimizer` for the closures and the arguments
            of both levels. ``step`` takes ``Indexed(i, batch)`` with i < ``upper_rows``.
        lower_loss: G, called twice per step, on ``Indexed(i, batch)`` with i < ``lower_rows``.
        upper_rows: Number of batches of F, >= 1. With 1, the whole sum in each step, batches need no number.
        lower_rows: Number of batches of G, >= 1.
        system_lr: Rate :math:`\rho` of v. Default: the lower optimizer's current rate, per parameter group.
        product: Mode of the products of G.
        common: ``upper``, ``lower``, ``upper_optimizer``, ``lower_optimizer``, ``on_nonfinite``, ``other``,
            ``upper_buffers``, ``lower_buffers``: see :class:`bilevel.BilevelOptimizer`.

    Raises:
        TypeError, ValueError: An argument is off, or a batch has no number or one that no row has; the message says
            which and what to do.

    Cost:
        As of :class:`SOBA`. Memory, from step to step: for each batch of G two copies of the lower variables and one of
        the upper ones, for each batch of F one of each. It is a method for small models.

    Example:
        >>> import random, torch, bilevel
        >>> w, alpha = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> data = [0.0, 1.0, 5.0]  # F is the mean of (w - x)^2
        >>> optimizer = bilevel.SABA(
        ...     lambda x: (w - x) ** 2, lambda: (w - alpha) ** 2, upper=alpha, lower=w, upper_rows=3, lower_rows=1,
        ...     upper_optimizer=torch.optim.SGD([alpha], lr=0.02), lower_optimizer=torch.optim.SGD([w], lr=0.1),
        ...     product="reverse",
        ... )
        >>> draw = random.Random(0)
        >>> for _ in range(1000):
        ...     i = draw.randrange(3)
        ...     stats = optimizer.step(bilevel.Indexed(i, data[i]))
        >>> print(f"{alpha.item():.2f}")
        2.00

    References:
        Dagréou, Ablin, Vaiter and Moreau, `A framework for bilevel optimization that enables stochastic and global
        variance reduction algorithms <https://arxiv.org/abs/2201.13409>`_, NeurIPS 2022.
    """

    upper_rows, lower_rows = Fixed[int](), Fixed[int]()

    def __init__(
        self,
        upper_loss: Callable[..., Any],
        lower_loss: Callable[..., Any],
        *,
        upper_rows: int,
        lower_rows: int,
        system_lr: float | None = None,
        product: ProductMode = "auto",
        **common: Unpack[Common],
    ) -> None:
        for argument, rows in (("upper_rows", upper_rows), ("lower_rows", lower_rows)):
            count(type(self).__name__, argument, rows, minimum=1)
        self.__dict__.update(upper_rows=upper_rows, lower_rows=lower_rows)
        super().__init__(upper_loss, lower_loss, system_lr=system_lr, product=product, **common)
        self._g_lower = self._memory("G_w", lower_rows, "lower")
        self._hessian = self._memory("G_ww v", lower_rows, "lower")
        self._mixed = self._memory("G_aw v", lower_rows, "upper")
        self._f_lower = self._memory("F_w", upper_rows, "lower")
        self._f_upper = self._memory("F_a", upper_rows, "upper")

    def compute(self, oracle: Oracle) -> Directions[SingleLoopStats]:
        i = 0 if self.lower_rows == 1 else oracle.lower_index()
        j = 0 if self.upper_rows == 1 else oracle.upper_index()
        g = oracle.lower(wrt="lower")
        lower, first = self._g_lower.reduced(g.lower, i)
        at = self.sample(oracle, g, lower)
        hessian, second = self._hessian.reduced(at.hessian, i)
        mixed, third = self._mixed.reduced(at.mixed, i)
        f_lower, fourth = self._f_lower.reduced(at.f.lower, j)
        f_upper, fifth = self._f_upper.reduced(at.f.upper, j)
        return Directions(
            upper=f_upper + mixed,
            lower=lower,
            state={"v": self.next_v(at.system(hessian + f_lower)), **first, **second, **third, **fourth, **fifth},
            stats=self.numbers(oracle, at),
        )

    def _memory(self, name: str, rows: int, like: Literal["upper", "lower"]) -> Memory:
        declared = self.upper_state if like == "upper" else self.lower_state
        return Memory(self.table_state(name, rows, like=like), declared(f"mean of {name}"))
