"""One evaluation: every method at every multiplier on every prompt set, with intervals. Finished parts stay on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from cna_kernels.circuit import Circuit
from cna_kernels.circuit_sets import prompts_of
from cna_kernels.errors import InputError
from cna_kernels.files import FilePath, sha256, write_text
from cna_kernels.renamed import renamed

from ..discovery.collect import check_length
from ..discovery.packing import TokenPrompt
from ..language_model import LanguageModel
from . import alternatives, baselines
from .answers import Answer, answer_all
from .counted import Counted, answer_figures, both_ways, counted_sets, hit_figures, kinds_of
from .facts import environment, run_facts
from .finder import Finder
from .interventions import UNSTEERED, Interventions, Method, Variant
from .judge import judge
from .likelihood import divergences, ignoring, perplexities, perplexity, windows_of
from .matrix import overlaps
from .metrics import NOT_NEGATIVE, accuracy, after_thought, mean, share
from .multiple_choice import by_likelihood, by_subject, generation_prompts, likelihood_prompts, parse_letter
from .paired import against_circuit, against_unsteered
from .ranking import add_removed, ranking
from .store import Store, in_pieces
from .suite import Suite

Say = Callable[[str], None]


class Evaluation:
    """Runs a suite with one circuit on one model.

    The constructor checks the input and prepares the methods; ``run`` then does the long work.

    Attributes:
        results: everything that results.json holds, as far as it has been computed.
        samples: one record for each answer.
    """

    def __init__(
        self, model: LanguageModel, circuit: Circuit, suite: Suite, store: Store, say: Say = lambda text: None
    ) -> None:
        self.model, self.circuit, self.suite, self.store, self.say = model, circuit, suite, store, say
        self.results: dict = {"facts": store.facts, "environment": environment(model), "notes": []}
        self.samples: list[dict] = []
        self._refuses = next(iter(suite.refusals.values()))
        sets = {name: prompts for name, prompts in suite.sets().items() if name != "neutral"}
        self._prompts = {name: model.encode(prompts, chat=suite.chat_of(name)) for name, prompts in sets.items()}
        self._counted = counted_sets(suite, self._prompts)
        self._check_measure()
        self._texts = []
        if suite.neutral is not None:
            self._texts = model.encode(suite.neutral, chat=False)
        for prompt in (*(p for prompts in self._prompts.values() for p in prompts), *self._texts):
            check_length(prompt, model.config.context_length)
        self._ignoring: float | None = None
        if self._texts:
            self._ignoring = store.get("kl-ignoring", lambda: ignoring(model, [text.ids for text in self._texts]))
        self._note_shared()
        self._windows = [] if suite.text is None else windows_of(model, suite.text, stride=suite.stride)
        if suite.text is not None and not self._windows:
            raise InputError("text", "holds no token to predict")
        self._choices, self._questions = [], []
        if suite.multiple_choice is not None:
            self._choices = likelihood_prompts(model, suite.multiple_choice, shots=suite.shots)
            self._questions = generation_prompts(
                model, suite.multiple_choice, shots=suite.shots, room=suite.choice_tokens, chat=suite.chat
            )
            self._note_shots()
        self._finder = Finder(
            model, circuit, suite, store, self._prompts, self._texts, self._ignoring, note=self._note, say=say
        )
        self._ranked = self._finder.rankings(alternatives.SCORES if suite.alternatives or suite.curves else ())
        self.methods = [method for name in suite.methods for method in self._finder.methods(name)]
        self.methods += [Method(name, f"{other.k} neurons", other) for name, other in suite.others.items()]
        self.results["chosen"] = self._finder.chosen

    def _note(self, text: str):
        self.results["notes"].append(text)
        self.say(text)

    def _note_shared(self):
        """Note how many reported prompts are discovery prompts: choices made on these look better than they are."""
        sets = self.suite.sets()
        texts = {text for name in ("positive", "negative") for text, _ in sets.get(name, ())}
        found_with = prompts_of(self.circuit.prompts, self.circuit.made_from)
        found_on = {found.get("sha256"): side for prompts in found_with for side, found in prompts.items()}
        for name in ("harmful", "measured", "benign"):
            n = sum(text in texts for text, _ in sets.get(name, ()))
            if n:
                self._note(f"{n} of the {name} prompts are discovery prompts, too")
            if name in sets and sets[name].sha256 in found_on:
                self._note(f"the {name} prompts are the {found_on[sets[name].sha256]} prompts that found the circuit")

    def _check_measure(self):
        """Bad items of a measure from logits show before any work; and there are no answers, which a note says."""
        own = self.suite.behaviour
        if own is not None and own.measure.from_logits:
            nothing = torch.zeros(self.model.config.vocab_size, dtype=torch.float32)
            for item in own.measured:
                own.measure.of_logits(nothing, item, self.model.tokenizer)
            self._note(f"{own.name} is measured by a forward pass: its prompts have no answers to count or to judge")

    def _ways(self) -> dict[str, Counted]:
        """The prompts on which alternatives are compared."""
        found = both_ways(self._counted, self.suite)
        if "sufficiency" not in found and self.suite.benign is not None:
            self._note("sufficiency is left out: the behaviour's measure needs an answer for each prompt")
        return found

    def _note_shots(self):
        for way, asked in (("likelihood", self._choices), ("generated", self._questions)):
            used = [one.shots for one in asked]
            if min(used) < self.suite.shots:
                what = f"{min(used)} to {max(used)} examples in front instead of {self.suite.shots}"
                self._note(f"multiple choice, {way}: {what}; there are no more, or there is no room")

    def run(self) -> dict:
        """Compute everything that the store does not hold yet; return ``results``."""
        started, suite = time.perf_counter(), self.suite
        variants = [UNSTEERED]
        variants += [Variant(method, m) for method in self.methods for m in suite.multipliers if m != 1]
        interventions = Interventions(self.model, variants)
        rows = [
            {
                "method": "unsteered" if variant.method is None else variant.method.name,
                "multiplier": variant.multiplier,
                "strength": None if variant.method is None else variant.method.strength(variant.multiplier),
            }
            for variant in variants
        ]
        for part in (self._answers, self._by_logits, self._divergences, self._perplexities, self._multiple_choice):
            for row, figures in zip(rows, part(interventions) or [{}] * len(rows), strict=True):
                row |= figures
        self._judge(rows)
        against_unsteered(rows, self.samples)
        for name in ("harmful", "measured"):
            add_removed(rows, self.samples, name)
        self.results["rows"], self.results["labels"] = rows, suite.names()
        if suite.behaviour is not None:
            self.results["behaviour"] = {
                "name": suite.behaviour.name, "about": suite.behaviour.about, "measure": suite.behaviour.measure.kind,
                "labels": list(suite.behaviour.labels),
            }  # fmt: skip
        self.results["ranking"] = ranking(self.results)
        self.results["circuit against others"] = against_circuit(rows, self.samples)
        if suite.others:
            self.results["overlap"] = overlaps({"circuit": self.circuit, **suite.others})
        self.results["methods"] = {method.name: method.about for method in self.methods}
        self.results["circuit"] = {
            "k": self.circuit.k, "score": self.circuit.score, "per_layer": self.circuit.per_layer(),
            "contrast": [contrast for *_, contrast in self.circuit.neurons],
            "mirrored": None if self.circuit.mirrored is None else list(map(list, self.circuit.mirrored)),
        }  # fmt: skip
        if (discovery := self._finder.discovery) is not None:
            shown = discovery.delta.abs().masked_fill(discovery.excluded, 0)
            self.results["rank_curve"] = baselines.rank_curve(shown)
        if self._ranked:
            self.say("other ways to choose neurons")
            self.results["alternatives"] = alternatives.alternatives(
                self.model, self.circuit, self._ranked, self._finder.of_prompts(), self._ways(), texts=self._texts,
                ignoring=self._ignoring, steps=suite.curve_steps if suite.curves else (1.0,), is_refusal=self._refuses,
                max_new_tokens=suite.max_new_tokens, batch=suite.batch, store=self.store,
            )  # fmt: skip
        self.results["environment"]["seconds"] = round(time.perf_counter() - started, 1)
        return self.results

    def _write(self, interventions: Interventions, prompts, max_new_tokens: int, name: str) -> list[list[Answer]]:
        """The answers of every variant to all prompts."""
        found = answer_all(
            self.model, interventions, range(len(interventions.variants)), prompts, max_new_tokens=max_new_tokens,
            batch=self.suite.batch, store=self.store, name=name, progress=lambda n, of: self.say(f"{n} of {of} {name}"),
        )  # fmt: skip
        return list(found.values())

    def _in_pieces(self, name: str, interventions: Interventions, items: Sequence, work: Callable) -> list[list]:
        """One list for each variant, see ``store.in_pieces``."""
        return in_pieces(self.store, name, range(len(interventions.variants)), items, work, self.say)

    def _answers(self, interventions) -> list[dict] | None:
        sets = [counted for counted in self._counted if not counted.from_logits]
        if not sets:
            return None
        every = [prompt for counted in sets for prompt in counted.prompts]
        found = self._write(interventions, every, self.suite.max_new_tokens, "answers")
        figures: list[dict] = [{} for _ in found]
        start = 0
        for counted in sets:
            here = slice(start, start + len(counted.prompts))
            for number, variant in enumerate(interventions.variants):
                answers = found[number][here]
                hits, kinds = counted.hits([a.text for a in answers]), kinds_of(answers, self._refuses)
                figures[number][counted.name] = hit_figures(counted, hits) | answer_figures(
                    answers, found[0][here], kinds
                )
                for sample, answer, kind in zip(counted.samples(number, variant, hits), answers, kinds, strict=True):
                    self.samples.append(sample | {"answer": answer.text, "tokens": len(answer.tokens), "kind": kind})
            start += len(counted.prompts)
        return figures

    def _by_logits(self, interventions) -> list[dict] | None:
        """The behaviour, where a forward pass measures it."""
        counted = self._counted[0] if self._counted else None
        if counted is None or counted.behaviour is None or not counted.from_logits:
            return None
        work = partial(counted.hits_by_logits, self.model, interventions)
        found = self._in_pieces(counted.name, interventions, range(len(counted.prompts)), work)
        figures = []
        for number, variant in enumerate(interventions.variants):
            hits = {counted.behaviour.name: found[number]}
            self.samples += counted.samples(number, variant, hits)
            figures.append({counted.name: hit_figures(counted, hits)})
        return figures

    def _divergences(self, interventions) -> list[dict] | None:
        if not self._texts:
            return None

        def work(texts, numbers):
            return divergences(self.model, interventions, numbers, [text.ids for text in texts])

        found = self._in_pieces("kl", interventions, self._texts, work)
        return [{"kl": mean(values, NOT_NEGATIVE) | {"ignoring": self._ignoring}} for values in found]

    def _perplexities(self, interventions) -> list[dict] | None:
        if not self._windows:
            return None

        def work(windows, numbers):
            return perplexities(self.model, interventions, numbers, windows)

        found = self._in_pieces("perplexity", interventions, self._windows, work)
        return [{"perplexity": perplexity(losses)} for losses in found]

    def _multiple_choice(self, interventions) -> list[dict] | None:
        suite = self.suite
        if suite.multiple_choice is None:
            return None
        questions = suite.multiple_choice.questions

        def work(asked, numbers):
            return by_likelihood(self.model, interventions, numbers, asked)

        likely = self._in_pieces("choice-likelihood", interventions, self._choices, work)
        figures = []
        prompts = [TokenPrompt(asked.rows[0], asked.question.place) for asked in self._questions]
        answers = self._write(interventions, prompts, suite.choice_tokens, "choice-answers")
        for letters, written in zip(likely, answers, strict=True):
            said = [parse_letter(a.text, len(q.choices)) for a, q in zip(written, questions, strict=True)]
            right = {
                name: [choice == question.answer for choice, question in zip(choices, questions, strict=True)]
                for name, choices in (("likelihood", letters), ("generated", said))
            }
            figures.append({
                "mmlu": {
                    **{name: accuracy(hits) for name, hits in right.items()},
                    "no letter": share(said.count(None), len(said)),
                    "subjects": {
                        subject: {
                            "n": len(places), **{name: sum(hits[p] for p in places) for name, hits in right.items()},
                        }
                        for subject, places in by_subject(questions).items()
                    },
                }
            })  # fmt: skip
        return figures

    def _judge(self, rows: list[dict]):
        samples = [sample for sample in self.samples if "answer" in sample]
        if self.suite.judge_command is None or not samples:
            return
        self.say("judge")
        self.results["judge_command"] = self.suite.judge_command
        items = [{"set": s["set"], "prompt": s["prompt"], "answer": after_thought(s["answer"]) or ""} for s in samples]
        command = self.suite.judge_command
        scores = self.store.get(f"judge-{sha256(command)[:16]}", lambda: judge(command, items))
        by_set: dict[tuple[int, str], list[float]] = {}
        for sample, score in zip(samples, scores, strict=True):
            sample["judge"] = score
            by_set.setdefault((sample["variant"], sample["set"]), []).append(score)
        for (number, name), values in by_set.items():
            rows[number][name]["judge"] = mean(values)


@renamed(plan="suite")
def evaluate(
    model: LanguageModel,
    circuit: Circuit,
    suite: Suite,
    *,
    out: FilePath | None = None,
    say: Say = lambda text: None,
) -> dict:
    """Run a suite and return its results. The directory ``out`` gets finished parts, results.json and samples.jsonl.

    Raises:
        InputError: a file, prompt or variant cannot be used; names it. Finished parts stay in ``out``.
    """
    with Store(out, run_facts(model, circuit, suite)) as store:
        evaluation = Evaluation(model, circuit, suite, store, say)
        results = evaluation.run()
        if out is not None:
            lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples)
            write_text(Path(out) / "samples.jsonl", "".join(lines))
            write_text(Path(out) / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


class Plan(Suite):
    """:class:`Suite` by the name and the keywords that it had before 0.2."""

    __init__ = renamed(exam="multiple_choice", exam_tokens="choice_tokens", rows="batch")(Suite.__init__)
