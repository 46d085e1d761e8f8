"""Time and peak memory of one `EBOMLC.step`, against the same mathematics by hand and against plain training.

    python -m benchmarks.step_time                  # ResNet-32 with 100 + 100 images, and a small perceptron
    python -m benchmarks.step_time --smoke          # seconds, to see that it runs

First it makes sure that there is something to compare: both must arrive at the same parameters, and take the same
number of passes through the lower model. If not, it says so and exits with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bilevel
from benchmarks.by_hand import ByHand, Plain
from benchmarks.memory import peak_bytes
from benchmarks.passes import Passes, counted
from benchmarks.problem import DELTA, XI, Batch, losses
from benchmarks.timing import Median, median_of, ratios, take_turns
from bilevel.evaluation.verification import Verify
from examples.noisy_labels.recipes.models import Corrector, Perceptron, ResNet

RESULTS = Path(__file__).parent / "results" / "step_time.json"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
STEPS_COMPARED = 3
# The wall's is what a user waits. The processor's is that of the whole process: it ignores what else a shared machine
# does meanwhile, and says nothing about a GPU.
CLOCKS = ("processor", "wall")
# What EBOMLC's documentation promises: two calls of the lower loss, the second forward only, and one of the upper.
PROMISED = Passes(forward=3, backward=2)


class Disagreement(Exception):
    """The contestants do not do the same work, so their times say nothing."""


@dataclass(frozen=True)
class Setting:
    """A problem to time a step on."""

    name: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    rounds: int
    classes: int = 10

    def batches(self, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Batch, Batch]:
        """Return a clean and a noisy batch of noise with random labels."""
        draw = torch.Generator().manual_seed(seed)

        def batch() -> Batch:
            inputs = torch.randn(self.batch, *self.shape, generator=draw, dtype=torch.float64)
            labels = torch.randint(self.classes, (self.batch,), generator=draw)
            return Batch(inputs.to(device, dtype), labels.to(device))

        return batch(), batch()


RESNET = Setting("ResNet-32, 100 + 100 images of 3 x 32 x 32", lambda: ResNet(10), (3, 32, 32), batch=100, rounds=30)
PERCEPTRON = Setting("perceptron, 10 + 10 inputs of 64", lambda: Perceptron(10), (64,), batch=10, rounds=300)
SMOKE = Setting("tiny residual network, 8 + 8 images of 3 x 8 x 8", lambda: ResNet(10, 1, 4), (3, 8, 8), 8, rounds=3)


class Contestant:
    """Networks, torch optimizers and a way to take a step; all contestants of a setting start from the same state."""

    def __init__(
        self,
        setting: Setting,
        kind: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        pace: float = 1,
        *,
        verify: Verify = "never",
    ) -> None:
        torch.manual_seed(0)
        self.classifier = setting.network().to(device, dtype)
        features = int(self.classifier.features)  # type: ignore[arg-type]
        self.corrector = Corrector(features, setting.classes).to(device, dtype)
        self.sgd = torch.optim.SGD(self.classifier.parameters(), lr=0.1 * pace, momentum=0.9, weight_decay=5e-4)
        self.adam = torch.optim.Adam(self.corrector.parameters(), lr=3e-4 * pace, amsgrad=True)
        self.verify = verify  # a step between two looks calls the losses as often as the hand-written one
        self.step: Callable[[Batch, Batch], object] = {
            "library": self._library,
            "by hand": self._by_hand,
            "plain": self._plain,
        }[kind]()

    def values(self) -> list[Tensor]:
        """Return the parameters and buffers of both networks."""
        return [t for m in (self.classifier, self.corrector) for t in (*m.parameters(), *m.buffers())]

    def resident(self) -> list[Tensor]:
        """Return every tensor that stays between steps: those, their gradients, and what the torch optimizers keep."""
        gradients = [t.grad for t in self.values() if t.grad is not None]
        states = [s.values() for o in (self.sgd, self.adam) for s in o.state.values()]
        return [*self.values(), *gradients, *(t for t in chain.from_iterable(states) if isinstance(t, Tensor))]

    def _library(self) -> Callable[[Batch, Batch], object]:
        return bilevel.EBOMLC(
            *losses(self.classifier, self.corrector),
            upper=self.corrector,
            lower=self.classifier,
            upper_optimizer=self.adam,
            lower_optimizer=self.sgd,
            delta=DELTA,
            xi=XI,
            verify=self.verify,
        ).step

    def _by_hand(self) -> Callable[[Batch, Batch], object]:
        return ByHand(self.classifier, self.corrector, self.sgd, self.adam).step

    def _plain(self) -> Callable[[Batch, Batch], object]:
        return Plain(self.classifier, self.sgd).step


def agreement(setting: Setting, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference in a parameter or buffer after three steps, relative to 1 + the entry's size."""
    # At full pace the first steps of an untrained ResNet-32 multiply any difference by some hundreds: float32 rounding,
    # 5e-8 in the parameters after one step, was 3e-5 after three, and said nothing about the mathematics.
    library, by_hand = (Contestant(setting, kind, device, dtype, pace=0.1) for kind in ("library", "by hand"))
    # Convolutions on CUDA may round float32 to ten bits (TF32), and choose their kernel by its time.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for seed in range(STEPS_COMPARED):
            for contestant in (library, by_hand):
                contestant.step(*setting.batches(seed, device, dtype))
    pairs = zip(library.values(), by_hand.values(), strict=True)
    return max(((a - b).abs() / (1 + b.abs())).max().item() for a, b in pairs)


