"""A judge: a user's program that scores answers.

The program reads JSON lines ``{"id": 0, "set": "harmful", "prompt": ..., "answer": ...}`` on stdin. For each it writes
one JSON line ``{"id": 0, "score": 0.7}`` on stdout, in any order.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

from cna_kernels.errors import InputError
from cna_kernels.fields import is_number, is_whole
from cna_kernels.files import parse_json

TIMEOUT = 3600.0  # seconds
MOST = 64 << 20  # bytes of output
GRACE = 1.0  # seconds for the rest of its output, when the program has ended
LAST = 64 << 10  # bytes of stderr that are kept


def judge(command: str, items: Sequence[dict], *, timeout: float = TIMEOUT) -> list[float]:
    """Return the command's score of each item, in the order of the items.

    Args:
        command: split as a shell would, but run without one.
        items: the fields of each input line but ``id``: one dict for each line.

    Raises:
        InputError: the command cannot be run, fails or takes too long; or a line of its output is not as described
            above, and the message names the line.
    """
    where = "--judge-command"
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(where, f"cannot be split into words: {error}") from None
    if not words:
        raise InputError(where, "is empty")
    lines = "".join(json.dumps({"id": number, **item}, ensure_ascii=False) + "\n" for number, item in enumerate(items))
    code, output, errors = _run(words, lines.encode("utf-8", "replace"), timeout, where)
    if code:
        last = (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(where, f"ended with code {code}: {last}")
    return _scores(output.decode(errors="replace"), len(items), where)


def _run(words: list[str], content: bytes, timeout: float, where: str) -> tuple[int, bytes, bytes]:
    """Run a program. Return its exit code, its output and the end of its stderr.

    Output is read as it comes: a program that writes more than MOST bytes, or takes too long, is killed, with all that
    it has started.
    """
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except (OSError, ValueError) as error:
        raise InputError(where, f"cannot be run: {getattr(error, 'strerror', None) or error}") from None
    assert child.stdin and child.stdout and child.stderr
    stdin, stdout, stderr = child.stdin, child.stdout, child.stderr
    output, errors, too_long = bytearray(), bytearray(), threading.Event()

    def read_output():
        while piece := os.read(stdout.fileno(), 1 << 16):
            output.extend(piece)
            if len(output) > MOST:
                too_long.set()
                return

    def read_errors():
        while piece := os.read(stderr.fileno(), 1 << 16):
            errors.extend(piece)
            del errors[:-LAST]

    def write():
        with contextlib.suppress(OSError):  # a program may end before it has read all
            stdin.write(content)
        with contextlib.suppress(OSError):
            stdin.close()

    threads = [threading.Thread(target=work, daemon=True) for work in (read_output, read_errors, write)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    try:
        while threads[0].is_alive() and child.poll() is None and time.monotonic() < deadline:
            threads[0].join(0.05)
        threads[0].join(GRACE)  # what it has started may hold its output open
        if too_long.is_set():
            raise InputError(where, f"wrote more than {MOST} bytes")
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise InputError(where, f"took more than {timeout:g} seconds") from None
        threads[1].join(GRACE)
        _kill(child)
        return child.returncode, bytes(output), bytes(errors)
    except BaseException:
        _kill(child)
        raise


def _kill(child: subprocess.Popen):
    """End a program and what it has started."""
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
    child.wait()


def _scores(output: str, n: int, where: str) -> list[float]:
    scores: dict[int, float] = {}
    for number, line in enumerate(output.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{where}: line {number} of its output"
        record = parse_json(line, place)
        fields: tuple[Any, Any] = (record.get("id"), record.get("score")) if isinstance(record, dict) else (None, None)
        identifier, score = fields
        if not is_whole(identifier) or not is_number(score):
            raise InputError(place, f'expected {{"id": N, "score": X}}, got {line[:60]!r}')
        if not 0 <= identifier < n or identifier in scores:
            raise InputError(place, f"id {identifier} " + ("comes twice" if identifier in scores else "was not asked"))
        if not math.isfinite(score):
            raise InputError(place, f"score {score} is not finite")
        scores[identifier] = float(score)
    if len(scores) < n:
        missing = next(number for number in range(n) if number not in scores)
        raise InputError(where, f"scored {len(scores)} of {n} answers; id {missing} is missing")
    return [scores[number] for number in range(n)]
