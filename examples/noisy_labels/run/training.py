"""One run: its state, its loop over epochs, and the ways it ends.

Steps are put into the device's queue and nothing waits for them: images and labels lie on the device, batches are cut
and augmented there, and numbers are read only for the log. So there is nothing to prefetch either.
"""

from __future__ import annotations

import dataclasses
import math
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.noisy_labels.data.batches import Batches
from examples.noisy_labels.data.pools import Task
from examples.noisy_labels.data.randomness import global_state, restore_global_state
from examples.noisy_labels.recipes import build as recipes
from examples.noisy_labels.run import checkpoint, evaluation
from examples.noisy_labels.run.interruption import Interrupted, Interruption
from examples.noisy_labels.run.log import Log
from examples.noisy_labels.run.settings import Settings


class Run:
    """Everything that changes while training, and nothing else: what a checkpoint has to hold."""

    def __init__(self, settings: Settings, task: Task) -> None:
        self.settings, self.task = settings, task
        self.device = task.pixels.device.type
        self.recipe = recipes.build(settings, len(task.names), task.pixels.device, task)
        for network in self.recipe.networks.values():
            network.to(memory_format=settings.memory_format)  # type: ignore[call-overload]
        self.epochs = self.recipe.phases * settings.epochs
        size = settings.batch_size
        batch, views, corrupt = size * self.recipe.noisy_batches, self.recipe.views, settings.corrupt_clean
        self.noisy = self._batches("noisy batches", task.noisy, task.given, batch, views=views)
        self.clean = self._batches("clean batches", task.clean, task.labels[task.clean], size, corrupt=corrupt)
        self.epoch, self.step, self.seconds = 0, 0, 0.0  # completed epochs; steps and seconds within the current one
        self.sums: dict[str, Tensor] = {}

    def advance(self) -> dict[str, Tensor]:
        """Take one step and add its numbers to those of the epoch, without waiting for the device."""
        numbers = self.recipe.step(next(self.noisy), next(self.clean))
        self.sums = {name: self.sums[name] + value if self.sums else value for name, value in numbers.items()}
        self.step += 1
        return numbers

    def read(self, numbers: dict[str, Tensor]) -> dict[str, float]:
        """Return numbers of this epoch as floats, if the run is sound; waits for the device once.

        Raises:
            ArithmeticError: A number since the epoch began, or a weight, is NaN or infinite.
        """
        networks = self.recipe.networks.values()
        tensors = [one for network in networks for one in (*network.parameters(), *network.buffers())]
        weights = torch._foreach_norm([one.detach() for one in tensors if one.is_floating_point()], math.inf)
        largest = torch.stack([one.float() for one in weights]).max()
        asked = [largest, *self.sums.values(), *numbers.values()]
        weight, *values = torch.stack([one.float() for one in asked]).tolist()
        sums, answers = values[: len(self.sums)], values[len(self.sums) :]
        for name, value in [*zip(self.sums, sums, strict=True), ("a weight", weight)]:
            if not math.isfinite(value):
                rule = f"{name} is {value} in epoch {self.epoch + 1}"
                raise ArithmeticError(f"Run({self.settings.method}): {rule}. It diverged. Try a smaller --lr.")
        return dict(zip(numbers, answers, strict=True))

    def end_epoch(self) -> dict[str, float]:
        """Return the epoch's means and make ready for the next epoch."""
        means = {name: value / self.step for name, value in self.read(self.sums).items()}
        self.recipe.end_epoch()
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the state with all random streams and the positions in both sets of images."""
        return {
            "recipe": self.recipe.state_dict(),
            "noisy": self.noisy.state_dict(),
            "clean": self.clean.state_dict(),
            "random": global_state(),
            "progress": {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "sums": self.sums},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.recipe.load_state_dict(state["recipe"])
        self.noisy.load_state_dict(state["noisy"])
        self.clean.load_state_dict(state["clean"])
        restore_global_state(state["random"])
        progress, device = state["progress"], self.task.pixels.device
        self.epoch, self.step, self.seconds = progress["epoch"], progress["step"], progress["seconds"]
        self.sums = {name: value.to(device) for name, value in progress["sums"].items()}

    def _batches(self, purpose: str, index: Tensor, labels: Tensor, size: int, **others: Any) -> Batches:
        seed, augment = self.settings.seed, self.settings.augment
        return Batches(self.task, index, labels, size=size, seed=seed, purpose=purpose, augment=augment, **others)


def train(run: Run, log: Log, folder: Path, interruption: Interruption) -> None:
    """Train to the last epoch; write the log and, after each epoch, a checkpoint.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came. The checkpoint holds the very step.
        ArithmeticError: The run diverged. The checkpoint is the last one before that was noticed.
    """
    try:
        while run.epoch < run.epochs:
            _train_epoch(run, log, folder, interruption)
            save(run, log, folder)
    except ArithmeticError as problem:
        file = folder / checkpoint.NAME
        kept = f" {file} holds the last checkpoint before it." if file.is_file() else ""
        raise ArithmeticError(f"{problem}{kept}") from problem


def save(run: Run, log: Log, folder: Path) -> None:
    """Write the checkpoint: the run, how far its log is, and what it belongs to."""
    belongs = {"device": run.device, "options": dataclasses.asdict(run.settings)}
    checkpoint.save(folder / checkpoint.NAME, {"run": run.state_dict(), "log": log.sync(), **belongs})


def _train_epoch(run: Run, log: Log, folder: Path, interruption: Interruption) -> None:
    steps, interval = len(run.noisy), run.settings.log_interval
    title = f"epoch {run.epoch + 1}/{run.epochs}"
    clock, before = time.perf_counter(), run.seconds
    with tqdm(total=steps, initial=run.step, desc=title, unit="step", leave=False, disable=None) as bar:
        while run.step < steps:
            numbers = run.advance()
            if (run.epoch * steps + run.step) % interval == 0:
                values = run.read(numbers)
                log.write("step", epoch=run.epoch + 1, step=run.step, **values)
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
            bar.update()
            if interruption.requested:
                run.read({})  # a state that has diverged shall not replace a good checkpoint
                run.seconds = before + time.perf_counter() - clock
                save(run, log, folder)
                raise Interrupted(f"stopped in epoch {run.epoch + 1} after step {run.step}")
    rate = run.recipe.schedule.get_last_lr()[0]
    means = run.end_epoch()  # reading the means waits for the device, so the clock is read after it
    seconds = before + time.perf_counter() - clock
    labels = evaluation.recovery(evaluation.corrected_labels(run.recipe, run.task), run.task)
    scores = {"test_accuracy": evaluation.accuracy(run.recipe, run.task), **labels}
    log.write("epoch", epoch=run.epoch, **means, **scores, lr=rate, seconds=seconds)
    shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in scores.items())
    left = timedelta(seconds=round((run.epochs - run.epoch) * median(record["seconds"] for record in log.epochs())))
    tqdm.write(f"{title}: {shown}, {seconds:.1f} s" + (f", {left} left" if run.epoch < run.epochs else ""))
