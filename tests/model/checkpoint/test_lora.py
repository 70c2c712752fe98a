"""LoRA adapters: PEFT on the written files, and each engine's rule for ranks and alpha, against the steered model."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cna_kernels import InputError
from cna_kernels.model.checkpoint import export, lora
from cna_kernels.model.cli import main
from export_cases import CASES, IDS, UNEVEN, A, B, steered, theirs, write_model


@pytest.fixture(scope="module", params=["llama", "qwen3-tied"])
def model(request, tmp_path_factory):
    return write_model(request.param, tmp_path_factory.mktemp(request.param))


def logits(peft_model):
    with torch.no_grad():
        return peft_model(input_ids=IDS, use_cache=False).logits


def scaling(engine, config, name, rank):
    """What an engine multiplies a layer's correction by; None where it refuses or misreads the tensors."""
    if engine == "llama.cpp":  # the tensors' own rank, and one alpha
        return config["lora_alpha"] / rank
    if engine == "one rank":  # SGLang, vLLM before 0.32
        return config["lora_alpha"] / config["r"] if rank == config["r"] and not config["rank_pattern"] else None
    found = [
        next((value for key, value in config[pattern].items() if re.match(rf"(.*\.)?({key})$", name)), config[one])
        for pattern, one in (("alpha_pattern", "lora_alpha"), ("rank_pattern", "r"))
    ]
    assert found[1] == rank, "PEFT makes the tensors by this rank"
    return found[0] / found[1]


def merged(engine, directory, adapter):
    """The logits of a model whose weights an engine's rule has changed; None where the engine misreads the adapter."""
    plain, config = theirs(directory), json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if "lora_A" in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        factor = scaling(engine, config, module, a.shape[0])
        if factor is None:
            return None
        with torch.no_grad():
            plain.get_submodule(module).weight += factor * (b.float() @ a.float())
    return logits(plain)


# how an export is asked for -> the engines that read it
READ_BY = {
    (): ("peft", "llama.cpp"),
    (("engine", "peft"),): ("peft", "llama.cpp"),
    (("engine", "llama.cpp"),): ("peft", "llama.cpp"),
    (("uniform", True),): ("peft", "llama.cpp", "one rank"),
    (("engine", "vllm"),): ("peft", "llama.cpp", "one rank"),
    (("engine", "sglang"),): ("peft", "llama.cpp", "one rank"),
    (("max_rank", 5),): ("peft", "llama.cpp"),
}  # fmt: skip


@pytest.mark.parametrize(("circuits", "multipliers"), CASES)
@pytest.mark.parametrize("asked", READ_BY)
def test_every_engine_reads_it_right(model, tmp_path, circuits, multipliers, asked):
    """By the engines' own rules, which differ: llama.cpp knows no alpha_pattern, others know no rank_pattern."""
    multiplied = export.neuron_multipliers(circuits, multipliers)
    lora.to_lora(model.checkpoint, model.config, multiplied, tmp_path / "a", **dict(asked))
    wanted = steered(model, circuits, multipliers)
    with torch.no_grad():
        assert (wanted - model(IDS)).abs().max() > 0.05, "steering without effect would hide everything"
    for engine in READ_BY[asked]:
        found = merged(engine, model.directory, tmp_path / "a")
        assert found is not None and (found - wanted).abs().max() <= 1e-4, engine
    if json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"]:
        assert "one rank" not in READ_BY[asked] and merged("one rank", model.directory, tmp_path / "a") is None
    elif asked == ():
        assert UNEVEN not in circuits, "whose ranks differ"


