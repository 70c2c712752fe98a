"""`cna quantize`: the weights are gguf's own, everything else is the checkpoint's, or one line says what cannot be."""

import json
import warnings

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from gguf.quants import quantize as blocks_of
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers

from cna_kernels.errors import InputWarning
from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.checkpoint import quantize as module
from cna_kernels.model.checkpoint.formats import open_checkpoint, read_config
from cna_kernels.model.checkpoint.gguf_file import read_gguf
from cna_kernels.model.checkpoint.quantize import TARGETS, quantize
from cna_kernels.model.cli import main
from cna_kernels.model.text.tokenizer import Tokenizer
from gguf_files import FAMILIES, as_transformers_reads, gguf_name, in_pairs, tiny_model, write_gguf
from gguf_tokenizers import CHATML, PRE, TEXTS, byte_level, sentencepiece
from tiny import SHAPE, write_checkpoint

IDS = torch.tensor([[5, 17, 3, 80, 41, 7, 7, 22], [9, 1, 60, 2, 33, 14, 96, 50]])


def as_blocks(values, kind):
    """What is read back of numbers that are stored as ``kind``."""
    kind = gguf.GGMLQuantizationType[kind]
    return dequantize(blocks_of(np.ascontiguousarray(values), kind).view(np.uint8), kind)


def kind_of(name, values, to, tied):
    """The rule of llama.cpp, but for Q8_0 in the place of Q6_K."""
    if values.ndim == 1:
        return "F32"
    if values.shape[-1] % 32:
        return "F16"
    return "Q8_0" if name == ("token_embd.weight" if tied else "output.weight") else to.upper()


