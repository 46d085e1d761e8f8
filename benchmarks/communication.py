"""What several processes cost: measured collectives of 2 and 4, and a simulation of 2 to 1,024.

    python -m benchmarks.communication            # measures and simulates; a minute
    python -m benchmarks.communication --smoke

The model. A step makes some exchanges; each is a message of 64 bytes that all must reach (who is last is waited for),
then, for evaluations and products, one reduction of B bytes. Of n processes with latency a per hop and bandwidth b, a
message takes ``2 ceil(log2 n) a`` (a tree, there and back), a reduction the smaller of ``2 (n - 1) (a + B / (n b))`` (a
ring) and ``2 ceil(log2 n) (a + B / b)`` (a tree). Each process computes for a time of its own, with a relative spread.
Nothing is overlapped; beside it stands what would be if every reduction hid behind the backward pass that makes it.

Measured times are the least of several, because other programs share the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel

SIZES = (64, 1 << 12, 1 << 16, 1 << 20, 1 << 24)
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BACKWARD = 2 / 3  # of the time of an evaluation


@dataclass(frozen=True)
class Network:
    """Seconds per hop, bytes per second."""

    name: str
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Job:
    """One step of a method on a model: what each evaluation reduces, and how long one evaluation computes.

    ``messages``: agreements beside the one of each reduction.
    """

    name: str
    reductions: tuple[int, ...]
    seconds: float
    messages: int = 4
    spread: float = 0.03


def bome(lower: int, upper: int) -> tuple[int, ...]:
    """Bytes of each reduction of a step of ``BOME(inner_steps=1)``, in float32: G, G ahead of it, F."""
    return 4 * (lower + upper + 1), 4 * (upper + 1), 4 * (lower + upper + 1)


def unrolled(lower: int, upper: int, steps: int) -> tuple[int, ...]:
    """The same of ``Unrolled(inner_steps=steps)``: the walk, F, back through each step, and the ordinary step."""
    back = (4 * (lower + upper),) * steps
    return ((4 * (lower + 1),) * steps) + (4 * (lower + upper + 1), *back, 4 * (lower + 1))


NETWORKS = (Network("10 Gbit/s Ethernet", 30e-6, 1.25e9), Network("fast fabric", 5e-6, 100e9))
JOBS = (
    Job("BOME, ResNet-32", bome(464_154, 9_000), 0.02),
    Job("BOME, ResNet-50", bome(25_557_032, 100_000), 0.15),
    Job("Unrolled(5), ResNet-50", unrolled(25_557_032, 100_000, 5), 0.15),
    Job("BOME, 1.3 G weights", bome(1_300_000_000, 100_000), 1.5),
)


def message_time(ranks: int, network: Network) -> float:
    return 2 * math.ceil(math.log2(ranks)) * network.latency


def reduction_time(size: float, ranks: int, network: Network) -> float:
    ring = 2 * (ranks - 1) * (network.latency + size / (ranks * network.bandwidth))
    tree = 2 * math.ceil(math.log2(ranks)) * (network.latency + size / network.bandwidth)
    return min(ring, tree)


@dataclass(frozen=True)
class Simulated:
    """Mean seconds of a step: computing alone, waiting for the last one, sending; and the sum if sending is hidden."""

    computing: float
    waiting: float
    sending: float
    overlapped: float

    @property
    def efficiency(self) -> float:
        return self.computing / (self.computing + self.waiting + self.sending)


def simulate(job: Job, ranks: int, network: Network, steps: int = 20, seed: int = 0) -> Simulated:
    """Let every process draw how long it computes, evaluation by evaluation; the last one is waited for each time."""
    draw = random.Random(seed)
    waiting = sending = overlapped = 0.0
    for _ in range(steps):
        sending += job.messages * message_time(ranks, network)
        overlapped += job.messages * message_time(ranks, network)
        for size in job.reductions:
            last = max(job.seconds * max(0.0, draw.gauss(1.0, job.spread)) for _ in range(ranks))
            told, sent = message_time(ranks, network), reduction_time(size, ranks, network)
            waiting += last - job.seconds
            sending += told + sent
            overlapped += last + told + max(0.0, sent - BACKWARD * job.seconds)
    computing = len(job.reductions) * job.seconds
    return Simulated(computing, waiting / steps, sending / steps, overlapped / steps)


def fitted(seconds: dict[int, float], ranks: int) -> Network:
    """The latency and bandwidth that a ring would need for the measured times of the smallest and the largest size."""
    small, large = min(seconds), max(seconds)
    latency = seconds[small] / (2 * (ranks - 1))
    rest = max(seconds[large] - seconds[small], 1e-12)
    return Network(f"gloo, {ranks} processes here", latency, 2 * (ranks - 1) / ranks * large / rest)


def measure(ranks: int, repeats: int, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Start gloo processes on this machine; time collectives, and count what a step of BOME sends."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (ranks, folder, repeats, tuple(sizes)), nprocs=ranks, start_method="spawn")
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    found["seconds"] = {int(size): value for size, value in found["seconds"].items()}
    return found


def _process(rank: int, ranks: int, folder: str, repeats: int, sizes: Sequence[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    seconds = {}
    for size in sizes:
        numbers = torch.zeros(size // 4)
        seconds[size] = _least(lambda numbers=numbers: dist.all_reduce(numbers), repeats)
    reductions, given, messages = _sent()
    if rank == 0:
        result = {"seconds": seconds, "reductions": reductions, "bytes": given, "messages": messages}
        (Path(folder) / "found.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def _sent() -> tuple[int, int, int]:
    """Reductions, bytes and messages of a step of BOME that compares no variables."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    shift = torch.zeros(10, requires_grad=True)
    optimizer = bilevel.BOME(
        lambda batch: cross_entropy(model(batch[0]), batch[1]),
        lambda batch: cross_entropy(model(batch[0]) + shift, batch[1]),
        upper=shift,
        lower=model,
        upper_optimizer=torch.optim.Adam([shift], lr=1e-3),
        lower_optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        process_group=dist.group.WORLD,
        verify="never",
    )
    batch = torch.randn(128, 256), torch.randint(10, (128,))
    for _ in range(2):
        optimizer.step(batch, batch)
    assert optimizer.processes is not None
    traffic = optimizer.processes.traffic
    before = traffic.reductions, traffic.bytes, traffic.messages
    optimizer.step(batch, batch)
    return traffic.reductions - before[0], traffic.bytes - before[1], traffic.messages - before[2]


