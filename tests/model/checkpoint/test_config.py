"""config.json: both spellings of rope, defaults by model type, and refusals, which all name file and field."""

import json

import pytest

from cna_kernels import InputError
from cna_kernels.model.checkpoint.config import Rope, read_config

BASE = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=100, hidden_size=32, intermediate_size=48,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
    hidden_act="silu", torch_dtype="bfloat16",
)  # fmt: skip


def read(directory, remove=(), **changes):
    record = {name: value for name, value in (BASE | changes).items() if name not in remove}
    (directory / "config.json").write_text(json.dumps(record))
    return read_config(directory)


def test_old_and_new_spelling_of_rope(tmp_path):
    llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    expected = Rope("llama3", 5e5, 8.0, 1.0, 4.0, 32)
    assert read(tmp_path, rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **llama3)).rope == expected
    assert read(tmp_path, rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **llama3)).rope == expected
    assert read(tmp_path, rope_scaling=dict(type="linear", factor=2)).rope == Rope("linear", 1e4, 2.0)
    assert read(tmp_path, rope_theta=7e3, rope_scaling=None).rope == Rope("default", 7e3)
    dynamic = read(tmp_path, rope_scaling=dict(type="dynamic", factor=4.0))
    assert dynamic.rope.kind == "dynamic" and dynamic.context_length == 256


def test_defaults_by_model_type(tmp_path):
    llama = read(tmp_path, remove=["num_key_value_heads", "torch_dtype", "architectures"])
    assert (llama.num_key_value_heads, llama.dtype, llama.head_dim) == (4, None, 8)
    assert not llama.qkv_bias and llama.sliding_windows == (None,) * 3
    names = dict(mistral="MistralForCausalLM", qwen2="Qwen2ForCausalLM", qwen3="Qwen3ForCausalLM")
    read_as = {name: read(tmp_path, model_type=name, architectures=[arch]) for name, arch in names.items()}
    assert read_as["mistral"].sliding_windows == (4096,) * 3
    assert read_as["qwen2"].qkv_bias and not read_as["qwen2"].o_bias
    assert read_as["qwen3"].qk_norm and read_as["qwen3"].head_dim == 128
    every_head = read(tmp_path, model_type="qwen2", architectures=None, num_key_value_heads=None)
    assert every_head.num_key_value_heads == 4
    full = read(tmp_path, model_type="mistral", architectures=None, sliding_window=None)
    assert full.sliding_windows == (None,) * 3


def test_sliding_layers(tmp_path):
    qwen = dict(model_type="qwen2", architectures=None, use_sliding_window=True, sliding_window=5)
    assert read(tmp_path, max_window_layers=2, **qwen).sliding_windows == (None, None, 5)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read(tmp_path, layer_types=kinds, **qwen).sliding_windows == (5, None, 5)
    assert read(tmp_path, **(qwen | {"use_sliding_window": False})).sliding_windows == (None,) * 3


REFUSALS = {
    "model_type: expected llama or mistral or qwen2 or qwen3, got 'gpt2'": dict(model_type="gpt2"),
    "model_type: expected text, got ['llama']": dict(model_type=["llama"]),
    "model_type: is missing": dict(remove=["model_type"]),
    "architectures: expected ['LlamaForCausalLM'], got ['LlamaForSequenceClassification']": dict(
        architectures=["LlamaForSequenceClassification"]
    ),
    "hidden_act: expected silu, got 'gelu'": dict(hidden_act="gelu"),
    "auto_map: is not supported": dict(auto_map={"AutoModel": "x.Y"}),
    "quantization_config: is not supported": dict(quantization_config={"quant_method": "awq"}),
    "mlp_bias: expected true or false, got 1": dict(mlp_bias=1),
    "vocab_size: is missing": dict(remove=["vocab_size"]),
    "vocab_size: expected a whole number from 1 to 1073741824, got '100'": dict(vocab_size="100"),
    "hidden_size: expected a whole number from 1 to 1048576, got True": dict(hidden_size=True),
    "hidden_size: expected a whole number from 1 to 1048576, got -1": dict(hidden_size=-1),
    "hidden_size: expected a multiple of num_attention_heads 4, got 30": dict(hidden_size=30),
    "num_key_value_heads: expected a divisor of 4 heads, got 3": dict(num_key_value_heads=3),
    "num_hidden_layers: expected a whole number from 1 to 1024, got 1000000": dict(num_hidden_layers=1000000),
    "head_dim: expected an even number, got 7": dict(head_dim=7),
    "rms_norm_eps: expected a number from 0 to 1, got '1e-5'": dict(rms_norm_eps="1e-5"),
    "tie_word_embeddings: expected true or false, got 'yes'": dict(tie_word_embeddings="yes"),
    "torch_dtype: expected bfloat16 or float16 or float32, got 'int8'": dict(torch_dtype="int8"),
    "rope_scaling.rope_type: expected default or dynamic or linear or llama3 or longrope or yarn, got 'su'": dict(
        rope_scaling=dict(rope_type="su", factor=2)
    ),
    "rope_scaling.factor: is missing": dict(rope_scaling=dict(type="linear")),
    "rope_scaling.high_freq_factor: expected above low_freq_factor 4, got 1": dict(
        rope_scaling=dict(rope_type="llama3", factor=8, low_freq_factor=4, high_freq_factor=1)
    ),
    "rope_parameters: different parameters for different layers are not supported": dict(
        rope_parameters={"full_attention": {"rope_type": "yarn"}}
    ),
    "hidden_size: expected at least 4 for each of 4 heads, got 8": dict(hidden_size=8),
    "rope_parameters: expected a JSON object": dict(rope_parameters=[1]),
    "rope_theta: expected a number from 1 to 1e+12, got 0": dict(rope_theta=0),
    "rope_theta: expected more than 1 for yarn, got 1": dict(
        rope_theta=1, rope_scaling=dict(rope_type="yarn", factor=4)
    ),
    "rope_scaling.beta_fast: expected 0 or a number from 1e-06, got 1e-320": dict(
        rope_scaling=dict(rope_type="yarn", factor=4, beta_fast=1e-320)
    ),
    "rope_scaling.original_max_position_embeddings: expected more than 1 for longrope, got 1": dict(
        rope_scaling=dict(rope_type="longrope", factor=4, original_max_position_embeddings=1)
    ),
    "layer_types: expected 3 entries of full_attention or sliding_attention": dict(
        model_type="qwen3", architectures=None, layer_types=["full_attention"]
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_name_file_and_field(tmp_path, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, **REFUSALS[message])
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {message}")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"hidden_size": NaN}', b"\xff", b'{"a": 1, "a": 2}'])
def test_files_that_are_no_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: "):
        read_config(tmp_path)


def test_no_config(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: No such file or directory"):
        read_config(tmp_path)
