"""What tests of ranks share."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """One thread, as the ranks have: on shapes this small, threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
