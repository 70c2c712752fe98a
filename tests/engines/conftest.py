"""`make test-engines` alone runs these: they need an environment of their own, with vLLM and llama.cpp."""

import os
from pathlib import Path

import pytest

collect_ignore_glob = [] if os.environ.get("CNA_ENGINES") else ["test_*.py"]


@pytest.fixture(scope="session")
def work():
    """The directory of the model, the circuits and the reference, which ``cases.py`` has written."""
    return Path(os.environ["CNA_ENGINES"])
