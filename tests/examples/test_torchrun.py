"""The flagship under torchrun: the numbers of one process, one set of files, and one end for all.

The network is a perceptron without BatchNorm, so that a joined batch is the sum of its parts.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bilevel.processes.joined import Processes, acting
from examples.noisy_labels import cifar
from examples.noisy_labels.data import pools
from examples.noisy_labels.recipes.methods import RECIPES, recipe_class
from examples.noisy_labels.run import checkpoint
from examples.noisy_labels.run.command_line import resolve
from examples.noisy_labels.run.training import Run
from group_of import GroupOf
from killing import assert_same, log_of, weights_of

pytestmark = pytest.mark.program
ROOT = Path(__file__).parents[2]
SCRIPT = "examples/noisy_labels/cifar.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
DIGITS = ["--dataset", "digits", "--device", "cpu", "--epochs", "3", "--log-interval", "4"]
TOGETHER = [name for name in RECIPES if recipe_class(name).shares_batches]
SCORES = ("test_accuracy", "right", "recovered", "broken")  # which rounding may change by a sample
STEPS = 6


def by_two(*arguments: str, program: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a run of two processes, and what it printed."""
    folder = tmp_path_factory.mktemp("torchrun") / "whole"
    done = by_two(*DIGITS, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_two_processes_leave_the_files_and_numbers_of_one(whole: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = whole
    assert cifar.main([*DIGITS, "--out", str(tmp_path)]) == 0
    assert {one.name for one in folder.iterdir()} == {one.name for one in tmp_path.iterdir()}
    assert printed.count("2 processes, 50 of 100 noisy and 25 of 50 trusted samples each") == 1
    assert printed.count("epoch 3/3") == 1
    together, alone = log_of(folder), log_of(tmp_path)
    assert together[0].pop("processes") == 2
    assert [one["event"] for one in together] == [one["event"] for one in alone]
    assert together[0] == alone[0]
    for one, other in zip(together[1:-1], alone[1:-1], strict=True):  # the last is a sentence, with seconds in it
        assert one.keys() == other.keys()
        for name in one.keys() - {"event", "seconds"}:
            a_few_samples = 0.005 if name in SCORES else 1e-4
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=a_few_samples), (name, one, other)
    for name, weights in weights_of(tmp_path).items():
        torch.testing.assert_close(weights_of(folder)[name], weights, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that a program can be sent")
def test_sigterm_stops_both_and_the_run_goes_on_exactly(whole: tuple[Path, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    slow = tmp_path / "slow.py"
    slow.write_text(PROGRAM.format(body="time.sleep(0.1)"))
    process = subprocess.Popen(
        [*TORCHRUN, str(slow), *DIGITS, "--out", str(broken)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline, log = time.monotonic() + 60, broken / "log.jsonl"
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert errors.count("to go on: --resume --out") == 1, errors
    progress = checkpoint.load(broken / checkpoint.NAME)["run"]["progress"]
    assert (progress["epoch"], progress["step"]) < (3, 0)
    assert cifar.main(["--resume", "--out", str(broken)]) == 1  # one process alone
    done = by_two("--resume", "--out", str(broken))
    assert done.returncode == 0, done.stderr
    assert_same(whole[0], broken)


def test_one_process_does_not_go_on_with_a_run_of_two(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cifar.main(["--resume", "--out", str(whole[0])]) == 1
    assert "trained by 2 process(es), not 1. Go on with 2: torchrun --nproc-per-node 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--batch-size", "49"], "--batch-size 49: 49 samples cannot be shared equally by 2 processes. Choose another"),
        (["--method", "em"], "--method em: trains on one process, and torchrun started several. Start it without"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(options: list[str], line: str, tmp_path: Path) -> None:
    done = by_two(*DIGITS, *options, "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.count(line) == 1
    assert "Error: " not in done.stderr.split("ChildFailedError")[0]
    assert not (tmp_path / "run").exists()


PROGRAM = """
import os, time
from examples.noisy_labels import cifar
from examples.noisy_labels.run.training import Run
advance = Run.advance
def other(run):
    {body}
    return advance(run)
Run.advance = other
raise SystemExit(cifar.main())
"""


@pytest.mark.parametrize("culprit", ["0", "1"])
def test_an_error_on_one_process_ends_both(culprit: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        PROGRAM.format(
            body=f"""if run.step == 5 and os.environ["RANK"] == "{culprit}":
        raise ValueError("no more samples here")"""
        )
    )
    start = time.monotonic()
    done = by_two(*DIGITS, "--out", str(tmp_path / "run"), program=str(program))
    assert done.returncode == 1
    assert done.stderr.count("no more samples here") == 1
    assert ("process 1 raised ValueError" in done.stderr) == (culprit == "1")
    assert time.monotonic() - start < 100  # and not the group's time-out


@pytest.fixture(scope="module")
def two() -> Iterator[GroupOf]:
    group = GroupOf(2)
    yield group
    group.close()


def few_steps(options: dict[str, Any]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Train a few steps; return the sums of the numbers and all weights."""
    settings = resolve({"dataset": "digits", "device": "cpu", "batch_size": 48} | options, None)
    run = Run(settings, pools.load(settings, torch.device("cpu")))
    for _ in range(STEPS):
        run.advance()
    weights = {
        f"{which}.{name}": one.detach()
        for which, network in run.recipe.networks.items()
        for name, one in network.named_parameters()
    }
    return {name: float(value) for name, value in run.sums.items()}, weights


def few_steps_together(options: dict[str, Any]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    with acting(Processes(dist.group.WORLD), "the test"):
        return few_steps(options)


@pytest.mark.parametrize("method", TOGETHER)
def test_every_method_that_is_not_refused_has_the_numbers_of_one_process(method: str, two: GroupOf) -> None:
    options = {"method": method, "corrector": "mlc"}  # the released one has dropout and BatchNorm
    numbers, weights = few_steps(options)
    answers = two(few_steps_together, options)
    for found, moved in answers:
        assert found == pytest.approx(numbers, rel=1e-4, abs=1e-5)
        for name, one in weights.items():
            torch.testing.assert_close(moved[name], one, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
            assert torch.equal(moved[name], answers[0][1][name])


def three_more(run: Run) -> list[torch.Tensor]:
    """Return the numbers of the last of three steps, the weights after it, and what is drawn then."""
    numbers = [run.advance() for _ in range(3)][-1]
    return [*numbers.values(), *(one.detach().clone() for one in run.recipe.classifier.parameters()), torch.rand(1)]


def resumed_together() -> tuple[bool, torch.Tensor]:
    """Train on, and once more from the first process's checkpoint; return whether that was the same, and a draw."""
    settings = resolve({"dataset": "digits", "device": "cpu", "batch_size": 48, "method": "ebomlc-released"}, None)
    task = pools.load(settings, torch.device("cpu"))
    with acting(Processes(dist.group.WORLD), "the test"):
        run, again = Run(settings, task), Run(settings, task)
        run.advance()
        state = [copy.deepcopy(run.state_dict())]
        once = three_more(run)
        dist.broadcast_object_list(state, src=0)
        again.load_state_dict(state[0])
        ends = once, three_more(again)
    same = all(torch.equal(x, y) for x, y in zip(*ends, strict=True))
    return same, ends[0][-1]


def test_each_process_gets_its_own_dropout_back(two: GroupOf) -> None:
    (first_same, first_draw), (second_same, second_draw) = two(resumed_together)
    assert first_same
    assert second_same
    assert not torch.equal(first_draw, second_draw)


def test_the_methods_are_those_that_the_page_names() -> None:
    page = (ROOT / "docs" / "processes.md").read_text("utf-8").partition("(flagship)=")[2].partition("\n## ")[0]
    assert TOGETHER
    assert [name for name in dict.fromkeys(re.findall(r"`([a-z0-9-]+)`", page)) if name in RECIPES] == TOGETHER
