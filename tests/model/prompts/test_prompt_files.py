"""Prompt files: formats, encodings, columns, labels, limits, and every refusal names file and line."""

import csv
import json
import os
import threading

import pytest

from cna_kernels import InputError
from cna_kernels.errors import InputWarning
from cna_kernels.model.prompts.files import (
    BadLines,
    ChatText,
    Label,
    PromptSet,
    iter_prompts,
    neutral_prompts,
    neutral_texts,
    read_prompts,
)
from cna_kernels.model.prompts.formats import LONGEST_LINE


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


# What people have: name of the file, its bytes, the column asked for; the texts are TWO.
TWO = ("How to é, a", "How to b")
TABLE = 'prompt{0}label\n"How to é, a"{0}1\nHow to b{0}0\n'
LINES = '{"prompt": "How to é, a"}\n{"prompt": "How to b"}\n'
AS_PEOPLE_HAVE_THEM = [
    ("p.tsv", TABLE.format("\t"), None),
    ("p.tab", TABLE.format("\t"), None),
    ("p.csv", TABLE.format(";"), None),
    ("p.csv", TABLE.format("\t"), None),
    ("p.csv", TABLE.format("|"), None),
    ("p.tsv", TABLE.format(","), None),
    ("p.CSV", TABLE.format(",").replace("\n", "\r\n"), None),
    ("p.csv", TABLE.format(",").encode("utf-8-sig"), None),
    ("p.csv", TABLE.format("\t").encode("utf-16"), None),
    ("p.csv", TABLE.format(";").encode("utf-16-be").join([b"\xfe\xff", b""]), None),
    ("p.csv", TABLE.format(";").encode("latin-1"), None),
    ("p.csv", TABLE.format(";").replace("prompt", "Goal"), "Goal"),
    ("p.csv", TABLE.format(";").replace("prompt", "Goal"), "instruction,Goal"),
    ("p.csv", '"How to é, a"\nHow to b\n', None),
    ("p.csv", 'question\n"How to é, a"\nHow to b\n', None),
    ("p.csv", 'two words\n"How to é, a"\nHow to b\n', "two words"),
    ("p.txt", "How to é, a\nHow to b\n".encode("utf-16"), None),
    ("p.txt", "How to é, a\nHow to b\n".encode("utf-32"), None),
    ("p.txt", "How to é, a\nHow to b\n".encode("latin-1"), None),
    ("p.prompts", "How to é, a\nHow to b", None),
    ("p", "How to é, a\nHow to b", None),
    ("p.ndjson", LINES, None),
    ("p.jsonlines", LINES, None),
    ("p.txt", LINES, None),
    ("p.data", "\n" + LINES, None),
    ("p.json", LINES, None),
    ("p.jsonl", LINES.encode("utf-16"), None),
    ("p.json", '[{"prompt": "How to é, a"}, "How to b"]'.encode("utf-8-sig"), None),
    ("p.txt", '{"goal": "How to é, a"}\n{"goal": "How to b"}\n', None),
    ("p.txt", "How to é, a\n".encode("utf-8-sig") + "How to b\n".encode("utf-8-sig"), None),  # as cat joins files
    ("p.csv", "\n" + TABLE.format(";"), None),
    ("p.csv", "\r\n \r\n" + TABLE.format("\t"), None),
]


@pytest.mark.filterwarnings("ignore:.*(is not UTF-8|is taken for)")
@pytest.mark.parametrize(("name", "content", "column"), AS_PEOPLE_HAVE_THEM)
def test_files_as_people_have_them(tmp_path, name, content, column):
    path = write(tmp_path, name, content)
    assert read_prompts(path, column=column).texts == TWO
    assert [text for text, _ in iter_prompts(path, column=column, bad=BadLines(skip=True))] == list(TWO)


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": list(TWO), "n": [1, 2]}), tmp_path / "p.parquet")
    prompts = read_prompts(tmp_path / "p.parquet")
    assert prompts.texts == TWO and prompts.places[1] == f"{tmp_path}/p.parquet: row 1: prompt"
    (tmp_path / "p.parquet").rename(tmp_path / "p.data")  # found by how it begins
    assert read_prompts(tmp_path / "p.data").texts == TWO


