"""One evaluation: every method at every multiplier on every prompt set, with intervals; finished parts stay on disk."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import cna_kernels
from cna_kernels import select
from cna_kernels.checks import InputError
from cna_kernels.circuit import Circuit
from cna_kernels.files import sha256, write_text
from cna_kernels.steering import check_multiplier

from .. import directions
from ..language_model import LanguageModel
from ..metrics import KINDS, Refusals, kind_of, mean, ngram_quality, share
from ..prompts import PromptSet
from . import rivals
from .answers import Answer, answer_all, auto_rows
from .interventions import UNSTEERED, Interventions, Method, Setting
from .judge import judge
from .likelihood import divergences, perplexities, perplexity, windows_of
from .multiple_choice import Exam, by_likelihood, generation_prompts, parse_letter
from .store import Store

MULTIPLIERS = (1.0, 0.75, 0.5, 0.25, 0.0, 2.0)
METHODS = ("circuit", "random", "activation", "neuron", "caa", "caa-released", "ablation", "sae")
NEED_SIDES = ("activation", "neuron", "caa", "caa-released", "ablation", "sae")  # and so --positive and --negative
CURVE_STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # sizes of circuits, by the size of the one evaluated
CURVE_SCORES = ("abs-delta", "magnitude", "cohen-d", "norm-weighted", "relp")
CURVE_PROMPTS = 50

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to evaluate, and on what. Sets that are None are left out of the results.

    Attributes:
        methods: names of METHODS; those in NEED_SIDES need ``positive`` and ``negative``.
        multipliers: of every method.
        harmful: prompts to be refused; benign: prompts to be answered.
        positive, negative: discovery prompts.
        neutral: texts for the divergence of the next token.
        text: for perplexity.
        exam: multiple-choice questions; ``shots`` examples in front of each, answers of ``exam_tokens`` tokens.
        refusals: lists by name; the first one decides the kinds of answers.
        random_draws: circuits of random neurons.
        sae: a file with W_dec, a feature and the layer it belongs to.
        alternatives: whether other discovery scores are compared; ``curves``: at several sizes.
        judge_command: see ``judge.py``.
        others: further circuits to evaluate, by name.
        chat: whether prompts go through the chat template; None does where there is one.
        rows: answers written together; None asks ``answers.auto_rows``.
    """

    methods: tuple[str, ...] = ("circuit",)
    multipliers: tuple[float, ...] = MULTIPLIERS
    harmful: PromptSet | None = None
    benign: PromptSet | None = None
    positive: PromptSet | None = None
    negative: PromptSet | None = None
    neutral: PromptSet | None = None
    text: str | None = None
    exam: Exam | None = None
    shots: int = 5
    exam_tokens: int = 16
    refusals: dict[str, Refusals] = field(
        default_factory=lambda: {name: Refusals.bundled(name) for name in ("broad", "strict")}
    )
    max_new_tokens: int = 100
    random_draws: int = 3
    sae: tuple[str, int, int] | None = None
    alternatives: bool = False
    curves: bool = False
    judge_command: str | None = None
    others: dict[str, Circuit] = field(default_factory=dict)
    chat: bool | None = None
    rows: int | None = None

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
        needing = [name for name in self.methods if name in NEED_SIDES]
        needing += ["discovery alternatives"] if self.alternatives or self.curves else []
        if needing and (self.positive is None or self.negative is None):
            raise InputError("positive, negative", f"discovery prompts are needed for {', '.join(needing)}")
        if "sae" in self.methods and self.sae is None:
            raise InputError("sae", "a file with W_dec, a feature and its layer are needed")
        if all(part is None for part in (self.harmful, self.benign, self.neutral, self.text, self.exam)):
            raise InputError("prompts", "nothing to evaluate on: give harmful, benign, neutral, text or exam")
        if (self.curves or self.alternatives) and self.harmful is None:
            raise InputError("harmful", "prompts to be refused are needed to compare discovery alternatives")

    def facts(self) -> dict:
        """What the results depend on, as JSON values."""
        sets = {
            name: {"count": len(prompts), "sha256": prompts.sha256}
            for name in ("harmful", "benign", "positive", "negative", "neutral")
            if (prompts := getattr(self, name)) is not None
        }
        facts = {
            "methods": list(self.methods), "multipliers": list(self.multipliers), "prompts": sets,
            "max_new_tokens": self.max_new_tokens, "random_draws": self.random_draws,
            "refusals": {name: sha256(*found.phrases) for name, found in self.refusals.items()},
            "chat": self.chat, "alternatives": self.alternatives, "curves": self.curves,
            "judge_command": self.judge_command,
            "others": {name: sha256(circuit.to_json()) for name, circuit in self.others.items()},
            "sae": None if self.sae is None else [Path(self.sae[0]).name, *self.sae[1:]],
        }  # fmt: skip
        if self.text is not None:
            facts["text_sha256"] = sha256(self.text)
        if self.exam is not None:
            facts["exam"] = {
                "questions": len(self.exam.questions), "shots": self.shots, "tokens": self.exam_tokens,
                "sha256": sha256(repr((self.exam.questions, sorted(self.exam.examples.items())))),
            }  # fmt: skip
        return facts


