"""Hypergradients of other libraries, measured: relative errors against closed forms and central differences.

Each library solves the same small float64 problems through its public face. References: the Jacobian of k lower steps
of a quadratic problem, written as its linear recursion; the implicit-function formula; elsewhere fourth-order central
differences of real training runs with ``torch.optim``. A library that is not installed is skipped, and a line says so.

    python -m benchmarks.peers | tee docs/results/peers.txt
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel

Model = Callable[..., Tensor]  # a module, or what a library puts in its place
DISTRIBUTIONS = {"higher": "higher", "torchopt": "torchopt", "betty": "betty-ml", "hypertorch": None}
MODULES = {"higher": "higher", "torchopt": "torchopt", "betty": "betty", "hypertorch": "hg"}


@dataclass(frozen=True)
class Task:
    """Two losses of a model and of the upper variable, and where both start."""

    net: nn.Module
    alpha: Tensor
    lower: Callable[[Model, Tensor], Tensor]
    upper: Callable[[Model, Tensor], Tensor]


class Point(nn.Module):
    """A vector as a module: its output is its parameter."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        return self.w


PROBLEM = bilevel.problems.quadratic(seed=0)  # every part of it is a constant here
SIZE = len(PROBLEM.lower)


def quadratic(hessian: Tensor = PROBLEM.hessian, start: Tensor | None = None) -> Task:
    """The library's quadratic problem as losses of a module, with a Hessian of the lower loss of one's choice."""

    def lower(net: Model, alpha: Tensor) -> Tensor:
        w = net()
        return 0.5 * w @ hessian @ w - w @ (PROBLEM.coupling @ alpha + PROBLEM.offset)

    def upper(net: Model, alpha: Tensor) -> Tensor:
        miss = net() - PROBLEM.target
        away = alpha - PROBLEM.anchor
        return 0.5 * miss @ PROBLEM.upper_hessian @ miss + 0.5 * PROBLEM.weight * away.square().sum()

    alpha = PROBLEM.upper.detach().clone().requires_grad_()
    return Task(Point(PROBLEM.lower.detach() if start is None else start), alpha, lower, upper)


