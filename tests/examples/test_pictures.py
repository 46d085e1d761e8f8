"""What the pictures say, read from the figures before they become pixels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

from examples.noisy_labels.data.task import Task
from examples.noisy_labels.report import pictures, results
from examples.noisy_labels.run.log import Log


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """Keep the figures that would be written."""
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "_write", lambda figure, file: figures.append(figure))
    yield figures
    pyplot.close("all")


def task(classes: int, images: int = 200) -> Task:
    labels = torch.arange(2 * images) % classes
    given = labels.clone()
    given[:20] = (given[:20] + 1) % classes
    pixels = torch.randint(0, 256, (2 * images, 3, 32, 32), dtype=torch.uint8)
    names = tuple(f"class_{i}" for i in range(classes))
    noisy, test = torch.arange(2 * images).split(images)
    return Task(pixels, labels, given, noisy[:0], noisy, test, names, torch.ones(1), torch.ones(1))


def draw(tmp_path: Path, drawn: list[Figure], problem: Task, probabilities: torch.Tensor) -> list[Figure]:
    """Draw all pictures of a run that has corrected the labels so."""
    log = Log(tmp_path / "log.jsonl")
    log.write(**records(bilevel=True)[0])
    for one in results.draw(Path("unused"), problem, log, "title", probabilities, probabilities):
        one()
    return drawn


def records(*, bilevel: bool) -> list[dict[str, Any]]:
    shown = {"test_accuracy": 0.5, "right": 0.8, "recovered": 0.3, "broken": 0.1, "lower_loss": 1.5}
    more = {"upper_loss": 2.0, "multiplier": 0.7} if bilevel else {}
    return [{"event": "epoch", "epoch": epoch, **shown, **more} for epoch in (1, 2, 3)]


@pytest.mark.parametrize("bilevel", [True, False])
def test_curves_show_what_was_recovered_and_broken(bilevel: bool, drawn: list[Figure]) -> None:
    numbers = {"test_accuracy": 100, "right": 50, "recovered": 20, "broken": 30}
    pictures.curves(Path("unused"), records(bilevel=bilevel), "title", numbers, wrong=0.4)
    panels = {panel.get_title(): panel for panel in drawn[0].axes}
    assert ("multiplier" in panels) == bilevel
    lines = {line.get_label(): list(line.get_ydata()) for line in panels["labels of the noisy samples"].lines}
    assert lines["wrong labels: recovered"] == pytest.approx([30, 30, 30])
    assert lines["right labels: broken"] == pytest.approx([10, 10, 10])
    assert lines["right as given"] == pytest.approx([60, 60])
    # Half of 100 test images: the exact interval is from 39.8 to 60.2 %.
    (band,) = panels["test samples"].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((39.83, 60.17), abs=0.01)
    assert len(panels["labels of the noisy samples"].collections) == 3
    assert not panels["losses"].collections, "a loss is no share"
    if bilevel:
        assert list(panels["multiplier"].lines[0].get_ydata()) == pytest.approx([0.7] * 3)
        assert panels["multiplier"].get_ylim()[0] == 0
        assert panels["multiplier"].get_ylim()[1] > 0.7


def test_lines_differ_in_more_than_colour(drawn: list[Figure]) -> None:
    pictures.curves(Path("unused"), records(bilevel=True), "title", {})
    lines = drawn[0].axes[1].lines
    assert (
        len({line.get_linestyle() for line in lines}) == len({line.get_marker() for line in lines}) == len(lines) == 3
    )


@pytest.mark.parametrize("classes", [10, 100])
def test_the_heatmap_names_its_classes_and_none_overlap(classes: int, drawn: list[Figure], tmp_path: Path) -> None:
    problem = task(classes)
    _, figure, _ = draw(tmp_path, drawn, problem, torch.eye(classes)[problem.true_labels])
    figure.canvas.draw()
    given, corrected, bar = figure.axes
    assert given.get_title() == "given labels: 90.0 % right"
    assert corrected.get_title() == "corrected labels: 100.0 % right"
    words = given.get_yticklabels()
    assert [word.get_text() for word in words] == [f"class {i}" for i in range(classes)]
    boxes = sorted((word.get_window_extent() for word in words), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    inside = figure.bbox
    for box in (bar.yaxis.label.get_window_extent(), *boxes):
        assert box.x0 >= inside.x0 - 1
        assert box.x1 <= inside.x1 + 1
    numbers = {(text.get_position(), text.get_text()) for text in given.texts}
    assert bool(numbers) == (classes == 10)
    if classes == 10:
        assert ((0, 0), "90") in numbers


def test_the_contact_sheet_counts_what_it_caught(
    drawn: list[Figure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = task(10)
    probabilities = torch.eye(10)[problem.true_labels]
    monkeypatch.setattr(results, "SUSPECTS", 16)
    probabilities[0] = torch.eye(10)[5]  # image 0 is class 0, was given 1, and is corrected to 5
    _, _, figure = draw(tmp_path, drawn, problem, probabilities)
    assert "16 of these 16 given labels are wrong" in figure.get_suptitle()
    titles = [panel.get_title() for panel in figure.axes]
    assert titles[0] == "image 0\ngiven: class 1\nnow: class 5 \N{BALLOT X}\ntrue: class 0"
    assert titles[1] == "image 1\ngiven: class 2\nnow: class 1 \N{CHECK MARK}"
