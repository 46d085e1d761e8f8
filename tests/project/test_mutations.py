"""The list of mutations is up to date, each is applied, and its test must fail."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mutations import MUTATIONS, ROOT, Mutation, Workshop, chosen, main, mutants, named

pytestmark = pytest.mark.mutation


def test_the_list_is_short_and_no_two_are_the_same() -> None:
    assert 25 <= len(MUTATIONS) <= 40
    assert len({m.what for m in MUTATIONS}) == len(MUTATIONS)
    assert len({(m.where, m.old, m.new) for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_its_code_is_there_once_and_its_test_exists(mutation: Mutation) -> None:
    ((path, changed),) = mutants(mutation, ROOT / "bilevel")
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(path.read_text(encoding="utf-8")))
    file, _, rest = named(mutation.test, ROOT / "tests").partition("::")
    name, _, row = rest.partition("[")
    text = Path(file).read_text(encoding="utf-8")
    assert name in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    if row:
        assert f'"{row.rstrip("]")}"' in text


def test_layout_comments_and_files_are_no_matter(tmp_path: Path) -> None:
    mutation = Mutation("", "Adder.add", "self.x + y", "self.x - y", "")
    (tmp_path / "somewhere.py").write_text(
        '''class Adder:
    def add(self, y):
        """x + y, not − y."""
        return (  # a comment
            self.x
            + y
        )

    def other(self, y):
        return self.x + y
''',
        encoding="utf-8",
    )
    ((path, changed),) = mutants(mutation, tmp_path)
    assert path.name == "somewhere.py"
    assert changed.count("self.x - y") == changed.count("self.x + y") == 1
    names: dict[str, type] = {}
    exec(changed, names)
    adder = names["Adder"]()
    adder.x = 5
    assert (adder.add(2), adder.other(2)) == (3, 7)


def test_one_is_found_by_number_and_by_name() -> None:
    assert chosen("3") == [(3, MUTATIONS[2])]
    assert [m.what for _, m in chosen("AMSGrad")] == ["preview of AMSGrad forgets the maximum"]
    assert chosen("no such thing") == []
    assert main(["--only", "no such thing"]) == 1


def test_a_verdict_is_not_given_lightly(tmp_path: Path) -> None:
    """What changes nothing survives, and outdated code or a test that is not there is no kill."""
    workshop = Workshop(tmp_path)
    fine = "test_problems.py::test_quadratic_draws_are_reproducible_and_leave_the_random_state_alone"
    changed = "bilevel/problems/quadratic.py"
    where, code = "Quadratic.hypergradient", "torch.linalg.solve(self.hessian, upper)"
    assert workshop.verdict(Mutation("", where, code, f"1 * {code}", fine)) == "SURVIVED"
    assert workshop.verdict(Mutation("", where, code, "1 *", fine)).startswith("NOT RUN")
    assert workshop.verdict(Mutation("", where, code, f"{code} * 1", f"{fine}_")).startswith("NOT RUN")
    assert workshop.verdict(Mutation("", where, "no_such_code", "0", fine)).startswith("OUT OF DATE")
    assert (tmp_path / changed).read_text() == (ROOT / changed).read_text()


def test_every_mutation_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    status = main([])
    assert status == 0, capsys.readouterr().out
