"""Settings of every test, and the pages whose examples are tests."""

import os

import pytest
import torch

from pages import PAGES

# The networks of the tests are tiny: a second thread waits more than it computes. Unless one is asked for, as
# tests/variations.py does, because sums over several threads have another order.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

pytest_collect_file = PAGES.pytest()
collect_ignore_glob = ["docs/*.py", "docs/_extensions/*.py"]  # programs: what Sphinx loads, and what draws a picture


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers whichever tests ran before it, and on whichever process."""
    torch.manual_seed(0)
