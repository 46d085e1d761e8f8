"""What the ported tutorials of Betty and TorchOpt cost, beside the same programs on those libraries' public faces.

The ports are ``examples/loops/from_betty.py`` and ``from_torchopt.py``. The programs here were written from the public
interfaces, with the data, bounds and settings of the tutorials. Programs take turns in one process, on one thread, each
built anew every turn. Before any time is taken, numbers that must agree are compared. A library that is not installed
is skipped, and a line says so. Betty 0.2.1 declares Python below 3.11 and runs on 3.11 nevertheless:

    pip install torchopt && pip install --ignore-requires-python betty-ml==0.2.1
    python -m benchmarks.ports | tee docs/results/ports.txt
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel
from examples.loops import from_betty, from_torchopt

from .peers import DISTRIBUTIONS, available
from .timing import median_of, ratios, take_turns

UNROLL = 100
Learned = tuple[list[float], Tensor]  # the validation loss of every upper step, and the strengths at the end


# --- logistic regression, a strength for each feature --------------------------------------------------------------


def logistic_data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The draws of the port, in its order."""
    torch.manual_seed(0)
    x = torch.randn(1000, 20)
    y = (x @ torch.randn(20) + 0.1 * torch.randn(1000) > 0).float()
    return (x[:500], y[:500]), (x[500:], y[500:])


