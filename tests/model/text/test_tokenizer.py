"""The tokenizer: one BOS, ids within the vocabulary, stop ids, hostile files."""

import json

import pytest

from cna_kernels import InputError
from cna_kernels.model.text.tokenizer import Tokenizer, stop_ids
from tiny import SPECIAL, TEMPLATE, TEXT_VOCABULARY, set_field, write_text_files

BOS, END = (SPECIAL.index(token) for token in ("<s>", "<end>"))


def test_plain_text_has_one_bos(directory):
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    assert tokenizer.encode("hi")[0] == BOS and tokenizer.encode("hi").count(BOS) == 1
    assert tokenizer.encode("<s>hi") == tokenizer.encode("hi") == tokenizer.encode("<s><s>hi")
    assert tokenizer.decode(tokenizer.encode("naïve 1 + 2\n")) == "naïve 1 + 2\n"


def test_no_bos_where_the_checkpoint_adds_none(tmp_path):
    write_text_files(tmp_path, adds_bos=False)
    tokenizer = Tokenizer(tmp_path, TEXT_VOCABULARY)
    assert BOS not in tokenizer.encode("hi")
    set_field(tmp_path, chat_template=TEMPLATE.replace("{{ bos_token }}", ""))
    assert BOS not in Tokenizer(tmp_path, TEXT_VOCABULARY).encode_chat(["hi"])[0]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": {"type": "BPE"}}', b"\xff", b"\x80\x04pickle"])
def test_hostile_tokenizers(directory, content):
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: ") as caught:
        Tokenizer(directory, TEXT_VOCABULARY)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary(directory):
    with pytest.raises(InputError, match="its largest id is 261, the model has 261 vocabulary rows"):
        Tokenizer(directory, TEXT_VOCABULARY - 1)


def test_ids_that_a_post_processor_invents(directory):
    path = directory / "tokenizer.json"
    record = json.loads(path.read_text())
    record["post_processor"] = {"type": "BertProcessing", "sep": ["</s>", 99999], "cls": ["<s>", 99999]}
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="gives id 99999, the model has 262 vocabulary rows"):
        Tokenizer(directory, TEXT_VOCABULARY)


def test_dropout_in_a_tokenizer(directory):
    path = directory / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["dropout"] = 0.5
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"tokenizer\.json: model\.dropout: expected none, got 0\.5"):
        Tokenizer(directory, TEXT_VOCABULARY)


def test_no_tokenizer(directory):
    (directory / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: No such file"):
        Tokenizer(directory, TEXT_VOCABULARY)


def test_stop_ids(directory):
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    assert stop_ids(directory, tokenizer, TEXT_VOCABULARY) == {2, 5}
    (directory / "generation_config.json").unlink()
    (directory / "config.json").write_text('{"eos_token_id": 7}')
    assert stop_ids(directory, tokenizer, TEXT_VOCABULARY) == {7}
    (directory / "config.json").write_text("{}")
    assert stop_ids(directory, tokenizer, TEXT_VOCABULARY) == {SPECIAL.index("</s>")}
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 999]}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id: expected ids below 262, got 999"):
        stop_ids(directory, tokenizer, TEXT_VOCABULARY)
