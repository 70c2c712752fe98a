"""Every file that a command takes, in every bad shape: exit code 2, one printable line that names it, no traceback.

A row of ARGUMENTS is a place in a command where a file stands; a row of BAD is what stands there.
"""

import os
import shutil
import struct

import pytest

from cna_kernels import Circuit
from cna_kernels.model.cli import main
from tiny import SHAPE, write_language_model

pytest.importorskip("transformers")

NOISE = b"\x00\xff\x1b]0;title\x07\n" * 50


def fifo(path):
    os.mkfifo(path)


def huge(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def loop(path):
    path.symlink_to(path.name)


BAD = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.mkdir(),
    "noise": lambda path: path.write_bytes(NOISE),
    "brackets": lambda path: path.write_bytes(b"[" * 200_000),
    "400 digits": lambda path: path.write_bytes(b'{"neurons": {"0,0,0": 1%s}}' % (b"0" * 400)),
    "5000 digits": lambda path: path.write_bytes(b"[1%s]" % (b"0" * 5000)),
    "half a surrogate pair": lambda path: path.write_bytes(b'{"schema_version": 1, "score": "\\ud800"}'),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a loop of links": loop,
    "a FIFO": fifo,
    "a terabyte of nothing": huge,
}
TEXT = {
    "missing",
    "empty",
    "a folder",
    "noise",
    "a dangling link",
    "a loop of links",
}  # bad for a file of any text, too
JSON = TEXT | {"brackets", "400 digits", "5000 digits", "half a surrogate pair", "a FIFO", "a terabyte of nothing"}
LINES = JSON - {"a FIFO"}  # files that may be a pipe, which is waited for
FOLDER = {"missing", "empty", "noise", "a dangling link", "a loop of links", "a FIFO"}  # bad for a directory

