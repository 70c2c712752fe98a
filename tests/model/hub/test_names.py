"""Names on the Hub and paths: what is asked of the Hub, and what a place in its cache says of where it is from."""

from pathlib import Path

import pytest

from cna_kernels.model.hub.names import HubName, cached_name, checkpoint_name, hub_name

COMMIT = "0123abcd" * 5
NAMES = {
    "org/name": HubName("org/name"),
    "meta-llama/Llama-3.2-1B-Instruct": HubName("meta-llama/Llama-3.2-1B-Instruct"),
    "org/name@v1.0": HubName("org/name", None, "v1.0"),
    "org/name@refs/pr/3": HubName("org/name", None, "refs/pr/3"),
    f"org/name@{COMMIT}": HubName("org/name", None, COMMIT),
    "org/x-GGUF:x.Q4_0.gguf": HubName("org/x-GGUF", "x.Q4_0.gguf"),
    "org/x:sub/x.gguf@main": HubName("org/x", "sub/x.gguf", "main"),
    "org/x:Q4_K_M": HubName("org/x", "Q4_K_M"),
}
PATHS = ["name", "./org/name", "../name", "/org/name", "~/name", "org/", "/name", "a/b/c", "a/b/c@main", "a\\b", ""]
PATHS += [
    "C:/model",
    "org/model.gguf",
    "out/circuit.json",
    "org/name@",
    "org/name:",
    "org/na me",
    "org/.name",
    "demo:x",
]
PATHS += [Path("org/name"), "demo:x"]


@pytest.mark.parametrize("text", NAMES)
def test_names(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(text) == NAMES[text] and str(NAMES[text]) == text
    Path("org").mkdir()
    if "/" not in text[4:] and text.startswith("org/"):  # what exists is a path
        Path(text).mkdir()
        assert hub_name(text) is None


@pytest.mark.parametrize("text", PATHS, ids=str)
def test_paths(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(text) is None


def snapshot(root, folder="models--some-one--Model-1.5", commit=COMMIT):
    place = root / folder / "snapshots" / commit
    place.mkdir(parents=True)
    return place


def test_a_place_in_the_cache_says_where_it_is_from(tmp_path, monkeypatch):
    place = snapshot(tmp_path)
    whole = HubName("some-one/Model-1.5", None, COMMIT)
    assert cached_name(place) == cached_name(f"{place}/") == whole
    (tmp_path / "link").symlink_to(place)
    assert cached_name(tmp_path / "link") == whole
    monkeypatch.chdir(place)
    assert cached_name(".") == whole and checkpoint_name(".") == "some-one/Model-1.5"
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"")
    (place / "sub").mkdir()
    for file in ("m.gguf", "sub/m.gguf"):  # a file of a snapshot is a link to a blob, whose name says nothing
        (place / file).symlink_to(tmp_path / "blobs" / "abc")
        assert cached_name(tmp_path / "link" / file) == HubName("some-one/Model-1.5", file, COMMIT)
        assert checkpoint_name(place / file) == f"some-one/Model-1.5:{file}"
    assert cached_name(snapshot(tmp_path, "models--gpt2")) == HubName("gpt2", None, COMMIT)


def test_other_places_are_not_from_the_hub(tmp_path):
    others = [tmp_path, snapshot(tmp_path, commit="main"), snapshot(tmp_path, commit=COMMIT[:7])]
    others += [snapshot(tmp_path, "some-one--Model"), snapshot(tmp_path, "datasets--a--b"), place_of_own(tmp_path)]
    for place in others:
        assert cached_name(place) is None
        assert checkpoint_name(place) == place.name


def place_of_own(root):
    place = root / "models--a--b" / "revisions" / COMMIT
    place.mkdir(parents=True)
    return place
