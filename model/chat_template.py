"""Chat templates: jinja2 programs from a checkpoint, rendered in a child process with limits.

The jinja sandbox keeps a template from reaching Python, not from looping or from building a string of gigabytes, so a
child renders it under a memory limit and the parent waits a bounded time.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
import weakref
from pathlib import Path

from cna_kernels.checks import InputError
from cna_kernels.files import read_json, read_text

MAX_TEMPLATE = 64 << 10  # bytes of template
MAX_OUTPUT = 4 << 20  # characters of one rendered conversation
_SECONDS = 10.0  # for one batch of _BATCH conversations; a real template takes about a millisecond each
_BATCH = 64


class ChatTemplate:
    """Renders conversations with a checkpoint's template. ``where`` names its file for messages."""

    def __init__(self, source: str, variables: dict[str, str], where):
        if len(source.encode("utf-8", "replace")) > MAX_TEMPLATE:
            raise InputError(where, f"chat template is larger than {MAX_TEMPLATE} bytes")
        self.source, self.variables, self.where = source, variables, where
        self._child = None

    def render(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        """Return the text of each conversation, ended by the header of the assistant's turn.

        Raises:
            InputError: the template is malformed, refuses the conversation, or exceeds a limit.
        """
        texts = []
        for start in range(0, len(conversations), _BATCH):
            texts += self._ask({"conversations": conversations[start : start + _BATCH]})
        return texts

    def _ask(self, request):
        if self._child is None or self._child.poll() is not None:
            self._start()
        answer = self._exchange(request)
        if "error" in answer:
            raise InputError(self.where, f"chat template: {answer['error']}")
        return answer["texts"]

    def _start(self):
        command = [sys.executable, "-I", str(Path(__file__).with_name("template_child.py"))]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        weakref.finalize(self, _end, self._child)
        setup = {"template": self.source, "variables": self.variables, "max_output": MAX_OUTPUT}
        answer = self._exchange(setup)
        if "error" in answer:
            _end(self._child)
            raise InputError(self.where, f"chat template: {answer['error']}")

    def _exchange(self, message):
        """Send one line, wait for one line; kill the child where none comes in time."""
        try:
            self._child.stdin.write(json.dumps(message).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the read below finds the end of its output
        line, deadline = b"", time.monotonic() + _SECONDS
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = self._child.stdout.read1(1 << 20) if ready else b""
            if not piece:
                late = not ready
                _end(self._child)
                what = f"took longer than {_SECONDS:g} s" if late else "used too much memory or crashed"
                raise InputError(self.where, f"chat template: rendering {what}")
            line += piece
        return json.loads(line)


def _end(child):
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()


def find_chat_template(directory, special_tokens: dict[str, str]) -> ChatTemplate | None:
    """Return the checkpoint's template: ``chat_template.jinja``, or the field of ``tokenizer_config.json``."""
    directory = Path(directory)
    path = directory / "chat_template.jinja"
    if path.exists():
        return ChatTemplate(read_text(path, limit=MAX_TEMPLATE), special_tokens, path)
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return None
    record = read_json(path, limit=64 << 20)
    source = record.get("chat_template") if isinstance(record, dict) else None
    if isinstance(source, list):  # several named templates; "default" is the one for plain chat
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise InputError(f"{path}: chat_template", f"expected text, got {type(source).__name__}")
    return ChatTemplate(source, special_tokens, path)
