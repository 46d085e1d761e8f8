"""The pictures of a run on own data: curves, what became of the labels, the most suspicious images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: works without a display

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from examples.noisy_labels.data.samples import Samples
from examples.noisy_labels.report.own_report import Corrected, most_suspicious
from examples.noisy_labels.run.files import replacing

MANY_CLASSES = 20  # above it the heatmap shows no class names
NUMBERED = 12  # up to so many classes each cell shows its number
LONG = 24  # longer ids are cut


def curves(file: Path, epochs: list[dict[str, Any]], title: str) -> None:
    """Draw what the held-out samples say, and the losses, over epochs."""
    measured = {
        "test_accuracy": "classifier, held-out samples",
        "right": "labels right after correction",
        "given_right": "labels right as given",
    }
    losses = {"upper_loss": "loss, trusted samples", "lower_loss": "loss, noisy samples", "multiplier": "multiplier"}
    panels = [(measured, 100.0, "%"), (losses, 1.0, "")]
    drawn = [panel for panel in panels if any(name in epochs[-1] for name in panel[0])]
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(6 * len(drawn), 4), layout="constrained", squeeze=False)
    figure.suptitle(title)
    for panel, (lines, scale, unit) in zip(axes[0], drawn, strict=True):
        for name, words in lines.items():
            points = [(record["epoch"], scale * record[name]) for record in epochs if name in record]
            if points:
                panel.plot(*zip(*points, strict=True), marker=".", label=words)
        panel.set_xlabel("epoch")
        panel.set_ylabel(unit)
        if unit:
            panel.set_ylim(0, 101)
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right" if unit else "best")
    _write(figure, file)


def label_heatmap(file: Path, samples: Samples, labels: Corrected, title: str) -> None:
    """Draw which labels became which: rows are given labels, columns corrected ones, colours shares of the row."""
    given, corrected = samples.given[samples.noisy].cpu().numpy(), np.array(labels.labels)
    names = samples.names
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (given, corrected), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(10.0, 4 + 0.35 * len(names))
    figure, panel = pyplot.subplots(figsize=(side + 1.5, side), layout="constrained")
    drawn = panel.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    if len(names) <= MANY_CLASSES:
        shown = [_short(name) for name in names]
        panel.set_xticks(range(len(names)), shown, rotation=60, ha="right")
        panel.set_yticks(range(len(names)), shown)
    if len(names) <= NUMBERED:
        _number(panel, counts, shares)
    panel.set_xlabel("corrected label")
    panel.set_ylabel("given label")
    changed = int((given != corrected).sum())
    panel.set_title(f"{title}\n{changed} of {len(given)} labels changed; numbers: samples", fontsize="medium")
    figure.colorbar(drawn, ax=panel, label="share of the given label")
    _write(figure, file)


def suspicious(file: Path, samples: Samples, labels: Corrected, title: str, rows: int = 4, columns: int = 8) -> None:
    """Draw the images whose given label is the least probable, with id, given and corrected label."""
    chosen = most_suspicious(samples, labels, rows * columns)
    rows = -(-len(chosen) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(1.7 * columns, 2.2 * rows + 0.7), layout="constrained", squeeze=False
    )
    figure.suptitle(f"{title}: the most suspicious labels, id and given → corrected")
    for panel in panels.flat:
        panel.axis("off")
    for panel, (i, given, new) in zip(panels.flat, chosen, strict=False):
        panel.imshow(samples.inputs[i].cpu().movedim(0, -1).numpy())
        panel.set_title(f"{_short(samples.ids[i])}\n{_short(given)} →\n{_short(new)}", fontsize=8, parse_math=False)
    _write(figure, file)


def _number(panel: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for (row, column), number in np.ndenumerate(counts):
        colour = "black" if shares[row, column] > 0.6 else "white"
        panel.text(column, row, str(number), ha="center", va="center", color=colour, fontsize=8)


def _short(text: str) -> str:
    return text if len(text) <= LONG else "…" + text[-LONG + 1 :]


def _write(figure: Any, file: Path) -> None:
    with replacing(file) as stream:
        figure.savefig(stream, dpi=120, format="png")
    pyplot.close(figure)
