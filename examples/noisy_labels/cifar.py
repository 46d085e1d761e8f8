"""Train one method on one noisy data set: ``python examples/noisy_labels/cifar.py --help``.

Writes into its folder: ``config.json`` (the resolved configuration), ``log.jsonl``, ``checkpoint.pt``, ``curves.png``,
``labels.png`` (which labels each class was given, and has now), ``corrected_labels.csv``, ``suspicious.png``,
``transition.csv`` (of Bayes' rule), and last ``result.json``; prints a line per epoch and a last one with method,
setting, test accuracy, label recovery by the method's own and by Bayes' rule, and time per epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: replace the script's folder by the checkout on the module search path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bilevel.processes.joined import agreed
from examples.noisy_labels.data import human_labels, pools
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.report import results
from examples.noisy_labels.run import command_line, evaluation, processes
from examples.noisy_labels.run.command_line import Command
from examples.noisy_labels.run.interruption import exit_code
from examples.noisy_labels.run.training import Run, Running, begun, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says and return the exit code."""
    with processes.printed_once(errors=True):
        command = command_line.parse(arguments)
    return exit_code(lambda: run(command), command.out)


def run(command: Command) -> None:
    """Train one method, on all processes that torchrun started, or compare several on one."""
    if command.compare and processes.started() > 1:
        raise ValueError("--compare: trains on one process, and torchrun started several. Start it without torchrun.")
    with processes.together(command_line.device(command.settings.device)):
        _run(command)


def _run(command: Command) -> None:
    settings = command.settings
    if command.download:
        if processes.first():
            pools.fetch_if_missing(settings.dataset, settings.data)
        agreed(False, "the download")
    if command.compare:
        from examples.noisy_labels.run import compare

        compare.main(command)
        return
    device = processes.own_device(command_line.device(settings.device))
    terms = [human_labels.TERMS] if settings.noise == "human" else []

    def notes(one: Run) -> list[str]:
        return [describe(one.task, settings.title), *terms]

    with begun(command, lambda: Run(settings, pools.load(settings, device)), notes) as running:
        train(running)
        if processes.first():
            write(running, command)


def describe(task: Task, title: str) -> str:
    """Return the line that says what the data are: sizes, the realised share of wrong labels, images in two parts."""
    wrong = 100 * (task.wrong or 0.0)
    return (
        f"{title}: {len(task.noisy)} noisy images ({wrong:.2f} % of the labels are wrong), "
        f"{len(task.clean)} trusted, {len(task.test)} test; overlap {task.overlap}"
    )


def write(running: Running, command: Command) -> None:
    """Write all results, the numbers last, and say what came out."""
    run, log, folder, settings = running.run, running.log, running.folder, command.settings
    task, recipe = run.task, run.recipe
    probabilities = evaluation.corrected_labels(recipe, task)
    opinions = evaluation.opinions(recipe, task, task.noisy)
    bayes, transition = evaluation.labels_by_bayes(recipe, task)
    numbers = results.summary(settings, task, recipe, log, transition, bayes)
    title = f"{settings.method} on {settings.title}, seed {settings.seed}"
    writers = [
        lambda: results.write_corrected_labels(folder / "corrected_labels.csv", task, probabilities, opinions),
        lambda: results.write_transition(folder / results.TRANSITION, transition),
        *results.draw(folder, task, log, title, probabilities, opinions),
    ]
    for writer in writers:  # the last checkpoint holds the finished training; whoever goes on writes all again
        running.stop_if_asked("after the last epoch, before all results were written")
        writer()
    line = results.end_line(settings, numbers)
    log.write("end", line=line)
    results.write_summary(folder / results.RESULT, numbers)
    print(f"log, pictures and corrected labels: {folder}")
    print(line)


if __name__ == "__main__":
    sys.exit(main())
