"""The pictures of a run: learning curves, what became of the labels, and the most suspicious images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: works without a display

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from examples.noisy_labels.data.pools import Task
from examples.noisy_labels.report.results import suspicion_rank
from examples.noisy_labels.run.files import replacing

NAMED, NUMBERED = 100, 10  # up to so many classes the heatmap names its rows, and writes numbers into its cells
# Okabe and Ito's colours: told apart by colour-blind readers too. Markers tell the lines apart without any colour.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
STYLES = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."))


def curves(file: Path, epochs: list[dict[str, Any]], title: str, wrong: float | None = None) -> None:
    """Draw test accuracy, label recovery, losses and the multiplier over epochs.

    Args:
        file: PNG to write.
        epochs: Records of the log.
        title: Headline.
        wrong: Share of the given labels that are wrong; drawn is what is right before any correction.
    """
    bilevel = any("multiplier" in record for record in epochs)
    figure, grid = _figure(2 if bilevel else 3, title, rows=2 if bilevel else 1)
    panels = grid.ravel()
    scores, labels, losses = panels[:3]
    _lines(scores, epochs, {"test_accuracy": "test accuracy"}, "test images", "classified right, %")
    meaning = {"right": "all labels: right", "recovered": "wrong labels: recovered", "broken": "right labels: broken"}
    _lines(labels, epochs, meaning, "labels of the noisy images", "%")
    if wrong is not None:
        labels.axhline(100 * (1 - wrong), color="0.4", linewidth=1, linestyle=":", label="right as given")
    for panel in (scores, labels):
        panel.set_ylim(0, 100)
    quantities = {"upper_loss": "on trusted images", "lower_loss": "on noisy images"}
    _lines(losses, epochs, quantities, "losses", "mean of the epoch")
    if bilevel:
        _lines(panels[3], epochs, {"multiplier": "multiplier"}, "multiplier", "mean of the epoch")
    for panel in panels[2:]:
        panel.set_ylim(0, 1.05 * max(panel.get_ylim()[1], 1e-3))
    for panel in (labels, losses):  # below, where it hides no line
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    _write(figure, file)


def label_heatmap(file: Path, task: Task, probabilities: Tensor, title: str) -> None:
    """Draw, for each true class, which labels its noisy images were given and which they have now."""
    figure, panels = _figure(2, title, height=min(12.0, 4.8 + 0.1 * max(0, len(task.names) - 10)))
    draw_correction(figure, panels, (task.true, task.given, probabilities.argmax(1)), task.names)
    _write(figure, file)


def draw_correction(figure: Figure, panels: Any, labels: tuple[Tensor, Tensor, Tensor], names: tuple[str, ...]) -> None:
    """Draw given and corrected labels side by side: rows are true classes, columns labels, colours shares of the row.

    Colours follow the square root of the share, so that the many small shares of wrong labels can be seen beside the
    large one of right labels.

    Args:
        figure: Gets the colour bar.
        panels: Two axes.
        labels: True, given and corrected labels, in one order of images.
        names: Names of the classes.
    """
    true, *drawn = (one.cpu() for one in labels)
    for panel, shown, name in zip(panels, drawn, ("given", "corrected"), strict=True):
        shares = np.zeros((len(names), len(names)))
        np.add.at(shares, (true.numpy(), shown.numpy()), 1)
        shares /= np.maximum(shares.sum(1, keepdims=True), 1)
        image = panel.imshow(shares, norm=PowerNorm(0.5, vmin=0, vmax=1), cmap="cividis")
        if len(names) <= NAMED:
            size = 9 if len(names) <= 20 else 5
            readable = [one.replace("_", " ") for one in names]
            panel.set_xticks(range(len(names)), readable, rotation=60 if len(names) <= 20 else 90, fontsize=size)
            panel.set_yticks(range(len(names)), readable, fontsize=size)
            if len(names) <= 20:
                pyplot.setp(panel.get_xticklabels(), ha="right", rotation_mode="anchor")
        if len(names) <= NUMBERED:
            for row, column in np.argwhere(shares >= 0.005):
                share = shares[row, column]
                colour = "black" if share > 0.3 else "white"
                panel.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
        panel.set_xlabel(f"{name} label")
        panel.set_ylabel("true class")
        panel.set_title(f"{name} labels: {100 * (shown == true).double().mean().item():.1f} % right")
    bar = figure.colorbar(image, ax=list(panels), ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1], shrink=0.8)
    bar.ax.set_yticklabels(["0", "1", "5", "10", "20", "40", "60", "80", "100"])
    bar.set_label("% of the images of the true class")


def suspicious(file: Path, task: Task, probabilities: Tensor, title: str, rows: int = 4, columns: int = 8) -> None:
    """Draw the images whose given label is the least probable, with the given, the corrected and the true label."""
    order = suspicion_rank(probabilities, task.given).argsort()[: rows * columns]
    caught = int((task.given[order] != task.true[order]).sum())
    figure, panels = pyplot.subplots(rows, columns, figsize=(1.5 * columns, 2.1 * rows), layout="constrained")
    found = f"{caught} of these {len(order)} given labels are wrong. ✓: corrected to the true class"
    figure.suptitle(f"The most suspicious labels, {title}\n{found}; ✗: not")
    figure.get_layout_engine().set(hspace=0.05)  # type: ignore[union-attr, call-arg]
    for panel in panels.flat:
        panel.axis("off")
    for panel, one in zip(panels.flat, order.tolist(), strict=False):
        pixels = task.pixels[task.noisy[one]].cpu().movedim(0, -1).numpy()
        panel.imshow(pixels if pixels.shape[-1] == 3 else pixels.squeeze(-1), cmap="gray_r")
        corrected, true = int(probabilities[one].argmax()), int(task.true[one])
        given, now, truth = (task.names[label].replace("_", " ") for label in (int(task.given[one]), corrected, true))
        mark, colour = ("✓", BLUE) if corrected == true else ("✗", ORANGE)
        words = f"image {int(task.noisy[one])}\ngiven: {given}\nnow: {now} {mark}"
        panel.set_title(words if corrected == true else f"{words}\ntrue: {truth}", fontsize=7, color=colour)
    _write(figure, file)


def comparison(
    file: Path,
    accuracies: dict[str, list[float]],
    labels: tuple[Tensor, Tensor, Tensor],
    names: tuple[str, ...],
    title: str,
) -> None:
    """Draw the accuracy of each method on each seed, and EBOMLC's labels of all seeds before and after.

    Args:
        file: PNG to write.
        accuracies: Test accuracies of each method, in one order of seeds.
        labels: True, given and corrected labels of the noisy images of all seeds.
        names: Names of the classes.
        title: Headline.
    """
    figure, (points, *heatmaps) = _figure(3, title, height=4.8)
    values = 100 * np.array(list(accuracies.values()))
    points.plot(values, color="0.8", linewidth=1)
    points.plot(values, "o", color=BLUE, alpha=0.6)
    points.plot(values.mean(1), "_", color="black", markersize=30, markeredgewidth=2)
    points.set_xticks(range(len(accuracies)), accuracies)
    points.set_xlim(-0.5, len(accuracies) - 0.5)
    points.set_ylabel("test accuracy, %")
    points.set_title("a point: one seed; a bar: the mean")
    points.grid(axis="y", alpha=0.3)
    draw_correction(figure, heatmaps, labels, names)
    _write(figure, file)


def _figure(columns: int, title: str, height: float = 4.0, rows: int = 1) -> tuple[Figure, Any]:
    size = ((height + 1) * columns, height * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure, panels


def _lines(panel: Axes, epochs: list[dict[str, Any]], names: dict[str, str], title: str, unit: str) -> None:
    """Draw quantities over epochs, shares in %."""
    scale = 100 if "%" in unit else 1
    for (key, label), (colour, marker, line) in zip(names.items(), STYLES, strict=False):
        points = [(record["epoch"], record[key]) for record in epochs if key in record]
        if points:
            x, y = torch.tensor(points, dtype=torch.float64).T.numpy()
            marked = marker if len(x) <= 40 else ""  # more would hide the line
            panel.plot(x, scale * y, color=colour, marker=marked, markersize=4, linestyle=line, label=label)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("epoch")
    panel.set_ylabel(unit)
    panel.set_title(title)
    panel.grid(alpha=0.3)


def _write(figure: Figure, file: Path) -> None:
    with replacing(file) as stream:
        figure.savefig(stream, format="png", dpi=120)
    pyplot.close(figure)