def test_parquet_that_cannot_be_read(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, text = tmp_path / "p.parquet", pa.array(["a", "b"])
    not_utf8 = pa.array([b"a", b"\xff"]).view(pa.string())
    late = pa.array([10**14, 0], pa.timestamp("s"))
    for columns, message in (
        ([text, text], "p.parquet: repeats the column 'prompt'"),
        ([not_utf8], "p.parquet: row 0 or after it: cannot be read: 'utf-8' codec"),
        ([text, late], "p.parquet: row 0 or after it: cannot be read: "),
    ):
        names = ["prompt", "prompt" if columns[1:] == [text] else "when"]
        parquet.write_table(pa.Table.from_arrays(columns, names[: len(columns)]), path)
        with pytest.raises(InputError) as caught:
            read_prompts(path)
        assert message in str(caught.value)
    parquet.write_table(pa.table({"prompt": text, "toxic": pa.array([1.0, float("nan")])}), path)
    assert next(iter_prompts(path, label=Label.parse("toxic")))[0] == "a"
    with pytest.raises(InputError, match=r"p\.parquet: row 1: toxic: expected a label, and there is none"):
        list(iter_prompts(path, label=Label.parse("toxic").others))


# Files whose first line may be two things: name, content, the texts, what is said (None: nothing)
GUESSED = [
    ("p.txt", "How to \xe9, a\n".encode("latin-1"), ["How to é, a"], "p.txt: is not UTF-8; read as Western text"),
    ("p.csv", "Say hello\nagain\n", ["Say hello", "again"], "p.csv:1: 'Say hello' is taken for a prompt, not for"),
    ("p.csv", "The harmful prompt to ask\na\n", ["The harmful prompt to ask", "a"], "p.csv:1: 'The harmful prompt to"),
    ("p.csv", "harmful_prompt\na b\n", ["a b"], "p.csv:1: 'harmful_prompt' is taken for the name of a column, not"),
    ("p.csv", "提示\n怎么做饭？\n", ["提示", "怎么做饭？"], "p.csv:1: '提示' is taken for a prompt"),
    ("p.csv", "怎么开锁？\n怎么做饭？\n", ["怎么开锁？", "怎么做饭？"], None),
    ("p.csv", "Open it now.\nb\n", ["Open it now.", "b"], None),
    ("p.csv", "Goal\nb\n", ["b"], None),
    ("p.txt", '"one two"\n"b"\n', ['"one two"', '"b"'], "p.txt:1: is taken as text, with its quotes; .jsonl is read"),
    ("p.txt", '"a", he said\n', ['"a", he said'], None),
    ("p.txt", "{x} and [y]\n", ["{x} and [y]"], None),
    ("p.txt", "[y] {\n", ["[y] {"], None),
    ("p.json", '{"prompt": "one"}', ["one"], None),
    ("p.json", '{"prompt": "one\u2028two"}\n{"prompt": "b\x85"}', ["one\u2028two", "b\x85"], None),
    ("p.txt", '{"prompt": "one\u2028two"}\n', ["one\u2028two"], None),
    ("p.txt", '\n{ "prompt": "' + "x " * 50_000 + 'y"}\n', ["x " * 50_000 + "y"], None),
]


@pytest.mark.parametrize(("name", "content", "texts", "said"), GUESSED)
def test_what_is_guessed_is_said(tmp_path, recwarn, name, content, texts, said):
    assert list(read_prompts(write(tmp_path, name, content)).texts) == texts
    found = [str(warning.message) for warning in recwarn if issubclass(warning.category, InputWarning)]
    assert len(found) == (said is not None) and all(str(said) in text for text in found)


def test_a_file_may_name_its_column(tmp_path):
    path = write(tmp_path, "p.csv", "goal,target\na,b\n")
    assert read_prompts(f"{path}:target").texts == ("b",) and read_prompts(f"{path}:goal", column="x").texts == ("a",)
    odd = write(tmp_path, "p.csv:goal", "c\n")  # a file of this very name has no column in it
    assert read_prompts(odd).texts == ("c",)


def test_labels(tmp_path):
    path = write(tmp_path, "p.csv", "prompt,toxic,kind\na,1,x\nb,0,y\nc,True,x\nd,no,z\n")
    for text, mine, others in (("toxic", "ac", "bd"), ("toxic=0", "bd", "ac"), ("kind=X", "ac", "bd")):
        label = Label.parse(text)
        for side, expected in ((label, mine), (label.others, others)):
            assert "".join(text for text, _ in iter_prompts(path, label=side)) == expected
    with pytest.raises(InputError, match=r"p\.csv:2: colour: expected a label, and there is none"):
        list(iter_prompts(path, label=Label.parse("colour")))
    path = write(tmp_path, "p.jsonl", '{"prompt": "a", "toxic": 1}\n{"prompt": "b", "toxic": "nan"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl:2: toxic: expected a label, and there is none"):
        list(iter_prompts(path, label=Label.parse("toxic").others))
    path = write(tmp_path, "p.jsonl", '{"toxic": "yes"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl:1: has no column 'prompt'"):
        list(iter_prompts(path, label=Label.parse("toxic")))


MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"messages": MESSAGES}, None),
        ({"messages": [*MESSAGES, ANSWER]}, "a"),
        ({"prompt": MESSAGES, "chosen": 3}, None),
        ({"messages": [{**MESSAGES[0], "name": None}, MESSAGES[1]], "id": 3, "tools": []}, None),
    ],
)
def test_chats(tmp_path, record, answer):
    (chat,) = read_prompts(write(tmp_path, "p.jsonl", json.dumps(record))).texts
    assert isinstance(chat, ChatText) and chat.messages == MESSAGES and chat.answer == answer


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
    ("p.txt", b"one\n\xff\xfe", None, "p.txt:2: is not UTF-8 text (byte 0 of the line)"),
    ("p.csv", b"prompt\none\n\xff\n", None, "p.csv:3: prompt: holds half of a surrogate pair"),
    ("p.txt", "one\n", "Goal", "p.txt: has no columns; a column is for"),
    ("p.csv", "", None, "p.csv: holds no prompt"),
    ("p.csv", "Goal\n", "Goal", "p.csv: holds no prompt"),
    ("p.csv", "a,b\n1,2\n", "c", "p.csv:2: has no column 'c'"),
    ("p.csv", "a,b\n1\n", "b", "p.csv:2: b: expected a prompt, got None"),
    ("p.csv", "prompt\nOpen the vault, please\n", None, "p.csv:2: has more fields than the 1 columns"),
    ("p.csv", 'prompt\n"Hello\nsecond\n', None, "p.csv:3: unexpected end of data: the rest of the file cannot"),
    ("p.csv", "prompt,prompt\na,b\n", None, "p.csv:1: repeats the column 'prompt'"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', None, "p.jsonl:2: prompt: expected a prompt, got 3"),
    ("p.jsonl", '{"prompt": "a"}\n{\n', None, "p.jsonl:2: is not JSON"),
    ("p.jsonl", '{"prompt": "\\ud800"}\n', None, "p.jsonl:1: holds half of a surrogate pair"),
    ("p.json", "{}", None, "p.json:1: has no column 'prompt'"),
    ("p.json", '{"a":\n"b"}', None, "p.json: expected a JSON list of prompts"),
    ("p.txt", '{"prompt": "a", "score": NaN}\n', None, "p.txt:1: holds NaN, which JSON does not have"),
    ("p.txt", '{"prompt": "a", "x": 1, "x": 2}\n', None, "p.txt:1: repeats the key 'x'"),
    ("p.txt", '{ "prompt": "a",}\n', None, "p.txt:1: is not JSON: "),
    ("p.txt", '{"x"} is what?\n', None, "; a file whose first line begins an object is read as JSON"),
    ("p.txt", '{\n"prompt": "a"\n}\n', None, "p.txt: begins with '{', as JSON over several lines does"),
    ("p.txt", '[\n"a"\n]\n', None, "p.txt: begins with '[', as JSON over several lines does"),
    ("p.txt", '["a", "b"]\n', None, "p.txt: begins with a JSON list; lists are read from .json files"),
    (
        "p.jsonl",
        '{"prompt": "a", "n": "x"}\n{"kind": "y"}\n',
        None,
        "p.jsonl:2: has no column 'prompt' (it has kind)",
    ),
    ("p.jsonl", '{"goal": "a"}\n{"text": "b"}\n', None, "p.jsonl:2: has no column 'prompt' (it has text)"),
    ("p.csv", "Index;Goal\n1;a\n", None, "p.csv:2: has no column 'prompt' (it has Index, Goal); name one with"),
    ("p.csv", 'prompt,x\n"a" b,c\n', None, "p.csv:2: ',' expected after '\"': the rest of the file cannot be read"),
    ("p.csv", "prompt,x\n" + "a" * 60 + "\0b,c\n", None, "p.csv:2: holds a NUL character"),
    ("p.txt", "one\ntw\0o\n" + "x" * 100, None, "p.txt: holds NUL bytes where text should be"),
    ("p.txt", "x" * 100 + "\ntw\0o\n", None, "p.txt:2: holds a NUL character, which is not text"),
    ("p.txt", b"\xff\xfe\x00\xd8", None, "p.txt: is not utf-16 text, as it begins"),
    ("p.txt", "プロンプト\n".encode("shift-jis"), None, "p.txt:1: is not UTF-8 text"),
    ("p.txt", b"PK\x03\x04x", None, "p.txt: is a ZIP archive"),
    ("p.xlsx", b"x", None, "p.xlsx: .xlsx files are not read; read are text"),
    ("p.yaml", "- one\n", None, "p.yaml: .yaml files are not read"),
    ("p.txt.gz", b"x", None, ".gz files are not read"),
    ("p.parquet", b"PAR1xx", None, "p.parquet: is"),
    (
        "p.jsonl",
        '{"messages": [{"role": "user"}]}',
        None,
        "p.jsonl:1: messages[0]: content: expected a prompt, got None",
    ),
    ("p.jsonl", '{"messages": [3]}', None, "p.jsonl:1: messages[0]: expected a message"),
    ("p.jsonl", '{"messages": []}', None, "p.jsonl:1: messages: holds no message to answer"),
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
        ("p.csv", "prompt,x\none,1\n,2\n1,2,3\n\ntwo\n"),
        ("p.json", '["one", 3, "two"]'),
    ],
)
def test_bad_lines_are_skipped_and_counted(tmp_path, name, content):
    bad = BadLines(skip=True)
    path = write(tmp_path, name, content)
    assert [text for text, _ in iter_prompts(path, bad=bad)] == ["one", "two"]
    assert bad.count == {"p.txt": 1, "p.jsonl": 3, "p.csv": 2, "p.json": 1}[name] and name in bad.first
    with pytest.raises(InputError):
        list(iter_prompts(path))


