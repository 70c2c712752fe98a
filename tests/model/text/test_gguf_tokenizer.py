"""Tokenizers of GGUF files: the ids of the tokenizer that was written, and of transformers' reading of the file."""

import json

import gguf
import numpy as np
import pytest
import transformers
from tokenizers import Regex, pre_tokenizers

from cna_kernels.errors import InputError
from cna_kernels.model.checkpoint.gguf_file import read_gguf
from cna_kernels.model.text.gguf_tokenizer import RULES, gguf_stop_ids
from cna_kernels.model.text.tokenizer import Tokenizer, stop_ids
from gguf_tokenizers import CHATML, PRE, SPECIAL, TEXTS, byte_level, sentencepiece


def written(path, backend, model, *, pre=None, fields=(), merges=True):
    """A GGUF file that holds this tokenizer and no model to speak of."""
    record = json.loads(backend.to_str())
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get)
    added = {token["content"]: token["special"] for token in record["added_tokens"]}
    kinds = [(3 if added[token] else 4) if token in added else 1 for token in tokens]
    if model == "llama":
        kinds = [6 if token.startswith("<0x") else {"<unk>": 2, "<s>": 3, "</s>": 3}.get(token, 1) for token in tokens]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in record["model"]["merges"]]
    if model == "llama":
        rank = {"".join(pair): -float(number) for number, pair in reversed(list(enumerate(pairs)))}
        writer.add_token_scores([rank.get(token, -1e4) for token in tokens])
    elif merges:
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    for name, value in fields:
        getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tokens


@pytest.mark.parametrize("rule", PRE)
def test_ids_are_those_of_the_tokenizer_that_was_written(tmp_path, rule):
    backend = byte_level(rule)
    fields = [("bos_token_id", 0), ("eos_token_id", 2), ("add_bos_token", False)]
    path, tokens = written(tmp_path / "t.gguf", backend, "gpt2", pre=rule, fields=fields)
    here = Tokenizer(path, len(tokens))
    for text in TEXTS:
        assert here.encode(text) == backend.encode(text).ids, text
        assert here.decode(here.encode(text), keep=SPECIAL) == backend.decode(backend.encode(text).ids, False)
    assert here.encode("<think>") == [tokens.index("<think>")] and "<think>" not in here.special_texts
    assert len(set(map(str, map(here.encode, TEXTS)))) == len(TEXTS)
    assert (here.bos_id, here.eos_id) == (0, 2)


