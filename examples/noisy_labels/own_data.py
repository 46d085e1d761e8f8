"""Correct the labels of your own table or images: ``python examples/noisy_labels/own_data.py --help``.

Writes into its folder: ``corrected_labels.csv``, ``verdict.txt`` and ``verdict.json`` (which way to correct them is the
best, and whether that can be told), ``check_next.csv``, ``model.pt``, ``labels.png`` (which labels became which),
``suspicious.png`` (images only), ``curves.png``, ``log.jsonl``, ``config.json`` (the resolved configuration) and
``checkpoint.pt``. Nothing is written before all files have been read and found right.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: replace the script's folder by the checkout on the module search path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.noisy_labels.data import own
from examples.noisy_labels.data.own import Data
from examples.noisy_labels.data.table import PARQUET
from examples.noisy_labels.report import model
from examples.noisy_labels.report import own as report
from examples.noisy_labels.run import command_line, evaluation, options
from examples.noisy_labels.run.command_line import Start
from examples.noisy_labels.run.interruption import exit_code
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.run.training import Run, Running, begun, train
from examples.noisy_labels.verdict import judgement


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says and return the exit code."""
    start = options.parse(arguments)
    return exit_code(lambda: correct(start), start.out)


def correct(start: Start[Options]) -> None:
    """Read the files, train, judge all ways, and write the labels of the best one."""
    data = own.read(start.settings)
    samples = data.samples.to(command_line.device(start.settings.device))
    settings = start.settings.resolved(len(samples.noisy))
    notes = [report.describe(samples, settings.title), *data.notes]
    with begun(start, lambda: Run(settings, samples), lambda _: notes) as running:
        train(running, judgement.trainings(settings))
        running.stop_if_asked("after the last epoch, before the results were written")
        write(running, dataclasses.replace(data, samples=samples), settings)


def write(running: Running, data: Data, settings: Options) -> None:
    """Write all results, and say what came out."""
    run, samples, folder, log = running.run, data.samples, running.folder, running.log
    outcome = judgement.judge(running, samples, data.problem) if settings.folds else None
    if outcome is None:
        labels = report.corrected(samples, evaluation.opinions(run.recipe, samples, samples.noisy))
    else:
        labels = report.of_outcome(samples, outcome)
        report.write_verdict(folder, outcome)
        report.write_check_next(folder / "check_next.csv", samples, outcome)
        log.write("verdict", **outcome.report.to_dict())
        print("\n".join(outcome.report.lines()))
    kind = Path(settings.table or "").suffix.lower()
    for ending in (".csv", PARQUET) if kind == PARQUET else (".csv",):
        file = folder / f"corrected_labels{ending}"
        report.write_corrected_labels(file, samples, labels, votes=settings.annotators is not None)
    model.save(folder / model.NAME, run, settings, data.encoding)
    report.draw(folder, samples, labels, log, settings, outcome.report.way if outcome else settings.method)
    line = report.end_line(settings, samples, labels, log, outcome)
    log.write("end", line=line)
    print(f"corrected labels, model, pictures and log: {folder}")
    print(line)


if __name__ == "__main__":
    sys.exit(main())
