"""Many products of G at one point: the graph of its gradient is kept, and each product is one pass through that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..evaluation.oracle import Oracle
from ..processes.joined import Share, averaged
from ..vectors import Tensors, Vector
from .mode_choice import mode_taken
from .modes import ProductMode, Unavailable, refusal, refuse_wrong_rules, second_derivatives
from .products import hessian_product, mixed_product


class HessianProducts:
    """Products with the Hessian of G at the current point, as a context.

    In ``reverse`` mode G is called, and differentiated with its graph, once; a product then is one pass back through
    that graph, and it is freed in the end. The other modes have nothing to keep. What one mode cannot serve is found
    out, and said, as by :func:`hessian_product`. Of micro-batches, and under a ``GradScaler``, nothing is kept.

    Args:
        oracle: Where G is evaluated. It is asked for nothing else meanwhile.
        batch: Which lower batch.
        product: By which mode.

    Cost:
        ``reverse``: one gradient of G with its graph, and one pass back through that per product; the memory of that
        graph until the context ends.

    Example:
        >>> import bilevel
        >>> from bilevel.hypergradient import HessianProducts
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> with bilevel.testing.oracle(problem) as oracle, HessianProducts(oracle) as products:
        ...     product = products(oracle.point())
        >>> torch.allclose(product[0], problem.hessian @ problem.lower)
        True
    """

    def __init__(self, oracle: Oracle, *, batch: int = 0, product: ProductMode = "auto") -> None:
        self._oracle, self._batch, self._product = oracle, batch, product
        self._open: ExitStack | None = None
        self._gradient: Tensors = ()

    def __enter__(self) -> Self:
        oracle = self._oracle
        # Of micro-batches all graphs would be kept; and a scale is taken out where a product is asked for anew.
        keeps = not oracle.in_parts and oracle.scaling is None
        if keeps and mode_taken(oracle, "hessian", self._product) == "reverse":
            self._oracle.refuse_hooks()
            try:
                self._keep()
            except Unavailable as problem:
                self._refuse(problem)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gradient = ()
        opened, self._open = self._open, None
        if opened is not None:
            opened.__exit__(kind, error, trace)

    def __call__(self, direction: Tensors) -> Vector:
        """Return ``G_ww v``."""
        level = self._oracle.lower_level
        if self._open is not None:
            try:
                return Vector(self._back(direction, level.tensors), level.names)
            except Unavailable as problem:
                self._refuse(problem)
        return hessian_product(self._oracle, direction, batch=self._batch, product=self._product)[1]

    def mixed(self, direction: Tensors) -> Vector:
        """Return ``G_aw v``, by the kept graph where that is the mode for it; the last product of this context."""
        level = self._oracle.upper_level
        if self._open is not None and mode_taken(self._oracle, "mixed", self._product) == "reverse":
            found = Vector(self._back(direction, level.tensors), level.names)
            self.__exit__(None, None, None)
            self._oracle.check_dependence(found)
            return found
        self.__exit__(None, None, None)
        return mixed_product(self._oracle, direction, batch=self._batch, product=self._product)

    def _keep(self) -> None:
        """Differentiate G once, keeping the graph: of several processes, each its own."""
        self._open = ExitStack()
        with self._told():
            averaged(f"{self._oracle.owner}: a kept gradient", self._differentiated)

    def _differentiated(self) -> Share:
        opened = self._open or ExitStack()
        value, _ = opened.enter_context(self._oracle.lower_graph(self._batch))
        opened.enter_context(second_derivatives())
        variables = self._oracle.lower_level.tensors
        self._gradient = [None] * len(variables)
        if value.requires_grad:
            self._gradient = torch.autograd.grad(value, variables, create_graph=True, allow_unused=True)
            if self._oracle.checking:
                refuse_wrong_rules([value, *(g for g in self._gradient if g is not None)])
        return Share()

    def _back(self, direction: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        """Pull a direction back through the graph of the gradient."""
        with self._told():
            share = averaged(
                f"{self._oracle.owner}: a product", lambda: Share((), self._back_here(direction, inputs)), inputs
            )
        return share.vector

    def _back_here(self, direction: Tensors, inputs: Sequence[Tensor]) -> Tensors:
        pairs = [(g, v) for g, v in zip(self._gradient, direction, strict=True) if g is not None and v is not None]
        pairs = [(g, v) for g, v in pairs if g.requires_grad]
        if not pairs:  # G is linear in w: no second derivatives at all
            return [None] * len(inputs)
        outputs, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, inputs, grad_outputs=weights, allow_unused=True, retain_graph=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Send what goes wrong through the contexts that are open, which undo, and say what it means."""
        try:
            yield
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def _refuse(self, problem: Unavailable) -> None:
        """Without a kept graph the product goes another way, if one was not insisted on."""
        if self._product != "auto":
            raise refusal(problem) from problem.__cause__
