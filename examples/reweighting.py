"""Sample weights against wrong labels, learned in two ways: ``python -m examples.reweighting``.

*L2RW* gives each batch new weights: they start at 0, take one hypergradient step, are cut off at 0 and normalised. So
a weight is the positive part of the inner product of the sample's gradient with the trusted gradient. The script
computes these products by themselves, too, and prints how far the weights are from them. In *MW-Net* one small network
makes the weight of a sample from its loss, and learns from the same hypergradient. Both are
:class:`bilevel.Unrolled` with one virtual step of plain gradient descent.

Measured, mean of seeds 1 to 3 (15 s of one CPU core), 45 % wrong labels, 100 trusted samples: test accuracy 88.9 % with
all weights 1, 89.5 % with the trusted samples only, 92.6 % with L2RW, 93.3 % with MW-Net. Right labels carry 79 % of
L2RW's last weights and 96 % of MW-Net's. L2RW's weights are within 2e-17 of the inner products' positive parts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

if not __package__:  # started as a script: replace the script's folder by the checkout on the module search path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from examples.sample_weights import BATCH, Step, l2rw, losses, mw_net, plain
from examples.small_images import Data, accuracy, load


def classifier(data: Data, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a small network and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(data.x.shape[1], 100), nn.ReLU(), nn.Linear(100, 10)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)


def train(method: Callable[..., Step], data: Data, epochs: int, seed: int) -> tuple[nn.Module, Tensor]:
    """Train a classifier; return it and the weight of each sample when it was last seen."""
    model, optimizer = classifier(data, seed)
    step, last = method(model, optimizer), torch.zeros(len(data.x), dtype=torch.float64)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x)).split(BATCH)[:-1]:  # the last one is not full
            last[rows] = step(data.upper, (data.x[rows], data.given[rows]))
    return model, last


def distance(data: Data, seed: int) -> float:
    """Return how far L2RW's first weights are from the normalised positive parts of the inner products."""
    model, optimizer = classifier(data, seed)
    batch = (data.x[:BATCH], data.given[:BATCH])

    def gradient(loss: Tensor) -> Tensor:
        return parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))

    trusted = gradient(losses(model, data.upper).mean())
    expected = torch.stack([gradient(loss) @ trusted for loss in losses(model, batch)]).relu()
    return float((l2rw(model, optimizer)(data.upper, batch) - expected / expected.sum()).abs().max())


def draw(file: Path, data: Data, results: dict[str, tuple[nn.Module, Tensor]]) -> None:
    """Plot the weight of each sample against its loss at the end of training."""
    figure, right = Figure((9, 3.6), layout="constrained"), data.given == data.true
    for panel, (name, (model, weights)) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        loss = losses(model, (data.x, data.given)).detach()
        for chosen, label in ((right, "right label"), (~right, "wrong label")):
            panel.plot(loss[chosen], weights[chosen] / weights.mean(), ".", alpha=0.3, label=label)
        panel.set(title=name, xlabel="loss", ylabel="weight / mean weight")
        panel.legend()
    figure.savefig(file, dpi=70)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train by each method on each seed, print and return the mean results, and draw the first seed's weights."""
    parser = argparse.ArgumentParser(description="L2RW and MW-Net on digits, 45 % of whose labels are wrong.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/reweighting"), help="folder of the picture")
    parser.add_argument("--smoke", action="store_true", help="the first seed and 15 epochs: seconds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds, epochs = (options.seeds[:1], 15) if options.smoke else (options.seeds, 40)
    began, rows = time.perf_counter(), []
    for seed in seeds:
        data = load(None, seed, noise=0.5)
        row, weighted, right = {"distance": distance(data, seed)}, {}, data.given == data.true
        for name, method in (("plain", plain), ("L2RW", l2rw), ("MW-Net", mw_net)):
            model, weights = weighted[name] = train(method, data, epochs, seed)
            row |= {name: accuracy(model, data.test), f"{name} on right": float(weights[right].sum() / weights.sum())}
        trusted = replace(data, x=data.upper[0].repeat(11, 1), given=data.upper[1].repeat(11))  # as many steps
        row["trusted only"] = accuracy(train(plain, trusted, epochs, seed)[0], data.test)
        rows.append(row)
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()))
        if seed == seeds[0]:
            draw(options.out / "weights.png", data, weighted)
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    values = ", ".join(f"{name} {value:.3g}" for name, value in mean.items())
    print(f"reweighting, mean of seeds {seeds}: {values}; {time.perf_counter() - began:.0f} s")
    return mean


if __name__ == "__main__":
    main()
