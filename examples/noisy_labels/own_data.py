"""Correct the labels of your own table or images: ``python examples/noisy_labels/own_data.py --help``.

Writes into its folder: ``corrected_labels.csv``, ``verdict.txt`` and ``verdict.json`` (which way to correct them is the
best, and whether that can be told), ``check_next.csv``, ``model.pt``, ``labels.png`` (which labels became which),
``suspicious.png`` (images only), ``curves.png``, ``log.jsonl``, ``config.json`` (the resolved configuration) and
``checkpoint.pt``. Nothing is written before all files have been read and found right.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: replace the script's folder by the checkout on the module search path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.noisy_labels.data import own as reading
from examples.noisy_labels.data.own import Data
from examples.noisy_labels.data.parquet import PARQUET
from examples.noisy_labels.report import model
from examples.noisy_labels.report import own_report as report
from examples.noisy_labels.run import accelerator, checkpoint, command_line, files, options
from examples.noisy_labels.run.configuration import CONFIGURATION, refuse_lost_checkpoint
from examples.noisy_labels.run.interruption import EXIT_CODE, Interrupted, Interruption
from examples.noisy_labels.run.log import Log
from examples.noisy_labels.run.options import Command
from examples.noisy_labels.run.own_run import Run, load, save, train
from examples.noisy_labels.run.settings import Settings
from examples.noisy_labels.verdict import judgement

LOG = "log.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says and return the exit code."""
    command = options.parse(arguments)
    try:
        _correct(command)
    except (ValueError, OSError, ArithmeticError) as problem:
        print(problem, file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"{stop}; to go on: --resume --out {command.out}", file=sys.stderr)
        return EXIT_CODE
    return 0


def _correct(command: Command) -> None:
    folder = command.out
    if not (command.resume or command.overwrite) and (folder / LOG).exists():
        raise FileExistsError(f"--out {folder}: holds a run already. Use --resume, --overwrite or another --out.")
    device = command_line.device(command.options.device)
    data = reading.read(command.options)
    samples = data.samples.to(device)
    settled = command.options.resolved(len(samples.noisy))
    with Interruption() as interruption, accelerator.prepared(Settings(), device):
        run = Run(settled, samples)
        saved = folder / checkpoint.NAME
        resumed = command.resume and saved.is_file()
        if command.resume and not resumed:
            refuse_lost_checkpoint(saved, folder / LOG)
        mark = load(run, saved) if resumed else None
        print("\n".join([report.describe(samples, settled.source), *data.notes]))
        folder.mkdir(parents=True, exist_ok=True)
        files.sweep(folder)
        if resumed:
            print(f"resumed after epoch {run.epoch}, step {run.step}")
            log = Log(folder / LOG, mark)
        else:
            # No log without its checkpoint, which would look like a lost one; no checkpoint beside other options.
            for old in (folder / LOG, saved, folder / judgement.NAME):
                old.unlink(missing_ok=True)
            settled.save(folder / CONFIGURATION)
            log = Log(folder / LOG)
            sizes = {"noisy": len(samples.noisy), "trusted": len(samples.trusted), "held_out": len(samples.held_out)}
            log.write("start", method=settled.method, classes=list(samples.names), **sizes, notes=list(data.notes))
            save(run, log, folder)
        train(run, log, folder, interruption)
        if interruption.requested:  # the checkpoint holds the finished training; whoever goes on writes the results
            raise Interrupted("stopped after the last epoch, before the results were written")
        _present(run, data, log, folder, interruption)


def _present(run: Run, data: Data, log: Log, folder: Path, interruption: Interruption) -> None:
    from examples.noisy_labels.report import (
        own_pictures as drawings,  # matplotlib takes a second to import, too long for an error message
    )

    settled, samples = run.options, run.samples
    title = f"{settled.method} on {settled.source}, seed {settled.seed}"
    outcome = judgement.judge(run, data.problem, folder, interruption) if settled.folds else None
    if outcome is None:
        labels = report.corrected(samples, run.probabilities(samples.noisy)[1])
    else:
        labels = report.of_outcome(samples, outcome)
        title = f"{outcome.report.way} on {settled.source}, seed {settled.seed}"
        report.write_verdict(folder, outcome)
        report.write_check_next(folder / "check_next.csv", samples, outcome)
        log.write("verdict", **outcome.report.to_dict())
        print("\n".join(outcome.report.lines()))
    kind = Path(settled.table or "").suffix.lower()
    for ending in (".csv", PARQUET) if kind == PARQUET else (".csv",):
        file = folder / f"corrected_labels{ending}"
        report.write_corrected_labels(file, samples, labels, votes=settled.annotators is not None)
    model.save(folder / model.NAME, run, data.encoding)
    drawings.curves(folder / "curves.png", log.epochs(), f"{settled.method} on {settled.source}, seed {settled.seed}")
    drawings.label_heatmap(folder / "labels.png", samples, labels, title)
    if data.encoding is None:
        drawings.suspicious(folder / "suspicious.png", samples, labels, title)
    line = report.end_line(settled, samples, labels, log, outcome)
    log.write("end", line=line)
    print(f"corrected labels, model, pictures and log: {folder}")
    print(line)


if __name__ == "__main__":
    sys.exit(main())
