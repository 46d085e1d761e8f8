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
from matplotlib.figure import Figure
from torch import Tensor

from examples.noisy_labels.data import Task
from examples.noisy_labels.results import suspicion_rank

MANY_CLASSES = 20  # above it the heatmap shows no class names


def curves(file: Path, epochs: list[dict[str, Any]], title: str) -> None:
    """Draw test accuracy, label recovery, and losses with the multiplier, over epochs."""
    figure, (scores, labels, losses) = _figure(1, 3, title)
    _lines(scores, epochs, {"test_accuracy": "test accuracy"}, percent=True)
    meaning = {"right": "labels right", "recovered": "wrong ones recovered", "broken": "right ones broken"}
    _lines(labels, epochs, meaning, percent=True)
    quantities = {"upper_loss": "loss, trusted images", "lower_loss": "loss, noisy images", "multiplier": "multiplier"}
    _lines(losses, epochs, quantities, percent=False)
    _write(figure, file)


def label_heatmap(file: Path, task: Task, probabilities: Tensor, title: str) -> None:
    """Draw, for each true class, which labels its noisy images were given and which they have now."""
    figure, panels = _figure(1, 2, title)
    draw_correction(figure, panels, (task.true, task.given, probabilities.argmax(1)), task.names)
    _write(figure, file)


def draw_correction(figure: Figure, panels: Any, labels: tuple[Tensor, Tensor, Tensor], names: tuple[str, ...]) -> None:
    """Draw given and corrected labels side by side: rows are true classes, columns labels, colours shares of the row.

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
        image = panel.imshow(shares, vmin=0, vmax=1, cmap="viridis")
        if len(names) <= MANY_CLASSES:
            panel.set_xticks(range(len(names)), names, rotation=60, ha="right")
            panel.set_yticks(range(len(names)), names)
        panel.set_xlabel("label")
        panel.set_ylabel("true class")
        panel.set_title(f"{name} labels: {100 * (shown == true).double().mean().item():.1f} % right")
    figure.colorbar(image, ax=list(panels), label="share of the true class")


def suspicious(file: Path, task: Task, probabilities: Tensor, title: str, rows: int = 4, columns: int = 8) -> None:
    """Draw the images whose given label is the least probable, with the given and the corrected label."""
    order = suspicion_rank(probabilities, task.given).argsort()[: rows * columns]
    figure, panels = pyplot.subplots(rows, columns, figsize=(1.5 * columns, 1.8 * rows), layout="constrained")
    figure.suptitle(f"Most suspicious labels: {title}\ngiven → corrected; green: now right, red: not")
    for panel in panels.flat:
        panel.axis("off")
    for panel, one in zip(panels.flat, order.tolist(), strict=False):
        pixels = task.pixels[task.noisy[one]].cpu().movedim(0, -1).numpy()
        panel.imshow(pixels if pixels.shape[-1] == 3 else pixels.squeeze(-1), cmap="gray_r")
        corrected = int(probabilities[one].argmax())
        colour = "green" if corrected == int(task.true[one]) else "red"
        panel.set_title(f"{task.names[int(task.given[one])]} →\n{task.names[corrected]}", fontsize=8, color=colour)
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
    figure, (points, *heatmaps) = _figure(1, 3, title)
    values = 100 * np.array(list(accuracies.values()))
    points.plot(values, color="0.8", linewidth=1)
    points.plot(values, "o", color="tab:blue", alpha=0.6)
    points.plot(values.mean(1), "_", color="black", markersize=30, markeredgewidth=2)
    points.set_xticks(range(len(accuracies)), accuracies)
    points.set_xlim(-0.5, len(accuracies) - 0.5)
    points.set_ylabel("test accuracy, %")
    points.set_title("a point: one seed; a bar: the mean")
    points.grid(axis="y", alpha=0.3)
    draw_correction(figure, heatmaps, labels, names)
    _write(figure, file)


def _figure(rows: int, columns: int, title: str) -> tuple[Figure, Any]:
    figure, panels = pyplot.subplots(rows, columns, figsize=(5 * columns, 4 * rows), layout="constrained")
    figure.suptitle(title)
    return figure, panels


def _lines(panel: Axes, epochs: list[dict[str, Any]], names: dict[str, str], *, percent: bool) -> None:
    for key, label in names.items():
        points = [(record["epoch"], record[key]) for record in epochs if key in record]
        if points:
            x, y = torch.tensor(points, dtype=torch.float64).T.numpy()
            panel.plot(x, 100 * y if percent else y, marker=".", label=label)
    panel.set_xlabel("epoch")
    if percent:
        panel.set_ylabel("%")
        panel.set_ylim(0, 100)
    panel.grid(alpha=0.3)
    panel.legend()


def _write(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
