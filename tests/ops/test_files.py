"""Reading and writing: only regular files, whole or not at all, one printable line for what is wrong."""

import os
import stat
import subprocess
import sys
import threading
import time

import pytest

from cna_kernels import InputError
from cna_kernels.files import check_directory, check_writable, open_regular, parse_json, read_text, write_text


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


def test_a_pipe_under_a_name_of_its_own(tmp_path):
    """/dev/stdout of a pipe leads to a name such as pipe:[123], beside which files may well be made."""
    read, write = os.pipe()
    try:
        for function in (check_writable, lambda path: write_text(path, "x")):
            with pytest.raises(InputError, match="is not a regular file"):
                function(f"/proc/self/fd/{write}" if os.path.exists("/proc/self/fd") else f"/dev/fd/{write}")
    finally:
        os.close(read)
        os.close(write)


def test_the_file_that_output_goes_to_is_not_replaced(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("kept\n")
    code = f"from cna_kernels.files import write_text; print('said', flush=True); write_text({str(log)!r}, 'new')"
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, "-c", code], stdout=file, stderr=subprocess.PIPE, text=True)
    assert "log.txt: cannot be written: is where the output of this process goes" in done.stderr
    assert log.read_text() == "kept\nsaid\n"


@pytest.mark.parametrize(("code", "what"), [(28, "No space left"), (30, "Read-only file system"), (122, "quota")])
def test_a_disk_that_takes_nothing_is_found_before_the_work(tmp_path, monkeypatch, code, what):
    """A full disk lets a file be made, and fails when it is written."""

    def fail(*_):
        raise OSError(code, os.strerror(code))

    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / "old")
    monkeypatch.setattr(os, "fsync", fail)
    for path in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(InputError, match=f"{path.name}: cannot be written: .*{what}"):
            check_writable(path)
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_directories_that_cannot_be_written(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("folder", "folder/", "new", "new/"):
        check_directory(f"{tmp_path}/{name}")
    for name in ("real", "real/a", "missing/a", "dangling", "x" * 256):
        with pytest.raises(InputError, match=name[:7]):
            check_directory(f"{tmp_path}/{name}")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "folder", "real"] and os.listdir(tmp_path / "folder") == []


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
