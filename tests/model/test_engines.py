"""Which engine runs a checkpoint, what says so, and what is refused."""

import json
import re

import pytest
import torch

from cna_kernels import Circuit, InputError, attach
from cna_kernels.errors import InputWarning
from cna_kernels.model import load
from cna_kernels.model.cli import main
from families import write_family
from tiny import write_language_model

pytest.importorskip("transformers")

POSITIVE, NEGATIVE = ["open it please", "why so", "tell me"], ["yes", "no no no", "we will see"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return write_family("gemma3", tmp_path_factory.mktemp("gemma3"))[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("llama"))


def test_auto_says_when_transformers_runs_the_model(gemma, llama, recwarn):
    assert load(llama, device="cpu").engine == "own" and not recwarn.list
    with pytest.warns(InputWarning, match="runs on transformers, as our own forward pass does not serve .*model_type"):
        model = load(gemma, device="cpu")
    assert model.engine == "transformers" and "on transformers" in repr(model) and "on transformers" in model.describe()


@pytest.mark.parametrize(
    "changes",
    [dict(hidden_act="gelu"), dict(partial_rotary_factor=0.5), dict(model_type="gemma2")],
    ids=lambda changes: next(iter(changes)),
)
def test_what_our_own_engine_does_not_do(llama, tmp_path, changes):
    config = json.loads((llama / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=next(iter(changes))):
        load(tmp_path, engine="own", device="cpu")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(engine="vllm"), "engine: expected one of auto, own, transformers, got 'vllm'"),
        (dict(engine="own", device_map="auto"), "engine: device_map and model_args are for the engine transformers"),
        (dict(engine="transformers", stream_layers=True), "stream_layers: is for our own engine"),
        (dict(stream_layers=True, model_args={"attn_implementation": "eager"}), "stream_layers: is for our own engine"),
        (
            dict(engine="transformers", model_args={"trust_remote_code": True}),
            "model_args: trust_remote_code: exp",
        ),
        (dict(engine="transformers", model_args={"attn_implementation": "none"}), "transformers cannot load it: "),
    ],
)
def test_options_that_do_not_go_together(llama, options, message):
    with pytest.raises(InputError, match=message):
        load(llama, device="cpu", **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda record: record.update(architectures=["Gemma3ForSequenceClassification"]),
            "architectures: expected a mo",
        ),
        (lambda record: record.update(model_type="no_such_model"), "transformers cannot load it: ValueError: "),
        (lambda record: record.update(num_hidden_layers=9, layer_types=None), r"\d+ of its weights are missing: "),
        (lambda record: record.update(intermediate_size=95), "transformers cannot load it|have another shape than"),
    ],
)
def test_bad_checkpoints_are_one_line(gemma, tmp_path, change, message, capsys):
    for path in gemma.iterdir():
        (tmp_path / path.name).symlink_to(path)
    record = json.loads((gemma / "config.json").read_text())
    change(record)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert main(["run", str(tmp_path), "-p", "hello", "--device", "cpu"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cna run:")]
    assert len(lines) == 1 and str(tmp_path) in lines[0]
    assert re.search(message, lines[0]), lines[0]


def test_a_checkpoint_is_the_same_on_both_engines(llama, tmp_path):
    own, theirs = load(llama, device="cpu"), load(llama, engine="transformers", device="cpu")
    assert own.identity() == theirs.identity()
    ids = torch.randint(6, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(own(ids), theirs(ids), rtol=1e-4, atol=1e-5)
    circuits = [model.discover(POSITIVE, NEGATIVE, top_k=8, universal_prompts=False) for model in (own, theirs)]
    assert circuits[0].pairs == circuits[1].pairs
    circuits[0].save(tmp_path / "c.json")
    prompts = ["go on", "a longer prompt than that"]
    answers = [
        model.generate(prompts, circuit=tmp_path / "c.json", multiplier=-1.0, max_new_tokens=9)
        for model in (own, theirs)
    ]
    assert answers[0] == answers[1] != own.generate(prompts, max_new_tokens=9)


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_a_circuit_of_an_attached_model_is_known(name, tmp_path):
    """A circuit found by ``attach`` names the weights that the command line finds in the files, or in the model."""
    path, theirs = write_family(name, tmp_path)
    engine = attach(theirs)
    with torch.inference_mode(), engine.collect(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) as sums:
        theirs(torch.tensor([[5, 6, 7], [9, 8, 7]]))
    circuit = engine.select(sums, top_k=6)
    engine.detach()
    assert circuit.model["decoder_sha256"]
    model = load(path, device="cpu")
    assert model.identity()["decoder_sha256"] == circuit.model["decoder_sha256"]
    model.check_circuit(circuit, "c.json")
    shifted, _ = write_family(name, tmp_path / "other"), None
    with torch.no_grad():
        theirs.get_decoder().layers[1].mlp.register_buffer("unused", torch.zeros(1), persistent=False)
        next(theirs.get_decoder().layers[1].parameters())[0] += 0.5
    theirs.save_pretrained(shifted[0])
    with pytest.raises(InputError, match="decoder_sha256: made for another model"):
        load(shifted[0], device="cpu").check_circuit(circuit, "c.json")


def test_relevance_is_for_our_own_engine(gemma):
    with pytest.raises(InputError, match="engine: relevance needs gradients: the model must be whole"):
        load(gemma, device="cpu").relevance("hello", "a", "b")
    with pytest.raises(InputError, match="engine: the score relp needs gradients"):
        load(gemma, device="cpu").discover(POSITIVE, NEGATIVE, score="relp")


def test_norm_weighted_by_the_models_own_columns(gemma):
    model = load(gemma, device="cpu")
    circuit = model.discover(POSITIVE, NEGATIVE, top_k=5, score="norm-weighted", universal_prompts=False)
    plain = model.discover(POSITIVE, NEGATIVE, fraction=1.0, universal_prompts=False)
    weights = [layer.mlp.down_proj.weight for layer in model.transformer.decoder.layers]
    by_score = sorted(plain, key=lambda neuron: -abs(neuron[2]) * weights[neuron[0]][:, neuron[1]].norm().item())
    assert [neuron[:2] for neuron in by_score[:5]] == circuit.pairs


def test_a_circuit_with_other_experts_is_refused(tmp_path):
    path, _ = write_family("mixtral", tmp_path)
    model = load(path, device="cpu")
    n_layers, n_neurons = model.config.num_hidden_layers, model.config.intermediate_size
    other = Circuit(((0, 5, 1.0),), n_layers, n_neurons, experts=((8, n_neurons // 8),) * n_layers)
    with pytest.raises(InputError, match="experts: made for another model"):
        model.generate("hello", circuit=other, max_new_tokens=2)


@pytest.mark.parametrize("name, said", [("gemma3", "96 per layer, 288 in all"), ("mixtral", "in up to 4 experts")])
def test_doctor_says_which_engine_reads_a_checkpoint(name, said, tmp_path, capsys):
    path, _ = write_family(name, tmp_path)
    capsys.readouterr()
    assert main(["doctor", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["engine"] == "transformers" and said in facts["neurons"] and len(facts["tensors_sha256"]) == 64


def test_a_run_goes_on_only_with_the_same_arguments(gemma, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("".join(f"{text}\n" for text in POSITIVE))
    (tmp_path / "n.txt").write_text("".join(f"{text}\n" for text in NEGATIVE))
    words = ["discover", str(gemma), "--positive", f"{tmp_path}/p.txt", "--negative", f"{tmp_path}/n.txt", "--top-k"]
    words += ["5", "--no-universal", "--device", "cpu", "--run-dir", f"{tmp_path}/run", "-o", f"{tmp_path}/c.json"]
    assert main([*words, "--model-arg", "attn_implementation=eager"]) == 0
    assert main([*words, "--model-arg", "attn_implementation=sdpa"]) == 2
    assert "model_args" in capsys.readouterr().err
    assert main([*words, "--model-arg", "hidden_act=silu"]) == 2
    assert "model_args: hidden_act: expected one of" in capsys.readouterr().err


def test_a_quantised_model_is_another_model(tmp_path):
    pytest.importorskip("bitsandbytes")
    path, _ = write_family("llama", tmp_path)
    plain = load(path, engine="transformers", device="cpu")
    how = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    quantised = load(path, device="cpu", model_args=how)
    assert quantised.engine == "transformers" and "Linear8bitLt" in str(quantised.transformer.not_fused())
    assert "decoder_sha256" not in quantised.identity()
    assert quantised.identity()["settings_sha256"] != plain.identity()["settings_sha256"]
    circuit = plain.discover(POSITIVE, NEGATIVE, top_k=5, universal_prompts=False)
    with pytest.raises(InputError, match="settings_sha256: made for another model"):
        quantised.check_circuit(circuit, "c.json")


def test_exports_know_a_circuit_by_the_loaded_decoder(tmp_path, capsys):
    """The files of a mixture have a tensor for each expert: the hash that ``attach`` gives is of the loaded model."""
    path, theirs = write_family("mixtral", tmp_path / "one")
    other, _ = write_family("mixtral", tmp_path / "other")
    engine = attach(theirs)
    with torch.inference_mode(), engine.collect(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) as sums:
        theirs(torch.tensor([[5, 6, 7], [9, 8, 7]]))
    engine.select(sums, top_k=6).save(tmp_path / "c.json")
    engine.detach()
    with torch.no_grad():
        theirs.get_decoder().layers[0].input_layernorm.weight += 0.5
    theirs.save_pretrained(other)
    words = ["-c", f"{tmp_path}/c.json", "-m", "0", "--to", "checkpoint", "-o", f"{tmp_path}/out"]
    assert main(["export", str(other), *words]) == 2
    assert "decoder_sha256: made for another model" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["export", str(path), *words]) == 0


def test_code_of_a_checkpoint_is_passed_over_and_said(gemma, llama, tmp_path, recwarn):
    """transformers' own class runs in its place; our own engine refuses such a checkpoint."""
    for name, of in (("gemma", gemma), ("llama", llama)):
        (tmp_path / name).mkdir()
        for path in of.iterdir():
            (tmp_path / name / path.name).symlink_to(path)
        record = json.loads((of / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}
        (tmp_path / name / "config.json").unlink()
        (tmp_path / name / "config.json").write_text(json.dumps(record))
    with pytest.warns(InputWarning, match="auto_map: its code does not run: transformers' own class does"):
        assert load(tmp_path / "gemma", device="cpu").engine == "transformers"
    with pytest.raises(InputError, match="auto_map: is not supported"):
        load(tmp_path / "llama", device="cpu")
    with pytest.warns(InputWarning, match="auto_map: its code does not run"):
        assert load(tmp_path / "llama", engine="transformers", device="cpu").identity()["tensors_sha256"]


def test_a_model_without_weights_is_known_by_the_same_arguments(llama):
    """Ray's coordinator loads none, and names the model in the circuit's file."""
    how = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    shape = load(llama, device="cpu", weights=False, model_args=how)
    assert shape.identity()["settings_sha256"] != load(llama, device="cpu").identity()["settings_sha256"]
    assert "decoder_sha256" not in shape.identity()
    with pytest.raises(InputError, match="model_args: hidden_act: expected one of"):
        load(llama, device="cpu", weights=False, model_args={"hidden_act": "gelu"})


def test_a_base_model_on_the_engine_that_the_flags_choose(llama, gemma, monkeypatch):
    """What `cna reproduce --base` asks before it loads the base model."""
    from argparse import Namespace

    from cna_kernels.model.cli.arguments import engine_of

    flags = dict(engine="auto", device_map=None, model_arg=[])
    cases = [(llama, {}, "own"), (gemma, {}, "transformers"), (llama, {"device_map": "auto"}, "transformers")]
    cases += [(llama, {"model_arg": [("attn_implementation", "eager")]}, "transformers")]
    for directory, changes, engine in cases:
        assert engine_of(Namespace(**flags | changes), str(directory)) == engine
