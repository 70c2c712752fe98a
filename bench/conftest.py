"""The results files of the CPU benches."""

import os

import pytest


@pytest.fixture(scope="session")
def results():
    """Rows for bench/results/cpu.json; CNA_BENCH_SETTING names what this run is held to."""
    from results import Results, cpu_environment

    return Results("cpu", os.environ.get("CNA_BENCH_SETTING", "as it is"), cpu_environment())


@pytest.fixture(scope="session")
def attribution():
    """Rows for bench/results/attribution.json."""
    from results import Results, cpu_environment

    return Results("attribution", "as it is", cpu_environment())
