"""The pictures of a run: learning curves, what became of the labels, and the most suspicious images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: works without a display

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from examples.noisy_labels.run.files import replacing
from examples.noisy_labels.verdict.intervals import clopper_pearson

NAMED, NUMBERED = 100, 12  # up to so many classes the heatmap names its rows, and writes numbers into its cells
LONG = 24  # longer names are cut
LEVEL = 0.95  # of the intervals in the curves
# Okabe and Ito's colours: told apart by colour-blind readers too. Markers tell the lines apart without any colour.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
STYLES = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (PURPLE, "v", ":"))
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (  # title, unit, and the words for each number of the log
    ("test samples", "classified right, %", {"test_accuracy": "test accuracy"}),
    (
        "labels of the noisy samples",
        "%",
        {
            "right": "all labels: right",
            "recovered": "wrong labels: recovered",
            "broken": "right labels: broken",
            "given_right": "right as given",
        },
    ),
    ("losses", "mean of the epoch", {"upper_loss": "on trusted samples", "lower_loss": "on noisy samples"}),
    ("multiplier", "mean of the epoch", {"multiplier": "multiplier"}),
)


class Labels(NamedTuple):
    """One heatmap of labels: rows, columns, how both are called, and a headline."""

    rows: Tensor
    columns: Tensor
    row: str
    column: str
    headline: str


class Suspect(NamedTuple):
    """One image of the contact sheet, the words above it, and whether they are marked."""

    image: Tensor
    words: str
    marked: bool = False


def curves(
    file: Path, epochs: list[dict[str, Any]], title: str, numbers: Mapping[str, int], wrong: float | None = None
) -> None:
    """Draw what is measured over epochs, shares with intervals; of what there is nothing, there is no panel.

    Args:
        file: PNG to write.
        epochs: Records of the log.
        title: Headline.
        numbers: Of how many samples a share is, by its name in the log.
        wrong: Share of the given labels that are wrong; drawn is what is right before any correction.
    """
    drawn = [panel for panel in PANELS if any(name in epochs[-1] for name in panel[2])]
    rows = 2 if len(drawn) == 4 else 1
    figure, panels = _figure(len(drawn) // rows, title, rows=rows)
    for panel, (heading, unit, names) in zip(panels.ravel(), drawn, strict=True):
        _lines(panel, epochs, names, numbers, 100 if "%" in unit else 1)
        panel.set(title=heading, ylabel=unit, xlabel="epoch")
        panel.set_ylim(0, 100 if "%" in unit else 1.05 * max(panel.get_ylim()[1], 1e-3))
        if wrong is not None and "right" in names:
            panel.axhline(100 * (1 - wrong), color="0.4", linewidth=1, linestyle=":", label="right as given")
        if len(names) > 1:  # below, where it hides no line
            panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    _write(figure, file)


def label_heatmap(file: Path, labels: Sequence[Labels], names: tuple[str, ...], title: str) -> None:
    """Draw which labels became which."""
    height = min(12.0, 4.8 + 0.1 * max(0, len(names) - 10))
    figure, panels = _figure(len(labels), title, height=height)
    draw_labels(figure, panels.ravel(), labels, names)
    _write(figure, file)


def draw_labels(figure: Figure, panels: Sequence[Axes], labels: Sequence[Labels], names: tuple[str, ...]) -> None:
    """Draw heatmaps side by side; colours are shares of the row.

    Colours follow the square root of the share, so that the many small shares of wrong labels can be seen beside the
    large one of right labels.
    """
    for panel, one in zip(panels, labels, strict=True):
        shares = np.zeros((len(names), len(names)))
        np.add.at(shares, (one.rows.cpu().numpy(), one.columns.cpu().numpy()), 1)
        shares /= np.maximum(shares.sum(1, keepdims=True), 1)
        image = panel.imshow(shares, norm=PowerNorm(0.5, vmin=0, vmax=1), cmap="cividis")
        if len(names) <= NAMED:
            few = len(names) <= 20
            readable = [short(name) for name in names]
            panel.set_xticks(range(len(names)), readable, rotation=60 if few else 90, fontsize=9 if few else 5)
            panel.set_yticks(range(len(names)), readable, fontsize=9 if few else 5)
            if few:
                pyplot.setp(panel.get_xticklabels(), ha="right", rotation_mode="anchor")
        if len(names) <= NUMBERED:
            for row, column in np.argwhere(shares >= 0.005):
                share = shares[row, column]
                colour = "black" if share > 0.3 else "white"
                panel.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
        panel.set(xlabel=one.column, ylabel=one.row, title=one.headline)
    bar = figure.colorbar(image, ax=list(panels), ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1], shrink=0.8)
    bar.ax.set_yticklabels(["0", "1", "5", "10", "20", "40", "60", "80", "100"])
    bar.set_label(f"% of the samples of the {labels[-1].row}")


def contact_sheet(file: Path, suspects: Sequence[Suspect], title: str, columns: int = 8) -> None:
    """Draw images with words above each."""
    rows = -(-len(suspects) // columns)
    size = (1.6 * columns, 2.15 * rows + 0.6)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title)
    figure.get_layout_engine().set(hspace=0.05)  # type: ignore[union-attr, call-arg]
    for panel in panels.flat:
        panel.axis("off")
    for panel, one in zip(panels.flat, suspects, strict=False):
        pixels = one.image.cpu().movedim(0, -1).numpy()
        panel.imshow(pixels if pixels.shape[-1] == 3 else pixels.squeeze(-1), cmap="gray_r")
        panel.set_title(one.words, fontsize=7, color=ORANGE if one.marked else BLUE, parse_math=False)
    _write(figure, file)


def comparison(
    file: Path, accuracies: dict[str, list[float]], labels: Sequence[Labels], names: tuple[str, ...], title: str
) -> None:
    """Draw the accuracy of each method on each seed, and EBOMLC's labels of all seeds before and after."""
    figure, panels = _figure(3, title, height=4.8)
    points, *heatmaps = panels.ravel()
    values = 100 * np.array(list(accuracies.values()))
    points.plot(values, color="0.8", linewidth=1)
    points.plot(values, "o", color=BLUE, alpha=0.6)
    points.plot(values.mean(1), "_", color="black", markersize=30, markeredgewidth=2)
    points.set_xticks(range(len(accuracies)), accuracies)
    points.set_xlim(-0.5, len(accuracies) - 0.5)
    points.set(ylabel="test accuracy, %", title="a point: one seed; a bar: the mean")
    points.grid(axis="y", alpha=0.3)
    draw_labels(figure, heatmaps, labels, names)
    _write(figure, file)


