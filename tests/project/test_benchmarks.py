"""The benchmarks run, and refuse to compare what is not the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bilevel
from benchmarks import (
    hypergradient,
    kept_graph,
    ports,
    step_time,
    unrolled_default,
    unrolled_ways,
    unrolling,
    which_method,
)
from benchmarks.by_hand import ByHand
from benchmarks.memory import LiveBytes
from benchmarks.passes import Passes, counted
from benchmarks.problem import Batch
from benchmarks.timing import median_of, take_turns


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """The benchmark sets the number of threads for its process, which here is that of all tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_smoke_run_compares_equal_work_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "step_time.json"
    assert step_time.main(["--smoke", "--output", str(output)]) == 0
    (result,) = json.loads(output.read_text())["results"]
    # Two evaluations of G, the second forward only, and one of F; plain training: one of each.
    assert result["work"]["library"]["lower"] == result["work"]["by hand"]["lower"] == {"forward": 3, "backward": 2}
    assert result["work"]["plain"]["lower"] == {"forward": 1, "backward": 1}
    assert result["largest difference"]["float64"] < 1e-10
    ratio = result["wall time"]["library / by hand"]
    assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    assert f"wall time       {ratio['value']:.3f}" in capsys.readouterr().out


class OnePassMore(ByHand):
    """The same numbers with a forward pass too many."""

    def step(self, clean: Batch, noisy: Batch) -> None:
        with torch.no_grad(), self._statistics_frozen():
            self.classifier(noisy.inputs)
        super().step(clean, noisy)


class AnotherStep(ByHand):
    """The same passes with other numbers: the biases of the corrector stay where they are."""

    def step(self, clean: Batch, noisy: Batch) -> None:
        self.alpha = [alpha for alpha in self.alpha if alpha.dim() > 1]
        super().step(clean, noisy)


@pytest.mark.parametrize(("wrong", "complaint"), [(OnePassMore, "passes"), (AnotherStep, "differ")])
def test_the_gate_closes(
    wrong: type[ByHand], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_time, "ByHand", wrong)
    assert step_time.main(["--smoke"]) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.thorough
