"""One checkpoint resumes all processes exactly; that of another number of them is refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bilevel
from group_of import GroupOf
from joined_batches import Shared, part
from methods_table import CASES


def noisy(shared: Shared) -> Any:
    """A lower loss with dropout, so that random states count."""
    plain = shared.lower_loss

    def loss(batch: Any) -> Tensor:
        value: Tensor = plain((nn.functional.dropout(batch[0], 0.3), batch[1]))
        return value

    return loss


def stopped_and_resumed(name: str) -> float:
    """Take five steps; take three, save to one file that process 0 writes, and take two more from it."""
    case, found = CASES[name], []
    for stops in (False, True):
        torch.manual_seed(dist.get_rank())
        shared = Shared()
        optimizer = shared.optimizer(case, dist.group.WORLD, lower_loss=noisy(shared))
        batches = [[part(b) for b in shared.batches(optimizer.lower_batches)] for _ in range(5)]
        for number, batch in enumerate(batches):
            if stops and number == 3:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                box = [file.getvalue() if dist.get_rank() == 0 else None]
                dist.broadcast_object_list(box, src=0)
                values = shared.values()
                torch.manual_seed(99)
                shared = Shared()
                for side, module in (("upper", shared.upper), ("lower", shared.lower)):
                    module.load_state_dict({n: values[f"{side}.{n}"] for n, _ in module.named_parameters()})
                optimizer = shared.optimizer(case, dist.group.WORLD, lower_loss=noisy(shared))
                optimizer.load_state_dict(torch.load(io.BytesIO(box[0]), weights_only=True))
            optimizer.step(*batch)
        found.append(shared.values())
    return max(float((x - found[1][n]).abs().max()) for n, x in found[0].items())


@pytest.mark.parametrize(
    "name",
    [
        "bome",
        "unrolled-graph",
        "implicit",
        *(pytest.param(n, marks=pytest.mark.thorough) for n in ("ebomlc-preview", "mlc", "saba", "f2sa-2", "pdbo")),
    ],
)
def test_a_resumed_run_goes_on(two: GroupOf, name: str) -> None:
    assert two(stopped_and_resumed, name) == [0.0, 0.0]


def another_number() -> list[str]:
    told = []
    shared = Shared()
    together, alone = (shared.optimizer(CASES["bome"], group) for group in (dist.group.WORLD, False))
    for optimizer, state in ((together, alone.state_dict()), (alone, together.state_dict())):
        try:
            optimizer.load_state_dict(state)
        except ValueError as error:
            told.append(str(error))
        optimizer.load_state_dict(state | {"processes": None})
    return told


def test_another_number_of_processes_is_refused(two: GroupOf) -> None:
    for to_two, to_one in two(another_number):
        assert "the state of 1 process(es), and here are 2" in to_two
        assert "the state of 2 process(es), and here are 1" in to_one


def refused_by_one() -> tuple[bool, str]:
    shared = Shared()
    optimizer = shared.optimizer(CASES["bome"], dist.group.WORLD)
    optimizer.step(*map(part, shared.batches(1)))
    state, told = optimizer.state_dict(), ""
    shared.lower_optimizer.param_groups[0]["lr"] = 0.3
    if dist.get_rank() == 1:
        state["method"] = "EMLC"
    try:
        optimizer.load_state_dict(state)
    except (ValueError, bilevel.ProcessError) as error:
        told = str(error)
    return shared.lower_optimizer.param_groups[0]["lr"] == 0.3, told


def test_what_one_refuses_is_loaded_by_none(two: GroupOf) -> None:
    for unchanged, told in two(refused_by_one):
        assert unchanged
        assert "is the state of another method" in told
