"""Phrases in texts: what counts as the same wording, and where a word begins and ends.

Refusal lists and the measures "contains" and "phrases" look for phrases here. Case, the form of accents and
apostrophes, white space and Markdown do not count.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Scripts in which a word may stand against the next one. Hangul is among them: particles follow a word without a space.
_SPACELESS = (
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3040-\u31ff\uff66-\uff9f"  # Hiragana, Katakana, also of half width
    "\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u19e0-\u19ff"  # Thai, Lao, Myanmar, Khmer
    "\u1100-\u11ff\ua960-\ua97f\uac00-\ud7ff"  # Hangul
)
_SPACELESS_CHARACTER = re.compile(f"[{_SPACELESS}]")
_UNIT = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}]+")

# Markdown: emphasis and code anywhere, but not between two digits, as in 2*3; at the beginning of a line headings,
# quotes, also nested, and bullets.
_MARKUP = re.compile(
    r"(?<![*_`~])(?:(?<!\d)[*_`~]+|[*_`~]+(?![\d*_`~]))|^[ \t]*(?:(?:[#>]+|[-+](?=\s))[ \t]*)+", re.MULTILINE
)
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u00b4\uff07"), "'")


def plain(text: str) -> str:
    """The text without differences of case and of accents' forms, with straight apostrophes and single spaces."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.translate(_APOSTROPHES).split())


def units(text: str) -> list[str]:
    """The text's words, but every character of a script without spaces between words on its own."""
    return _UNIT.findall(text)


def holds(text: str, phrase: str, at_start: bool = False) -> bool:
    """Whether the text holds the phrase, not within longer words.

    A phrase may begin or end within a run of letters where its own letter there, or the letter beside it, is of a
    script without spaces between words.

    Args:
        at_start: look only at the text's beginning.
    """
    wanted = _plain_phrase(phrase)
    return wanted != "" and any(_found(reading, wanted, at_start) for reading in _readings(text))


@lru_cache(maxsize=64)  # a text is asked for many phrases
def _readings(text: str) -> tuple[str, ...]:
    """The text without Markdown, and with it: a phrase may hold its marks."""
    return tuple(dict.fromkeys((plain(_MARKUP.sub("", text)), plain(text))))


_plain_phrase = lru_cache(maxsize=4096)(plain)


def _found(text: str, phrase: str, at_start: bool) -> bool:
    if at_start:
        return text.startswith(phrase) and not _within_word(text, len(phrase))
    start = text.find(phrase)
    while start >= 0:
        if not _within_word(text, start) and not _within_word(text, start + len(phrase)):
            return True
        start = text.find(phrase, start + 1)
    return False


def _within_word(text: str, place: int) -> bool:
    """Whether the characters before and at a place belong to one word."""
    return 0 < place < len(text) and _of_spaced_word(text[place - 1]) and _of_spaced_word(text[place])


def _of_spaced_word(character: str) -> bool:
    """Whether it is a letter, digit, accent or underscore of a script with spaces between words."""
    of_word = character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
    return of_word and not _SPACELESS_CHARACTER.match(character)
