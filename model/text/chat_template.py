"""Chat templates: jinja2 programs from a checkpoint, rendered in a child process with limits.

The jinja sandbox keeps a template from reaching Python, but not from looping or from building a string of gigabytes.
So a child process renders the template under a memory limit, and the parent waits a bounded time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cna_kernels.errors import InputError
from cna_kernels.fields import Fields, short
from cna_kernels.files import read_text

from ..checkpoint.gguf_file import is_gguf

MAX_TEMPLATE = 64 << 10  # bytes of template
MAX_OUTPUT = 4 << 20  # characters of one rendered conversation
OWN_NAMES = ("messages", "tools", "documents", "add_generation_prompt")  # what every template is given
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's thought, the first that is there
_SECONDS = 10.0  # of waiting for a batch of _BATCH conversations; a real template takes about a millisecond each
_BATCH = 64
FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"

Chat = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """Renders conversations with a checkpoint's template; threads take turns.

    Attributes:
        source: the template's text; where: the file, for messages; name: "default", or what the checkpoint calls it.
        moment: the time that the template sees as now: when the template was read, unless it is set before the first
            rendering. A run that goes on another day sets it, so that all of its prompts have one date.
    """

    def __init__(self, source: str, variables: Mapping[str, str], where, name: str = "default"):
        if len(source.encode("utf-8")) > MAX_TEMPLATE:
            raise InputError(where, f"chat template is larger than {MAX_TEMPLATE} bytes")
        self.source, self.variables, self.where, self.name = source, dict(variables), where, name
        self.moment = datetime.datetime.now().replace(microsecond=0)
        self._child: subprocess.Popen | None = None
        self._owner: int | None = None  # the process that started the child; a fork must not share its pipes
        self._broken: str | None = None  # why the template cannot be used at all
        self._lock = threading.Lock()

    @property
    def is_dated(self) -> bool:
        """Whether the text may depend on the day."""
        return "strftime_now" in self.source

    def render(self, conversations: Sequence[Chat], template_args: Mapping[str, Any] | None = None) -> list[str]:
        """Return the text of each conversation, ended by the header of the assistant's turn.

        Args:
            conversations: of messages, ``{"role": TEXT, "content": TEXT}``.
            template_args: variables of the template.

        Raises:
            InputError: the template is malformed, refuses the conversation, or exceeds a limit.
        """
        return list(self.each(conversations, template_args))

    def each(self, conversations: Sequence[Chat], template_args: Mapping[str, Any] | None = None) -> Iterator[str]:
        """As :meth:`render`, one text after the other: a caller may stop at one that is too long."""
        given = dict(template_args or {})
        for name in OWN_NAMES:
            if name in given:
                raise InputError("template_args", f"{name!r} is not a variable to give")
        for start in range(0, len(conversations), _BATCH):
            chats = [[_message(message) for message in chat] for chat in conversations[start : start + _BATCH]]
            with self._lock:
                yield from self._ask({"conversations": chats, "variables": given}, len(chats))

    def _ask(self, message: dict[str, Any], n: int) -> Iterator[str]:
        """Send a message to the child, which is started if none runs, and yield its ``n`` answers."""
        if self._broken is not None:
            raise InputError(self.where, self._broken)
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self._start()
        pending = n
        try:
            self._send(message)
            waited = 0.0
            while pending:
                began = time.monotonic()
                answer = self._receive(_SECONDS - waited)
                waited += time.monotonic() - began
                pending -= 1
                yield answer["text"]
        finally:  # an answer that nobody waits for must not be taken for the next message's
            if pending:
                _end(self._child, self._owner)

    def _start(self):
        command = [sys.executable, "-I", str(Path(__file__).with_name("template_child.py"))]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._child, self._owner)
        self._send(
            {
                "path": [entry for entry in sys.path if entry],
                "template": self.source,
                "variables": self.variables,
                "moment": self.moment.isoformat(),
                "max_output": MAX_OUTPUT,
            }
        )
        try:
            self._receive(_SECONDS)
        except InputError as error:
            self._broken = str(error).removeprefix(f"{self.where}: ")
            _end(self._child, self._owner)
            raise

    def _send(self, message: dict[str, Any]):
        child = self._child
        assert child is not None and child.stdin is not None, "_start has opened it"
        with contextlib.suppress(OSError):  # if the child has ended, the next read finds the end of its output
            child.stdin.write(json.dumps(message).encode() + b"\n")
            child.stdin.flush()

    def _receive(self, seconds: float) -> dict[str, Any]:
        """Wait for one line."""
        assert self._child is not None and self._child.stdout is not None, "_start has opened it"
        output, lines = self._child.stdout, []
        reader = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
        reader.start()  # some systems cannot wait for a pipe with a time limit; all can for a thread
        reader.join(max(seconds, 0.0))
        if reader.is_alive():
            raise InputError(self.where, f"chat template: rendering took longer than {_SECONDS:g} s")
        if not lines[0].endswith(b"\n"):
            raise InputError(self.where, "chat template: rendering used too much memory or crashed")
        answer = json.loads(lines[0])
        if "error" in answer:
            raise InputError(self.where, f"chat template: {answer['error']}")
        return answer


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message as a template gets it: without nulls, and with its reasoning under the names that templates know."""
    message = {name: value for name, value in given.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _end(child, owner):
    if owner != os.getpid():
        return
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            pipe.close()


def find_chat_template(
    directory, settings: Mapping[str, Any], special_tokens: Mapping[str, str], name: str | None = None
) -> ChatTemplate | None:
    """Return a checkpoint's template, as transformers finds it; None where the checkpoint has none.

    ``chat_template.jinja`` and the named files of ``additional_chat_templates/`` go before the field ``chat_template``
    of tokenizer_config.json, which holds one text, or several by name.

    Args:
        settings: tokenizer_config.json.
        name: which of several; None takes "default".

    Raises:
        InputError: there are several templates, and none of this name.
    """
    directory, sources = Path(directory), {}
    if os.path.lexists(directory / FILE):
        sources["default"] = read_text(directory / FILE, limit=MAX_TEMPLATE), directory / FILE
    if os.path.isdir(directory / FOLDER):
        for path in sorted((directory / FOLDER).glob("*.jinja")):
            sources[path.stem] = read_text(path, limit=MAX_TEMPLATE), path
    if not sources:
        path = directory if is_gguf(directory) else directory / "tokenizer_config.json"
        sources = {key: (text, path) for key, text in _in_settings(Fields(dict(settings), path)).items()}
    if not sources:
        return None
    if name is None and "default" not in sources:
        where = next(iter(sources.values()))[1]
        raise InputError(where, f"has no chat template named 'default', but {', '.join(sorted(sources))}")
    if name is not None and name not in sources:
        where = next(iter(sources.values()))[1]
        raise InputError(where, f"has no chat template named {name!r}, but {', '.join(sorted(sources))}")
    name = name or "default"
    source, path = sources[name]
    return ChatTemplate(source, special_tokens, path, name)


def _in_settings(fields: Fields) -> dict[str, str]:
    """The templates of the field ``chat_template``: a text, an object of texts, or a list of name and template."""
    stored = fields.record.get("chat_template")
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {"default": stored}
    if isinstance(stored, list):
        pairs = [(entry.get("name"), entry.get("template")) for entry in stored if isinstance(entry, dict)]
    else:
        pairs = list(stored.items()) if isinstance(stored, dict) else []
    found = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    if not found or len(found) != len(stored):
        raise fields.error("chat_template", f"expected text, or texts with names, got {short(stored)}")
    return found
