"""Programs of their own: the example under torchrun, and processes that end in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FEW = ["--steps", "20"]


@pytest.mark.program
def test_torchrun_runs_the_example_with_the_numbers_of_one_process() -> None:
    alone = [sys.executable, "examples/processes.py", *FEW]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    lines = []
    for command in (alone, [*torchrun, *alone[1:]]):
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        lines.append(done.stdout.splitlines())
    assert lines[0][0] == "joined batches of 48: 48 samples on each of 1 process(es)"
    assert lines[1][0] == "joined batches of 48: 24 samples on each of 2 process(es)"
    assert lines[1][-1] == lines[0][-1]
    assert lines[0][-1].startswith("accuracy")


ENDS = """
import datetime, os, sys, time, torch, torch.distributed as dist, bilevel
rank, store, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
wait = datetime.timedelta(seconds=4 if how == "sleeps" else 60)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=wait)
a, w = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
calls = []
def lower():
    calls.append(1)
    if rank == 1 and len(calls) == 7 and how == "killed":
        os._exit(9)
    if rank == 1 and len(calls) == 7 and how == "sleeps":
        time.sleep(20)
    return (w - a).square().sum()
optimizer = bilevel.BOME(lambda: (w - 1).square().sum(), lower, upper=a, lower=w, verify="never",
    upper_optimizer=torch.optim.SGD([a], lr=0.1), lower_optimizer=torch.optim.SGD([w], lr=0.1),
    process_group=dist.group.WORLD)
try:
    for number in range(10):
        before = [x.clone() for x in (a, w)]
        optimizer.step()
        if rank == 1 and number == 2 and how == "raises":
            raise KeyError("between two steps")
except bilevel.ProcessError as error:
    assert all(torch.equal(x, y) for x, y in zip(before, (a, w)))
    print(error, flush=True)
    os._exit(0)
"""


@pytest.mark.program
@pytest.mark.parametrize("how", ["killed", "raises", "sleeps"])
def test_a_process_that_ends_ends_the_other(tmp_path: Path, how: str) -> None:
    """When its connection closes, or after the time-out of the group; nothing has moved in that step."""
    program = tmp_path / "program.py"
    program.write_text(ENDS)
    start = time.perf_counter()
    both = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(tmp_path / "store"), how],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = both[0].communicate(timeout=100)[0]
    assert "another process ended, or did not answer within the group's time-out" in told
    assert time.perf_counter() - start < 55
    both[1].kill()
    both[1].communicate()
