"""Train one method on one noisy data set: ``python examples/noisy_labels/cifar.py --help``.

Writes into its folder: ``config.json`` (the resolved configuration), ``log.jsonl``, ``checkpoint.pt``, ``curves.png``,
``labels.png`` (which labels each class was given, and has now), ``corrected_labels.csv``, ``suspicious.png``,
``transition.csv`` (of Bayes' rule), and last ``result.json``; prints a line per epoch and a last one with method,
setting, test accuracy, label recovery by the method's own and by Bayes' rule, and time per epoch.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

if not __package__:  # started as a script: replace the script's folder by the checkout on the module search path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.noisy_labels import (
    accelerator,
    checkpoint,
    command_line,
    compare,
    data,
    evaluation,
    files,
    human_labels,
    interruption,
    noise,
    results,
)
from examples.noisy_labels.board import FOLDER, Board, require
from examples.noisy_labels.command_line import Command
from examples.noisy_labels.configuration import CONFIGURATION, refuse_lost_checkpoint, refuse_other_options
from examples.noisy_labels.interruption import Interrupted, Interruption
from examples.noisy_labels.log import Log, Record
from examples.noisy_labels.training import Run, save, train

LOG = "log.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says and return the exit code."""
    command = command_line.parse(arguments)
    try:
        if command.download:
            data.fetch_if_missing(command.settings.dataset, command.settings.data)
        if command.compare:
            return compare.main(command)
        return _train(command)
    except (ValueError, OSError, ArithmeticError) as problem:
        print(problem, file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"{stop}; to go on: --resume --out {command.out}", file=sys.stderr)
        return interruption.EXIT_CODE


def _train(command: Command) -> int:
    settings, folder = command.settings, command.out
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("cifar.py: is a program of one process, and torchrun started several. See docs/processes.md.")
    if not (command.resume or command.overwrite) and (folder / LOG).exists():
        raise FileExistsError(f"--out {folder}: holds a run already. Use --resume, --overwrite or another --out.")
    if settings.tensorboard:
        require()
    device = command_line.device(settings.device)
    with Interruption() as interruption, accelerator.prepared(settings, device), ExitStack() as stack:
        task = data.load(settings, device)
        print(describe(task, settings.title))
        if settings.noise == "human":
            print(human_labels.TERMS)
        folder.mkdir(parents=True, exist_ok=True)
        files.sweep(folder)
        run = Run(settings, task)
        listener = None
        if settings.tensorboard:
            listener = stack.enter_context(Board(folder / FOLDER, len(run.noisy))).add
        log = _resume(command, run, listener) if command.resume else None
        log = log or _start(command, run, listener)
        train(run, log, folder, interruption)
        _present(run, log, folder, interruption)
    return 0


def _resume(command: Command, run: Run, listener: Callable[[Record], None] | None) -> Log | None:
    """Put a run where its checkpoint is and return its log; None where it was killed before the first checkpoint."""
    saved = command.out / checkpoint.NAME
    if not saved.is_file():
        refuse_lost_checkpoint(saved, command.out / LOG)
        return None
    content = checkpoint.load(saved, "run", "log", "device", "options")
    refuse_other_options(saved, content["options"], dataclasses.asdict(run.settings), command_line.FREE_ON_RESUME)
    if content["device"] != run.device:
        rule = f"the run was on {content['device']}, whose random streams cannot go on on {run.device}"
        raise ValueError(f"--resume: {rule}. Give its --device, or start another run.")
    log = Log(command.out / LOG, content["log"], listener)
    run.load_state_dict(content["run"])
    print(f"resumed after epoch {run.epoch}, step {run.step}")
    return log


def _start(command: Command, run: Run, listener: Callable[[Record], None] | None) -> Log:
    """Write the configuration, the first record of the log, and the first checkpoint."""
    settings, task, folder = command.settings, run.task, command.out
    # In this order: no log without its checkpoint, which would look lost; no checkpoint beside other options.
    for name in (results.RESULT, LOG, checkpoint.NAME):
        (folder / name).unlink(missing_ok=True)
    settings.save(folder / CONFIGURATION)
    log = Log(folder / LOG, listener=listener)
    rate = noise.realised_rate(task.true, task.given)
    sizes = {"noisy": len(task.noisy), "clean": len(task.clean), "test": len(task.test)}
    log.write("start", setting=settings.title, method=settings.method, **sizes, wrong=rate, overlap=task.overlap)
    save(run, log, folder)
    return log


def describe(task: data.Task, title: str) -> str:
    """Return the line that says what the data are: sizes, the realised share of wrong labels, images in two parts."""
    wrong = 100 * noise.realised_rate(task.true, task.given)
    return (
        f"{title}: {len(task.noisy)} noisy images ({wrong:.2f} % of the labels are wrong), "
        f"{len(task.clean)} trusted, {len(task.test)} test; overlap {task.overlap}"
    )


def _present(run: Run, log: Log, folder: Path, interruption: Interruption) -> None:
    from examples.noisy_labels import pictures  # matplotlib takes a second to import, too long for an error message

    title = f"{run.settings.method} on {run.settings.title}, seed {run.settings.seed}"
    task, probabilities = run.task, evaluation.corrected_labels(run.recipe, run.task)
    bayes, transition = evaluation.labels_by_bayes(run.recipe, task)
    numbers = results.summary(run.settings, task, run.recipe, log, transition, bayes)
    wrong = numbers["wrong"]
    writers: list[Callable[[], None]] = [
        lambda: results.write_corrected_labels(folder / "corrected_labels.csv", task, probabilities),
        lambda: results.write_transition(folder / results.TRANSITION, transition),
        lambda: pictures.curves(folder / "curves.png", log.epochs(), title, wrong),
        lambda: pictures.label_heatmap(folder / "labels.png", task, probabilities, title),
        lambda: pictures.suspicious(folder / "suspicious.png", task, probabilities, title),
    ]
    for write in writers:
        if interruption.requested:  # the last checkpoint holds the finished training; whoever goes on writes all again
            raise Interrupted("stopped after the last epoch, before all results were written")
        write()
    line = results.end_line(run.settings, numbers)
    log.write("end", line=line)
    results.write_summary(folder / results.RESULT, numbers)
    print(f"log, pictures and corrected labels: {folder}")
    print(line)


if __name__ == "__main__":
    sys.exit(main())
