"""Fixtures of the CPU engine's tests."""

import pytest
from levels import EMULATED, LEVELS, make

from cna_kernels.cpu import library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The library with AMX's instructions emulated."""
    build = tmp_path_factory.mktemp("amx")
    make(f"BUILD={build}", "OPTIMIZE=-O1 -DCNA_AMX_EMULATED", str(build / "libcna.so"))
    return library.open_library(build / "libcna.so")


# The emulated library takes a minute to build, and is slow: all its tests are for `make test-all`.
@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.exhaustive if n == EMULATED else ()) for n in LEVELS])
def level(request, monkeypatch):
    """Run the test with the engine at this level."""
    monkeypatch.setenv("CNA_PLAN", "gated_mlp=csrc,down_proj=csrc,linear=csrc")
    if request.param == EMULATED:
        built = request.getfixturevalue("emulated")
        monkeypatch.setattr(library, "load", lambda: built)
    library.use_isa(request.param.removesuffix("-emulated"))
    assert library.isa() == request.param.removesuffix("-emulated")
    yield request.param
    library.use_isa(None)
