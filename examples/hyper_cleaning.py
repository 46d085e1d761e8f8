"""Data hyper-cleaning, BOME's own benchmark: ``python -m examples.hyper_cleaning``.

Half of the training labels are replaced by random ones. The lower problem fits a linear classifier with one weight in
[0, 1] per training image; the upper problem moves the weights so that the classifier does well on a small trusted set.
Weights of wrong labels should fall to 0. The test accuracy should lie between that of the trusted images alone and that
of all images with their true labels. Of the steps, the one with the least loss on further trusted images is kept.

Measured, test accuracy, mean of seeds 1 to 3: on digits (10 s of one CPU core) 86.3 % with noisy labels, 89.6 % with
the trusted images only, 92.3 % with BOME, 96.1 % with true labels, F1 0.940; on the first 10,000 + 2,000 images of
Fashion-MNIST (94 s) 74.2, 79.8, 81.9 and 84.7 %, F1 0.910. The order is the same on each seed of both.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if not __package__:  # started as a script: replace the script's folder by the checkout on the module search path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import bilevel
from examples.small_images import Batch, Data, accuracy, fashion_folder, load


def penalty(model: nn.Module) -> Tensor:
    """Return 0.001 times the squared norm of the variables, as in the paper's code."""
    return 1e-3 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def fit(*batches: Batch) -> nn.Linear:
    """Fit the classifier on labels as they are; the problem is strictly convex, so the start does not matter."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = nn.Linear(x.shape[1], 10).double()
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) + penalty(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def clean(data: Data, model: nn.Module, steps: int, rate: float) -> Tensor:
    """Train ``model`` and a weight per training image by BOME; leave the best step's model, return its weights."""
    weights = torch.full((len(data.x),), 0.5, dtype=torch.float64, requires_grad=True)
    # The derivative of a mean by one of its n weights is of order 1/n: the rate makes up for it.
    upper_optimizer = torch.optim.SGD([weights], lr=0.02 * len(weights), momentum=0.9)

    def project(*_: object) -> None:
        weights.data.clamp_(0, 1)

    upper_optimizer.register_step_post_hook(project)

    def upper_loss() -> Tensor:
        return cross_entropy(model(data.upper[0]), data.upper[1])

    def lower_loss() -> Tensor:
        return (weights * cross_entropy(model(data.x), data.given, reduction="none")).mean() + penalty(model)

    optimizer = bilevel.BOME(
        upper_loss,
        lower_loss,
        upper=weights,
        lower=model,
        upper_optimizer=upper_optimizer,
        lower_optimizer=torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9),
        barrier=bilevel.barrier.Value(0.5),
    )
    seen = []
    for step in range(1, steps + 1):
        optimizer.step()
        if step % 20 == 0:
            loss = cross_entropy(model(data.select[0]), data.select[1]).item()
            seen.append((loss, step, deepcopy(model.state_dict()), weights.detach().clone()))
    *_, state, best = min(seen)
    model.load_state_dict(state)
    return best


def draw(file: Path, data: Data, weights: Tensor) -> None:
    """Draw the five images of each given label with the lowest weights; green: the label was wrong, red: right."""
    side = int(data.x.shape[1] ** 0.5)
    panels = (figure := Figure((9, 5.4), layout="constrained")).subplots(5, 10)
    figure.suptitle("Thrown out, by given label. Above each: the true label; green: rightly thrown out, red: wrongly")
    for panel in panels.flat:
        panel.axis("off")
    for label in range(10):
        members = (data.given == label).nonzero().squeeze(1)
        for row, image in enumerate(members[weights[members].argsort(stable=True)[:5]].tolist()):
            panels[row, label].imshow(data.x[image].reshape(side, side).numpy(), cmap="gray_r")
            true = int(data.true[image])
            given = f"given\n{data.names[label]}\n\n" if row == 0 else ""
            colour = "red" if true == label else "green"
            panels[row, label].set_title(given + data.names[true], fontsize=8, color=colour)
    figure.savefig(file, dpi=80)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Clean the labels of each seed, print and return the mean results, and draw what the first seed threw out."""
    parser = argparse.ArgumentParser(description="Data hyper-cleaning, BOME's own benchmark.")
    at = "folder of Fashion-MNIST's idx files, gzipped or not [$BILEVEL_DATA, if they are there, else the digits]"
    parser.add_argument("--data", type=Path, default=fashion_folder(), help=at)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/hyper_cleaning"), help="folder of the picture")
    parser.add_argument("--smoke", action="store_true", help="the first seed and 200 steps: seconds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds, began = options.seeds[:1] if options.smoke else options.seeds, time.perf_counter()
    rows = []
    for seed in seeds:
        data = load(options.data, seed, noise=0.5)
        noisy, trusted = fit((data.x, data.given), data.upper), fit(data.upper)
        row = {"noisy + upper": accuracy(noisy, data.test), "upper only": accuracy(trusted, data.test)}
        # From the noisy solution, as in the paper. Steps must be smaller where there are more pixels.
        steps, rate = (600, 0.05) if options.data is None else (1000, 0.01)
        weights = clean(data, noisy, 200 if options.smoke else steps, rate)
        row["BOME"] = accuracy(noisy, data.test)
        row["clean + upper"] = accuracy(fit((data.x, data.true), data.upper), data.test)
        kept, right = weights > 0.5, data.given == data.true
        row["F1"] = float(2 * (kept & right).sum() / (kept.sum() + right.sum()))
        rows.append(row)
        values = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        print(f"seed {seed}: {(~right).sum()} of {len(right)} training labels wrong; {values}")
        if seed == seeds[0]:
            draw(options.out / "thrown_out.png", data, weights)
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    values = ", ".join(f"{name} {value:.3f}" for name, value in mean.items())
    print(f"hyper-cleaning, mean of seeds {seeds}, test accuracy: {values}; {time.perf_counter() - began:.0f} s")
    return mean


if __name__ == "__main__":
    main()
