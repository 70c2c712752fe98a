"""A judge: a user's program that scores answers.

The program reads JSON lines ``{"id": 0, "set": "harmful", "prompt": ..., "answer": ...}`` on stdin. For each it writes
one JSON line ``{"id": 0, "score": 0.7}`` on stdout, in any order.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from cna_kernels.errors import InputError
from cna_kernels.fields import is_number, is_whole
from cna_kernels.files import parse_json

TIMEOUT = 3600.0  # seconds
MOST = 64 << 20  # characters of output


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
    try:
        done = subprocess.run(words, input=lines.encode(), capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise InputError(where, f"took more than {timeout:g} seconds") from None
    except (OSError, ValueError) as error:
        raise InputError(where, f"cannot be run: {getattr(error, 'strerror', None) or error}") from None
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(where, f"ended with code {done.returncode}: {last}")
    if len(done.stdout) > MOST:
        raise InputError(where, f"wrote more than {MOST} bytes")
    return _scores(done.stdout.decode(errors="replace"), len(items), where)


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
