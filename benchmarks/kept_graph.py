"""What `Implicit` saves by keeping its gradient's graph: many Hessian products at one point, with and without.

    python -m benchmarks.kept_graph | tee docs/results/kept_graph.txt      # minutes
    python -m benchmarks.kept_graph --smoke                                # seconds, to see that it runs

Both ways take the same products along the same directions by double backward. One calls the lower loss and
differentiates it anew for each, the other once for all. Before anything is timed they must agree in float64, else the
program ends with status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.hypergradient import CPU, FEW, PERCEPTRON, TINY, label_correction
from benchmarks.memory import peak_bytes
from benchmarks.step_time import Setting, machine
from benchmarks.timing import median_of, ratios, take_turns
from bilevel.evaluation.oracle import Oracle
from bilevel.hypergradient import HessianProducts, hessian_product

PLAN = ((PERCEPTRON, (1, 5, 20)), (FEW, (1, 5)))  # problems, and how many products
SMOKE = ((TINY, (1, 5)),)
TOLERANCE = 1e-12  # of products in float64, relative


def anew(oracle: Oracle, directions: list[list[Tensor]]) -> list[list[Tensor | None]]:
    """Each product with a graph of its own."""
    return [list(hessian_product(oracle, v, product="reverse")[1]) for v in directions]


def kept(oracle: Oracle, directions: list[list[Tensor]]) -> list[list[Tensor | None]]:
    """All products with one."""
    with HessianProducts(oracle, product="reverse") as products:
        return [list(products(v)) for v in directions]


def apart(a: list[list[Tensor | None]], b: list[list[Tensor | None]]) -> float:
    """The largest relative difference."""
    pairs = [(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)]
    return max(float((x - y).norm() / y.norm().clamp(min=1e-300)) for x, y in pairs if x is not None and y is not None)


def measured(setting: Setting, count: int, rounds: int) -> list[str] | None:
    """Compare the two in float64, then time them and follow their memory; None: they disagree."""
    made = label_correction(setting)
    clean, noisy = setting.batches(0, CPU, torch.float64)
    made.emlc.lower_level.modules[0].double()
    made.emlc.upper_level.modules[0].double()
    with made.emlc._oracle((clean, noisy), verifies=False) as oracle:
        directions = drawn(oracle, count)
        if apart(anew(oracle, directions), kept(oracle, directions)) > TOLERANCE:
            return None
    made = label_correction(setting)
    clean, noisy = setting.batches(0, CPU)
    with made.emlc._oracle((clean, noisy), verifies=False) as oracle:
        oracle.lower()
        directions = drawn(oracle, count)
        work: dict[str, Callable[[int], object]] = {
            "anew": lambda turn: anew(oracle, directions),
            "kept": lambda turn: kept(oracle, directions),
        }
        resident = [*made.lower.parameters(), noisy.inputs, *(x for v in directions for x in v)]
        peaks = {name: peak_bytes(lambda call=call: call(0), resident, CPU) for name, call in work.items()}
        times = take_turns(work, rounds, wait=lambda: None, warm_up=1)
    ratio = median_of(ratios(*([t.processor for t in times[name]] for name in ("kept", "anew"))))
    seconds = {name: median_of([t.processor for t in times[name]]).value for name in work}
    return [
        f"{count:3} products",
        f"{1e3 * seconds['anew']:9.1f} ms anew",
        f"{1e3 * seconds['kept']:9.1f} ms kept",
        f"ratio {ratio.value:.3f} ({ratio.low:.3f} ... {ratio.high:.3f}, {ratio.coverage:.0%})",
        f"peak {peaks['anew'] / 2**20:.1f} / {peaks['kept'] / 2**20:.1f} MiB",
    ]


def drawn(oracle: Oracle, count: int) -> list[list[Tensor]]:
    """Random directions like the lower variables."""
    torch.manual_seed(1)
    return [[torch.randn_like(x) for x in oracle.point() if x is not None] for _ in range(count)]


def main(arguments: list[str] | None = None) -> int:
    """Run, and print a line for each number of products."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny problem, few rounds")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("processor time, medians of rounds by turns;", ", ".join(f"{k} {v}" for k, v in machine(CPU).items()))
    for setting, counts in SMOKE if given.smoke else PLAN:
        print(setting.name)
        for count in counts:
            line = measured(setting, count, 3 if given.smoke else given.rounds)
            if line is None:
                print("the two disagree in float64", file=sys.stderr)
                return 1
            print("  " + "  ".join(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
