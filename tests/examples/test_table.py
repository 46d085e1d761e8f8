"""`table.py`: what is trained, what is not trained again, what is computed from it, and how it is written."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from examples.noisy_labels import table
from examples.noisy_labels.report import formats, published, statistics
from examples.noisy_labels.report.statistics import Entry
from examples.noisy_labels.run import workers
from examples.noisy_labels.run.cells import Cell, cells
from examples.noisy_labels.run.interruption import EXIT_CODE, Interruption
from examples.noisy_labels.run.settings import Settings
from examples.noisy_labels.run.workers import Workers

METHODS = ("ce", "em", "ebomlc")

# A run without training: an epoch every 0.03 s, in a log that is continued; SIGTERM is obeyed between two of them.
PROGRAM = """
import json, pathlib, signal, sys, time
folder, epochs, fails = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
log, starts = folder / "log.jsonl", folder / "starts"
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with starts.open("a") as stream:
    stream.write("start\\n")
if starts.read_text().count("\\n") <= fails:
    sys.exit("it broke")
while not log.exists() or log.read_text().count("\\n") < epochs:
    time.sleep(0.03)
    with log.open("a") as stream:
        stream.write(json.dumps({"event": "epoch", "seconds": 2.0}) + "\\n")
    if asked:
        sys.exit(75)
