"""Processes of a gloo group that run functions together: started once, as starting takes longer than what they run."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIME_OUT = 60.0  # seconds in which a process must answer another; only one that hangs takes so long


class GroupOf:
    """A number of processes; call it with a function and its arguments, which each of them calls.

    The function finds the group in ``torch.distributed``. What it returns is returned, by rank; if one of them raises,
    the tracebacks of all are the message of an AssertionError.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._ends = []
        self._processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            arguments = (rank, size, str(Path(self._folder.name) / "store"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._ends.append(mine)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for end in self._ends:
            end.send((function.__module__, function.__qualname__, arguments))
        answers = []
        for end in self._ends:
            assert end.poll(4 * TIME_OUT), f"{function.__qualname__}: a process hangs"
            answers.append(end.recv())
        errors = [f"process {rank}:\n{answer}" for rank, (well, answer) in enumerate(answers) if not well]
        assert not errors, "\n".join(errors)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(TIME_OUT)
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, end: Any) -> None:
    import importlib
    import warnings

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIME_OUT),
    )
    while (task := end.recv()) is not None:
        module, name, arguments = task
        torch.manual_seed(0)
        try:
            end.send((True, getattr(importlib.import_module(module), name)(*arguments)))
        except BaseException:
            end.send((False, traceback.format_exc()))
    dist.destroy_process_group()
