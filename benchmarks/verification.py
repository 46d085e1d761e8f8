"""What comparing shortcuts with plain autograd costs: steps 1 to 1,000 with `verify="auto"` against `verify="never"`.

    python -m benchmarks.verification               # a perceptron step by step, a ResNet-32 from its parts
    python -m benchmarks.verification --smoke       # seconds, to see that it runs

Of a network whose steps are quick, all 1,000 are taken, in alternating pairs of blocks. Of a slow one, looks and the
steps between looks are timed by themselves, alternately, and put together: 1,000 steps have eleven looks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch

import bilevel
from benchmarks.problem import losses
from benchmarks.step_time import PERCEPTRON, RESNET, SMOKE, Setting
from examples.noisy_labels.recipes.models import Corrector

CPU = torch.device("cpu")
METHODS: Mapping[str, tuple[type[Any], Mapping[str, Any]]] = {
    "EBOMLC": (bilevel.EBOMLC, {}),
    "EMLC": (bilevel.EMLC, {}),
    "Unrolled, k = 5": (bilevel.Unrolled, {"inner_steps": 5}),
    "FiniteDifference": (bilevel.FiniteDifference, {}),
}
LOOKS = 10  # in 1,000 steps: 1, 2, 4, ..., 512


def step_of(setting: Setting, method: str, verify: str) -> Callable[[], object]:
    """Return a function that takes one step of a method on the losses of label correction."""
    torch.manual_seed(0)
    classifier = setting.network()
    corrector = Corrector(int(classifier.features), setting.classes)  # type: ignore[arg-type]
    kind, options = METHODS[method]
    optimizer = kind(
        *losses(classifier, corrector),
        upper=corrector,
        lower=classifier,
        upper_optimizer=torch.optim.Adam(corrector.parameters(), lr=3e-4),
        lower_optimizer=torch.optim.SGD(classifier.parameters(), lr=0.01),
        verify=verify,
        **options,
    )
    batches = setting.batches(0, CPU)
    return lambda: optimizer.step(*batches)


def seconds(work: Callable[[], object], times: int) -> float:
    """Return how long ``work`` takes, done so many times."""
    began = perf_counter()
    for _ in range(times):
        work()
    return perf_counter() - began


def whole(setting: Setting, method: str, steps: int, pairs: int) -> list[float]:
    """Time all steps, from fresh optimizers, and return the ratios pair by pair."""
    ratios = []
    for _ in range(pairs):
        taken = {}
        for verify in ("auto", "never"):
            step = step_of(setting, method, verify)
            taken[verify] = seconds(step, steps)
        ratios.append(taken["auto"] / taken["never"])
    return ratios


def from_parts(setting: Setting, method: str, rounds: int) -> list[float]:
    """Time the first two looks, then later ones, steps between and bare steps; return ratios of 1,000 steps."""
    work = {verify: step_of(setting, method, verify) for verify in ("always", "auto", "never")}
    work["never"]()  # makes the optimizers' state
    first = seconds(work["auto"], 1) + seconds(work["auto"], 1)  # what these suspect is decided in float64
    seconds(work["always"], 2)
    taken, ratios = 2, []
    for _ in range(rounds):
        taken += 1
        if taken & (taken - 1) == 0:  # a look: not one of the steps between
            work["auto"]()
            taken += 1
        look, between, bare = (seconds(work[verify], 1) for verify in ("always", "auto", "never"))
        ratios.append((first + (LOOKS - 2) * look + (1000 - LOOKS) * between) / (1000 * bare))
    return ratios


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny network and few steps")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quick, slow = (SMOKE, SMOKE) if chosen.smoke else (PERCEPTRON, RESNET)
    steps, pairs, rounds = (20, 2, 2) if chosen.smoke else (1000, 5, 7)
    print(f"{'':<20}{'verify=auto / verify=never, steps 1 to 1,000':>50}")
    for setting, measure in (
        (quick, lambda s, m: whole(s, m, steps, pairs)),
        (slow, lambda s, m: from_parts(s, m, rounds)),
    ):
        print(setting.name)
        for method in METHODS:
            ratios = measure(setting, method)
            print(f"  {method:<20}{median(ratios):>8.3f}  ({min(ratios):.3f} ... {max(ratios):.3f})", flush=True)


if __name__ == "__main__":
    main()