(folder / "result").write_text(json.dumps({"epochs": epochs}))
(folder / "result").replace(folder / "result.json")  # at once, as the real one
"""


def digits(out: Path, seeds: tuple[int, ...] = (1, 2), methods: tuple[str, ...] = METHODS) -> list[Cell]:
    return cells(methods, ["digits"], ["flip:0.4"], seeds, ["--epochs", "4"], out)


def fake(fails: Callable[[Cell], int] = lambda _: 0) -> Callable[[Cell], list[str]]:
    return lambda cell: [sys.executable, "-c", PROGRAM, str(cell.folder), str(cell.epochs), str(fails(cell))]


def starts(cell: Cell) -> int:
    file = cell.folder / "starts"
    return file.read_text().count("\n") if file.exists() else 0


# --- cells ------------------------------------------------------------------------------------------------------------


def test_cells_come_seed_by_seed_and_have_folders_of_their_own(tmp_path: Path) -> None:
    noises = ["uniform:0.2", "cifar10/human:aggre", "cifar100/human:noisy"]
    found = cells(("ce", "glc"), ("cifar10", "cifar100"), noises, (1, 2), ["--preset", "medium"], tmp_path)
    assert len(found) == len({cell.folder for cell in found}) == 16
    assert [cell.settings.seed for cell in found] == [1] * 8 + [2] * 8
    columns = ["cifar10 uniform 20 %", "cifar10 human labels (aggre)"]
    columns += ["cifar100 uniform 20 %", "cifar100 human labels (noisy)"]
    assert list(dict.fromkeys(cell.column for cell in found)) == columns
    assert {cell.epochs for cell in found if cell.settings.method == "glc"} == {60}, "two phases"
    assert {cell.settings.network for cell in found} == {"small"}


def test_a_matrix_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    np.savetxt(tmp_path / "own" / "t.csv", np.eye(10), delimiter=",")
    (cell,) = cells(("ce",), ("digits",), ["digits/matrix:own/t.csv"], (1,), [], tmp_path)
    assert cell.settings.transition == str(tmp_path / "own" / "t.csv")


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (cell,) = digits(tmp_path, (1,), ("ce",))
    cell.check()
    cell.folder.mkdir()
    cell.settings.save(cell.folder / "config.json")
    cell.check()
    Settings(**vars(cell.settings) | {"epochs": 5}).save(cell.folder / "config.json")
    with pytest.raises(ValueError, match=r"epochs = 5, not 4\. Use another --out"):
        cell.check()


# --- workers ----------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = digits(tmp_path)
    pool = Workers(tmp_path, number=3, command=fake(), poll=0.01)
    assert pool.train(found, Interruption()) == []
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0] for line in lines} == {cell.name for cell in found}
    assert lines[-1].endswith("finished, 6 of 6; 0:00:00 left for all")
    assert pool.train(found, Interruption()) == []
    assert capsys.readouterr().out == ""
    assert [starts(cell) for cell in found] == [1] * 6
    assert all(cell.seconds() == [2.0] * 4 for cell in found)


def test_failures_are_recorded_and_tried_again(tmp_path: Path) -> None:
    found = digits(tmp_path, (1,))
    fails = {"ce": 0, "em": 1, "ebomlc": 5}
    pool = Workers(tmp_path, number=2, retries=2, command=fake(lambda cell: fails[cell.settings.method]), poll=0.01)
    failed = pool.train(found, Interruption())
    assert [cell.settings.method for cell in failed] == ["ebomlc"]
    assert [starts(cell) for cell in found] == [1, 2, 3]
    lines = [json.loads(line) for line in (tmp_path / workers.FAILURES).read_text().splitlines()]
    assert sorted((line["cell"], line["try"]) for line in lines) == [
        ("digits-flip0.4-ebomlc-seed1", 1),
        ("digits-flip0.4-ebomlc-seed1", 2),
        ("digits-flip0.4-ebomlc-seed1", 3),
        ("digits-flip0.4-em-seed1", 1),
    ]
    assert all((line["code"], line["output"][-1]) == (1, "it broke") for line in lines)
    # The next call tries it once more than it is told to repeat: it now works.
    assert pool.train(found, Interruption()) == []


def test_a_program_that_cannot_start_is_a_failure(tmp_path: Path) -> None:
    found = digits(tmp_path, (1,), ("ce",))
    pool = Workers(tmp_path, retries=0, command=lambda _: [str(tmp_path / "missing")], poll=0.01)
    assert pool.train(found, Interruption()) == found
    assert "missing" in (tmp_path / workers.FAILURES).read_text()


@pytest.mark.kill
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that a program can be sent")
def test_a_stop_lets_the_runs_save_themselves_and_the_next_call_goes_on(tmp_path: Path) -> None:
    found = digits(tmp_path)
    pool, stops = Workers(tmp_path, number=2, command=fake(), poll=0.01), 0
    for _ in range(100):
        request = Interruption()
        timer = threading.Timer(0.2, lambda request=request: setattr(request, "requested", True))
        timer.start()
        assert pool.train(found, request) == []
        timer.cancel()
        if all(cell.result() for cell in found):
            break
        stops += 1
    assert stops >= 1, "it was never stopped"
    assert all(cell.seconds() == [2.0] * 4 for cell in found), "no epoch is lost or done twice"
    assert not (tmp_path / workers.FAILURES).exists(), "being stopped is no failure"


@pytest.mark.kill
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_run_that_survived_its_table_is_waited_for(tmp_path: Path) -> None:
    (cell,) = digits(tmp_path, (1,), ("ce",))
    cell.folder.mkdir()
    with workers.locked(cell.folder / workers.LOCK, threading.Event(), 0.01) as lock:
        assert lock is not None
        orphan = subprocess.Popen(fake()(cell), pass_fds=(lock,))
    # This program has let the lock go; the run still holds it.
    assert Workers(tmp_path, command=fake(), poll=0.01).train([cell], Interruption()) == []
    assert orphan.wait(10) == 0
    assert starts(cell) == 1


def test_time_left_counts_each_kind_at_its_own_speed(tmp_path: Path) -> None:
    ce, em, ebomlc = digits(tmp_path, (1,))
    assert workers.time_left({ce: [], em: [], ebomlc: []}, 2) is None
    # ce: 2 epochs of 1 s; em: unknown, so (1 + 5) / 2 = 3 s for 4 epochs; ebomlc: 3 epochs of 5 s.
    seconds = {ce: [1.0, 1.0], em: [], ebomlc: [5.0]}
    assert workers.time_left(seconds, 1) == pytest.approx(2 + 12 + 15)
    assert workers.time_left(seconds, 2) == pytest.approx(15)  # not 14.5: the longest one
    assert workers.time_left(seconds, 1, [ebomlc]) == pytest.approx(14)


# --- numbers ----------------------------------------------------------------------------------------------------------


def finished(out: Path, accuracies: dict[str, dict[int, float]], noise: str = "flip:0.4") -> list[Cell]:
    """Write results that have these accuracies."""
    found = cells(tuple(accuracies), ["digits"], [noise], (1, 2, 3), [], out)
    for cell in found:
        accuracy = accuracies[cell.settings.method].get(cell.settings.seed)
        if accuracy is not None:
            cell.folder.mkdir(parents=True)
            shares = {"right": accuracy / 2, "recovered": 0.25, "broken": accuracy / 4}
            content = {"test_accuracy": accuracy, "own": shares, "bayes": shares, "wrong": 0.4, "noisy": 90}
            content |= {"clean": 10, "test": 50, "setting": cell.column, "epochs": 4}
            content |= {"seconds_per_epoch": {"ce": 1.0, "em": 2.0}.get(cell.settings.method, 4.0)}
            (cell.folder / "result.json").write_text(json.dumps(content))
    return found


def entry(entries: list[Entry], quantity: str, method: str) -> Entry:
    (found,) = [one for one in entries if (one.quantity, one.method) == (quantity, method)]
    return found


def test_means_ranks_and_paired_differences(tmp_path: Path) -> None:
    scores = {"ce": (0.5, 0.6, 0.7), "em": (0.6, 0.8, 0.7), "ebomlc": (0.6, 0.65, 0.75)}
    values = {method: dict(zip((1, 2, 3), numbers, strict=True)) for method, numbers in scores.items()}
    entries = statistics.entries(finished(tmp_path, values), "ebomlc")
    ce, em, own = (entry(entries, "test_accuracy", method) for method in ("ce", "em", "ebomlc"))
    assert (ce.mean, ce.deviation) == (pytest.approx(60), pytest.approx(10))
    assert [one.rank for one in (em, own, ce)] == [1, 2, 3]
    assert [entry(entries, "broken", method).rank for method in ("em", "ebomlc", "ce")] == [3, 2, 1]
    assert [entry(entries, "recovered", method).rank for method in ("em", "ebomlc", "ce")] == [2, 2, 2]
    # Differences -10, -5, -5: mean -6.67, deviation 2.887, standard error 1.667, t = -4 with 2 degrees of freedom, for
    # which the two-sided p is 1 - 4 / sqrt(4² + 2) = 0.0572.
    assert ce.difference == pytest.approx(-20 / 3)
    assert ce.p == pytest.approx(1 - 4 / 18**0.5, rel=1e-6)
    assert ce.p == pytest.approx(stats.ttest_rel(scores["ce"], scores["ebomlc"]).pvalue, rel=1e-9)
    assert ce.low is not None
    assert ce.high is not None
    assert (ce.high - ce.low) / 2 == pytest.approx(4.3027 * 5 / 3, rel=1e-4)  # the 97.5 % point of t with 2 degrees
    assert em.p is not None
    assert (ce.p_holm, em.p_holm) == (pytest.approx(2 * ce.p), pytest.approx(max(2 * ce.p, em.p)))
    assert (own.difference, own.p, own.p_holm) == (None, None, None)
    assert [one.time for one in (ce, em, own)] == [0.25, 0.5, 1.0]


def test_only_common_seeds_are_compared_and_one_is_no_test(tmp_path: Path) -> None:
    values = {"ce": {1: 0.5, 2: 0.9}, "em": {}, "ebomlc": {1: 0.6, 3: 0.1}}
    entries = statistics.entries(finished(tmp_path, values), "ebomlc")
    ce, em = entry(entries, "test_accuracy", "ce"), entry(entries, "test_accuracy", "em")
    assert (ce.difference, ce.p, ce.low) == (pytest.approx(-10), None, None)
    assert (ce.seeds, em.seeds, em.mean, em.rank, em.difference) == ((1, 2), (), None, None, None)


def test_equal_differences_are_no_test() -> None:
    answer = statistics.paired({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0})
    assert (answer.difference, answer.p) == (1.0, None)


def test_holm_as_in_the_textbook() -> None:
    # Four p-values: .01 x 4, .03 x 3, .04 x 2 = .08, which must not fall below .09, .05 x 1, the same.
    assert statistics.holm([0.04, 0.01, None, 0.05, 0.03]) == pytest.approx([0.09, 0.04, None, 0.09, 0.09])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]


def test_published_numbers_stand_beside_their_own_setting_only() -> None:
    assert published.accuracy(Settings(noise="uniform", rate=0.4)) == 89.58
    assert published.accuracy(Settings(noise="flip", rate=0.2, dataset="cifar100")) == 64.86
    others: list[dict[str, Any]] = [{"rate": 0.3}, {"method": "ce"}, {"exclude_true": True}, {"noise": "pairflip"}]
    assert [published.accuracy(Settings(**one)) for one in others] == [None] * 4


# --- formats ----------------------------------------------------------------------------------------------------------


def one_entry(**changes: Any) -> Entry:
    values: dict[str, Any] = {"quantity": "test_accuracy", "column": "cifar10 flip 40 %", "method": "ce_x"}
    values |= {"seeds": (1, 2), "mean": 60.0, "deviation": 10.0, "rank": 2.0, "difference": -5.0, "low": -8.0}
    values |= {"high": -2.0, "p": 0.01, "p_holm": 0.02, "time": 0.25, "published": 89.58}
    return Entry(**values | changes)


def test_markdown_and_latex_show_the_numbers() -> None:
    entries = [one_entry(), one_entry(method="ebomlc", mean=65.0, rank=1.0, difference=None, published=None)]
    text = formats.markdown(entries, "about", "ebomlc")
    assert "| ce_x | 60.0 ± 10.0 (2) [89.58] | 2.0 | 0.25 |" in text
    assert "| ce_x | -5.0 [-8.0, -2.0], p 0.02 |" in text
    latex = formats.latex(entries, "about", "ebomlc")
    assert r"ce\_x & 60.0 $\pm$ 10.0 (2) [89.58] & 2.0 & 0.25 \\" in latex
    assert r"method & cifar10 flip 40 \% & mean rank" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") > 1


def test_a_rank_over_some_of_the_columns_is_not_given() -> None:
    entries = [one_entry(), one_entry(column="digits", mean=None, rank=None, published=None)]
    assert "| ce_x | 60.0 ± 10.0 (2) [89.58] | – | – | 0.25 |" in formats.markdown(entries, "about", "ebomlc")


def test_csv_has_a_row_for_each_entry() -> None:
    (row,) = csv.DictReader(formats.table_csv([one_entry(p=None)]).splitlines())
    assert (row["seeds"], row["mean"], row["p"], row["published"]) == ("1 2", "60.0", "", "89.58")


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.program
def test_the_table_of_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["--datasets", "digits", "--methods", "ce,em", "--noise", "flip:0.4", "--seeds", "1", "--out", str(out)]
    assert table.main([*command, "--workers", "2", "--", "--epochs", "1"]) == 0
    assert "2 of 2 runs are finished" in capsys.readouterr().out
    content = json.loads((out / "table.json").read_text())
    assert [run["cell"] for run in content["runs"]] == ["digits-flip0.4-ce-seed1", "digits-flip0.4-em-seed1"]
    accuracy = json.loads((out / "digits-flip0.4-em-seed1" / "result.json").read_text())["test_accuracy"]
    assert f"| em | {100 * accuracy:.1f} (" in (out / "table.md").read_text()
    assert content["reference"] == "em", "the last one where ebomlc is missing"
    before = [(one, one.stat().st_mtime_ns) for one in out.glob("*/checkpoint.pt")]
    assert table.main([*command, "--", "--epochs", "1"]) == 0
    assert before == [(one, one.stat().st_mtime_ns) for one in out.glob("*/checkpoint.pt")]
    assert table.main([*command, "--", "--epochs", "2"]) == 1
    assert "epochs = 1, not 2" in capsys.readouterr().err


def test_a_table_of_what_is_finished_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path, {"ce": {1: 0.5}, "ebomlc": {1: 0.6}})
    command = ["--datasets", "digits", "--methods", "ce,ebomlc", "--noise", "flip:0.4", "--report"]
    # Wherever it is read: what was trained on another machine's device, too.
    assert table.main([*command, "--device", "cuda:7", "--out", str(tmp_path)]) == 0
    assert "2 of 6 runs are finished" in capsys.readouterr().out
    text = (tmp_path / "table.md").read_text()
    assert "digits flip 40 %: 90 noisy, 10 trusted, 50 test images; 60.0 % of the labels right as given." in text
    assert "| ce | 50.0 (2) | 2.0 | 0.25 |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "--methods magic: must be of ce, clean"),
        (["--datasets", "mnist"], "--datasets mnist: must be of cifar10"),
        (["--workers", "0"], "must be an integer, at least 1"),
        (["--methods", ""], "names nothing"),
        (["--retries", "-1"], "must be an integer, at least 0"),
        (["--noise", "flip:2", "--out", "nowhere"], "must be between 0 and 1"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        table.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that a program can be sent")
def test_a_killed_table_ends_with_the_numbers_of_one_that_was_left_alone(tmp_path: Path) -> None:
    command = ["--datasets", "digits", "--methods", "glc,em", "--noise", "flip:0.4", "--seeds", "1,2", "--workers", "2"]
    script = [sys.executable, "-m", "examples.noisy_labels.table", *command]

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*script, "--out", str(out), "--", "--epochs", "20"], cwd=workers.REPOSITORY)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait(300) == 0
    codes = []
    for number in range(6):
        process = start(broken)
        time.sleep(4 + number)
        (process.kill if number % 2 else process.terminate)()
        codes.append(process.wait(120))
    assert EXIT_CODE in codes
    assert start(broken).wait(300) == 0

    def numbers(out: Path) -> list[dict[str, Any]]:
        runs = json.loads((out / "table.json").read_text())["runs"]
        return [{name: value for name, value in run.items() if "seconds" not in name} for run in runs]

    assert numbers(whole) == numbers(broken)
