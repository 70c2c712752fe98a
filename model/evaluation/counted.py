"""What is counted on a prompt set: who refuses, or who shows a behaviour; and the figures of a variant's answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..discovery.packing import TokenPrompt
from ..language_model import LanguageModel
from .answers import Answer
from .behaviour import Behaviour
from .interventions import Interventions, Variant
from .likelihood import each_logits
from .measures import Item
from .metrics import KINDS, NOT_NEGATIVE, UNIT, Refusals, kind_of, mean, ngram_quality, share
from .suite import Suite

FIELDS = ("refusal", "shown")  # of a row and of a sample: by list, or by behaviour


@dataclass(frozen=True)
class Counted:
    """A prompt set, and what makes an answer to one of its prompts a hit.

    Attributes:
        name: "harmful", "benign" or "measured".
        texts, prompts: the prompts, as text and encoded.
        refusals: lists of phrases: an answer that holds one is a hit of its list.
        behaviour, items: instead of lists, a behaviour and the items that its measure asks for, one for each prompt.
    """

    name: str
    texts: Sequence[str]
    prompts: Sequence[TokenPrompt]
    refusals: Mapping[str, Refusals] = field(default_factory=dict)
    behaviour: Behaviour | None = None
    items: Sequence[Item] = ()

    @property
    def field(self) -> str:
        """The name of the figures: "refusal" of lists, "shown" of a behaviour."""
        return FIELDS[self.behaviour is not None]

    @property
    def from_logits(self) -> bool:
        """Whether a forward pass is enough; otherwise the prompts are answered."""
        return self.behaviour is not None and self.behaviour.measure.from_logits

    def evenly(self, most: int) -> Counted:
        """At most ``most`` of the prompts, evenly spaced, because files are often sorted by subject."""
        n = min(most, len(self.prompts))
        places = [number * len(self.prompts) // n for number in range(n)]
        texts, prompts = [self.texts[place] for place in places], [self.prompts[place] for place in places]
        return replace(self, texts=texts, prompts=prompts, items=[self.items[place] for place in places if self.items])

    def hits(self, answers: Sequence[str]) -> dict[str, list[bool]]:
        """Check -> whether the answer to each prompt is a hit: a check is a list of refusals, or the behaviour."""
        if self.behaviour is not None:
            return {self.behaviour.name: self.behaviour.measure.of_texts(answers, self.items)}
        return {name: [refuses(text) for text in answers] for name, refuses in self.refusals.items()}

    def hits_by_logits(
        self, model: LanguageModel, interventions: Interventions, places: Sequence[int], variants: Sequence[int]
    ) -> dict[int, list[bool]]:
        """Variant -> whether each of the prompts at ``places`` is a hit, for a behaviour measured from logits."""
        assert self.behaviour is not None and self.from_logits
        rows = [(variant, self.prompts[place].ids) for place in places for variant in variants]
        owners = [(variant, self.items[place]) for place in places for variant in variants]
        found: dict[int, list[bool]] = {variant: [] for variant in variants}
        for (variant, item), logits in zip(owners, each_logits(model, interventions, rows, last=True), strict=True):
            found[variant].append(self.behaviour.measure.of_logits(logits[0], item, model.tokenizer))
        return found

    def samples(self, number: int, variant: Variant, hits: Mapping[str, Sequence[bool]]) -> list[dict]:
        """The records of one variant for samples.jsonl, without the answers."""
        return [
            {
                "set": self.name, "prompt": text, "variant": number,
                "method": "unsteered" if variant.method is None else variant.method.name,
                "multiplier": variant.multiplier, self.field: {check: found[place] for check, found in hits.items()},
            }
            for place, text in enumerate(self.texts)
        ]  # fmt: skip


def counted_sets(suite: Suite, prompts: Mapping[str, Sequence[TokenPrompt]]) -> list[Counted]:
    """The prompt sets that are measured, a behaviour's or the harmful ones first. ``prompts``: set -> encoded."""
    sets = suite.sets()
    found = [
        Counted(name, sets[name].texts, prompts[name], suite.refusals)
        for name in ("harmful", "measured", "benign") if name in sets
    ]  # fmt: skip
    if suite.behaviour is not None:
        found[0] = replace(found[0], behaviour=suite.behaviour, items=suite.behaviour.measured)
    return found


def both_ways(sets: Sequence[Counted], suite: Suite) -> dict[str, Counted]:
    """ "necessity" and "sufficiency": the prompts that show it, and benign ones which may come to show it.

    There is no sufficiency where a behaviour's measure needs an answer for each prompt, which benign prompts lack.
    "answered": benign prompts to be answered beside a behaviour that is measured from logits.
    """
    found = {"necessity": sets[0]}
    for benign in sets[1:]:
        if suite.behaviour is None or suite.benign is None:
            found["sufficiency"] = benign
        elif not suite.behaviour.measure.needs_answers:
            items = [Item(text, place) for text, place in suite.benign]
            found["sufficiency"] = replace(benign, behaviour=suite.behaviour, items=items)
        if sets[0].from_logits:
            found["answered"] = benign
    return found


def hit_figures(counted: Counted, hits: Mapping[str, Sequence[bool]]) -> dict:
    """The share of hits of every check."""
    return {counted.field: {check: share(sum(found), len(found)) for check, found in hits.items()}}


def answer_figures(answers: Sequence[Answer], plain: Sequence[Answer], kinds: Sequence[str]) -> dict:
    """The figures of one variant's answers to a prompt set besides its hits.

    Args:
        plain: the unsteered model's answers.
        kinds: the kind of each answer.
    """
    n, counts = len(answers), Counter(kinds)
    return {
        "kinds": {kind: counts[kind] for kind in KINDS},
        "answered": share(counts["answer"], n),
        "quality": mean([ngram_quality(answer.text.split()) for answer in answers], UNIT),
        "token_quality": mean([ngram_quality(answer.tokens) for answer in answers], UNIT),
        "unchanged": share(sum(a.text == b.text for a, b in zip(answers, plain, strict=True)), n),
        "tokens": mean([len(answer.tokens) for answer in answers], NOT_NEGATIVE),
    }


def kinds_of(answers: Sequence[Answer], is_refusal: Refusals) -> list[str]:
    """The kind of each answer, see ``metrics.kind_of``."""
    return [kind_of(answer.text, answer.tokens, is_refusal) for answer in answers]
