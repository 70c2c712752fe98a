"""GGUF files of every family and block format: the same numbers, logits and identity as transformers' own reading."""

import struct

import numpy as np
import pytest
import torch
from gguf import RopeScalingType

from cna_kernels import attach
from cna_kernels.blocks import dense
from cna_kernels.errors import InputError
from cna_kernels.model import load
from cna_kernels.model.checkpoint import formats, gguf_file
from gguf_files import FAMILIES, K_QUANTS, as_transformers_reads, llama3_factors, tiny_model, write_gguf
from tiny import LLAMA3, write_checkpoint

BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_QUANTS)
KINDS = ("F32", "F16", "BF16", *BLOCKS)
IDS = torch.tensor([[5, 17, 3, 80, 41, 7, 7, 22], [9, 1, 60, 2, 33, 14, 96, 50]])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_each_block_type(tmp_path, kind):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind=kind)
    theirs = as_transformers_reads(path)
    mine = load(path, dtype="float32")
    with torch.inference_mode():
        expected, got = theirs(IDS).logits, mine(IDS)
    assert expected.std() > 0.05, "the model says something"
    assert (got - expected).abs().max() < 1e-4
    weight = mine.checkpoint.read("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(weight.float(), theirs.model.layers[1].mlp.down_proj.weight)
    assert mine.identity()["decoder_sha256"] == attach(theirs).identity()["decoder_sha256"]


@pytest.mark.parametrize("variant", [name for name, _ in FAMILIES])
def test_every_family_has_the_logits_of_its_other_layout(tmp_path, variant):
    """One set of weights as safetensors and as GGUF, both read here; the rows of Q and K come back in order."""
    theirs = write_checkpoint(variant, tmp_path / "hf")
    rope = theirs.config.rope_parameters
    tensors = ()
    if rope["rope_type"] == "llama3":
        tensors = [("rope_freqs.weight", llama3_factors(rope, theirs.config.head_dim))]
    if theirs.config.tie_word_embeddings:
        tensors = [*tensors, ("output.weight", None)]
    path = write_gguf(tmp_path / "tiny.gguf", theirs, tensors=tensors)
    with torch.inference_mode():
        expected, got = theirs(IDS).logits, load(path)(IDS)
    assert (got - expected).abs().max() < 2e-5
    here, there = formats.open_checkpoint(path), formats.open_checkpoint(tmp_path / "hf")
    for name in there.entries.keys() - {"lm_head.weight"}:
        assert torch.equal(here.read(name), there.read(name)), name


def test_rope_scalings(tmp_path):
    import gguf

    theirs = tiny_model(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0))
    linear = [("rope_scaling_type", gguf.RopeScalingType.LINEAR), ("rope_scaling_factor", 2.0)]
    old = [("float32", ("llama.rope.scale_linear", 2.0))]
    for fields in (linear, linear[1:], old):  # a factor without a type is linear, as in llama.cpp
        path = write_gguf(tmp_path / "linear.gguf", theirs, fields=fields)
        with torch.inference_mode():
            assert (load(path)(IDS) - theirs(IDS).logits).abs().max() < 2e-5
    path = write_gguf(tmp_path / "none.gguf", theirs, fields=[("rope_scaling_type", gguf.RopeScalingType.NONE), old[0]])
    with torch.inference_mode():
        assert (load(path)(IDS) - theirs(IDS).logits).abs().max() > 1e-2
    yarn = dict(rope_type="yarn", factor=4.0, rope_theta=10000.0, original_max_position_embeddings=16)
    theirs = tiny_model(rope_parameters=yarn)
    fields = [("rope_scaling_type", gguf.RopeScalingType.YARN), ("rope_scaling_factor", 4.0)]
    path = write_gguf(tmp_path / "yarn.gguf", theirs, fields=[*fields, ("rope_scaling_orig_ctx_len", 16)])
    with torch.inference_mode():
        assert (load(path)(IDS) - theirs(IDS).logits).abs().max() < 2e-5


def test_dtype_that_it_is_loaded_in(tmp_path):
    for kind, expected in (("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")):
        path = write_gguf(tmp_path / f"{kind}.gguf", tiny_model(), kind=kind)
        assert formats.read_config(path).dtype == expected


