"""Which way `Unrolled` takes by default, and which one is faster: ``python -m benchmarks.unrolled_default``.

A step of MW-Net (``unrolling.py``) with the adjoint, with the kept graph, and by hand, on networks with and without
convolutions, k = 1, 5 and 20. Contestants take turns; a number is the median over rounds of the ratio of processor
times to the hand-written step of the same round, with its interval. The last column is the default's way.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.hypergradient import CPU, FEW, Attention, agreement
from benchmarks.step_time import Setting
from benchmarks.timing import median_of, ratios, take_turns
from benchmarks.unrolling import ByHand, Library, LibraryGraph


class LibraryDefault(Library):
    """`bilevel.Unrolled` as it is."""

    differentiate = "auto"


class Widths(nn.Module):
    """A perceptron, and its last hidden layer as the features."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        hidden = [layer for pair in pairs[:-1] for layer in (nn.Linear(*pair), nn.ReLU())]
        self.body, self.head = nn.Sequential(*hidden), nn.Linear(*pairs[-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x.flatten(1))
        return self.head(features), features


class SmallConvolutions(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(32 * 49, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(features), features


def perceptron(widths: tuple[int, ...], batch: int, rounds: int) -> Setting:
    """Return the setting of a perceptron."""
    name = f"perceptron {'-'.join(map(str, widths))}, batch {batch}"
    return Setting(name, lambda: Widths(*widths), (widths[0],), batch=batch, rounds=rounds)


SUITE = (
    perceptron((64, 64, 10), 10, 60),
    perceptron((784, 256, 256, 10), 100, 40),
    perceptron((784, 1024, 1024, 10), 256, 12),
    Setting("transformer layer, 50 x 16 tokens of 64", Attention, (16, 64), batch=50, rounds=15),
    Setting("two convolutions, 32 images of 1 x 28 x 28", SmallConvolutions, (1, 28, 28), batch=32, rounds=30),
    Setting("two convolutions, 256 images of 1 x 28 x 28", SmallConvolutions, (1, 28, 28), batch=256, rounds=15),
    FEW,
)
WAYS = {"adjoint": Library, "graph": LibraryGraph, "by hand": ByHand}


def compared(setting: Setting, steps: int, rounds: int) -> dict[str, Any]:
    """Return the ratios of both ways to the hand-written step, and the default's way."""
    agreement(setting, steps, WAYS)
    contestants = {name: kind(setting.network, steps) for name, kind in WAYS.items()}
    pool = [setting.batches(seed, CPU) for seed in range(3)]
    calls = {name: lambda turn, c=c: c.step(*pool[turn % 3]) for name, c in contestants.items()}
    times = take_turns(calls, rounds, wait=lambda: None, warm_up=2)
    hand = [t.processor for t in times.pop("by hand")]
    row: dict[str, Any] = {"setting": setting.name, "steps": steps, "rounds": rounds}
    for name, each in times.items():
        middle = median_of(ratios([t.processor for t in each], hand))
        row[name] = [middle.value, middle.low, middle.high]
    default = LibraryDefault(setting.network, steps)
    taken = default.optimizer.directions(*pool[0]).stats.product
    row["default"] = "graph" if taken == "graph" else "adjoint"
    return row


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print and return the table, and write it to a file."""
    parser = argparse.ArgumentParser(description="Which way Unrolled takes by default, and which one is faster.")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--settings", nargs="+", default=[""], help="beginnings of the settings' names")
    parser.add_argument("--rounds", type=int, help="instead of each setting's own")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/unrolled_default.json"))
    parser.add_argument("--smoke", action="store_true", help="the smallest perceptron and few rounds: seconds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    suite = [s for s in SUITE if s.name.startswith(tuple(options.settings))]
    steps, rounds = options.steps, options.rounds
    if options.smoke:
        suite, steps, rounds = [SUITE[0]], [1, 3], 3
    rows = []
    for setting in suite:
        for k in steps:
            with sdpa_kernel(SDPBackend.MATH):  # for the hand: the other kernels have no second derivative
                row = compared(setting, k, rounds or (setting.rounds if k < 20 else max(setting.rounds // 3, 5)))
            shown = ", ".join(
                f"{way} {row[way][0]:.2f} ({row[way][1]:.2f} ... {row[way][2]:.2f})" for way in WAYS if way in row
            )
            print(f"{setting.name}, k = {k}: {shown}; default {row['default']}", flush=True)
            rows.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
