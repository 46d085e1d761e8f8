"""The state of an optimizer as a dictionary, and back: what does not fit is refused, and changes nothing.

Of several processes the dictionary also holds torch's random states of all, so that one file resumes them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import message
from ..evaluation.scaling import Scaling
from ..evaluation.verification import Verification
from ..levels import Level
from ..processes.group import random_states, restore_random_states
from ..processes.joined import Processes
from .apply import check_groups, check_state
from .method_state import MethodState

FORMAT = 1


@dataclass(frozen=True)
class Parts:
    """What has state: both torch optimizers, the method, verification; and the processes that share it, if any do."""

    owner: str
    upper: Level
    lower: Level
    state: MethodState
    verification: Verification
    processes: Processes | None = None
    scaling: Scaling | None = None


def saved(parts: Parts) -> dict[str, Any]:
    """Return a copy of all state."""
    found = {
        "format": FORMAT,
        "method": parts.owner,
        "upper_optimizer": deepcopy(parts.upper.optimizer.state_dict()),
        "lower_optimizer": deepcopy(parts.lower.optimizer.state_dict()),
        "state": parts.state.copy(),
        "verification": parts.verification.state(),
        **({} if parts.scaling is None else {"scaler": parts.scaling.state()}),
    }
    if parts.processes is not None:
        parts.processes.agree(f"{parts.owner}.state_dict")
        found["processes"] = random_states(parts.processes, _accelerators(parts))
    return found


def load(parts: Parts, state_dict: Mapping[str, Any]) -> None:
    """Take over what :func:`saved` returned.

    Raises:
        ValueError: It does not fit; nothing changed.
    """
    owner = f"{parts.owner}.load_state_dict"
    expected = {"format", "method", "upper_optimizer", "lower_optimizer", "state", "verification"}
    if not isinstance(state_dict, Mapping) or set(state_dict) - {"processes", "scaler"} != expected:
        found = sorted(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        advice = f"must have the keys {sorted(expected)}. A module's state? Pass the result of state_dict()."
        raise ValueError(message(owner, "state_dict", found, advice))
    if state_dict["format"] != FORMAT:
        advice = "is a format that this version of bilevel does not know. Update bilevel."
        raise ValueError(message(owner, "format", state_dict["format"], advice))
    if state_dict["method"] != parts.owner:
        advice = f"is the state of another method; this optimizer is {parts.owner}."
        raise ValueError(message(owner, "method", state_dict["method"], advice))
    if state_dict.get("scaler") and parts.scaling is None:
        advice = "is the state of a GradScaler, and this optimizer has none. Pass scaler=, or take the key out."
        raise ValueError(message(owner, "scaler", "...", advice))
    _check_processes(owner, parts, state_dict)
    try:
        state = parts.state.loaded(deepcopy(state_dict["state"]))
    except Exception as error:
        advice = f"does not fit ({error}). Name and shape the variables as they were when the state was saved."
        raise ValueError(message(owner, "state", "...", advice)) from error
    before = [(level.optimizer, level.optimizer.state_dict()) for level in (parts.upper, parts.lower)]
    scale_before = None if parts.scaling is None else parts.scaling.state()
    try:
        # Copies, because torch keeps the tensors it is given and would write into the caller's checkpoint.
        for level in (parts.upper, parts.lower):
            loaded = deepcopy(state_dict[f"{level.side}_optimizer"])
            check_groups(level.optimizer, loaded)
            level.optimizer.load_state_dict(loaded)
            check_state(level.optimizer)
            level.check_direction()
        if parts.scaling is not None and state_dict.get("scaler"):
            parts.scaling.load(state_dict["scaler"])
        parts.verification.load(state_dict["verification"])
        parts.state.commit(state)
    except Exception as error:
        for optimizer, state in before:
            optimizer.load_state_dict(state)
        if parts.scaling is not None and scale_before:
            parts.scaling.load(scale_before)
        advice = f"does not fit ({error}). Build the torch optimizers as they were when the state was saved."
        raise ValueError(message(owner, "state_dict", "...", advice)) from error


def load_together(parts: Parts, state_dict: Mapping[str, Any]) -> None:
    """The same on several processes: if one of them refuses, nothing changes on any; then random states are put back.

    Raises:
        ValueError, ProcessError: It does not fit, here or on another process.
    """
    processes = parts.processes
    if processes is None:
        load(parts, state_dict)
        return
    before = saved(parts)
    load(parts, state_dict)
    try:
        processes.agree(f"{parts.owner}.load_state_dict")
    except BaseException:
        load(parts, before | {"processes": None})
        raise
    states = state_dict["processes"]
    if states is not None:
        restore_random_states(states[processes.rank], _accelerators(parts))


def _check_processes(owner: str, parts: Parts, state_dict: Mapping[str, Any]) -> None:
    """Refuse the state of another number of processes, unless its random states were taken out."""
    size = 1 if parts.processes is None else parts.processes.size
    there = state_dict.get("processes", [None])
    if there is None or size == len(there):
        return
    advice = (
        f"is the state of {len(there)} process(es), and here are {size}: the random states would not be theirs, nor "
        'the joined batches. Resume with as many, or set state_dict["processes"] = None to go on with random states '
        "as they stand."
    )
    raise ValueError(message(owner, "processes", f"{len(there)} random states", advice))


def _accelerators(parts: Parts) -> list[torch.device]:
    """Return the devices beside the CPU whose random state counts, in an order that all processes have."""
    devices = {tensor.device for level in (parts.upper, parts.lower) for tensor in level.tensors}
    return sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)
