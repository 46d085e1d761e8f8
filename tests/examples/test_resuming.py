"""A run that was stopped and resumed ends with the numbers of one that was not, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.noisy_labels import cifar
from examples.noisy_labels.report import pictures
from examples.noisy_labels.run import checkpoint, files, interruption
from examples.noisy_labels.run.training import Run
from killing import assert_same, log_of, weights_of

REPOSITORY = Path(__file__).parents[2]
# Batch statistics, crops, momentum, Adam, a schedule and an incomplete pass over the clean set: all that has state.
NETWORK = ["--network", "small", "--train-images", "120", "--clean-fraction", "0.25", "--batch-size", "20"]
NETWORK += ["--epochs", "3", "--log-interval", "2"]

Advance = Callable[[Run], dict[str, torch.Tensor]]


class KilledError(Exception):
    """Stands for a SIGKILL: nothing is saved after it."""


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("curves", "label_heatmap", "contact_sheet"):  # drawn in test_program.py; slow, and not the point here
        monkeypatch.setattr(pictures, name, lambda *_: None)


# All that differ in what they keep.
RESUMED = ["ce", "ebomlc", "glc", "em", "ours", "ours-barrier", "mlc", "emlc-one-step", "l2rw", "mwnet", "pmwnet"]
RESUMED += ["coteaching-plus", "dividemix"]


@pytest.mark.kill
@pytest.mark.parametrize("method", RESUMED)
def test_a_killed_run_is_resumed_exactly(
    method: str, cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--data", str(cifar10_folder), "--method", method, *NETWORK]
    whole = tmp_path / "whole"
    assert cifar.main([*command, "--out", str(whole)]) == 0
    # Four steps an epoch: killed before the first checkpoint, in the second epoch, in the third; glc also as its second
    # phase begins, and in the middle of that.
    for steps in (3, 6, 10) + ((12, 18) if method == "glc" else ()):
        broken = tmp_path / f"broken after {steps}"
        with monkeypatch.context() as patch:
            patch.setattr(Run, "advance", dying(Run.advance, steps))
            with pytest.raises(KilledError):
                cifar.main([*command, "--out", str(broken)])
        torch.rand(3)  # another process would not have this random state
        assert cifar.main(["--resume", "--out", str(broken)]) == 0
        assert_same(whole, broken)


def dying(advance: Advance, steps: int) -> Advance:
    """Return `advance`, which is killed after so many steps."""
    left = iter(range(steps))

    def step(run: Run) -> dict[str, torch.Tensor]:
        if next(left, None) is None:
            raise KilledError
        return advance(run)

    return step


@pytest.mark.kill
def test_an_interrupted_run_saves_the_very_step(
    cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(cifar10_folder), "--corrupt-clean", "0.5", *NETWORK]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cifar.main([*command, "--out", str(whole)]) == 0
    advance = Run.advance

    def interrupted(run: Run) -> dict[str, torch.Tensor]:
        if (run.epoch, run.step) == (1, 2):
            signal.raise_signal(signal.SIGTERM)
        return advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", interrupted)
        assert cifar.main([*command, "--out", str(broken)]) == interruption.EXIT_CODE
    assert "stopped in epoch 2 after step 3; to go on: --resume --out" in capsys.readouterr().err
    progress = checkpoint.load(broken / checkpoint.NAME)["run"]["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 3)
    assert cifar.main([*command, "--resume", "auto", "--out", str(broken)]) == 0
    assert_same(whole, broken)


@pytest.mark.kill
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that a program can be sent")
def test_sigterm_stops_a_process_and_it_can_go_on(tmp_path: Path) -> None:
    command = ["--dataset", "digits", "--epochs", "40", "--log-interval", "1"]
    script = [sys.executable, str(REPOSITORY / "examples" / "noisy_labels" / "cifar.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [*script, *command, "--out", str(broken)], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline, log = time.monotonic() + 60, broken / "log.jsonl"
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 20):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == interruption.EXIT_CODE, errors
    assert "to go on: --resume" in errors
    assert log_of(broken)[-1]["event"] != "end"
    assert not list(broken.glob("*.unfinished"))


def test_a_finished_run_only_writes_its_results_again(tmp_path: Path) -> None:
    command = ["--dataset", "digits", "--epochs", "1", "--out", str(tmp_path)]
    assert cifar.main(command) == 0
    before = weights_of(tmp_path)
    assert cifar.main([*command, "--resume"]) == 0
    assert all(torch.equal(value, before[name]) for name, value in weights_of(tmp_path).items())
    assert [record["event"] for record in log_of(tmp_path)] == ["start", "epoch", "end"]


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / checkpoint.NAME, {"run": os.system})
    with pytest.raises(ValueError, match=r"is whole, and cannot be read .*\.system"):
        checkpoint.load(tmp_path / checkpoint.NAME)


def test_a_broken_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / checkpoint.NAME
    checkpoint.save(file, {"run": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(file, {"run": lambda: None})
    assert checkpoint.load(file) == {"run": 1}


def test_a_run_cannot_change_its_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar.main(["--dataset", "digits", "--method", "ce", "--epochs", "1", "--out", str(tmp_path)]) == 0
    file = tmp_path / checkpoint.NAME
    checkpoint.save(file, checkpoint.load(file) | {"device": "cuda"})
    assert cifar.main(["--resume", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "the run was on cuda, whose random streams cannot go on on cpu" in capsys.readouterr().err


def test_a_log_that_was_shortened_is_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar.main(["--dataset", "digits", "--method", "ce", "--epochs", "1", "--out", str(tmp_path)]) == 0
    (tmp_path / "log.jsonl").write_text("")
    assert cifar.main(["--resume", "--out", str(tmp_path)]) == 1
    assert "has 0 bytes, and" in capsys.readouterr().err


def test_writing_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("old")
    with pytest.raises(TypeError), files.replacing(file) as stream:
        stream.writelines([b"new", "no bytes"])  # type: ignore[list-item]
    assert [one.name for one in tmp_path.iterdir()] == ["table.csv"]
    assert file.read_text() == "old"
    (tmp_path / f"table.csv{files.UNFINISHED}").write_text("what a killed process leaves")
    files.sweep(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.kill
def test_an_early_sigterm_waits_for_the_first_step(
    cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # While images are read nothing can be saved yet: the request is remembered.
    load = cifar.pools.load

    def slow(*arguments: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return load(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cifar.pools, "load", slow)
    out = tmp_path / "run"
    command = ["--data", str(cifar10_folder), "--method", "ce", *NETWORK, "--out", str(out)]
    assert cifar.main(command) == interruption.EXIT_CODE
    assert checkpoint.load(out / checkpoint.NAME)["run"]["progress"]["step"] == 1
