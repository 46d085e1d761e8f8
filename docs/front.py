"""Draws ``front.png`` of the front page from the program that the page shows: ``python docs/front.py``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
ORANGE, BLUE = "#d55e00", "#0072b2"


def run(page: Path) -> dict[str, Any]:
    """What the page's first program computes, and the model that it would be without sample weights."""
    (program,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[:1]
    names: dict[str, Any] = {}
    exec(program, names)
    plain = torch.nn.Linear(2, 1)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(500):
        sgd.zero_grad()
        names["loss"](plain(names["x"])[:, 0], names["given"]).backward()
        sgd.step()
    return {**names, "plain": plain}


def draw(found: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    before, after = figure.subplots(1, 2, sharex=True, sharey=True)
    x, given, truth = found["x"], found["given"], found["truth"]
    weights = found["weights"].detach().sigmoid()
    for axes, model, alpha, title in (
        (before, found["plain"], torch.ones_like(weights), "plain training: every label counts"),
        (after, found["model"], 0.08 + 0.92 * weights, "bilevel: weights learned from 20 trusted labels"),
    ):
        for label, marker, colour in ((0, "o", BLUE), (1, "s", ORANGE)):
            chosen = given == label
            axes.scatter(*x[chosen].T, marker=marker, c=colour, alpha=alpha[chosen], s=26, linewidths=0)
        wrong = given != truth
        axes.scatter(*x[wrong].T, s=70, facecolors="none", edgecolors="#00000055", linewidths=0.7)
        (a, b), c = model.weight[0].tolist(), model.bias.item()
        line = torch.tensor([-3.5, 3.5])
        axes.plot(line, -(a * line + c) / b, "k-", linewidth=1.8)
        right = ((model(x)[:, 0] > 0) == truth.bool()).float().mean()
        axes.set(title=f"{title}\n{100 * right:.0f} % classified right", xlim=(-3, 3), ylim=(-3, 3))
        axes.title.set_size(10)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(run(HERE / "index.md"), HERE / "front.png")
