"""Stopping in an orderly way: SIGTERM and Ctrl-C let the step finish, the run saves itself and says how to go on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import bilevel
from examples.noisy_labels.run import processes

EXIT_CODE = 75  # "temporary failure, try again" in sysexits.h: tells a job queue to start the command once more


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself."""


def exit_code(program: Callable[[], None], out: Path) -> int:
    """Run a program, say in one line what went wrong, and return the exit code.

    Of several processes the first one says it, which has heard what ended another.
    """
    try:
        program()
    except (ValueError, OSError, ArithmeticError, bilevel.ProcessError) as problem:
        if processes.first():
            print(problem, file=sys.stderr)
        return 1
    except Interrupted as stop:
        if processes.first():
            print(f"{stop}; to go on: --resume --out {out}", file=sys.stderr)
        return EXIT_CODE
    return 0


class Interruption:
    """Context in which the first SIGTERM or SIGINT only sets ``requested``; a second one acts as usual.

    Not under torchrun, which may pass a signal on twice, and kills what has not ended half a minute later.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        for one in self.signals:
            self.before[one] = signal.signal(one, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if processes.started() == 1:
            self._restore()

    def _restore(self) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)
