"""The tables of arXiv 2605.12290 on a model at hand, each figure beside the paper's. `reproduce_report.py` shows them.

| the paper's | here |
|---|---|
| Table 3 | refusal unsteered and with 0.1% of the neurons ablated |
| Tables 1 and 2 | circuit and CAA over strengths: refusal, quality, KL; multiple choice where there are questions |
| Tables 6 and 7 | in which layers the top 200 neurons of the model, and of its base model, lie |
| Table 8 | how many of the top 200 neurons base and instruct share |

Two bundled behaviours, capitals and agreement, stand beside them. Finished parts stay on disk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.files import FilePath, write_text

from ..language_model import LanguageModel
from ..prompts.files import PromptSet, neutral_texts
from . import reproduce_report
from .behaviour import Behaviour
from .compare import layer_shares
from .evaluate import Evaluation, Say
from .facts import environment, run_facts
from .matrix import matrix, overlaps
from .metrics import mcnemar
from .multiple_choice import MultipleChoice
from .published import MAX_NEW_TOKENS, PAPER, STATEMENTS, STRENGTHS, TOP, Match, recognise
from .store import Store
from .suite import Suite

METHODS = ("circuit", "random", "caa", "caa-released")
BEHAVIOURS = ("capitals", "agreement")
MULTIPLIERS = (0.0, 2.0)  # of the behaviours' circuits: ablated, doubled
BEHAVIOUR_DRAWS = 2  # random circuits beside each behaviour's


@dataclass(frozen=True)
class Sources:
    """The prompts and questions of a reproduction.

    Attributes:
        harmful: prompts to be refused, which refusal is measured on.
        positive, negative: discovery prompts.
        benign: prompts to be answered, for over-refusal.
        multiple_choice: the questions.
        chat: whether prompts go through the chat template; None: where the model has one.
        bundled: whether the prompts are those of the bundled behaviour ``refusal``, not the paper's.
    """

    harmful: PromptSet
    positive: PromptSet
    negative: PromptSet
    benign: PromptSet | None = None
    multiple_choice: MultipleChoice | None = None
    chat: bool | None = None
    bundled: bool = False

    @classmethod
    def personal_questions(cls, *, chat: bool | None = None, multiple_choice: MultipleChoice | None = None) -> Sources:
        """The bundled behaviour ``refusal``: harmless questions about the model's own life and the user's."""
        found = Behaviour.bundled("refusal")
        return cls(
            found.prompts, found.positive, found.negative, chat=chat, multiple_choice=multiple_choice, bundled=True
        )


def reproduce(
    model: LanguageModel,
    sources: Sources,
    *,
    base: LanguageModel | None = None,
    name: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    random_draws: int = 3,
    shots: int = 5,
    batch: int | None = None,
    out: FilePath | None = None,
    say: Say = lambda text: None,
) -> dict:
    """Compute the paper's tables. Returns JSON values.

    Args:
        base: the base model of ``model``, for its layers and its overlap; its layers may be streamed.
        name: which of the paper's models this is; None goes by the names of its files.
        max_new_tokens: of an answer to a prompt.
        random_draws: circuits of as many random neurons of the same layers.
        shots: examples in front of a multiple-choice question.
        batch: answers decoded together; None takes as many as memory has room for.
        out: a directory for finished parts, reproduce.json, reproduce.md, samples.jsonl and the circuits.

    Raises:
        InputError: a model or a prompt cannot be used; names it. Finished parts stay in ``out``.
    """
    started = time.perf_counter()
    shape = model.config.num_hidden_layers, model.config.intermediate_size
    match = recognise(model.directory, *shape, name)
    if base is not None and (base.config.num_hidden_layers, base.config.intermediate_size) != shape:
        other = base.config.num_hidden_layers, base.config.intermediate_size
        what = f"has {other[0]} layers of {other[1]} neurons, the model {shape[0]} of {shape[1]}"
        raise InputError("--base", f"{what}: it is not its base model")
    say(f"circuit by {len(sources.positive)} and {len(sources.negative)} prompts")
    circuit = model.discover(sources.positive, sources.negative, chat=sources.chat, preset="paper")
    suite = Suite(
        methods=METHODS, multipliers=(1.0, *(1 - alpha for alpha in STRENGTHS)), harmful=sources.harmful,
        benign=sources.benign, positive=sources.positive, negative=sources.negative, neutral=neutral_texts(),
        multiple_choice=sources.multiple_choice, shots=shots, max_new_tokens=max_new_tokens,
        random_draws=random_draws, chat=sources.chat, batch=batch,
    )  # fmt: skip
    left_out = _left_out(sources, base)
    behaviours = _measurable(model, left_out)
    facts = run_facts(model, circuit, suite) | {
        "base": None if base is None else {**base.identity(), "tokenizer_sha256": base.tokenizer.sha256},
        "top": TOP,
        "behaviours": {behaviour.name: behaviour.sha256 for behaviour in behaviours},
    }
    with Store(out, facts) as store:
        tops = find_tops(model, base, sources, store, say)
        evaluation = Evaluation(model, circuit, suite, store, say)
        found = evaluation.run()
        circuits = {
            behaviour.name: model.discover(behaviour.positive, behaviour.negative, chat=behaviour.chat, preset="paper")
            for behaviour in behaviours
        }
        measured = matrix(
            model, behaviours, circuits, multipliers=MULTIPLIERS, random_draws=BEHAVIOUR_DRAWS,
            neutral=neutral_texts(), batch=batch, store=store, say=say,
        ) if behaviours else None  # fmt: skip
    rows = rows_of(found, evaluation.samples, match)
    results = {
        "paper": PAPER,
        "model": model.identity(),
        "base": None if base is None else base.identity(),
        "compared": {"name": match.name, "how": match.how, "note": match.published.note if match.published else ""},
        "environment": environment(model) | {"dtype": facts["dtype"], "threads": torch.get_num_threads()},
        "settings": {
            "max_new_tokens": max_new_tokens, "random_draws": random_draws, "bundled": sources.bundled,
            "harmful": len(sources.harmful), "positive": len(sources.positive), "negative": len(sources.negative),
            "benign": None if sources.benign is None else len(sources.benign),
            "chat template": model.encoder.uses_chat(sources.chat),
            "shots": shots,
        },
        "circuit": {"k": circuit.k, "per_layer": circuit.per_layer()},
        "caa": {key: found["chosen"]["caa"][key] for key in ("layer", "sign")} if "caa" in found["chosen"] else None,
        "refusal": [row for row in rows if row["alpha"] in (0.0, 1.0) and not row["method"].startswith("caa")],
        "strengths": rows,
        "layers": [_layers(top, match) for top in tops],
        "overlap": None if base is None else _overlap(tops[-2], tops[-1], match),
        "behaviours": measured,
        "left_out": left_out,
        "notes": found["notes"],
    }  # fmt: skip
    results["environment"]["seconds"] = round(time.perf_counter() - started, 1)
    if out is not None:
        saved = {"circuit": circuit, **{f"top{TOP}-{top.role}-{top.prompts}": top.circuit for top in tops}}
        saved |= {f"circuit-{name}": each for name, each in circuits.items()}
        for file, each in saved.items():
            each.save(Path(out) / f"{file}.json")
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples)
        write_text(Path(out) / "samples.jsonl", "".join(lines))
        write_text(Path(out) / "reproduce.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        write_text(Path(out) / "reproduce.md", reproduce_report.to_markdown(results))
    return results


def _left_out(sources: Sources, base: LanguageModel | None) -> list[dict]:
    """The tables, and the parts of tables, that cannot be made, and what brings each."""
    found = []
    if sources.bundled:
        found.append({"what": "Table 3 on the paper's prompts", "flag": "--jbb FILE --benign FILE"})
    if sources.benign is None:
        found.append({"what": "refusals of harmless prompts", "flag": "--benign FILE"})
    if base is None:
        found.append({"what": "the base model in Tables 6 and 7, and Table 8, overlap with it", "flag": "--base BASE"})
    if sources.multiple_choice is None:
        found.append({"what": "MMLU against strength", "flag": "--mmlu DIR"})
    return found


def _measurable(model: LanguageModel, left_out: list[dict]) -> list[Behaviour]:
    """The behaviours that the model has tokens for; the others are added to ``left_out`` with the reason."""
    found, no_logits = [], torch.zeros(model.config.vocab_size, dtype=torch.float32)
    for name in BEHAVIOURS:
        behaviour = Behaviour.bundled(name)
        try:
            for item in behaviour.measured:
                behaviour.measure.of_logits(no_logits, item, model.tokenizer)
        except InputError as error:
            left_out.append({"what": f"the behaviour {name}", "flag": None, "why": str(error)})
            continue
        found.append(behaviour)
    return found


@dataclass(frozen=True)
class Top:
    """The top 200 neurons of a model.

    Attributes:
        role: "model" or "base"; prompts: "chat" where they went through the chat template, else "plain".
    """

    role: str
    prompts: str
    circuit: Circuit


def find_tops(model: LanguageModel, base: LanguageModel | None, sources: Sources, store: Store, say: Say) -> list[Top]:
    """The top 200 neurons of the model, and of its base model, the last two of the list found on the same texts.

    Where the chat templates of the two differ, or the base model has none, both are also compared on plain text.
    """
    wanted = [("model", model, model.encoder.uses_chat(sources.chat))]
    if base is not None:
        templates = [
            each.tokenizer.template_sha256 if each.encoder.uses_chat(sources.chat) else None for each in (model, base)
        ]
        same = templates[0] == templates[1]
        if not same:
            wanted.append(("model", model, False))
        wanted.append(("base", base, same and wanted[0][2]))
    tops = []
    for role, which, chat in dict.fromkeys(wanted):
        prompts = "chat" if chat else "plain"
        part = f"top-{role}-{prompts}"
        say(f"top {TOP} neurons: {role}, {prompts}")

        def find(which=which, chat=chat):
            found = which.discover(sources.positive, sources.negative, chat=chat, preset="paper", top_k=TOP)
            return json.loads(found.to_json())

        tops.append(Top(role, prompts, Circuit.from_record(store.get(part, find), f"{part}.json")))
    return tops


def rows_of(found: dict, samples: Sequence[dict], match: Match) -> list[dict]:
    """One record for each row of an evaluation, with a paired test against the unsteered model, and the paper's values.

    Args:
        found: the results of an ``Evaluation``; samples: its samples.
    """
    hits: dict[tuple[str, float], list[bool]] = {}
    for sample in samples:
        if sample["set"] == "harmful":
            hits.setdefault((sample["method"], sample["multiplier"]), []).append(sample["refusal"]["broad"])
    rows = []
    for row in found["rows"]:
        method, alpha, harmful = row["method"], 1 - row["multiplier"], row["harmful"]
        record = {
            "method": method,
            "multiplier": row["multiplier"],
            "alpha": alpha,
            "refused": harmful["refusal"]["broad"],
            "refused, strict list": harmful["refusal"]["strict"],
            "against unsteered": mcnemar(hits["unsteered", 1.0], hits[method, row["multiplier"]]),
            **{name: harmful[name] for name in ("answered", "kinds", "quality", "token_quality")},
            "kl": row["kl"],
            "published": _of_row(method, alpha, match),
        }
        if "benign" in row:
            record["benign refused"] = row["benign"]["refusal"]["broad"]
        if "mmlu" in row:
            record["mmlu"] = row["mmlu"]
        rows.append(record)
    return rows


def _of_row(method: str, alpha: float, match: Match) -> dict:
    """What the paper has for a row: values of this model, None where it is not one of the paper's, and statements."""
    found: dict = {}
    known = match.published
    if method == "unsteered":
        found["refused"] = known and known.refusal[0]
    if method == "circuit":
        found["mmlu"] = STATEMENTS["circuit mmlu"]
        if alpha == 1:
            found |= {"refused": known and known.refusal[1], "quality": STATEMENTS["circuit quality"]}
    if method == "caa-released" and alpha == 1:
        found |= {"quality": STATEMENTS["caa quality"], "mmlu": STATEMENTS["caa mmlu"]}
    return found


def _layers(top: Top, match: Match) -> dict:
    """A row about where a model's top neurons lie. The paper's values are of the instruct model."""
    published: dict = {}
    if top.role == "model":
        known = match.published
        published = {
            "last three layers": known and known.last_three_layers, "last quarter": known and known.last_quarter,
        }  # fmt: skip
    return {"role": top.role, "prompts": top.prompts, **layer_shares(top.circuit), "published": published}


def _overlap(model: Top, base: Top, match: Match) -> dict:
    assert (model.role, base.role) == ("model", "base") and model.prompts == base.prompts, f"{model.role=} {base.role=}"
    circuit = model.circuit
    (pair,) = overlaps({"model": circuit, "base": base.circuit})
    return {
        "prompts": model.prompts,
        "k": circuit.k,
        "shared": pair["shared"],
        "share": pair["shared"] / circuit.k,
        "by chance": circuit.k / circuit.n_all,
        "published": match.published and match.published.overlap,
    }
