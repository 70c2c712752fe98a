"""Prompts from files: one a line, or one a record. Every prompt knows its file and line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from cna_kernels.errors import InputError
from cna_kernels.fields import is_whole
from cna_kernels.files import FilePath, sha256

from .formats import records_of
from .hub_sets import hub_set


class ChatText(str):
    """A prompt that is a whole chat. As text it is the JSON of its messages.

    Attributes:
        messages: ``[{"role": TEXT, "content": TEXT}, ...]``.
        answer: the assistant's answer to them, or None.
    """

    messages: list[dict[str, Any]]
    answer: str | None

    def __new__(cls, messages: list[dict[str, Any]]) -> ChatText:
        chat = super().__new__(cls, json.dumps(messages, ensure_ascii=False))
        chat.messages, chat.answer = messages, None
        return chat


class TokenText(str):
    """A prompt that is given as token ids. As text it is their JSON.

    Attributes:
        ids: the ids, as they go into the model.
    """

    ids: list[int]

    def __new__(cls, ids: list[int]) -> TokenText:
        text = super().__new__(cls, json.dumps(ids))
        text.ids = ids
        return text


@dataclass(frozen=True)
class PromptSet:
    """Prompts and, for messages, the place of each: ``file:line``."""

    texts: tuple[str, ...]
    places: tuple[str, ...]

    @classmethod
    def of(cls, prompts: Sequence[str] | PromptSet, name: str) -> PromptSet:
        """Return the prompts as a set; a plain list is labelled ``name[0]``, ``name[1]``, ..."""
        if isinstance(prompts, PromptSet):
            return prompts
        if isinstance(prompts, str):
            raise InputError(name, "expected a list of prompts, got one string")
        texts = tuple(prompts)
        for number, text in enumerate(texts):
            require_text(text, f"{name}[{number}]")
        if not texts:
            raise InputError(name, "holds no prompt")
        return cls(texts, tuple(f"{name}[{number}]" for number in range(len(texts))))

    @property
    def sha256(self) -> str:
        """Of all texts in their order."""
        return sha256(*self.texts)

    def __len__(self):
        return len(self.texts)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return zip(self.texts, self.places, strict=True)


class BadLines:
    """What happens to a record that is no prompt: an error, or with ``skip`` one more in ``count``."""

    def __init__(self, *, skip: bool = False) -> None:
        self.skip, self.count = skip, 0
        self.first: str | None = None

    def add(self, error: InputError) -> None:
        """Count the error, or raise it."""
        if not self.skip:
            raise error
        self.count += 1
        self.first = self.first or str(error)


def read_prompts(path: FilePath, *, column: str | None = None, limit: int | None = None) -> PromptSet:
    """Read a prompt file into memory; see ``formats.py`` for how its format is found.

    Args:
        path: the file; ``FILE:COLUMN`` names the column, too. ``hf:org/set:split`` is a data set on the Hub, see
            ``hub_sets.py``.
        column: the field that holds the prompt, where records have fields; of several names with commas between them
            the first that a file has. Default: ``prompt``, or the only field, or ``messages``, or ``input_ids``.
        limit: keep the first so many.

    Raises:
        InputError: naming the file and the line, for an unreadable file, a missing column, or no prompt at all.
    """
    texts, places = zip(*iter_prompts(path, column=column, limit=limit), strict=True)
    return PromptSet(texts, places)


def iter_prompts(
    path: FilePath,
    *,
    column: str | None = None,
    limit: int | None = None,
    bad: BadLines | None = None,
    label: Label | None = None,
) -> Iterator[tuple[str, str]]:
    """As :func:`read_prompts`, one (text, place) after the other: files of any length need no memory.

    Args:
        label: keep only the records with this label.
    """
    bad = bad or BadLines()
    path, own = file_and_column(path)
    column = own or column
    sole: list[str | None] = []  # the first record's only field, if it has one field; what is "only" is a file's matter

    def parse(record: object, place: str):
        if isinstance(record, dict) and not sole:
            sole.append(next(iter(record)) if len(record) == 1 and label is None else None)
        if label is not None and not label.fits(record, place):
            return None
        return prompt_of(record, place, column, *sole)

    yield from accepted(path, parse, bad, limit, columns=() if column is None else (column, *column.split(",")))


def file_and_column(path: FilePath) -> tuple[Path, str | None]:
    """``FILE:COLUMN`` as file and column; a file that exists under the whole name has no column in it. A data set on
    the Hub stays as it is named."""
    if (on_hub := hub_set(path)) is not None:
        return Path(path), on_hub.column
    text = os.fspath(path)
    if ":" in text and not os.path.lexists(text):
        file, _, column = text.rpartition(":")
        if column and os.path.lexists(file):
            return Path(file), column
    return Path(path), None


@dataclass(frozen=True)
class Label:
    """A field of records that says which side a prompt is on.

    Attributes:
        name: the field; value: of the records to keep; negated: keep the other records instead.
    """

    name: str
    value: str
    negated: bool = False

    @classmethod
    def parse(cls, text: str) -> Label:
        """``NAME=VALUE``; ``NAME`` alone stands for ``NAME=1``, which true, yes and 1.0 equal."""
        name, _, value = text.partition("=")
        if not name:
            raise InputError("label", f"expected NAME=VALUE, got {text!r}")
        return cls(name, _label_value(value or "1"))

    @property
    def others(self) -> Label:
        """The label of the other side."""
        return Label(self.name, self.value, not self.negated)

    def fits(self, record: object, place: str) -> bool:
        """Whether a record is on this side. Raises InputError where it has no such field, or nothing in it."""
        value = record.get(self.name) if isinstance(record, dict) else None
        is_missing = value is None or value == "" or (_label_value(value) == "nan" and self.value != "nan")
        if is_missing:  # NaN is how pandas writes a number that is not there
            raise InputError(f"{place}: {self.name}", "expected a label, and there is none")
        return (_label_value(value) == self.value) != self.negated


def _label_value(value: object) -> str:
    text = str(value).strip().casefold()
    return {"true": "1", "yes": "1", "1.0": "1", "false": "0", "no": "0", "0.0": "0"}.get(text, text)


def accepted(
    path: FilePath, parse: Callable, bad: BadLines, limit: int | None, columns: Sequence[str] = ()
) -> Iterator:
    """What ``parse(record, place)`` makes of the first ``limit`` records that it does not refuse; at least one.

    Records that it makes None of are not asked for.
    """
    found = 0
    for record, place in records_of(path, bad, columns):
        try:
            value = parse(record, place)
        except InputError as error:
            bad.add(error)
            continue
        if value is None:
            continue
        yield value
        found += 1
        if found == limit:
            break
    if not found:
        raise InputError(path, "holds no prompt" + (f"; {bad.first}" if bad.count else ""))


def neutral_prompts() -> PromptSet:
    """The built-in diverse prompts of the universal filter."""
    return _bundled("neutral_prompts")


def neutral_texts() -> PromptSet:
    """Plain texts on which a steered model's next tokens are compared with the unsteered model's (KL). None of them is
    a prompt of the universal filter, which chooses neurons."""
    return _bundled("neutral_texts")


def harmless_prompts() -> PromptSet:
    """A dozen questions that any model should still answer when it is steered."""
    return _bundled("harmless_prompts")


def _bundled(name: str) -> PromptSet:
    lines = (files(__package__) / "data" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return PromptSet.of([line for line in lines if line], name)


def prompt_of(record: object, place: str, column: str | None, sole: str | None = None) -> tuple[str, str]:
    """The prompt in a record, and its place: the record's own, or its column's.

    ``sole`` is the only field of the file's records, if they have one field, which holds the prompt by any name.

    A list of messages is a chat: its last message, if it is the assistant's, is no part of the prompt. A list of whole
    numbers is token ids.
    """
    if isinstance(record, dict):
        name = _column_in(record, column, sole, place)
        place, record = f"{place}: {name}", record[name]
        if isinstance(record, list) and record and name != "messages" and all(map(is_whole, record)):
            return TokenText(record), place
        if isinstance(record, list):
            return chat_of(record, place), place
    return require_text(record, place), place


def _column_in(record: dict, column: str | None, sole: str | None, place: str) -> str:
    names = list(record)
    if column is not None:
        wanted = [column, *column.split(",")]
    else:
        wanted = ["prompt", *([] if sole is None else [sole]), "messages", "input_ids"]
    found = next((name for name in wanted if name in record), None)
    if found is None:
        has = ", ".join(str(key) for key in names[:8])
        asked = column or "prompt"
        raise InputError(place, f"has no column {asked!r} (it has {has}); name one with --column, or as FILE:COLUMN")
    return found


def chat_of(messages: list, place: str) -> ChatText:
    """A chat from its messages, up to the assistant's answer. Raises InputError naming the message."""
    for number, message in enumerate(messages):
        where = f"{place}[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(where, 'expected a message {"role": TEXT, "content": TEXT}')
        content = message.get("content")
        if not isinstance(content, list):
            require_text(content, f"{where}: content")
    answer = None
    if messages and messages[-1]["role"] == "assistant":
        answer = messages[-1]["content"]
        messages = messages[:-1]
    if not messages:
        raise InputError(place, "holds no message to answer")
    chat = ChatText([{name: m[name] for name in m if m[name] is not None} for m in messages])
    chat.answer = answer if isinstance(answer, str) else None
    return chat


def require_text(text: object, place: str) -> str:
    """Return the text; raise InputError naming the place unless there is something in it."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(place, f"expected a prompt, got {text!r}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(place, "holds half of a surrogate pair, which is not text")
    if "\0" in text:
        raise InputError(place, "holds a NUL character, which is not text")
    return text
