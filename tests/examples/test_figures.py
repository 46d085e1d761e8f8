"""Figures over many runs: what goes into them, and that they are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.noisy_labels import figures
from examples.noisy_labels.run.settings import Settings


def write(folder: Path, accuracies: list[float], diagonal: float | None = None, **options: Any) -> None:
    folder.mkdir(parents=True)
    Settings(**options).save(folder / "config.json")
    extra = {} if diagonal is None else {"transition_diagonal": diagonal}
    records = [{"event": "start"}]
    records += [{"event": "epoch", "epoch": n + 1, "test_accuracy": a} | extra for n, a in enumerate(accuracies)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(text + '{"event": "epo')  # killed while writing


def test_curves_are_over_seeds_and_sweeps_over_one_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", [0.1, 0.2], method="em", diagonal=0.7, seed=1)
    write(tmp_path / "deeper" / "b", [0.3], method="em", diagonal=0.7, seed=2)
    write(tmp_path / "c", [0.5], method="ebomlc", delta=0.5)
    write(tmp_path / "d", [0.6], method="ebomlc", delta=1.0)
    write(tmp_path / "e", [0.7], method="ebomlc", delta=2.0, rho=0.5)
    (tmp_path / "f").mkdir()
    Settings().save(tmp_path / "f" / "config.json")
    runs = figures.read(tmp_path)
    assert sorted(run.method for run in runs) == ["ebomlc"] * 3 + ["em"] * 2
    em = [run for run in runs if run.method == "em"]
    assert {place: sorted(values) for place, values in figures.curve(em, "test_accuracy").items()} == {
        1: [0.1, 0.3],
        2: [0.2],
    }
    (line,) = figures.sweeps(runs, "delta")
    assert sorted(run.options["delta"] for run in line) == [0.5, 1.0], "the third differs in rho as well"
    assert figures.sweeps(runs, "xi") == []
    assert figures.main([str(tmp_path), "--out", str(tmp_path / "figures")]) == 0
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert names == {"over_epochs_test_accuracy.png", "over_epochs_transition_diagonal.png", "sweep_delta.png"}
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == names


def test_no_runs_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main([str(tmp_path)]) == 1
    assert "no run has finished" in capsys.readouterr().err
