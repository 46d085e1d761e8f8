"""From command-line arguments to settings: preset, then configuration file, then what is said explicitly."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.noisy_labels.run import configuration, files
from examples.noisy_labels.run.configuration import CONFIGURATION, of_saved_run
from examples.noisy_labels.run.declaration import flag, written
from examples.noisy_labels.run.settings import GROUPS, PRESETS, Settings, from_dict, preset, without_method

OWN = ("preset", "config", "out", "resume", "overwrite", "compare", "download", "seeds")  # not part of the settings
# May differ from the saved run: they do not change its numbers.
FREE_ON_RESUME = {"data", "device", "log_interval", "on_nonfinite", "tensorboard"}
EPILOG = """examples:
  cifar.py                                      EBOMLC on CIFAR-10, if it is found
  cifar.py --dataset digits                     the same on digits, in seconds
  cifar.py --dataset digits --compare           all methods, several seeds, a table and a picture
  cifar.py --preset paper --device cuda --noise flip --rate 0.4 --out runs/flip
  cifar.py --resume --out runs/flip             go on where it stopped
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """What one call of the program shall do."""

    settings: Settings
    out: Path
    resume: bool
    overwrite: bool
    compare: bool
    download: bool
    seeds: tuple[int, ...] | None
    preset: str | None
    said: dict[str, Any]  # options from the configuration file or the command line, not those of a preset

    def variant(self, **changes: Any) -> Settings:
        """Return the settings that the same call with further options would give, for example another method."""
        return resolve(self.said | changes, self.preset)


def parse(arguments: Sequence[str] | None = None) -> Command:
    """Read the command line; on a mistake, print what is wrong and exit with code 2."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    own = {name: given.pop(name) for name in OWN}
    try:
        _check_own(own)
        from_file = configuration.read(own["config"]) if own["config"] else {}
        if own["compare"] or given.get("method", from_file.get("method")) != from_file.get("method"):
            from_file = without_method(from_file)
        said = from_file | given
        settings = resolve(said, own["preset"])
        for seed in own["seeds"] or ():
            dataclasses.replace(settings, seed=seed)
        out = own["out"] or Path("runs") / (f"{settings.dataset}-compare" if own["compare"] else settings.folder_name)
        files.refuse_unusable(out)
        saved = out / CONFIGURATION
        resume = bool(own["resume"]) and (saved.is_file() or own["resume"] == "required")
        if resume:
            decided = set().union(*PRESETS.values()) if own["preset"] else ()  # a preset also says what it leaves alone
            # in an order that is the same in every process
            ordered = [one.name for one in dataclasses.fields(Settings) if one.name in decided]
            by_preset = {name: getattr(settings, name) for name in ordered}
            settings = from_dict(of_saved_run(out, by_preset | said, FREE_ON_RESUME))
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    return Command(
        settings, out, resume, own["overwrite"], own["compare"], own["download"], own["seeds"], own["preset"], said
    )


def device(name: str) -> torch.device:
    """Turn the option `--device` into a device; ``auto`` takes CUDA if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except (RuntimeError, TypeError):
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: must be auto, cpu, cuda or one of several GPUs, such as cuda:1.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ValueError(
            f"--device {name}: torch sees {there or 'no'} CUDA device{'s' * (there > 1)} here. Use another."
        )
    return chosen


def resolve(said: dict[str, Any], preset_name: str | None) -> Settings:
    """Fill in what was not said from the preset, and the rest from the defaults."""
    dataset, method = str(said.get("dataset", Settings.dataset)), str(said.get("method", Settings.method))
    if dataset == "digits" and preset_name:
        raise ValueError(f"--preset {preset_name}: describes training on CIFAR. The digits have one of their own.")
    automatic = "paper" if device(said.get("device", Settings.device)).type == "cuda" else "quick"
    settings = from_dict(preset(preset_name or automatic, dataset, method) | said)
    settings.refuse_misfit()
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cifar.py",
        description="Train a classifier on noisy labels and a few trusted ones, and correct the noisy ones.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run = parser.add_argument_group("the program")
    run.add_argument(
        "--preset", choices=[name for name in PRESETS if name != "digits"], help="[paper on CUDA, else quick]"
    )
    run.add_argument("--config", type=Path, metavar="FILE", help="take the options from a saved configuration")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="where everything is written [runs/...]")
    run.add_argument(
        "--resume",
        nargs="?",
        const="required",
        choices=("required", "auto"),
        help="go on; auto: start if there is nothing",
    )
    run.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    run.add_argument("--compare", action="store_true", help="run all methods on several seeds and print a table")
    run.add_argument("--download", action="store_true", help="fetch CIFAR if it is not found, into --data or ./data")
    run.add_argument("--seeds", type=_integers, metavar="N,N,...", help="seeds of --compare")
    for one in dataclasses.fields(Settings):
        if one.name in GROUPS:
            options = parser.add_argument_group(GROUPS[one.name])
        kind = one.metadata["kind"]
        words = one.metadata["description"] + ("" if one.default is None else f" [{one.default}]")
        common = {"default": argparse.SUPPRESS, "help": words.replace("%", "%%")}
        if kind is bool:
            options.add_argument(flag(one.name), action=argparse.BooleanOptionalAction, **common)
        elif one.metadata["choices"]:
            options.add_argument(flag(one.name), choices=one.metadata["choices"], **common)
        else:
            reader, shape = (_integers, "N,N,...") if kind is tuple else (kind, kind.__name__.upper())
            options.add_argument(flag(one.name), type=reader, metavar=shape, **common)
    return parser


def _check_own(own: dict[str, Any]) -> None:
    """Refuse what the program's own options cannot do together."""
    if own["resume"] and own["compare"]:
        raise ValueError("--resume: --compare keeps no checkpoints. Leave one of the two out.")
    if own["seeds"] and not own["compare"]:
        raise ValueError("--seeds: are those of --compare. One run has one --seed.")
    if own["seeds"] and len(set(own["seeds"])) < len(own["seeds"]):
        raise ValueError(f"{written('seeds', own['seeds'])}: a seed is there twice. Name each once.")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas between them, not {text!r}") from None