def test_rows_and_columns_in_order(tmp_path):
    """What layers that are streamed, or shared between processes, read of a matrix."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(attention_bias=True), kind="Q5_1")
    checkpoint = formats.open_checkpoint(path)
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.down_proj.weight"):
        entry = checkpoint.entries[f"model.layers.0.{name}"]
        whole = entry.read()
        assert torch.equal(entry.read_rows([5, 0, 127], range(32, 96)), whole[[5, 0, 127], 32:96])
        pieces = [rows for _, rows in entry.pieces(1000)]
        assert torch.equal(torch.cat(pieces), whole)
    bias = checkpoint.entries["model.layers.0.self_attn.q_proj.bias"]
    assert torch.equal(bias.read_rows([0], range(3, 9))[0], bias.read()[3:9])


def test_identity_follows_the_bytes(tmp_path):
    first = write_gguf(tmp_path / "a.gguf", tiny_model(), kind="Q8_0")
    again = write_gguf(tmp_path / "b.gguf", tiny_model(), kind="Q8_0")
    other = write_gguf(tmp_path / "c.gguf", tiny_model(seed=1), kind="Q8_0")
    coarser = write_gguf(tmp_path / "d.gguf", tiny_model(), kind="Q4_0")
    ids = [load(path).identity() for path in (first, again, other, coarser)]
    assert ids[0]["name"] == "a.gguf"
    assert ids[0] | {"name": ""} == ids[1] | {"name": ""}
    for name in ("tensors_sha256", "decoder_sha256"):
        assert len({each[name] for each in ids}) == 3
    assert len({each["settings_sha256"] for each in ids}) == 1


def test_split_files(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", tiny_model())
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama", split_max_tensors=7)
    reader = gguf.GGUFReader(whole)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("tiny-*-of-*.gguf"))
    assert len(parts) == 3
    expected = load(whole)(IDS)
    for part in parts:
        assert torch.equal(load(part)(IDS), expected)
    parts[1].unlink()
    with pytest.raises(InputError, match=r"tiny-00002-of-00003\.gguf: No such file"):
        load(parts[0])


YARN = [("rope_scaling_type", RopeScalingType.YARN), ("rope_scaling_factor", 4.0)]
REFUSED = [
    # fields, tensors, what the error says
    ([("expert_count", 4)], (), "llama.expert_count: is not supported, got 4"),
    ([("attention_scale", 0.5)], (), "llama.attention.scale: is not supported, got 0.5"),
    ([("rope_dimension_count", 32)], (), "llama.rope.dimension_count: is not supported, got 32"),
    ([("sliding_window", 8)], (), "llama.attention.sliding_window: is not supported, got 8"),
    ([("final_logit_softcapping", 30.0)], (), "llama.final_logit_softcapping: is not supported, got 30.0"),
    ([], [("blk.1.ffn_up.weight", None)], "'model.layers.1.mlp.up_proj.weight': is missing from the checkpoint"),
    ([], [("token_embd.weight", None)], "'token_embd.weight': is missing from the checkpoint"),
    ([], [("blk.0.attn_sinks.weight", [1.0])], "may change what it computes"),
    ([], [("rope_freqs.weight", [1.0, 2.0])], "'rope_freqs.weight': expected shape [32], got [2]"),
    ([], [("rope_freqs.weight", [0.0] * 32)], "'rope_freqs.weight': expected numbers above 0"),
    (
        [],
        [("layers.0.mlp.up_proj.weight", [[1.0]])],
        "'layers.0.mlp.up_proj.weight': is not llama.cpp's name of 'model.l",
    ),
    ([], [("embed_tokens.weight", [[1.0]])], "'embed_tokens.weight': is not llama.cpp's name of 'model.embed_tokens."),
    ([*YARN, ("rope_freq_base", 1.0)], (), "llama.rope.freq_base: expected more than 1 beside rope.scaling.type yarn"),
    ([*YARN, ("rope_scaling_yarn_beta_fast", 0.0)], (), "llama.rope.scaling.yarn_beta_fast: expected a number from"),
    ([*YARN, ("rope_scaling_yarn_beta_slow", 0.0)], (), "llama.rope.scaling.yarn_beta_slow: expected a number from"),
]


@pytest.mark.parametrize(("fields", "tensors", "what"), REFUSED, ids=[each[2][:30] for each in REFUSED])
def test_what_would_compute_otherwise_is_refused(tmp_path, fields, tensors, what):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), fields=fields, tensors=tensors)
    with pytest.raises(InputError) as caught:
        load(path)
    assert what in str(caught.value) and str(path) in str(caught.value)


def test_rows_of_nothing(tmp_path):
    """A sparse file whose query projection has 2^38 rows: refused by its shape, without a number for each row."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    content = path.read_bytes()
    name = b"blk.0.attn_q.weight"
    place = content.index(name) + len(name)
    n_dims, columns, rows, kind, _ = struct.unpack("<IQQIQ", content[place : place + 32])
    assert (n_dims, columns, rows, kind) == (2, 256, 256, 0)
    offset = len(content) // 32 * 32
    changed = struct.pack("<IQQIQ", 2, 1, 1 << 38, 0, offset)
    path.write_bytes(content[:place] + changed + content[place + 32 :])
    with open(path, "r+b") as file:
        file.truncate((1 << 40) + (1 << 30))
    with pytest.raises(InputError, match=r"q_proj\.weight': expected shape \[256, 256\], got \[274877906944, 1\]"):
        load(path)


def test_other_architectures_are_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"general\.architecture: expected llama or qwen2 or qwen3, got 'gemma2'"):
        load(tmp_path / "other.gguf")


