"""The model of communication counts what the library sends, and its times are those of the formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.communication import (
    Job,
    Network,
    bome,
    main,
    message_time,
    reduction_time,
    simulate,
    unrolled,
)
from group_of import GroupOf
from joined_batches import Shared, part
from methods_table import CASES

NETWORK = Network("test", 1e-5, 1e9)


def sent(name: str, options: dict[str, int]) -> tuple[int, int, int, int]:
    """Reductions and bytes of a step that is no look, and the elements of both levels."""
    shared = Shared()
    optimizer = shared.optimizer(CASES[name], dist.group.WORLD, verify="never", **options)
    batches = [part(b) for b in shared.batches(1)]
    for _ in range(2):
        optimizer.step(*batches)
    before = optimizer.processes.traffic.reductions, optimizer.processes.traffic.bytes
    optimizer.step(*batches)
    after = optimizer.processes.traffic
    sizes = (sum(p.numel() for p in module.parameters()) for module in (shared.lower, shared.upper))
    return after.reductions - before[0], after.bytes - before[1], *sizes


def test_the_model_counts_what_is_sent(two: GroupOf) -> None:
    """In float64 here, in float32 in the model."""
    for reductions, given, lower, upper in two(sent, "bome", {}):
        assert reductions == 3
        assert given == 2 * sum(bome(lower, upper))
    for reductions, given, lower, upper in two(sent, "unrolled-graph", {"inner_steps": 3}):
        assert reductions == 8
        assert given == 2 * sum(unrolled(lower, upper, 3))
    # As docs/processes.md says; each evaluation beside it sends its value.
    for _, given, lower, upper in two(sent, "bome-3", {}):
        assert given == 8 * (4 * lower + 3 * upper + 5)
    for _, given, lower, upper in two(sent, "unrolled-reverse", {"inner_steps": 3}):
        assert given == 8 * (7 * lower + 4 * upper + 5)
    for _, given, lower, upper in two(sent, "emlc", {"product": "reverse", "inner_steps": 2}):
        assert given == 8 * (3 * lower + 3 * upper + 3)
    for _, given, lower, upper in two(sent, "implicit", {}):
        assert given == 8 * (4 * lower + 2 * upper + 2)


def test_times_are_those_of_a_ring_and_a_tree() -> None:
    # A ring of 4 with 4 MB: 6 passes of 1 MB at 1 GB/s, 1.01 ms each; a tree of 8 with 8 bytes: 6 hops of 10 us.
    assert reduction_time(4e6, 4, NETWORK) == pytest.approx(6 * 1.01e-3)
    assert message_time(8, NETWORK) == pytest.approx(6e-5)
    assert reduction_time(8, 1024, NETWORK) == pytest.approx(20 * 1e-5, rel=1e-3)


def test_without_spread_nobody_waits_and_with_it_many_do() -> None:
    exact = simulate(Job("one", (1000,), 0.1, spread=0.0), 8, NETWORK)
    assert exact.waiting == pytest.approx(0.0)
    assert exact.computing + exact.sending == pytest.approx(0.1 + 5 * message_time(8, NETWORK) + 6 * (1e-5 + 1e-6))
    few, many = (simulate(Job("one", (1000,), 0.1), n, NETWORK) for n in (2, 256))
    # The mean of the largest of n normal numbers: 0.564 deviations for 2, 2.8 for 256.
    assert few.waiting == pytest.approx(0.564 * 0.003, rel=0.6)
    assert many.waiting == pytest.approx(2.8 * 0.003, rel=0.2)


@pytest.mark.environment
def test_the_program_runs(tmp_path: Path) -> None:
    assert main(["--smoke", "--output", str(tmp_path / "report.txt")]) == 0
    assert "3 reductions of 1,093,804 bytes and 7 messages" in (tmp_path / "report.txt").read_text()
