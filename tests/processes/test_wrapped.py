"""Modules wrapped for several processes: right, or refused by name; and what is said about groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bilevel
from group_of import GroupOf
from joined_batches import CLASSES, Shared, part
from methods_table import CASES


class Called(Shared):
    """The same losses, which call both networks through DDP."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.ddp_lower = nn.parallel.DistributedDataParallel(self.lower, **options)
        self.ddp_upper = nn.parallel.DistributedDataParallel(self.upper, **options)

    def upper_loss(self, batch: Any) -> Tensor:
        x, label = batch
        logits = self.ddp_lower(x)
        mixture = 0.3 * logits.softmax(1) + 0.7 * self._given(logits.detach(), label)
        return -(label * mixture.log()).sum(1).mean()

    def lower_loss(self, batch: Any) -> Tensor:
        x, label = batch
        logits = self.ddp_lower(x)
        return nn.functional.cross_entropy(logits, self._given(bilevel.hold(logits.detach()), label))

    def _given(self, logits: Tensor, label: Tensor) -> Tensor:
        features = torch.cat([logits, logits, logits], 1)[:, : 11 - CLASSES]
        found: Tensor = self.ddp_upper(torch.cat([features, label], 1)).softmax(1)
        return found


class Plain(Called):
    """The same without DDP."""

    def __init__(self) -> None:
        Shared.__init__(self)
        self.ddp_lower, self.ddp_upper = self.lower, self.upper  # type: ignore[assignment]


LEVELS: dict[str, Callable[[Called], dict[str, Any]]] = {
    "ddp": lambda s: {"upper": s.ddp_upper, "lower": s.ddp_lower},
    "module": lambda s: {},
    "parameters": lambda s: {"upper": list(s.ddp_upper.parameters()), "lower": list(s.ddp_lower.parameters())},
}


def through_ddp(name: str, levels: str, ddp: dict[str, bool]) -> float:
    alone, shared = Plain(), Called(**ddp)
    options = {"product": "reverse"} if hasattr(CASES[name].method, "product") else {}
    one = alone.optimizer(CASES[name], False, **options)
    many = shared.optimizer(CASES[name], dist.group.WORLD, **options, **LEVELS[levels](shared))
    for _ in range(3):
        batches = alone.batches(one.lower_batches)
        one.step(*batches)
        many.step(*map(part, batches))
    many.load_state_dict(many.state_dict())
    loss = shared.lower_loss(part(batches[-1]))  # outside a step it is DDP's own, which averages
    loss.backward()
    own = [p.grad.sum() for p in shared.lower.parameters() if p.grad is not None]
    assert dist.get_rank() == 0 or own
    values = shared.values()
    return max(float((x - values[n]).abs().max()) for n, x in alone.values().items())


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", ["bome", "emlc", "unrolled"])
def test_modules_in_ddp_are_those_inside(two: GroupOf, name: str, levels: str) -> None:
    assert max(two(through_ddp, name, levels, {})) < 1e-12


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_options_of_ddp_mean_nothing_to_a_step(two: GroupOf, option: str) -> None:
    assert max(two(through_ddp, "emlc", "module", {option: True})) < 1e-12


def said() -> list[list[str]]:
    """What is said with the default group told, not told, and refused."""
    told = []
    for group in (dist.group.WORLD, None, False):
        shared = Shared()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = shared.optimizer(CASES["bome"], group)
            optimizer.step(*map(part, shared.batches(1)))
            optimizer.step(*map(part, shared.batches(1)))
        assert (optimizer.processes is None) == (group is False)
        told.append([str(w.message) for w in caught])
    return told


def test_the_default_group_is_said_once(two: GroupOf) -> None:
    for explicit, default, off in two(said):
        assert explicit == off == []
        assert len(default) == 1
        assert "averages over the 2 processes of the default group" in default[0]


def refusals() -> list[str]:
    told = []
    rank = dist.get_rank()
    shared = Called()
    own = [dist.new_group([r]) for r in range(2)][rank]
    alone = nn.parallel.DistributedDataParallel(nn.Linear(1, 1, dtype=torch.float64), process_group=own)
    assert alone(torch.ones(1, 1, dtype=torch.float64)).shape == (1, 1)
    for group, options in ((False, {}), ("gloo", {}), (dist.GroupMember.NON_GROUP_MEMBER, {})):
        try:
            shared.optimizer(CASES["bome"], group, **options).step(*map(part, shared.batches(1)))
        except (TypeError, RuntimeError) as error:
            told.append(str(error))
    optimizer = shared.optimizer(CASES["bome"], dist.group.WORLD)
    try:
        optimizer.process_group = False
    except AttributeError as error:
        told.append(str(error))
    return told


