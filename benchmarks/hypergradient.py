"""What hypergradients cost: products of the lower loss, `Unrolled` against others, and memory over k.

    python -m benchmarks.hypergradient | tee docs/results/hypergradient.txt        # an hour on one core
    python -m benchmarks.hypergradient --smoke                                     # seconds, to see that it runs
    python -m benchmarks.hypergradient --only products memory

higher and TorchOpt take part where they are installed. Before a time is taken, all contestants must find the same
hypergradient in float64; if not, the program says so and exits with status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bilevel
from benchmarks.memory import peak_bytes
from benchmarks.passes import counted
from benchmarks.problem import Batch, losses
from benchmarks.step_time import Disagreement, Setting, machine, spread
from benchmarks.timing import Median, Seconds, median_of, ratios, take_turns
from benchmarks.unrolling import RATE, ByHand, Library, LibraryGraph, Reweighting, present
from bilevel.hypergradient import ProductMode, hessian_product, mixed_product
from examples.noisy_labels.recipes.models import Corrector, Perceptron, ResNet

RESULTS = Path(__file__).parent / "results" / "hypergradient.json"
PARTS = ("products", "unrolled", "memory")
TOLERANCE = 1e-9  # of hypergradients in float64, relative to the hand-written one


class Attention(nn.Module):
    """A transformer layer on 16 tokens, and its mean as the features."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, classes)
        self.features = width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layer(x).mean(1)
        return self.head(features), features


@dataclass(frozen=True)
class Plan:
    """What is measured: products on some problems, steps on some with some k, memory over k on one."""

    products: tuple[Setting, ...]
    unrolled: tuple[tuple[Setting, tuple[int, ...]], ...]
    memory: tuple[Setting, tuple[int, ...]]


RESNET = Setting("ResNet-32, 100 images of 3 x 32 x 32", lambda: ResNet(10), (3, 32, 32), batch=100, rounds=30)
PERCEPTRON = Setting("perceptron 64-128-64-10, 100 inputs", lambda: Perceptron(10), (64,), batch=100, rounds=100)
ATTENTION = Setting("transformer layer, 50 x 16 tokens of 64", Attention, (16, 64), batch=50, rounds=50)
FEW = Setting("ResNet-32, 8 images of 3 x 32 x 32", lambda: ResNet(10), (3, 32, 32), batch=8, rounds=30)
TINY = Setting("tiny residual network, 8 images of 3 x 8 x 8", lambda: ResNet(10, 1, 4), (3, 8, 8), 8, rounds=3)
FULL = Plan((RESNET, PERCEPTRON, ATTENTION), ((FEW, (1, 5, 20)), (PERCEPTRON, (1, 5, 20))), (FEW, (1, 2, 4, 8, 16)))
SMOKE = Plan((TINY,), ((TINY, (1, 3)),), (TINY, (1, 2)))
CPU = torch.device("cpu")


# --- products of the lower loss ------------------------------------------------------------------------------------


def products(setting: Setting) -> dict[str, Any]:
    """Time products of G by each route, and EMLC's whole step, in gradients of G and in plain training steps."""
    clean, noisy = setting.batches(0, CPU)
    made = label_correction(setting)
    plain = torch.optim.SGD(label_correction(setting).lower.parameters(), lr=RATE)
    classifier = made.lower
    with made.emlc._oracle((clean, noisy), verifies=False) as oracle:
        oracle.lower()
        direction = [torch.randn_like(x) for x in oracle.point()]

        def product(kind: Callable[..., Any], mode: ProductMode) -> Callable[[int], object]:
            return lambda turn: kind(oracle, direction, product=mode)

        work: dict[str, Callable[[int], object]] = {
            "gradient of G": lambda turn: oracle.lower(wrt="lower"),
            "mixed product, forward": product(mixed_product, "forward"),
            "mixed product, reverse": product(mixed_product, "reverse"),
            "Hessian product, forward": product(hessian_product, "forward"),
            "Hessian product, reverse": product(hessian_product, "reverse"),
        }
        passes, peaks = {}, {}
        for name, call in work.items():
            with counted(classifier) as seen:
                call(0)
            passes[name] = asdict(seen)
            peaks[name] = peak_bytes(lambda call=call: call(0), [*classifier.parameters(), noisy.inputs], CPU)
        times = take_turns(work, setting.rounds, wait=lambda: None, warm_up=1)
    base = "gradient of G"
    whole = take_turns(
        {
            "EMLC step": lambda turn: made.emlc.step(clean, noisy),
            "plain step": lambda turn: train(made.other, plain, noisy),
        },
        setting.rounds,
        wait=lambda: None,
        warm_up=1,
    )
    return {
        "setting": setting.name,
        "rounds": setting.rounds,
        "passes": passes,
        "peak bytes": peaks,
        "milliseconds": milliseconds(times),
        "over a gradient of G": {name: relative(times, name, base) for name in work if name != base},
        "EMLC step over a plain step": relative(whole, "EMLC step", "plain step"),
    }