SIDES = "--positive GOOD/p.txt --negative GOOD/p.txt"
ARGUMENTS = {  # BAD.json and so on: where the bad file stands; OUT: a folder that must stay empty
    "show": ("show BAD.json", JSON),
    "run -c": ("run MODEL -c BAD.json -p hi --max-new-tokens 1", JSON),
    "run --prompts": ("run MODEL --prompts BAD.txt", TEXT),
    "run --prompts json": ("run MODEL --prompts BAD.json", LINES),
    "run MODEL": ("run BAD -p hi", FOLDER),
    "run MODEL.gguf": ("run BAD.gguf -p hi", JSON),
    "doctor MODEL.gguf": ("doctor BAD.gguf", JSON),
    "quantize MODEL": ("quantize BAD --to q8_0 -o OUT/new.gguf", FOLDER),
    "quantize MODEL.gguf": ("quantize BAD.gguf --to q8_0 -o OUT/new.gguf", JSON),
    "quantize -o": ("quantize MODEL --to q8_0 -o BAD.gguf", (FOLDER | {"a folder"}) - {"missing"}),
    "discover --positive": ("discover MODEL --positive BAD.txt --negative GOOD/p.txt -o OUT/c.json", TEXT),
    "discover --negative": ("discover MODEL --positive GOOD/p.txt --negative BAD.jsonl -o OUT/c.json", LINES),
    "discover --contrasts": ("discover MODEL --contrasts BAD.jsonl -o OUT", LINES),
    "discover --universal-prompts": (f"discover MODEL {SIDES} --universal-prompts BAD.txt -o OUT/c.json", TEXT),
    "discover --universal-contrasts": (f"discover MODEL {SIDES} --universal-contrasts BAD.jsonl -o OUT/c.json", TEXT),
    "discover -o": (f"discover MODEL {SIDES} -o BAD", {"a folder", "a loop of links", "a FIFO"}),
    "discover --run-dir": (f"discover MODEL {SIDES} --run-dir BAD -o OUT/c.json", FOLDER - {"missing"}),
    "discover --spill": (f"discover MODEL {SIDES} --stream-layers --spill BAD -o OUT/c.json", FOLDER),
    "estimate --prompts": ("estimate MODEL --prompts BAD.txt", TEXT),
    "status": ("status BAD", FOLDER | {"a folder"}),
    "export -c": ("export MODEL -c BAD.json --to lora -o OUT/e", JSON),
    "export -o lora": ("export MODEL -c GOOD/c.json --any-model --to lora -o BAD", FOLDER - {"missing"}),
    "export -o ref-code": ("export MODEL -c GOOD/c.json --any-model --to ref-code -o BAD", {"a folder", "a FIFO"}),
    "export -o checkpoint": ("export MODEL -c GOOD/c.json --any-model --to checkpoint -o BAD", FOLDER - {"missing"}),
    "eval -c": ("eval MODEL -c BAD.json --harmful GOOD/p.txt -o OUT/e", JSON),
    "eval --text": ("eval MODEL -c GOOD/c.json --any-model --text BAD.txt -o OUT/e", TEXT - {"empty"}),
    "eval --neutral": ("eval MODEL -c GOOD/c.json --any-model --neutral BAD.txt -o OUT/e", TEXT),
    "eval --refusals": ("eval MODEL -c GOOD/c.json --any-model --harmful GOOD/p.txt --refusals BAD.txt -o OUT/e", TEXT),
    "eval --mmlu": ("eval MODEL -c GOOD/c.json --any-model --mmlu BAD.csv -o OUT/e", TEXT),
    "eval --sae": (
        f"eval MODEL -c GOOD/c.json --any-model --harmful GOOD/p.txt {SIDES} --methods sae --sae BAD.safetensors "
        "--sae-feature 0 --sae-layer 0 -o OUT/e",
        TEXT | {"brackets", "a FIFO"},
    ),
    "eval -o": ("eval MODEL -c GOOD/c.json --any-model --harmful GOOD/p.txt -o BAD", FOLDER - {"missing"}),
    "sweep --harmful": ("sweep MODEL -c GOOD/c.json --any-model --harmful BAD.txt", TEXT),
    "compare --positive": ("compare MODEL MODEL --positive BAD.txt --negative GOOD/p.txt -o OUT/e", TEXT),
}  # fmt: skip
CASES = [(name, bad) for name, (_, kinds) in ARGUMENTS.items() for bad in BAD if bad in kinds]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model, prompts and a circuit."""
    directory = tmp_path_factory.mktemp("good")
    write_language_model(directory / "model")
    (directory / "p.txt").write_text("open it\nwhy not\nx\n")
    Circuit(((0, 1, 1.0),), 3, 48).save(directory / "c.json")
    return directory


def refused(capfd, words, named):
    """Run a command that must be refused in one line with a name in it."""
    assert main(words) == 2
    captured = capfd.readouterr()
    lines = captured.err.strip().split("\n")
    lines = lines[1:] if ": model 'model' " in lines[0] else lines  # which says what runs
    assert len(lines) == 1 and lines[0].startswith(f"cna {words[0]}: ") and named in lines[0], captured.err
    assert lines[0].isprintable() and len(lines[0]) < 700 and "\x1b" not in captured.out


@pytest.mark.parametrize(("name", "bad"), CASES, ids=lambda value: value)
def test_bad_files(good, tmp_path, capfd, name, bad):
    (tmp_path / "out").mkdir()
    words = ARGUMENTS[name][0].replace("MODEL", f"{good}/model").replace("GOOD", str(good))
    words = words.replace("BAD", f"{tmp_path}/bad").replace("OUT", f"{tmp_path}/out").split()
    path = next(tmp_path / word.rpartition("/")[2] for word in words if word.startswith(f"{tmp_path}/bad"))
    BAD[bad](path)
    refused(capfd, words, path.name)
    assert not [*(tmp_path / "out").glob("*.json"), *(tmp_path / "out").glob("*.gguf")]


FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("bad", sorted(JSON - {"missing", "400 digits"}))
def test_bad_files_of_a_model(good, tmp_path, capfd, file, bad):
    shutil.copytree(good / "model", tmp_path / "model")
    path = tmp_path / "model" / file
    path.unlink()
    BAD[bad](path)
    refused(capfd, ["run", str(tmp_path / "model"), "-p", "hi", "--max-new-tokens", "1"], file)


# Changes to a whole GGUF file -> what the one line says.
GGUF = {
    "a cut header": (lambda content: content[:1000], "is cut off"),
    "cut data": (lambda content: content[:-1], "it is truncated"),
    "big-endian": (lambda content: content[:4] + content[4:8][::-1] + content[8:], "big-endian"),
    "version 4": (lambda content: content[:4] + b"\4" + content[5:], "version: is 4"),
    "architecture": (lambda content: content.replace(b"llama", b"lamma"), "general.architecture: expected llama"),
    "tokenizer": (lambda content: content.replace(b"\4\0\0\0\0\0\0\0gpt2", b"\4\0\0\0\0\0\0\0bert"),
                  "tokenizer.ggml.model: expected gpt2 or llama, got 'bert'"),
    "a type": (lambda content: changed(content, kind=23), "'output_norm.weight': is of type 23"),
    "a block": (lambda content: changed(content, kind=12), "'output_norm.weight': expected rows of whole blocks"),
    "overlap": (lambda content: changed(content, offset=0), "'output_norm.weight': lies at bytes"),
    "outside": (lambda content: changed(content, offset=1 << 40), "'output_norm.weight': lies at bytes"),
    "a huge size": (lambda content: changed(content, columns=1 << 40), "'output_norm.weight': lies at bytes"),
}  # fmt: skip


def changed(content, **changes):
    """The file with other fields in the record of output_norm.weight."""
    name = b"output_norm.weight"
    place = content.index(name) + len(name)
    n_dims, columns, kind, offset = struct.unpack("<IQIQ", content[place : place + 24])
    record = dict(n_dims=n_dims, columns=columns, kind=kind, offset=offset) | changes
    return content[:place] + struct.pack("<IQIQ", *record.values()) + content[place + 24 :]


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory):
    """A GGUF file of a tiny Llama with a byte-level tokenizer of the bytes alone."""
    pytest.importorskip("gguf")
    import transformers

    from gguf_files import add_bytes, write_gguf

    shape = SHAPE | dict(vocab_size=257)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf", model, tokenizer=add_bytes).read_bytes()


@pytest.mark.parametrize("command", ["run {} -p hi", "doctor {}", "quantize {} --to q4_0 -o {}.new.gguf"])
@pytest.mark.parametrize("bad", GGUF)
def test_bad_gguf_files(good_gguf, tmp_path, capfd, bad, command):
    if (bad, command[:8]) == ("tokenizer", "quantize"):
        pytest.skip("copies a tokenizer of any kind")
    change, what = GGUF[bad]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(good_gguf))
    words = command.replace("{}", str(path)).split()
    assert main(words) == 2 and len([*tmp_path.iterdir()]) == 1
    lines = capfd.readouterr().err.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith(f"cna {words[0]}: {path}: ") and what in lines[0], lines


@pytest.mark.parametrize("name", ["red\x1b[31m", "two\nlines", "half\udcff", "right\u202eleft", "x" * 255])
def test_names_are_printed_safely(good, tmp_path, capfd, name):
    """Names of files that hold control characters, and bytes that are no text."""
    for words in (["show", f"{tmp_path}/{name}"], ["status", f"{tmp_path}/{name}"]):
        refused(capfd, words, name[:3])
    shutil.copytree(good / "model", tmp_path / name)
    words = [
        "discover",
        f"{tmp_path}/{name}",
        "--positive",
        f"{good}/p.txt",
        "--negative",
        f"{good}/c.json",
        "--column",
    ]
    (tmp_path / "n.txt").write_text("yes\nno\n")
    words = ["discover", f"{tmp_path}/{name}", "--positive", f"{good}/p.txt", "--negative", f"{tmp_path}/n.txt"]
    assert main([*words, "--no-universal", "--top-k", "2", "-o", f"{tmp_path}/c.json"]) == 0
    assert main(["show", f"{tmp_path}/c.json"]) == 0
    captured = capfd.readouterr()
    assert "\x1b[31m" not in captured.out + captured.err and "Traceback" not in captured.err
