"""Wrapped modules, tensors and optimizers are refused by name, in every class, or warned about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel.wrappers import refuse_optimizer
from methods_table import CASES, Case, Problem

KINDS = {case.method: case for case in CASES.values()}
every_class = pytest.mark.parametrize("case", KINDS.values(), ids=[kind.__name__ for kind in KINDS])

REFUSED = [
    ("DeepSpeedOptimizerWrapper", "accelerate.utils.deepspeed"),
    ("LightningDeepSpeedOptimizer", "lightning.pytorch.strategies.deepspeed"),
    ("_FabricOptimizer", "lightning.fabric.wrappers"),
]
LIGHTNINGS = ["lightning.pytorch.core.optimizer", "pytorch_lightning.core.optimizer"]
sides = pytest.mark.parametrize("side", ["upper", "lower"])


@pytest.mark.parametrize(("name", "module"), REFUSED)
@sides
@every_class
def test_a_wrapped_optimizer_is_refused_by_name(case: Case, side: str, name: str, module: str) -> None:
    problem = Problem()
    inner = getattr(problem, f"{side}_optimizer")
    wrapper = type(name, (type(inner),), {"__module__": module})
    seeming = wrapper.__new__(wrapper)
    seeming.__dict__.update(inner.__dict__)
    setattr(problem, f"{side}_optimizer", seeming)
    library = module.partition(".")[0]
    with pytest.raises(TypeError, match=rf"{side}_optimizer={name}\): is wrapped by {library}.*\.optimizer"):
        problem.optimizer(case)


def lightning(inner: torch.optim.Optimizer, module: str = LIGHTNINGS[0], *, times: int = 1, scaler: Any = None) -> Any:
    """What stands for Lightning's wrapper: it counts its steps, each ``times`` of the optimizer inside."""

    class LightningOptimizer:
        optimizer = inner
        counted = 0
        _strategy = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))

        def step(self) -> None:
            type(self).counted += 1
            for _ in range(times):
                inner.step()

    LightningOptimizer.__module__ = module
    # As Lightning does: a subclass of the optimizer's own class too, so that every isinstance check passes.
    seeming = type(f"Lightning{type(inner).__name__}", (LightningOptimizer, type(inner)), {})
    return seeming.__new__(seeming)


def accelerated(inner: torch.optim.Optimizer, scaler: Any = None) -> Any:
    """What stands for Accelerate's wrapper between two synchronisations: it leaves its steps out."""

    class AcceleratedOptimizer(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.optimizer, self.scaler = inner, scaler

        def step(self) -> None:  # type: ignore[override]
            pass

    AcceleratedOptimizer.__module__ = "accelerate.optimizer"
    return AcceleratedOptimizer()


def moved(problem: Problem, case: Case) -> list[Tensor]:
    """The variables of both levels after two steps."""
    torch.manual_seed(0)
    optimizer = problem.optimizer(case)
    for _ in range(2):
        optimizer.step(*problem.batches())
    return [*optimizer.upper_level.tensors, *optimizer.lower_level.tensors]


@sides
@every_class
def test_accelerates_wrapper_is_taken_off(case: Case, side: str) -> None:
    expected = moved(Problem(), case)
    problem = Problem()
    setattr(problem, f"{side}_optimizer", accelerated(getattr(problem, f"{side}_optimizer")))
    assert all(map(torch.equal, moved(problem, case), expected))


@pytest.mark.parametrize("module", LIGHTNINGS)
@every_class
def test_lightnings_wrapper_sees_every_step(case: Case, module: str) -> None:
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    expected = moved(Problem(), case)
    problem = Problem()
    for side in ("upper", "lower"):
        inner = getattr(problem, f"{side}_optimizer")
        inner.register_step_post_hook(count)
        setattr(problem, f"{side}_optimizer", lightning(inner, module))
    upper, lower = problem.upper_optimizer, problem.lower_optimizer
    assert all(map(torch.equal, moved(problem, case), expected))
    assert upper.counted + lower.counted == steps > 0
    assert upper.counted == 2


@pytest.mark.parametrize("times", [0, 2])
def test_a_wrapper_that_does_not_step_once_is_found_out(times: int) -> None:
    problem = Problem()
    problem.upper_optimizer = lightning(problem.upper_optimizer, times=times)
    optimizer = problem.optimizer(CASES["bome"])
    with pytest.raises(RuntimeError, match=rf"upper_optimizer=LightningAdam\): stepped {times} times when asked once"):
        optimizer.step(*problem.batches())


@pytest.mark.parametrize("wrap", [lightning, accelerated])
def test_a_scaler_in_a_wrapper_is_refused(wrap: Callable[..., Any]) -> None:
    problem = Problem()
    problem.lower_optimizer = wrap(problem.lower_optimizer, scaler=object())
    with pytest.raises(TypeError, match=r"lower_optimizer=\w+\): divides by a GradScaler's scale.*bf16"):
        problem.optimizer(CASES["bome"])


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
