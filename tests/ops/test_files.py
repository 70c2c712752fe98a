"""Reading and writing: only regular files, whole or not at all, one printable line for what is wrong."""

import os
import stat
import threading
import time

import pytest

from cna_kernels import InputError
from cna_kernels.files import check_writable, open_regular, parse_json, read_text, write_text


@pytest.mark.parametrize("name", ["pipe", "folder", "missing", "loop", "x" * 300, "nul\0"])
def test_only_regular_files_are_read(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    start = time.monotonic()
    with pytest.raises(InputError, match=name.rstrip("\0")):
        read_text(f"{tmp_path}/{name}")
    assert time.monotonic() - start < 5, "a pipe without a writer must not block"


def test_streams_where_they_are_welcome(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("one\n"))
    writer.start()
    assert read_text(tmp_path / "pipe", may_stream=True) == "one\n"
    writer.join()


def test_limit(tmp_path):
    (tmp_path / "a").write_text("12345")
    assert read_text(tmp_path / "a", limit=5) == "12345"
    with pytest.raises(InputError, match="has more than the 4 bytes accepted"):
        read_text(tmp_path / "a", limit=4)
    with open_regular(tmp_path / "a") as file:
        assert file.read(2) == b"12"


def test_links_are_followed_and_special_files_kept(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for function in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(InputError, match="is not a regular file"):
            function(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("name", ["missing/a", "real/a", "x" * 256, "folder", "folder/"])
def test_places_that_cannot_be_written(tmp_path, name):
    (tmp_path / "real").write_text("old")
    (tmp_path / "folder").mkdir()
    for function in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(InputError):
            function(f"{tmp_path}/{name}")
    assert sorted(os.listdir(tmp_path)) == ["folder", "real"]
    write_text(tmp_path / ("x" * 255), "x")  # the longest name there is


def test_new_files_have_ordinary_permissions(tmp_path):
    write_text(tmp_path / "ours", "x")
    (tmp_path / "theirs").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "holds NaN"),
        ("[1e999]", "holds 1e999, which is beyond a double"),
        ('{"a": 1, "a": 2}', "repeats the key 'a'"),
        ('"\\ud800"', "holds half of a surrogate pair"),
        ("[" * 100_000, "is nested too deeply"),
        ("1" * 5000, "is not JSON"),
        ("{", "is not JSON"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_json(text, "here")
    assert parse_json('["\\ud83d\\ude00", 1.5]', "here") == ["\U0001f600", 1.5]


def test_messages_are_one_printable_line():
    text = str(InputError("file\x1b[31m\n", "bad" * 10_000))
    assert len(text) < 600 and text.isprintable() and "\n" not in text