def work(setting: Setting, kind: str, device: torch.device) -> dict[str, Any]:
    """Count what one step of a contestant does: passes through both networks, and floating-point operations."""
    contestant = Contestant(setting, kind, device)
    batches = setting.batches(0, device)
    with counted(contestant.classifier) as lower, counted(contestant.corrector.layers) as upper:
        contestant.step(*batches)
    with FlopCounterMode(display=False) as operations:
        contestant.step(*batches)
    return {"lower": asdict(lower), "upper": asdict(upper), "gflop": operations.get_total_flops() / 1e9}


def memory(setting: Setting, kind: str, device: torch.device) -> int:
    """Return the peak bytes of one step, after a first one has made momentum and moments."""
    contestant = Contestant(setting, kind, device)
    batches = setting.batches(0, device)
    contestant.step(*batches)
    tensors = [*contestant.resident(), *(tensor for batch in batches for tensor in batch)]
    return peak_bytes(lambda: contestant.step(*batches), tensors, device)


def measure(setting: Setting, device: torch.device, rounds: int) -> dict[str, Any]:
    """Compare library, hand and plain training on one problem; refuse if the first two do not do the same."""
    differences = {}
    for dtype, tolerance in TOLERANCE.items():
        difference = differences[str(dtype).removeprefix("torch.")] = agreement(setting, device, dtype)
        if not difference <= tolerance:
            raise Disagreement(
                f"{setting.name}: library and hand differ by {difference:.1e} after {STEPS_COMPARED} steps in {dtype}, "
                f"more than {tolerance:.0e}."
            )
    kinds = ("library", "by hand", "plain")
    done = {kind: work(setting, kind, device) for kind in kinds}
    for kind in ("library", "by hand"):
        if (passes := done[kind]["lower"]) != asdict(PROMISED):
            raise Disagreement(f"{setting.name}: {kind} takes passes {passes}, promised are {asdict(PROMISED)}.")
    bytes_at_peak = {kind: memory(setting, kind, device) for kind in kinds}

    # Timed as users have it, with looks at rounds 1, 2, 4, 8 and 16, which the median does not see; what they cost is
    # benchmarks/verification.py's business.
    contestants = {kind: Contestant(setting, kind, device, verify="auto") for kind in kinds}
    pool = [setting.batches(seed, device) for seed in range(min(rounds, 10))]
    # The loop variable is bound as a default: a closure would see its last value only.
    steps = {kind: lambda turn, c=c: c.step(*pool[turn % len(pool)]) for kind, c in contestants.items()}
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    times = take_turns(steps, rounds, wait=wait)
    result = {
        "setting": setting.name,
        "rounds": rounds,
        "largest difference": differences,
        "work": done,
        "milliseconds": {kind: spread([1e3 * t.wall for t in taken]) for kind, taken in times.items()},
        "peak bytes": bytes_at_peak,
        "bytes of the lower parameters": sum(p.nbytes for p in contestants["library"].classifier.parameters()),
    }
    for clock in CLOCKS[device.type == "cuda" :]:
        seconds = {kind: [getattr(t, clock) for t in taken] for kind, taken in times.items()}
        result[f"{clock} time"] = {
            f"library / {other}": asdict(median_of(ratios(seconds["library"], seconds[other])))
            for other in ("by hand", "plain")
        } | {
            "library - by hand, ms": asdict(
                median_of([1e3 * (a - b) for a, b in zip(seconds["library"], seconds["by hand"], strict=True)])
            )
        }
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the quartiles and the extremes."""
    lower, middle, upper = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower quartile": lower, "upper quartile": upper, "min": min(values), "max": max(values)}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        models = [
            line.partition(":")[2].strip()
            for line in described.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        cpu = models[0] if models else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads used": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bilevel": bilevel.__version__,
    }


def table(result: dict[str, Any]) -> str:
    """Lay out the result of one setting to be read."""
    rows = [f"{result['setting']}, {result['rounds']} rounds"]
    rows.append(f"  {'':<9}{'passes (fwd, bwd)':>18}{'GFLOP':>9}{'median ms':>12}{'quartiles':>20}{'peak MiB':>10}")
    for kind, time in result["milliseconds"].items():
        done = result["work"][kind]
        quartiles = f"{time['lower quartile']:.2f} - {time['upper quartile']:.2f}"
        passes = f"{done['lower']['forward']}, {done['lower']['backward']}"
        peak = result["peak bytes"][kind] / 2**20
        rows.append(f"  {kind:<9}{passes:>18}{done['gflop']:>9.3f}{time['median']:>12.2f}{quartiles:>20}{peak:>10.2f}")
    peak, copy = result["peak bytes"], result["bytes of the lower parameters"]
    for other in ("by hand", "plain"):
        flops = result["work"]["library"]["gflop"] / result["work"][other]["gflop"]
        rows.append(f"  library / {other}")
        for clock in CLOCKS:
            if f"{clock} time" in result:
                found = Median(**result[f"{clock} time"][f"library / {other}"])
                interval = f"{found.low:.3f} ... {found.high:.3f} with {found.coverage:.1%}"
                rows.append(f"    {clock} time{'':<{11 - len(clock)}}{found.value:.3f}  ({interval})")
        rows.append(f"    operations      {flops:.3f}")
        more = f"{(peak['library'] - peak[other]) / 2**20:+.2f} MiB; the lower parameters are {copy / 2**20:.2f} MiB"
        rows.append(f"    peak memory     {peak['library'] / peak[other]:.3f}  ({more})")
    differences = ", ".join(f"{value:.0e} in {dtype}" for dtype, value in result["largest difference"].items())
    rows.append(f"  largest difference from hand after {STEPS_COMPARED} steps: {differences}")
    return "\n".join(rows)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--pairs", type=int, help="rounds, of each contestant once (default: 30; perceptron: 300)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU (default: 1)")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, 3 rounds; writes no results")
    parser.add_argument("--output", type=Path, help=f"JSON to write (default: benchmarks/results/{RESULTS.name})")
    options = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(options.threads)
    about = machine(options.device)
    print(", ".join(f"{name}: {value}" for name, value in about.items()))
    results = []
    try:
        for setting in [SMOKE] if options.smoke else [RESNET, PERCEPTRON]:
            results.append(measure(setting, options.device, options.pairs or setting.rounds))
            print(table(results[-1]), flush=True)
    except Disagreement as problem:
        print(problem, file=sys.stderr)
        return 1
    output = options.output or (None if options.smoke else RESULTS)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
