"""The selection of settings: that it sees trusted images only, goes on where it stopped, and names the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.noisy_labels import select_settings
from examples.noisy_labels.data import pools
from examples.noisy_labels.data.task import Task
from examples.noisy_labels.run.settings import Settings
from examples.noisy_labels.select_settings import Trial

SMALL: dict[str, Any] = {"method": "em", "network": "small", "noise": "flip", "device": "cpu", "epochs": 1, "seed": 7}
SMALL |= {"clean_fraction": 0.5, "batch_size": 10}


def test_the_parts_of_a_world(cifar10_folder: Path) -> None:
    settings = Settings(data=str(cifar10_folder), **SMALL)
    whole, world = pools.load(settings, torch.device("cpu")), select_settings.world(settings, 40)
    task = world.task
    planted, noisy = task.noisy[world.planted], task.noisy[: len(task.noisy) - len(world.planted)]
    trusted, given = (
        set(whole.clean.tolist()),
        dict(zip(whole.noisy.tolist(), whole.noisy_labels.tolist(), strict=True)),
    )
    parts = [set(part.tolist()) for part in (task.clean, planted, task.test)]
    assert [len(part) for part in parts] == [20, 20, 20]  # two a class
    assert set.union(*parts) == trusted, "and therefore share none"
    assert len(noisy) == 20
    assert [given[index] for index in noisy.tolist()] == task.noisy_labels[: len(noisy)].tolist()


def test_nothing_depends_on_labels_that_nobody_has(cifar10_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data=str(cifar10_folder), **SMALL)
    expected = select_settings.scores(settings, select_settings.world(settings, 40))
    load = pools.load

    def hidden(*arguments: Any) -> Task:
        task = load(*arguments)
        labels = torch.zeros_like(task.labels)
        labels[task.clean] = task.labels[task.clean]
        return replace(task, labels=labels, test=task.test[:0])

    monkeypatch.setattr(pools, "load", hidden)
    assert select_settings.scores(settings, select_settings.world(settings, 40)) == expected


def test_it_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Settings] = []

    def scores(settings: Settings, world: object) -> dict[str, float]:
        asked.append(settings)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"planted": settings.clean_weight, "held": 0.5}

    monkeypatch.setattr(select_settings, "world", lambda *_: None)
    monkeypatch.setattr(select_settings, "scores", scores)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    command = ["--methods", "em", "--noise", "human:worse", "--output", str(tmp_path / "results.json")]
    with pytest.raises(KeyboardInterrupt):
        select_settings.main(command)
    assert select_settings.main([*command, "--report"]) == 0
    assert "best" not in capsys.readouterr().out, "the third setting has no runs"
    assert select_settings.main(command) == 0
    assert [(one.seed, one.clean_weight) for one in asked[2:]] == [
        (101, 0.3),
        (101, 0.3),
        (102, 0.03),
        (102, 0.1),
        (102, 0.3),
    ]
    assert all(one.human_column == "worse" and one.train_images is None and one.epochs == 10 for one in asked)
    best = [line for line in capsys.readouterr().out.splitlines() if "best" in line]
    assert len(best) == 1
    assert best[0].split() == ["em", "clean_weight", "0.3", "2", "30.0", "50.0", "40.0", "<-", "best"]
    assert select_settings.main([*command, "--epochs", "2"]) == 1
    assert "another --output" in capsys.readouterr().err


def test_each_method_has_as_many_settings_and_each_trial_its_name() -> None:
    assert len({len(settings) for settings in select_settings.GRID.values()}) == 1
    trials = list(select_settings.trials(tuple(select_settings.GRID), ("uniform:0.4", "flip:0.4"), (101, 102)))
    assert len({trial.name for trial in trials}) == len(trials) == 5 * 3 * 2 * 2
    assert trials[0] == Trial("ours", {"clean_weight": 0.03}, "uniform:0.4", 101)
