"""From the command line, a saved configuration and presets to the options of a run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from examples.noisy_labels.run import files
from examples.noisy_labels.run.declaration import add_arguments, integers, plain, written
from examples.noisy_labels.run.settings import PRESETS, Settings, Training, from_dict, preset, without_method

CONFIGURATION = "config.json"
EPILOG = """examples:
  cifar.py                                      EBOMLC on CIFAR-10, if it is found
  cifar.py --dataset digits                     the same on digits, in seconds
  cifar.py --dataset digits --compare           all methods, several seeds, a table and a picture
  cifar.py --preset paper --device cuda --noise flip --rate 0.4 --out runs/flip
  cifar.py --resume --out runs/flip             go on where it stopped
"""
T_co = TypeVar("T_co", bound=Training, covariant=True)


@dataclass(frozen=True)
class Start(Generic[T_co]):
    """How a run begins: its options, its folder, and whether it goes on or replaces what is there."""

    settings: T_co
    out: Path
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class Command(Start[Settings]):
    """What one call of ``cifar.py`` shall do."""

    compare: bool
    download: bool
    seeds: tuple[int, ...] | None
    preset: str | None
    explicit: dict[str, Any]  # options from the configuration file or the command line, not those of a preset

    def variant(self, **changes: Any) -> Settings:
        """Return the settings that the same call with further options would give, for example another method."""
        return resolve(self.explicit | changes, self.preset)


def parse(arguments: Sequence[str] | None = None) -> Command:
    """Read the command line; on a mistake, print what is wrong and exit with code 2."""
    description = "Train a classifier on noisy labels and a few trusted ones, and correct the noisy ones."
    parser, program = parser_of("cifar.py", description, EPILOG)
    presets = [name for name in PRESETS if name != "digits"]
    program.add_argument("--preset", choices=presets, help="[paper on CUDA, else quick]")
    program.add_argument("--compare", action="store_true", help="run all methods on several seeds and print a table")
    program.add_argument("--download", action="store_true", help="fetch CIFAR, if not found, into --data or ./data")
    program.add_argument("--seeds", type=integers, metavar="N,N,...", help="seeds of --compare")
    add_arguments(parser, Settings)
    own, given = parsed(parser, arguments, Settings)
    try:
        _check_program(own)
        from_file = read(own["config"]) if own["config"] else {}
        if own["compare"] or given.get("method", from_file.get("method")) != from_file.get("method"):
            from_file = without_method(from_file)
        explicit = from_file | given
        settings = resolve(explicit, own["preset"])
        for seed in own["seeds"] or ():
            dataclasses.replace(settings, seed=seed)
        out = own["out"] or Path("runs") / (f"{settings.dataset}-compare" if own["compare"] else settings.folder_name)
        files.refuse_unusable(out)
        resume = goes_on(out, own["resume"])
        if resume:
            decided = set().union(*PRESETS.values()) if own["preset"] else ()  # a preset also says what it leaves alone
            # in an order that is the same in every process
            ordered = [one.name for one in dataclasses.fields(Settings) if one.name in decided]
            by_preset = {name: getattr(settings, name) for name in ordered}
            settings = from_dict(of_saved_run(out, by_preset | explicit, Settings))
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    further = own["compare"], own["download"], own["seeds"], own["preset"], explicit
    return Command(settings, out, resume, own["overwrite"], *further)


def resolve(explicit: dict[str, Any], preset_name: str | None) -> Settings:
    """Fill in from the preset what was not set, and the rest from the defaults."""
    dataset, method = (str(explicit.get(name, getattr(Settings, name))) for name in ("dataset", "method"))
    if dataset == "digits" and preset_name:
        raise ValueError(f"--preset {preset_name}: describes training on CIFAR. The digits have one of their own.")
    automatic = "paper" if device(explicit.get("device", Settings.device)).type == "cuda" else "quick"
    settings = from_dict(preset(preset_name or automatic, dataset, method) | explicit)
    settings.refuse_misfit()
    return settings


def parser_of(name: str, description: str, epilog: str) -> tuple[argparse.ArgumentParser, Any]:
    """Return the parser of a program, and the group of the options that are no part of the configuration."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, formatter_class=raw, allow_abbrev=False
    )
    program = parser.add_argument_group("the program")
    program.add_argument("--config", type=Path, metavar="FILE", help="take the options from a saved configuration")
    program.add_argument("--out", type=Path, metavar="FOLDER", help="where everything is written [runs/...]")
    program.add_argument(
        "--resume",
        nargs="?",
        const="required",
        choices=("required", "auto"),
        help="go on; auto: start if there is nothing",
    )
    program.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    return parser, program


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, kind: type[Training]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the command line says to the program, and the options that it sets."""
    given = vars(parser.parse_args(arguments))
    declared = {one.name for one in dataclasses.fields(kind)}
    own = {name: given.pop(name) for name in list(given) if name not in declared}
    return own, plain(kind, given)


def goes_on(out: Path, resume: str | None) -> bool:
    """Return whether the run in a folder is resumed, as ``--resume`` wants it."""
    return resume is not None and (resume == "required" or (out / CONFIGURATION).is_file())


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


def read(file: Path) -> dict[str, Any]:
    """Return the options in a saved configuration, by name.

    Raises:
        ValueError: It is no JSON, or no object.
        OSError: It cannot be read.
    """
    advice = "Is it the config.json of a run?"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"--config {file}: is no JSON ({problem}). {advice}") from None
    if not isinstance(values, dict):
        rule = f"holds a {type(values).__name__}, and must hold an object: names of options and their values"
        raise ValueError(f"--config {file}: {rule}. {advice}")
    return values


def of_saved_run(folder: Path, given: Mapping[str, Any], kind: type[Training]) -> dict[str, Any]:
    """Return the options of the run in a folder, with what was given for those that may differ.

    Raises:
        ValueError: There is none, or something else was given that is not as in the saved run.
    """
    file = folder / CONFIGURATION
    if not file.is_file():
        rule = "there is no run to resume"
        raise ValueError(f"--resume: {rule} in {folder}. Give its --out, or use --resume auto to start one.")
    saved = read(file)
    for name, value in given.items():
        plain = list(value) if isinstance(value, tuple) else value
        if name not in kind.free_on_resume and plain != saved.get(name):
            rule = f"the saved run has {written(name, saved.get(name))}, not {written(name, value)}"
            raise ValueError(f"--resume: {rule}. Leave the option out, or start another run with another --out.")
    return saved | {name: value for name, value in given.items() if name in kind.free_on_resume}


def _check_program(own: dict[str, Any]) -> None:
    """Refuse what the program's own options cannot do together."""
    if own["resume"] and own["compare"]:
        raise ValueError("--resume: --compare keeps no checkpoints. Leave one of the two out.")
    if own["seeds"] and not own["compare"]:
        raise ValueError("--seeds: are those of --compare. One run has one --seed.")
    if own["seeds"] and len(set(own["seeds"])) < len(own["seeds"]):
        raise ValueError(f"{written('seeds', own['seeds'])}: a seed is there twice. Name each once.")
