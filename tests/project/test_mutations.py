"""The list of mutations is up to date; under ``-m slow`` each is applied, and its test must fail."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from mutations import MUTATIONS, ROOT, Mutation, Workshop, chosen, main, named

every_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)


@cache
def test_functions(path: str) -> frozenset[str]:
    tree = ast.parse(Path(path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


test_functions.__test__ = False  # type: ignore[attr-defined]  # a helper about tests, not one of them


@every_mutation
def test_its_text_is_there_once_and_its_test_exists(mutation: Mutation) -> None:
    source = (ROOT / "bilevel" / mutation.file).read_text()
    assert source.count(mutation.old) == 1
    assert mutation.new != mutation.old
    ast.parse(source.replace(mutation.old, mutation.new))
    path, _, rest = named(mutation.test, ROOT / "tests").partition("::")
    name, _, row = rest.partition("[")
    assert name in test_functions(path)
    if row:
        assert f'"{row.rstrip("]")}"' in Path(path).read_text()


def test_there_are_enough_and_no_two_are_the_same() -> None:
    assert len(MUTATIONS) >= 25
    assert len({m.what for m in MUTATIONS}) == len(MUTATIONS)
    assert len({(m.file, m.old, m.new) for m in MUTATIONS}) == len(MUTATIONS)


def test_one_is_found_by_number_and_by_name() -> None:
    assert chosen("3") == [(3, MUTATIONS[2])]
    assert [m.what for _, m in chosen("AMSGrad")] == ["preview of AMSGrad forgets the maximum"]
    assert chosen("no such thing") == []
    assert main(["--only", "no such thing"]) == 1


@pytest.mark.slow
def test_a_verdict_is_not_given_lightly(tmp_path: Path) -> None:
    """What changes nothing survives, and an outdated text or a test that is not there is no kill."""
    workshop = Workshop(tmp_path)
    fine = "test_problems.py::test_quadratic_draws_are_reproducible_and_leave_the_random_state_alone"
    text = "weight = 1.0\n"
    assert workshop.verdict(Mutation("", "problems.py", text, "weight = 2.0 / 2\n", fine)) == "SURVIVED"
    assert workshop.verdict(Mutation("", "problems.py", text, "weight = 1 /\n", fine)).startswith("NOT RUN")
    assert workshop.verdict(Mutation("", "problems.py", text, "weight = 1.0 \n", f"{fine}_")).startswith("NOT RUN")
    assert workshop.verdict(Mutation("", "problems.py", "no such text", "", fine)).startswith("OUT OF DATE")
    assert (tmp_path / "bilevel" / "problems.py").read_text() == (ROOT / "bilevel" / "problems.py").read_text()


@pytest.mark.slow
def test_every_mutation_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    status = main([])
    assert status == 0, capsys.readouterr().out