def test_hypergradients_are_compared_only_if_equal_and_all_parts_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "hypergradient.json"
    assert hypergradient.main(["--smoke", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    (products,) = results["products"]
    # The mixed product by forward mode never goes back through the lower model; double backward goes twice.
    passes = products["passes"]
    assert passes["gradient of G"] == {"forward": 1, "backward": 1}
    assert passes["mixed product, forward"] == {"forward": 1, "backward": 0}
    assert passes["Hessian product, reverse"] == {"forward": 1, "backward": 2}
    for result, steps in zip(results["unrolled"], (1, 3), strict=True):
        assert result["steps"] == steps
        assert max(result["largest difference in float64"].values()) < 1e-12
        # k virtual steps and F, then the ordinary step; the adjoint calls G once more for each step.
        assert result["passes"]["by hand"]["forward"] == result["passes"]["bilevel, graph"]["forward"] == steps + 2
        assert result["passes"]["bilevel, adjoint"]["forward"] == 2 * steps + 2
    copies = results["memory"]["parameter copies per further step"]
    assert copies["EMLC, replay"] < copies["EMLC, store"] < copies["by hand"]
    printed = capsys.readouterr().out
    ratio = results["unrolled"][1]["over by hand"]["bilevel, graph"]["wall"]["value"]
    assert f"{ratio:.2f} (" in printed


class HalfTheStep(unrolling.ByHand):
    """Another hypergradient."""

    def hypergradient(self, clean: Batch, noisy: Batch) -> tuple[Tensor, ...]:
        return tuple(g / 2 for g in super().hypergradient(clean, noisy))


def test_the_ways_of_unrolled_are_measured_over_k(tmp_path: Path) -> None:
    """Forward mode needs what two steps need, and a copy of w; checkpoints half of all points; the graph grows."""
    output = tmp_path / "ways.json"
    arguments = ["--steps", "2", "25", "--rounds", "1", "--smoke", "--out", str(output)]
    found = unrolled_ways.main(arguments)
    assert json.loads(output.read_text())["ways"] == found
    few, many = ({way: row["memory"] for way, row in found[k].items()} for k in ("2", "25"))
    assert many["forward"] <= few["forward"] + 1.01
    assert many["adjoint, sqrt"] < many["adjoint"] / 2
    assert many["graph"] > 5 * few["graph"]


def test_the_default_of_unrolled_is_named(tmp_path: Path) -> None:
    rows = unrolled_default.main(["--smoke", "--out", str(tmp_path / "default.json")])
    assert [row["default"] for row in rows] == ["graph", "graph"]
    assert json.loads((tmp_path / "default.json").read_text())["rows"] == rows


def test_another_hypergradient_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(unrolling.EVERYBODY, "bilevel, graph", HalfTheStep)
    assert hypergradient.main(["--smoke", "--only", "unrolled"]) == 1
    assert "bilevel, graph is 5.0e-01 off" in capsys.readouterr().err


def test_kept_graphs_are_compared_only_if_equal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kept_graph.main(["--smoke"]) == 0
    assert capsys.readouterr().out.count(" ratio ") == 2
    original = kept_graph.kept
    monkeypatch.setattr(kept_graph, "kept", lambda oracle, vs: [[2 * x for x in p] for p in original(oracle, vs)])
    assert kept_graph.main(["--smoke"]) == 1
    assert "disagree" in capsys.readouterr().err


def test_counting_sees_a_backward_pass_more() -> None:
    # value_gradient="difference" differentiates G at the look-ahead point with respect to the lower model as well.
    x = torch.ones(2, 3)
    lower, upper = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), nn.Linear(3, 1)
    optimizer = bilevel.EBOMLC(
        lambda: lower(x).square().mean(),
        lambda: (lower(x) - upper(x)).square().mean(),
        upper=upper,
        lower=lower,
        upper_optimizer=torch.optim.SGD(upper.parameters(), lr=0.1),
        lower_optimizer=torch.optim.SGD(lower.parameters(), lr=0.1),
        value_gradient="difference",
        verify="never",
    )
    with counted(lower) as passes:
        optimizer.step()
    assert passes == Passes(forward=3, backward=3)
    optimizer.step()
    assert passes == Passes(forward=3, backward=3)  # counting has ended


def test_live_bytes_follow_birth_death_and_residents() -> None:
    resident = torch.zeros(1000)  # 4000 bytes
    with LiveBytes([resident, resident[:10]]) as live:  # a view adds nothing
        assert live.now == 4000
        first = torch.ones(500)  # + 2000
        second = first * 2  # + 2000
        view: Tensor = second[:5]
        del first  # - 2000
        assert live.now == 6000
        del second
        assert live.now == 6000  # the view keeps the memory
        del view
        assert live.now == 4000
        del resident
        assert live.now == 0
    assert live.peak == 8000


@pytest.mark.parametrize(
    # Ranks of the sign test for 95 %, from tables: the 10th of 30, the 6th of 20 (coverage 95.86 %), the smallest of 6.
    ("n", "low", "coverage"),
    [(30, 10, 0.9572), (20, 6, 0.9586), (6, 1, 0.96875), (3, 1, 0.75)],
)
def test_interval_of_the_median(n: int, low: int, coverage: float) -> None:
    found = median_of([float(value) for value in range(n, 0, -1)])
    assert (found.value, found.low, found.high) == ((n + 1) / 2, low, n + 1 - low)
    assert found.coverage == pytest.approx(coverage, abs=5e-5)


def test_turns_rotate_and_warm_up_is_not_timed() -> None:
    calls: list[str] = []
    contestants = {name: lambda turn, name=name: calls.append(f"{name}{turn}") for name in "ab"}
    times = take_turns(contestants, 2, wait=lambda: None, warm_up=1)
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}


def test_which_method_takes_up_a_run_again_and_counts_what_all_were_run_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "which_method.jsonl"
    some = ["--output", str(output), "--evaluations", "150", "--problems", "henrion-surowiec-2011"]
    assert which_method.main([*some, "--methods", "auto"]) == 0
    first = output.read_text()
    assert which_method.main([*some, "--methods", "auto", "VPBGD"]) == 0
    assert output.read_text().startswith(first)  # what was there is not run again
    runs = [json.loads(line) for line in output.read_text().splitlines()]
    assert [run["method"] for run in runs] == ["auto", "VPBGD"]
    assert all(run["evaluations"] <= 150 for run in runs)
    assert runs[0]["solved"]
    assert runs[0]["solved after"] <= 150
    # A problem that one of them was not run on is left out.
    more = {**runs[0], "problem": "two-wells"}
    text = which_method.table([*runs, more])
    assert "| method | all (1) | strongly-convex (1) |" in text
    assert "two-wells" not in text
    assert which_method.profile(runs, "auto", ["henrion-surowiec-2011"], [0, 150]) == [0.0, 1.0]
    assert output.with_suffix(".png").exists()
    assert capsys.readouterr().out.count("henrion-surowiec-2011: auto solved") == 1


def test_ports_are_timed_on_one_problem() -> None:
    """Before the strengths move, a hundred steps from zeros end at the same loss, whatever the hypergradient."""
    losses, _ = ports.logistic_sama(steps=1)
    ported, _ = ports.from_betty.main(steps=1)
    assert losses == pytest.approx(ported, rel=1e-5)
    once = ports.again_bilevel()
    assert [once().item() for _ in range(2)] == [-28.0, -28.0]  # 2 a x - 4 x^3 at a = 1, x = 2
