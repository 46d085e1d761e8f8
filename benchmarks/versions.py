"""What a change costs: steps of two checkouts, by turns. ``python -m benchmarks.versions OTHER_CHECKOUT``.

Each checkout runs in a process of its own, which imports its own `bilevel` and takes a step when it is told to; the
processes take turns, so that what else the machine does meets both. Reported is this checkout over the other one: the
median of the ratios of neighbouring steps, with the central half of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

HERE = Path(__file__).resolve().parents[1]
# Options have had other names in other versions: only defaults here.
METHODS = {
    "BOME": ("BOME", {"inner_steps": 2}),
    "EBOMLC": ("EBOMLC", {}),
    "Unrolled(1)": ("Unrolled", {}),
    "Unrolled(5)": ("Unrolled", {"inner_steps": 5}),
    "EMLC": ("EMLC", {}),
    "Implicit": ("Implicit", {}),
}
WORKER = """
import json, sys, time
import torch
from torch import nn
from torch.nn.functional import cross_entropy
import bilevel

torch.set_num_threads(1)
torch.manual_seed(0)
name, options, tensors = json.loads(sys.argv[1])
layers = [nn.Linear(64, 64) for _ in range(tensors // 2 - 1)]
lower = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())], nn.Linear(64, 10))
upper = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 10))
x, y = torch.randn(100, 64), torch.randint(10, (100,))
optimizer = getattr(bilevel, name)(
    lambda batch: cross_entropy(lower(batch[0]), batch[1]),
    lambda batch: cross_entropy(lower(batch[0]), upper(nn.functional.one_hot(batch[1], 10).float()).softmax(1)),
    upper=upper, lower=lower,
    upper_optimizer=torch.optim.Adam(upper.parameters(), lr=1e-3),
    lower_optimizer=torch.optim.SGD(lower.parameters(), lr=1e-2, momentum=0.9),
    verify="never", **options)
for _ in sys.stdin:
    start = time.perf_counter()
    optimizer.step((x, y), (x, y))
    print(time.perf_counter() - start, flush=True)
"""


def main(arguments: list[str] | None = None) -> int:
    """Compare, and print a table; with ``--output`` also write it as JSON."""
    parser = argparse.ArgumentParser(prog="versions.py", description=__doc__)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--steps", type=int, default=200, help="of each, after twenty to warm up [200]")
    parser.add_argument("--tensors", type=int, default=6, help="of the lower level [6]")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    results = {}
    for label, case in METHODS.items():
        ratios = compared(options.other, (*case, options.tensors), options.steps)
        low, middle, high = quantiles(ratios, n=4)
        results[label] = {"ratio": median(ratios), "half": [low, high], "steps": len(ratios)}
        print(f"{label:<12} {middle:6.3f}  ({low:.3f} ... {high:.3f})", flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps({"tensors": options.tensors, "this over other": results}, indent=2) + "\n")
    return 0


def compared(other: Path, case: Any, steps: int, warm_up: int = 20) -> list[float]:
    """Return the ratios of the times of neighbouring steps."""
    workers = [started(folder, case) for folder in (HERE, other)]
    try:
        found = []
        for turn in range(steps + warm_up):
            pair = workers if turn % 2 == 0 else workers[::-1]
            times = [step(worker) for worker in pair]
            this, that = times if turn % 2 == 0 else times[::-1]
            if turn >= warm_up:
                found.append(this / that)
        return found
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def started(folder: Path, case: Any) -> subprocess.Popen[str]:
    """Start a process that imports the `bilevel` of ``folder``."""
    command = [sys.executable, "-c", WORKER, json.dumps(case)]
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def step(worker: subprocess.Popen[str]) -> float:
    """Let a process take a step, and return its seconds."""
    pipes: tuple[IO[str] | None, IO[str] | None] = (worker.stdin, worker.stdout)
    if pipes[0] is None or pipes[1] is None:
        raise RuntimeError("a worker without pipes")
    pipes[0].write("\n")
    pipes[0].flush()
    return float(pipes[1].readline())


if __name__ == "__main__":
    sys.exit(main())
