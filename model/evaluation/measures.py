"""The kinds of measure of a behaviour: each says of one prompt whether the behaviour is there.

| kind | there when | other fields |
|---|---|---|
| next token | the likeliest next token is the first token of ``answer`` | |
| pair | the likeliest first token of ``answer`` is likelier than that of ``other`` | |
| contains | the answer holds ``answer``, as words | |
| refusal | the answer holds a phrase of a list | ``list``: "broad" or "strict" |
| phrases | the answer holds one of the phrases, as words | ``phrases`` |
| regex | the answer has a match | ``pattern`` |
| language | most function words of the answer are of the language | ``language``: de, en, es, fr or it |
| json | the answer holds a JSON object or list, alone or in a fence | |
| judge | a program scores the answer at ``least`` or more | ``command``, ``least`` (0.5) |

The first two need one forward pass a prompt, the others an answer. Case does not count in "contains" and "phrases".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cna_kernels.errors import InputError
from cna_kernels.fields import Fields

from ..text.tokenizer import Tokenizer
from .judge import judge
from .metrics import LISTS, Refusals, after_thought

FROM_LOGITS = ("next token", "pair")
_WITH_ANSWERS = ("next token", "pair", "contains")


@dataclass(frozen=True)
class Item:
    """A prompt to measure on.

    Attributes:
        place: the file and field, for messages.
        answers: what the behaviour makes the model say: any of these; others: what it says otherwise.
    """

    prompt: str
    place: str
    answers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """How a behaviour is seen; see the module.

    Attributes:
        kind: a kind of the table above. Other attributes belong to some kinds.
    """

    kind: str
    words: tuple[str, ...] = ()
    pattern: str = ""
    language: str = ""
    command: str = ""
    least: float = 0.5

    @property
    def from_logits(self) -> bool:
        """Whether a forward pass is enough; otherwise the prompt is answered."""
        return self.kind in FROM_LOGITS

    @property
    def needs_answers(self) -> bool:
        """Whether every prompt needs an ``answer`` of its own; otherwise any prompt can be measured."""
        return self.kind in _WITH_ANSWERS

    def check(self, item: Item) -> None:
        """Raise InputError unless the item has the answers that this kind asks for, and no others."""
        wanted = {"answer": self.kind in _WITH_ANSWERS, "other": self.kind == "pair"}
        for name, given in (("answer", item.answers), ("other", item.others)):
            if wanted[name] != bool(given):
                raise InputError(f"{item.place}.{name}", "is missing" if wanted[name] else f"is not for {self.kind!r}")

    def of_logits(self, logits: Tensor, item: Item, tokenizer: Tokenizer) -> bool:
        """Whether the behaviour is there, by the logits ``[V]`` of the token after the prompt."""
        answers = tokenizer.first_ids(item.answers, f"{item.place}.answer")
        if self.kind == "next token":
            return int(logits.argmax()) in answers
        others = tokenizer.first_ids(item.others, f"{item.place}.other")
        if set(answers) & set(others):
            raise InputError(f"{item.place}.other", "begins with the same token as an answer")
        return bool(logits[answers].max() > logits[others].max())

    def of_texts(self, answers: Sequence[str], items: Sequence[Item]) -> list[bool]:
        """Whether the behaviour is there in each answer. What counts is what follows a thought."""
        visible = [after_thought(answer) or "" for answer in answers]
        if self.kind == "judge":
            asked = [{"prompt": item.prompt, "answer": text} for text, item in zip(visible, items, strict=True)]
            return [score >= self.least for score in judge(self.command, asked)]
        return [self._of_text(text, item) for text, item in zip(visible, items, strict=True)]

    def _of_text(self, text: str, item: Item) -> bool:
        if self.kind == "contains":
            return _holds(text, item.answers)
        if self.kind == "refusal":
            return Refusals(self.words)(text)
        if self.kind == "phrases":
            return _holds(text, self.words)
        if self.kind == "regex":
            return re.search(self.pattern, text) is not None
        if self.kind == "language":
            return language_of(text) == self.language
        return holds_json(text)


def measure_of(fields: Fields) -> Measure:
    """Read the field ``measure`` of a behaviour's file."""
    own = {
        "next token": (), "pair": (), "contains": (), "json": (), "refusal": ("list",), "phrases": ("phrases",),
        "regex": ("pattern",), "language": ("language",), "judge": ("command", "least"),
    }  # fmt: skip
    kind = fields.one_of("kind", own)
    fields.only(("kind", *own[kind]), f"the measure {kind!r}")
    if kind == "refusal":
        return Measure(kind, words=Refusals.bundled(fields.one_of("list", LISTS, "broad")).phrases)
    if kind == "phrases":
        words = fields.items("phrases", lambda x: isinstance(x, str) and x.strip() != "", "a phrase")
        if not words:
            raise fields.error("phrases", "holds no phrase")
        return Measure(kind, words=tuple(words))
    if kind == "regex":
        pattern = fields.text("pattern")
        try:
            re.compile(pattern)
        except re.error as error:
            raise fields.error("pattern", f"is no regular expression: {error}") from None
        return Measure(kind, pattern=pattern)
    if kind == "language":
        return Measure(kind, language=fields.one_of("language", FUNCTION_WORDS))
    if kind == "judge":
        return Measure(kind, command=fields.text("command"), least=fields.number("least", (-1e9, 1e9), 0.5))
    return Measure(kind)


def _holds(text: str, phrases: Sequence[str]) -> bool:
    """Whether the text holds one of the phrases, not within longer words."""
    plain = " ".join(text.casefold().split())
    for phrase in phrases:
        wanted = re.escape(" ".join(phrase.casefold().split()))
        if re.search(rf"(?<!\w){wanted}(?!\w)", plain):
            return True
    return False


# Frequent words that only one of these languages has.
FUNCTION_WORDS = {
    "de": "der die das und ist nicht ein eine ich wir sie zu mit auf für von dem den des im auch es sind wie aus bei",
    "en": "the and is are of to that it was with for this you they have from be not by at as which we on can has",
    "es": "el los las y es una con para por que del al se su lo como más pero sus están hay muy fue este cuando",
    "fr": "le les et est une des du dans pour que qui sur avec pas au aux ce cette sont il elle nous vous leur mais",
    "it": "il gli e è una di che per con del della nel non sono anche più come questo dei delle ma ha alla lo si",
}
_WORDS = {language: frozenset(words.split()) for language, words in FUNCTION_WORDS.items()}
_FEWEST = 3  # function words that a text must hold before it is said to be of a language


def language_of(text: str) -> str | None:
    """Return the language most of whose function words the text holds; None where it holds too few, or as many of two.

    A word that several languages share counts for each of them.
    """
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {language: sum(word in known for word in words) for language, known in _WORDS.items()}
    first, second = sorted(counts.values(), reverse=True)[:2]
    if first < _FEWEST or first == second:
        return None
    return max(counts, key=lambda language: counts[language])


def holds_json(text: str) -> bool:
    """Whether the text is a JSON object or list that is not empty, or has one in a fence or after some words."""
    fenced = re.findall(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    starts = [text[match.start() :] for match in list(re.finditer(r"[{\[]", text))[:20]]
    decoder = json.JSONDecoder()
    for part in (*fenced, *starts):
        try:
            value, _ = decoder.raw_decode(part.strip())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, (dict, list)) and value:
            return True
    return False
