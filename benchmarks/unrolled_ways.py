"""Memory and time of the ways to differentiate k lower steps: ``python -m benchmarks.unrolled_ways``.

Graph, adjoint, adjoint with sqrt(k) checkpoints and forward mode, of one problem: four upper numbers (rate and momentum
of two parameter groups of momentum SGD) on a perceptron 784-256-256-10. *Memory* is the peak of one ``directions()``
above what stays between steps, over the bytes of the perceptron's parameters. *Time* is that of ``directions()`` over
k plain steps of the perceptron, of the same round: all take turns. All ways must give the same direction to 1e-8 in
float64.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from benchmarks.memory import peak_bytes
from benchmarks.timing import median_of, ratios, take_turns

WAYS: dict[str, dict[str, Any]] = {
    "graph": {"differentiate": "graph"},
    "adjoint": {"differentiate": "adjoint"},
    "adjoint, sqrt": {"differentiate": "adjoint", "checkpoints": "sqrt"},
    "forward": {"differentiate": "forward"},
}
SIZE = 100


class Problem:
    """The perceptron, random batches, and an optimizer for each way."""

    def __init__(self, widths: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs, dtype=dtype), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1])
        self.batches = [
            (torch.randn(SIZE, widths[0], dtype=dtype), torch.randint(widths[-1], (SIZE,))) for _ in range(2)
        ]
        self.raw = nn.Parameter(torch.tensor([-3.0, -3.0, 1.0, 1.0], dtype=dtype))
        half = len(layers) // 4 * 2
        groups = [{"params": list(part.parameters())} for part in (self.net[:half], self.net[half:])]
        self.sgd = torch.optim.SGD(groups, lr=0.05, momentum=0.7)
        self.plain_step(0)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def plain_step(self, _: int) -> None:
        self.sgd.zero_grad()
        self.loss(self.batches[0]).backward()
        self.sgd.step()

    def directions(self, steps: int, **way: Any) -> Callable[[int], Tensor]:
        optimizer = bilevel.Unrolled(
            self.loss,
            self.loss,
            upper=self.raw,
            lower=self.net,
            upper_optimizer=torch.optim.Adam([self.raw], lr=0.1),
            lower_optimizer=self.sgd,
            inner_steps=steps,
            lower_hyperparameters=lambda: [
                {"lr": self.raw[i].exp(), "momentum": self.raw[2 + i].sigmoid()} for i in (0, 1)
            ],
            verify="never",
            **way,
        )
        return lambda _: optimizer.directions(self.batches[1], self.batches[0]).upper["0"]

    def resident(self) -> list[Tensor]:
        states = [x for state in self.sgd.state.values() for x in state.values() if isinstance(x, Tensor)]
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        return [*self.net.parameters(), *grads, *states, *self.batches[0][:1], *self.batches[1][:1], self.raw]


def measured(widths: Sequence[int], steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return memory and time of each way."""
    exact = Problem(widths, torch.float64)
    found = [exact.directions(min(steps, 8), **way)(0) for way in WAYS.values()]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-10)
    problem, cpu = Problem(widths), torch.device("cpu")
    resident = problem.resident()
    own, before = sum(p.nbytes for p in problem.net.parameters()), sum(x.nbytes for x in resident)
    calls = {name: problem.directions(steps, **way) for name, way in WAYS.items()}
    rows = {
        name: {"memory": (peak_bytes(lambda call=call: call(0), resident, cpu) - before) / own}  # type: ignore[misc]
        for name, call in calls.items()
    }

    def plainly(turn: int) -> None:
        for _ in range(steps):
            problem.loss(problem.batches[0]).backward()

    times = take_turns({**calls, "plain": plainly}, rounds, wait=lambda: None, warm_up=1)
    plain = [t.processor for t in times.pop("plain")]
    for name, each in times.items():
        middle = median_of(ratios([t.processor for t in each], plain))
        rows[name] |= {"time": middle.value, "time low": middle.low, "time high": middle.high}
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print and return the table, and write it to a file."""
    parser = argparse.ArgumentParser(description="Memory and time of the ways to differentiate k lower steps.")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/unrolled_ways.json"))
    parser.add_argument("--smoke", action="store_true", help="a tiny perceptron and few rounds: seconds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    widths = (20, 30, 30, 10) if options.smoke else (784, 256, 256, 10)
    steps, rounds = (
        options.steps or ([1, 9] if options.smoke else [1, 4, 16, 64]),
        3 if options.smoke else options.rounds,
    )
    found: dict[str, Any] = {str(k): measured(widths, k, rounds) for k in steps}
    print(
        f"torch {torch.__version__}, {'-'.join(map(str, widths))}, batch {SIZE}; memory in copies of w, time in plain k"
    )
    for k, rows in found.items():
        shown = "; ".join(f"{name} {row['memory']:.1f}, {row['time']:.2f}" for name, row in rows.items())
        print(f"k = {k}: {shown}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"torch": torch.__version__, "widths": widths, "ways": found}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
