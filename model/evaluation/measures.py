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

The first two need one forward pass a prompt, the others an answer. Case, the form of apostrophes and accents, and
Markdown do not count in "contains" and "phrases".
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
from .wording import holds, plain

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
        """Whether the behaviour is there in each answer. What counts is what follows a thought.

        It is not there, and is not looked for, where the thought does not end.
        """
        pairs = list(zip(map(after_thought, answers), items, strict=True))
        if self.kind == "judge":
            asked = [{"prompt": item.prompt, "answer": text} for text, item in pairs if text is not None]
            scores = iter(judge(self.command, asked) if asked else ())
            return [text is not None and next(scores) >= self.least for text, _ in pairs]
        return [text is not None and self._of_text(text, item) for text, item in pairs]

    def _of_text(self, text: str, item: Item) -> bool:
        if self.kind == "contains":
            return any(holds(text, answer) for answer in item.answers)
        if self.kind == "refusal":
            return Refusals(self.words)(text)
        if self.kind == "phrases":
            return any(holds(text, phrase) for phrase in self.words)
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


# Frequent words of each language. One that several languages share stands with each of them. With an apostrophe: what
# is left of a word before a vowel.
FUNCTION_WORDS = {
    "de": "der die das den dem des ein eine einen einem einer und oder aber ist sind war bin hat habe haben wird "
    "werden kann nicht kein keine ich du er sie es wir ihr mich mir sich mein meine zu zum zur im in an am "
    "auf aus bei mit nach von vom vor für um über wie was wenn dass weil auch noch nur so man als",
    "en": "the a an and or but if is are was were be been am has have had do does can will would not no i you he "
    "she it we they me my your his her its our their them this that these those there of to in on at by for "
    "with from as into about which who what when how so",
    "es": "el la los las un una unos unas y o pero que de del a al en con por para sin sobre es son era fue está "
    "están hay ha se su sus mi tu yo me te le les lo nos no sí si más muy como cuando donde este esta esto "
    "ese esa qué también porque",
    "fr": "le la les un une des du de au aux et ou mais que qui dans en sur avec sans pour par est sont suis était "
    "être a ai ont je tu il elle on nous vous ils elles me te se ce cet cette ces mon ma mes son sa ses leur "
    "ne pas plus très comme si y j' l' d' c' n' qu' s' m' t'",
    "it": "il lo la i gli le un uno una e ed o ma che di del della dei degli delle a al alla ai da dal dalla in nel "
    "nella con su sul sulla per tra è sono era ho ha hanno non si mi ti ci io tu lui lei noi questo questa "
    "come quando anche più molto se perché l' un' dell' nell' all' dall' sull' quest' c' d'",
}
_WORDS = {language: frozenset(plain(words).split()) for language, words in FUNCTION_WORDS.items()}
_WORD = re.compile(r"[^\W\d_]+(?:'(?=[^\W\d_]))?")  # with its apostrophe, if a letter follows: j'aime is j' and aime
_FEWEST = 3  # function words that a text must hold before it is said to be of a language


def language_of(text: str) -> str | None:
    """Return the language most of whose function words the text holds; None where it holds too few, or as many of two.

    A word that several languages share counts for each of them.
    """
    words = _WORD.findall(plain(text))
    counts = {
        language: sum(word in known or word.rstrip("'") in known for word in words)  # the latter for it's and can't
        for language, known in _WORDS.items()
    }
    first, second = sorted(counts.values(), reverse=True)[:2]
    if first < _FEWEST or first == second:
        return None
    return max(counts, key=lambda language: counts[language])


_FENCE = re.compile(r"```([^\n`]*)\n(.*?)```", re.DOTALL)
_OPENING = re.compile(r"[{\[]")
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)


def holds_json(text: str) -> bool:
    """Whether the text is a JSON object or list that is not empty, or has one in a fence or after some words.

    Only outermost values count. Among words a list of numbers does not: it may be a citation, [1].
    """
    for language, content in _FENCE.findall(text):
        if language.strip().lower() in ("", "json") and _filled(_decoded(content.strip(), 0)[0]):
            return True
    text = text.strip()
    place = 0
    while found := _OPENING.search(text, place):
        start = found.start()
        value, end = _decoded(text, start)
        alone = start == 0 and end == len(text)
        if _filled(value) and (alone or not _numbers(value)):
            return True
        end = end or _end_of_brackets(text, start)
        if end is None:
            return False
        place = end
    return False


def _decoded(text: str, start: int) -> tuple[object, int | None]:
    """The JSON value that begins at ``start``, and its end; None and None where there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, None


def _filled(value: object) -> bool:
    return isinstance(value, (dict, list)) and bool(value)


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(each) in (int, float) for each in value)


def _end_of_brackets(text: str, start: int) -> int | None:
    """Where the bracket at ``start`` is closed; None where it is not. Brackets in strings do not count."""
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text, start):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    return None