class Evaluation:
    """Runs a plan with one circuit on one model.

    Attributes:
        results: everything that results.json holds, as far as it has been computed.
        samples: one record for each answer.
    """

    def __init__(self, model: LanguageModel, circuit: Circuit, plan: Plan, store: Store, say: Say = lambda text: None):
        self.model, self.circuit, self.plan, self.store, self.say = model, circuit, plan, store, say
        self.results: dict = {"facts": store.facts, "environment": environment(model)}
        self.samples: list[dict] = []
        self._refuses = next(iter(plan.refusals.values()))
        self._prompts = {
            name: model.encode(prompts, chat=plan.chat)
            for name in ("harmful", "benign", "positive", "negative")
            if (prompts := getattr(plan, name)) is not None
        }
        asked = [prompt for name in ("harmful", "benign") for prompt in self._prompts.get(name, [])]
        longest = max((len(prompt.ids) for prompt in asked), default=1)
        # kept on disk: the chunks of a run must not depend on the memory that happens to be free
        wanted = plan.rows or auto_rows(model, longest, plan.max_new_tokens)
        self.rows = store.get("rows", lambda: wanted)

    def run(self) -> dict:
        """Do everything, or what is left of it; return ``results``."""
        started = time.perf_counter()
        methods = self._methods()
        settings = [UNSTEERED]
        settings += [Setting(method, m) for method in methods for m in self.plan.multipliers if m != 1]
        interventions = Interventions(self.model, settings)
        numbers = list(range(len(settings)))
        columns: dict[int, dict] = {number: {} for number in numbers}
        for part in (self._answers, self._divergences, self._perplexities, self._exam):
            for number, figures in part(interventions, numbers).items():
                columns[number] |= figures
        self._judge(columns)
        self.results["rows"] = [
            {"method": "unsteered", "multiplier": 1.0, "strength": None, **columns[0]},
            *(
                {
                    "method": setting.method.name,
                    "multiplier": setting.multiplier,
                    "strength": setting.method.strength(setting.multiplier),
                    **columns[number],
                }
                for number, setting in enumerate(settings)
                if setting.method is not None
            ),
        ]
        self.results["methods"] = {method.name: method.about for method in methods}
        self.results["circuit"] = {
            "k": self.circuit.k, "score": self.circuit.score, "per_layer": self.circuit.per_layer(),
            "contrast": [contrast for *_, contrast in self.circuit.neurons],
        }  # fmt: skip
        if self.plan.positive is not None and self.plan.negative is not None:
            self.results["rank_curve"] = _rank_curve(self._delta.abs().masked_fill(self._excluded, 0))
        if self.plan.alternatives or self.plan.curves:
            self._alternatives()
        self.results["environment"]["seconds"] = round(time.perf_counter() - started, 1)
        return self.results

    def _methods(self) -> list[Method]:
        """The plan's methods, with all that they need found and chosen."""
        model, plan, found = self.model, self.plan, []
        sides = difference = None
        if plan.positive is not None and plan.negative is not None:
            sides = rivals.Sides.split(self._prompts["positive"], self._prompts["negative"])
            self._sides, self._sums = sides, rivals.contrast_sums(model, sides)
            self._delta = select.contrast(self._sums)
            self._excluded = self._universal()
        if set(plan.methods) & {"caa", "caa-released", "ablation", "sae"}:
            difference = directions.differences(model.transformer, sides.positive, sides.negative)
        self.results["chosen"] = {}
        for name in plan.methods:
            if name not in ("circuit", "random"):
                self.say(f"preparing {name}")
            if name == "circuit":
                about = f"{self.circuit.k} neurons by {self.circuit.score or 'an unknown score'}"
                found.append(Method("circuit", about, self.circuit))
            elif name == "random":
                about = "as many random neurons of the same layers"
                found += [
                    Method(f"random {draw + 1}", about, self.circuit.random_like(draw))
                    for draw in range(plan.random_draws)
                ]
            elif name == "activation":
                score = self._sums.mean(select.POSITIVE).abs()
                circuit = rivals.top_circuit("activation", score, self._delta, self.circuit.k, self._excluded)
                found.append(Method("top activation", "as many neurons, those that fire most", circuit))
            elif name == "neuron":
                method, chosen = rivals.best_neuron(model, sides, self._delta, self._excluded, self.store)
                found.append(method)
                self.results["chosen"]["neuron"] = chosen
            elif name in ("caa", "ablation"):
                method, chosen = rivals.best_direction(
                    model, name, difference, sides, self._refuses, self.rows, self.store
                )
                found.append(method)
                self.results["chosen"][name] = chosen
            elif name == "caa-released":
                about = "mean difference of every layer's MLP output, added with sign +1 as published"
                found.append(Method(name, about, directions.caa_as_released(difference), 1))
            else:
                path, feature, layer = plan.sae
                if not 0 <= layer < model.config.num_hidden_layers:
                    raise InputError("sae layer", f"expected 0 to {model.config.num_hidden_layers - 1}, got {layer}")
                row = directions.read_decoder_row(path, feature, model.config.hidden_size)
                about = (
                    f"feature {feature} of {Path(path).name} after layer {layer}, as far as the prompts differ in it"
                )
                found.append(Method("sae", about, directions.feature(difference, layer, row)))
        return found + [Method(name, f"{other.k} neurons", other) for name, other in plan.others.items()]

    def _universal(self):
        """``[L, N]`` bool: what the circuit's own universal filter left out, so that rivals leave it out, too."""
        config = self.model.config
        excluded = torch.zeros(config.num_hidden_layers, config.intermediate_size, dtype=torch.bool)
        for layer, index in (self.circuit.universal or {}).get("excluded", []):
            excluded[layer, index] = True
        return excluded

    def _answers(self, interventions: Interventions, numbers: Sequence[int]) -> dict[int, dict]:
        sets = {name: self._prompts[name] for name in ("harmful", "benign") if name in self._prompts}
        if not sets:
            return {}
        every = [prompt for prompts in sets.values() for prompt in prompts]
        found = answer_all(
            self.model, interventions, numbers, every, max_new_tokens=self.plan.max_new_tokens, rows=self.rows,
            store=self.store, name="answers", progress=lambda done, of: self.say(f"{done} of {of} answers"),
        )  # fmt: skip
        figures: dict[int, dict] = {number: {} for number in numbers}
        start = 0
        for name, prompts in sets.items():
            texts = getattr(self.plan, name).texts
            plain = found[0][start : start + len(prompts)]
            for number in numbers:
                answers = found[number][start : start + len(prompts)]
                figures[number][name] = self._figures(answers, plain)
                setting = interventions.settings[number]
                for place, answer in enumerate(answers):
                    self.samples.append({
                        "set": name, "prompt": texts[place], "setting": number,
                        "method": "unsteered" if setting.method is None else setting.method.name,
                        "multiplier": setting.multiplier, "answer": answer.text, "tokens": len(answer.tokens),
                        "kind": kind_of(answer.text, answer.tokens, self._refuses),
                        "refusal": {key: refuses(answer.text) for key, refuses in self.plan.refusals.items()},
                    })  # fmt: skip
            start += len(prompts)
        return figures

    def _figures(self, answers: Sequence[Answer], plain: Sequence[Answer]) -> dict:
        """The figures of one setting on one set."""
        n = len(answers)
        kinds = Counter(kind_of(a.text, a.tokens, self._refuses) for a in answers)
        return {
            "refusal": {
                name: share(sum(refuses(answer.text) for answer in answers), n)
                for name, refuses in self.plan.refusals.items()
            },
            "kinds": {kind: kinds[kind] for kind in KINDS},
            "answered": share(kinds["answer"], n),
            "quality": mean([ngram_quality(answer.text.split()) for answer in answers]),
            "token_quality": mean([ngram_quality(answer.tokens) for answer in answers]),
            "unchanged": share(sum(a.text == b.text for a, b in zip(answers, plain, strict=True)), n),
            "tokens": mean([len(answer.tokens) for answer in answers]),
        }

    def _divergences(self, interventions, numbers) -> dict[int, dict]:
        if self.plan.neutral is None:
            return {}
        self.say("next tokens on neutral text")
        texts = [self.model.tokenizer.encode(text) for text in self.plan.neutral.texts]

        def run():
            return list(divergences(self.model, interventions, numbers, texts).values())

        return {number: {"kl": mean(values)} for number, values in zip(numbers, self.store.get("kl", run), strict=True)}

    def _perplexities(self, interventions, numbers) -> dict[int, dict]:
        if self.plan.text is None:
            return {}
        self.say("perplexity")
        windows = windows_of(self.model, self.plan.text)
        if not windows:
            raise InputError("text", "holds no token to predict")

        def run():
            return list(perplexities(self.model, interventions, numbers, windows).values())

        found = self.store.get("perplexity", run)
        return {
            number: {"perplexity": {"value": perplexity(losses), "tokens": sum(n for _, n in losses)}}
            for number, losses in zip(numbers, found, strict=True)
        }

    def _exam(self, interventions, numbers) -> dict[int, dict]:
        plan, model = self.plan, self.model
        if plan.exam is None:
            return {}
        right = [question.answer for question in plan.exam.questions]
        self.say("multiple choice by likelihood")

        def likely():
            return list(by_likelihood(model, interventions, numbers, plan.exam, shots=plan.shots).values())

        by_letter = self.store.get("exam-likelihood", likely)
        self.say("multiple choice in the model's own words")
        prompts = generation_prompts(model, plan.exam, shots=plan.shots, room=plan.exam_tokens, chat=plan.chat)
        answers = answer_all(
            model, interventions, numbers, prompts, max_new_tokens=plan.exam_tokens, rows=self.rows, store=self.store,
            name="exam", progress=lambda done, of: self.say(f"{done} of {of} exam answers"),
        )  # fmt: skip
        n = len(right)
        figures = {}
        for number, letters in zip(numbers, by_letter, strict=True):
            said = [
                parse_letter(answer.text, len(question.choices))
                for answer, question in zip(answers[number], plan.exam.questions, strict=True)
            ]
            figures[number] = {
                "mmlu": {
                    "likelihood": share(sum(a == b for a, b in zip(letters, right, strict=True)), n),
                    "generated": share(sum(a == b for a, b in zip(said, right, strict=True)), n),
                    "no letter": share(said.count(None), n),
                }
            }
        return figures

    def _judge(self, columns):
        if self.plan.judge_command is None or not self.samples:
            return
        self.say("judge")
        items = [{name: sample[name] for name in ("set", "prompt", "answer")} for sample in self.samples]
        scores = self.store.get("judge", lambda: judge(self.plan.judge_command, items))
        by_set: dict[tuple[int, str], list[float]] = {}
        for sample, score in zip(self.samples, scores, strict=True):
            sample["judge"] = score
            by_set.setdefault((sample["setting"], sample["set"]), []).append(score)
        for (number, name), values in by_set.items():
            columns[number][name]["judge"] = mean(values)

    def _alternatives(self):
        """Refusal of circuits by other scores, and against their size: what ablating them does to harmful prompts, and
        what writing their contrast to the residual stream does to benign ones."""
        self.say("discovery alternatives")
        model, n_neurons = self.model, self._delta.numel() - int(self._excluded.sum())
        sizes = [self.circuit.k]
        if self.plan.curves:
            sizes = sorted({min(max(round(step * self.circuit.k), 1), n_neurons) for step in CURVE_STEPS})
        ranked = rivals.rankings(model, self._sides, self._sums, CURVE_SCORES)
        methods, points = [], []
        for name, score in ranked.items():
            for k in sizes:
                circuit = rivals.top_circuit(name, score, self._delta, k, self._excluded)
                overlap = len(set(circuit.pairs) & set(self.circuit.pairs)) / max(min(k, self.circuit.k), 1)
                points.append({"score": name, "k": k, "overlap": overlap, "per_layer": circuit.per_layer()})
                methods += [
                    Method(f"{name} {k}", "", circuit),
                    Method(f"{name} {k} written", "", rivals.written(model, circuit, self._delta), 1),
                ]
        interventions = Interventions(model, [UNSTEERED, *(Setting(method, 0.0) for method in methods)])
        for name, first in (("harmful", 1), ("benign", 2)):
            if name not in self._prompts:
                continue
            numbers = list(range(first, len(methods) + 1, 2))
            answers = answer_all(
                model, interventions, numbers, self._prompts[name][:CURVE_PROMPTS],
                max_new_tokens=self.plan.max_new_tokens, rows=self.rows, store=self.store,
                name=f"alternatives-{name}",
            )  # fmt: skip
            for point, number in zip(points, numbers, strict=True):
                found = answers[number]
                kinds = Counter(kind_of(a.text, a.tokens, self._refuses) for a in found)
                point[{"harmful": "necessity", "benign": "sufficiency"}[name]] = {
                    "refusal": share(sum(self._refuses(a.text) for a in found), len(found)),
                    "kinds": {kind: kinds[kind] for kind in KINDS},
                }
        self.results["alternatives"] = points