def _least(call: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


def sending(found: dict[str, Any]) -> float:
    """Seconds that a step of BOME sends for, by the measured times of its messages and its reductions."""
    seconds, each = found["seconds"], found["bytes"] / found["reductions"]
    smaller, larger = max(s for s in seconds if s <= each), min(s for s in seconds if s >= each)
    share = (each - smaller) / max(larger - smaller, 1)
    reduction = (1 - share) * seconds[smaller] + share * seconds[larger]
    return float(found["messages"] * seconds[min(seconds)] + found["reductions"] * reduction)


def report(measured: dict[int, dict[str, Any]], ranks: Sequence[int]) -> str:
    lines = ["Measured: gloo on this machine, least of 30 times"]
    for count, found in measured.items():
        times = ", ".join(f"{size:>9,} B {1e6 * s:9,.0f} us" for size, s in found["seconds"].items())
        network = fitted(found["seconds"], count)
        lines += [
            f"  {count} processes, all-reduce: {times}",
            f"    as a ring: {1e6 * network.latency:,.0f} us a hop, {network.bandwidth / 1e9:.2f} GB/s",
            f"    a step of BOME, 137 k weights: {found['reductions']} reductions of {found['bytes']:,} bytes and "
            f"{found['messages']} messages, at these times {1e3 * sending(found):.1f} ms",
        ]
    for network in NETWORKS:
        lines += [
            "",
            f"Simulated: {network.name}, {1e6 * network.latency:.0f} us a hop, {network.bandwidth / 1e9:g} GB/s",
        ]
        lines += [f"  {'':26}{'MB/step':>9}" + "".join(f"{n:>7}" for n in ranks)]
        for job in JOBS:
            runs = [simulate(job, n, network) for n in ranks]
            start = f"  {job.name:26}{sum(job.reductions) / 1e6:>9,.1f}"
            lines.append(start + "".join(f"{100 * run.efficiency:>6.0f}%" for run in runs))
            hidden = (run.computing / run.overlapped for run in runs)
            lines.append(f"  {'  if hidden':26}{'':>9}" + "".join(f"{100 * part:>6.0f}%" for part in hidden))
    lines += [
        "",
        "Per cent of a step that is computing; the rest is waiting for the slowest process (3 % spread) and sending.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few repeats, 2 processes alone")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    options = parser.parse_args(arguments)
    counts, repeats = ((2,), 3) if options.smoke else ((2, 4), 30)
    sizes = (64, 1 << 20) if options.smoke else SIZES
    text = report({count: measure(count, repeats, sizes) for count in counts}, RANKS[:3] if options.smoke else RANKS)
    text += f"\n{torch.get_num_threads()} thread a process, torch {torch.__version__}, Python {sys.version.split()[0]}"
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