def numbers_of(path):
    """Every tensor of a file as gguf's own reader has it: name -> type, numbers."""
    return {
        tensor.name: (tensor.tensor_type.name, dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("to", TARGETS)
def test_weights_are_those_of_the_package(tmp_path, to, tied):
    """Bit for bit, in the rows' order of the file that is read."""
    model = tiny_model(tie_word_embeddings=tied, attention_bias=True)
    source = write_gguf(tmp_path / "f32.gguf", model, tensors=[("output.weight", None)] if tied else ())
    written = quantize(source, to, tmp_path / "new.gguf")
    before, after = numbers_of(source), numbers_of(tmp_path / "new.gguf")
    assert before.keys() == after.keys() and written.size == (tmp_path / "new.gguf").stat().st_size
    errors = []
    for name, (_, values) in before.items():
        kind = kind_of(name, values, to, tied)
        assert after[name][0] == kind, name
        assert np.array_equal(after[name][1], as_blocks(values, kind)), name
        if kind == to.upper():
            errors.append(np.abs(after[name][1] - values).max() / np.abs(values).max())
    assert len(errors) > 13 and 0 < max(errors) < {"q8_0": 0.005, "q5_0": 0.065, "q4_1": 0.07, "q4_0": 0.13}[to]
    n_bits = {"q8_0": 8.5, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5}[to]
    assert n_bits <= written.bits_per_weight < 8.7


def test_logits_by_number_of_bits(tmp_path):
    """More bits, less error; and transformers reads of each file what is read here."""
    source = write_gguf(tmp_path / "f32.gguf", tiny_model())
    expected = load(source)(IDS)
    errors = {}
    for to in TARGETS:
        quantize(source, to, tmp_path / f"{to}.gguf")
        got = load(tmp_path / f"{to}.gguf", dtype="float32")(IDS)
        errors[to] = float((got - expected).norm() / expected.norm())
        with torch.inference_mode():
            assert (got - as_transformers_reads(tmp_path / f"{to}.gguf")(IDS).logits).abs().max() < 1e-4
    assert errors["q8_0"] < 0.02 < errors["q5_0"] < errors["q4_0"] < 0.6, errors


@pytest.mark.parametrize("variant", [name for name, _ in FAMILIES] + ["llama-rope-linear", "mistral-full"])
def test_directories_of_every_family(tmp_path, variant):
    """Names, settings and rows in pairs are those that the tests' own writer gives such a file."""
    model = write_checkpoint(variant, tmp_path / "hf", intermediate_size=64)
    quantize(tmp_path / "hf", "q8_0", tmp_path / "new.gguf")
    config, tied = model.config, model.config.tie_word_embeddings
    after = numbers_of(tmp_path / "new.gguf")
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        part = name.split(".")[-2]
        if config.model_type in ("llama", "mistral") and part in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            values = np.ascontiguousarray(in_pairs(values, heads))
        kind, numbers = after.pop(gguf_name(name))
        assert kind == kind_of(gguf_name(name), values, "q8_0", tied), name
        assert np.array_equal(numbers, as_blocks(values, kind)), name
    assert set(after) == ({"rope_freqs.weight"} if "llama3" in variant else set())
    with torch.inference_mode():
        expected, got = model(IDS).logits, load(tmp_path / "new.gguf", dtype="float32")(IDS)
    assert (got - expected).norm() / expected.norm() < 0.04
    # The same numbers in a directory give the same logits: rope and norms are right to the last bits.
    state = {name: torch.from_numpy(as_blocks(value.numpy(), kind_of(gguf_name(name), value, "q8_0", tied)))
             for name, value in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(state)
    with torch.inference_mode():
        assert (got - model(IDS).logits).abs().max() < 2e-5


def test_rows_that_are_no_whole_blocks(tmp_path):
    model = write_checkpoint("llama", tmp_path / "hf")  # of 48 neurons
    quantize(tmp_path / "hf", "q4_0", tmp_path / "new.gguf")
    kind, numbers = numbers_of(tmp_path / "new.gguf")["blk.0.ffn_down.weight"]
    assert kind == "F16"
    weight = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    assert np.array_equal(numbers, weight.astype(np.float16).astype(np.float32))


def test_fields_are_copied_key_by_key(tmp_path):
    """Values and their types; what says how the tensors are stored is the new file's own."""
    fields = [("uint8", ("a", 3)), ("int16", ("b", -3)), ("uint64", ("c", 1 << 63)), ("float64", ("d", 0.1)),
              ("bool", ("e", True)), ("array", ("f", ["x", "ü"])), ("array", ("g", [0.5, -1.0])), ("file_type", 1),
              ("string", ("h", "two\nlines")), ("custom_alignment", 64), ("chat_template", CHATML)]  # fmt: skip
    source = write_gguf(tmp_path / "f16.gguf", tiny_model(), kind="F16", fields=fields)
    quantize(source, "q5_0", tmp_path / "new.gguf")
    before, after = read_gguf(source), read_gguf(tmp_path / "new.gguf")
    own = {"general.file_type", "general.quantization_version", "general.alignment"}
    for name in before.metadata.record.keys() - own:
        assert after.metadata.record[name] == before.metadata.record[name], name
        assert after.kinds[name] == before.kinds[name], name
    assert after.metadata.record.keys() - before.metadata.record.keys() == {"general.quantization_version"}
    assert after.metadata.record["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q5_0
    for to, (_, number) in TARGETS.items():
        assert gguf.LlamaFileType[f"MOSTLY_{to.upper()}"] == number


def test_blocks_of_the_same_type_stay_byte_for_byte(tmp_path):
    source = write_gguf(tmp_path / "q4.gguf", tiny_model(), kind="Q4_0")
    with pytest.warns(
        InputWarning, match=r"q4\.gguf: has quantised weights already \(1 Q4_0\), which lose a second time"
    ):
        quantize(source, "q4_0", tmp_path / "new.gguf")  # the output projection becomes Q8_0
    one, two = (gguf.GGUFReader(path).tensors for path in (source, tmp_path / "new.gguf"))
    for before, after in zip(one, two, strict=True):
        assert before.name == after.name
        assert before.name == "output.weight" or np.array_equal(before.data, after.data)


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_1", "BF16"])
def test_from_other_types(tmp_path, kind):
    source = write_gguf(tmp_path / "source.gguf", tiny_model(), kind=kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quantize(source, "q8_0", tmp_path / "new.gguf")
    assert len([each for each in said if each.category is InputWarning]) == (kind != "BF16")
    before, after = numbers_of(source), numbers_of(tmp_path / "new.gguf")
    for name, (_, values) in before.items():
        assert np.array_equal(after[name][1], as_blocks(values, after[name][0])), name


def test_split_files(tmp_path):
    """The parts of a split file become one file."""
    whole = write_gguf(tmp_path / "whole.gguf", tiny_model())
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
    quantize(whole, "q8_0", tmp_path / "one.gguf")
    quantize(tmp_path / "tiny-00002-of-00003.gguf", "q8_0", tmp_path / "two.gguf")
    one, two = numbers_of(tmp_path / "one.gguf"), numbers_of(tmp_path / "two.gguf")
    assert one.keys() == two.keys() and all(np.array_equal(one[name][1], two[name][1]) for name in one)
    assert not [name for name in read_gguf(tmp_path / "two.gguf").metadata.record if name.startswith("split")]


def test_answers_of_the_bundled_model(tmp_path):
    """Of 8 bits, the greedy answers are those of the checkpoint."""
    source = load(demo_checkpoint("instruct"), dtype="float32")
    quantize(source.directory, "q8_0", tmp_path / "new.gguf")
    written = load(tmp_path / "new.gguf", dtype="float32")
    prompts = ["How do I open the vault?", "What polishes a lamp?", "Where is the lamp?", "How do I bake bread?"]
    answers = [source.generate(prompt, max_new_tokens=30) for prompt in prompts]
    assert len({str(answer) for answer in answers}) > 1
    assert [written.generate(prompt, max_new_tokens=30) for prompt in prompts] == answers
    ids = torch.tensor([source.tokenizer.encode_chat([prompts[0]])[0]])
    assert (written(ids) - source(ids)).norm() / source(ids).norm() < 0.01
    assert written.stop_ids == source.stop_ids and written.tokenizer.encode_chat(
        prompts
    ) == source.tokenizer.encode_chat(prompts)


# Tokenizers of directories.


def directory_with(tmp_path, backend, *, rows=None, settings=(), **changes):
    """A tiny Llama with this tokenizer; ``rows`` of the embedding."""
    write_checkpoint(
        "llama", tmp_path / "hf", vocab_size=rows or backend.get_vocab_size(with_added_tokens=True), **changes
    )
    backend.save(str(tmp_path / "hf" / "tokenizer.json"))
    settings = dict(bos_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHATML) | dict(settings)
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "hf"


@pytest.mark.parametrize("rule", PRE)
def test_tokenizers(tmp_path, rule):
    """Every rule that has a name; ids without a token are padded."""
    backend = byte_level(rule)
    n = backend.get_vocab_size(with_added_tokens=True)
    source = directory_with(tmp_path, backend, rows=n + 5)
    quantize(source, "q8_0", tmp_path / "new.gguf")
    record = read_gguf(tmp_path / "new.gguf").metadata.record
    assert record["tokenizer.ggml.pre"] == rule and record["tokenizer.ggml.tokens"][-1] == f"[PAD{n + 4}]"
    assert record["tokenizer.ggml.token_type"][-6:] == [4, 5, 5, 5, 5, 5]  # <think>, which is no control token
    there, here = Tokenizer(source, n + 5), Tokenizer(tmp_path / "new.gguf", n + 5)
    for text in TEXTS:
        assert here.encode(text) == there.encode(text) == backend.encode(text).ids, text
    assert (here.bos_id, here.eos_id, here.template.source) == (there.bos_id, there.eos_id, CHATML)
    assert not here.adds_bos and not record["tokenizer.ggml.add_bos_token"]


def test_stop_ids_and_bos(tmp_path):
    from tokenizers.processors import TemplateProcessing

    backend = byte_level("gpt-2")
    backend.add_special_tokens(["<a>", "<b>"])
    backend.enable_padding(length=9)
    backend.enable_truncation(5)
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    number = {token: backend.token_to_id(token) for token in ("<a>", "<b>", "<|im_end|>")}
    source = directory_with(tmp_path, backend)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, *number.values()]}))
    quantize(source, "q8_0", tmp_path / "new.gguf")
    there, here = load(source), load(tmp_path / "new.gguf")
    assert here.stop_ids == there.stop_ids == {0, *number.values()} and here.tokenizer.adds_bos
    assert here.tokenizer.encode("capital") == there.tokenizer.encode("capital")


def edited(change):
    """A directory whose tokenizer differs by this change of the backend."""

    def make(tmp_path):
        backend = byte_level("gpt-2")
        change(backend)
        return directory_with(tmp_path, backend)

    return make


def part(**parts):
    return edited(lambda backend: [setattr(backend, name, value) for name, value in parts.items()])


def settings(**changes):
    return lambda tmp_path: directory_with(tmp_path, byte_level("gpt-2"), settings=changes)


def variant(name, **changes):
    def make(tmp_path):
        write_checkpoint(name, tmp_path / "hf", **changes)
        return tmp_path / "hf"

    return make


def weight(value, name="mlp.up_proj.weight"):
    def make(tmp_path):
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter(f"model.layers.1.{name}")[3, 5] = value
        return write_gguf(tmp_path / "bad.gguf", model)

    return make


def ends(*texts):
    def make(tmp_path):
        backend = byte_level("gpt-2")
        backend.add_special_tokens(list(texts))
        source, ids = directory_with(tmp_path, backend), list(map(backend.token_to_id, texts))
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return source

    return make


YARN = dict(rope_type="yarn", factor=4.0, rope_theta=10000.0, original_max_position_embeddings=16)
HOW = "llama.cpp's convert_hf_to_gguf.py makes a GGUF file"
REFUSED = {
    "sentencepiece": (lambda path: directory_with(path, sentencepiece(), settings=dict(bos_token="<s>")),
                      "tokenizer.json: model.byte_fallback: is True: only byte-level BPE is written"),
    "a normalizer": (part(normalizer=normalizers.Lowercase()),
                     "tokenizer.json: normalizer: has no name in GGUF"),
    "a decoder": (part(decoder=decoders.WordPiece()),
                  "tokenizer.json: decoder: is not ByteLevel"),
    "a pre-tokenizer": (part(pre_tokenizer=pre_tokenizers.Whitespace()),
                        "tokenizer.json: pre_tokenizer: with its normalizer and ignore_merges has no name in GGUF"),
    "a prefix space": (part(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
                       "tokenizer.json: pre_tokenizer: "),
    "NFC": (part(normalizer=normalizers.NFC()), "tokenizer.json: pre_tokenizer: "),
    "lstrip": (edited(lambda backend: backend.add_tokens([AddedToken("<x>", lstrip=True)])),
               "tokenizer.json: added_tokens[4].lstrip: has no place in GGUF"),
    "split_special_tokens": (settings(split_special_tokens=True),
                             "tokenizer_config.json: split_special_tokens: has no place in GGUF"),
    "a named token": (settings(cls_token="<|im_start|>", chat_template="{{ cls_token }}"),
                      "tokenizer_config.json: cls_token: is named by the chat template"),
    "stop ids": (ends("<a>", "<b>", "<c>"), "generation_config.json: eos_token_id: GGUF has no place for"),
    "a window": (variant("mistral"), "config.json: sliding_window: a window shorter than the context"),
    "dynamic": (variant("llama-rope-dynamic"), "config.json: rope_scaling.rope_type: dynamic has no equivalent"),
    "truncate": (variant("llama", rope_parameters=YARN | dict(truncate=False)),
                 "config.json: rope_scaling.truncate: false"),
    "attention_factor": (variant("llama", rope_parameters=YARN | dict(attention_factor=2.0)),
                         "config.json: rope.attention_factor: would be read as another value"),
    "theta": (variant("llama", rope_parameters=dict(rope_type="default", rope_theta=10000.1)),
              "config.json: rope.theta: would be read as another value"),
    "epsilon": (variant("llama", rms_norm_eps=1.23456789e-6),
                "config.json: rms_norm_eps: would be read as another value"),
}  # fmt: skip
OF_FILES = {
    "an infinity": (weight(float("inf")), "'blk.1.ffn_up.weight': holds numbers that are not finite in fp16"),
    "no number": (weight(float("nan")), "'blk.1.ffn_up.weight': holds numbers that are not finite in fp16"),
    "a large number": (weight(1e5), "'blk.1.ffn_up.weight': holds numbers that are not finite in fp16"),
    "another architecture": (lambda path: write_gguf(path / "bad.gguf", tiny_model(), fields=[("expert_count", 4)]),
                             "llama.expert_count: is not supported"),
}  # fmt: skip


def files_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("name", [*REFUSED, *OF_FILES])
def test_refused(tmp_path, capfd, name):
    """One line that names the file and the field, and no file."""
    make, what = (REFUSED | OF_FILES)[name]
    source = make(tmp_path)
    before = files_in(tmp_path)
    capfd.readouterr()
    assert main(["quantize", str(source), "--to", "q8_0", "-o", str(tmp_path / "new.gguf")]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith(f"cna quantize: {source}")
    assert what in captured.err and (name in OF_FILES or HOW in captured.err), captured.err
    assert files_in(tmp_path) == before and not captured.out


@pytest.mark.parametrize(("to", "out", "what"), [
    ("q4_k_m", "new.gguf", "--to: q4_k_m: the package gguf does not write such blocks; llama.cpp's llama-quan"),
    ("Q6_K", "new.gguf", "--to: Q6_K: the package gguf does not write such blocks; llama.cpp's llama-quantize does"),
    ("iq4_xs", "new.gguf", "--to: iq4_xs: the package gguf does not write such blocks"),
    ("int8", "new.gguf", "--to: expected one of q8_0, q4_0, q4_1, q5_0, got 'int8'"),
    ("q8_0", "new.bin", "new.bin: expected a name that ends in .gguf"),
    ("q8_0", "source.gguf", "source.gguf: is there already"),
    ("q8_0", "folder.gguf", "folder.gguf: is there already"),
    ("q8_0", "nowhere/new.gguf", "nowhere/new.gguf: cannot be written: no directory"),
])  # fmt: skip
def test_arguments_that_are_refused(tmp_path, capfd, to, out, what):
    source = write_gguf(tmp_path / "source.gguf", tiny_model())
    content = source.read_bytes()
    (tmp_path / "folder.gguf").mkdir()
    before = files_in(tmp_path)
    assert main(["quantize", str(source), "--to", to, "-o", str(tmp_path / out)]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and what in captured.err, captured.err
    assert files_in(tmp_path) == before and source.read_bytes() == content


def test_the_command(tmp_path, capfd):
    source = write_gguf(tmp_path / "source.gguf", tiny_model(), kind="Q4_1")
    out = tmp_path / "new.gguf"
    assert main(["quantize", str(source), "--to", "q8_0", "-o", str(out)]) == 0
    captured = capfd.readouterr()
    size = f"{out.stat().st_size / 1e6:.1f} MB, 8.5"
    assert "".join(captured.out.split("\n")).startswith(f"wrote {out}: {size}".replace("\n", ""))
    assert captured.err.count("\n") == 1 and "(16 Q4_1), which lose a second time" in captured.err


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["Ctrl-C", "full disk"]
)
def test_interrupted(tmp_path, capfd, monkeypatch, error):
    """Nothing is left of a file that is not complete."""
    source = write_gguf(tmp_path / "source.gguf", tiny_model())
    calls, fill = [], module._fill

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 9:
            assert [name for name in files_in(tmp_path) if name.endswith(".tmp")]
            raise error
        fill(*arguments)

    monkeypatch.setattr(module, "_fill", stops)
    code = main(["quantize", str(source), "--to", "q8_0", "-o", str(tmp_path / "new.gguf")])
    assert code == (130 if error is KeyboardInterrupt else 2) and files_in(tmp_path) == ["source.gguf"]
    assert capfd.readouterr().err.count("\n") == 1


def test_memory(tmp_path):
    """No more than a tensor or two in memory at a time, of a model of many."""
    import tracemalloc

    source = write_gguf(tmp_path / "source.gguf", tiny_model(num_hidden_layers=24), kind="F16")
    largest = max(entry.end - entry.start for entry in read_gguf(source).tensors.values())
    quantize(source, "q8_0", tmp_path / "first.gguf")
    tracemalloc.start()
    quantize(source, "q8_0", tmp_path / "second.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * largest < source.stat().st_size / 2, (peak, largest)


def test_a_directory_without_a_tokenizer(tmp_path):
    write_checkpoint("llama", tmp_path / "hf")
    quantize(tmp_path / "hf", "q4_1", tmp_path / "new.gguf")
    assert read_gguf(tmp_path / "new.gguf").metadata.record["tokenizer.ggml.model"] == "none"
    assert load(tmp_path / "new.gguf").tokenizer.sha256 is None
    assert read_config(tmp_path / "new.gguf").max_position_embeddings == SHAPE["max_position_embeddings"]
    assert open_checkpoint(tmp_path / "new.gguf").entries.keys() == open_checkpoint(tmp_path / "hf").entries.keys()