def regularised(w: Tensor, strength: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return binary_cross_entropy_with_logits(batch[0] @ w, batch[1]) + 0.5 * (strength * w.square()).sum()


def logistic_betty(steps: int) -> Learned:
    """Two problems and an engine; the hypergradient is Betty's default, a finite difference at the last weights."""
    problems, configs = importlib.import_module("betty.problems"), importlib.import_module("betty.configs")
    engine = importlib.import_module("betty.engine")
    train, valid = logistic_data()
    losses: list[float] = []

    class Strength(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strength = nn.Parameter(torch.ones(20))

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(20))

    class Outer(problems.ImplicitProblem):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            loss = binary_cross_entropy_with_logits(batch[0] @ self.inner.module.w, batch[1])
            losses.append(loss.item())
            return loss

        def param_callback(self) -> None:
            self.module.strength.data.clamp_(min=1e-8)

    class Inner(problems.ImplicitProblem):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            return regularised(self.module.w, self.outer.module.strength, batch)

        def on_inner_loop_start(self) -> None:
            self.module.w.data.zero_()

    upper, lower = Strength(), Weight()
    upper_optimizer = torch.optim.SGD(upper.parameters(), lr=1.0, momentum=0.9)
    lower_optimizer = torch.optim.SGD(lower.parameters(), lr=0.1)
    outer = Outer("outer", configs.Config(), upper, upper_optimizer, None, [valid])
    inner = Inner("inner", configs.Config(type="darts", unroll_steps=UNROLL), lower, lower_optimizer, None, [train])
    engine.Engine(
        problems=[outer, inner],
        config=configs.EngineConfig(train_iters=UNROLL * steps),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    ).run()
    return losses, upper.strength.detach()


def logistic_sama(steps: int, **options: Any) -> Learned:
    """The formula of Betty's default in this library: the same number of passes."""
    train, valid = logistic_data()
    w, strength = nn.Parameter(torch.zeros(20)), nn.Parameter(torch.ones(20))
    optimizer = bilevel.SAMA(
        lambda batch: binary_cross_entropy_with_logits(batch[0] @ w, batch[1]),
        lambda batch: regularised(w, strength, batch),
        upper=strength,
        lower=w,
        upper_optimizer=torch.optim.SGD([strength], lr=1.0, momentum=0.9),
        lower_optimizer=torch.optim.SGD([w], lr=0.1),
        inner_steps=UNROLL,
        radius=0.01,
        **options,
    )
    losses = []
    for _ in range(steps):
        w.data.zero_()
        losses.append(optimizer.step(valid, train).upper_loss.item())
        strength.data.clamp_(min=1e-8)
    return losses, strength.detach()


# --- a differentiable step -----------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """``a x^2``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x**2


def step_torchopt() -> Tensor:
    torchopt = importlib.import_module("torchopt")
    net, x = Scaled(), torch.tensor(2.0, requires_grad=True)
    optimizer = torchopt.MetaSGD(net, lr=1.0)
    optimizer.step(net(x))
    net(x).backward()
    assert x.grad is not None
    return x.grad


def again_torchopt() -> Callable[[], Tensor]:
    """The same hypergradient once more, with everything built and the network put back."""
    torchopt = importlib.import_module("torchopt")
    net, x = Scaled(), torch.tensor(2.0, requires_grad=True)
    optimizer = torchopt.MetaSGD(net, lr=1.0)
    before = [torchopt.extract_state_dict(part) for part in (net, optimizer)]

    def once() -> Tensor:
        optimizer.step(net(x))
        found = torch.autograd.grad(net(x), x)[0]
        for part, state in zip((net, optimizer), before, strict=True):
            torchopt.recover_state_dict(part, state)
        return found

    return once


def again_bilevel() -> Callable[[], Tensor]:
    a, x = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    optimizer = bilevel.Unrolled(
        lambda: a * x**2,
        lambda: a * x**2,
        upper=x,
        lower=a,
        upper_optimizer=torch.optim.SGD([x], lr=0.1),
        lower_optimizer=torch.optim.SGD([a], lr=1.0),
    )
    return lambda: optimizer.directions().upper["0"]


# --- by turns ------------------------------------------------------------------------------------------------------


def quiet(call: Callable[[], object]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        call()


def compare(programs: dict[str, Callable[[], object]], rounds: int, unit: str, parts: int = 1) -> None:
    """Time the programs by turns; ``parts`` is what one run is divided by. The last one is what the others are over."""
    calls: dict[str, Callable[[int], object]] = {
        name: partial(lambda call, turn: quiet(call), program) for name, program in programs.items()
    }
    times = {
        name: [turn.wall for turn in turns] for name, turns in take_turns(calls, rounds, wait=lambda: None).items()
    }
    *others, there = times
    print(f"  {f'milliseconds {unit}':<40}{'median':>9}{'quartiles':>18}    ratio to the last, median and interval")
    for name, walls in times.items():
        first, median, third = (f"{1e3 * value / parts:.3f}" for value in statistics.quantiles(walls, n=4))
        ratio = ""
        if name in others:
            found = median_of(ratios(walls, times[there]))
            ratio = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
        print(f"  {name:<40}{median:>9}{first:>9}{third:>9}    {ratio}".rstrip())


def compare_logistic(rounds: int, steps: int) -> None:
    programs: dict[str, Callable[[], Learned]] = {
        "port, Unrolled": partial(from_betty.main, steps),
        "SAMA(radius=0.01)": partial(logistic_sama, steps),
        "the same without its safety": partial(logistic_sama, steps, on_nonfinite="ignore", atomic=False),
        "Betty, type='darts'": partial(logistic_betty, steps),
    }
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        learned = {name: program() for name, program in programs.items()}
    _, *alike, (betty, theirs) = learned.values()
    for losses, strength in alike:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(betty), rtol=1e-3, atol=0.0)
        torch.testing.assert_close(strength, theirs, rtol=1e-2, atol=1e-3)
    print(f"Logistic regression: {steps} upper steps, {UNROLL} lower ones each; {rounds} rounds")
    for name, (losses, _) in learned.items():
        print(f"  {name:<40}validation loss {losses[0]:.4f} at first, {losses[-1]:.4f} at the last step")
    compare(dict(programs), rounds, "an upper step", steps)


def compare_step(rounds: int) -> None:
    once_here, once_there = again_bilevel(), again_torchopt()
    for found in (from_torchopt.main, step_torchopt, once_here, once_there, once_here, once_there):
        with contextlib.redirect_stdout(io.StringIO()):
            assert found().item() == -28.0
    print(f"A differentiable step: {rounds} rounds")
    compare({"port, built anew": from_torchopt.main, "TorchOpt, built anew": step_torchopt}, rounds, "a run")
    compare({"port, once more": once_here, "TorchOpt, once more": once_there}, rounds, "a hypergradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of the logistic regression; the step takes 20 times it")
    parser.add_argument("--steps", type=int, default=10, help="upper steps of the logistic regression")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, bilevel {bilevel.__version__}, CPU, one thread")
    for name, run in (
        ("betty", partial(compare_logistic, options.rounds, options.steps)),
        ("torchopt", partial(compare_step, 20 * options.rounds)),
    ):
        if not available(name):
            print(f"{name}: not installed, skipped")
            continue
        print(f"\n{name}: {DISTRIBUTIONS[name]} {importlib.metadata.version(str(DISTRIBUTIONS[name]))}")
        run()


if __name__ == "__main__":
    main()