@dataclass(frozen=True)
class LabelCorrection:
    """An EMLC optimizer on the losses of label correction, its classifier, and another one for plain training."""

    emlc: bilevel.EMLC
    lower: nn.Module
    other: nn.Module


def label_correction(setting: Setting) -> LabelCorrection:
    """Build the problem of the flagship."""
    torch.manual_seed(0)
    classifier, other = setting.network(), setting.network()
    corrector = Corrector(int(classifier.features), setting.classes)  # type: ignore[arg-type]
    emlc = bilevel.EMLC(
        *losses(classifier, corrector),
        upper=corrector,
        lower=classifier,
        upper_optimizer=torch.optim.Adam(corrector.parameters(), lr=3e-4),
        lower_optimizer=torch.optim.SGD(classifier.parameters(), lr=RATE),
        verify="never",  # as between two looks
    )
    return LabelCorrection(emlc, classifier, other)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Take an ordinary training step."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(batch.inputs)[0], batch.labels).backward()
    optimizer.step()


# --- Unrolled against others ---------------------------------------------------------------------------------------


def unrolled(setting: Setting, steps: int) -> dict[str, Any]:
    """Time MW-Net's step through ``steps`` virtual steps by everybody who is here."""
    kinds = present()
    clean, noisy = setting.batches(0, CPU)
    differences = agreement(setting, steps, kinds)
    passes = {}
    for name, kind in kinds.items():
        contestant = kind(setting.network, steps)
        with counted(contestant.classifier) as seen:
            contestant.step(clean, noisy)
        # A library that copies the module, or substitutes its parameters' users, takes the count elsewhere.
        passes[name] = asdict(seen)
    contestants = {name: kind(setting.network, steps) for name, kind in kinds.items()}
    pool = [setting.batches(seed, CPU) for seed in range(3)]
    calls = {name: lambda turn, c=c: c.step(*pool[turn % len(pool)]) for name, c in contestants.items()}
    times = take_turns(calls, setting.rounds, wait=lambda: None, warm_up=1)
    return {
        "setting": setting.name,
        "steps": steps,
        "rounds": setting.rounds,
        "largest difference in float64": differences,
        "passes": passes,
        "milliseconds": milliseconds(times),
        "over by hand": {name: relative(times, name, "by hand") for name in kinds if name != "by hand"},
    }


def agreement(setting: Setting, steps: int, kinds: Mapping[str, type[Reweighting]]) -> dict[str, float]:
    """Return how far each hypergradient is from the hand-written one, relative to its size, in float64."""
    batches = setting.batches(0, CPU, torch.float64)
    found = {
        name: torch.cat([g.reshape(-1) for g in kind(setting.network, steps, torch.float64).hypergradient(*batches)])
        for name, kind in kinds.items()
    }
    exact = found["by hand"]
    differences = {name: float((g - exact).norm() / exact.norm()) for name, g in found.items() if name != "by hand"}
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise Disagreement(f"{setting.name}, k = {steps}: {name} is {difference:.1e} off, more than {TOLERANCE}.")
    return differences


# --- memory over k -------------------------------------------------------------------------------------------------


def memory(setting: Setting, counts: tuple[int, ...]) -> dict[str, Any]:
    """Return the peak of one step over k: both modes of `Unrolled` and of EMLC, and the hand-written graph."""
    clean, noisy = setting.batches(0, CPU)
    kinds = {"bilevel, adjoint": Library, "bilevel, graph": LibraryGraph, "by hand": ByHand}
    peaks: dict[str, dict[int, int]] = {}
    for steps in counts:
        for name, kind in kinds.items():
            contestant = kind(setting.network, steps)
            contestant.step(clean, noisy)
            resident = [*contestant.resident(), *clean, *noisy]
            peak = peak_bytes(lambda c=contestant: c.step(clean, noisy), resident, CPU)
            peaks.setdefault(name, {})[steps] = peak
        for mode in ("store", "replay"):
            case = Reweighting(setting.network, steps)
            emlc = bilevel.EMLC(
                lambda batch, c=case: c.upper(c.classifier, batch),
                lambda batch, c=case: c.lower(c.classifier, batch),
                upper=case.weigher,
                lower=case.classifier,
                upper_optimizer=case.adam,
                lower_optimizer=case.sgd,
                inner_steps=steps,
                memory=mode,  # type: ignore[arg-type]
                verify="never",
            )
            emlc.step(clean, noisy)
            resident = [*case.resident(), *clean, *noisy]
            peak = peak_bytes(lambda e=emlc: e.step(clean, noisy), resident, CPU)
            peaks.setdefault(f"EMLC, {mode}", {})[steps] = peak
    parameters = sum(p.nbytes for p in Reweighting(setting.network, 1).classifier.parameters())
    first, last = counts[-2], counts[-1]  # the first of all is another case: one step needs no mixed product
    return {
        "setting": setting.name,
        "peak bytes": peaks,
        "bytes of the lower parameters": parameters,
        "parameter copies per further step": {
            name: (curve[last] - curve[first]) / (last - first) / parameters for name, curve in peaks.items()
        },
    }


