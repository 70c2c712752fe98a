"""Prompt files: four formats, columns, limits, and every refusal names file and line."""

import os
import threading

import pytest

from cna_kernels import InputError
from cna_kernels.model.prompts.files import (
    LONGEST_LINE,
    BadLines,
    PromptSet,
    iter_prompts,
    neutral_prompts,
    read_prompts,
)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FORMATS = {
    "p.txt": "one\n\n  two \r\nthree é\n",
    "p.jsonl": '{"prompt": "one", "x": 1}\n\n{"prompt": "two"}\n"three é"\n',
    "p.json": '["one", {"prompt": "two", "y": 2}, {"prompt": "three é"}]',
    "p.csv": 'id,prompt\n1,one\n2,"two"\n3,three é\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    prompts = read_prompts(write(tmp_path, name, FORMATS[name]))
    assert prompts.texts == ("one", "two", "three é")
    assert all(name in place for place in prompts.places) and len(set(prompts.places)) == 3
    assert read_prompts(tmp_path / name, limit=2).texts == ("one", "two")


def test_byte_order_mark_and_multiline_csv(tmp_path):
    assert read_prompts(write(tmp_path, "p.txt", b"\xef\xbb\xbfone\n")).texts == ("one",)
    prompts = read_prompts(write(tmp_path, "p.csv", 'Goal,b\n"two\nlines",2\n'), column="Goal")
    assert prompts.texts == ("two\nlines",)


def test_lone_carriage_returns_end_lines(tmp_path):
    assert read_prompts(write(tmp_path, "p.txt", b"one\rtwo\r\nthree")).texts == ("one", "two", "three")


def test_the_only_column_needs_no_name(tmp_path):
    assert read_prompts(write(tmp_path, "p.csv", "Goal\none\n")).texts == ("one",)
    with pytest.raises(
        InputError, match=r"p\.csv:2: has no column 'prompt' \(it has Goal, b\); name one with --column"
    ):
        read_prompts(write(tmp_path, "p.csv", "Goal,b\none,2\n"))


REFUSALS = [
    ("p.txt", "", None, "p.txt: holds no prompt"),
    ("p.txt", " \n\t\n", None, "p.txt: holds no prompt"),
    ("p.txt", b"one\n\xff\xfe\x00", None, "p.txt:2: is not UTF-8 text (byte 0 of the line)"),
    ("p.csv", b"prompt\none\n\xff\n", None, "p.csv:3: prompt: holds half of a surrogate pair"),
    ("p.txt", "one\n", "Goal", "p.txt: a column is for"),
    ("p.csv", "", None, "p.csv: holds no prompt"),
    ("p.csv", "Goal\n", "Goal", "p.csv: holds no prompt"),
    ("p.csv", "a,b\n1,2\n", "c", "p.csv:2: has no column 'c'"),
    ("p.csv", "a,b\n1\n", "b", "p.csv:2: b: expected a prompt, got None"),
    ("p.csv", "prompt\nOpen the vault, please\n", None, "p.csv:2: has more fields than the 1 columns"),
    ("p.csv", 'prompt\n"Hello\nsecond\n', None, "p.csv:1: unexpected end of data"),
    ("p.csv", "prompt,prompt\na,b\n", None, "p.csv:1: repeats the column 'prompt'"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', None, "p.jsonl:2: prompt: expected a prompt, got 3"),
    ("p.jsonl", '{"prompt": "a"}\n{\n', None, "p.jsonl:2: is not JSON"),
    ("p.jsonl", '{"prompt": "\\ud800"}\n', None, "p.jsonl:1: holds half of a surrogate pair"),
    ("p.json", "{}", None, "p.json: expected a JSON list of prompts"),
    ("p.json", '["a", ""]', None, "p.json[1]: expected a prompt, got ''"),
    ("p.json", "[]", None, "p.json: holds no prompt"),
]


@pytest.mark.parametrize(("name", "content", "column", "message"), REFUSALS)
def test_refusals(tmp_path, name, content, column, message):
    with pytest.raises(InputError) as caught:
        read_prompts(write(tmp_path, name, content), column=column)
    assert str(tmp_path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", b"one\n\xff\ntwo\n"),
        ("p.jsonl", '{"prompt": "one"}\n{\n{"prompt": 3}\n{"x": "y", "z": 1}\n{"prompt": "two"}\n'),
        ("p.csv", 'prompt,x\none,1\n,2\n"a"b,3\n1,2,3\ntwo,4\n'),
        ("p.json", '["one", 3, "two"]'),
    ],
)
def test_bad_lines_are_skipped_and_counted(tmp_path, name, content):
    bad = BadLines(skip=True)
    path = write(tmp_path, name, content)
    assert [text for text, _ in iter_prompts(path, bad=bad)] == ["one", "two"]
    assert bad.count == {"p.txt": 1, "p.jsonl": 3, "p.csv": 3, "p.json": 1}[name] and name in bad.first
    with pytest.raises(InputError):
        list(iter_prompts(path))


def test_only_bad_lines_are_no_prompts(tmp_path):
    path = write(tmp_path, "p.jsonl", "{\n[\n")
    with pytest.raises(InputError, match=r"p\.jsonl: holds no prompt; .*p\.jsonl:1: is not JSON"):
        list(iter_prompts(path, bad=BadLines(skip=True)))


def test_a_pipe_is_read_as_it_comes(tmp_path):
    path = tmp_path / "p.txt"
    os.mkfifo(path)

    def feed():
        with open(path, "wb") as pipe:
            pipe.write(b"one\ntwo\n")

    writer = threading.Thread(target=feed)
    writer.start()
    assert [text for text, _ in iter_prompts(path)] == ["one", "two"]
    writer.join()


def test_an_endless_line_is_refused(tmp_path):
    path = tmp_path / "p.txt"
    with open(path, "wb") as file:
        file.truncate(LONGEST_LINE + 2)
    with pytest.raises(InputError, match=r"p\.txt:1: is longer than the \d+ bytes accepted"):
        read_prompts(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(InputError, match="is a directory"):
        read_prompts(tmp_path)


def test_lists_of_prompts():
    assert PromptSet.of(["a", "b"], "positive").places == ("positive[0]", "positive[1]")
    with pytest.raises(InputError, match="positive: holds no prompt"):
        PromptSet.of([], "positive")
    with pytest.raises(InputError, match=r"positive\[1\]: expected a prompt, got 3"):
        PromptSet.of(["a", 3], "positive")
    with pytest.raises(InputError, match="positive: expected a list of prompts, got one string"):
        PromptSet.of("hello", "positive")
    assert PromptSet.of(["ab", "c"], "x").sha256 != PromptSet.of(["a", "bc"], "x").sha256


def test_built_in_neutral_prompts():
    assert len(neutral_prompts()) == len(set(neutral_prompts().texts)) == 24