def _rank_curve(score: Tensor, points: int = 200) -> list[list]:
    """[rank, score] from the first to the last neuron, ranks evenly spaced on a logarithmic axis."""
    ordered = score.flatten().sort(descending=True).values
    ranks = sorted({round(len(ordered) ** (step / (points - 1))) for step in range(points)})
    return [[rank, ordered[rank - 1].item()] for rank in ranks]


def environment(model: LanguageModel) -> dict:
    """Versions and machine."""
    device = model.device
    return {
        "cna_kernels": cna_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run_facts(model: LanguageModel, circuit: Circuit, plan: Plan) -> dict:
    """What an evaluation depends on: the store's manifest."""
    return {
        "model": model.identity()
        | {"tokenizer_sha256": model.tokenizer.sha256, "chat_template_sha256": model.tokenizer.template_sha256},
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "circuit_sha256": sha256(circuit.to_json()),
        "plan": plan.facts(),
        "versions": {"cna_kernels": cna_kernels.__version__, "torch": torch.__version__},
    }


def evaluate(model: LanguageModel, circuit: Circuit, plan: Plan, *, out=None, say: Say = lambda text: None) -> dict:
    """Run a plan; with ``out`` into a directory that holds finished parts, results.json and samples.jsonl.

    Raises:
        InputError: a file, prompt or setting cannot be used; names it. Finished parts stay.
    """
    with Store(out, run_facts(model, circuit, plan)) as store:
        evaluation = Evaluation(model, circuit, plan, store, say)
        results = evaluation.run()
        if out is not None:
            lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples)
            write_text(Path(out) / "samples.jsonl", "".join(lines))
            write_text(Path(out) / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results
