"""Settings of every test, and the pages whose examples are tests."""

import pytest
import torch

from pages import PAGES

# The networks of the tests are tiny: a second thread waits more than it computes, and its sums have another order.
torch.set_num_threads(1)

pytest_collect_file = PAGES.pytest()
collect_ignore_glob = ["docs/*.py"]  # programs: Sphinx's settings, and what draws a picture


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers whichever tests ran before it, and on whichever process."""
    torch.manual_seed(0)
