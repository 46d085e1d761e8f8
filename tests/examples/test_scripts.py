"""The scripts behind published numbers: how the demo was set, and the table of the documentation."""

from __future__ import annotations

import pytest

from benchmarks import noisy_labels_table
from examples.noisy_labels import select_demo
from examples.noisy_labels.run import compare
from examples.noisy_labels.run.settings import DIGITS_BY_METHOD


def test_the_demo_does_not_report_the_seeds_it_was_set_on() -> None:
    assert not set(compare.SEEDS) & set(select_demo.DEVELOPMENT_SEEDS)
    assert len(compare.SEEDS) >= 5


def test_the_demo_uses_pairs_that_were_tried() -> None:
    tried = {(lr, epochs) for lr in select_demo.LEARNING_RATES for epochs in select_demo.EPOCHS}
    assert {(pair["lr"], pair["epochs"]) for pair in DIGITS_BY_METHOD.values()} <= tried
    assert tuple(DIGITS_BY_METHOD) == compare.METHODS


def test_selection_names_the_best_pair(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(select_demo, "DEVELOPMENT_SEEDS", (101,))
    monkeypatch.setattr(select_demo, "LEARNING_RATES", (1e-9, 0.1))
    monkeypatch.setattr(select_demo, "EPOCHS", (3,))
    monkeypatch.setattr(select_demo, "METHODS", ("ce", "clean"))
    select_demo.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["ce", "clean"]
    assert all(line.endswith("lr 0.1, 3 epochs") for line in lines[2:]), "a rate of 1e-9 learns nothing"


def test_table_of_the_documentation() -> None:
    images = {"noisy": 90, "clean": 10, "test": 50, "wrong": 0.36, "overlap": 0, "epochs": 3, "multiplier": None}
    scores = {"right": 0.5, "recovered": 0.25, "broken": 0.125}
    outcomes = [
        {"variant": "ce", "seed": seed, "test_accuracy": accuracy, "seconds": seconds, **scores, **images}
        for seed, accuracy, seconds in ((1, 0.4, 1.0), (2, 0.6, 2.0))
    ]
    text = noisy_labels_table.table(outcomes)
    assert "| `ce` | 50.0 ± 14.1 | 50.0 ± 0.0 | 25.0 ± 0.0 | 12.5 ± 0.0 | 1.5 |" in text
    assert "seeds 1, 2, last of 3 epochs; 90 noisy images (36.0 % of the labels wrong), 10 trusted, 50 test" in text
