"""Models from a Hub on loopback: which files are fetched, what is read from the cache, what each error says."""

import json
import os
import shutil

import pytest

from cna_kernels import Circuit
from cna_kernels.errors import InputError
from cna_kernels.model import load
from cna_kernels.model.hub import fetch
from cna_kernels.model.hub.names import HubName
from gguf_files import tiny_model, write_gguf
from hub_stub import commands, running
from tiny import write_checkpoint, write_language_model

pytest.importorskip("huggingface_hub")
QUESTION = ["-p", "hello", "--max-new-tokens", "2"]
NEVER = {
    "vocab.pkl",
    "pytorch_model.bin",
    "modeling.py",
    "weights.pickle",
    "consolidated.safetensors",
    "other.safetensors",
}


def files_of(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def hub():
    with running() as hub:
        yield hub


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The files of a checkpoint."""
    return files_of(write_language_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def one(hub, tiny):
    """org/one: a checkpoint beside files that are not to be fetched. Its commits: main, and before it v1."""
    first = hub.add("org/one", tiny | dict.fromkeys(NEVER, b"code") | {"onnx/config.json": b"{}"})
    repo = hub.repos["models", "org/one"]
    repo.refs["v1"] = first
    return repo.commit({"README.md": b"# A model"}), first


def test_a_model_by_name(hub, one, tmp_path):
    """Commands take the name; the model line has the commit; nothing but weights and settings is fetched; a circuit
    has repository and commit; then all of it offline, and by the path in the cache."""
    main, first = one
    (tmp_path / "p.txt").write_text("red\nblue\n")
    (tmp_path / "n.txt").write_text("one\ntwo\n")
    discover = ["--positive", "p.txt", "--negative", "n.txt", "--no-universal", "--top-k", "5", "-o"]
    hub.requests.clear()
    run, found, tagged, doctor = commands(
        hub, tmp_path, ["run", "org/one", *QUESTION], ["discover", "org/one", *discover, "c.json"],
        ["run", "org/one@v1", "-c", "c.json", *QUESTION], ["doctor", "org/one", "--json"],
    )  # fmt: skip
    assert [code for code, *_ in (run, found, tagged, doctor)] == [0] * 4, (run, found, tagged, doctor)
    assert f"model 'org/one', commit {main}, asked for as 'org/one'; chat template" in run[2]
    assert f", commit {first}, asked for as 'org/one@v1';" in tagged[2]
    assert not hub.downloaded & (NEVER | {"README.md"}) and "model.safetensors" in hub.downloaded
    assert not any("onnx" in request for request in hub.requests)
    circuit = Circuit.load(tmp_path / "c.json")
    assert (circuit.model["repo"], circuit.model["revision"], circuit.model["name"]) == ("org/one", main, "org/one")
    facts = json.loads(doctor[1])
    assert (facts["repo"], facts["revision"]) == ("org/one", main)
    assert str(tmp_path) not in (tmp_path / "c.json").read_text()

    hub.requests.clear()
    place = facts["checkpoint"]
    export = ["-c", "c.json", "-m", "0", "--to", "lora", "-o"]
    results = commands(
        hub, tmp_path, ["run", "org/one", *QUESTION], ["run", f"org/one@{first}", "-c", "c.json", *QUESTION],
        ["run", place, "-c", "c.json", *QUESTION], ["export", "org/one", *export, "a"],
        ["export", "org/one@v1", *export, "b", "--base-model", "x/y"], ["show", "c.json"], HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert [code for code, *_ in results] == [0] * 6, results
    assert not hub.requests
    assert f"model 'org/one' {circuit.model['tensors_sha256'][:8]}, commit {main}; chat" in results[2][2]
    recorded = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab"]
    assert [(r["base_model_name_or_path"], r["revision"]) for r in recorded] == [("org/one", main), ("x/y", None)]
    assert f"on the Hugging Face Hub: org/one, commit {main}" in results[5][1]


def test_repository_and_commit_refuse_no_model(tiny, tmp_path):
    """They inform: the hashes decide. A circuit of the same weights elsewhere is taken, of others is not."""
    for name, content in tiny.items():
        (tmp_path / "same" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "same" / name).write_bytes(content)
    model = load(tmp_path / "same")
    known = model.identity() | {"repo": "some/where", "revision": "f" * 40}
    shape = model.config.num_hidden_layers, model.config.intermediate_size
    Circuit(((0, 1, 1.0),), *shape, model=known).save(tmp_path / "c.json")
    model.check_circuit(Circuit.load(tmp_path / "c.json"), "c.json", chat=False)
    place = tmp_path / "models--org--n" / "snapshots" / ("e" * 40)
    shutil.copytree(tmp_path / "same", place)
    load(place).check_circuit(Circuit.load(tmp_path / "c.json"), "c.json", chat=False)
    other = load(write_language_model(tmp_path / "other", seed=3))
    with pytest.raises(InputError, match="made for another model"):
        other.check_circuit(Circuit.load(tmp_path / "c.json"), "c.json", chat=False)
    for field, wrong in (("repo", "/home/me/model"), ("revision", "main")):
        record = json.loads((tmp_path / "c.json").read_text())
        record["model"][field] = wrong
        (tmp_path / "wrong.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match=f"wrong.json: model.{field}: expected"):
            Circuit.load(tmp_path / "wrong.json")


def test_shards_are_those_of_the_index(hub, tmp_path):
    write_checkpoint("llama", tmp_path / "m", max_shard_size="40KB")
    files = files_of(tmp_path / "m")
    shards = {name for name in files if name.endswith(".safetensors")}
    hub.add("org/shards", files | {"consolidated.safetensors": b"twice", "other.safetensors": b""})
    hub.requests.clear()
    (done,) = commands(hub, tmp_path, ["doctor", "org/shards"])
    assert done[0] == 0 and not done[2], done
    assert {name for name in hub.downloaded if name.endswith(".safetensors")} == shards and len(shards) > 1
    lost = min(shards)
    hub.add("org/lost", {name: content for name, content in files.items() if name != lost})
    (done,) = commands(hub, tmp_path, ["doctor", "org/lost"])
    assert done[0] == 2 and f"org/lost: lacks {lost}, which its model.safetensors.index.json names" in done[2]


def test_gguf_files(hub, tmp_path):
    """By their names and by their quantisation; what fits no file, or several, says what there is."""
    write_gguf(tmp_path / "x.gguf", tiny_model())
    write_gguf(tmp_path / "y.gguf", tiny_model(seed=1))
    content, other = ((tmp_path / f"{name}.gguf").read_bytes() for name in "xy")
    sha = hub.add("org/x-GGUF", {"x-Q8_0.gguf": content, "x.q4_0.gguf": other, "x-Q4_K_M.gguf": b"", "b.bin": b""})
    places = ["org/x-GGUF:x-Q8_0.gguf", "org/x-GGUF:Q4_0@main", "org/x-GGUF:Q5_0", "org/x-GGUF", "org/x-GGUF:y.gguf"]
    hub.requests.clear()
    eight, four, none, whole, lost = commands(hub, tmp_path, *(["doctor", place, "--json"] for place in places))
    assert eight[0] == four[0] == 0, (eight, four)
    assert hub.downloaded == {"x-Q8_0.gguf", "x.q4_0.gguf"}
    assert json.loads(eight[1])["revision"] == sha and json.loads(four[1])["checkpoint"].endswith("/x.q4_0.gguf")
    has = "it has x-Q4_K_M.gguf, x-Q8_0.gguf, x.q4_0.gguf: name one as org/x-GGUF:x-Q4_K_M.gguf"
    for done, said in ((none, "org/x-GGUF:Q5_0: holds no such GGUF file"), (whole, "org/x-GGUF: holds neither model"),
                       (lost, "org/x-GGUF:y.gguf: holds no such GGUF file")):  # fmt: skip
        assert done[0] == 2 and said in done[2] and has in done[2] and done[2].count("\n") == 1
    hub.add("org/two", {"a-Q8_0.gguf": b"", "b-Q8_0.gguf": b""})
    hub.add(
        "org/split", {f"s-Q8_0-0000{n}-of-00002.gguf": b"%d" % n for n in (1, 2)} | {"s-Q4_0-00001-of-00002.gguf": b""}
    )
    hub.requests.clear()
    two, split, part, odd = commands(
        hub, tmp_path, ["doctor", "org/two:Q8_0"], ["doctor", "org/split:q8_0"],
        ["doctor", "org/split:s-Q8_0-00001-of-00002.gguf"], ["doctor", "org/two:a.bin"],
    )  # fmt: skip
    assert two[0] == 2 and "fits several files, name one: a-Q8_0.gguf, b-Q8_0.gguf" in two[2]
    assert {name for name in hub.downloaded if name[0] == "s"} == {f"s-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)}
    assert "s-Q8_0-00001-of-00002.gguf" in split[2] and "s-Q8_0-00001-of-00002.gguf" in part[2]  # no GGUF is in them
    assert odd[0] == 2 and "expected a .gguf file or a quantisation" in odd[2]


def test_circuits_by_name(hub, one, tmp_path):
    """-c org/name:FILE: from the Hub; errors name it, and a circuit of another shape is refused as one on file is."""
    circuit = Circuit(((0, 3, 1.0), (1, 5, -1.0)), 3, 48)
    sha = hub.add("org/circuits", {"c.json": circuit.to_json().encode(), "bad.json": b"{}"})
    run = ["run", "org/one", *QUESTION, "-c"]
    good, pinned, bad, lost, norepo, code = commands(
        hub, tmp_path, [*run, "org/circuits:c.json"], [*run, f"org/circuits:c.json@{sha}"],
        [*run, "org/circuits:bad.json"], [*run, "org/circuits:d.json@main"], [*run, "org/nothing:c.json"],
        [*run, "org/one:pytorch_model.bin"],
    )  # fmt: skip
    assert good[0] == pinned[0] == 0 and "m = 0" in good[1], (good, pinned)
    assert bad[0] == 2 and "org/circuits:bad.json: schema_version: expected 1" in bad[2]
    assert "org/circuits:d.json@main: org/circuits has no file 'd.json' at main" in lost[2]
    assert "org/one:pytorch_model.bin: expected a circuit's file" in code[2]
    assert "pytorch_model.bin" not in hub.downloaded
    assert "org/nothing:c.json: no such path here, and no such model on http://127.0.0.1" in norepo[2]


FAULTS = {
    "no repository": ("org/none", "no such path here, and no such model on http://127"),
    "no revision": ("org/one@nowhere", "org/one has no branch, tag or commit 'nowhere'"),
    "gated": ("org/gated", "is gated: ask for access on http://127.0.0.1:{port}/org/gated, then log in (hf auth login"),
    "gated files": ("org/gated-files", "is gated: ask for access on"),
    "refused": ("org/refused", "refuses it (403): log in"),
    "broken": ("org/broken", "answers 500"),
    "pickles": ("org/pickles", "holds neither model.safetensors nor model.safetensors.index.json; it has "
                               "pytorch_model.bin, which may hold code and is not read"),
    "no name": ("some/where/else", "is neither a directory with a checkpoint nor a .gguf file"),
    "a missing file": ("out/model.gguf", "out/model.gguf"),
}  # fmt: skip


def test_errors_are_one_line(hub, one, tiny, tmp_path):
    hub.add("org/gated", tiny, fault=(403, "GatedRepo"))
    hub.add("org/gated-files", tiny, files_fault=(401, "GatedRepo"))
    hub.add("org/refused", tiny, fault=(403, "Forbidden"))
    hub.add("org/broken", tiny, fault=(500, "Oops"))
    hub.add("org/pickles", {"config.json": tiny["config.json"], "pytorch_model.bin": b"", "a.py": b""})
    done = commands(hub, tmp_path, *(["run", name, *QUESTION] for name, _ in FAULTS.values()))
    for (name, said), (code, out, err) in zip(FAULTS.values(), done, strict=True):
        said = said.replace("{port}", hub.url.rpartition(":")[2])
        assert (code, out) == (2, "") and err.startswith(f"cna run: {name}: ") and said in err, err
        assert err.count("\n") == 1, err


def test_without_a_network(hub, one, tiny, tmp_path):
    """Offline or unreachable, and not in the cache, not whole in the cache: one line each. In the cache: it runs."""
    run = ["run", "org/one", *QUESTION]
    (tmp_path / "a").mkdir()
    ((code, _, err),) = commands(hub, tmp_path / "a", run, HF_HUB_OFFLINE="1")
    assert code == 2 and "cna run: org/one: no such path here, and the cache " in err
    assert "HF_HUB_OFFLINE is set; fetch it once without" in err and err.count("\n") == 1
    ((code, _, err),) = commands(hub, tmp_path / "a", run, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2 and "org/one: http://127.0.0.1:9 cannot be reached, and the cache does not hold it" in err
    assert err.count("\n") == 1
    assert commands(hub, tmp_path, run)[0][0] == 0
    ((code, _, err),) = commands(hub, tmp_path, run, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 0 and f"commit {one[0]}" in err
    snapshot = tmp_path / "hub" / "models--org--one" / "snapshots" / one[0]
    os.unlink(snapshot / "model.safetensors")
    ((code, _, err),) = commands(hub, tmp_path, run, HF_HUB_OFFLINE="1")
    assert code == 2 and err.count("\n") == 1 and "org/one" in err, err


def test_without_huggingface_hub(hub, tmp_path):
    before = "import importlib.util as u, cna_kernels.model.packages as p\n"
    before += "p.find_spec = lambda name: None if name == 'huggingface_hub' else u.find_spec(name)"
    ((code, _, err),) = commands(hub, tmp_path, ["run", "org/one", *QUESTION], before=before)
    said = "org/one: is no path here; names on the Hugging Face Hub need huggingface_hub, not installed: pip install "
    assert code == 2 and f'{said}"cna-kernels[hub]"' in err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("x: No space left on device")])
def test_a_full_disk(error):
    said = r"org/name: the disk of the cache .* is full; free space, or set HF_HOME"
    with pytest.raises(InputError, match=said), fetch.errors_of(HubName("org/name")):
        raise error
