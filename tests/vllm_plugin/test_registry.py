"""Circuits by name: from files, from a directory that changes, and put there by a program."""

import os

import pytest

from cna_kernels import Circuit, InputError
from cna_kernels.vllm.registry import Registry

L, N = 2, 64


def circuit(*indices):
    return Circuit(tuple((0, index, 1.0) for index in indices), L, N)


@pytest.fixture(params=["files", "directory"])
def registry(request, tmp_path):
    folder = tmp_path / "circuits"
    folder.mkdir()
    circuit(1, 2).save(folder / "one.json")
    circuit(3).save(folder / "two.json")
    circuits = str(folder) if request.param == "directory" else {n: str(folder / f"{n}.json") for n in ("one", "two")}
    return Registry(circuits, L, N)


def test_circuits_come_change_and_go(registry):
    assert registry.names() == ["one", "two"] and registry.get("one").k == 2
    held = registry.get("one")
    registry.put("one", circuit(4, 5, 6))
    registry.put("three", circuit(7))
    assert registry.get("one").k == 3 and held.k == 2 and registry.names() == ["one", "three", "two"]
    registry.remove("one")
    assert registry.names() == ["three", "two"]
    for bad in ("one", "absent"):
        with pytest.raises(InputError, match=f"cna_circuit: no circuit '{bad}'; known are three, two"):
            registry.get(bad)
        with pytest.raises(InputError, match="no circuit"):
            registry.remove(bad)


@pytest.mark.parametrize("name", ["", "../one", "a/b", ".hidden", "a\n", "x" * 101, None, 3, "ä"])
def test_names_are_names_of_files(registry, name):
    with pytest.raises(InputError, match="cna_circuit: expected letters"):
        registry.put(name, circuit(1))


def test_circuits_of_another_shape_are_refused(registry, tmp_path):
    with pytest.raises(InputError, match="new: n_neurons: made for another model: expected 64, got 65"):
        registry.put("new", Circuit(((0, 1, 1.0),), L, 65))
    with pytest.raises(InputError, match="new: neurons: expected at least one"):
        registry.put("new", Circuit((), L, N))
    Circuit(((0, 1, 1.0),), L + 1, N).save(tmp_path / "deep.json")
    with pytest.raises(InputError, match=r"deep\.json: n_layers: made for another model"):
        Registry({"deep": str(tmp_path / "deep.json")}, L, N)
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(InputError, match=r"text\.json"):
        Registry({"text": str(tmp_path / "text.json")}, L, N)
    with pytest.raises(InputError, match="absent: is no directory of circuits"):
        Registry(str(tmp_path / "absent"), L, N)
    assert registry.names() == ["one", "two"]


def test_what_check_refuses_is_refused(tmp_path):
    def check(found, where):
        if found.k > 1:
            raise InputError(where, "of another model")

    circuit(1).save(tmp_path / "one.json")
    registry = Registry({"one": str(tmp_path / "one.json")}, L, N, check)
    with pytest.raises(InputError, match="big: of another model"):
        registry.put("big", circuit(1, 2))
    circuit(1, 2).save(tmp_path / "one.json")
    with pytest.raises(InputError, match=r"one\.json: of another model"):
        Registry({"one": str(tmp_path / "one.json")}, L, N, check)


def test_a_directory_is_read_again_when_its_files_change(tmp_path):
    circuit(1).save(tmp_path / "one.json")
    registry, other = (Registry(str(tmp_path), L, N) for _ in range(2))
    assert registry.get("one") is registry.get("one"), "read once"
    circuit(1, 2).save(tmp_path / "one.json")
    circuit(9).save(tmp_path / "new.json")
    assert registry.get("one").k == 2 and registry.get("new").pairs == [(0, 9)]
    registry.put("put", circuit(5))
    assert other.names() == ["new", "one", "put"] and other.get("put").pairs == [(0, 5)], "another process sees it"
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(InputError, match=r"one\.json"):
        registry.get("one")
    (tmp_path / ".hidden.json").write_text("{}")
    assert ".hidden" not in registry.names()


def test_links_do_not_lead_out_of_the_directory(tmp_path):
    folder = tmp_path / "circuits"
    folder.mkdir()
    circuit(1).save(tmp_path / "outside.json")
    circuit(2).save(folder / "inside.json")
    registry = Registry(str(folder), L, N)
    os.symlink(tmp_path / "outside.json", folder / "link.json")
    os.symlink(folder / "inside.json", folder / "near.json")
    with pytest.raises(InputError, match="leads out of the directory"):
        registry.get("link")
    assert registry.get("near").pairs == [(0, 2)]
