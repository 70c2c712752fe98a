"""What MODEL may be: a path, the demonstration's names, a name on the Hub."""

from pathlib import Path

import pytest

from cna_kernels.errors import InputError
from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.hub import find
from cna_kernels.model.hub.names import HubName


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What is asked of the Hub, which has everything."""
    names = []
    place = tmp_path / "models--org--name" / "snapshots" / ("ab" * 20)
    place.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for function in ("fetch_model", "fetch_circuit"):
        monkeypatch.setattr(find, function, lambda name: names.append(name) or place)
    return names


def test_a_name_is_fetched_and_a_path_is_not(asked, tmp_path):
    found = find.find_model("org/name@v1")
    assert asked == [HubName("org/name", None, "v1")]
    assert (found.name, found.short) == ("org/name", "name")
    assert found.origin == f", commit {'ab' * 20}, asked for as 'org/name@v1'"
    Path("org/name").mkdir(parents=True)
    for path in ("org/name", "./org/other", tmp_path, Path("org/other"), "nothing"):
        found = find.find_model(path)
        assert found.path == Path(path) and found.origin == ""
    assert len(asked) == 1


def test_the_demonstration(asked):
    assert find.find_model("demo:base").path == Path(demo_checkpoint("base"))
    Path("demo:base").mkdir()
    assert find.find_model("demo:base").path == Path("demo:base") and not asked


def test_circuits(asked):
    assert find.circuit_path("c.json") == Path("c.json") and find.circuit_path("org/name") == Path("org/name")
    find.circuit_path("org/name:c.json@v2")
    assert asked == [HubName("org/name", "c.json", "v2")]


def test_load_takes_names(asked):
    with pytest.raises(InputError, match="config"):  # of the empty snapshot
        load("org/name")
    assert asked == [HubName("org/name")]
