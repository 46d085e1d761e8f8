"""Many steps of every method: do memory and time stay flat? ``python -m benchmarks.soak --steps 100000``.

Each method takes its steps on a tiny problem, in blocks. After each block: the microseconds of a step, the bytes of the
process, and the tensors that are alive. A leak of a tensor a step, or a list that grows, shows in the last two; work
that gets longer in the first. Prints a table in Markdown; ends with status 1 if tensors have been left over, or memory
grew by more than ``--growth`` MiB after the first two blocks.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import bilevel
from bilevel import Indexed

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "BOME": (bilevel.BOME, {}),
    "EBOMLC": (bilevel.EBOMLC, {}),
    "Unrolled": (bilevel.Unrolled, {}),
    "Unrolled, graph": (bilevel.Unrolled, {"inner_steps": 2}),
    "EMLC": (bilevel.EMLC, {}),
    "MLC": (bilevel.MLC, {}),
    "Implicit": (bilevel.Implicit, {"solver": bilevel.Neumann(2)}),
    "FiniteDifference": (bilevel.FiniteDifference, {}),
    "SAMA": (bilevel.SAMA, {}),
    "VPBGD": (bilevel.VPBGD, {"penalty": 1.0}),
    "F2SA": (bilevel.F2SA, {"penalty": 10.0, "inner_steps": 1}),
    "BVFSM": (bilevel.BVFSM, {"inner_steps": 1, "value_steps": 1, "penalty": 0.1}),
    "PDBO": (bilevel.PDBO, {}),
    "GPBGD": (bilevel.GPBGD, {}),
    "SOBA": (bilevel.SOBA, {}),
    "MASOBA": (bilevel.MASOBA, {}),
    "SABA": (bilevel.SABA, {"upper_rows": 1, "lower_rows": 1}),
    "MEHA": (bilevel.MEHA, {}),
    "BSG1": (bilevel.BSG1, {}),
}


@dataclass(frozen=True)
class Block:
    """What was seen after one block of steps."""

    microseconds: float
    mebibytes: float
    tensors: int


def resident() -> float:
    """Return the MiB of this process that are in memory."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**20
    return 0.0  # other platforms: the tensors alone are counted


def alive() -> int:
    """Count the tensors that are alive."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def soaked(name: str, steps: int, blocks: int) -> list[Block]:
    """Take the steps of one method."""
    torch.manual_seed(0)
    model, corrector = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)), nn.Linear(3, 3)

    def upper_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def lower_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), corrector(one_hot(batch[1], 3).float()).softmax(1))

    method, options = METHODS[name]
    optimizer = method(
        upper_loss,
        lower_loss,
        upper=corrector,
        lower=model,
        upper_optimizer=torch.optim.SGD(corrector.parameters(), lr=1e-4),
        lower_optimizer=torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        on_nonfinite="skip",
        **options,
    )
    batches = [Indexed(0, (torch.randn(8, 4), torch.randint(3, (8,)))) for _ in range(2)]
    seen = []
    for _ in range(blocks):
        start = process_time()
        for _ in range(steps // blocks):
            optimizer.step(*batches)
        spent = process_time() - start
        seen.append(Block(1e6 * spent / (steps // blocks), resident(), alive()))
    return seen


def main() -> int:
    """Print the table; return 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="of each method")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--growth", type=float, default=8.0, help="MiB that a process may grow after two blocks")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.steps} steps of each method in {options.blocks} blocks\n")
    print("| method | processor us a step: early, last block | MiB: second block, last | tensors: second block, last |")
    print("| --- | --- | --- | --- |")
    grown = []
    for name in options.methods:
        seen = soaked(name, options.steps, options.blocks)
        early, late = seen[1], seen[-1]
        memory = max(block.mebibytes for block in seen[2:]) - seen[1].mebibytes
        if late.tensors > early.tensors or memory > options.growth:
            grown.append(name)
        second = median(block.microseconds for block in seen[1:3])
        print(
            f"| {name} | {second:.0f}, {late.microseconds:.0f} | {seen[1].mebibytes:.1f}, {late.mebibytes:.1f} "
            f"| {early.tensors}, {late.tensors} |",
            flush=True,
        )
    if grown:
        print(f"\ngrew: {', '.join(grown)}")
    return bool(grown)


if __name__ == "__main__":
    sys.exit(main())
