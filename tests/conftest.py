"""Shared fixtures: tiny random checkpoints written by transformers, and fresh memory that is never zero."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined: without a GPU they are interpreted

from cna_kernels import plans
from tiny import VARIANTS, write_checkpoint

# The files that take longest, so that they start first: workers get whole files (--dist loadfile), the last one alone.
FIRST = (
    "test_triton", "test_documents", "test_demo", "test_cpu", "test_engine", "test_packing", "test_run_directory",
    "test_evaluation_command", "test_gpu_harness",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch.empty is filled with NaN, so that an element nobody wrote fails a test."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _nothing_decided():
    """What an earlier test's environment decided is forgotten; a test that changes it later calls ``plans.forget``."""
    plans.forget()
    yield
    plans.forget()


@pytest.fixture(scope="session", params=sorted(VARIANTS))
def tiny_checkpoint(request, tmp_path_factory):
    """(directory, transformers model) of every supported family and variant, fp32."""
    directory = tmp_path_factory.mktemp(request.param)
    return directory, write_checkpoint(request.param, directory)
