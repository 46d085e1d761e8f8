"""What ``check_directions`` returns: one line for each number that was compared."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap


@dataclass(frozen=True)
class Comparison:
    """One line of a report: the number as the method computed it, as it should be, and their relative difference.

    Attributes:
        name: What it is.
        computed: The number; of a vector, its length along the expected one.
        expected: What it should be; of a vector, its length.
        error: Relative difference; of a vector, of the whole of it.
        passed: The verdict, or None where there is none.
        note: Why it differs, or why there is no verdict.
        measured: Whether it is a distance that is only told, and no verdict was to be expected.

    Example:
        >>> from bilevel.checks.report import Comparison
        >>> Comparison("Q", 1.0, 1.0, 0.0, True).note
        ''
    """

    name: str
    computed: float
    expected: float
    error: float
    passed: bool | None
    note: str = ""
    measured: bool = False


@dataclass(frozen=True)
class Report:
    """The result of :func:`check_directions`; ``str(report)`` is a table.

    Attributes:
        method: Name of the class that was checked.
        comparisons: One line for each number that was compared.

    Example:
        >>> from bilevel.checks.report import Comparison, Report
        >>> Report("BOME", (Comparison("Q", 1.0, 1.0, 0.0, True),)).passed
        True
    """

    method: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """False only on a real disagreement; a line without a verdict fails nothing."""
        return all(line.passed is not False for line in self.comparisons)

    @property
    def verdict(self) -> str:
        """The report in a few words: ``FAILED``, ``all passed``, ``passed, n without a verdict`` or ``NO VERDICT``."""
        open_lines = [line for line in self.comparisons if line.passed is None and not line.measured]
        if not self.passed:
            return "FAILED"
        if not any(line.passed for line in self.comparisons):
            return "NO VERDICT"
        return f"passed, {len(open_lines)} without a verdict" if open_lines else "all passed"

    def __str__(self) -> str:
        width = max([len(line.name) for line in self.comparisons], default=4)
        rows = [f"{self.method}: {self.verdict}"]
        rows.append(f"  {'what':<{width}}  {'computed':>14}  {'expected':>14}  {'error':>9}")
        for line in self.comparisons:
            mark = {True: "", False: "  <-- differs", None: "  (no verdict)"}[line.passed]
            rows.append(
                f"  {line.name:<{width}}  {line.computed:>14.7e}  {line.expected:>14.7e}  {line.error:>9.1e}{mark}"
            )
        notes: dict[str, list[str]] = {}  # one reason is often that of several lines
        for line in self.comparisons:
            if line.note:
                notes.setdefault(line.note, []).append(line.name)
        for note, names in notes.items():
            rows += wrap(f"{'; '.join(names)}: {note}", 110, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(rows)


def worse(a: Comparison, b: Comparison) -> Comparison:
    """The line that a report shows of two probes: a failure before a pass, a pass before no verdict."""
    rank = {False: 2, True: 1, None: 0}
    if rank[a.passed] != rank[b.passed]:
        return max((a, b), key=lambda line: rank[line.passed])
    return b if b.error > a.error else a
