"""One model on several processes, as torchrun starts them: what each takes of a batch, who writes, and how all end.

Every process reads all data and draws the same joined batches from the same streams; then it takes its share. So a run
has the numbers of one process, and its checkpoint one position in the data. What the processes compute together goes
through :func:`bilevel.processes.joined.averaged`, what they decide together through ``agreed``; in one process both are
what they are given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist

from bilevel.processes.joined import Processes, acting, agreed, several
from examples.noisy_labels.data.batches import Batch
from examples.noisy_labels.data.randomness import generator


def started() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Return whether this process is the one that prints and writes."""
    return started() == 1 or os.environ["RANK"] == "0"


@contextmanager
def printed_once(*, errors: bool = False) -> Iterator[None]:
    """Drop what all processes print alike, but for the first one's."""
    with ExitStack() as stack:
        if not first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            if errors:
                stack.enter_context(redirect_stderr(nowhere))
        yield


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started; what one of them raises ends all. Alone, nothing happens."""
    if started() == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        if device.index is not None:
            rule = "every process has a GPU of its own, and torchrun started several"
            raise ValueError(f"--device {device}: {rule}. Give --device cuda.")
        if (local := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
            there = torch.cuda.device_count()
            raise ValueError(f"--device cuda: {there} GPUs for more processes. Start {there} with --nproc-per-node.")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"  # what is agreed goes over the host, and no GPU is waited for
    dist.init_process_group(backend)
    try:
        with acting(Processes(dist.group.WORLD), "the program"), printed_once():
            yield
            agreed(False, "the end")  # which nobody comes to before the first has written all
    finally:
        dist.destroy_process_group()


def group() -> Any:
    """Return the group that steps together, for a bilevel optimizer's ``process_group``; None: this process alone."""
    found = several()
    return None if found is None else found.group


def count() -> int:
    """Return how many processes train together."""
    found = several()
    return 1 if found is None else found.size


def own_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, where several train together."""
    return torch.device("cuda", torch.cuda.current_device()) if count() > 1 and device.type == "cuda" else device


def share(batch: Batch) -> Batch:
    """Return this process's part of a joined batch: every n-th sample, so that halves of parts are parts of halves."""
    found = several()
    return batch if found is None else Batch(*(part[found.rank :: found.size] for part in batch))


def draw_apart(seed: int) -> None:
    """Let dropout draw other masks on each process, once all have the same first weights."""
    if (found := several()) is not None:
        torch.manual_seed(generator(seed, f"process {found.rank}").initial_seed())


def refuse_unequal(what: str, whole: int, part: int | None = None) -> None:
    """Refuse a number of samples of which not every process gets an equal part.

    Args:
        what: Whose number it is, and the option that decides it.
        whole: How many of a joined batch.
        part: How many of each process's, if that is not its quotient.
    """
    if whole != count() * (whole // count() if part is None else part):
        rule = f"{whole} samples cannot be shared equally by {count()} processes"
        raise ValueError(f"{what}: {rule}. Choose another --batch-size, or another --nproc-per-node.")


def note(noisy: int, trusted: int) -> list[str]:
    """Return the line that says what the processes do to batch sizes, if there are several."""
    if count() == 1:
        return []
    each = f"{noisy // count()} of {noisy}" + ("" if trusted == noisy else " noisy")
    other = "" if trusted == noisy else f" and {trusted // count()} of {trusted} trusted"
    return [f"{count()} processes, {each}{other} samples each"]
