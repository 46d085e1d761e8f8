"""One run, on whatever data: its state, its loop over epochs, and the ways it begins and ends.

Steps are put into the device's queue and nothing waits for them: images and labels lie on the device, batches are cut
and augmented there, and numbers are read only for the log. So there is nothing to prefetch either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel.processes.joined import agreed
from examples.noisy_labels.data.batches import Batches
from examples.noisy_labels.data.randomness import global_state, restore_global_state
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.recipes import methods
from examples.noisy_labels.recipes.label_correction import first_part
from examples.noisy_labels.report import board
from examples.noisy_labels.run import accelerator, checkpoint, command_line, evaluation, files, processes
from examples.noisy_labels.run.command_line import CONFIGURATION, Start
from examples.noisy_labels.run.declaration import written
from examples.noisy_labels.run.interruption import Interrupted, Interruption
from examples.noisy_labels.run.log import Log, Mark, has_trained
from examples.noisy_labels.run.settings import Training

LOG = "log.jsonl"
RESULTS = ("result.json", "verdict.pt")  # of an earlier run in the folder, which a new one must not find


class Run:
    """Everything that changes while training, and nothing else: what a checkpoint has to hold."""

    def __init__(self, settings: Training, task: Task) -> None:
        self.settings, self.task = settings, task
        self.device = task.samples.device.type
        if processes.count() > 1 and not methods.recipe_class(settings.method).shares_batches:
            rule = "trains on one process, and torchrun started several"
            advice = "Start it without torchrun, or take ebomlc, mlc, mwnet, ce, ..., which docs/processes.md names"
            raise ValueError(f"--method {settings.method}: {rule}. {advice}.")
        self.recipe = methods.build(settings, task)
        processes.draw_apart(settings.seed)
        for network in self.recipe.networks.values():
            network.to(memory_format=settings.memory_format)  # type: ignore[call-overload]
        self.epochs = self.recipe.phases * settings.epochs
        size = settings.batch_size
        batch, views = size * self.recipe.noisy_batches, self.recipe.views
        self.noisy = self._batches("noisy batches", task.noisy, task.noisy_labels, batch, views=views)
        # Where the mistaken label is not known, the corrector would only learn to repeat what it is told.
        corrupt = torch.where(task.mistakes_known, 0.0, settings.corrupt_clean) if settings.corrupt_clean else None
        self.clean = self._batches("clean batches", task.clean, task.labels[task.clean], size, corrupt=corrupt)
        self._refuse_unequal_shares()
        self.epoch, self.step, self.seconds = 0, 0, 0.0  # completed epochs; steps and seconds within the current one
        self.sums: dict[str, Tensor] = {}

    def advance(self) -> dict[str, Tensor]:
        """Take one step and add its numbers to those of the epoch, without waiting for the device."""
        numbers = self.recipe.step(processes.share(next(self.noisy)), processes.share(next(self.clean)))
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

    def save(self, folder: Path, log: Log) -> None:
        """Write the checkpoint: the run, how far its log is, and what it belongs to. All processes take part."""
        belongs = {"device": self.device, "options": self.settings.decisive(), "samples": self.task.digest()}
        content = {"run": self.state_dict(), "processes": processes.count(), **belongs}
        if processes.first():
            checkpoint.save(folder / checkpoint.NAME, content | {"log": log.sync()})

    def load(self, file: Path) -> Mark:
        """Go back to a checkpoint and return how far the log was at that time.

        Raises:
            ValueError: It is damaged, or belongs to other options, samples, processes or another kind of device.
        """
        content = checkpoint.load(file, "run", "log", "device", "options", "samples")
        for name, value in self.settings.decisive().items():
            if name not in content["options"] or content["options"][name] != value:
                trained = written(name, content["options"].get(name))
                rule = f"was trained with {trained}, and {CONFIGURATION} beside it has {written(name, value)}"
                advice = "One of the two is not this run's. Put it back, or start anew with --overwrite"
                raise ValueError(f"Checkpoint({file}): {rule}. {advice}.")
        if content["device"] != self.device:
            rule = f"the run was on {content['device']}, whose random streams cannot go on on {self.device}"
            raise ValueError(f"--resume: {rule}. Give its --device, or start another run.")
        if (before := content.get("processes", 1)) != processes.count():
            rule = f"the run was trained by {before} process(es), not {processes.count()}"
            advice = f"Go on with {before}" + (f": torchrun --nproc-per-node {before}" if before > 1 else "")
            raise ValueError(f"--resume: {rule}. {advice}, or start another run.")
        if content["samples"] != self.task.digest():
            rule = "the samples are not those the run was started on"
            raise ValueError(f"--resume: {rule}. A file has changed; start another run with another --out.")
        self.load_state_dict(content["run"])
        mark: Mark = content["log"]
        return mark

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
        restore_global_state(state["random"])
        self.recipe.load_state_dict(state["recipe"])  # gives each of several processes its own random state back
        self.noisy.load_state_dict(state["noisy"])
        self.clean.load_state_dict(state["clean"])
        progress, device = state["progress"], self.task.samples.device
        self.epoch, self.step, self.seconds = progress["epoch"], progress["step"], progress["seconds"]
        self.sums = {name: value.to(device) for name, value in progress["sums"].items()}

    def _refuse_unequal_shares(self) -> None:
        processes.refuse_unequal(f"--batch-size {self.settings.batch_size}", self.noisy.size)
        clean, mixed = self.clean.size, self.settings.mix_clean
        processes.refuse_unequal(f"trusted samples of a batch (--batch-size {self.settings.batch_size})", clean)
        if mixed:
            whole, part = (first_part(size, mixed) for size in (clean, clean // processes.count()))
            processes.refuse_unequal(f"--mix-clean {mixed} leaves the upper loss {whole} of {clean}", whole, part)

    def _batches(self, purpose: str, index: Tensor, labels: Tensor, size: int, **others: Any) -> Batches:
        seed, augment = self.settings.seed, self.settings.augment and self.task.samples.ndim == 4
        return Batches(self.task, index, labels, size=size, seed=seed, purpose=purpose, augment=augment, **others)


@dataclass(frozen=True)
class Running:
    """What `begun` hands out: a run, its log and folder, and whether it is asked to stop."""

    run: Run
    log: Log
    folder: Path
    interruption: Interruption

    def stop_if_asked(self, moment: str) -> None:
        """Stop where the last checkpoint holds all that cannot be had again.

        Raises:
            Interrupted: SIGTERM or Ctrl-C came.
        """
        if self.interruption.requested:
            raise Interrupted(f"stopped {moment}")


@contextmanager
def begun(start: Start[Training], run: Callable[[], Run], notes: Callable[[Run], list[str]]) -> Iterator[Running]:
    """Begin a run, or go on with it, once all that it is about has been read and found right.

    Args:
        start: Its options and its folder.
        run: Reads the data and builds the run.
        notes: What to print about it before it begins.

    Raises:
        ValueError: It cannot be resumed.
        OSError: The folder holds a run already, or cannot be written.
    """
    settings, folder = start.settings, start.out
    if not (start.resume or start.overwrite) and (folder / LOG).exists():
        raise FileExistsError(f"--out {folder}: holds a run already. Use --resume, --overwrite or another --out.")
    if settings.tensorboard:
        board.require()
    device = processes.own_device(command_line.device(settings.device))
    with Interruption() as interruption, accelerator.prepared(settings, device), ExitStack() as stack:
        one, saved = run(), folder / checkpoint.NAME
        resumed = start.resume and saved.is_file()
        if start.resume and not resumed and has_trained(folder / LOG):  # the first checkpoint comes before any step
            rule = f"{saved} is gone, and {LOG} beside it tells of training"
            raise ValueError(f"--resume: {rule}. Put the checkpoint back, or start anew with --overwrite.")
        mark = one.load(saved) if resumed else None
        agreed(False, "the first file")  # all processes have looked at the folder before one of them writes
        writes = processes.first()
        print("\n".join([*notes(one), *processes.note(one.noisy.size, one.clean.size)]))
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            files.sweep(folder)
        listener = None
        if settings.tensorboard and writes:
            listener = stack.enter_context(board.Board(folder / board.FOLDER, len(one.noisy))).add
        if resumed:
            print(f"resumed after epoch {one.epoch}, step {one.step}")
            log = Log(folder / LOG, mark, listener, writes=writes)
        else:
            # No log without its checkpoint, which would look lost; no checkpoint beside other options.
            if writes:
                for name in (*RESULTS, LOG, checkpoint.NAME):
                    (folder / name).unlink(missing_ok=True)
                one.settings.save(folder / CONFIGURATION)
            log = Log(folder / LOG, listener=listener, writes=writes)
            task = one.task
            facts: dict[str, Any] = {"noisy": len(task.noisy), "clean": len(task.clean), "test": len(task.test)}
            facts |= {"overlap": task.overlap, "classes": list(task.names)}
            if (wrong := task.wrong) is not None:
                facts["wrong"] = wrong
            if processes.count() > 1:
                facts["processes"] = processes.count()
            log.write("start", setting=settings.title, method=settings.method, **facts)
            one.save(folder, log)
        yield Running(one, log, folder, interruption)


def train(running: Running, then: float = 0.0) -> None:
    """Train to the last epoch; write the log and, up to ``settings.checkpoints`` times, a checkpoint after an epoch.

    Args:
        running: The run.
        then: How many trainings of the same length come after it, for the time that is left.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came. The checkpoint holds the very step.
        ArithmeticError: The run diverged. The checkpoint is the last one before that was noticed.
    """
    run, log, folder = running.run, running.log, running.folder
    every = -(-run.epochs // run.settings.checkpoints)
    steps = run.epochs * len(run.noisy)
    try:
        with tqdm(total=steps, unit="step", leave=False, disable=None if processes.first() else True) as bar:
            bar.update(run.epoch * len(run.noisy) + run.step)
            while run.epoch < run.epochs:
                line = _train_epoch(running, bar, then)
                if run.epoch % every == 0 or run.epoch == run.epochs:
                    tqdm.write(line)
                    run.save(folder, log)
    except ArithmeticError as problem:
        file = folder / checkpoint.NAME
        kept = f" {file} holds the last checkpoint before it." if file.is_file() else ""
        raise ArithmeticError(f"{problem}{kept}") from problem


def train_at_once(run: Run, watch: Callable[[Run], None] = lambda run: None) -> Run:
    """Train to the last epoch without log and checkpoint; ``watch`` is called after each step, and may raise."""
    while run.epoch < run.epochs:
        while run.step < len(run.noisy):
            run.advance()
            watch(run)
        run.end_epoch()
    return run


def _train_epoch(running: Running, bar: Any, then: float) -> str:
    """Train one epoch, or what is left of it; return a line that says how it went."""
    run, log = running.run, running.log
    steps, interval = len(run.noisy), run.settings.log_interval
    title = f"epoch {run.epoch + 1}/{run.epochs}"
    bar.set_description(title)
    clock, before = time.perf_counter(), run.seconds
    while run.step < steps:
        numbers = run.advance()
        if (run.epoch * steps + run.step) % interval == 0:
            values = run.read(numbers)
            log.write("step", epoch=run.epoch + 1, step=run.step, **values)
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
        bar.update()
        if agreed(running.interruption.requested, "whether to stop"):
            run.read({})  # a state that has diverged shall not replace a good checkpoint
            run.seconds = before + time.perf_counter() - clock
            run.save(running.folder, log)
            raise Interrupted(f"stopped in epoch {run.epoch + 1} after step {run.step}")
    rate = run.recipe.schedule.get_last_lr()[0]
    means = run.end_epoch()  # reading the means waits for the device, so the clock is read after it
    seconds = before + time.perf_counter() - clock
    scores = evaluation.scores(run.recipe, run.task) if processes.first() else {}
    log.write("epoch", epoch=run.epoch, **means, **scores, lr=rate, seconds=seconds)
    parts = [f"{name} {100 * value:.1f} %" for name, value in scores.items()]
    parts = parts or [f"{name} {value:.3f}" for name, value in means.items()]
    epochs = run.epochs - run.epoch + then * run.epochs
    left = timedelta(seconds=round(epochs * median(record["seconds"] for record in log.epochs())))
    return f"{title}: {', '.join(parts)}, {seconds:.1f} s" + (f", {left} left" if epochs else "")
