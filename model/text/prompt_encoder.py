"""Prompts to token ids: as the user's message of a chat, as a whole chat, or as plain text."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from cna_kernels.errors import InputError, InputWarning
from cna_kernels.fields import short

from ..discovery.collect import check_length
from ..discovery.packing import TokenPrompt
from ..prompts.corpus import Entry
from ..prompts.files import ChatText, PromptSet, TokenText
from .chat_template import OWN_NAMES
from .tokenizer import Tokenizer

_SHORTEST_MARK = 3  # characters of a special token that a prompt may not hold by accident


def _require_json(value: Any, where: str) -> None:
    """Raise InputError unless a value can be recorded as strict JSON."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(where, "holds half of a surrogate pair, which is not text") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(where, f"expected a value that JSON has, got {short(value)} ({error})") from None


class PromptEncoder:
    """How the prompts of a model become tokens.

    Attributes:
        tokenizer: text to ids.
        context_length: tokens that the model takes.
        system: the system message of every chat that has none of its own, or None.
        template_args: variables of the chat template.
        n_marked, first_marked: how many prompts held a special token as text, and the place of the first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_length: int,
        *,
        system: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self.system, self.template_args = system, dict(template_args or {})
        for name in self.template_args:
            if not name.isidentifier() or name in OWN_NAMES:
                raise InputError("template_args", f"expected names of template variables, got {short(name)}")
            _require_json(self.template_args[name], f"template_args: {name}")
        _require_json(system, "system")
        self.n_marked, self.first_marked = 0, ""
        self._notes = list(tokenizer.notes)  # said when the first prompt is encoded
        self._marks = tuple(text for text in tokenizer.special_texts if len(text) >= _SHORTEST_MARK)

    def uses_chat(self, chat: bool | None) -> bool:
        """Whether prompts go through the chat template; ``chat`` None: if the checkpoint has one."""
        return self.tokenizer.template is not None if chat is None else chat

    def describe(self, chat: bool | None = None) -> str:
        """What a prompt becomes, for a line that a user reads."""
        template = self.tokenizer.template
        if not self.uses_chat(chat):
            why = "the checkpoint has no chat template" if template is None else "its chat template is not used"
            return f"plain text, {why}; {'with' if self.tokenizer.adds_bos else 'no'} BOS"
        if template is None:
            raise InputError(self.tokenizer.directory, "has no chat template; use plain prompts (--no-template)")
        parts = [f"{template.where.name} {template.name!r} {str(self.tokenizer.template_sha256)[:8]}"]
        parts += [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in self.template_args.items()]
        if template.is_dated:
            parts.append(f"dated {template.moment:%Y-%m-%d}")
        if self.system is not None:
            parts.append(f"system message {short(self.system)}")
        return "chat template " + ", ".join(parts)

    def record(self, chat: bool | None = None) -> dict[str, Any] | None:
        """What the text of a chat depends on besides template and prompt; None for plain text, and for nothing else."""
        template = self.tokenizer.template
        if not self.uses_chat(chat) or template is None:
            return None
        day = template.moment.date().isoformat() if template.is_dated else None
        found = {"args": self.template_args, "system": self.system, "day": day}
        return found if any(found.values()) else None

    def set_day(self, day: str | None) -> None:
        """Let a dated template see this day, ``YYYY-MM-DD``, as today."""
        template = self.tokenizer.template
        if day is not None and template is not None:
            template.moment = datetime.datetime.fromisoformat(day)

    def encode(
        self, prompts: PromptSet, *, chat: bool | None = None, double_bos: bool = False, keep_long: bool = False
    ) -> list[TokenPrompt]:
        """Tokenise each prompt.

        Args:
            chat: None takes the chat template where the checkpoint has one.
            keep_long: keep prompts longer than the context, cut to one token more; otherwise they are an error.

        Raises:
            InputError: naming the prompt's place.
        """
        as_chat = self.uses_chat(chat)
        while self._notes:
            warnings.warn(self._notes.pop(), InputWarning, stacklevel=3)
        self._count_marked(prompts)
        chats = [self._messages(text) for text in prompts.texts if as_chat and not isinstance(text, TokenText)]
        rendered = self.tokenizer.each(chats, template_args=self.template_args) if chats else iter(())
        found = []
        for text, place in prompts:
            if isinstance(text, TokenText):
                row = self._checked_ids(text, place)
            elif as_chat:
                row = self.tokenizer.encode_rendered(next(rendered), double_bos=double_bos)
            elif isinstance(text, ChatText):
                raise InputError(place, "is a chat, which needs a chat template")
            else:
                row = self.tokenizer.encode(text)
            if len(row) > self.context_length:
                if not keep_long:
                    check_length(TokenPrompt(row, place), self.context_length)
                row = row[: self.context_length + 1]
            found.append(TokenPrompt(row, place))
        return found

    def _checked_ids(self, text: TokenText, place: str) -> list[int]:
        for number in text.ids:
            if not 0 <= number < self.tokenizer.vocab_size:
                raise InputError(place, f"holds id {number}, beyond the model's {self.tokenizer.vocab_size} rows")
        return text.ids

    def encode_entries(
        self,
        entries: Sequence[Entry],
        *,
        position: str = "last",
        chat: bool | None = None,
        double_bos: bool = False,
        keep_long: bool = False,
    ) -> list[TokenPrompt]:
        """Tokenise entries of a corpus, each with the number of its tokens that count at ``position``.

        Raises:
            InputError: position is "answer", and an entry has no answer.
        """
        double = [double_bos and not entry.universal for entry in entries]
        ids: list[list[int]] = [[] for _ in entries]
        for which in set(double):
            rows = [place for place, doubled in enumerate(double) if doubled == which]
            texts = PromptSet(tuple(entries[n].prompt for n in rows), tuple(entries[n].place for n in rows))
            encoded = self.encode(texts, chat=chat, double_bos=which, keep_long=keep_long)
            for place, prompt in zip(rows, encoded, strict=True):
                ids[place] = prompt.ids
        found = []
        for entry, row in zip(entries, ids, strict=True):
            n_counted = 1
            if position == "all":
                n_bos = next((n for n, token in enumerate(row) if token != self.tokenizer.bos_id), len(row))
                n_counted = max(len(row) - n_bos, 1)
            elif position == "answer" and not entry.universal:
                if entry.answer is None:
                    raise InputError(entry.place, "has no answer, which position 'answer' counts")
                answer = self.tokenizer.encode_answer(entry.answer)
                n_counted = len(answer)
                row = row + answer
            found.append(TokenPrompt(row, entry.place, n_counted))
        return found

    def _messages(self, text: str) -> list[dict[str, Any]]:
        messages = text.messages if isinstance(text, ChatText) else [{"role": "user", "content": str(text)}]
        if self.system is not None and not any(message.get("role") == "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages

    def _count_marked(self, prompts: PromptSet) -> None:
        """Count prompts that hold special tokens as text: most likely chats that were rendered before."""
        for text, place in prompts:
            if any(mark in text for mark in self._marks):
                self.n_marked += 1
                if self.n_marked == 1:
                    self.first_marked = place
                    what = "holds special tokens, which count as such: is it a rendered chat already?"
                    warnings.warn(f"{place}: {what}", InputWarning, stacklevel=4)
