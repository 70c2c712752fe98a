"""Chat templates: jinja2 programs from a checkpoint, rendered in a child process with limits.

The jinja sandbox keeps a template from reaching Python, but not from looping or from building a string of gigabytes.
So a child process renders the template under a memory limit, and the parent waits a bounded time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from cna_kernels.errors import InputError
from cna_kernels.fields import Fields, short
from cna_kernels.files import read_json, read_text

MAX_TEMPLATE = 64 << 10  # bytes of template
MAX_OUTPUT = 4 << 20  # characters of one rendered conversation
_SECONDS = 10.0  # for one batch of _BATCH conversations; a real template takes about a millisecond each
_BATCH = 64


class ChatTemplate:
    """Renders conversations with a checkpoint's template; threads take turns. ``where`` names the file in messages."""

    def __init__(self, source: str, variables: dict[str, str], where):
        if len(source.encode("utf-8")) > MAX_TEMPLATE:
            raise InputError(where, f"chat template is larger than {MAX_TEMPLATE} bytes")
        self.source, self.variables, self.where = source, variables, where
        self._child: subprocess.Popen | None = None
        self._owner: int | None = None  # the process that started the child; a fork must not share its pipes
        self._lock = threading.Lock()

    def render(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        """Return the text of each conversation, ended by the header of the assistant's turn.

        Raises:
            InputError: the template is malformed, refuses the conversation, or exceeds a limit.
        """
        texts = []
        for start in range(0, len(conversations), _BATCH):
            with self._lock:
                texts += self._ask({"conversations": conversations[start : start + _BATCH]})["texts"]
        return texts

    def _ask(self, message):
        """Exchange a message with the child, which is started if none runs."""
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self._start()
        return self._exchange(message)

    def _start(self):
        command = [sys.executable, "-I", str(Path(__file__).with_name("template_child.py"))]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._child, self._owner)
        self._exchange(
            {
                "path": [entry for entry in sys.path if entry],
                "template": self.source,
                "variables": self.variables,
                "max_output": MAX_OUTPUT,
            }
        )

    def _exchange(self, message):
        """Send one line, wait for one line. If that takes too long or is interrupted, the child is killed."""
        try:
            line = self._transfer(json.dumps(message).encode() + b"\n")
        except BaseException:  # a late answer must not be taken for the next message's
            _end(self._child, self._owner)
            raise
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(self.where, f"chat template: {answer['error']}")
        return answer

    def _transfer(self, request: bytes) -> bytes:
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None, "_start has opened them"
        with contextlib.suppress(OSError):  # if the child has ended, the read below finds the end of its output
            child.stdin.write(request)
            child.stdin.flush()
        lines: list[bytes] = []
        output = child.stdout
        reader = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
        reader.start()  # some systems cannot wait for a pipe with a time limit; all can for a thread
        reader.join(_SECONDS)
        if reader.is_alive():
            raise InputError(self.where, f"chat template: rendering took longer than {_SECONDS:g} s")
        if not lines[0].endswith(b"\n"):
            raise InputError(self.where, "chat template: rendering used too much memory or crashed")
        return lines[0]


def _end(child, owner):
    if owner != os.getpid():
        return
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            pipe.close()


def find_chat_template(directory, special_tokens: dict[str, str]) -> ChatTemplate | None:
    """Return the checkpoint's template: ``chat_template.jinja``, or the field of ``tokenizer_config.json``."""
    directory = Path(directory)
    path = directory / "chat_template.jinja"
    if os.path.lexists(path):
        return ChatTemplate(read_text(path, limit=MAX_TEMPLATE), special_tokens, path)
    path = directory / "tokenizer_config.json"
    if not os.path.lexists(path):
        return None
    fields = Fields(read_json(path, limit=64 << 20), path)
    source = fields.record.get("chat_template")
    if isinstance(source, list):  # several named templates; "default" is the one for plain chat
        default = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = default[0].get("template") if default else None
    if source is None:
        return None
    if not isinstance(source, str):
        raise fields.error("chat_template", f"expected text, got {short(source)}")
    return ChatTemplate(source, special_tokens, path)
