"""`own_data.py` with its verdict: what it writes, whom it lets judge, and how it goes on after it was stopped."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.noisy_labels import own_data
from examples.noisy_labels.data import own as reading
from examples.noisy_labels.data import table
from examples.noisy_labels.report import pictures as drawings
from examples.noisy_labels.run import interruption
from examples.noisy_labels.run.options import Options
from examples.noisy_labels.verdict import judgement
from examples.noisy_labels.verdict.network_way import NetworkWay
from examples.noisy_labels.verdict.problem import UNKNOWN
from own_worlds import Rows, pictures, points, read, write, write_trusted

WAYS = ["given", "trusted", "classifier", "bayes", "ebomlc", "together"]
SHORT = ["--epochs", "4", "--batch-size", "20", "--log-interval", "2"]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("curves", "label_heatmap", "contact_sheet"):
        monkeypatch.setattr(drawings, name, lambda *_: None)


def many(number: int = 300) -> Rows:
    """Points of which a third are given the next class; five belong to a patient."""
    rows, source = points(number, wrong=0.0), random.Random(1)
    names = sorted({row["label"] for row in rows})
    for i, row in enumerate(rows):
        if source.random() < 0.35:
            row["label"] = names[(names.index(row["checked"]) + 1) % 3]
        row["patient"] = f"p{i // 5}"
    return rows


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rows = many()
    table = write(tmp_path / "points.csv", rows, ["id", "width", "height", "label", "patient"])
    trusted = write_trusted(tmp_path / "trusted.csv", rows, 120)
    return ["--table", str(table), "--trusted", str(trusted), "--groups", "patient", "--classifier", "logistic", *SHORT]


def test_a_run_leaves_a_verdict_and_what_to_check_next(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert own_data.main([*files, "--precision", "0.8", "--check", "20", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert (out / "verdict.txt").read_text() in text
    assert "verdict: correct." in text
    assert "% right as given" in text.splitlines()[-1]
    assert "verdict: correct, see verdict.txt" in text.splitlines()[-1]
    values = json.loads((out / "verdict.json").read_text())
    names = [one["name"] for one in values["verdict"]["scores"]]
    assert [one for one in names if one != "cleanlab"] == [
        "given",
        "trusted",
        "classifier",
        "bayes",
        "ebomlc",
        "together",
    ]
    assert values["verdict"]["judged"] == 120, "all trusted samples judge"
    rows = read(out / "corrected_labels.csv")
    assert list(rows[0]) == ["id", "given", "corrected", "probability", "suspicion", "action"]
    assert len(rows) == 180
    true = {row["id"]: row["checked"] for row in many()}
    given = sum(row["given"] == true[row["id"]] for row in rows)
    assert sum(row["corrected"] == true[row["id"]] for row in rows) > given + 30
    assert all(
        (row["action"] == "keep") == (row["given"] == row["corrected"]) or row["action"] == "check" for row in rows
    )
    assert sorted(int(row["suspicion"]) for row in rows) == list(range(1, 181))
    next_ones = read(out / "check_next.csv")
    assert len(next_ones) == 20
    stated = {row["id"]: float(row["probability"]) for row in rows}
    assert [row["id"] for row in next_ones] == sorted(stated, key=lambda one: stated[one])[:20] or len(
        set(stated.values())
    ) < len(stated)
    assert float(next_ones[0]["probability"]) == min(stated.values())
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-2])["event"] == "verdict"


@pytest.mark.program
def test_a_way_may_be_named(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert own_data.main([*files, "--way", "given", "--out", str(tmp_path / "run")]) == 0
    assert all(row["given"] == row["corrected"] for row in read(tmp_path / "run" / "corrected_labels.csv"))
    assert "Labels written: given (as you asked)" in capsys.readouterr().out


def test_groups_and_suspicious_samples_are_read(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "looked.txt").write_text("row003\nrow007\n")
    options = Options(
        table=files[1], trusted=files[3], groups="patient", suspicious=str(tmp_path / "looked.txt"), check=0
    )
    data = reading.read(options)
    problem = data.problem
    assert problem.groups is not None
    assert len(np.unique(problem.groups)) == 60
    assert np.flatnonzero(~problem.judging).tolist() == [3, 7]
    assert (problem.truth != UNKNOWN).sum() == 120
    assert problem.annotations.shape == (300, 1)
    assert "patient" not in data.notes[0]
    assert len(data.samples.test) == 0, "all trusted samples train, because all of them judge in turn"
    (tmp_path / "looked.txt").write_text("row200\n")
    with pytest.raises(ValueError, match="'row200' is not trusted"):
        reading.read(options)


def test_samples_of_a_test_file_teach_and_judge_nothing(files: list[str], tmp_path: Path) -> None:
    rows = many()
    test = write(
        tmp_path / "test.csv", [{"id": r["id"], "label": r["checked"]} for r in rows[150:170]], ["id", "label"]
    )
    problem = reading.read(Options(table=files[1], trusted=files[3], test=str(test), ignore=("patient",))).problem
    assert (problem.truth[150:170] == UNKNOWN).all()
    assert not problem.voted[150:170].any()
    assert problem.voted.sum() == 280


@pytest.mark.kill
def test_a_run_that_is_stopped_while_it_judges_goes_on(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert own_data.main([*files, "--out", str(whole)]) == 0
    trained: list[int] = []
    ask = NetworkWay.__call__

    def counted(way: NetworkWay, problem: Any) -> Any:
        trained.append(1)
        if len(trained) == 3:
            signal.raise_signal(signal.SIGTERM)
        return ask(way, problem)

    monkeypatch.setattr(NetworkWay, "__call__", counted)
    assert own_data.main([*files, "--out", str(broken)]) == interruption.EXIT_CODE
    assert "stopped while the ways were judged; to go on: --resume --out" in capsys.readouterr().err
    assert len(trained) == 3
    assert own_data.main(["--resume", "--out", str(broken)]) == 0
    assert len(trained) == 3 + 3, "two of five folds were kept"
    for name in ("corrected_labels.csv", "check_next.csv", "verdict.txt", "verdict.json"):
        assert (whole / name).read_text() == (broken / name).read_text()
    (broken / judgement.NAME).write_bytes(b"")
    assert own_data.main(["--resume", "--out", str(broken)]) == 1
    assert "verdict.pt): is empty" in capsys.readouterr().err


@pytest.mark.program
def test_images_are_judged_by_networks(tmp_path: Path) -> None:
    true = pictures(tmp_path / "shapes", 60)
    rows = [{"id": file, "label": name} for file, name in list(true.items())[:24]]
    trusted = write(tmp_path / "shown.csv", rows, ["id", "label"])
    command = ["--images", str(tmp_path / "shapes"), "--trusted", str(trusted), "--image-size", "16", "--folds", "2"]
    assert own_data.main([*command, "--epochs", "1", "--batch-size", "12", "--out", str(tmp_path / "run")]) == 0
    values = json.loads((tmp_path / "run" / "verdict.json").read_text())
    names = [one["name"] for one in values["verdict"]["scores"]]
    assert [one for one in names if one != "cleanlab"] == [
        "given",
        "trusted",
        "classifier",
        "bayes",
        "ebomlc",
        "together",
    ]
    assert len(read(tmp_path / "run" / "corrected_labels.csv")) == 36


@pytest.mark.program
def test_given_labels_that_were_corrected_judge_no_correction(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = many()
    for row in rows[:120]:
        row["label"] = row["checked"]
    write(Path(files[1]), rows, ["id", "width", "height", "label", "patient"])
    assert own_data.main([*files, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "verdict: cannot tell. correction cannot be judged" in out
    assert "Labels written: ebomlc (a best guess)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folds", "1"], "--folds 1: must be at least 2, or 0 for no verdict"),
        (["--folds", "-1"], "--folds -1: must be between 0 and 50"),
        (["--precision", "1"], "--precision 1.0: must be above 0 and below 1"),
        (["--check", "-1"], "--check -1: must be at least 0"),
        (["--classifier", "magic"], "--classifier magic: is none of logistic, trees"),
        (["--classifier", "sklearn.svm.LinearSVC"], "gives no probabilities"),
        (
            ["--way", "magic"],
            "--way magic: must be best, verdict, together, given, trusted, classifier, cleanlab, bayes",
        ),
        (["--encoding", "klingon"], "--encoding klingon: is no encoding that Python knows"),
        (["--way", "bayes", "--folds", "0"], "--way bayes: is judged in folds"),
    ],
)
def test_mistakes_are_refused(
    arguments: list[str], message: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        own_data.main([*files, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.program
def test_any_classifier_of_scikit_learn(files: list[str], tmp_path: Path) -> None:
    command = [*files, "--classifier", "sklearn.naive_bayes.GaussianNB", "neighbours", "--out", str(tmp_path / "run")]
    assert own_data.main(command) == 0
    values = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert set(values["classifiers"].values()) <= {"sklearn.naive_bayes.GaussianNB", "neighbours"}


@pytest.mark.program
def test_parquet_in_and_out(files: list[str], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rows = many()
    frame = pandas.DataFrame(rows)[["id", "width", "height", "label", "patient"]]
    frame = frame.astype({"width": float, "height": float})
    frame.to_parquet(tmp_path / "points.parquet", index=False)
    plain = reading.read(Options(table=files[1], trusted=files[3], groups="patient"))
    same = reading.read(Options(table=str(tmp_path / "points.parquet"), trusted=files[3], groups="patient"))
    assert same.samples.digest() == plain.samples.digest()
    command = ["--table", str(tmp_path / "points.parquet"), *files[2:], "--out", str(tmp_path / "run")]
    assert own_data.main(command) == 0
    written = pandas.read_parquet(tmp_path / "run" / "corrected_labels.parquet")
    text = read(tmp_path / "run" / "corrected_labels.csv")
    assert written["corrected"].tolist() == [row["corrected"] for row in text]
    assert written["suspicion"].tolist() == [int(row["suspicion"]) for row in text]
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "points.parquet").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"Table\(broken\.parquet\): cannot be read as Parquet"):
        reading.read(Options(table=str(tmp_path / "broken.parquet"), trusted=files[3]))


def test_missing_cells_of_parquet_are_empty() -> None:
    numpy_nan, nothing = float("nan"), None
    assert [table._text(one) for one in (3.0, 2.5, numpy_nan, nothing, " x ", 7)] == ["3", "2.5", "", "", "x", "7"]


def test_parquet_without_its_reader_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")

    def missing(*_: Any) -> None:
        raise ImportError

    monkeypatch.setattr("pandas.read_parquet", missing)
    with pytest.raises(ValueError, match=r"read and written by pyarrow, which is not installed"):
        reading.read(Options(table=str(tmp_path / "t.parquet"), trusted="c.csv"))
