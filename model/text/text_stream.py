"""TextStream: the text of answers while they grow."""

from __future__ import annotations

import re
from collections.abc import Callable

from .tokenizer import Tokenizer

_BYTE = re.compile("<0x[0-9A-F]{2}>")


class TextStream:
    """Turns a batch's tokens into text.

    Bytes of an incomplete character wait until the character is complete, and tokens that stand for one byte until
    another token comes: further bytes may make no text of those before. A tokenizer that cleans text up goes back to
    what was shown, so that its text waits for the end.
    """

    def __init__(self, tokenizer: Tokenizer, first_row: int, on_text: Callable[[int, str], None]):
        self._tokenizer, self._first_row, self._on_text = tokenizer, first_row, on_text
        self._special = frozenset(tokenizer.special_texts)
        self._ids: dict[int, list[int]] = {}
        self._shown: dict[int, str] = {}

    def __call__(self, row: int, token: int):
        self._ids.setdefault(row, []).append(token)
        piece = self._tokenizer.token(token) or ""
        if piece in self._special or _BYTE.fullmatch(piece) or self._tokenizer.cleans_up:
            return
        text = self._tokenizer.decode(self._ids[row])
        if not text.endswith("\ufffd"):
            self._show(row, text)

    def finish(self):
        """Show the text that still waits: no more tokens come to complete it."""
        for row, ids in self._ids.items():
            self._show(row, self._tokenizer.decode(ids))

    def _show(self, row, text):
        new = text[len(self._shown.get(row, "")) :]
        if new:
            self._shown[row] = text
            self._on_text(self._first_row + row, new)
