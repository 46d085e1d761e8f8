"""Methods x data sets x noise x seeds, as a table: ``python examples/noisy_labels/table.py --help``.

    table.py --preset medium --data FOLDER --workers 2
    table.py --datasets digits --noise flip:0.4,uniform:0.4 --out runs/digits-table
    table.py --noise uniform:0.4,cifar10/human:worse --seeds 4,5,6 -- --epochs 10

Each cell is a run of ``cifar.py`` in a folder of its own. The command may be started again after whatever stopped it:
cells that are finished are read, others go on where they were, failed ones are tried again. What stands behind ``--``
is handed to every run. Writes ``table.md``, ``table.tex``, ``table.csv``, ``table.json`` and ``failures.jsonl``.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: replace the script's folder by the checkout on the module search path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import scipy
import torch

import bilevel
from examples.noisy_labels.report import formats, statistics
from examples.noisy_labels.run import interruption
from examples.noisy_labels.run.cells import Cell, cells
from examples.noisy_labels.run.declaration import at_least, integers, words
from examples.noisy_labels.run.files import refuse_unusable, replacing
from examples.noisy_labels.run.interruption import Interruption
from examples.noisy_labels.run.settings import DATASETS, METHODS, PRESETS
from examples.noisy_labels.run.workers import FAILURES, Workers

REFERENCE = "ebomlc"
OPTIONS_OF_ALL = ("preset", "data", "device")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, write the table, and return the exit code: 0, 1 with failures, 75 if stopped."""
    options, further = _options(sys.argv[1:] if arguments is None else arguments)
    try:
        table = _cells(options, further)
        for cell in table:
            cell.check()
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    with Interruption() as stopping:
        workers = Workers(options.out, options.workers, options.threads, options.retries)
        failed = [] if options.report else workers.train(table, stopping)
    write(options.out, table, _reference(options.methods), {"workers": options.workers, "threads": options.threads})
    finished = sum(cell.result() is not None for cell in table)
    print(f"{finished} of {len(table)} runs are finished; tables: {options.out / 'table'}.md, .tex, .csv, .json")
    if failed:
        names = "\n  ".join(cell.name for cell in failed)
        print(f"failed (why: {options.out / FAILURES}):\n  {names}", file=sys.stderr)
        return 1
    if stopping.requested:
        print("stopped; the same command goes on", file=sys.stderr)
        return interruption.EXIT_CODE
    return 0


def write(out: Path, table: Sequence[Cell], reference: str, machine: dict[str, Any]) -> None:
    """Write the table of what is finished in all formats."""
    entries = statistics.entries(table, reference)
    results = [(cell, cell.result()) for cell in table]
    runs = [{"cell": cell.name} | result for cell, result in results if result is not None]
    about = _about(table, runs)
    facts = {
        "setting": about,
        "reference": reference,
        "machine": {"processor": platform.processor() or platform.machine(), **machine},
        "versions": {
            "bilevel": bilevel.__version__,
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
        "cells": len(table),
    }
    texts = {
        "md": formats.markdown(entries, about, reference),
        "tex": formats.latex(entries, about, reference),
        "csv": formats.table_csv(entries),
        "json": formats.table_json(entries, facts, runs),
    }
    for ending, text in texts.items():
        with replacing(out / f"table.{ending}") as stream:
            stream.write(text.encode())


def _about(table: Sequence[Cell], runs: Sequence[dict[str, Any]]) -> str:
    """Say what the numbers are of, and how many labels were wrong to begin with."""
    seeds = ", ".join(map(str, dict.fromkeys(cell.settings.seed for cell in table)))
    lines = [f"Mean ± standard deviation over seeds {seeds}; {len(runs)} of {len(table)} runs are finished."]
    for column in dict.fromkeys(cell.column for cell in table):
        own = [run for run in runs if run["setting"] == column]
        if own:
            given = 100 * (1 - sum(run["wrong"] for run in own) / len(own))
            images = f"{own[0]['noisy']} noisy, {own[0]['clean']} trusted, {own[0]['test']} test images"
            lines.append(f"{column}: {images}; {given:.1f} % of the labels right as given.")
    return "\n".join(lines)


def _cells(options: argparse.Namespace, further: list[str]) -> list[Cell]:
    table: list[Cell] = []
    for dataset in options.datasets:
        common = list(further)
        for name in OPTIONS_OF_ALL:
            value = getattr(options, name)
            if name == "device" and options.report:
                value = "cpu"  # nothing is trained: runs of another machine's device can be read anywhere
            if value is not None and not (name == "preset" and dataset == "digits"):  # which has one of its own
                common += [f"--{name}", str(value)]
        table += cells(options.methods, [dataset], options.noise, options.seeds, common, options.out)
    return sorted(table, key=lambda cell: options.seeds.index(cell.settings.seed))  # stable: the rest stays in order


def _reference(methods: Sequence[str]) -> str:
    return REFERENCE if REFERENCE in methods else methods[-1]


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    own, further = list(arguments), []
    if "--" in own:
        at = own.index("--")
        own, further = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="table.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = ",".join(METHODS)
    parser.add_argument("--methods", type=words, default=METHODS, metavar="NAME,...", help=f"[{methods}]")
    parser.add_argument("--datasets", type=words, default=("cifar10",), metavar="NAME,...", help="[cifar10]")
    parser.add_argument(
        "--noise",
        type=words,
        default=("uniform:0.4", "flip:0.4"),
        metavar="KIND:RATE,...",
        help="also human:COLUMN and matrix:FILE; DATASET/ before it: for that one alone [uniform:0.4,flip:0.4]",
    )
    parser.add_argument("--seeds", type=integers, default=(1, 2, 3), metavar="N,...", help="[1,2,3]")
    parser.add_argument("--preset", choices=[name for name in PRESETS if name != "digits"], help="as of cifar.py")
    parser.add_argument("--data", type=Path, help="folder that holds the archives [$BILEVEL_DATA, then ./data]")
    parser.add_argument("--device", default="cpu", help="of every run [cpu]")
    parser.add_argument("--out", type=Path, default=Path("runs/table"), help="[runs/table]")
    parser.add_argument("--workers", type=at_least(1), default=1, help="runs at a time [1]")
    parser.add_argument("--threads", type=at_least(1), default=1, help="threads of each run [1]")
    parser.add_argument("--retries", type=at_least(0), default=1, help="how often a failed run is started again [1]")
    parser.add_argument("--report", action="store_true", help="train nothing, write the table of what is finished")
    options = parser.parse_args(own)
    for name, known in (("methods", METHODS), ("datasets", DATASETS)):
        unknown = [one for one in getattr(options, name) if one not in known]
        if unknown:
            parser.error(f"--{name} {unknown[0]}: must be of {', '.join(known)}")
    try:
        refuse_unusable(options.out)
    except ValueError as problem:
        parser.error(str(problem))
    options.out = options.out.resolve()  # runs are started in the checkout
    options.data = options.data and options.data.resolve()
    return options, further


if __name__ == "__main__":
    sys.exit(main())
