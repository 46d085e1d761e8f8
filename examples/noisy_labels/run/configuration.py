"""The configuration that a run has saved, and what may be said about it when the run goes on."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from examples.noisy_labels.run.log import has_trained

CONFIGURATION = "config.json"


def read(file: Path) -> dict[str, Any]:
    """Return the options in a file, by name.

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


def of_saved_run(folder: Path, given: Mapping[str, Any], free: Collection[str]) -> dict[str, Any]:
    """Return the options of the run in a folder, with what was ``given`` for the ``free`` ones.

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
        if name not in free and plain != saved.get(name):
            rule = f"the saved run has {name} = {saved.get(name)}, not {plain}"
            raise ValueError(f"--resume: {rule}. Leave the option out, or start another run with another --out.")
    return saved | {name: value for name, value in given.items() if name in free}


def refuse_other_options(
    checkpoint: Path, trained: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]
) -> None:
    """Refuse a checkpoint of other options than those of the run that shall go on from it."""
    for name, value in now.items():
        if name not in free and trained.get(name) != value:
            rule = f"was trained with {name} = {trained.get(name)}, and {CONFIGURATION} beside it says {value}"
            advice = "One of the two is not this run's. Put it back, or start anew with --overwrite"
            raise ValueError(f"Checkpoint({checkpoint}): {rule}. {advice}.")


def refuse_lost_checkpoint(checkpoint: Path, log: Path) -> None:
    """Refuse to begin anew, in silence, what has been trained: the first checkpoint comes before the first step."""
    if has_trained(log):
        rule = f"{checkpoint} is gone, and {log.name} beside it tells of training"
        raise ValueError(f"--resume: {rule}. Put the checkpoint back, or start anew with --overwrite.")