def test_what_makes_no_sense_is_refused_by_name(two: GroupOf) -> None:
    for off, text, outside, later in two(refusals):
        assert "calls a module wrapped in DistributedDataParallel, but every process steps alone" in off
        assert "BOME(process_group=str): must be a group of torch.distributed" in text
        assert "does not contain this process" in outside
        assert "BOME(process_group=False): is fixed at construction" in later


def sharded() -> list[str]:
    from torch.distributed.fsdp import fully_shard

    told = []
    shared = Shared()
    calls = fully_shard(nn.Linear(4, 3, dtype=torch.float64))
    for changes in (
        {"lower": calls, "lower_optimizer": torch.optim.SGD(calls.parameters(), lr=0.1)},
        {"lower_loss": lambda batch: calls(batch[0]).sum()},
    ):
        try:
            shared.optimizer(CASES["emlc"], dist.group.WORLD, **changes).step(*map(part, shared.batches(1)))
        except (TypeError, RuntimeError) as error:
            told.append(str(error))
    return told


def test_sharded_modules_are_refused_by_name(two: GroupOf) -> None:
    for level, call in two(sharded):
        assert "EMLC(lower=FSDPModule): shards its parameters" in level
        assert "a loss calls a module wrapped in FSDPModule" in call


def traffic(name: str) -> tuple[int, int, int]:
    shared = Shared()
    optimizer = shared.optimizer(CASES[name], dist.group.WORLD, verify="never")
    batches = [part(b) for b in shared.batches(optimizer.lower_batches)]
    optimizer.step(*batches)
    optimizer.step(*batches)
    before = (optimizer.processes.traffic.reductions, optimizer.processes.traffic.bytes)
    optimizer.step(*batches)
    found = optimizer.processes.traffic
    size = 8 * sum(p.numel() for p in shared.lower.parameters()), 8 * sum(p.numel() for p in shared.upper.parameters())
    assert found.messages > 0
    return found.reductions - before[0], found.bytes - before[1], size[0] * 1000000 + size[1]


def test_bytes_are_counted(two: GroupOf) -> None:
    """BOME reduces three evaluations: both gradients of G, its upper one ahead, both of F; each with its value."""
    for reductions, given, sizes in two(traffic, "bome"):
        lower, upper = divmod(sizes, 1000000)
        assert reductions == 3
        assert given == 2 * (lower + upper) + upper + 3 * 8


def checked(name: str) -> str:
    shared = Shared()
    options = {"product": "reverse"} if hasattr(CASES[name].method, "product") else {}
    optimizer = shared.optimizer(CASES[name], dist.group.WORLD, **options)
    batches = [part(b) for b in shared.batches(optimizer.lower_batches)]
    optimizer.step(*batches)
    report = bilevel.check_directions(optimizer, *batches, samples=1)
    assert report.passed
    return str(report)


@pytest.mark.parametrize("name", ["bome", "unrolled", "soba"])
def test_check_directions_checks_the_mean(two: GroupOf, name: str) -> None:
    mine, theirs = two(checked, name)
    assert mine == theirs
    assert mine.startswith(f"{CASES[name].method.__name__}: passed")


class SyncBatchNorm(torch.autograd.Function):
    """What torch's module calls, without the accelerator that it needs: a backward that nothing differentiates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


@pytest.mark.parametrize(
    ("name", "options"), [("emlc", {"product": "reverse"}), ("unrolled-graph", {}), ("implicit", {}), ("soba", {})]
)
def test_synchronised_batch_norm_has_no_second_derivative(name: str, options: dict[str, Any]) -> None:
    shared = Shared()
    plain = shared.lower_loss
    changes = {"lower_loss": lambda batch: SyncBatchNorm.apply(plain(batch)), **options}
    optimizer = shared.optimizer(CASES[name], False, **changes)
    with pytest.raises(bilevel.ClosureError, match="SyncBatchNorm has none: its backward adds over processes"):
        optimizer.step(*shared.batches(optimizer.lower_batches))
