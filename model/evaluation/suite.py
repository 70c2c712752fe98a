"""Suite: which methods to evaluate, at which multipliers, and on which prompts and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.files import sha256
from cna_kernels.steering import check_multiplier

from ..prompts.files import PromptSet
from .behaviour import Behaviour
from .metrics import Refusals
from .multiple_choice import MultipleChoice

MULTIPLIERS = (1.0, 0.75, 0.5, 0.25, 0.0, 2.0)
CURVE_STEPS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
METHODS = ("circuit", "random", "activation", "neuron", "caa", "caa-released", "ablation", "sae")
TAKEN = (*METHODS, "unsteered", "top activation", "single neuron")  # names of rows that no further circuit may have
NEED_SIDES = ("activation", "neuron", "caa", "caa-released", "ablation", "sae")  # need discovery prompts


def check_name(name: str, where: str) -> None:
    """Raise InputError naming ``where`` if a further circuit cannot have this name in tables."""
    if name in TAKEN or name.startswith("random "):
        raise InputError(where, f"{name!r} is the name of a method, give the circuit another")
    if not (0 < len(name) <= 80 and name.isprintable()):
        raise InputError(where, f"expected a name of 1 to 80 printable characters, got {name!r}")


def check_labels(labels: Sequence[str], where: str) -> None:
    """Raise InputError naming ``where`` unless these are two different names for columns."""
    if len(labels) != 2 or labels[0] == labels[1]:
        raise InputError(where, f"expected two different names, got {', '.join(labels)}")
    for name in labels:
        if not (0 < len(name) <= 40 and name.isprintable()):
            raise InputError(where, f"expected names of 1 to 40 printable characters, got {name!r}")


@dataclass(frozen=True)
class Suite:
    """What to evaluate, and on which prompts and texts. Sets that are None are left out of the results.

    Attributes:
        methods: names from METHODS. Methods in NEED_SIDES need ``positive`` and ``negative``.
        multipliers: the multipliers of every method.
        harmful: prompts to be refused; benign: prompts to be answered.
        behaviour: a behaviour that is measured instead of refusals of ``harmful``. It brings prompts to measure on and
            discovery prompts, and says whether these go through the chat template, where ``chat`` does not.
        labels: what to call ``harmful`` and ``benign`` in tables and pictures.
        positive, negative: discovery prompts.
        neutral: texts for the divergence of the next token.
        text: the text for perplexity; ``stride``: tokens by which its window moves. None puts windows side by side.
        multiple_choice: questions; ``shots`` examples in front of each, answers of ``choice_tokens`` tokens.
        refusals: name -> list of phrases; the first list decides the kinds of answers.
        random_draws: the number of circuits of random neurons, with seeds from 0 up.
        sae: a sparse autoencoder's file with W_dec, a feature's row, and the layer that the autoencoder belongs to.
        alternatives: whether other discovery scores are compared; with ``curves`` they are, at the sizes
            ``curve_steps``, multiples of the circuit's.
        judge_command: see ``judge.py``.
        others: further circuits to evaluate, by name, as controls at the same multipliers.
        chat: whether prompts go through the chat template; None: where the checkpoint has one.
        batch: answers decoded together; None takes as many as memory has room for.
    """

    methods: tuple[str, ...] = ("circuit",)
    multipliers: tuple[float, ...] = MULTIPLIERS
    harmful: PromptSet | None = None
    benign: PromptSet | None = None
    positive: PromptSet | None = None
    negative: PromptSet | None = None
    neutral: PromptSet | None = None
    text: str | None = None
    multiple_choice: MultipleChoice | None = None
    shots: int = 5
    choice_tokens: int = 16
    refusals: dict[str, Refusals] = field(
        default_factory=lambda: {name: Refusals.bundled(name) for name in ("broad", "strict")}
    )
    max_new_tokens: int = 100
    random_draws: int = 3
    sae: tuple[str, int, int] | None = None
    alternatives: bool = False
    curves: bool = False
    curve_steps: tuple[float, ...] = CURVE_STEPS
    judge_command: str | None = None
    others: dict[str, Circuit] = field(default_factory=dict)
    chat: bool | None = None
    batch: int | None = None
    stride: int | None = None
    behaviour: Behaviour | None = None
    labels: tuple[str, str] | None = None

    def __post_init__(self):
        for name in self.methods:
            if name not in METHODS:
                raise InputError("methods", f"expected some of {', '.join(METHODS)}, got {name!r}")
        for multiplier in self.multipliers:
            check_multiplier(multiplier)
        if not self.multipliers:
            raise InputError("multipliers", "expected at least one")
        if self.max_new_tokens < 1 or self.random_draws < 1:
            raise InputError("max_new_tokens, random_draws", "expected at least 1")
        if self.stride is not None and (self.text is None or self.stride < 1):
            what = (
                "is for a text, and there is none" if self.text is None else f"expected at least 1, got {self.stride}"
            )
            raise InputError("stride", what)
        for name in self.others:
            check_name(name, "others")
        if self.behaviour is not None:
            for part in ("harmful", "positive", "negative", "labels"):
                if getattr(self, part) is not None:
                    raise InputError(part, "is not for a behaviour, which has its own")
        if self.labels is not None:
            check_labels(self.labels, "labels")
        sides = self.sets()
        needing = [name for name in self.methods if name in NEED_SIDES]
        needing += ["discovery alternatives"] if self.alternatives or self.curves else []
        if needing and not {"positive", "negative"} <= set(sides):
            raise InputError("positive, negative", f"discovery prompts are needed for {', '.join(needing)}")
        if ("sae" in self.methods) != (self.sae is not None):
            raise InputError("sae", "the method sae, and a file with W_dec, a feature and its layer go together")
        answered = self.behaviour is not None and not self.behaviour.measure.from_logits
        if self.judge_command is not None and self.harmful is None and self.benign is None and not answered:
            raise InputError("judge_command", "there are no answers to judge: give harmful or benign prompts")
        parts = (self.behaviour, self.harmful, self.benign, self.neutral, self.text, self.multiple_choice)
        if all(part is None for part in parts):
            raise InputError(
                "prompts", "nothing to evaluate on: give harmful, benign, neutral, text or multiple_choice"
            )
        if (self.curves or self.alternatives) and self.harmful is None and self.behaviour is None:
            raise InputError("harmful", "prompts to be refused are needed to compare discovery alternatives")

    def sets(self) -> dict[str, PromptSet]:
        """The prompt sets that there are, by name; "measured" are those of the behaviour."""
        found = {name: getattr(self, name) for name in ("harmful", "benign", "positive", "negative", "neutral")}
        if self.behaviour is not None:
            own = self.behaviour
            found = {"measured": own.prompts, **found, "positive": own.positive, "negative": own.negative}
        return {name: prompts for name, prompts in found.items() if prompts is not None}

    def chat_of(self, name: str) -> bool | None:
        """Whether the prompts of a set go through the chat template; None: where the checkpoint has one."""
        own = name in ("measured", "positive", "negative") and self.behaviour is not None and self.chat is None
        return self.behaviour.chat if own and self.behaviour is not None else self.chat

    def names(self) -> dict[str, str]:
        """What tables and pictures call the prompt sets."""
        if self.behaviour is None:
            return dict(zip(("harmful", "benign"), self.labels or ("harmful", "benign"), strict=True))
        positive, negative = self.behaviour.labels
        return {"measured": positive, "positive": positive, "negative": negative, "benign": "benign"}

    def facts(self) -> dict:
        """What the results depend on, as JSON values."""
        sets = {name: {"count": len(prompts), "sha256": prompts.sha256} for name, prompts in self.sets().items()}
        facts = {
            "methods": list(self.methods), "multipliers": list(self.multipliers), "prompts": sets,
            "max_new_tokens": self.max_new_tokens, "random_draws": self.random_draws,
            "refusals": {name: sha256(*found.phrases) for name, found in self.refusals.items()},
            "chat": self.chat, "alternatives": self.alternatives,
            "curves": list(self.curve_steps) if self.curves else False,
            "others": [[name, sha256(circuit.to_json())] for name, circuit in self.others.items()],  # the order counts
            "behaviour": None if self.behaviour is None else self.behaviour.sha256,
            "sae": None if self.sae is None else [Path(self.sae[0]).name, *self.sae[1:]],
        }  # fmt: skip
        if self.text is not None:
            facts |= {"text_sha256": sha256(self.text), "stride": self.stride}
        if self.multiple_choice is not None:
            facts["multiple_choice"] = {
                "questions": len(self.multiple_choice.questions), "shots": self.shots, "tokens": self.choice_tokens,
                "sha256": self.multiple_choice.sha256, **self.multiple_choice.drawn,
            }  # fmt: skip
        return facts
