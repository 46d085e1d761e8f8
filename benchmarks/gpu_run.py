"""The published protocol on a GPU: ``cifar.py --preset paper`` for several methods, with time, memory and accuracy.

    python -m benchmarks.gpu_run --data FOLDER                    # CIFAR-10, uniform 40 %: ce, then ebomlc
    python -m benchmarks.gpu_run --data FOLDER --amp bf16 --output docs/results/gpu_cifar10_uniform_bf16.json
    python -m benchmarks.gpu_run --estimate --device cpu          # no training, no images: counts what it will need

Start it again and it goes on where it was stopped. Writes ``docs/results/gpu_cifar10_uniform.json``. For each method:
the epochs of the log, seconds per epoch, noisy images per second, peak memory, and how often the host waited for the
device in steps that write no log record (0 is what the flagship promises).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bilevel
from benchmarks.memory import LiveBytes
from examples.noisy_labels import cifar
from examples.noisy_labels.data import pools
from examples.noisy_labels.run import accelerator, checkpoint, command_line
from examples.noisy_labels.run.settings import Settings
from examples.noisy_labels.run.training import Run

RESULTS = Path(__file__).parents[1] / "docs" / "results"
METHODS = ("ce", "ebomlc")
KEPT = ("epoch", "test_accuracy", "right", "recovered", "broken", "multiplier", "seconds")
WATCHED_STEPS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every method, or only count, then write what was found as JSON."""
    options, further = _options(arguments)
    common = ["--preset", "paper", "--noise", "uniform", "--rate", "0.4", "--amp", options.amp]
    common += ["--device", options.device, *(["--data", options.data] if options.data else []), *further]
    results = {}
    for method in options.methods.split(","):
        command = [*common, "--method", method]
        settings = command_line.parse(command).settings
        results[method] = estimated(settings) if options.estimate else trained(command, options.runs / method)
        print(json.dumps({method: {name: one for name, one in results[method].items() if name != "log"}}), flush=True)
    content = {
        "command": " ".join(["python -m benchmarks.gpu_run", *(sys.argv[1:] if arguments is None else arguments)]),
        "setting": settings.title,
        "device": device_name(options.device),
        "versions": {
            "bilevel": bilevel.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "methods": results,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written: {options.output}")
    return 0


def trained(command: list[str], folder: Path) -> dict[str, Any]:
    """Train to the end, or go on; return the log's numbers, the peak memory and the number of waits."""
    settings = command_line.parse(command).settings
    device = command_line.device(settings.device)
    waits = host_waits(settings)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    clock = time.perf_counter()
    code = cifar.main([*command, "--resume", "auto", "--out", str(folder)])
    if code:
        raise SystemExit(code)
    seconds = time.perf_counter() - clock
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    epochs = [record for record in records if record["event"] == "epoch"]
    start = next(record for record in records if record["event"] == "start")
    per_epoch = median(record["seconds"] for record in epochs)
    return {
        **{name: start[name] for name in ("noisy", "clean", "test", "wrong", "overlap")},
        "amp": settings.amp,
        "epochs": len(epochs),
        "seconds per epoch": per_epoch,
        "noisy images per second": start["noisy"] / per_epoch,
        "seconds of this process": seconds,
        "peak bytes on the device": torch.cuda.max_memory_allocated(device) if cuda else None,
        "peak bytes reserved on the device": torch.cuda.max_memory_reserved(device) if cuda else None,
        f"host waits in {WATCHED_STEPS} steps": waits,
        "checkpoint bytes": (folder / checkpoint.NAME).stat().st_size,
        "log": [{name: record[name] for name in KEPT if name in record} for record in epochs],
    }


def host_waits(settings: Settings) -> int | None:
    """Count how often steps after the first ones wait for the device; None where there is no CUDA to ask."""
    device = command_line.device(settings.device)
    if device.type != "cuda":
        return None
    with accelerator.prepared(settings, device), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run(settings, pools.load(settings, device))
        for _ in range(3):
            run.advance()
        torch.cuda.synchronize(device)
        caught.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(WATCHED_STEPS):
                run.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in caught)


def estimated(settings: Settings) -> dict[str, Any]:
    """Count on any device what a step computes, launches and holds: no measurement of a GPU, and no images needed.

    Floating-point operations: of convolutions and matrix products, as torch's counter has them. Launches: operations
    of torch that are no mere views. Memory: the most bytes alive at once in a step, with images, parameters and
    optimizer state, without the scratch memory of kernels.
    """
    device = command_line.device(settings.device)
    run = Run(settings, pools.corrupted(blank_images(), settings, device))
    for _ in range(4):  # fills the state of the optimizers, and passes the looks at steps 1, 2 and 4
        run.advance()
    with FlopCounterMode(display=False) as counter:
        run.advance()
    resident = [run.task.samples, run.task.labels, run.task.noisy_labels]
    resident += [tensor for network in run.recipe.networks.values() for tensor in network.state_dict().values()]
    resident += [tensor for tensor in tensors_of(run.recipe.state_dict()["optimizer"]) if tensor.device == device]
    with LiveBytes(resident) as live:
        run.advance()
    with Launches() as launches:
        run.advance()
    steps = len(run.noisy)
    # One forward pass of the classifier over one image. An epoch ends with one over all noisy and all test images.
    inputs = run.task.inputs(run.task.test[:1])
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        run.recipe.classifier.eval()(inputs)
    evaluated = forward.get_total_flops() * (len(run.task.noisy) + len(run.task.test))
    epoch = counter.get_total_flops() * steps + evaluated
    return {
        "operations per step": counter.get_total_flops(),
        "launches per step": launches.number,
        "steps per epoch": steps,
        "operations of an epoch's evaluation": evaluated,
        "operations of the whole run": epoch * settings.epochs,
        "bytes alive at once in a step": live.peak,
    }


def blank_images() -> pools.Pool:
    """Return black images in the numbers of CIFAR-10."""
    labels = torch.arange(60_000) % 10
    test = torch.arange(50_000, 60_000)
    pixels = torch.zeros(60_000, 3, 32, 32, dtype=torch.uint8)
    return pools.Pool(pixels, labels, test, tuple(map(str, range(10))), pools.CIFAR_MEAN, pools.CIFAR_STD)


class Launches(TorchDispatchMode):
    """Counts operations that compute something, each of which is one kernel or a few on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func._schema.returns
        self.number += not any(one.alias_info and not one.alias_info.is_write for one in results)
        return func(*args, **(kwargs or {}))


def tensors_of(state: Any) -> list[torch.Tensor]:
    """Return all tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


def device_name(name: str) -> str:
    """Return the name of the GPU, or that of the kind of device."""
    device = command_line.device(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="gpu_run", description=__doc__.splitlines()[0], epilog="further options go to cifar.py", allow_abbrev=False
    )
    parser.add_argument("--data", help="folder that holds CIFAR-10 [$BILEVEL_DATA, then ./data]")
    parser.add_argument("--methods", default=",".join(METHODS), help="[ce,ebomlc]")
    parser.add_argument("--amp", default="off", help="precision inside the networks, see cifar.py [off]")
    parser.add_argument("--device", default="cuda", help="[cuda]")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu_run"), help="where the runs are kept")
    parser.add_argument("--estimate", action="store_true", help="count operations and bytes instead of training")
    parser.add_argument("--output", type=Path, help="JSON file [docs/results/gpu_cifar10_uniform.json]")
    options, further = parser.parse_known_args(arguments)
    if options.output is None and not options.estimate:
        options.output = RESULTS / "gpu_cifar10_uniform.json"
    return options, further


if __name__ == "__main__":
    sys.exit(main())