def test_a_broken_table_is_never_skipped(tmp_path):
    """Where a quote is lost, nobody knows where the next row begins: later rows might be parts of a prompt."""
    path = write(tmp_path, "p.csv", 'prompt,x\none,1\n"two" x,2\nthree,3\n')
    with pytest.raises(InputError, match=r"p\.csv:3: .*the rest of the file cannot be read"):
        list(iter_prompts(path, bad=BadLines(skip=True)))


def test_long_fields_and_the_limit_of_the_process(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path, "p.csv", "id,prompt\n1,x\n2," + "a" * 200_000 + "\n")
    assert len(read_prompts(path).texts[1]) == 200_000 and csv.field_size_limit() == before


def test_only_bad_lines_are_no_prompts(tmp_path):
    path = write(tmp_path, "p.jsonl", "{\n[\n")
    with pytest.raises(InputError, match=r"p\.jsonl: holds no prompt; .*p\.jsonl:1: is not JSON"):
        list(iter_prompts(path, bad=BadLines(skip=True)))


@pytest.mark.parametrize(
    ("content", "column", "texts"),
    [
        (b"one\ntwo\n", None, ["one", "two"]),
        (b"one\ntwo\n", "goal", None),
        (b'{"prompt": "no", "goal": "one"}\n{"prompt": "no", "goal": "two"}\n', "goal", ["one", "two"]),
    ],
)
def test_a_pipe_is_read_as_it_comes(tmp_path, content, column, texts):
    path = tmp_path / "p.txt"
    os.mkfifo(path)

    def feed():
        with open(path, "wb") as pipe:
            pipe.write(content)

    writer = threading.Thread(target=feed)
    writer.start()
    if texts is None:
        with pytest.raises(InputError, match=r"p\.txt: has no columns; a column is for"):
            list(iter_prompts(path, column=column))
    else:
        assert [text for text, _ in iter_prompts(path, column=column)] == texts
    writer.join()


def test_an_endless_line_is_refused(tmp_path):
    path = tmp_path / "p.txt"
    with open(path, "wb") as file:
        file.write(b"x" * (LONGEST_LINE + 2))
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
    assert len(neutral_texts()) == len(set(neutral_texts().texts)) == 24
    assert not {*neutral_texts().texts} & {*neutral_prompts().texts}, "no KL on texts that chose neurons"
