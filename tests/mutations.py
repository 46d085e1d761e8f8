"""Mutations of the library, each with the test that must notice it: they show that the tests can fail.

    python tests/mutations.py             every mutation, a few seconds each
    python tests/mutations.py --only 7    one, by number or by part of its description
    python tests/mutations.py --list

They guard mathematics and contracts. The code that one changes is found as syntax, by the name of its function: neither
its layout nor its file matters. Each is applied to a copy of the package in a temporary folder, where only the named
test is run. Before that, all named tests must pass on the unchanged copy. The exit status is 1 if a mutation survives,
if its code is not there exactly once, or if its test cannot be run.
"""

# ruff: noqa: T201 (a script that reports on standard output)

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300
ENDED = 100  # tells an exit status of pytest from that of a process that died of something else


@dataclass(frozen=True)
class Mutation:
    """One change of the code: what it breaks, where, and the test expected to notice.

    ``where`` is a function of the package (``Class.method`` for a method); ``old`` is an expression or a statement that
    stands in it once. The test is named by its file and function; the folder is found, since no two files of tests have
    one name.
    """

    what: str
    where: str
    old: str
    new: str
    test: str


def named(test: str, folder: Path) -> str:
    """The test as pytest takes it, its file found in ``folder``."""
    file, separator, function = test.partition("::")
    (path,) = folder.rglob(file)
    return f"{path}{separator}{function}"


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Functions of a module and methods of its classes, by name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node


def mutants(mutation: Mutation, package: Path) -> list[tuple[Path, str]]:
    """The changed text of a file, for each place where the old code stands: one, if the mutation is up to date."""
    (old,) = ast.parse(mutation.old).body
    wanted = ast.dump(old.value if isinstance(old, ast.Expr) else old)
    return [
        (path, replaced(path.read_text(encoding="utf-8"), node, mutation.new))
        for path in sorted(package.rglob("*.py"))
        for name, scope in functions(ast.parse(path.read_text(encoding="utf-8")))
        if name == mutation.where
        for node in ast.walk(scope)
        if isinstance(node, (ast.expr, ast.stmt)) and ast.dump(node) == wanted
    ]


def replaced(text: str, node: ast.expr | ast.stmt, new: str) -> str:
    """Put other code in the place of a node; the columns of syntax count bytes."""
    lines = text.encode().splitlines(keepends=True)
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    last = node.end_lineno or node.lineno
    after = lines[last - 1][node.end_col_offset :] + b"".join(lines[last:])
    code = f"({new})" if isinstance(node, ast.expr) else new
    return (before + code.encode() + after).decode()


def step_of(case: str) -> str:
    """The comparison with the plain reference, for one row of its table."""
    return f"test_directions.py::test_four_steps_equal_the_reference[{case}]"