@pytest.mark.parametrize(("circuits", "multipliers"), CASES)
@pytest.mark.parametrize("uniform", [False, True], ids=["ranks of layers", "uniform rank"])
def test_peft_loads_the_adapter(model, tmp_path, circuits, multipliers, uniform):
    peft = pytest.importorskip("peft")
    multiplied = export.neuron_multipliers(circuits, multipliers)
    written = lora.to_lora(model.checkpoint, model.config, multiplied, tmp_path / "a", uniform=uniform)
    assert written == [tmp_path / "a"]
    wanted = steered(model, circuits, multipliers)
    found = logits(peft.PeftModel.from_pretrained(theirs(model.directory), tmp_path / "a"))
    assert (found - wanted).abs().max() <= 1e-4
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    ranks = sorted(x.shape[0] for name, x in tensors.items() if "lora_A" in name)
    needed = sorted(map(len, multiplied.values()))
    assert ranks == ([needed[-1]] * 3 if uniform else sorted(lora.padded_ranks(dict(enumerate(needed))).values()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_padded_form_rounds_nothing_more(model, tmp_path, dtype):
    """B has the bits of the uniform form, and A times alpha / rank is one, in every dtype and for tiny numbers."""
    for size, m in (("usual", 0.5), ("tiny", 1 - 2e-6)):  # tiny: below fp16's normal numbers
        multiplied = {0: {3: m, 9: m}, 1: {1: m, 2: m, 3: m, 4: m, 7: m}, 2: {7: m}}
        for name, uniform in (("padded", False), ("uniform", True)):
            given = dict(uniform=uniform, dtype=dtype)
            lora.to_lora(model.checkpoint, model.config, multiplied, tmp_path / f"{size}-{name}", **given)
        padded, uniform = (
            load_file(tmp_path / f"{size}-{name}" / "adapter_model.safetensors") for name in ("padded", "uniform")
        )
        ranks = [len(a) for name, a in padded.items() if "lora_A" in name]
        assert sorted(ranks) == [1, 2, 8]
        for name, a in padded.items():
            if "lora_A" in name:
                assert torch.equal(a[a != 0] * (8 / len(a)), torch.ones(int(a.any(dim=1).sum()), dtype=a.dtype))
                b, whole = (each[name.replace("lora_A", "lora_B")] for each in (padded, uniform))
                n = min(b.shape[1], whole.shape[1])
                assert torch.equal(b[:, :n], whole[:, :n]) and b.any()


def test_auto_peft_follows_the_base_model(model, tmp_path, capsys):
    """The path that the command records, or the name it is given; a card that names both; parents that it makes."""
    peft = pytest.importorskip("peft")
    A.save(tmp_path / "a.json")
    words = ["export", str(model.directory), "-c", f"{tmp_path}/a.json", "-m", "0", "--to", "lora"]
    out = tmp_path / "new" / "folders" / "adapter"
    assert main([*words, "-o", str(out)]) == 0
    assert f"base model: {model.directory}" in capsys.readouterr().out.replace("\n", "")
    found = logits(peft.AutoPeftModelForCausalLM.from_pretrained(str(out), dtype=torch.float32))
    assert (found - steered(model, (A,), (0.0,))).abs().max() <= 1e-4
    assert main([*words, "--base-model", "org/name", "--for", "vllm", "-o", f"{tmp_path}/named"]) == 0
    said = capsys.readouterr().out
    assert "base model: org/name" in said and "--max-lora-rank 8" in said
    assert json.loads((tmp_path / "named" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"
    card = (tmp_path / "named" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "org/name"\nlibrary_name: peft\n') and "a.json at 0" in card
    assert str(tmp_path) not in card


def test_the_base_model_has_the_name_of_the_cache(model, tmp_path, capsys):
    """A directory of the Hub's cache: the Hub's name and the commit, which are true elsewhere, too."""
    snapshot = tmp_path / "models--some-one--Model-1.5" / "snapshots" / ("0123abcd" * 5)
    shutil.copytree(model.directory, snapshot)
    A.save(tmp_path / "a.json")
    words = ["export", str(snapshot), "-c", f"{tmp_path}/a.json", "--to", "lora", "-o", f"{tmp_path}/a"]
    assert main(words) == 0
    assert "base model: some-one/Model-1.5, at 0123abcd0123abcd0123abcd0123abcd0123abcd\n" in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (record["base_model_name_or_path"], record["revision"]) == ("some-one/Model-1.5", snapshot.name)


def test_the_card_says_who_reads_it(model, tmp_path):
    multiplied = export.neuron_multipliers([UNEVEN], [0.0])
    given = dict(base_model="some/model")
    (adapter,) = lora.to_lora(model.checkpoint, model.config, multiplied, tmp_path / "a", **given)
    card = (adapter / "README.md").read_text()
    assert "--lora adapter.gguf" in card and "vllm serve" not in card and "would misread the ranks" in card
    lora.to_lora(model.checkpoint, model.config, multiplied, adapter, engine="vllm", **given)  # over that card
    card = (adapter / "README.md").read_text()
    assert "vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules NAME=adapter/" in card
    assert "--lora adapter.gguf" in card and "sglang.launch_server" in card
    given |= dict(max_rank=3, split=True)
    parts = lora.to_lora(model.checkpoint, model.config, multiplied, tmp_path / "b", **given)
    card = (parts[1] / "README.md").read_text()
    assert "one of 2 adapters that must be active together" in card and "--lora 1.gguf --lora 2.gguf" in card
    (adapter / "README.md").write_text("# My notes")
    with pytest.raises(InputError, match=r"a/README\.md: is there already, and is not the card of an adapter"):
        lora.to_lora(model.checkpoint, model.config, multiplied, adapter)
    assert (adapter / "README.md").read_text() == "# My notes"


REFUSED = [
    (dict(engine="vllm", split=True), "split: writes adapters that are one circuit together; vllm uses one a request"),
    (dict(engine="sglang", split=True, max_rank=2), "split: writes adapters that are one circuit together"),
    (dict(engine="vllm", max_rank=2), r"max_rank: layers with more than 2 neurons: 0 \(3\), 2 \(3\)$"),
    (dict(engine="tgi"), "for: expected one of peft, llama.cpp, vllm, sglang, got 'tgi'"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_an_engine_would_misread_is_refused(model, tmp_path, asked, said):
    multiplied = export.neuron_multipliers([A, B], [0.0, 2.0])
    with pytest.raises(InputError, match=said):
        lora.to_lora(model.checkpoint, model.config, multiplied, tmp_path / "a", **asked)
    assert not (tmp_path / "a").exists()


def test_vllm_takes_no_rank_above_512(model, tmp_path):
    wide = {0: dict.fromkeys(range(513), 0.0)}
    with pytest.raises(InputError, match=r"max_rank: layers with more than 512 neurons: 0 \(513\)$"):
        lora.to_lora(model.checkpoint, model.config, wide, tmp_path / "a", engine="vllm")


@pytest.mark.parametrize(
    ("needed", "max_rank", "expected"),
    [
        ((1, 3, 5, 8), None, (1, 4, 8, 8)), ((1, 20), 24, (5, 20)), ((5, 20), 21, (5, 20)), ((2, 2), None, (2, 2)),
        ((1,), None, (1,)), ((7, 12, 20), 24, (12, 12, 24)), ((5, 2, 1), None, (8, 2, 1)), ((5, 3, 3), None, (6, 3, 3)),
        ((5, 2, 1), 5, (5, 5, 5)), ((5, 2, 1), 7, (6, 3, 3)), ((57, 8, 2, 1), None, (64, 8, 2, 1)),
    ],
)  # fmt: skip
def test_ranks_are_the_largest_over_a_power_of_two(needed, max_rank, expected):
    ranks = tuple(lora.padded_ranks(dict(enumerate(needed)), max_rank).values())
    assert ranks == expected
    assert all(rank >= n for rank, n in zip(ranks, needed, strict=True)) and max(ranks) <= (max_rank or 64)
    assert all(max(ranks) % rank == 0 and (max(ranks) // rank).bit_count() == 1 for rank in ranks)


def test_ranks_of_the_uniform_form():
    part = {0: [None] * 3, 2: [None]}
    assert lora._ranks(part, 4, True, None) == {0: 3, 1: 3, 2: 3, 3: 3}


def test_a_rank_that_is_too_large_is_refused_or_split(model, tmp_path):
    peft = pytest.importorskip("peft")
    multiplied = export.neuron_multipliers([A, B], [0.0, 2.0])
    with pytest.raises(InputError, match=r"max_rank: layers with more than 2 neurons: 0 \(3\), 2 \(3\)"):
        lora.to_lora(model.checkpoint, model.config, multiplied, tmp_path / "a", max_rank=2)
    assert not (tmp_path / "a").exists()
    parts = lora.to_lora(model.checkpoint, model.config, multiplied, tmp_path / "a", max_rank=2, split=True)
    assert [part.name for part in parts] == ["1", "2"]
    both = peft.PeftModel.from_pretrained(theirs(model.directory), parts[0], adapter_name="1")
    both.load_adapter(parts[1], adapter_name="2")
    both.base_model.set_adapter(["1", "2"])
    assert (logits(both) - steered(model, (A, B), (0.0, 2.0))).abs().max() <= 1e-4


def test_adapters_of_another_export_are_not_left_beside_the_new_ones(model, tmp_path):
    multiplied, out = export.neuron_multipliers([A, B], [0.0, 2.0]), tmp_path / "a"
    lora.to_lora(model.checkpoint, model.config, multiplied, out, max_rank=1, split=True)
    for more in ({}, dict(max_rank=2, split=True)):
        with pytest.raises(InputError, match=r"a/\d: holds an adapter that would stay beside the new one"):
            lora.to_lora(model.checkpoint, model.config, multiplied, out, **more)
    assert not (out / "adapter_config.json").exists()
    assert lora.to_lora(model.checkpoint, model.config, multiplied, out, max_rank=1, split=True)


def test_nothing_to_export(model, tmp_path):
    with pytest.raises(InputError, match="multiplier: changes nothing"):
        lora.to_lora(model.checkpoint, model.config, export.neuron_multipliers([A], [1.0]), tmp_path / "a")
