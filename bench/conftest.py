"""Fixtures for the results files of the benchmarks."""

import importlib.util
import os
import types

import pytest


@pytest.fixture(scope="session")
def results():
    """Rows for bench/results/cpu.json; CNA_BENCH_SETTING names the instruction sets that this run is limited to."""
    from results import Results, cpu_environment

    environment = cpu_environment()
    whole = "AMX" if environment["isa"] == "amx" else "as it is"
    return Results("cpu", os.environ.get("CNA_BENCH_SETTING", whole), environment)


@pytest.fixture(scope="session")
def attribution():
    """Rows for attribution.json in bench/results/, or in CNA_BENCH_RESULTS."""
    from results import Results, cpu_environment

    return Results("attribution", os.environ.get("CNA_BENCH_DEVICE", "cpu"), cpu_environment())


@pytest.fixture(scope="session")
def evaluation():
    """Rows for bench/results/eval.json."""
    from results import Results, cpu_environment

    return Results("eval", "cpu", cpu_environment())


@pytest.fixture(scope="session")
def parallel():
    """Rows for bench/results/parallel.json: ranks of one thread each."""
    from results import Results, cpu_environment

    return Results("parallel", "cpu", cpu_environment() | {"threads": 1})


@pytest.fixture(scope="session")
def real():
    """Rows for bench/results/real.json."""
    from results import Results, cpu_environment

    return Results("real", "cpu", cpu_environment())


@pytest.fixture(scope="session")
def embedding():
    """Rows for embedding.json in bench/results/, or in CNA_BENCH_RESULTS."""
    from results import Results, cpu_environment

    return Results("embedding", os.environ.get("CNA_BENCH_DEVICE", "cpu"), cpu_environment())


@pytest.fixture(scope="session")
def host():
    """Rows for bench/results/host.json."""
    from results import Results, cpu_environment

    return Results("host", "cpu", cpu_environment())


if importlib.util.find_spec("pytest_benchmark") is None:  # a machine with a GPU where nothing is installed

    @pytest.fixture
    def benchmark():
        return types.SimpleNamespace(extra_info={}, pedantic=lambda run, **_: run())
