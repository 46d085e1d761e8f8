"""The table as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from statistics import mean
from typing import Any

from examples.noisy_labels.report.statistics import QUANTITIES, Entry

Rows = list[list[str]]  # the first one is the head
MISSING = "–"
LATEX = {"\\": r"\textbackslash{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "–": "--"}


def markdown(entries: Sequence[Entry], about: str, reference: str) -> str:
    """Return one table a quantity, then the differences to the reference."""
    parts = [about]
    for title, rows in _tables(entries, reference):
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + " --- |" * len(rows[0]))
        parts.append(f"**{title}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def latex(entries: Sequence[Entry], about: str, reference: str) -> str:
    """Return the same as LaTeX, for the package booktabs."""
    parts = [f"% {line}" for line in about.splitlines()]
    for title, (head, *rows) in _tables(entries, reference):
        lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (head, *rows)]
        columns = "l" + "r" * (len(head) - 1)
        body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        parts += [
            r"\begin{table}",
            rf"\caption{{{_escaped(title)}}}",
            r"\centering",
            rf"\begin{{tabular}}{{{columns}}}",
            *body,
            r"\end{tabular}",
            r"\end{table}",
        ]
    return "\n".join(parts) + "\n"


def table_csv(entries: Iterable[Entry]) -> str:
    """Return one row for each quantity, column and method."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Entry)])
    writer.writeheader()
    writer.writerows(asdict(entry) | {"seeds": " ".join(map(str, entry.seeds))} for entry in entries)
    return text.getvalue()


def table_json(entries: Iterable[Entry], facts: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return everything: what was measured where, each run, and each entry."""
    content = {**facts, "runs": runs, "entries": [asdict(entry) for entry in entries]}
    return json.dumps(content, indent=1) + "\n"


def _tables(entries: Sequence[Entry], reference: str) -> Iterable[tuple[str, Rows]]:
    for quantity in QUANTITIES:
        chosen = [entry for entry in entries if entry.quantity == quantity.name]
        better = "larger" if quantity.larger_is_better else "smaller"
        title = f"{quantity.title}, % (rank; {better} is better)"
        if any(entry.published is not None for entry in chosen):
            title += "; in brackets what is published for ResNet-32 after 120 epochs"
        yield title, _grid(chosen, _value, averages=True, reference=reference)
    for quantity in QUANTITIES[:3]:
        chosen = [one for one in entries if one.quantity == quantity.name and one.method != reference]
        title = f"{quantity.title}: difference to {reference}, % [95 % interval], p after Holm"
        if any(entry.difference is not None for entry in chosen):
            yield title, _grid(chosen, _difference, averages=False, reference=reference)


def _grid(entries: Sequence[Entry], words: Callable[[Entry], str], *, averages: bool, reference: str) -> Rows:
    columns = list(dict.fromkeys(entry.column for entry in entries))
    methods = list(dict.fromkeys(entry.method for entry in entries))
    by_place = {(entry.method, entry.column): entry for entry in entries}
    rows = [["method", *columns] + (["mean rank", f"time, {reference} = 1"] if averages else [])]
    for method in methods:
        own = [by_place[method, column] for column in columns if (method, column) in by_place]
        cells = [words(by_place[method, column]) if (method, column) in by_place else MISSING for column in columns]
        if averages:
            ranks = [entry.rank for entry in own if entry.rank is not None]
            times = [entry.time for entry in own if entry.time is not None]
            complete = len(ranks) == len(columns)  # ranks of other columns are not comparable
            cells.append(f"{mean(ranks):.1f}" if complete else MISSING)
            cells.append(f"{mean(times):.2f}" if times else MISSING)
        rows.append([method, *cells])
    return rows


def _value(entry: Entry) -> str:
    if entry.mean is None or entry.rank is None:
        text = MISSING
    else:
        spread = "" if entry.deviation is None else f" ± {entry.deviation:.1f}"
        text = f"{entry.mean:.1f}{spread} ({entry.rank:g})"
    return text if entry.published is None else f"{text} [{entry.published:.2f}]"


def _difference(entry: Entry) -> str:
    if entry.difference is None:
        return MISSING
    if entry.p_holm is None:
        return f"{entry.difference:+.1f}"
    return f"{entry.difference:+.1f} [{entry.low:+.1f}, {entry.high:+.1f}], p {entry.p_holm:.2g}"


def _escaped(text: str) -> str:
    return "".join(LATEX.get(one, one) for one in text)
