"""One run: its state, its loop over epochs, and what it is measured by."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.noisy_labels.data.own_batches import SampleBatches
from examples.noisy_labels.data.randomness import global_state, restore_global_state
from examples.noisy_labels.data.samples import Samples
from examples.noisy_labels.recipes import own_networks as networks
from examples.noisy_labels.recipes.own_methods import Method
from examples.noisy_labels.recipes.own_networks import Normalised, VoteCorrector
from examples.noisy_labels.run import checkpoint
from examples.noisy_labels.run.configuration import refuse_other_options
from examples.noisy_labels.run.interruption import Interrupted, Interruption
from examples.noisy_labels.run.log import Log, Mark
from examples.noisy_labels.run.options import FREE_ON_RESUME, Options

CHUNK = 1000  # samples per forward pass in evaluation; only speed and memory depend on it
REPORTS = 50  # at most so many epochs are printed and saved: a small table has many short ones


class Run:
    """Everything that changes while training, and nothing else: what a checkpoint has to hold."""

    def __init__(self, options: Options, samples: Samples) -> None:
        if options.epochs is None:
            raise ValueError("Run(epochs=None): must be a number. Resolve the options first: options.resolved(...).")
        self.options, self.samples, self.epochs = options, samples, options.epochs
        self.method = build(options, samples)
        self.shown = samples.shown
        images = samples.inputs.ndim == 4
        shared: dict[str, Any] = {
            "size": options.batch_size,
            "seed": options.seed,
            "augment": options.augment and images,
        }
        self.noisy = self._batches(samples.noisy, samples.shares, purpose="noisy batches", **shared)
        # Trusted samples whose given label is not known: the corrector would only learn to repeat what it is told.
        corrupt = torch.where(samples.voted[samples.trusted], 0.0, options.corrupt)
        self.trusted = self._batches(
            samples.trusted, samples.labels, purpose="trusted batches", corrupt=corrupt, **shared
        )
        self.epoch, self.step, self.seconds = 0, 0, 0.0  # completed epochs; steps and seconds within the current one
        self.sums: dict[str, Tensor] = {}

    def advance(self) -> dict[str, Tensor]:
        """Take one step and add its numbers to those of the epoch, without waiting for the device."""
        numbers = self.method.step(next(self.noisy), next(self.trusted))
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.step += 1
        return numbers

    def end_epoch(self) -> dict[str, float]:
        """Return the epoch's means and make ready for the next epoch."""
        means = {name: value.item() / self.step for name, value in self.sums.items()}
        for name, value in means.items():
            if not math.isfinite(value):
                rule = f"{name} is {value} in epoch {self.epoch + 1}"
                raise ArithmeticError(f"Run({self.options.method}): {rule}. It diverged. Try a smaller --lr.")
        self.method.schedule.step()
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, {}
        return means

    @torch.no_grad()
    def probabilities(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for some samples, the probabilities of the classifier and those after correction.

        The latter are the mean of classifier and corrector. The two err differently: the corrector is told the given
        label and leans on it, the classifier is not and leans on its neighbours. On development seeds their mean found
        wrong labels at least as well as either.
        """
        predicted, corrected = [], []
        self.method.train(False)
        for part in index.split(CHUNK):
            predicted.append(self.method.predict(self.samples.inputs[part]))
            corrected.append(self.method.correct(self.samples.inputs[part], self.shown[part]))
        self.method.train(True)
        classifier = torch.cat(predicted)
        return classifier, (classifier + torch.cat(corrected)) / 2

    def measures(self) -> dict[str, float]:
        """Return what the held-out samples say: nothing if there are none.

        ``test_accuracy`` is the classifier's. ``given_right`` and ``right`` are the shares of labels that are right
        before and after correction, of held-out samples that have a given label.
        """
        index = self.samples.held_out
        if len(index) == 0:
            return {}
        true = self.samples.labels[index]
        classifier, corrected = self.probabilities(index)
        measured = {"test_accuracy": _share(classifier.argmax(1) == true)}
        if (voted := self.samples.voted[index]).any():
            measured["given_right"] = _share((self.samples.given[index] == true)[voted])
            measured["right"] = _share((corrected.argmax(1) == true)[voted])
        return measured

    def state_dict(self) -> dict[str, Any]:
        """Return the state with all random streams and the positions in both parts."""
        return {
            "method": self.method.state_dict(),
            "noisy": self.noisy.state_dict(),
            "trusted": self.trusted.state_dict(),
            "random": global_state(),
            "progress": {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "sums": self.sums},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.method.load_state_dict(state["method"])
        self.noisy.load_state_dict(state["noisy"])
        self.trusted.load_state_dict(state["trusted"])
        restore_global_state(state["random"])
        progress = state["progress"]
        self.epoch, self.step, self.seconds = progress["epoch"], progress["step"], progress["seconds"]
        device = self.samples.inputs.device
        self.sums = {name: value.to(device) for name, value in progress["sums"].items()}

    def _batches(self, index: Tensor, labels: Tensor, **others: Any) -> SampleBatches:
        return SampleBatches(self.samples.inputs, index, labels[index], self.shown[index], **others)


def build(options: Options, samples: Samples) -> Method:
    """Build the networks with first weights that depend on the seed alone; standardise by what is trained on."""
    torch.manual_seed(options.seed)  # first weights are drawn on the CPU, so they are the same on every device
    classes, device = len(samples.names), samples.inputs.device
    network = networks.classifier(options.network, tuple(samples.inputs.shape[1:]), classes)
    corrector = VoteCorrector(network.features, classes)
    mean, std = networks.statistics(samples.inputs[torch.cat([samples.noisy, samples.trusted])])
    return Method(options, Normalised(network, mean, std).to(device), corrector.to(device))


def train(run: Run, log: Log, folder: Path, interruption: Interruption) -> None:
    """Train to the last epoch; write the log and, up to `REPORTS` times, a checkpoint after an epoch.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came. The checkpoint holds the very step.
    """
    while run.epoch < run.epochs:
        line = _train_epoch(run, log, folder, interruption)
        if run.epoch % -(-run.epochs // REPORTS) == 0 or run.epoch == run.epochs:
            tqdm.write(line)
            save(run, log, folder)


def save(run: Run, log: Log, folder: Path) -> None:
    """Write the checkpoint: the run, how far its log is, and what it belongs to."""
    belongs = {"device": run.samples.inputs.device.type, "options": dataclasses.asdict(run.options)}
    belongs["samples"] = run.samples.digest()
    checkpoint.save(folder / checkpoint.NAME, {"run": run.state_dict(), "log": log.sync(), **belongs})


def load(run: Run, file: Path) -> Mark:
    """Put a run back to its checkpoint and return how far the log was at that time."""
    device = run.samples.inputs.device
    content = checkpoint.load(file, "run", "log", "device", "options", "samples")
    refuse_other_options(file, content["options"], dataclasses.asdict(run.options), FREE_ON_RESUME)
    if content["device"] != device.type:
        rule = f"the run was on {content['device']}, whose random streams cannot go on on {device.type}"
        raise ValueError(f"--resume: {rule}. Give its --device, or start another run.")
    if content["samples"] != run.samples.digest():
        rule = "the samples are not those the run was started on"
        raise ValueError(f"--resume: {rule}. A file has changed; start another run with another --out.")
    run.load_state_dict(content["run"])
    mark: Mark = content["log"]
    return mark


def _train_epoch(run: Run, log: Log, folder: Path, interruption: Interruption) -> str:
    """Train one epoch, or what is left of it; return a line that says how it went."""
    steps, interval = len(run.noisy), run.options.log_interval
    title = f"epoch {run.epoch + 1}/{run.epochs}"
    clock, before = time.perf_counter(), run.seconds
    with tqdm(total=steps, initial=run.step, desc=title, unit="step", leave=False, disable=None) as bar:
        while run.step < steps:
            numbers = run.advance()
            if (run.epoch * steps + run.step) % interval == 0:
                values = {name: value.item() for name, value in numbers.items()}
                log.write("step", epoch=run.epoch + 1, step=run.step, **values)
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
            bar.update()
            if interruption.requested:
                run.seconds = before + time.perf_counter() - clock
                save(run, log, folder)
                raise Interrupted(f"stopped in epoch {run.epoch + 1} after step {run.step}")
    rate = run.method.schedule.get_last_lr()[0]
    means = run.end_epoch()  # reading the means waits for the device, so the clock is read after it
    seconds = before + time.perf_counter() - clock
    measured = run.measures()
    log.write("epoch", epoch=run.epoch, **means, **measured, lr=rate, seconds=seconds)
    shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in measured.items())
    shown = shown or ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    return f"{title}: {shown}, {seconds:.1f} s"


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
