"""Judges: programs from outside that score answers. What goes wrong with one is said, and none runs on."""

import os
import sys
import time
from pathlib import Path

import pytest

from cna_kernels import InputError
from cna_kernels.model.evaluation.judge import judge
from tiny import JUDGE


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; sys.exit('no key')", "ended with code 1: no key"),
        ("print('good')", "line 1 of its output: is not JSON"),
        ('print(\'{"id": 0, "score": "high"}\')', 'expected {"id": N, "score": X}'),
        ('print(\'{"id": 0, "score": 1}\')', "scored 1 of 2 answers; id 1 is missing"),
        ('print(\'{"id": 9, "score": 1}\')', "id 9 was not asked"),
        ('print(\'{"id": 0, "score": 1}\\n{"id": 0, "score": 1}\')', "id 0 comes twice"),
        ('print(\'{"id": 0, "score": NaN}\')', "NaN, which JSON does not have"),
        ("import time; time.sleep(9)", "took more than"),
    ],
)
def test_judges_that_fail(tmp_path, body, message):
    script = tmp_path / "judge.py"
    script.write_text(body)
    with pytest.raises(InputError, match=f"--judge-command.*{message}"):
        judge(f"{sys.executable} {script}", [{"answer": "a"}, {"answer": "b"}], timeout=3 if "sleep" in body else 60)


def test_a_judge_that_leaves_something_running(tmp_path):
    """Its scores are there when it ends; what it has started holds its output open, and is ended."""
    script = tmp_path / "judge.py"
    start = "import subprocess as s; p = s.Popen(['sleep', '300'])\n"
    script.write_text(start + f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n" + JUDGE % "1")
    assert judge(f"{sys.executable} {script}", [{"answer": "a"}], timeout=60) == [1.0]
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")  # of a zombie until its new parent looks
    end = time.monotonic() + 30
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)


ENDLESS = "import os, time\nwhile 1:\n os.write(1, b'x' * 65536); time.sleep(0.01)\n"  # 6 MB a second


def test_a_judge_without_end_is_stopped(tmp_path, monkeypatch):
    """Its output is bounded as it comes: no more than the bound is ever held, and the program does not go on."""
    monkeypatch.setattr("cna_kernels.model.evaluation.judge.MOST", 1 << 20)
    script = tmp_path / "judge.py"
    script.write_text(f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n" + ENDLESS)
    with pytest.raises(InputError, match="wrote more than 1048576 bytes"):
        judge(f"{sys.executable} {script}", [{"answer": "a" * (1 << 20)}], timeout=15)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_judge_that_complains_without_end(tmp_path):
    """stderr is read, too, so that the program does not wait; only its end is kept."""
    script = tmp_path / "judge.py"
    script.write_text("import sys\nsys.stderr.write('x' * (1 << 22) + '\\nthe end')\n" + JUDGE % "1")
    assert judge(f"{sys.executable} {script}", [{"answer": "a"}]) == [1.0]
    script.write_text("import sys\nsys.stderr.write('x' * (1 << 22) + '\\nthe end')\nsys.exit(3)")
    with pytest.raises(InputError, match="ended with code 3: the end"):
        judge(f"{sys.executable} {script}", [{"answer": "a"}] * 2)


def test_a_judge_that_does_not_exist():
    with pytest.raises(InputError, match="cannot be run"):
        judge("/no/such/program", [{}])
    with pytest.raises(InputError, match="is empty"):
        judge("  ", [{}])
