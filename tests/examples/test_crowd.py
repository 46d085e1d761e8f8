"""The made-up crowd, and the comparison of rankings on it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import label_errors
from examples.noisy_labels import crowd
from examples.noisy_labels.data import own as reading
from examples.noisy_labels.run.options import Options


def test_a_crowd_depends_on_its_seed_alone() -> None:
    one, again, other = crowd.make(3), crowd.make(3), crowd.make(4)
    assert torch.equal(one.votes, again.votes)
    assert torch.equal(one.trusted, again.trusted)
    assert not torch.equal(one.votes, other.votes)


def test_annotators_are_as_skilled_as_they_are_said_to_be() -> None:
    made = crowd.make(1, coverage=1.0)
    for annotator, skills in enumerate(made.skills):
        for one in range(crowd.CLASSES):
            votes = made.votes[made.true == one, annotator]
            # About 180 votes: a standard error below 0.038; four of them.
            assert abs((votes == one).double().mean().item() - skills[one].item()) < 0.15
    mistakes = made.votes != made.true.unsqueeze(1)
    lookalike = torch.tensor([crowd.LOOKALIKE[i] for i in range(10)])[made.true].unsqueeze(1)
    assert abs((made.votes == lookalike)[mistakes].double().mean().item() - crowd.TO_LOOKALIKE) < 0.03


def test_everyone_is_seen_and_trusted_ones_are_balanced() -> None:
    made = crowd.make(2, annotators=3, coverage=0.2, trusted_per_class=4)
    assert (made.votes >= 0).any(1).all()
    assert made.true[made.trusted].bincount().tolist() == [4] * 10
    confusion = crowd.confusion(torch.full((10,), 0.6))
    torch.testing.assert_close(confusion.sum(1), torch.ones(10, dtype=torch.float64))


def test_its_files_are_read_as_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert crowd.main(["--out", str(tmp_path), "--seed", "5", "--describe"]) == 0
    assert re.search(r"the majority is wrong on \d\d\.\d % of the images", capsys.readouterr().out)
    table, trusted = str(tmp_path / "crowd.csv"), str(tmp_path / "trusted.csv")
    annotators = tuple(f"annotator_{i + 1}" for i in range(5))
    read = reading.read(Options(table=table, annotators=annotators, trusted=trusted, hold_out=0.0)).samples
    made = label_errors.samples_of(crowd.make(5))
    assert (read.ids, read.names) == (made.ids, made.names)
    for name in ("votes", "labels", "noisy", "clean", "given"):
        assert torch.equal(getattr(read, name), getattr(made, name))
    assert torch.equal(read.samples.sum(1), made.samples.sum(1))  # columns are sorted: pixel_10 before pixel_2
    with (tmp_path / "truth.csv").open() as stream:
        assert [int(row["label"]) for row in csv.DictReader(stream)] == crowd.make(5).true.tolist()


def test_the_comparison_runs_and_measures_everyone_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cleanlab", reason="compares with cleanlab")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert label_errors.main(["--seeds", "9", "--epochs", "1", "--out", str(tmp_path)]) == 0
    outcomes = json.loads((tmp_path / "label_errors.json").read_text())["outcomes"]
    assert [one["contestant"] for one in outcomes] == list(label_errors.CONTESTANTS)
    assert len({one["wrong"] for one in outcomes}) == 1
    assert all(one["precision"] > one["wrong"] for one in outcomes)  # better than a random order
    majority = outcomes[0]
    assert majority["right"] == pytest.approx(1 - majority["wrong"])
    assert (tmp_path / "label_errors.txt").read_text().startswith("| contestant | average precision |")
