"""Which processes take the steps of an optimizer together, and whether they begin at the same point."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import message
from ..shards import group_of_shards
from .joined import Processes

ProcessGroup = Any  # torch.distributed.ProcessGroup, which a torch without it does not have
Group = ProcessGroup | Literal[False] | None


def processes_of(owner: str, process_group: Group) -> Processes | None:
    """Return the processes of a group; None: this one steps alone.

    Args:
        owner: The class that errors name.
        process_group: A group; None: the default group, if there is one, which is then said; False: none.

    Raises:
        TypeError, ValueError: It is no group, or not one of this process.
    """
    if process_group is False:
        return None
    there = dist.is_available() and dist.is_initialized()
    if process_group is None:
        if not there or dist.get_world_size() == 1:
            return None
        warnings.warn(
            f"{owner}: averages over the {dist.get_world_size()} processes of the default group, so that every step is "
            "that of one process on the joined batch. Say so with process_group=torch.distributed.group.WORLD, or "
            "pass process_group=False to let each process step alone.",
            stacklevel=2,
        )
        return Processes(dist.group.WORLD)
    if not there or not isinstance(process_group, dist.ProcessGroup):
        advice = (
            "must be a group of torch.distributed, as new_group or group.WORLD give one; None for the default group, "
            "or False for none."
        )
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            advice = "does not contain this process. Build the optimizer on the members of the group alone."
        raise TypeError(message(owner, "process_group", type(process_group).__name__, advice))
    return Processes(process_group) if dist.get_world_size(process_group) > 1 else None


def refuse_apart(owner: str, processes: Processes, named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse variables that differ between the processes, bit for bit.

    Raises:
        ValueError: On all of them, with the name of the first.
    """
    found = processes.first_difference(f"{owner}: the variables", [tensor for _, tensor in named])
    if found is not None:
        which, rank = found
        side, _, name = named[which][0].partition(" variable ")
        advice = (
            f"differs between process 0 and process {rank}, so that they would train different models. Usual causes: "
            "another random seed, a checkpoint that only one has loaded, a rate or an option that only one has set, a "
            "step that failed half-way. Give all of them the same values: seed alike, or "
            "torch.distributed.broadcast(variable.data, src=0), before building the optimizer."
        )
        raise ValueError(message(owner, side, name, advice))


def refuse_other_shards(owner: str, processes: Processes | None, named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse shards of other processes than those that step together, and copies that are no shards.

    Raises:
        TypeError: With the name of the first.
    """
    ranks = [dist.get_rank()] if named and processes is None else []
    if processes is not None:
        ranks = dist.get_process_group_ranks(processes.group)
    for name, tensor in named:
        group = group_of_shards(tensor)
        if group is None or dist.get_process_group_ranks(group) != ranks:
            side, _, variable = name.partition(" variable ")
            advice = (
                "is sharded over another mesh than the processes that step together, or over several dimensions. Call "
                "fully_shard with a mesh of one dimension over the processes of process_group=, and all of them."
            )
            raise TypeError(message(owner, side, variable, advice))


def random_states(processes: Processes, devices: Sequence[torch.device]) -> list[list[Tensor]]:
    """Return torch's random states on the CPU and the devices, of every process."""
    own = [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in devices)]
    gathered = [processes.channel.gathered(state.cpu()) for state in own]
    return [list(states) for states in zip(*gathered, strict=True)]


def restore_random_states(states: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
    """Put this process's own states back."""
    torch.set_rng_state(states[0].cpu())
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state.cpu(), device)