# --- reporting -----------------------------------------------------------------------------------------------------


def relative(times: Mapping[str, list[Seconds]], over: str, under: str) -> dict[str, Any]:
    """Return the median ratio of two contestants by both clocks, with its interval."""
    return {
        clock: asdict(median_of(ratios(*([getattr(t, clock) for t in times[name]] for name in (over, under)))))
        for clock in ("wall", "processor")
    }


def milliseconds(times: Mapping[str, list[Seconds]]) -> dict[str, Any]:
    """Return the spread of the times on the wall."""
    return {name: spread([1e3 * t.wall for t in taken]) for name, taken in times.items()}


def shown(ratio: Mapping[str, Any]) -> str:
    """Lay out a ratio: median and interval by the wall, median by the processor."""
    wall, processor = Median(**ratio["wall"]), Median(**ratio["processor"])
    return f"{wall.value:6.2f} ({wall.low:.2f} ... {wall.high:.2f})".ljust(24) + f"{processor.value:6.2f}"


def table_of_products(result: Mapping[str, Any]) -> str:
    """Lay out the products on one problem."""
    rows = [f"{result['setting']}, {result['rounds']} rounds: times a gradient of G"]
    rows.append(f"  {'':<26}{'passes':>8}{'peak MiB':>10}   {'wall time':<24}processor")
    for name, passes in result["passes"].items():
        ratio = result["over a gradient of G"].get(name)
        counts = f"{passes['forward']}, {passes['backward']}"
        peak = result["peak bytes"][name] / 2**20
        rows.append(f"  {name:<26}{counts:>8}{peak:>10.1f}   {shown(ratio) if ratio else '  1'}")
    rows.append(f"  {'EMLC step / plain step':<47}{shown(result['EMLC step over a plain step'])}")
    return "\n".join(rows)


def table_of_steps(result: Mapping[str, Any]) -> str:
    """Lay out `Unrolled` against others on one problem."""
    rows = [f"{result['setting']}, k = {result['steps']}, {result['rounds']} rounds: times the hand-written step"]
    rows.append(f"  {'':<20}{'passes':>8}{'median ms':>11}   {'wall time':<24}processor   off by")
    for name, passes in result["passes"].items():
        ratio = result["over by hand"].get(name)
        counts = f"{passes['forward']}, {passes['backward']}" if passes["forward"] else "?"
        time = result["milliseconds"][name]["median"]
        difference = result["largest difference in float64"].get(name)
        last = f"{shown(ratio)}      {difference:.0e}" if ratio else "  1"
        rows.append(f"  {name:<20}{counts:>8}{time:>11.1f}   {last}")
    return "\n".join(rows)


def table_of_memory(result: Mapping[str, Any]) -> str:
    """Lay out the curves."""
    counts = next(iter(result["peak bytes"].values()))
    size = result["bytes of the lower parameters"] / 2**20
    rows = [f"{result['setting']}: peak MiB of one step; the lower parameters are {size:.2f} MiB"]
    rows.append(f"  {'k':<20}" + "".join(f"{k:>9}" for k in counts) + "   parameter copies per further step")
    for name, curve in result["peak bytes"].items():
        slope = result["parameter copies per further step"][name]
        rows.append(f"  {name:<20}" + "".join(f"{b / 2**20:>9.1f}" for b in curve.values()) + f"{slope:>15.1f}")
    return "\n".join(rows)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, 3 rounds; writes no results")
    parser.add_argument("--output", type=Path, help=f"JSON to write (default: benchmarks/results/{RESULTS.name})")
    options = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(options.threads)
    plan, about = SMOKE if options.smoke else FULL, machine(CPU)
    print(", ".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    results: dict[str, Any] = {"machine": about}
    try:
        if "products" in options.only:
            results["products"] = []
            for setting in plan.products:
                results["products"].append(products(setting))
                print("\n" + table_of_products(results["products"][-1]), flush=True)
        if "unrolled" in options.only:
            results["unrolled"] = []
            for setting, counts in plan.unrolled:
                for steps in counts:
                    results["unrolled"].append(unrolled(setting, steps))
                    print("\n" + table_of_steps(results["unrolled"][-1]), flush=True)
        if "memory" in options.only:
            results["memory"] = memory(*plan.memory)
            print("\n" + table_of_memory(results["memory"]), flush=True)
    except Disagreement as problem:
        print(problem, file=sys.stderr)
        return 1
    output = options.output or (None if options.smoke else RESULTS)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
