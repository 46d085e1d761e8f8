"""Which method solves which problem: every class of the library, and ``auto``, at equal budgets on the suite.

    python -m benchmarks.which_method                          # what is not there yet; about half an hour of one core
    python -m benchmarks.which_method --methods auto BOME --problems mirrlees-1999
    python -m benchmarks.which_method --write                  # the table and the figure from what is there
    python -m benchmarks.which_method --smoke                  # seconds, to see that it runs

Each run is ``bilevel.minimize(method=...)`` with its defaults: step sizes by the one rule of its docstring, every call
of a loss counted, restarts and training y again included. A problem is solved if the final pair is within 1e-2 of the
best upper value and of the lower minimum, both as ``bilevel.problems`` knows them. No clock is read.
Results are appended one by one, so that a run may be stopped and taken up again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import bilevel
from bilevel import problems

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
# MLC, EMLC and SAMA are for label correction and large models; MEHA to BSG1 round off the family; SABA needs batches.
METHODS = [
    *("auto", "BOME", "EBOMLC", "VPBGD", "F2SA", "BVFSM", "PDBO", "GPBGD", "MEHA", "BSG1"),
    *("Implicit", "Unrolled", "FiniteDifference", "SOBA", "MASOBA", "EMLC", "MLC", "SAMA"),
]
# What a row of the table by difficulty counts: problems with this tag.
DIFFICULTIES = (
    "strongly-convex",
    "convex",
    "nonconvex",
    "several-minima",
    "many-minima",
    "jump",
    "active-bounds",
    "kink",
)
Run = dict[str, Any]


def run(method: str, name: str, evaluations: int) -> Run:
    """One method on one problem."""
    problem = problems.named(name)
    try:
        result = bilevel.minimize(
            problem.upper_loss,
            problem.lower_loss,
            problem.upper,
            problem.lower,
            method,
            evaluations=evaluations,
            upper_bounds=problem.upper_bounds,
            lower_bounds=problem.lower_bounds,
        )
    except (ArithmeticError, RuntimeError, NotImplementedError) as failure:
        failed = f"{type(failure).__name__}: {failure}"[:200]
        return {"method": method, "problem": name, "budget": evaluations, "solved": False, "failed": failed}
    upper, lower = problem.errors()
    solved = max(upper, lower) <= problem.tolerance
    return {
        "method": method,
        "problem": name,
        "budget": evaluations,
        "solved": solved,
        "upper error": float(f"{upper:.3g}"),
        "lower error": float(f"{lower:.3g}"),
        "evaluations": result.evaluations,
        "solved after": _solved_after(problem, result) if solved else None,
        "rates": next((r.partition(": ")[2] for r in result.reasons if r.startswith("Step sizes")), None),
    }


def _solved_after(problem: problems.Problem, result: bilevel.solver.Result) -> int:
    """The number of calls after which the best pair stayed as good as the final one is."""
    assert problem.best is not None
    scale = max(1.0, abs(problem.best))
    after = result.history[-1].evaluations
    for record in reversed(result.history):
        if abs(record.upper_value - problem.best) > problem.tolerance * scale:
            break
        after = record.evaluations
    return after


def table(runs: Sequence[Run]) -> str:
    """Markdown: how many each method solves, of all and by difficulty; then problem by problem."""
    methods = [m for m in METHODS if any(r["method"] == m for r in runs)]
    by = {(r["method"], r["problem"]): r for r in runs}
    # Only what every method was run on can be compared.
    names = [n for n in problems.names() if all((m, n) in by for m in methods)]
    tags = {n: problems.named(n).tags for n in names}
    groups = {"all": names, **{tag: [n for n in names if tag in tags[n]] for tag in DIFFICULTIES}}
    groups = {tag: members for tag, members in groups.items() if members}

    lines = ["| method | " + " | ".join(f"{tag} ({len(members)})" for tag, members in groups.items()) + " |"]
    lines.append("| --- |" + " ---: |" * len(groups))
    rows = [(m, lambda n, m=m: by[m, n]["solved"]) for m in methods]
    classes = [m for m in methods if m != "auto"]
    rows.sort(key=lambda row: -sum(map(row[1], names)))
    rows.append(("*any class*", lambda n: any(by[m, n]["solved"] for m in classes)))
    rows.append(("*any, or auto*", lambda n: any(by[m, n]["solved"] for m in methods)))
    lines += [
        f"| {label} | " + " | ".join(str(sum(map(solves, members))) for members in groups.values()) + " |"
        for label, solves in rows
    ]
    lines += ["", "| problem | calls of auto | solved by |", "| --- | ---: | --- |"]
    for name in names:
        auto = by.get(("auto", name), {}).get("solved after")
        solvers = ", ".join(m for m in methods if m != "auto" and by[m, name]["solved"])
        lines.append(f"| {name} | {auto or 'not solved'} | {solvers or 'none'} |")
    return "\n".join(lines) + "\n"


def profile(runs: Sequence[Run], method: str, names: Sequence[str], budgets: Sequence[int]) -> list[float]:
    """The share of problems that a method has solved within each budget (Dolan and Moré's profile, over calls)."""
    after = [r["solved after"] for r in runs if r["method"] == method and r["problem"] in names and r["solved"]]
    return [sum(a <= budget for a in after) / len(names) for budget in budgets]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write the profiles as a figure; needs matplotlib."""
    from matplotlib.figure import Figure

    methods = [m for m in METHODS if any(r["method"] == m for r in runs)]
    names = [
        n for n in problems.names() if all(any(r["method"] == m and r["problem"] == n for r in runs) for m in methods)
    ]
    budgets = list(range(0, max(r["budget"] for r in runs) + 1, 25))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="calls of both losses", ylabel="share of problems solved", ylim=(0, 1))
    curves = {m: profile(runs, m, names, budgets) for m in methods}
    for index, (method, shares) in enumerate(sorted(curves.items(), key=lambda item: -item[1][-1])):
        style = "-" if index < 8 else "--"
        axes.step(budgets, shares, style, where="post", label=method, linewidth=2.2 if method == "auto" else 1.2)
    axes.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and write what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME")
    parser.add_argument("--problems", nargs="+", default=None, metavar="NAME", help="default: the whole suite")
    parser.add_argument("--evaluations", type=int, default=3000, help="calls of both losses in each run")
    parser.add_argument("--output", type=Path, default=RESULTS / "which_method.jsonl")
    parser.add_argument("--write", action="store_true", help="run nothing; write table and figure from what is there")
    parser.add_argument("--smoke", action="store_true", help="two methods, two problems, a small budget, no files")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.smoke:
        pairs = [(m, n) for n in ("henrion-surowiec-2011", "two-wells") for m in ("auto", "BOME")]
        print(table([run(m, n, 400) for m, n in pairs]))
        return 0
    runs: list[Run] = []
    if given.output.exists():
        runs = [json.loads(line) for line in given.output.read_text(encoding="utf-8").splitlines()]
    runs = [r for r in runs if r["budget"] == given.evaluations]
    if not given.write:
        there = {(r["method"], r["problem"]) for r in runs}
        every = problems.names()
        # Every fourth first: what is there after a while is a fair sample.
        names = given.problems or [n for part in range(4) for n in every[part::4]]
        for name in names:
            for method in given.methods:
                if (method, name) not in there:
                    runs.append(run(method, name, given.evaluations))
                    with given.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
                    print(f"{name}: {method} {'solved' if runs[-1]['solved'] else 'not solved'}", flush=True)
    text = table(runs)
    print(text)
    given.output.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(runs, given.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
