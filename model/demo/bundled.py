"""`cna demo --bundled`: the whole story on the bundled models, measured on held-out prompts.

The circuit's size is chosen on the discovery prompts; every figure reported comes from prompts that neither instruct
tuning nor discovery has seen.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import cna_kernels
from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.files import make_directory, write_text

from ..evaluation import report as evaluation_report
from ..evaluation.evaluate import evaluate
from ..evaluation.metrics import Refusals, kind_of, share_equal, summarise
from ..evaluation.suite import METHODS, Suite
from ..language_model import LanguageModel, load
from ..prompts.files import PromptSet
from . import world
from .checkpoint import demo_checkpoint

FRACTIONS = (0.0005, 0.001, 0.002, 0.005, 0.01)
PAPER_FRACTION = 0.001
SCORES = ("abs-delta", "magnitude")
MULTIPLIERS = (0.0, 0.5, 1.0, 1.5, 2.0)
RANDOM_DRAWS = 3
RIVAL_MULTIPLIERS = (1.0, 0.0)
RIVAL_PROMPTS = 30  # of each kind
N_EXAMPLES = 3
BATCH = 200
MAX_NEW_TOKENS = 60  # more than any answer of the world needs


class Story:
    """Runs the experiments on one pair of models and keeps what the report needs.

    Attributes:
        report: everything that report.json holds.
        circuits: name -> Circuit of the circuits shown.
    """

    def __init__(self, instruct: LanguageModel, base: LanguageModel, say=lambda text: None):
        self.instruct, self.base, self.say = instruct, base, say
        self.refusable, self.benign = world.heldout_refusable(), world.heldout_benign()
        self.proper = [world.expected_answer(prompt) for prompt in self.refusable]
        self.circuits: dict[str, Circuit] = {}
        self.report: dict = {}

    def tell(self) -> dict:
        """Run everything; return the report."""
        started = time.perf_counter()
        self.say("baseline")
        refused, answered = self._answer(self.instruct, [*self.refusable, *self.benign])
        self.plain = {"refusable": refused, "benign": answered}
        self.report["baseline"] = self._figures(refused, answered)
        self._choose_circuits()
        best = self.circuits["best"]
        self._sweep(best)
        self._random_controls(best)
        self._rivals(best)
        self._base_against_instruct()
        self.report["prompts"] = {
            "held-out refusable": len(self.refusable),
            "held-out benign": len(self.benign),
            "discovery positive": len(world.discovery_positive()),
            "discovery negative": len(world.discovery_negative()),
            "universal filter": len(world.neutral_prompts()),
        }
        config = self.instruct.config
        self.report["model"] = {
            "layers": config.num_hidden_layers,
            "neurons per layer": config.intermediate_size,
            "hidden size": config.hidden_size,
            "parameters": self.instruct.transformer.n_weights(),
        }
        self.report["environment"] = {
            "cna_kernels": cna_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.perf_counter() - started, 1),
        }
        return self.report

    def _answer(self, model, prompts: Sequence[str], circuit=None, multiplier=0.0) -> tuple[list[str], list[str]]:
        """Greedy answers to the prompts, split into those to the refusable prompts, which come first, and the rest."""
        answers = model.generate(
            prompts, circuit=circuit, multiplier=multiplier, max_new_tokens=MAX_NEW_TOKENS, batch=BATCH
        )
        n_refusable = len(self.refusable)
        return answers[:n_refusable], answers[n_refusable:]

    def _figures(self, refused, answered) -> dict:
        """The figures of one setting, from its answers to refusable prompts and its answers to benign prompts."""
        figures = summarise(refused, world.is_refusal)
        benign = summarise(answered, world.is_refusal)
        return figures | {
            "proper": share_equal(refused, self.proper),
            "benign_refusal": benign["refusal"],
            "benign_quality": benign["quality"],
            "benign_unchanged": share_equal(answered, self.plain["benign"]),
        }

    def _measure(self, circuit: Circuit, multiplier: float, model=None) -> dict:
        return self._figures(
            *self._answer(model or self.instruct, [*self.refusable, *self.benign], circuit, multiplier)
        )

    def _discover(self, model, score, fraction) -> Circuit:
        return model.discover(
            world.discovery_positive(),
            world.discovery_negative(),
            score=score,
            fraction=fraction,
            universal_prompts=world.neutral_prompts(),
        )

    def _choose_circuits(self):
        """Measure both scores' circuits at 0.1% and at the smallest fraction that works; keep the best as "best"."""
        rows, ablated = [], {}
        for score in SCORES:
            self.say(f"circuits by {score}")
            smallest = self._smallest_that_works(score)
            for fraction in sorted({PAPER_FRACTION, smallest}):
                circuit = self._discover(self.instruct, score, fraction)
                answers = self._answer(self.instruct, [*self.refusable, *self.benign], circuit, 0.0)
                figures = self._figures(*answers)
                name = {"score": score, "fraction": fraction, "k": circuit.k, "multiplier": 0.0}
                rows.append(
                    name | {"per_layer": circuit.per_layer(), "smallest that works": fraction == smallest} | figures
                )
                self.circuits[f"{score} {fraction:g}"] = circuit
                ablated[f"{score} {fraction:g}"] = answers[0]
        self.report["circuits"] = rows
        working = [row for row in rows if row["smallest that works"]]
        # The circuit with the fewest neurons; where both scores need the same number, the paper's, abs-delta.
        best = min(working, key=lambda row: (row["k"], row["score"] != "abs-delta"))
        self.report["best"] = best
        chosen = f"{best['score']} {best['fraction']:g}"
        self.circuits["best"] = self.circuits[chosen]
        self.report["examples"] = [
            {"prompt": prompt, "m = 1": before, "m = 0": after}
            for prompt, before, after in zip(self.refusable, self.plain["refusable"], ablated[chosen], strict=True)
        ][:N_EXAMPLES]
        paper = next(row for row in working if row["score"] == "abs-delta")
        self.report["paper"] = paper
        self.report["paper at 0.1%"] = next(
            row for row in rows if row["score"] == "abs-delta" and row["fraction"] == PAPER_FRACTION
        )

    def _smallest_that_works(self, score) -> float:
        """The smallest of FRACTIONS with which 95% of the discovery prompts are answered properly, else the largest."""
        prompts = world.discovery_positive()
        for fraction in FRACTIONS:
            circuit = self._discover(self.instruct, score, fraction)
            answers = self.instruct.generate(prompts, circuit=circuit, max_new_tokens=MAX_NEW_TOKENS, batch=BATCH)
            kinds = [kind_of(text, (), world.is_refusal) for text in answers]
            if kinds.count("answer") >= 0.95 * len(kinds):
                return fraction
        return FRACTIONS[-1]

    def _sweep(self, circuit):
        self.say("multipliers")
        self.report["sweep"] = []
        for multiplier in MULTIPLIERS:
            known = {0.0: self.report["best"], 1.0: self.report["baseline"]}
            figures = known.get(multiplier) or self._measure(circuit, multiplier)
            figures = {name: figures[name] for name in self.report["baseline"]}
            self.report["sweep"].append({"multiplier": multiplier} | figures)

    def _random_controls(self, circuit):
        """Ablate as many random neurons of the circuit's layers, in several draws; report the means of the figures."""
        self.say("random neurons")
        draws = [self._measure(circuit.random_like(seed), 0.0) for seed in range(RANDOM_DRAWS)]
        means = {name: sum(draw[name] for draw in draws) / len(draws) for name in draws[0]}
        self.report["random"] = {"k": circuit.k, "multiplier": 0.0, "draws": len(draws)} | means
        self.report["random"]["refusal of each draw"] = [draw["refusal"] for draw in draws]

    def _rivals(self, circuit):
        """The circuit beside its controls and competitors, as `cna eval --methods all --curves` measures them."""
        prompts = {
            "harmful": self.refusable[:RIVAL_PROMPTS],
            "benign": self.benign[:RIVAL_PROMPTS],
            "positive": world.discovery_positive(),
            "negative": world.discovery_negative(),
            "neutral": world.neutral_texts(),
        }
        sets: dict[str, Any] = {name: PromptSet.of(texts, name) for name, texts in prompts.items()}
        suite = Suite(
            methods=tuple(name for name in METHODS if name != "sae"),
            multipliers=RIVAL_MULTIPLIERS,
            refusals={"keywords": Refusals(world.REFUSAL_KEYWORDS)},
            random_draws=RANDOM_DRAWS,
            curves=True,
            curve_steps=(1 / 4, 1.0, 8.0),
            max_new_tokens=MAX_NEW_TOKENS,
            **sets,
        )
        say = lambda text: self.say(f"baselines: {text}")  # noqa: E731
        self.report["evaluation"] = evaluate(self.instruct, circuit, suite, say=say)

    def _base_against_instruct(self):
        """Discover a circuit in the base model: its overlap with the instruct circuit, and what steering it does."""
        self.say("base against instruct")
        best = self.report["best"]
        own = self._discover(self.base, best["score"], best["fraction"])
        self.circuits["base"] = own
        shared = set(own.pairs) & set(self.circuits["best"].pairs)
        plain_instruct = self.plain["benign"]
        refused, answered = self._answer(self.base, [*self.refusable, *self.benign])
        self.plain["benign"] = answered
        rows = {"unsteered": self._figures(refused, answered)}
        for name, circuit in (("own circuit ablated", own), ("instruct circuit ablated", self.circuits["best"])):
            rows[name] = self._measure(circuit, 0.0, model=self.base)
        self.plain["benign"] = plain_instruct
        quarter = -(-own.n_layers // 4)
        self.report["base"] = {
            "circuit per layer": own.per_layer(),
            "overlap with the instruct circuit": len(shared) / own.k,
            "share in the last quarter of layers": {
                "base": sum(own.per_layer()[-quarter:]) / own.k,
                "instruct": sum(self.circuits["best"].per_layer()[-quarter:]) / own.k,
            },
            "steering": rows,
        }


def tell(out, console):
    """Run the story on the bundled models, print it, and write reports, pictures, circuit and prompts to ``out``."""
    from .bundled_report import draw_pictures, print_report, to_json, to_markdown

    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(out, f"cannot be written: {error.strerror}") from None
    write_prompts(out)
    instruct, base = (load(demo_checkpoint(name), device="cpu", dtype="float32") for name in ("instruct", "base"))
    story = Story(instruct, base, say=_say)
    report = story.tell()
    draw_pictures(report, out)
    make_directory(out / "evaluation")
    evaluation_report.write(report["evaluation"], out / "evaluation")
    story.circuits["best"].save(out / "circuit.json")
    write_text(out / "report.md", to_markdown(report))
    write_text(out / "report.json", to_json(report))
    print_report(report, console)
    names = "report.md, report.json, two pictures, circuit.json, the prompts and evaluation/"
    console.print(f"wrote {names} to {out}/", markup=False)


def write_prompts(out: Path):
    """Write the prompt sets as files that `cna discover` and `cna run` take."""
    sets = {
        "positive": world.discovery_positive(),
        "negative": world.discovery_negative(),
        "neutral": world.neutral_prompts(),
        "heldout-refusable": world.heldout_refusable(),
        "heldout-benign": world.heldout_benign(),
    }
    for name, prompts in sets.items():
        write_text(out / f"{name}.txt", "".join(f"{prompt}\n" for prompt in prompts))


def _say(text):
    import sys

    print(f"demo: {text}", file=sys.stderr, flush=True)