def network(middle: str) -> Task:
    """A classifier whose lower loss alpha weights by class: with BatchNorm, or with a ReLU unit that never fires."""
    torch.manual_seed(0)
    first = nn.Linear(4, 6)
    layers: list[nn.Module] = [nn.BatchNorm1d(6), nn.Tanh()] if middle == "BatchNorm" else [nn.ReLU()]
    if middle == "dead ReLU":
        first.bias.data[0] = -100.0  # the unit's weights get a gradient of exactly 0
    net = nn.Sequential(first, *layers, nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
    trusted_x, trusted_y = torch.randn(10, 4, dtype=torch.float64), torch.randint(3, (10,))
    return Task(
        net,
        torch.zeros(3, dtype=torch.float64, requires_grad=True),
        lambda model, alpha: (alpha.sigmoid()[y] * cross_entropy(model(x), y, reduction="none")).mean(),
        lambda model, alpha: cross_entropy(model(trusted_x), trusted_y),
    )


OPTIMIZERS: dict[str, tuple[str, dict[str, float]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "Adam": ("Adam", {"lr": 0.01}),
    "at rest": ("SGD", {"lr": 0.0}),
}


def torch_optimizer(net: nn.Module, kind: str) -> torch.optim.Optimizer:
    name, options = OPTIMIZERS[kind]
    made: torch.optim.Optimizer = getattr(torch.optim, name)(net.parameters(), **options)
    return made


# --- references ----------------------------------------------------------------------------------------------------


def closed_form(kind: str, steps: int) -> Tensor:
    """dF/dalpha of the quadratic after SGD steps: the linear recursion of w, of its Jacobian, and of their buffers."""
    rate, momentum = OPTIMIZERS[kind][1]["lr"], OPTIMIZERS[kind][1].get("momentum", 0.0)
    alpha, w, jacobian = PROBLEM.upper.detach(), PROBLEM.lower.detach(), torch.zeros_like(PROBLEM.coupling)
    w_buffer, j_buffer = torch.zeros_like(w), torch.zeros_like(jacobian)
    for _ in range(steps):
        w_buffer = momentum * w_buffer + PROBLEM.hessian @ w - PROBLEM.coupling @ alpha - PROBLEM.offset
        j_buffer = momentum * j_buffer + PROBLEM.hessian @ jacobian - PROBLEM.coupling
        w, jacobian = w - rate * w_buffer, jacobian - rate * j_buffer
    through: Tensor = jacobian.T @ PROBLEM.upper_hessian @ (w - PROBLEM.target)
    return through + PROBLEM.weight * (alpha - PROBLEM.anchor)


def optimum(hessian: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve(hessian, PROBLEM.coupling @ PROBLEM.upper.detach() + PROBLEM.offset)
    return found


def implicit_form(hessian: Tensor) -> Tensor:
    """dF/dalpha at the lower minimum: ``B^T H^-1 P (w* - t) + r (alpha - s)``."""
    through = torch.linalg.solve(hessian, PROBLEM.upper_hessian @ (optimum(hessian) - PROBLEM.target))
    pulled: Tensor = PROBLEM.coupling.T @ through
    return pulled + PROBLEM.weight * (PROBLEM.upper.detach() - PROBLEM.anchor)


def central_difference(task: Task, kind: str, steps: int, size: float = 1e-4) -> Tensor:
    """Fourth-order differences of F after real training with ``torch.optim``."""

    def trained(shift: Tensor) -> Tensor:
        net, alpha = copy.deepcopy(task.net), task.alpha.detach() + shift
        optimizer = torch_optimizer(net, kind)
        for _ in range(steps):
            optimizer.zero_grad()
            task.lower(net, alpha).backward()
            optimizer.step()
        return task.upper(net, alpha).detach()

    slopes = []
    for unit in torch.eye(len(task.alpha), dtype=torch.float64):
        near, far = (trained(n * size * unit) - trained(-n * size * unit) for n in (1, 2))
        slopes.append((8 * near - far) / (12 * size))
    return torch.stack(slopes)


# --- through k lower steps -----------------------------------------------------------------------------------------


def of_bilevel(method: Any, task: Task, kind: str, **options: Any) -> bilevel.BilevelOptimizer:
    made: bilevel.BilevelOptimizer = method(
        lambda: task.upper(task.net, task.alpha),
        lambda: task.lower(task.net, task.alpha),
        upper=task.alpha,
        lower=task.net,
        upper_optimizer=torch.optim.SGD([task.alpha], lr=1.0),
        lower_optimizer=torch_optimizer(task.net, kind),
        **options,
    )
    return made


def by_bilevel(task: Task, kind: str, steps: int, mode: str = "adjoint") -> Tensor:
    return of_bilevel(bilevel.Unrolled, task, kind, inner_steps=steps, differentiate=mode).directions().upper["0"]


def by_higher(task: Task, kind: str, steps: int) -> Tensor:
    higher = importlib.import_module("higher")
    with higher.innerloop_ctx(task.net, torch_optimizer(task.net, kind)) as (model, optimizer):
        for _ in range(steps):
            optimizer.step(task.lower(model, task.alpha))
        return torch.autograd.grad(task.upper(model, task.alpha), task.alpha)[0]


def by_torchopt(task: Task, kind: str, steps: int, **extraction: Any) -> Tensor:
    torchopt = importlib.import_module("torchopt")
    name, options = OPTIMIZERS[kind]
    optimizer = getattr(torchopt, f"Meta{name}")(task.net, **options)
    before = torchopt.extract_state_dict(task.net, **extraction)
    for _ in range(steps):
        optimizer.step(task.lower(task.net, task.alpha))
    found = torch.autograd.grad(task.upper(task.net, task.alpha), task.alpha)[0]
    torchopt.recover_state_dict(task.net, before)
    return found


UNROLLED: dict[str, Callable[[Task, str, int], Tensor]] = {
    "bilevel": by_bilevel,
    "bilevel, graph": lambda task, kind, steps: by_bilevel(task, kind, steps, "graph"),
    "higher": by_higher,
    "torchopt": by_torchopt,
}


# --- implicit differentiation --------------------------------------------------------------------------------------


def implicit_bilevel(task: Task, iterations: int) -> Tensor:
    solver = bilevel.ConjugateGradient(iterations=iterations, tolerance=1e-12)
    return of_bilevel(bilevel.Implicit, task, "SGD", inner_steps=0, solver=solver).directions().upper["0"]


def implicit_torchopt(task: Task, iterations: int) -> Tensor:
    torchopt = importlib.import_module("torchopt")
    stationary = torch.func.grad(lambda w, alpha: task.lower(lambda: w, alpha))
    solver = torchopt.linear_solve.solve_cg(maxiter=iterations, rtol=1e-12)
    root = torchopt.diff.implicit.custom_root(stationary, argnums=1, solve=solver)
    w = root(lambda w, alpha: w)(task.net().detach(), task.alpha)
    return torch.autograd.grad(task.upper(lambda: w, task.alpha), task.alpha)[0]


def implicit_betty(task: Task, iterations: int) -> Tensor:
    return by_betty(task, rate=0.0, type="cg", cg_iterations=iterations)


def by_betty(task: Task, rate: float, unroll: int = 1, **config: Any) -> Tensor:
    """One upper step of Betty's engine after ``unroll`` lower ones; an upper rate of 1 shows the hypergradient."""
    problems, configs = importlib.import_module("betty.problems"), importlib.import_module("betty.configs")
    engine = importlib.import_module("betty.engine")

    class Upper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(task.alpha.detach().clone())

    class Outer(problems.ImplicitProblem):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            return task.upper(self.inner.module, self.module.alpha)

    class Inner(problems.ImplicitProblem):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            return task.lower(self.module, self.outer.module.alpha)

    upper, batches = Upper(), [(torch.zeros(1),)]
    lower_optimizer = torch.optim.SGD(task.net.parameters(), lr=rate)
    # Without retain_graph its second pass through an upper loss that reads alpha itself finds the graph freed.
    config_of_outer = configs.Config(retain_graph=True)
    outer = Outer("outer", config_of_outer, upper, torch.optim.SGD(upper.parameters(), lr=1.0), None, batches)
    inner = Inner("inner", configs.Config(unroll_steps=unroll, **config), task.net, lower_optimizer, None, batches)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        engine.Engine(
            problems=[outer, inner],
            config=configs.EngineConfig(train_iters=unroll),
            dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        ).run()
    return task.alpha.detach() - upper.alpha.detach()


def implicit_hypertorch(task: Task, iterations: int) -> Tensor:
    """Its conjugate gradient alone, in the formula."""
    w, alpha = task.net().detach().requires_grad_(), task.alpha
    slope, direct = torch.autograd.grad(task.upper(lambda: w, alpha), (w, alpha))
    (g,) = torch.autograd.grad(task.lower(lambda: w, alpha), w, create_graph=True)
    solve = importlib.import_module("hg.CG_torch").cg
    p = solve(lambda v: torch.autograd.grad(g, w, v[0], retain_graph=True), [slope], max_iter=iterations)
    return direct - torch.autograd.grad(g, alpha, p[0])[0]


IMPLICIT: dict[str, Callable[[Task, int], Tensor]] = {
    "bilevel": implicit_bilevel,
    "torchopt": implicit_torchopt,
    "betty": implicit_betty,
    "hypertorch": implicit_hypertorch,
}


# --- what a hypergradient leaves behind ----------------------------------------------------------------------------

STEPS = 3
# Real lower steps that the call takes, at rate 0 so that weights should stay, and the call.
SIDE_EFFECTS: dict[str, tuple[int, Callable[[Task], object]]] = {
    "bilevel Unrolled.directions": (0, lambda task: by_bilevel(task, "SGD", STEPS)),
    "bilevel Unrolled.step": (1, lambda task: of_bilevel(bilevel.Unrolled, task, "at rest", inner_steps=STEPS).step()),
    "bilevel Implicit.step": (STEPS, lambda t: of_bilevel(bilevel.Implicit, t, "at rest", inner_steps=STEPS).step()),
    "higher": (0, lambda task: by_higher(task, "SGD", STEPS)),
    "torchopt": (0, lambda task: by_torchopt(task, "SGD", STEPS)),
    "torchopt, detach_buffers=True": (0, lambda task: by_torchopt(task, "SGD", STEPS, detach_buffers=True)),
    "betty neumann": (STEPS, lambda task: by_betty(task, 0.0, STEPS, type="neumann")),
    "betty cg": (STEPS, lambda task: by_betty(task, 0.0, STEPS, type="cg", cg_iterations=5)),
    "betty darts": (STEPS, lambda task: by_betty(task, 0.0, STEPS, type="darts")),
}


# --- tables --------------------------------------------------------------------------------------------------------


def available(name: str) -> bool:
    """Whether the library that a column or row is named after is there."""
    library = name.split()[0].rstrip(",")
    return library == "bilevel" or importlib.util.find_spec(MODULES[library]) is not None


def error_of(found: Callable[[], Tensor], expected: Tensor) -> str:
    """The relative error, or in one word why there is none."""
    try:
        value = found()
    except Exception as problem:  # whatever a library raises is its result
        return type(problem).__name__
    return f"{((value - expected).norm() / expected.norm()).item():.1e}"


def print_row(name: str, cells: list[str]) -> None:
    print(f"{name:<40}" + "".join(f"{cell:>16}" for cell in cells))


def print_unrolled() -> None:
    names = [name for name in UNROLLED if available(name)]
    print("Relative error of the hypergradient through k lower steps")
    print_row("problem, lower optimizer", names)
    for kind, steps in (("SGD", 1), ("SGD", 10), ("momentum", 10)):
        expected = closed_form(kind, steps)
        cells = [error_of(partial(UNROLLED[name], quadratic(), kind, steps), expected) for name in names]
        print_row(f"quadratic, {kind}, k = {steps}", cells)
    for middle, kind in (("BatchNorm", "SGD"), ("BatchNorm", "momentum"), ("BatchNorm", "Adam"), ("dead ReLU", "Adam")):
        expected = central_difference(network(middle), kind, STEPS)
        cells = [error_of(partial(UNROLLED[name], network(middle), kind, STEPS), expected) for name in names]
        print_row(f"network with {middle}, {kind}, k = {STEPS}", cells)


def print_implicit() -> None:
    names = [name for name in IMPLICIT if available(name)]
    print("Relative error of the implicit hypergradient at the lower minimum, by conjugate gradients")
    print_row("Hessian, iterations allowed", names)
    hessians = {"4 eigenvalues": PROBLEM.hessian, "2 I": 2.0 * torch.eye(SIZE, dtype=torch.float64)}
    for text, iterations in (("4 eigenvalues", 4), ("4 eigenvalues", 20), ("2 I", 1), ("2 I", 4), ("2 I", 20)):
        hessian = hessians[text]
        expected, start = implicit_form(hessian), optimum(hessian)
        cells = [error_of(partial(IMPLICIT[name], quadratic(hessian, start), iterations), expected) for name in names]
        print_row(f"{text}, {iterations}", cells)


def print_side_effects() -> None:
    print(
        f"What one upper update with k = {STEPS} leaves in a network with BatchNorm; lower steps that are real: rate 0"
    )
    print_row("", ["real steps", "buffer updates", "moved weights"])
    for name, (real_steps, take) in SIDE_EFFECTS.items():
        if not available(name):
            continue
        task = network("BatchNorm")
        before = {key: value.detach().clone() for key, value in task.net.state_dict().items()}
        take(task)
        after = task.net.state_dict()
        variables = [key for key, _ in network("BatchNorm").net.named_parameters()]
        weights = max((after[key] - before[key]).abs().max().item() for key in variables)
        updates = after["1.num_batches_tracked"].item()
        print_row(name, [str(real_steps), str(updates), f"{weights:.1e}"])


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, bilevel {bilevel.__version__}, CPU, float64")
    for name, distribution in DISTRIBUTIONS.items():
        if not available(name):
            print(f"{name}: not installed, skipped")
        elif distribution is not None:
            print(f"{name}: {distribution} {importlib.metadata.version(distribution)}")
        else:
            print(f"{name}: no release, the file that was found")
    for table in (print_unrolled, print_implicit, print_side_effects):
        print()
        table()


if __name__ == "__main__":
    main()
