"""Barrier methods on parameters that ``fully_shard`` spreads over processes: the numbers of whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import bilevel
from group_of import GroupOf
from joined_batches import Shared, part
from methods_table import CASES


class Whole(Shared):
    """The same losses, through whole modules: FSDP gathers parameters around a module's forward."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        self.rebuild()

    def rebuild(self) -> None:
        self.upper_optimizer = torch.optim.Adam(self.upper.parameters(), lr=1e-2)
        self.lower_optimizer = torch.optim.SGD(self.lower.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)

    def upper_loss(self, batch: Any) -> Tensor:
        x, label = batch
        logits = self.lower(x)
        return -(label * (0.3 * logits.softmax(1) + 0.7 * self._given(logits.detach(), label)).log()).sum(1).mean()

    def lower_loss(self, batch: Any) -> Tensor:
        x, label = batch
        logits = self.lower(x)
        return nn.functional.cross_entropy(logits, self._given(bilevel.hold(logits.detach()), label))

    def _given(self, logits: Tensor, label: Tensor) -> Tensor:
        found: Tensor = self.upper(torch.cat([logits, logits, logits[:, :2], label], 1)).softmax(1)
        return found


class Sharded(Whole):
    """The same with shards of the lower network, or of both."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, both: bool = False) -> None:
        super().__init__(dtype)
        for network in (self.lower, *([self.upper] if both else [])):
            for layer in (network[0], network[2]):
                fully_shard(layer)
            fully_shard(network)
        self.rebuild()

    def values(self) -> dict[str, Tensor]:
        found = super().values()
        return {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in found.items()}


def apart(name: str, options: dict[str, Any], both: bool, dtype: torch.dtype = torch.float64) -> float:
    alone, shared = Whole(dtype), Sharded(dtype, both=both)
    one = alone.optimizer(CASES[name], False, **options)
    many = shared.optimizer(CASES[name], dist.group.WORLD, **options)
    for _ in range(4):
        batches = alone.batches(one.lower_batches)
        mine, ours = one.step(*batches), many.step(*map(part, batches))
        assert torch.allclose(mine.multiplier, ours.multiplier, rtol=1e-4)
    found = many.directions(*map(part, batches))
    many.apply(found)
    one.apply(one.directions(*batches))
    values = shared.values()
    return max(float((x - values[n]).abs().max()) for n, x in alone.values().items())


@pytest.mark.parametrize("both", [False, True], ids=["lower", "both"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bome", {}),
        ("ebomlc", {}),
        pytest.param("bome-3", {}, marks=pytest.mark.thorough),
        pytest.param("bome-value", {"verify": "always"}, marks=pytest.mark.thorough),
        pytest.param("bome-difference", {}, marks=pytest.mark.thorough),
        pytest.param("bome-preview", {}, marks=pytest.mark.thorough),
        pytest.param("bome-inner", {}, marks=pytest.mark.thorough),
        pytest.param("bome-capped", {"verify": "never"}, marks=pytest.mark.thorough),
    ],
)
def test_barrier_methods_on_shards(two: GroupOf, name: str, options: dict[str, Any], both: bool) -> None:
    assert max(two(apart, name, options, both)) < 1e-12


def test_barrier_methods_on_shards_in_float32(two: GroupOf) -> None:
    assert max(two(apart, "bome", {}, False, torch.float32)) < 1e-6


def in_micro_batches() -> float:
    alone, shared = Whole(), Sharded()
    one = alone.optimizer(CASES["bome"], False)
    many = shared.optimizer(CASES["bome"], dist.group.WORLD)
    for _ in range(3):
        batches = alone.batches(1)
        one.step(*batches)
        many.step(*map(part, batches), microbatches=3)
    values = shared.values()
    return max(float((x - values[n]).abs().max()) for n, x in alone.values().items())


def test_shards_in_micro_batches(two: GroupOf) -> None:
    assert max(two(in_micro_batches)) < 1e-12


def one_fails() -> tuple[str, bool]:
    """An error after the forward of one process; what has not moved goes on."""
    shared = Sharded()
    calls = [0]
    plain = shared.upper_loss

    def loss(batch: Any) -> Tensor:
        value: Tensor = plain(batch)
        calls[0] += 1
        if calls[0] == 4 and dist.get_rank() == 1:
            raise KeyError("after the forward")
        return value

    optimizer = shared.optimizer(CASES["bome"], dist.group.WORLD, upper_loss=loss, verify="never")
    batches = [part(b) for b in shared.batches(1)]
    told = ""
    for _ in range(6):
        before = shared.values()
        try:
            optimizer.step(*batches)
        except (KeyError, bilevel.ProcessError) as error:
            told = str(error)
            assert all(torch.equal(x, before[n]) for n, x in shared.values().items())
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.step(*batches)
    return told, all(p.grad is None or p.grad.isfinite().all() for p in shared.lower.parameters())


def test_an_error_of_one_process_changes_no_shard(two: GroupOf) -> None:
    (mine, one), (theirs, other) = two(one_fails)
    assert one
    assert other
    assert "process 1 raised KeyError" in mine
    assert theirs == "'after the forward'"


def refusals() -> list[str]:
    told = []
    for name, options in (
        ("bome-unrolled", {}),
        ("unrolled", {}),
        ("emlc", {}),
        ("vpbgd", {}),
        ("bome", {"process_group": False}),
        ("bome", {"lower": "parameters"}),
    ):
        shared = Sharded()
        if "lower" in options:
            options = {"lower": list(shared.lower.parameters())}
        try:
            options = {"process_group": dist.group.WORLD} | options
            optimizer = CASES[name].method(
                shared.upper_loss,
                shared.lower_loss,
                **{
                    "upper": shared.upper,
                    "lower": shared.lower,
                    "upper_optimizer": shared.upper_optimizer,
                    "lower_optimizer": shared.lower_optimizer,
                }
                | dict(CASES[name].options)
                | options,
            )
            optimizer.step(*map(part, shared.batches(1)))
        except (TypeError, RuntimeError) as error:
            told.append(str(error))
    shared = Sharded()
    try:
        bilevel.check_directions(shared.optimizer(CASES["bome"], dist.group.WORLD), *map(part, shared.batches(1)))
    except TypeError as error:
        told.append(str(error))
    return told


def test_what_shards_cannot_serve_is_refused_by_name(two: GroupOf) -> None:
    for told in two(refusals):
        products, unrolled, emlc, vpbgd, alone, parameters, checked = told
        assert "takes second derivatives, which fully_shard has none of" in products
        assert all(
            "shards its parameters over processes, of which only BOME" in text for text in (unrolled, emlc, vpbgd)
        )
        assert "is sharded over another mesh than the processes that step together" in alone
        assert "is a DTensor, a share of a parameter, outside of a module of fully_shard" in parameters
        assert "check_directions: variables are sharded" in checked