def test_a_directory_with_a_gguf_file_names_it(tmp_path):
    write_checkpoint("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    with pytest.raises(InputError, match=r"name the file itself to read tiny\.gguf"):
        load(tmp_path)


def test_plain_types_need_no_package(tmp_path, monkeypatch):
    files = {kind: write_gguf(tmp_path / f"{kind}.gguf", tiny_model(), kind=kind) for kind in ("F16", "Q8_0")}
    monkeypatch.setattr("cna_kernels.model.packages.find_spec", lambda name: None if name == "gguf" else name)
    assert load(files["F16"])(IDS).isfinite().all() and load(files["Q8_0"]).identity()
    monkeypatch.setattr("cna_kernels.cpu.library.missing", lambda: "is not built")
    assert load(files["F16"]).checkpoint.read("model.embed_tokens.weight").isfinite().all()
    with pytest.raises(InputError, match=r'gguf: not installed: pip install "cna-kernels\[gguf\]"'):
        load(files["Q8_0"]).checkpoint.read("model.embed_tokens.weight")


def test_streamed_layers_find_the_same_circuit(tmp_path):
    """Layers that are read one by one come from the file in the same order and with the same numbers."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(attention_bias=True), kind="Q4_1")
    checkpoint, config = formats.open_checkpoint(path), formats.read_config(path)
    from cna_kernels.model.checkpoint.load import load_layer

    whole = load(path, dtype="float32").transformer
    layer = load_layer(checkpoint, config, 1, dtype=torch.float32, device="cpu")
    for name, one in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        two = getattr(whole.layers[1].get_submodule(owner), leaf)
        parts = two if isinstance(two, tuple) else (two,)
        assert torch.equal(one, torch.cat([dense(part, torch.float32) for part in parts])), name


def test_a_file_larger_than_memory_is_refused(tmp_path, monkeypatch):
    """Blocks count as they lie in the file: mapped, they would be read from the disk again for every token."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind="Q8_0")
    checkpoint = formats.open_checkpoint(path)
    in_file = sum(x.end - x.start for x in checkpoint.entries.values() if len(x.shape) > 1)
    for memory, fits in ((2 * in_file, True), (in_file, False)):
        monkeypatch.setattr("cna_kernels.model.checkpoint.load.memory_of", lambda device, n=memory: n)
        if fits:
            assert load(path).transformer.n_weights() > 0
        else:
            with pytest.raises(InputError, match=r"tiny\.gguf: needs 0\.0 GiB for weights"):
                load(path)


def test_llama3_factors_are_llama3(tmp_path):
    """The numbers that the files of these tests hold are those of transformers' own embedding."""
    theirs = tiny_model(rope_parameters=LLAMA3)
    factors = torch.tensor(llama3_factors(LLAMA3, 64))
    plain = 1.0 / LLAMA3["rope_theta"] ** (torch.arange(0, 64, 2) / 64)
    assert torch.allclose(theirs.model.rotary_emb.inv_freq, plain / factors, rtol=1e-6)
    assert (factors != 1).any() and (factors != LLAMA3["factor"]).any()


def test_types_have_the_sizes_of_the_package():
    import gguf

    for number, (name, elements, n_bytes) in gguf_file.TYPES.items():
        assert gguf.GGMLQuantizationType[name] == number
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (elements, n_bytes)


def test_doctor_says_how_a_file_is_read(tmp_path, capsys):
    import json

    from cna_kernels.model.cli import main

    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind="Q4_K")
    assert main(["doctor", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "GGUF" and facts["tensors"].startswith("16 Q4_K, ") and facts["loaded as"] == "bfloat16"
    assert facts["neurons"] == "512 per layer, 1024 in all" and facts["tokenizer"] == "none"
    assert facts["decoder_sha256"] == load(path).identity()["decoder_sha256"]


def test_export(tmp_path):
    """A LoRA adapter holds the columns as they are dequantised. ``steered_gguf`` writes files with scaled columns."""
    from safetensors.torch import load_file

    from cna_kernels import Circuit
    from cna_kernels.model.checkpoint import export, lora

    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind="Q8_0")
    model = load(path)
    multipliers = export.neuron_multipliers([Circuit(((1, 7, 1.0), (1, 300, -1.0)), 2, 512)], [0.0])
    lora.to_lora(model.checkpoint, model.config, multipliers, tmp_path / "lora")
    adapter = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    columns = as_transformers_reads(path).model.layers[1].mlp.down_proj.weight[:, [7, 300]]
    (b,) = [value for name, value in adapter.items() if "lora_B" in name]
    assert torch.equal(b, -columns) and b.abs().max() > 0.01
    with pytest.raises(InputError, match=r"tiny\.gguf: is a GGUF file: steered_gguf"):
        export.to_checkpoint(path, model.checkpoint, multipliers, tmp_path / "scaled")
    assert not (tmp_path / "scaled").exists()


def test_estimate(tmp_path):
    from cna_kernels.model.discovery.estimate import estimate

    write_checkpoint("llama", tmp_path / "hf")
    with pytest.raises(InputError, match="holds no tokenizer"):  # read as far as the tokenizer, which is not there
        estimate(write_gguf(tmp_path / "tiny.gguf", tiny_model()), [("a", "b")], device="cpu")
