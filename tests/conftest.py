"""Shared fixtures: tiny random checkpoints written by transformers, and fresh memory that is never zero."""

import os
from importlib.metadata import version

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before any kernel is defined: without a GPU kernels are interpreted

from cna_kernels import plans
from tiny import VARIANTS, write_checkpoint

# The files that take longest, the longest first. They start first, because workers get whole files (--dist loadfile).
FIRST = (
    "test_triton", "test_documents", "test_attach_parity", "test_bundled", "test_wheel", "test_engine",
    "test_run_directory", "test_repeat", "test_process", "test_reproduce", "test_examples", "test_public_api",
    "test_csrc", "test_smollm2", "test_story", "test_evaluate", "test_discovery_memory", "test_tensor_parallel",
    "test_cpu", "test_evaluation_command", "test_lm_eval_model", "test_gpu_harness", "test_streamed", "test_prompt",
    "test_engine_company", "test_packing",
)  # fmt: skip


def why_not_interpreted():
    """Why Triton's interpreter cannot run the kernels here, or None. None also where a GPU runs the kernels."""
    triton, numpy = version("triton"), version("numpy")
    if torch.cuda.is_available() or release(triton) >= (3, 7) or release(numpy) < (2, 4):
        return None
    # Before 3.7, `range` to a runtime value makes an int of an array of one element, an error since numpy 2.4.
    return f"Triton {triton}'s interpreter fails with numpy {numpy}: it needs Triton 3.7 or a numpy before 2.4"


def release(text):
    return tuple(int(part) for part in text.split(".")[:2])


def pytest_collection_modifyitems(items):
    interpreted = [item for item in items if item.get_closest_marker("interpreted")]
    if interpreted and (reason := why_not_interpreted()):
        for item in interpreted:
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Hashes of files that tests write are not left in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _models_on_the_cpu():
    """Where there is a GPU, too, a model goes to the CPU unless the test says otherwise: its inputs lie there."""
    if torch.cuda.is_available():
        from cna_kernels.model import memory

        memory.default_device = lambda: "cpu"


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch.empty is filled with NaN, so that an element that no kernel wrote fails a test."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _nothing_decided():
    """Forget the plans that an earlier test's environment decided. A test that changes the environment after its start
    calls ``plans.forget`` itself.

    ``plans.use`` writes to the environment; afterwards this fixture restores CNA_PLAN.
    """
    before = os.environ.get("CNA_PLAN")
    plans.forget()
    yield
    os.environ.pop("CNA_PLAN", None)
    if before is not None:
        os.environ["CNA_PLAN"] = before
    plans.forget()


@pytest.fixture(scope="session", params=sorted(VARIANTS))
def tiny_checkpoint(request, tmp_path_factory):
    """(directory, transformers model) of every supported family and variant, fp32."""
    directory = tmp_path_factory.mktemp(request.param)
    return directory, write_checkpoint(request.param, directory)
