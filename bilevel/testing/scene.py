"""Label correction in miniature: two small networks with everything that the contracts speak of, and a record of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..batches import Batches, Indexed
from ..directions import Directions, Stats
from ..evaluation.hold import hold
from ..evaluation.oracle import Oracle
from ..optimizer.base import BilevelOptimizer
from ..problems import Problem

INPUTS, HIDDEN, CLASSES, SAMPLES = 4, 6, 3, 6
Build = Callable[..., BilevelOptimizer[Any]]
After = Callable[[int, Tensor], Tensor]


class Scene:
    """A classifier with BatchNorm, dropout and a frozen layer below, a corrector of its targets above.

    Args:
        dtype: Of all networks and batches.
        after_call: Called with the number of each loss call and the loss; returns the loss.

    Example:
        >>> import bilevel
        >>> from bilevel.testing import Scene
        >>> scene = Scene()
        >>> optimizer = scene.build(bilevel.BOME, {"inner_steps": 2})
        >>> optimizer.step(*scene.batches(upper=1, lower=2)).upper_moved
        True
    """

    def __init__(self, dtype: torch.dtype = torch.float64, after_call: After | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stem, head = nn.Linear(INPUTS, HIDDEN).requires_grad_(False), nn.Linear(HIDDEN, CLASSES)
            features = nn.Sequential(stem, nn.BatchNorm1d(HIDDEN), nn.Tanh(), nn.Dropout(0.3))
            self.lower = nn.Sequential(features, head).to(dtype)
            self.upper = nn.Sequential(nn.Linear(HIDDEN + CLASSES, 5), nn.Tanh(), nn.Linear(5, CLASSES)).to(dtype)
        self.dtype, self.after_call, self.calls = dtype, after_call, 0
        self.upper_optimizer = torch.optim.Adam(self.upper.parameters(), lr=1e-2)
        self.lower_optimizer = torch.optim.SGD(self.lower.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        self._draw = torch.Generator().manual_seed(1)

    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """F: cross-entropy on trusted labels, with the corrector mixed in."""
        x, label = batch
        features = self.lower[0](x)
        mixture = 0.3 * self.lower[1](features).softmax(1) + 0.7 * self._corrected(features.detach(), label)
        return self._counted(-(label * mixture.log()).sum(1).mean())

    def lower_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """G: cross-entropy on corrected labels."""
        x, label = batch
        features = self.lower[0](x)
        return self._counted(cross_entropy(self.lower[1](features), self._corrected(hold(features.detach()), label)))

    def build(self, method: Build, options: Mapping[str, Any], **changes: Any) -> BilevelOptimizer[Any]:
        """Build the method on these losses and levels."""
        levels = {"upper": self.upper, "lower": self.lower}
        optimizers = {"upper_optimizer": self.upper_optimizer, "lower_optimizer": self.lower_optimizer}
        return method(self.upper_loss, self.lower_loss, **levels, **optimizers, **options, **changes)

    def batches(self, upper: int, lower: int) -> list[Any]:
        """Return an upper batch, or several as one, and lower ones; all know their number."""
        uppers, lowers = ([self._batch(i) for i in range(count)] for count in (upper, lower))
        return [uppers[0] if upper == 1 else Batches(*uppers), *lowers]

    def record(self) -> dict[str, Any]:
        """Copy everything that a step could change."""
        found: dict[str, Any] = {"random state": torch.get_rng_state()}
        for side, module, optimizer in (
            ("upper", self.upper, self.upper_optimizer),
            ("lower", self.lower, self.lower_optimizer),
        ):
            found.update({f"{side} {name}": x.detach().clone() for name, x in module.state_dict().items()})
            for name, x in module.named_parameters():
                found[f"gradient of {side} {name}"] = None if x.grad is None else x.grad.clone()
                found[f"requires_grad of {side} {name}"] = x.requires_grad
            found.update({f"training of {side} {name}": part.training for name, part in module.named_modules()})
            found.update(dict(_leaves(optimizer.state_dict(), f"{side} optimizer")))
        return found

    def _batch(self, number: int) -> Indexed:
        x = torch.randn(SAMPLES, INPUTS, generator=self._draw, dtype=torch.float64).to(self.dtype)
        label = torch.randint(CLASSES, (SAMPLES,), generator=self._draw)
        return Indexed(number, (x, torch.eye(CLASSES, dtype=self.dtype)[label]))

    def _corrected(self, features: Tensor, label: Tensor) -> Tensor:
        found: Tensor = self.upper(torch.cat([features, label], 1)).softmax(1)
        return found

    def _counted(self, loss: Tensor) -> Tensor:
        number, self.calls = self.calls, self.calls + 1
        return loss if self.after_call is None else self.after_call(number, loss)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], ignoring: Sequence[str] = ()) -> list[str]:
    """Name what differs between two records, bit for bit."""
    names = [*before, *(name for name in after if name not in before)]
    return [n for n in names if not n.startswith(tuple(ignoring)) and not _same(before.get(n), after.get(n))]


@contextmanager
def oracle(problem: Problem) -> Iterator[Oracle]:
    """Open an oracle on a problem, to try what a method is written with.

    Example:
        >>> import bilevel
        >>> problem = bilevel.problems.quadratic(seed=0)
        >>> with bilevel.testing.oracle(problem) as oracle:
        ...     g = oracle.lower()
        >>> g.lower.norm().item() > 0
        True
    """
    upper_optimizer, lower_optimizer = problem.optimizers()
    looker = _Looker(
        problem.upper_loss,
        problem.lower_loss,
        upper=problem.upper,
        lower=problem.lower,
        upper_optimizer=upper_optimizer,
        lower_optimizer=lower_optimizer,
    )
    with looker._oracle([]) as opened, looker._looking(opened):
        yield opened


class _Looker(BilevelOptimizer[Stats]):
    """No method at all: it lends its oracle."""

    def compute(self, oracle: Oracle) -> Directions[Stats]:
        raise NotImplementedError("this optimizer only lends its oracle")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    return bool(a == b) if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, value.detach().clone() if isinstance(value, Tensor) else value
