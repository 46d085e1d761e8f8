"""Two and four processes, started once for all tests that need them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from group_of import GroupOf


@pytest.fixture(scope="session")
def two() -> Iterator[GroupOf]:
    group = GroupOf(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def four() -> Iterator[GroupOf]:
    group = GroupOf(4)
    yield group
    group.close()
