"""A behaviour as a small file: prompts to find its circuit by, prompts to measure it on, and how it is measured.

    {"behaviour": "capitals", "about": "names the capital of a country",
     "labels": ["asks for a capital", "tells of a country"], "template": false,
     "positive": ["The capital of Chad is", ...], "negative": ["The food of Chad is", ...],
     "measured": [{"prompt": "The capital of Peru is", "answer": " Lima"}, ...],
     "measure": {"kind": "next token"}}

``positive``, ``negative`` and ``measured`` are lists, or the name of a prompt file beside this one. ``template`` says
whether prompts go through the chat template; null: where the model has one. ``measures.py`` has the kinds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cna_kernels.errors import InputError
from cna_kernels.fields import REQUIRED, Fields
from cna_kernels.files import FilePath, parse_json, read_text, sha256

from ..prompts.files import PromptSet, read_prompts
from ..prompts.hub_sets import hub_set
from .measures import Item, Measure, measure_of

BUNDLED = ("refusal", "capitals", "agreement", "json", "french")
RESERVED = "harmless"  # what the matrix calls its own prompts
_FIELDS = ("behaviour", "about", "labels", "template", "positive", "negative", "measured", "measure")


@dataclass(frozen=True)
class Behaviour:
    """What a model does, how prompts bring it about, and how it is seen.

    Attributes:
        name, about: a word, and a line, for tables.
        labels: what to call the positive and the negative prompts.
        positive, negative: discovery prompts, which show the behaviour and which do not.
        measured: prompts to measure on; none is a discovery prompt.
        measure: what tells whether the behaviour is there.
        chat: whether prompts go through the chat template; None: where the model has one.
    """

    name: str
    about: str
    labels: tuple[str, str]
    positive: PromptSet
    negative: PromptSet
    measured: tuple[Item, ...]
    measure: Measure
    chat: bool | None = None

    def __post_init__(self) -> None:
        if not is_name(self.name) or self.name == RESERVED:
            raise InputError("behaviour", f"{self.name!r} cannot be a name: it becomes a part of file names")
        found_by = {text for prompts in (self.positive, self.negative) for text, _ in prompts}
        for item in self.measured:
            if item.prompt in found_by:
                raise InputError(item.place, "is a discovery prompt, too: it would be measured on what it was found by")

    @property
    def sha256(self) -> str:
        """Of all that the file says but labels and names."""
        items = [repr((item.prompt, item.answers, item.others)) for item in self.measured]
        return sha256(self.positive.sha256, self.negative.sha256, *items, repr(self.measure), repr(self.chat))

    @property
    def prompts(self) -> PromptSet:
        """The prompts that the behaviour is measured on."""
        texts, places = zip(*((item.prompt, item.place) for item in self.measured), strict=True)
        return PromptSet(texts, places)

    @classmethod
    def read(cls, path: FilePath) -> Behaviour:
        """Read a behaviour from its file.

        Raises:
            InputError: naming the file and the field.
        """
        return cls._parse(read_text(path, limit=64 << 20), Path(path))

    @classmethod
    def bundled(cls, name: str) -> Behaviour:
        """Return one of the behaviours that come with the package, see BUNDLED."""
        if name not in BUNDLED:
            raise InputError("behaviour", f"expected one of {', '.join(BUNDLED)}, got {name!r}")
        file = files(__package__) / "data" / "behaviours" / f"{name}.json"
        return cls._parse(file.read_text(encoding="utf-8"), Path(f"{name}.json"))

    @classmethod
    def named(cls, name: str) -> Behaviour:
        """Return the behaviour of a command's argument: one of BUNDLED, or a file's."""
        return cls.bundled(name) if name in BUNDLED else cls.read(name)

    @classmethod
    def _parse(cls, text: str, path: Path) -> Behaviour:
        fields = Fields(parse_json(text, path), path)
        fields.only(_FIELDS, "a behaviour")
        labels = fields.items("labels", lambda x: isinstance(x, str), "text", ["positive", "negative"])
        if len(labels) != 2:
            raise fields.error("labels", f"expected two, got {len(labels)}")
        measure = measure_of(fields.object("measure"))
        name = fields.read("behaviour", REQUIRED, "a name of letters, digits, - and _", is_name)
        if name == RESERVED:
            raise fields.error("behaviour", f"{name!r} is a name of the matrix's own")
        return cls(
            name=name,
            about=fields.text("about", ""),
            labels=(labels[0], labels[1]),
            positive=_prompts(fields, "positive"),
            negative=_prompts(fields, "negative"),
            measured=_items(fields, measure),
            measure=measure,
            chat=fields.boolean("template", None),
        )


def is_name(text: object) -> bool:
    """Whether a text can name a behaviour or a circuit: it becomes a part of file names."""
    return isinstance(text, str) and re.fullmatch(r"[\w-]{1,80}", text) is not None


def _prompts(fields: Fields, name: str) -> PromptSet:
    value = fields.record.get(name)
    if isinstance(value, str):
        return read_prompts(value if hub_set(value) else Path(fields.where).parent / value)
    texts = fields.items(name, lambda x: isinstance(x, str), "text", REQUIRED)
    return PromptSet.of(texts, f"{fields.where}: {name}")


def _items(fields: Fields, measure: Measure) -> tuple[Item, ...]:
    """The prompts to measure on, with the answers that the measure asks for."""
    if isinstance(fields.record.get("measured"), str):
        plain = tuple(Item(text, place) for text, place in _prompts(fields, "measured"))
        measure.check(plain[0])
        return plain
    stored = fields.items("measured", lambda x: isinstance(x, (str, dict)), "a prompt, or an object with a prompt")
    items = []
    for number, value in enumerate(stored):
        place = f"{fields.where}: measured[{number}]"
        one = Fields({"prompt": value} if isinstance(value, str) else value, fields.where, f"measured[{number}].")
        one.only(("prompt", "answer", "other"), "a measured prompt")
        item = Item(one.text("prompt"), place, _texts(one, "answer"), _texts(one, "other"))
        measure.check(item)
        items.append(item)
    if not items:
        raise fields.error("measured", "holds no prompt")
    return tuple(items)


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    """A text, or several, or none."""
    value = fields.record.get(name)
    if value is None:
        return ()
    texts: Sequence = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise fields.error(name, "expected a text, or several")
    return tuple(texts)