MUTATIONS = [
    Mutation(
        "cutoff exclusive",
        "multiplier",
        "squared <= cutoff",
        "squared < cutoff",
        "test_barrier.py::test_cutoff_is_inclusive_and_a_step",
    ),
    Mutation(
        "multiplier may be negative",
        "multiplier",
        "torch.relu(barrier(products) - products.total)",
        "barrier(products) - products.total",
        "test_identities.py::test_an_inactive_barrier_leaves_grad_f_alone",
    ),
    Mutation(
        "constraint of the wrong sense",
        "multiplier",
        "barrier(products) - products.total",
        "barrier(products) + products.total",
        "test_identities.py::test_an_active_barrier_meets_its_constraint_with_equality",
    ),
    Mutation(
        "Value without its clamp",
        "Value.__call__",
        "products.value.clamp(min=0.0)",
        "products.value",
        "test_barrier.py::test_value_never_asks_for_an_increase_of_q",
    ),
    Mutation(
        "Aligned without its alignment",
        "Aligned.__call__",
        "self.delta * products.squared_norm + products.upper",
        "self.delta * products.squared_norm",
        "test_barrier.py::test_equation_10_gives_equation_11",
    ),
    Mutation(
        "sign of Q",
        "DynamicBarrier.terms",
        "near.value.to(wide) - ahead.value.to(wide)",
        "ahead.value.to(wide) - near.value.to(wide)",
        step_of("barrier value"),
    ),
    Mutation(
        "sign of grad_alpha q",
        "DynamicBarrier.terms",
        "near.upper - ahead.upper",
        "ahead.upper - near.upper",
        "test_identities.py::test_grad_alpha_q_is_the_corrector_pulled_by_the_change_of_log_probabilities",
    ),
    Mutation(
        "unrolled: nothing through the steps in alpha",
        "DynamicBarrier.terms",
        "q_upper - through[0]",
        "q_upper",
        step_of("unrolled"),
    ),
    Mutation(
        "norm over the lower level alone",
        "DynamicBarrier._answer",
        "_on(f, q_q_upper) + _on(f, q_q_lower)",
        "_on(f, q_q_lower)",
        step_of("ebomlc"),
    ),
    Mutation(
        "no damping",
        "DynamicBarrier._answer",
        "self.damping * multiplier(self.barrier, products, **numbers)",
        "multiplier(self.barrier, products, **numbers)",
        "test_identities.py::test_damping_violates_the_constraint_by_what_it_takes_away",
    ),
    Mutation(
        "the first group's rate for all groups",
        "current_rates",
        'group["lr"]',
        'level.groups()[0]["lr"]',
        step_of("bome"),
    ),
    Mutation(
        "preview without momentum",
        "_momentum_sgd",
        "momentum * held",
        "0 * held",
        step_of("preview of momentum"),
    ),
    Mutation(
        "preview of Adam starts its count anew",
        "_adam",
        'state["step"]',
        'state["step"] * 0',
        step_of("preview of adam"),
    ),
    Mutation(
        "preview of AMSGrad forgets the maximum",
        "_adam",
        "v if held is None else torch.maximum(held, v)",
        "v",
        step_of("preview of amsgrad"),
    ),
    Mutation(
        "derivative of the root at zero",
        "_adam",
        "torch.where(seen, torch.where(seen, v, 1.0).sqrt(), 0.0)",
        "v.sqrt()",
        "test_descent.py::test_adam_at_a_gradient_of_zero",
    ),
    Mutation(
        "the walk back loses the curvature",
        "adjoint",
        "bars.point + hessian",
        "bars.point",
        step_of("unrolled"),
    ),
    Mutation(
        "the walk back loses the direct part",
        "adjoint",
        "bars.point + hessian",
        "hessian",
        step_of("unrolled"),
    ),
    Mutation(
        "the walk back loses the optimizer's state",
        "transposed",
        "new_state[i][name] = bar",
        "pass",
        step_of("unrolled preview of momentum"),
    ),
    Mutation(
        "the walk back uses one batch",
        "adjoint",
        "hessian_product(oracle, gradient_bar, batch=step.batch, at=step.point, product=product)",
        "hessian_product(oracle, gradient_bar, batch=0, at=step.point, product=product)",
        step_of("two steps, two batches, unrolled"),
    ),
    Mutation(
        "random state is not replayed",
        "Replay.evaluation",
        "first_random.restore()",
        "None",
        "test_replay.py::test_dropout_cancels_in_q",
    ),
    Mutation(
        "look-ahead evaluations move buffers",
        "Replay.evaluation",
        "self._buffers.restore(standing)",
        "None",
        "test_replay.py::test_buffers_move_once_a_step_by_the_lower_loss",
    ),
    Mutation(
        "held tensors are not replayed",
        "Held.visit",
        "self.values[self.cursor - 1].clone()",
        "tensor.detach()",
        "test_identities.py::test_grad_alpha_q_is_the_corrector_pulled_by_the_change_of_log_probabilities",
    ),
    Mutation(
        "captured tensors are not noticed",
        "stale_variables",
        "stale or node._sequence_nr() < since",
        "False",
        "test_evaluator.py::test_a_captured_value_of_a_lower_variable_is_refused",
    ),
    Mutation(
        "products accumulated in float32",
        "accumulation_dtype",
        'torch.float32 if device.type == "mps" else torch.float64',
        "torch.float32",
        "test_vectors.py::test_products_of_float32_do_not_overflow_or_underflow",
    ),
    Mutation(
        "an exchange that copies one way",
        "exchange",
        "torch._foreach_copy_(right, kept)",
        "None",
        "test_vectors.py::test_exchange_is_an_involution_bit_for_bit",
    ),
    Mutation(
        "one iteration too few",
        "ConjugateGradient.solve",
        "range(self.iterations)",
        "range(self.iterations - 1)",
        "test_linear.py::test_conjugate_gradients_minimise_over_the_krylov_space",
    ),
    Mutation(
        "damping left out",
        "_damped",
        "product if damping == 0 else lambda v: add_scaled(product(v), damping, v)",
        "product",
        "test_implicit.py::test_the_closed_form_of_a_quadratic",
    ),
    Mutation(
        "Implicit: sign of the part through w",
        "Implicit.compute",
        "f.upper - through",
        "f.upper + through",
        "test_implicit.py::test_ridge_regression_entry_by_entry",
    ),
    Mutation(
        "EMLC: one rate for all groups",
        "EMLC._weighted",
        "zip(g, rates, discounts, strict=True)",
        "zip(g, rates[:1] * len(rates), discounts, strict=True)",
        "test_emlc.py::test_equation_11_on_a_network",
    ),
    Mutation(
        "EMLC: blocks paired in the wrong order",
        "EMLC.compute",
        "reversed(range(self.inner_steps))",
        "range(self.inner_steps)",
        "test_emlc.py::test_each_block_is_paired_with_its_own_step",
    ),
    Mutation(
        "MLC: gamma from half of its projection",
        "MLC._estimate",
        "(self._free(w, step, f.lower) + minus_s_g1).dot(here.lower)",
        "self._free(w, step, f.lower).dot(here.lower)",
        "test_mlc.py::test_several_upper_updates_call_by_call",
    ),
    Mutation(
        "MLC: the estimate is kept after it was used",
        "MLC._estimate",
        "{} if due else m",
        "m",
        "test_mlc.py::test_several_upper_updates_call_by_call",
    ),
    Mutation(
        "FiniteDifference: F at the current point",
        "FiniteDifference.compute",
        "oracle.upper(ahead)",
        "oracle.upper()",
        "test_first_order.py::test_darts",
    ),
    Mutation(
        "SAMA: nothing of the first moment",
        "_adam_slope",
        "beta1 * (1 - beta2) * g",
        "0",
        "test_first_order.py::test_sama",
    ),
    Mutation(
        "Unrolled: one starting value counts what another was computed from",
        "start_of",
        "x + 0",
        "x",
        "test_unrolled.py::test_maml_on_a_network",
    ),
    Mutation(
        "stale directions are applied",
        "BilevelOptimizer.apply",
        "directions.state and self._state.is_stale(directions.mark)",
        "False",
        "test_method_state.py::test_directions_whose_state_has_moved_are_refused",
    ),
    Mutation(
        "what moved is not taken back",
        "Moves.undo",
        "copy.restore()",
        "None",
        "test_rollback.py::test_a_hook_that_raises_takes_the_whole_step_back",
    ),
    Mutation(
        "a saved state goes on with the optimizer",
        "saved",
        "deepcopy(parts.lower.optimizer.state_dict())",
        "parts.lower.optimizer.state_dict()",
        "test_contract.py::test_later_steps_do_not_change_a_saved_state",
    ),
    Mutation(
        "the check loses gradients",
        "float64",
        "tensor.grad = grad",
        "pass",
        "test_checking.py::test_everything_is_restored_bit_for_bit",
    ),
    Mutation(
        "a kink excuses a wrong backward",
        "Slope._explained",
        "wrong = wrong or agrees is False",
        "pass",
        "test_verdicts.py::test_a_wrong_backward_fails_also_next_to_kinks",
    ),
]


