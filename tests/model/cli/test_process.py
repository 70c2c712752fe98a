"""What lies around a command: closed and full streams, Ctrl-C at any moment, warnings as lines."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cna_kernels import Circuit
from cna_kernels.errors import warn
from cna_kernels.model.cli import main, process
from cna_kernels.model.cli.process import Quiet
from tiny import write_language_model

pytest.importorskip("transformers")
CNA = f"{sys.executable} -m cna_kernels.model"
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    write_language_model(directory / "model")
    (directory / "p.txt").write_text("open it\nwhy not\n")
    (directory / "n.txt").write_text("yes\nno\n")
    Circuit(((0, 1, 1.0),), 3, 48).save(directory / "c.json")
    return directory


def shell(files, line):
    done = subprocess.run(
        ["bash", "-c", line.replace("CNA", CNA)], cwd=files, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done


COMMANDS = {
    "help": "--help",
    "version": "--version",
    "show": "show c.json",
    "show json": "show c.json --json",
    "doctor": "doctor",
    "run": "run model -c c.json --any-model -p hi --max-new-tokens 2",
    "estimate": "estimate model --prompts p.txt",
    "export": "export model -c c.json --any-model --to ref-code -o EXPORT.json",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_stdout_that_is_closed(files, name):
    """One line on stderr and exit code 2; files that the command writes are written."""
    done = shell(files, f"CNA {COMMANDS[name]} >&-")
    lines = [line for line in done.stderr.splitlines() if ": model 'model' " not in line]  # which says what runs
    assert done.returncode == 2 and done.stdout == "" and len(lines) == 1, done
    assert "stdout: Bad file descriptor" in lines[0]
    assert name != "export" or (files / "EXPORT.json").exists()


@pytest.mark.parametrize(
    ("stderr", "more"),
    [
        ("2>/dev/full", ""),
        pytest.param("2>/dev/full", "--log-json", marks=pytest.mark.rare),
        pytest.param("2>&-", "", marks=pytest.mark.rare),
        ("2>&-", "--log-json"),
        ("2> >(head -c 1 > /dev/null)", ""),
        ("2> >(head -c 1 > /dev/null)", "--log-json"),
    ],
)
@needs_full
def test_progress_that_nobody_reads_ends_no_run(files, tmp_path, stderr, more):
    sides = "--positive p.txt --negative n.txt --top-k 2 --unit 1"
    done = shell(files, f"CNA discover model {sides} {more} -o {tmp_path}/c.json {stderr}")
    assert done.returncode == 0 and Circuit.load(tmp_path / "c.json").k == 2 and "neurons per layer" in done.stdout


def test_nothing_is_printed_into_files_that_are_opened_later(files, tmp_path):
    """A closed stream's number goes to no file of ours."""
    sides = "--positive p.txt --negative n.txt --top-k 2"
    done = shell(files, f"CNA discover model {sides} --run-dir {tmp_path}/run -o {tmp_path}/c.json <&- >&- 2>&-")
    assert done.returncode == 2 and Circuit.load(tmp_path / "c.json").k == 2


@pytest.mark.parametrize("target", ["/dev/null", "/dev/full", "missing/c.json", ".", "c.json/c.json"])
def test_outputs_that_are_refused_before_any_work(files, target, monkeypatch, capsys):
    monkeypatch.chdir(files)
    status = main(["discover", "model", "--positive", "p.txt", "--negative", "n.txt", "-o", target])
    printed = capsys.readouterr().err
    assert status == 2 and printed.count("\n") == 1 and target in printed, printed


def test_a_pipe_for_stdout_is_refused_before_any_work(files):
    done = shell(
        files, "CNA discover model --positive p.txt --negative n.txt -o /dev/stdout | cat; exit ${PIPESTATUS[0]}"
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "/dev/stdout: cannot be written: is not a regular file" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "discover MODEL --positive p.txt --negative n.txt -o c2.json",
        pytest.param("doctor", marks=pytest.mark.rare),
        "show c.json",
    ],
)
def test_interrupts_at_any_moment(files, words):
    """From the first line of main on: exit code 130 and a line, or the command was done. Never a traceback."""
    words = words.replace("MODEL", "model").split()
    code = (
        "import os, sys, threading, time, signal\n"
        "from cna_kernels.model.cli import main\n"
        "delay = float(sys.argv.pop(1))\n"
        "interrupt = lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGINT))\n"
        "thread = threading.Thread(target=interrupt, daemon=True)\n"
        "thread.start()\n"
        "sys.exit(main())\n"
    )
    codes = []
    for delay in (0.05, 0.07, 0.1, 0.3, 0.6, 1.0, 1.5, 2.2):
        command = [sys.executable, "-c", code, str(delay), *words]
        done = subprocess.run(command, cwd=files, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, (delay, done.stderr)
        assert done.returncode in (0, 130), (delay, done)
        codes.append(done.returncode)
        if done.returncode == 0:
            break
    assert 130 in codes


def test_an_import_that_swallows_the_interrupt(files):
    """Some modules catch everything while they are imported: Ctrl-C ends the process there, too."""
    code = (
        "import os, signal, sys, time\n"
        "from cna_kernels.model.cli import main, parser\n"
        "def load(args):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        "    except BaseException:\n        pass\n"
        "    return lambda args: print('ran all the same')\n"
        "parser.load = load\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "cna: interrupted\n")


def test_a_second_interrupt_ends_at_once(files):
    code = (
        "import os, sys, time\n"
        "from cna_kernels.model.cli import main, process, parser\n"
        "def slow(args):\n"
        "    try:\n        print('ready', flush=True); time.sleep(60)\n"
        "    except KeyboardInterrupt:\n        print('again', flush=True); time.sleep(60)\n"
        "parser.load = lambda args: slow\n"
        "sys.exit(main())\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for word in ("ready", "again"):
        assert child.stdout.readline().strip() == word
        child.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130 and time.monotonic() - start < 20 and errors == "cna demo: interrupted\n"


class Broken:
    def __init__(self, error):
        self.error, self.isatty = error, lambda: True

    def write(self, text):
        raise self.error

    flush = write


@pytest.mark.parametrize(
    "stream", [Broken(OSError(28, "full")), Broken(BrokenPipeError()), Broken(ValueError("closed")), None]
)
def test_a_quiet_stream(stream):
    quiet = Quiet(stream)
    assert quiet.write("text") == 4 and (stream is None or quiet.isatty())
    if stream is None:
        quiet.flush()


def test_streams_and_warnings_are_as_before(files, capsys):
    before = sys.stdout, sys.stderr, __import__("warnings").showwarning, signal.getsignal(signal.SIGINT)
    assert main(["show", str(files / "c.json")]) == 0
    assert before == (sys.stdout, sys.stderr, __import__("warnings").showwarning, signal.getsignal(signal.SIGINT))


def test_a_warning_is_a_line_each_time(capsys):
    for _ in range(2):
        with process._streams(), process._warnings_as_lines():
            warn("c.json: one\nline")
    assert capsys.readouterr().err == "cna: c.json: one\\nline\n" * 2
