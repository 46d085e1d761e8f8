"""Few-shot adaptation, MAML on sinusoids: ``python -m examples.maml_sinusoids``.

A task is ``y = a sin(x - p)`` with its own a and p, of which ten points are seen. The upper variables are a network
from which one gradient step on those ten points leads to a good fit of ten others. So the lower variables are no
variables of their own: they start at the upper ones, ``start=``, and take one step. Four tasks are averaged per upper
step, through ``directions``, ``bilevel.Directions.mean`` and ``apply``.

The known answer: no network that does not adapt can have a mean squared error below 3.01, because the best fixed
function is the mean of all tasks, ``-5.1/pi cos(x)``.

Measured on 100 new tasks, mean of seeds 1 to 3 (91 s of one CPU core): error 3.43 before adaptation, 0.69 after the one
step that was trained for, 0.19 after ten.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bilevel

Batch = tuple[Tensor, Tensor]
FLOOR = 3.0057  # (E a^2) / 2 - (2 E a / pi)^2 E cos(x)^2, for a in [0.1, 5], p in [0, pi], x in [-5, 5]
RATE = 0.02  # of the step that adapts


class Task:
    """A sinusoid with ten points to learn from and ten to be judged by."""

    def __init__(self, generator: torch.Generator) -> None:
        amplitude, phase = torch.rand(2, generator=generator).tolist()
        self.amplitude, self.phase = 0.1 + 4.9 * amplitude, torch.pi * phase
        x = 10 * torch.rand(20, 1, generator=generator) - 5
        self.seen: Batch = (x[:10], self.value(x[:10]))
        self.others: Batch = (x[10:], self.value(x[10:]))

    def value(self, x: Tensor) -> Tensor:
        """Return the sinusoid at x."""
        return torch.sin(x - self.phase).mul(self.amplitude)


def network() -> nn.Sequential:
    """Return a regressor with random weights."""
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))


def error(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error."""
    return torch.square(model(batch[0]) - batch[1]).mean()


def maml(initial: nn.Module) -> bilevel.Unrolled:
    """Let ``initial`` be the start of one gradient step."""
    adapted = network()
    return bilevel.Unrolled(
        lambda others: error(adapted, others),
        lambda seen: error(adapted, seen),
        upper=initial,
        lower=adapted,
        start=lambda: dict(initial.named_parameters()),
        upper_optimizer=torch.optim.Adam(initial.parameters(), lr=3e-3),
        lower_optimizer=torch.optim.SGD(adapted.parameters(), lr=RATE),  # says what the differentiated step is
    )


def meta_train(seed: int, iterations: int) -> nn.Module:
    """Train a starting point on new tasks in each iteration."""
    torch.manual_seed(seed)
    generator, initial = torch.Generator().manual_seed(seed), network()
    optimizer = maml(initial)
    for _ in range(iterations):
        tasks = [Task(generator) for _ in range(4)]
        each = [optimizer.directions(task.others, task.seen) for task in tasks]
        optimizer.apply(bilevel.Directions.mean(each))
    return initial


def adapt(initial: nn.Module, task: Task, steps: int) -> nn.Module:
    """Fit the seen points by plain gradient descent from the starting point."""
    model = network()
    model.load_state_dict(initial.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        error(model, task.seen).backward()
        optimizer.step()
    return model


def draw(file: Path, initial: nn.Module, task: Task, errors: dict[int, float]) -> None:
    """Draw one task with the fits before and after adaptation, and the mean error over steps."""
    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = torch.linspace(-5, 5, 200)[:, None]
    left.plot(x, task.value(x), "k:", label="the task")
    left.plot(*task.seen, "ko", markersize=4, label="its ten points")
    for steps in (0, 1, 10):
        left.plot(x, adapt(initial, task, steps)(x).detach(), label=f"after {steps} steps")
    left.legend(fontsize=8)
    right.plot(list(errors), list(errors.values()), "o-", label="this network")
    right.axhline(FLOOR, color="0.6", linestyle=":", label="best fixed function")
    right.set(xlabel="gradient steps on ten points", ylabel="mean squared error, new tasks", ylim=(0, None))
    right.legend()
    figure.savefig(file, dpi=80)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Meta-train on each seed, print and return the mean error on new tasks after 0, 1 and 10 steps, draw a task."""
    parser = argparse.ArgumentParser(description="MAML on sinusoids, averaged over tasks.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/maml"), help="folder of the picture")
    parser.add_argument("--smoke", action="store_true", help="the first seed and 300 iterations: seconds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds, iterations = (options.seeds[:1], 300) if options.smoke else (options.seeds, 2000)
    began, generator, rows = time.perf_counter(), torch.Generator().manual_seed(0), []
    tasks = [Task(generator) for _ in range(100)]
    for seed in seeds:
        initial = meta_train(seed, iterations)
        row = {
            n: sum(error(adapt(initial, t, n), t.others).item() for t in tasks) / len(tasks) for n in (0, 1, 2, 5, 10)
        }
        print(f"seed {seed}: mean squared error " + ", ".join(f"{e:.2f} after {n}" for n, e in row.items()) + " steps")
        if seed == seeds[0]:
            draw(options.out / "maml.png", initial, tasks[0], row)
        rows.append(row)
    before, after, later = (sum(row[n] for row in rows) / len(rows) for n in (0, 1, 10))
    found = f"{before:.2f} before adaptation, {after:.2f} after one step, {later:.2f} after ten"
    limit = f"best without adaptation {FLOOR:.2f}"
    print(f"maml, mean error of seeds {seeds} on new tasks: {found} ({limit}); {time.perf_counter() - began:.0f} s")
    return {"before": before, "after": after, "later": later}


if __name__ == "__main__":
    main()