@pytest.mark.parametrize("rule", ["llama-bpe", "qwen2"])
def test_ids_are_those_of_transformers_reading(tmp_path, rule):
    fields = [("bos_token_id", 0), ("eos_token_id", 2), ("add_bos_token", False), ("chat_template", CHATML)]
    path, tokens = written(tmp_path / "t.gguf", byte_level(rule), "gpt2", pre=rule, fields=fields)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    here = Tokenizer(path, len(tokens))
    for text in TEXTS:
        assert here.encode(text) == theirs.encode(text), text
    chat = [{"role": "user", "content": "hi 12345"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False)
    assert here.template.render([chat]) == [rendered] and "<|im_start|>assistant" in rendered
    assert here.template.where == path


@pytest.mark.parametrize("fields", [(), (("add_space_prefix", False),)], ids=["space in front", "no space"])
def test_sentencepiece(tmp_path, fields):
    backend = sentencepiece()
    fields = [("bos_token_id", 1), ("eos_token_id", 2), ("unk_token_id", 0), *fields]
    path, tokens = written(tmp_path / "t.gguf", backend, "llama", fields=fields)
    here = Tokenizer(path, len(tokens))
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    plain = [text for text in TEXTS if "<|" not in text]
    assert here.adds_bos
    for text in plain:
        if len(fields) == 3:
            assert here.encode(text) == theirs.encode(text), text
            assert here.encode_answer(text) == backend.encode(text).ids, text
        assert here.decode(here.encode(text)).strip() == text.strip()
    first = here.token(here.encode_answer("capital")[0])
    assert first.startswith("▁") == (len(fields) == 3), first


@pytest.mark.parametrize(
    ("rule", "fields", "expected"),
    [
        ("llama-bpe", (), [0, None]),  # these models put a BOS in front where the file says nothing
        ("smollm", (), [None, None]),
        ("smollm", (("add_bos_token", True),), [0, None]),
        ("llama-bpe", (("add_bos_token", False), ("add_eos_token", True)), [None, 2]),
        ("llama-bpe", (("add_bos_token", True), ("add_eos_token", True)), [0, 2]),
    ],
)
def test_tokens_around_a_text(tmp_path, rule, fields, expected):
    fields = [("bos_token_id", 0), ("eos_token_id", 2), *fields]
    path, tokens = written(tmp_path / "t.gguf", byte_level(rule), "gpt2", pre=rule, fields=fields)
    here = Tokenizer(path, len(tokens))
    around = [[number] if number is not None else [] for number in expected]
    assert here.encode("capital") == around[0] + here.encode_answer("capital") + around[1]
    assert here.adds_bos == (expected[0] is not None)


def test_stop_ids(tmp_path):
    """The ids that the file names, and control tokens that end an answer in any model."""
    backend = byte_level("smollm")
    backend.add_special_tokens(["<|eot_id|>", "<other>"])
    backend.add_tokens(["</s>"])  # of no control: it may be text
    number = {token: backend.token_to_id(token) for token in ("<|eot_id|>", "<other>")}
    fields = [("eos_token_id", 2), ("eom_token_id", number["<other>"])]
    path, tokens = written(tmp_path / "t.gguf", backend, "gpt2", pre="smollm", fields=fields)
    expected = {0, 2, number["<|eot_id|>"], number["<other>"]}  # 0: <|endoftext|>
    assert gguf_stop_ids(path) == expected
    assert stop_ids(path, Tokenizer(path, len(tokens)), len(tokens)) == expected


def test_named_templates(tmp_path):
    fields = [("chat_template", [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}])]
    path, tokens = written(tmp_path / "t.gguf", byte_level("gpt-2"), "gpt2", pre="gpt-2", fields=fields)
    assert Tokenizer(path, len(tokens)).template.source == "A"
    assert read_gguf(path).metadata.record["tokenizer.chat_template.tool_use"] == "B"


def test_a_file_without_a_tokenizer(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_uint32("tokenizer.ggml.token_type", 3)  # of no token
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    here = Tokenizer(tmp_path / "t.gguf", 10)
    with pytest.raises(InputError, match="holds no tokenizer"):
        here.encode("x")
    assert gguf_stop_ids(tmp_path / "t.gguf") == set()


FAULTS = [
    (dict(pre="newest"), "tokenizer.ggml.pre: expected "),
    (dict(pre=None), "tokenizer.ggml.pre: is missing"),
    (dict(merges=False, pre="gpt-2"), "tokenizer.ggml.merges: is missing"),
    (dict(fields=[("bos_token_id", 100_000)], pre="gpt-2"), "tokenizer.ggml.bos_token_id: expected a whole number"),
]


@pytest.mark.parametrize(("how", "what"), FAULTS, ids=[each[1] for each in FAULTS])
def test_faults_name_the_field(tmp_path, how, what):
    path, tokens = written(tmp_path / "t.gguf", byte_level("gpt-2"), "gpt2", **how)
    with pytest.raises(InputError) as caught:
        Tokenizer(path, len(tokens))
    assert f"{path}: {what}" in str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "none", "GPT2"])
def test_kinds_that_are_not_read(tmp_path, kind):
    path, tokens = written(tmp_path / "t.gguf", byte_level("gpt-2"), kind, pre="gpt-2")
    with pytest.raises(InputError, match=f"tokenizer.ggml.model: expected gpt2 or llama, got '{kind}'"):
        Tokenizer(path, len(tokens))


def test_a_piece_that_would_take_hours(tmp_path):
    """All ways to divide a piece of a million characters are 10^12 characters."""
    backend = sentencepiece()
    backend.add_tokens(["a" * 1_000_000])
    path, tokens = written(tmp_path / "t.gguf", backend, "llama")
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.tokens\[500\]: has 1000000 characters, more than the 512"):
        Tokenizer(path, len(tokens))


def test_every_rule_is_a_pattern():
    for patterns in RULES.values():
        for pattern in patterns:
            assert pre_tokenizers.Split(Regex(pattern), behavior="isolated").pre_tokenize_str("a b 12")
