"""TensorBoard shows what the log says, every point once, however often the run was stopped."""

from __future__ import annotations

import builtins
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from examples.noisy_labels import cifar
from examples.noisy_labels.run.training import Run
from killing import log_of

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")

COMMAND = ["--dataset", "digits", "--epochs", "3", "--log-interval", "5", "--tensorboard"]
Points = dict[str, list[tuple[int, float]]]


def raw_points(folder: Path) -> Points:
    """Return every point of every event file, in the order they were written, without TensorBoard's own clean-up."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    points: Points = defaultdict(list)
    for file in sorted((folder / "tensorboard").iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                points[value.tag].append((event.step, value.tensor.float_val[0]))
    return dict(points)


def logged_points(folder: Path) -> Points:
    """Return what the log says, in the same form; an epoch has 12 steps."""
    points: Points = defaultdict(list)
    for record in log_of(folder):
        event = record["event"]
        if event in ("step", "epoch"):
            step = record["epoch"] if event == "epoch" else 12 * (record["epoch"] - 1) + record["step"]
            for name in record.keys() - {"event", "epoch", "step"}:
                points[f"{event}/{name}"].append((step, pytest.approx(record[name], rel=1e-6)))
    return dict(points)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "write", lambda *_: None)


class KilledError(Exception):
    """Stands for a SIGKILL."""


def test_points_are_those_of_the_log_and_resuming_repeats_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, advance, steps = tmp_path / "run", Run.advance, iter(range(20))

    def dying(run: Run) -> Any:
        if next(steps, None) is None:
            raise KilledError
        return advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", dying)
        with pytest.raises(KilledError):
            cifar.main([*COMMAND, "--out", str(out)])
    assert raw_points(out)["step/lower_loss"][-1][0] == 20, "a point that the resumed run writes again"
    assert cifar.main(["--resume", "--out", str(out)]) == 0  # from the end of the first epoch
    found, expected = raw_points(out), logged_points(out)
    found.pop("epoch/seconds")  # differs from one run to the next
    assert {"step/upper_loss", "step/multiplier", "epoch/test_accuracy", "epoch/recovered"} <= found.keys()
    assert found == expected
    assert [step for step, _ in found["step/lower_loss"]] == [5, 10, 15, 20, 25, 30, 35]
    assert [step for step, _ in found["epoch/test_accuracy"]] == [1, 2, 3]


def test_it_can_be_switched_on_later(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cifar.main([*COMMAND, "--no-tensorboard", "--out", str(out)]) == 0
    assert not (out / "tensorboard").exists()
    assert cifar.main(["--resume", "--tensorboard", "--out", str(out)]) == 0
    assert [step for step, _ in raw_points(out)["epoch/test_accuracy"]] == [1, 2, 3]


def test_without_the_package_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *arguments, **options)

    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert cifar.main([*COMMAND, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("--tensorboard: the package tensorboard cannot be imported (No module named 'tensorboard')")
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
