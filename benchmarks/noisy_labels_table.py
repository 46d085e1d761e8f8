"""The flagship on real images: ``cifar.py --preset quick``, methods x seeds, as a table.

    python -m benchmarks.noisy_labels_table --data FOLDER
    python -m benchmarks.noisy_labels_table --data FOLDER --noise flip --seeds 4,5,6
    python -m benchmarks.noisy_labels_table --data FOLDER --table readings

Runs that are already in `--runs` are not repeated, and one that was stopped goes on, so the script can be started again
at any time, and tables share the runs that they have in common. Writes ``docs/results/noisy_labels_TABLE_NOISE.json``
and the same as a Markdown table (``.txt``, for inclusion in the documentation). With two workers of one thread each, 15
runs take about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import bilevel

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "docs" / "results"
VARIANTS: dict[str, list[str]] = {
    "ce": ["--method", "ce"],
    "clean": ["--method", "clean"],
    "ce-clean": ["--method", "ce-clean"],
    "ebomlc": ["--method", "ebomlc"],
    "ebomlc, printed constants": ["--method", "ebomlc", "--delta", "0.25", "--xi", "0.5"],
    "ebomlc-difference": ["--method", "ebomlc-difference"],
    "ebomlc-difference, step from w1": ["--method", "ebomlc-difference", "--step-from", "lookahead"],
    "ebomlc-released": ["--method", "ebomlc-released"],
    "ebomlc-released, wrong sign kept": ["--method", "ebomlc-released", "--clean-gradient", "released"],
    "ebomlc, corrupted clean labels": ["--method", "ebomlc", "--corrupt-clean", "0.5"],
    "ebomlc, log mixture": ["--method", "ebomlc", "--mixture", "log"],
    "ebomlc, both": ["--method", "ebomlc", "--corrupt-clean", "0.5", "--mixture", "log"],
}
TABLES: dict[str, list[str]] = {
    "quick": ["ce", "clean", "ce-clean", "ebomlc", "ebomlc, printed constants"],
    "readings": [
        "ce",
        "clean",
        "ebomlc",
        "ebomlc-difference",
        "ebomlc-difference, step from w1",
        "ebomlc-released",
        "ebomlc-released, wrong sign kept",
    ],
    "repairs": ["ce", "ebomlc", "ebomlc, corrupted clean labels", "ebomlc, log mixture", "ebomlc, both"],
}
QUANTITIES = ("test_accuracy", "right", "recovered", "broken")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the table."""
    options = _options(arguments)
    with ThreadPoolExecutor(options.workers) as pool:
        runs = [pool.submit(run, variant, seed, options) for seed in options.seeds for variant in TABLES[options.table]]
        outcomes = [one.result() for one in runs]
    content = {
        "command": f"python -m benchmarks.noisy_labels_table --table {options.table}",
        "setting": f"CIFAR-10, {options.noise} noise {100 * options.rate:g} %, preset quick",
        "machine": {"processor": processor(), "threads per run": 1, "runs at a time": options.workers},
        "versions": {"bilevel": bilevel.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "outcomes": outcomes,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = RESULTS / f"noisy_labels_{options.table}_{options.noise}"
    name.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    name.with_suffix(".txt").write_text(table(outcomes) + "\n")
    print(table(outcomes))
    return 0


def run(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once in a process of its own, with one thread, and return the numbers of the last epoch."""
    place = re.sub("[^a-z]+", "-", variant).strip("-")
    folder = options.runs / f"{options.noise}{options.rate:g}-{place}-seed{seed}"
    setting = ["--data", options.data, "--noise", options.noise, "--rate", options.rate, "--seed", seed]
    command = [sys.executable, "-m", "examples.noisy_labels.cifar", "--preset", "quick", "--device", "cpu"]
    command += [str(word) for word in (*VARIANTS[variant], *setting, "--resume", "auto", "--out", folder)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    print(done.stdout.splitlines()[-1], flush=True)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    epochs = [record for record in records if record["event"] == "epoch"]
    start = next(record for record in records if record["event"] == "start")
    seconds = mean(record["seconds"] for record in epochs)
    images = {name: start[name] for name in ("noisy", "clean", "test", "wrong", "overlap")}
    last = {name: epochs[-1][name] for name in QUANTITIES}
    multiplier = epochs[-1].get("multiplier")
    return {
        "variant": variant,
        "seed": seed,
        **images,
        **last,
        "multiplier": multiplier,
        "epochs": len(epochs),
        "seconds": seconds,
    }


def table(outcomes: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: mean and standard deviation over seeds, in %."""
    first = outcomes[0]
    seeds = sorted({outcome["seed"] for outcome in outcomes})
    lines = [
        "| method | test accuracy | labels right | wrong ones recovered | right ones broken | s per epoch |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for variant in dict.fromkeys(outcome["variant"] for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome["variant"] == variant]
        cells = [_spread([row[quantity] for row in rows]) for quantity in QUANTITIES]
        lines.append(f"| `{variant}` | {' | '.join(cells)} | {mean(row['seconds'] for row in rows):.1f} |")
    over = f"seed {seeds[0]}"
    if len(seeds) > 1:
        over = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    wrong = 100 * mean(outcome["wrong"] for outcome in outcomes)
    lines += [
        "",
        f"In %, {over}, last of {first['epochs']} epochs; "
        f"{first['noisy']} noisy images ({wrong:.1f} % of the labels wrong), {first['clean']} trusted, "
        f"{first['test']} test images.",
    ]
    return "\n".join(lines)


def processor() -> str:
    """Return the name of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _spread(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="noisy_labels_table", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CIFAR-10")
    parser.add_argument("--table", default="quick", choices=list(TABLES), help="which methods [quick]")
    parser.add_argument("--noise", default="uniform", choices=["uniform", "flip"])
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--seeds", default=(1, 2, 3), type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time [2]")
    parser.add_argument("--runs", type=Path, default=Path("runs/noisy_labels_table"), help="where the runs are kept")
    options = parser.parse_args(arguments)
    options.data, options.runs = options.data.resolve(), options.runs.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
