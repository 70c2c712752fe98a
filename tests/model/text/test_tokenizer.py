"""The tokenizer: BOS, ids within the vocabulary, stop ids, hostile files."""

import json
import sys

import pytest

from cna_kernels import InputError
from cna_kernels.model import demo_checkpoint
from cna_kernels.model.text.tokenizer import Tokenizer, stop_ids
from tiny import SPECIAL, TEMPLATE, TEXT_VOCABULARY, set_field, write_text_files


def add_token(directory, number, content):
    """Add a special token to tokenizer.json."""
    path = directory / "tokenizer.json"
    record = json.loads(path.read_text())
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    record["added_tokens"].append({"id": number, "content": content, **flags})
    path.write_text(json.dumps(record))


BOS, END = (SPECIAL.index(token) for token in ("<s>", "<end>"))


def test_plain_text_gets_the_bos_of_the_tokenizer(directory):
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    assert tokenizer.adds_bos and tokenizer.encode("hi")[0] == BOS and tokenizer.encode("hi").count(BOS) == 1
    assert tokenizer.encode("<s>hi") == [BOS, *tokenizer.encode("hi")]  # a BOS in the text is the user's own
    assert tokenizer.decode(tokenizer.encode("naïve 1 + 2\n")) == "naïve 1 + 2\n"


def test_no_bos_where_the_checkpoint_adds_none(tmp_path):
    write_text_files(tmp_path, adds_bos=False)
    tokenizer = Tokenizer(tmp_path, TEXT_VOCABULARY)
    assert BOS not in tokenizer.encode("hi")
    set_field(tmp_path, chat_template=TEMPLATE.replace("{{ bos_token }}", ""))
    assert BOS not in Tokenizer(tmp_path, TEXT_VOCABULARY).encode_chat(["hi"])[0]


def test_special_tokens_that_are_kept(directory):
    add_token(directory, TEXT_VOCABULARY, "[THINK]")
    add_token(directory, TEXT_VOCABULARY + 1, "[/THINK]")
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY + 2)
    ids = tokenizer.encode("[THINK]no, \u00e9[/THINK] yes<end>")
    assert tokenizer.decode(ids) == "no, \u00e9 yes"
    assert tokenizer.decode(ids, keep=("[THINK]", "[/THINK]", "<think>")) == "[THINK]no, \u00e9[/THINK] yes"
    assert tokenizer.decode([], keep=("[THINK]",)) == ""


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": {"type": "BPE"}}', b"\xff", b"\x80\x04pickle"])
def test_hostile_tokenizers(directory, content):
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: ") as caught:
        Tokenizer(directory, TEXT_VOCABULARY)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_are_refused_where_they_are_used(directory):
    add_token(directory, 262, "[PAD]")
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    assert tokenizer.encode("hi")[0] == BOS
    with pytest.raises(InputError, match=r"the text holds '\[PAD\]', whose id 262 is beyond the model's 262 rows"):
        tokenizer.encode("hi[PAD]")


def test_ids_that_a_post_processor_invents(directory):
    path = directory / "tokenizer.json"
    record = json.loads(path.read_text())
    record["post_processor"] = {"type": "BertProcessing", "sep": ["</s>", 99999], "cls": ["<s>", 99999]}
    path.write_text(json.dumps(record))
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    with pytest.raises(InputError, match="whose id 99999 is beyond the model's 262 rows"):
        tokenizer.encode("hi")


def test_dropout_in_a_tokenizer(directory):
    path = directory / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["dropout"] = 0.5
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"tokenizer\.json: model\.dropout: expected none, got 0\.5"):
        Tokenizer(directory, TEXT_VOCABULARY)


def test_no_tokenizer(directory):
    """Token ids work; whatever needs text names what is missing."""
    (directory / "tokenizer.json").unlink()
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    assert tokenizer.template is None and tokenizer.sha256 is None and stop_ids(directory, tokenizer, 262) == {2, 5}
    for use in (lambda: tokenizer.encode("hi"), lambda: tokenizer.decode([3])):
        with pytest.raises(InputError, match=r"holds no tokenizer \(tokenizer\.json, or .*\); it works with token ids"):
            use()


def test_a_tokenizer_that_only_transformers_reads(directory, monkeypatch):
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    with pytest.raises(InputError, match=r"tokenizer\.model: only transformers reads .*: pip install transformers"):
        Tokenizer(directory, TEXT_VOCABULARY)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"write a tokenizer\.json once with save_pretrained$"):
        Tokenizer(directory, TEXT_VOCABULARY)


@pytest.mark.parametrize(
    ("generation", "config", "eos", "expected"),
    [
        ([2, 5], None, "</s>", {2, 5}),
        (5, None, "</s>", {2, 5}),
        (None, 7, "</s>", {2, 7}),
        (5, 7, "</s>", {2, 5}),  # config.json is read where generation_config.json says nothing
        (None, None, "</s>", {2}),
        (None, None, None, set()),
        ([2, 999], None, "<end>", {2, 5}),  # no answer holds an id beyond the vocabulary
    ],
)
def test_stop_ids(directory, generation, config, eos, expected):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        (directory / name).write_text(json.dumps({} if value is None else {"eos_token_id": value}))
    set_field(directory, eos_token=eos)
    assert stop_ids(directory, Tokenizer(directory, TEXT_VOCABULARY), TEXT_VOCABULARY) == expected


def test_stop_ids_that_are_none(directory):
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, -1]}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id: expected ids, got -1"):
        stop_ids(directory, Tokenizer(directory, TEXT_VOCABULARY), TEXT_VOCABULARY)


BAD_SETTINGS = [
    ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "added_tokens_decoder.id: expected a token's id, got 'x'"),
    ({"added_tokens_decoder": {"9": {"content": 3}}}, "added_tokens_decoder.9: expected a token's text"),
    ({"added_tokens_decoder": {"9": {"content": "<a>", "lstrip": 1}}}, "9.lstrip: expected true or false, got 1"),
    ({"bos_token": 7}, "bos_token: expected a token's text, got 7"),
    ({"additional_special_tokens": [7]}, "additional_special_tokens: expected a token's text, got 7"),
    ({"tokenizer_class": ["x"]}, "tokenizer_class: expected text"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_settings_that_make_no_sense(directory, changes, message):
    set_field(directory, **changes)
    with pytest.raises(InputError) as caught:
        Tokenizer(directory, TEXT_VOCABULARY)
    assert "tokenizer_config.json: " in str(caught.value) and message in str(caught.value)


def test_a_first_token_that_is_a_space_alone():
    """Every number would be the answer."""
    tokenizer = Tokenizer(demo_checkpoint("instruct"), 1024)
    assert tokenizer.encode_answer(" 19")[0] == tokenizer.encode_answer(" 7")[0], (
        "the bundled vocabulary is of this kind"
    )
    with pytest.raises(
        InputError, match=r"place: ' 19' begins with a token that is a space alone: leave the space out"
    ):
        tokenizer.first_ids([" the", " 19"], "place")
    assert tokenizer.first_ids(["19", " the", "\n", " "], "place")


def test_the_hash_is_of_what_the_tokens_are(directory):
    before = Tokenizer(directory, TEXT_VOCABULARY).sha256
    set_field(directory, chat_template="x", clean_up_tokenization_spaces=True)
    assert Tokenizer(directory, TEXT_VOCABULARY).sha256 == before
    set_field(directory, additional_special_tokens=["<new>"])
    assert Tokenizer(directory, TEXT_VOCABULARY).sha256 != before
