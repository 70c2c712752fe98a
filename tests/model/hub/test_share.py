"""Circuits and adapters to a Hub on loopback and back: what is shared, what the card says, what is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from cna_kernels import Circuit
from cna_kernels.errors import InputError
from cna_kernels.model import load
from cna_kernels.model.checkpoint import export, lora
from cna_kernels.model.hub.card import card
from cna_kernels.model.hub.contents import read_adapters, read_circuits
from hub_stub import commands, running
from tiny import write_checkpoint

pytest.importorskip("huggingface_hub")
COMMIT, SHA = "0123abcd" * 5, "c0ffee" * 10
FOUND = Circuit(
    ((0, 3, 1.5), (0, 7, -1.0), (2, 1, 0.5)), 3, 48, score="norm-weighted", fraction=0.02, position="last",
    model=dict(name="org/base", repo="org/base", revision=COMMIT, tensors_sha256=SHA, decoder_sha256=SHA),
    prompts=dict(positive=dict(count=40, sha256=SHA), negative=dict(count=41, sha256=SHA)),
    folds=dict(n=2, overlap=[0.5, 0.7], retained=[0.8, 1.0]), dtype="float32",
    bootstrap=dict(replicates=9, seed=0, overlap=0.75, pairwise_overlap=0.5, frequency=[1, 1, 1], others=[]),
    chat=dict(args={}, system="Be a pirate", day=None),
)  # fmt: skip
PLAIN = Circuit(((1, 3, 1.0),), 3, 48, score="/home/me/secret", model=dict(name="/home/me/model"))
LOGIN = dict(HF_TOKEN="hf_of_a_test")


@pytest.fixture
def hub():
    with running() as hub:
        yield hub


@pytest.fixture
def work(tmp_path):
    FOUND.save(tmp_path / "a.json")
    PLAIN.save(tmp_path / "b.json")
    return tmp_path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """An adapter, one in two parts, and one whose base model is a path."""
    root = tmp_path_factory.mktemp("adapters")
    write_checkpoint("llama", root / "model")
    model = load(root / "model")
    factors = export.neuron_multipliers([FOUND], [0.0])
    write = lambda name, base, **how: lora.to_lora(  # noqa: E731
        model.checkpoint, model.config, factors, root / name, base_model=base, about="Circuits: a.json at 0.", **how
    )
    write("whole", "org/base", revision=COMMIT)
    write("parts", "org/base", max_rank=1, split=True)
    write("local", str(root / "model"))
    return root


def test_circuits_there_and_back(hub, work):
    first, again, second, pulled, one, over = commands(
        hub, work, ["push", "a.json", "org/c", "--message", "The first"], ["push", "a.json", "org/c"],
        ["push", "b.json", "org/c"], ["pull", "org/c", "-o", "new/all"], ["pull", "org/c:b.json", "-o", "one.json"],
        ["pull", "org/c", "-o", "new/all"], **LOGIN,
    )  # fmt: skip
    assert [code for code, *_ in (first, again, second, pulled, one, over)] == [0] * 5 + [2], (first, second, pulled)
    commits = list(hub.repos["models", "org/c"].commits)
    assert first[1] == f"pushed a.json to {hub.url}/org/c, commit {commits[1]}\n" and hub.messages[0] == "The first"
    assert first[2] == "cna push: a.json holds the system message of its chats, which is shared with it\n"
    assert not hub.repos["models", "org/c"].private
    assert set(hub.files("org/c")) == {".gitattributes", "a.json", "b.json", "README.md"}
    text = hub.files("org/c")["README.md"].decode()
    assert "## a.json" in text and "## b.json" in text  # the circuit that was there is in the new card
    assert pulled[1] == f"wrote a.json, b.json to new/all, from org/c, commit {commits[-1]}\n"
    assert Circuit.load(work / "new/all/a.json") == Circuit.load(work / "a.json")
    assert {path.name for path in (work / "new/all").iterdir()} == {"a.json", "b.json"}
    assert (work / "one.json").read_bytes() == (work / "b.json").read_bytes()
    assert over[2] == "cna pull: new/all: is there already\n"


def test_the_card(work):
    text = card({"a.json": FOUND}, "org/c", "dev")
    front = text.split("---\n")[1]
    assert 'base_model: "org/base"\n' in front and "library_name: cna-kernels\ntags:\n- cna-kernels\n" in front
    for said in (
        "3 of 144 neurons, in 2 of 3 layers (0: 2, 2: 1)", f"found in `org/base`, commit `{COMMIT}`",
        f"40 positive prompts, sha256 `{SHA}`", f"41 negative prompts, sha256 `{SHA}`", "score norm-weighted",
        "bootstrap: 75% of the neurons", "(9 times)", "2 folds: 60% of the neurons", "show 90% of the contrast",
        f'cna run org/base@{COMMIT} -c org/c:a.json@dev -m 0 -p "..."', "cna pull org/c@dev -o circuits/",
    ):  # fmt: skip
        assert said in text, said
    assert "pirate" not in text
    plain = card({"b.json": PLAIN}, "org/c")
    assert "/home" not in plain and "secret" not in plain and "base_model" not in plain and "bootstrap" not in plain
    assert 'cna run MODEL -c org/c:b.json -m 0 -p "..."' in plain
    both = card({"a.json": FOUND, "d.json": Circuit(((0, 0, 1.0),), 3, 48, model=dict(name="x", repo="x/y"))}, "o/c")
    assert 'base_model: ["org/base", "x/y"]' in both and "Each file is a circuit" in both


def test_the_front_matter_is_yaml():
    yaml = pytest.importorskip("yaml")
    for circuit in (FOUND, PLAIN):
        front = yaml.safe_load(card({"a.json": circuit}, "org/c").split("---\n")[1])
        assert front["library_name"] == "cna-kernels" and "cna-kernels" in front["tags"]
        assert front.get("base_model") == ("org/base" if circuit is FOUND else None)


def test_branches_and_private_repositories(hub, work):
    hub.add("org/public", {".gitattributes": b""})
    made, public, branch, pulled, wrong = commands(
        hub, work, ["push", "a.json", "org/p", "--private"], ["push", "a.json", "org/public", "--private"],
        ["push", "b.json", "org/p", "--revision", "dev"], ["pull", "org/p@dev", "-o", "dev"],
        ["push", "b.json", "org/p@dev"], **LOGIN,
    )  # fmt: skip
    assert made[0] == branch[0] == pulled[0] == 0, (made, branch, pulled)
    assert hub.repos["models", "org/p"].private
    assert public[0] == 2 and "org/public: exists and is public: nothing was pushed" in public[2]
    assert set(hub.files("org/public")) == {".gitattributes"}
    assert "b.json" not in hub.files("org/p") and {"a.json", "b.json"} <= set(hub.files("org/p", "dev"))
    assert "org/p:b.json@dev" in hub.files("org/p", "dev")["README.md"].decode()
    assert sorted(path.name for path in (work / "dev").iterdir()) == ["a.json", "b.json"]
    assert wrong[0] == 2 and "expected org/name; --revision names a branch" in wrong[2]


def test_a_card_that_somebody_wrote_stays(hub, work):
    hub.add("org/c", {"README.md": b"# My circuits"})
    ((code, _, err),) = commands(hub, work, ["push", "b.json", "org/c"], **LOGIN)
    assert code == 0 and "README.md of org/c was not written by cna push: it stays as it is" in err
    assert hub.files("org/c")["README.md"] == b"# My circuits" and "b.json" in hub.files("org/c")


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_adapters_there_and_back(hub, adapters, work, name):
    place = adapters / name
    (place / "notes.py").write_text("import os")  # is no part of it
    pushed, pulled, circuits, again = commands(
        hub, work, ["push", place, "org/a"], ["pull", "org/a", "-o", "back"], ["push", "a.json", "org/a"],
        ["push", place, "org/a"], **LOGIN,
    )  # fmt: skip
    assert pushed[0] == pulled[0] == again[0] == 0, (pushed, pulled, again)
    files = {path.relative_to(place).as_posix() for path in place.rglob("*.*") if path.suffix != ".py"}
    assert {path.relative_to(work / "back").as_posix() for path in (work / "back").rglob("*.*")} == files
    assert set(hub.files("org/a")) == files | {".gitattributes", "README.md"}
    for file in files:
        assert (work / "back" / file).read_bytes() == (place / file).read_bytes()
    assert hub.uploads and all("down_proj" in "".join(load_file(work / "back" / f)) for f in files if "safet" in f)
    assert circuits[0] == 2 and "org/a: holds an adapter: nothing was pushed" in circuits[2]


def test_what_is_not_pushed(hub, adapters, work):
    (work / "other").mkdir()
    (work / "other" / "a.json").write_text("{}")
    export.to_ref_code(PLAIN, work / "public.json")
    (work / "a b.json").write_bytes((work / "a.json").read_bytes())
    (work / "empty").mkdir()
    hub.add("org/parts", {"1/adapter_config.json": b"{}", "1/adapter_model.safetensors": b""})
    cases = [
        (["other/a.json"], "org/c", "other/a.json: schema_version: expected 1"),
        (
            ["public.json"],
            "org/c",
            "public.json: is JSON of the public code, which names no model and may hold a prompt",
        ),
        (["a b.json"], "org/c", "a b.json: expected a name of letters, digits"),
        (["a.json", work / "a.json"], "org/c", "two files are called a.json"),
        (["nowhere.json"], "org/c", "nowhere.json: No such file"),
        (["empty"], "org/c", "empty: holds no adapter_config.json"),
        ([adapters / "whole", "a.json"], "org/c", "is a directory: an adapter has a repository of its own"),
        ([adapters / "local"], "org/c", "base_model_name_or_path: names '/"),
        ([adapters / "whole"], "org/parts", "holds another adapter's 1/adapter_config.json"),
        (["a.json"], "name", "name: expected a repository on the Hub, org/name"),
    ]
    done = commands(hub, work, *(["push", *paths, repo] for paths, repo, _ in cases), **LOGIN)
    for (*_, said), (code, out, err) in zip(cases, done, strict=True):
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1, err
    assert set(hub.repos) == {("models", "org/parts")} and not hub.uploads  # no repository was made either
    ((code, _, err),) = commands(hub, work, ["push", "b.json", "org/c"])
    assert code == 2 and "org/c: " in err and "log in" in err and err.count("\n") == 1, err
    ((code, _, err),) = commands(hub, work, ["push", "b.json", "org/c"], HF_HUB_OFFLINE="1", **LOGIN)
    assert code == 2 and err.count("\n") == 1 and "HF_HUB_OFFLINE" in err, err


def test_what_is_not_pulled(hub, adapters, work):
    """Repositories with neither, with a faulty circuit, with an adapter that is not as it is written here."""
    good = {path.name: path.read_bytes() for path in (adapters / "whole").iterdir()}
    config = json.loads(good["adapter_config.json"])
    changed = lambda **fields: {**good, "adapter_config.json": json.dumps({**config, **fields}).encode()}  # noqa: E731
    tensors = load_file(adapters / "whole" / "adapter_model.safetensors")
    name = min(tensors)
    weights = {
        "shape": tensors | {name: torch.zeros(1, 48)}, "half": {name: tensors[name]},
        "head": tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(1)},
    }  # fmt: skip
    repos = {
        "model": ({"config.json": b"{}", "model.safetensors": b""}, "org/model: holds no circuit and no adapter"),
        "bad": ({"c.json": b'{"schema_version": 1, "neurons": []}'}, "c.json: n_layers: is missing"),
        "code": (changed(auto_mapping={"a": "b"}), "auto_mapping: not a field of an adapter that cna export writes"),
        "bottleneck": (changed(peft_type="IA3"), "peft_type: expected LORA"),
        "rank": (changed(r=0), "adapter_config.json: r: expected a whole number from 1"),
        "noweights": ({"adapter_config.json": good["adapter_config.json"]}, "adapter_model.safetensors: No such file"),
        "pickle": ({**good, "adapter_model.safetensors": b"\x80\x04pickle"}, "is no safetensors file"),
        **{key: ({**good, "adapter_model.safetensors": save(value)}, said) for key, value, said in (
            ("shape", weights["shape"], f"{name}: expected rank "), ("half", weights["half"], "has one half of layer"),
            ("head", weights["head"], "is no tensor of an adapter"),
        )},
    }  # fmt: skip
    for repo, (files, _) in repos.items():
        hub.add(f"org/{repo}", files)
    hub.add("org/mixed", {"c.json": PLAIN.to_json().encode(), "x.json": b"{}", "a.py": b"", "b.bin": b""})
    hub.add("org/two", {f"{n}.json": PLAIN.to_json().encode() for n in "cd"})
    hub.requests.clear()
    *done, mixed, two, elsewhere = commands(
        hub, work, *(["pull", f"org/{repo}", "-o", f"out/{repo}"] for repo in repos),
        ["pull", "org/mixed", "-o", "mixed"], ["pull", "org/two", "-o", "two.json"], ["pull", "./org", "-o", "out"],
    )  # fmt: skip
    for (repo, (_, said)), (code, out, err) in zip(repos.items(), done, strict=True):
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1, (repo, err)
    assert not (work / "out").exists() and not list(work.glob(".*partial"))
    assert mixed[0] == 0 and "cna pull: left out, as no circuits: x.json" in mixed[2]
    assert [path.name for path in (work / "mixed").iterdir()] == ["c.json"]
    assert two[0] == 2 and "two.json: expected a directory to make: there are 2 files, c.json, d.json" in two[2]
    assert elsewhere[0] == 2 and "./org: expected a repository on the Hub" in elsewhere[2]
    assert not any(re.search(r"\.(py|bin)$|model\.safetensors$", r) for r in hub.requests if "adapter" not in r)


def test_a_card_names_the_base_model_that_the_adapter_records(adapters, tmp_path):
    from cna_kernels.model.hub.contents import card_of

    (adapter,) = read_adapters(adapters / "local")
    renamed = type(adapter)(adapter.folder, "org/base", None)
    text = card_of(adapters / "local", renamed)
    assert 'base_model: "org/base"' in text and str(adapters) not in text
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.raises(InputError, match=r"README.md: is not the card of an adapter"):
        card_of(tmp_path, renamed)


def test_names_of_circuits(work):
    assert list(read_circuits([work / "a.json", work / "b.json"])) == ["a.json", "b.json"]
