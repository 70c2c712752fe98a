"""Progress of long runs: rates and remaining time by arithmetic, JSON lines, the last line, and silence of workers."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from cna_kernels.model.cli import progress
from cna_kernels.model.cli.progress import metered


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def events(text):
    return [json.loads(line) for line in text.splitlines()]


def test_rates_and_remaining_time(clock, capsys):
    with metered(as_json=True, notes={"skipped": 2, "kept": 0}) as meter:
        meter(0, 50, 0)
        clock[0] += 4
        meter(10, 50, 320)
        clock[0] += 6
        meter(50, 50, 1000)
    first, last, done = events(capsys.readouterr().err)[-3:]
    assert (first["event"], last["event"], done["event"]) == ("progress", "progress", "done")
    assert (first["prompts"], first["of"], first["tokens"], first["seconds"]) == (10, 50, 320, 4.0)
    assert (first["prompts_per_s"], first["tokens_per_s"], first["eta_s"]) == (2.5, 80.0, 16.0)
    assert (last["prompts"], last["seconds"], last["eta_s"]) == (50, 10.0, 0.0)
    assert (done["prompts_per_s"], done["tokens_per_s"]) == (5.0, 100.0)
    assert (done["skipped"], done["kept"]) == (2, 0)


def test_a_run_that_goes_on_counts_only_its_own_prompts(clock, capsys):
    """40 of 50 prompts were done before. 5 more in 5 seconds are 1 prompt/s, so the last 5 need 5 seconds."""
    with metered(as_json=True) as meter:
        meter(40, 50, 0)
        clock[0] += 5
        meter(45, 50, 60)
    done = events(capsys.readouterr().err)[-1]
    assert (done["prompts"], done["prompts_per_s"], done["tokens_per_s"], done["eta_s"]) == (45, 1.0, 12.0, 5.0)


def test_a_line_a_second_and_always_the_last(clock, capsys):
    with metered(as_json=True) as meter:
        for number in range(1, 101):
            clock[0] += 0.1
            meter(number, 100, number)
    said = [event["prompts"] for event in events(capsys.readouterr().err) if event["event"] == "progress"]
    assert 9 <= len(said) <= 12 and said[-1] == 100 and said == sorted(set(said))


def test_nothing_done_is_no_division_by_zero(clock, capsys):
    with metered(as_json=True):
        pass
    (done,) = events(capsys.readouterr().err)
    assert (done["prompts"], done["prompts_per_s"], done["tokens_per_s"], done["eta_s"]) == (0, 0.0, 0.0, None)


def test_the_last_line_for_people(capsys):
    with metered(as_json=False, notes={"skipped": 3, "left out": 0}) as meter:
        meter(1500, 1500, 12000)
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    pattern = r"1,500 prompts in \d+\.\d s: [\d,.]+ prompts/s, [\d,]+ tokens/s, [\d,]+ MiB; 3 skipped"
    assert re.fullmatch(pattern, last) and captured.out == ""


def test_other_workers_draw_no_bar_but_report_as_json(capsys):
    with metered(as_json=False, rank=1) as meter:
        meter(3, 3, 9)
    assert capsys.readouterr().err == "" and meter.prompts == 3
    with metered(as_json=True, rank=1) as meter:
        meter(3, 3, 9)
    assert [event["event"] for event in events(capsys.readouterr().err)] == ["progress", "done"]


def test_an_error_is_no_done_line(capsys):
    with pytest.raises(KeyboardInterrupt), metered(as_json=True) as meter:
        meter(1, 3, 9)
        raise KeyboardInterrupt
    assert "done" not in capsys.readouterr().err


# A shell forks the child: a child of this process would begin with the peak that this process had.
HOLDS = """
import re
from cna_kernels.model.cli.progress import peak_memory
before = peak_memory()
held = bytearray(b"x") * (200 << 20)
with open("/proc/self/status") as file:
    high = int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]) * 1024
print(before, peak_memory(), high)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory where there is one")
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc to compare with")
def test_peak_memory_is_in_bytes():
    """The peak grows by the memory that the process takes, and equals the high-water mark in /proc. The kernel keeps
    these two in different counters, which may be some pages apart."""
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, HOLDS]
    before, after, high = map(int, subprocess.check_output(command, text=True).split())
    assert 0.99 * (200 << 20) <= after - before <= 1.05 * (200 << 20)
    assert abs(after - high) <= 2 << 20
