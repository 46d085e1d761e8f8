"""``bilevel.minimize``: the solver face for small problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import count, message, number
from ..levels import Variables
from ..optimizer.base import BilevelOptimizer
from ..projection import Box, Projections
from .budget import Budget
from .landscape import Landscape, tensors_of
from .race import Race
from .reduced import Pair
from .result import Record, Result, Values
from .search import Search

Bounds = tuple[float | Tensor | None, float | Tensor | None]
Method = str | type[BilevelOptimizer[Any]]


def minimize(
    upper_loss: Callable[[], Any],
    lower_loss: Callable[[], Any],
    upper: Variables,
    lower: Variables,
    method: Method = "auto",
    *,
    evaluations: int = 3000,
    starts: int = 8,
    upper_bounds: Bounds | None = None,
    lower_bounds: Bounds | None = None,
    upper_projection: Projections | None = None,
    lower_projection: Projections | None = None,
    tolerance: float = 1e-4,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
    callback: Callable[[Record], object] | None = None,
) -> Result:
    r"""Solve a small bilevel problem: minimise F over the upper variables where the lower ones minimise G.

    For up to some hundred variables and losses without batches (close over the data). ``"auto"`` looks for the global
    lower minimum and for a good upper one; the pages "Solve a small problem" and "Which method" tell the rule and what
    it was measured to solve. It repeats: no clock is read, and no global random state.

    Args:
        upper_loss: F, a closure over the variables, without arguments.
        lower_loss: G, the same.
        upper: The upper variables: a tensor, a module, or an iterable of them. Their values are the start.
        lower: The lower variables. Both are left at the pair that was found.
        method: ``"auto"``, or a class of the library by name, or your own, whose step sizes are found by a race.
        evaluations: Most calls of the two losses together, >= 50. Default 3000. A call is a gradient, or a product with
            a second derivative.
        starts: Further lower starts wherever the lower problem is looked at anew, >= 0. Default 8; 0: the
            given y alone.
        upper_bounds: A lower and an upper bound, numbers or tensors that broadcast; None in their place: none.
        lower_bounds: The same of the lower variables.
        upper_projection: Instead of bounds, any projection; see :mod:`bilevel.projection`.
        lower_projection: The same.
        tolerance: Of F, relative to 1 + its size: gains below it do not count. Default 1e-4.
        options: Further arguments of the class; for a named method only.
        seed: Of the points that are drawn. Default 0.
        progress: Whether to show a progress bar; needs ``tqdm``.
        callback: Called with each :class:`bilevel.solver.Record` as it is made.

    Returns:
        A :class:`bilevel.solver.Result`: the pair, both values, whether it stood the test, why it ended, what was
        decided.

    Raises:
        TypeError, ValueError: An argument is off.
        ClosureError: A loss broke its contract.

    Example:
        >>> import bilevel, torch
        >>> a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [1.0]])  # a feature, two samples each
        >>> y_a, y_b = torch.tensor([1.0, 3.0]), torch.tensor([1.5, 1.2])
        >>> log_penalty, w = torch.zeros(1), torch.zeros(1)
        >>> result = bilevel.minimize(
        ...     lambda: ((b @ w - y_b) ** 2).mean(),
        ...     lambda: ((a @ w - y_a) ** 2).mean() + (log_penalty.exp() * w**2).sum(),
        ...     log_penalty, w, upper_bounds=(-5.0, 5.0),
        ... )
        >>> print(f"{w.item():.2f}")
        1.06
    """
    owner = "minimize"
    count(owner, "evaluations", evaluations, minimum=50)
    count(owner, "starts", starts, minimum=0)
    number(owner, "tolerance", tolerance, minimum=0.0)
    chosen = _method(owner, method)
    if options and chosen is None:
        raise ValueError(message(owner, "options", options, 'are of a named method; "auto" takes none.'))
    upper, lower = _listed(upper), _listed(lower)
    with _trainable(upper, lower), _bar(owner, evaluations, shown=progress) as report:
        budget = Budget(evaluations, report)
        reasons: list[str] = []
        history: list[Record] = []

        def record(what: str, pair: Pair | None) -> None:
            values = (math.inf, math.inf) if pair is None else (pair.upper_value, pair.lower_value)
            history.append(Record(budget.used, *values, what))
            if callback is not None:
                callback(history[-1])

        def note(sentence: str) -> None:
            if sentence not in reasons:
                reasons.append(sentence)

        landscape = Landscape(
            _using(budget.counted(upper_loss), lower, "F", "lower", reasons),
            _using(budget.counted(lower_loss), upper, "G", "upper", reasons),
            upper=upper,
            lower=lower,
            upper_projection=_projection(owner, "upper", upper_bounds, upper_projection, upper),
            lower_projection=_projection(owner, "lower", lower_bounds, lower_projection, lower),
            budget=budget,
        )
        start = landscape.upper.flat(), landscape.lower.flat()
        search: Search | Race
        if chosen is None:
            search = Search(landscape, starts, tolerance, seed, note, record)
        else:
            search = Race(landscape, chosen, options or {}, starts, seed, note, record)
        try:
            pair, ended = search.run()
        except BaseException:
            landscape.upper.put(start[0])
            landscape.lower.put(start[1])
            raise
        landscape.upper.put(start[0] if pair is None else pair.x)
        landscape.lower.put(start[1] if pair is None else pair.y)
        record("the end", pair)
        return Result(
            upper=_values(upper, landscape.upper.shaped(landscape.upper.flat()).named()),
            lower=_values(lower, landscape.lower.shaped(landscape.lower.flat()).named()),
            upper_value=history[-1].upper_value,
            lower_value=history[-1].lower_value,
            method="auto" if chosen is None else chosen.__name__,
            evaluations=budget.used,
            success=pair is not None and pair.verified,
            message=ended[:1].upper() + ended[1:] + ".",
            history=history,
            reasons=reasons,
        )


def _method(owner: str, method: Method) -> type[BilevelOptimizer[Any]] | None:
    if isinstance(method, type) and issubclass(method, BilevelOptimizer):
        return method
    if method == "auto":
        return None
    known = {
        name: found
        for name, found in vars(methods).items()
        if isinstance(found, type) and issubclass(found, BilevelOptimizer)
    }
    if method == "SABA":
        raise ValueError(
            message(owner, "method", method, 'keeps a row for each batch, and here are none. Take "SOBA".')
        )
    if not isinstance(method, str) or method not in known:
        names = ", ".join(sorted(known.keys() - {"SABA"}))
        raise ValueError(
            message(owner, "method", repr(method), f'must be "auto", an optimizer class, or one of {names}.')
        )
    return known[method]


def _listed(variables: Variables) -> Variables:
    """Variables that can be gone through more than once."""
    if isinstance(variables, (Tensor, nn.Module, tuple)):
        return variables
    return list(variables)


@contextmanager
def _trainable(*levels: Variables) -> Iterator[None]:
    """Tensors that were given bare need not require gradients; they do inside."""
    plain = [t for level in levels if isinstance(level, Tensor) for t in [level] if not t.requires_grad]
    for tensor in plain:
        tensor.requires_grad_()
    try:
        yield
    finally:
        for tensor in plain:
            tensor.requires_grad_(False)


def _projection(
    owner: str, side: str, bounds: Bounds | None, projection: Projections | None, variables: Variables
) -> Projections | None:
    """Bounds as a box; variables that start outside are moved in."""
    if bounds is not None and projection is not None:
        raise ValueError(message(owner, f"{side}_bounds", bounds, f"and {side}_projection= cannot both be given."))
    if bounds is not None:
        if not isinstance(bounds, tuple) or len(bounds) != 2:
            raise TypeError(
                message(owner, f"{side}_bounds", bounds, "must be a pair, such as (0.0, 1.0) or (0.0, None).")
            )
        if bounds == (None, None):
            return None
        projection = Box(*bounds)
        with torch.no_grad():
            for tensor in tensors_of(variables):
                tensor.copy_(projection(tensor))
    return projection


def _using(
    loss: Callable[..., Any], variables: Variables, name: str, side: str, reasons: list[str]
) -> Callable[..., Any]:
    """Return a loss that depends on a level, if only by nothing: published problems need not depend on both."""
    tensors = tensors_of(variables)
    value = loss()
    value = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        return loss  # the contract of losses has the words for it
    if any(g is not None for g in torch.autograd.grad(value.sum(), tensors, allow_unused=True)):
        return loss
    reasons.append(f"{name} does not depend on the {side} variables.")

    def touched(*batch: Any) -> Any:
        nothing = sum((0 * t.sum() for t in tensors), start=torch.zeros(()))
        found = loss(*batch)
        return (found[0] + nothing, *found[1:]) if isinstance(found, tuple) else found + nothing

    return touched


@contextmanager
def _bar(owner: str, total: int, *, shown: bool) -> Iterator[Callable[[int], object] | None]:
    if not shown:
        yield None
        return
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError as missing:
        advice = "needs tqdm. Install it: pip install bilevel[progress]."
        raise ImportError(message(owner, "progress", True, advice)) from missing
    with tqdm(total=total, unit="gradient") as bar:
        yield lambda used: bar.update(used - bar.n)


def _values(variables: Variables, named: Mapping[str, Tensor]) -> Values:
    if isinstance(variables, Tensor):
        (value,) = named.values()
        return value
    return dict(named)
