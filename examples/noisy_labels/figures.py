"""Figures over many runs, from their logs: ``python -m examples.noisy_labels.figures runs/medium``.

Reads every folder below that has a ``config.json`` and a ``log.jsonl``, finished or not, and writes beside them:

``over_epochs_QUANTITY.png``  a panel for each data set and noise, a line for each method: the mean over seeds and their
    range; accuracy, labels right, recovered and broken, T's diagonal, multiplier, temper.
``sweep_OPTION.png``  the last epoch against an option in which runs differ that are otherwise alike: ``delta``, ``xi``,
    ``rho``, ``inner_steps``, ``clean_fraction``, ``clean_weight``, ``memory``. Whether the multiplier adapts, or is
    xi * delta, is its panel there.

A quantity that no log has, and an option in which no runs differ, have no figure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: works without a display

from matplotlib import pyplot
from matplotlib.figure import Figure

from examples.noisy_labels.run.command_line import CONFIGURATION
from examples.noisy_labels.run.files import replacing
from examples.noisy_labels.run.settings import from_dict

LOG = "log.jsonl"
QUANTITIES = {
    "test_accuracy": "test accuracy",
    "right": "labels right",
    "recovered": "wrong labels recovered",
    "broken": "right labels broken",
    "transition_diagonal": "mean diagonal of T",
    "multiplier": "multiplier",
    "temper": "temper",
}
OPTIONS = ("delta", "xi", "rho", "inner_steps", "clean_fraction", "clean_weight", "memory")
FREE = {"seed", "data", "device", "log_interval", "tensorboard"}  # in which repeated runs may differ
MARKERS = "os^Dvx+*"


@dataclass(frozen=True)
class Run:
    """One run: its options, its setting in words, and the records of its epochs."""

    options: dict[str, Any]
    setting: str
    epochs: list[dict[str, Any]]

    @property
    def method(self) -> str:
        """Return its method."""
        return str(self.options["method"])

    def alike(self, option: str) -> str:
        """Return all that decides the run but for seed and one option."""
        return json.dumps({name: value for name, value in self.options.items() if name not in FREE | {option}})


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw all figures that the logs have data for."""
    parser = argparse.ArgumentParser(prog="figures.py", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, help="folder with runs in it, at any depth")
    parser.add_argument("--out", type=Path, help="folder of the figures [that of the runs]")
    options = parser.parse_args(arguments)
    runs = read(options.runs)
    if not runs:
        print(
            f"figures({options.runs}): no run has finished an epoch there. Give the --out of table.py.", file=sys.stderr
        )
        return 1
    out = options.out or options.runs
    out.mkdir(parents=True, exist_ok=True)
    drawn = [over_epochs(out, runs, quantity) for quantity in QUANTITIES] + [sweep(out, runs, one) for one in OPTIONS]
    print("\n".join(str(file) for file in drawn if file is not None))
    return 0


def read(folder: Path) -> list[Run]:
    """Return all runs below a folder that have finished an epoch."""
    found = []
    for file in sorted(folder.rglob(CONFIGURATION)):
        log = file.with_name(LOG)
        if not log.is_file():
            continue
        whole = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        epochs = [record for record in map(json.loads, whole) if record["event"] == "epoch"]
        if epochs:
            options = json.loads(file.read_text(encoding="utf-8"))
            found.append(Run(options, from_dict(options).title, epochs))
    return found


def over_epochs(out: Path, runs: Sequence[Run], quantity: str) -> Path | None:
    """Draw a quantity over the epochs."""
    having = [run for run in runs if quantity in run.epochs[-1]]
    settings = sorted({run.setting for run in having})
    if not settings:
        return None
    figure, panels = pyplot.subplots(
        1, len(settings), figsize=(5 * len(settings), 4), squeeze=False, layout="constrained"
    )
    for panel, setting in zip(panels[0], settings, strict=True):
        methods = sorted({run.method for run in having if run.setting == setting})
        for method, marker in zip(methods, cycle(MARKERS)):
            own = [run for run in having if run.setting == setting and run.method == method]
            by_epoch = curve(own, quantity)
            places, values = list(by_epoch), list(by_epoch.values())
            (line,) = panel.plot(places, [mean(one) for one in values], marker=marker, markersize=3, label=method)
            panel.fill_between(
                places, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.2
            )
        panel.set(title=setting, xlabel="epoch", ylabel=QUANTITIES[quantity])
        panel.legend(fontsize="small")
    return _write(figure, out / f"over_epochs_{quantity}.png")


def curve(runs: Iterable[Run], quantity: str) -> dict[int, list[float]]:
    """Return the values of all runs, epoch by epoch; not all need have come equally far."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for record in run.epochs:
            if quantity in record:
                values.setdefault(record["epoch"], []).append(record[quantity])
    return dict(sorted(values.items()))


def sweep(out: Path, runs: Sequence[Run], option: str) -> Path | None:
    """Draw the last epoch against an option, where runs are alike but for it and their seeds."""
    lines = sweeps(runs, option)
    if not lines:
        return None
    quantities = [name for name in QUANTITIES if any(name in run.epochs[-1] for line in lines for run in line)]
    figure, panels = pyplot.subplots(
        1, len(quantities), figsize=(4 * len(quantities), 4), squeeze=False, layout="constrained"
    )
    for panel, quantity in zip(panels[0], quantities, strict=True):
        for line, marker in zip(lines, cycle(MARKERS)):
            own = [run for run in line if quantity in run.epochs[-1]]
            places = sorted({run.options[option] for run in own})
            means = [mean(run.epochs[-1][quantity] for run in own if run.options[option] == one) for one in places]
            panel.plot(places, means, marker=marker, label=f"{line[0].method}, {line[0].setting}")
        panel.set(xlabel=option, ylabel=QUANTITIES[quantity])
        panel.set_xscale("symlog", linthresh=1e-3)
    panels[0][0].legend(fontsize="small")
    return _write(figure, out / f"sweep_{option}.png")


def sweeps(runs: Sequence[Run], option: str) -> list[list[Run]]:
    """Return the groups of runs that are alike but for an option, which takes several values among them."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.alike(option), []).append(run)
    return [group for group in groups.values() if len({run.options.get(option) for run in group}) > 1]


def _write(figure: Figure, file: Path) -> Path:
    with replacing(file) as stream:
        figure.savefig(stream, dpi=120, format="png")
    pyplot.close(figure)
    return file


if __name__ == "__main__":
    sys.exit(main())
