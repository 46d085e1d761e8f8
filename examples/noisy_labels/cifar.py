"""Train one method on one noisy data set: ``python examples/noisy_labels/cifar.py --help``.

Writes into its folder: ``config.json`` (the resolved configuration), ``log.jsonl``, ``checkpoint.pt``, ``curves.png``,
``labels.png`` (which labels each class was given, and has now), ``corrected_labels.csv``, ``suspicious.png``; prints a
line per epoch and a last one with method, setting, test accuracy, label recovery and time per epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: replace the script's folder by the checkout on the module search path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.noisy_labels import (
    checkpoint,
    command_line,
    compare,
    data,
    evaluation,
    human_labels,
    interruption,
    noise,
    results,
)
from examples.noisy_labels.command_line import CONFIGURATION, Command
from examples.noisy_labels.log import Log
from examples.noisy_labels.training import Run, train

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
    except interruption.Interrupted as stop:
        print(f"{stop}; to go on: --resume --out {command.out}", file=sys.stderr)
        return interruption.EXIT_CODE


def _train(command: Command) -> int:
    settings, folder = command.settings, command.out
    if not (command.resume or command.overwrite) and (folder / LOG).exists():
        raise FileExistsError(f"--out {folder}: holds a run already. Use --resume, --overwrite or another --out.")
    device = command_line.device(settings.device)
    task = data.load(settings, device)
    print(_describe(task, settings.title))
    if settings.noise == "human":
        print(human_labels.TERMS)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(settings, task)
    saved = folder / checkpoint.NAME
    if command.resume and saved.is_file():
        content = checkpoint.load(saved, device)
        if content["device"] != run.device:
            rule = f"the run was on {content['device']}, whose random streams cannot go on on {run.device}"
            raise ValueError(f"--resume: {rule}. Give its --device, or start another run.")
        run.load_state_dict(content["run"])
        log = Log(folder / LOG, content["log_size"])
        print(f"resumed after epoch {run.epoch}, step {run.step}")
    else:
        saved.unlink(missing_ok=True)
        settings.save(folder / CONFIGURATION)
        log = Log(folder / LOG)
        rate = noise.realised_rate(task.true, task.given)
        sizes = {"noisy": len(task.noisy), "clean": len(task.clean), "test": len(task.test)}
        log.write("start", setting=settings.title, method=settings.method, **sizes, wrong=rate, overlap=task.overlap)
    train(run, log, folder)
    _present(run, log, folder)
    return 0


def _describe(task: data.Task, title: str) -> str:
    wrong = 100 * noise.realised_rate(task.true, task.given)
    return (
        f"{title}: {len(task.noisy)} noisy images ({wrong:.2f} % of the labels are wrong), "
        f"{len(task.clean)} trusted, {len(task.test)} test; overlap {task.overlap}"
    )


def _present(run: Run, log: Log, folder: Path) -> None:
    from examples.noisy_labels import pictures  # matplotlib takes a second to import, too long for an error message

    title = f"{run.settings.method} on {run.settings.title}, seed {run.settings.seed}"
    probabilities = evaluation.corrected_labels(run.recipe, run.task)
    results.write_corrected_labels(folder / "corrected_labels.csv", run.task, probabilities)
    pictures.curves(folder / "curves.png", log.epochs(), title)
    pictures.label_heatmap(folder / "labels.png", run.task, probabilities, title)
    pictures.suspicious(folder / "suspicious.png", run.task, probabilities, title)
    line = results.end_line(run.settings, log)
    log.write("end", line=line)
    print(f"log, pictures and corrected labels: {folder}")
    print(line)


if __name__ == "__main__":
    sys.exit(main())
