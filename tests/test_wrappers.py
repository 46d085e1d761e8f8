"""Wrapped modules, tensors and optimizers are refused by name, in every class, or warned about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel.wrappers import refuse_optimizer
from methods_table import CASES, Case, Problem

KINDS = {case.method: case for case in CASES.values()}
every_class = pytest.mark.parametrize("case", KINDS.values(), ids=[kind.__name__ for kind in KINDS])

WRAPPERS = [
    ("AcceleratedOptimizer", "accelerate.optimizer"),
    ("LightningOptimizer", "lightning.pytorch.core.optimizer"),
    ("LightningOptimizer", "pytorch_lightning.core.optimizer"),
    ("_FabricOptimizer", "lightning.fabric.wrappers"),
]


@pytest.mark.parametrize(("name", "module"), WRAPPERS)
@pytest.mark.parametrize("side", ["upper", "lower"])
@every_class
def test_a_wrapped_optimizer_is_refused_by_name(case: Case, side: str, name: str, module: str) -> None:
    problem = Problem()
    inner = getattr(problem, f"{side}_optimizer")
    # As Lightning does: a subclass of the optimizer's own class too, so that every isinstance check passes.
    wrapper = type(name, (type(inner),), {"__module__": module})
    seeming = type(f"Lightning{type(inner).__name__}", (wrapper,), {}).__new__(wrapper)
    seeming.__dict__.update(inner.__dict__)
    setattr(problem, f"{side}_optimizer", seeming)
    library = module.partition(".")[0]
    with pytest.raises(TypeError, match=rf"{side}_optimizer={name}\): is wrapped by {library}.*\.optimizer"):
        problem.optimizer(case)


def test_torchs_own_optimizers_are_not_wrapped() -> None:
    refuse_optimizer("BOME", "lower_optimizer", torch.optim.SGD([torch.ones(1, requires_grad=True)]))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def line(net: nn.Module, called: nn.Module, lower: Any) -> bilevel.BOME:
    a = torch.zeros((), requires_grad=True)
    x = torch.ones(3, 2)

    def loss(target: Any) -> Tensor:
        value: Tensor = (called(x) - target()).square().mean()
        return value

    return bilevel.BOME(
        lambda: loss(lambda: 1.0),
        lambda: loss(lambda: a),
        upper=a,
        lower=lower,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
    )


@pytest.mark.usefixtures("group")
def test_a_ddp_module_of_one_process_is_the_module_inside() -> None:
    """Whatever of it is ``lower=``, and whatever of it the loss calls; outside a step it is the user's."""
    moved = []
    for wrap in (False, True):
        for levels in (lambda d, n: d, lambda d, n: n, lambda d, n: list(d.parameters())):
            torch.manual_seed(0)
            net = nn.Linear(2, 1)
            ddp: nn.Module = nn.parallel.DistributedDataParallel(net) if wrap else net
            optimizer = line(net, ddp, levels(ddp, net))
            assert optimizer.step().upper_moved
            moved.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
            ddp(torch.ones(3, 2)).sum().backward()
    assert all(torch.equal(x, moved[0]) for x in moved)
    assert "weight" in optimizer.lower_names or optimizer.lower_names == ("0", "1")


@pytest.mark.usefixtures("group")
def test_sharded_tensors_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    net = nn.Linear(2, 1, bias=False)
    net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh, [Replicate()]))
    with pytest.raises(TypeError, match=r"lower=weight\): is a DTensor"):
        line(net, net, net)