def short(name: str) -> str:
    """Return a name as it fits into a picture."""
    readable = name.replace("_", " ")
    return readable if len(readable) <= LONG else "…" + readable[-LONG + 1 :]


def _figure(columns: int, title: str, height: float = 4.0, rows: int = 1) -> tuple[Figure, Any]:
    size = ((height + 1) * columns, height * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title)
    return figure, panels


def _lines(
    panel: Axes, epochs: list[dict[str, Any]], names: dict[str, str], numbers: Mapping[str, int], scale: float
) -> None:
    for (name, label), (colour, marker, line) in zip(names.items(), STYLES, strict=False):
        points = [(record["epoch"], record[name]) for record in epochs if name in record]
        if not points:
            continue
        places, values = np.array(points, dtype=float).T
        marked = marker if len(places) <= 40 else ""  # more would hide the line
        panel.plot(places, scale * values, color=colour, marker=marked, markersize=4, linestyle=line, label=label)
        if number := numbers.get(name, 0):
            ends = scale * np.array([clopper_pearson(round(value * number), number, LEVEL) for value in values])
            panel.fill_between(places, *ends.T, color=colour, alpha=0.15, linewidth=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)


def _write(figure: Figure, file: Path) -> None:
    with replacing(file) as stream:
        figure.savefig(stream, format="png", dpi=120)
    pyplot.close(figure)
