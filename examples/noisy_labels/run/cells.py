"""The cells of a table: one run each, in a folder of its own, which says how far it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from examples.noisy_labels.data import noise as matrices
from examples.noisy_labels.recipes.gold_loss_correction import GoldLossCorrection
from examples.noisy_labels.report.results import RESULT
from examples.noisy_labels.run import command_line
from examples.noisy_labels.run.command_line import CONFIGURATION
from examples.noisy_labels.run.settings import DATASETS, Settings

LOG = "log.jsonl"
VALUE_OF = {"human": "--human-column", "matrix": "--transition"}  # what stands behind the colon; else the rate


@dataclass(frozen=True)
class Cell:
    """One run: its settings, its command line without the program, and its folder."""

    settings: Settings
    arguments: tuple[str, ...]
    folder: Path

    @property
    def column(self) -> str:
        """Return data set and noise in words."""
        return self.settings.title

    @property
    def name(self) -> str:
        """Return the name of the folder, which says all that tells cells apart."""
        return self.folder.name

    @property
    def epochs(self) -> int:
        """Return how many epochs the run takes, all phases together."""
        return self.settings.epochs * (GoldLossCorrection.phases if self.settings.method == "glc" else 1)

    def result(self) -> dict[str, Any] | None:
        """Return the numbers of the finished run, or None."""
        file = self.folder / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def seconds(self) -> list[float]:
        """Return how long each epoch took that the run has done so far."""
        file = self.folder / LOG
        if not file.is_file():
            return []
        whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        records = [json.loads(line) for line in whole if '"event": "epoch"' in line]
        return [record["seconds"] for record in records]

    def check(self) -> None:
        """Refuse a folder with a run of other settings.

        Raises:
            ValueError: The configuration that is saved there differs.
        """
        file = self.folder / CONFIGURATION
        if not file.is_file():
            return
        saved = json.loads(file.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(dataclasses.asdict(self.settings)))
        for name in sorted(wanted.keys() - Settings.free_on_resume):
            if saved.get(name) != wanted[name]:
                rule = f"the run in it has {name} = {saved.get(name)}, not {wanted[name]}"
                raise ValueError(f"table({self.folder}): {rule}. Use another --out, or delete the folder.")


def cells(
    methods: Sequence[str],
    datasets: Sequence[str],
    noises: Sequence[str],
    seeds: Sequence[int],
    common: Sequence[str],
    out: Path,
) -> list[Cell]:
    """Return all cells, seed by seed, so that what is there after half the time is half the seeds of everything.

    Args:
        methods, datasets, seeds: The table's sides.
        noises: ``KIND:RATE``, ``human:COLUMN`` or ``matrix:FILE``; with ``DATASET/`` before it, for that one alone.
        common: Further options of every run.
        out: Folder of the runs' folders.
    """
    found = []
    for seed, dataset, noise, method in product(seeds, datasets, noises, methods):
        only, _, rest = noise.partition("/")
        if only in DATASETS and only != dataset:
            continue
        kind, _, value = (rest if only in DATASETS else noise).partition(":")
        if kind == "matrix":
            value = str(Path(value).resolve())  # runs are started elsewhere
            matrices.read(Path(value), 100 if dataset == "cifar100" else 10)
        arguments = ["--dataset", dataset, "--noise", kind, "--method", method, "--seed", str(seed), *common]
        arguments += [VALUE_OF.get(kind, "--rate"), value] if value else []
        settings = command_line.parse(arguments).settings
        found.append(Cell(settings, tuple(arguments), out / settings.folder_name))
    return found