def run_pytest(folder: Path, tests: list[str], output: Path) -> None:
    """Run tests in ``folder``, in a process of its own, and end it with ``ENDED`` plus pytest's exit status."""
    import torch  # here, because the parent has no need of it

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # two changes of one file within a second would share its byte code
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with output.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    options = ["-x", "-q", "-n0", "-m", "", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-W", "error"]
    status = int(pytest.main([*options, *(named(test, folder / "tests") for test in tests)]))
    if "bilevel" in sys.modules and Path(sys.modules["bilevel"].__file__ or "").parent.parent == folder:
        sys.exit(ENDED + status)


class Workshop:
    """A copy of what the tests need, in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output.txt"
        ignore = shutil.ignore_patterns("__pycache__", "examples")
        for name in ("bilevel", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)
        # Processes that start with torch imported, and with the compiler, which every torch optimizer loads:
        # importing them anew takes longer than most of the tests.
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self._processes: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._processes.set_forkserver_preload(["torch", "torch._dynamo", "torch.autograd.forward_ad", "numpy"])

    def run(self, tests: Iterable[str]) -> int:
        """Run tests on the copy; return pytest's exit status, or -1 if it did not come to one."""
        process = self._processes.Process(target=run_pytest, args=(self.folder, list(tests), self.output))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        return max(-1, process.exitcode - ENDED)

    def verdict(self, mutation: Mutation) -> str:
        """Apply one mutation, run its test, undo it; return ``killed`` or what went wrong."""
        found = mutants(mutation, self.folder / "bilevel")
        if len(found) != 1:
            return f"OUT OF DATE: its code is there {len(found)} times"
        ((path, changed),) = found
        source = path.read_text(encoding="utf-8")
        path.write_text(changed, encoding="utf-8")
        try:
            status = self.run([mutation.test])
        finally:
            path.write_text(source, encoding="utf-8")
        # 1: tests ran and failed. Anything else, a test that cannot be collected for one, shows nothing.
        return {1: "killed", 0: "SURVIVED"}.get(status, f"NOT RUN: pytest ended with {status}")


def chosen(only: str | None) -> list[tuple[int, Mutation]]:
    """The numbered mutations, or those that ``only`` names by number or by a part of their description."""
    numbered = list(enumerate(MUTATIONS, start=1))
    if only is None:
        return numbered
    if only.isdigit():
        return [(n, m) for n, m in numbered if n == int(only)]
    return [(n, m) for n, m in numbered if only in m.what]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Mutate the library and see that the named tests notice.")
    parser.add_argument("--only", metavar="N", help="a number, or a part of a description")
    parser.add_argument("--list", action="store_true", help="list the mutations and their tests")
    options = parser.parse_args(arguments)
    selected = chosen(options.only)
    if options.list:
        for n, mutation in selected:
            print(f"{n:3} {mutation.what}\n      {mutation.where}: {mutation.test}")
        return 0
    if not selected:
        print(f"no mutation is called {options.only}")
        return 1
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        workshop = Workshop(Path(folder).resolve())
        if workshop.run(dict.fromkeys(m.test for _, m in selected)):
            print(workshop.output.read_text())
            print("the named tests do not pass on the unchanged code; nothing was mutated")
            return 1
        failures = 0
        for n, mutation in selected:
            verdict = workshop.verdict(mutation)
            failures += verdict != "killed"
            print(f"{n:3} {verdict:9} {mutation.what}", flush=True)
    print(f"{len(selected) - failures} of {len(selected)} killed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
