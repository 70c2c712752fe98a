"""Compare two models, such as base and instruct: how alike their circuits are, and what steering does to each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cna_kernels import select
from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError
from cna_kernels.files import make_directory, write_text
from cna_kernels.renamed import renamed

from ..language_model import LanguageModel
from ..prompts.files import PromptSet
from . import baselines, report
from .evaluate import evaluate
from .suite import Suite

TOP = 200  # neurons of each model whose overlap the paper reports, beside that of the circuits


@renamed(plan="suite")
def compare(
    models: dict[str, LanguageModel],
    suite: Suite,
    *,
    out=None,
    say: Callable[[str], None] = lambda text: None,
    **settings,
) -> dict:
    """Find a circuit in each of two models with the same prompts, compare them, and steer both with both.

    Args:
        models: the two models, by their names in the results.
        suite: prompts and multipliers; its methods and baselines are not used.
        out: a directory for both evaluations, compare.json and compare.md; finished parts stay there.
        settings: of the discovery, as for ``LanguageModel.discover``.

    Returns:
        ``circuits`` (of each model), ``alike`` (None where the shapes differ) and ``evaluations`` (of each model).
    """
    if suite.positive is None or suite.negative is None:
        raise InputError("positive, negative", "discovery prompts are needed to compare models")
    used = {
        model.tokenizer.template_sha256 if model.encoder.uses_chat(suite.chat) else None for model in models.values()
    }
    if len(used) > 1:
        raise InputError("--no-template", "the models' chat templates differ: compare them on plain text")
    if out is not None:
        make_directory(out)
    circuits, contrasts = {}, {}
    for name, model in models.items():
        say(f"circuit of {name}")
        circuits[name] = model.discover(suite.positive, suite.negative, chat=suite.chat, **settings)
        contrasts[name] = _contrast(model, suite.positive, suite.negative, suite.chat)
    (a, b), shapes = circuits.values(), {(c.n_layers, c.n_neurons) for c in circuits.values()}
    results: dict[str, Any] = {
        "circuits": {name: layer_shares(circuit) for name, circuit in circuits.items()},
        "alike": alike(a, b, *contrasts.values()) if len(shapes) == 1 else None,
        "evaluations": {},
    }
    for name, model in models.items():
        say(f"steering {name}")
        other = next(other for other in models if other != name)
        others = {f"circuit of {other}": circuits[other]} if len(shapes) == 1 else {}
        own = replace(suite, methods=("circuit",), others=others, positive=None, negative=None)
        place = None if out is None else Path(out) / name
        results["evaluations"][name] = evaluate(model, circuits[name], own, out=place, say=say)
    if out is not None:
        for name, circuit in circuits.items():
            circuit.save(Path(out) / f"{name}.circuit.json")
        write_text(Path(out) / "compare.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        write_text(Path(out) / "compare.md", to_markdown(results))
    return results


def _contrast(model: LanguageModel, positive: PromptSet, negative: PromptSet, chat: bool | None) -> Tensor:
    sides = baselines.Sides(model.encode(positive, chat=chat), model.encode(negative, chat=chat), (), ())
    return select.contrast(baselines.contrast_sums(model, sides))


def layer_shares(circuit: Circuit) -> dict:
    """In which layers a circuit lies."""
    per_layer, n = circuit.per_layer(), circuit.n_layers
    quarter = -(-n // 4)
    return {
        "k": circuit.k,
        "per_layer": per_layer,
        "last three layers": sum(per_layer[-3:]) / circuit.k,
        "last quarter": sum(per_layer[-quarter:]) / circuit.k,
    }


def alike(a: Circuit, b: Circuit, delta_a: Tensor, delta_b: Tensor) -> dict:
    """How alike two circuits of one shape are.

    Args:
        delta_a, delta_b: the contrasts ``[L, N]`` that the circuits come from.

    Returns:
        ``overlap``: the number of shared neurons over the size of the smaller circuit.
        ``by chance``: the overlap to expect of two random circuits of these sizes.
        ``rank correlation``: Spearman's, of abs(contrast) over all neurons.
        ``in either``: Spearman's, of abs(contrast) over the neurons that are in either circuit.
        ``overlap of the top 200``: the share of common neurons among each model's 200 largest by abs(contrast).
    """
    size = a.n_all
    real = torch.arange(a.n_neurons, dtype=torch.int64) < torch.tensor(a.widths, dtype=torch.int64)[:, None]
    either = sorted(set(a.pairs) | set(b.pairs))
    where = tuple(torch.tensor(either, dtype=torch.int64).T)
    k = min(TOP, size)
    tops = [set(select.top_neurons(delta.abs(), k, ~real)) for delta in (delta_a, delta_b)]
    return {
        "overlap": len(set(a.pairs) & set(b.pairs)) / min(a.k, b.k),
        "by chance": max(a.k, b.k) / size,
        "rank correlation": spearman(delta_a[real].abs(), delta_b[real].abs()),
        "in either": spearman(delta_a[where].abs(), delta_b[where].abs()),
        f"overlap of the top {k}": len(tops[0] & tops[1]) / k,
    }


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors, equal values sharing their mean rank; 0 where one is constant."""
    ranks = []
    for values in (a, b):
        _, places, counts = values.double().unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0)
        ranks.append((last - (counts - 1) / 2)[places])
    x, y = (rank.double() - rank.double().mean() for rank in ranks)
    norm = (x.norm() * y.norm()).item()
    return (x @ y).item() / norm if norm else 0.0


def to_markdown(results: dict) -> str:
    lines = ["# Two models", "", *report.markdown(_table(results)), ""]
    alike = results["alike"]
    if alike is None:
        lines += ["The models have different shapes: neurons cannot be matched."]
    else:
        lines += [f"- {name}: {value:.3g}" for name, value in alike.items()]
    for name, evaluation in results["evaluations"].items():
        lines += ["", f"## {name}", ""]
        for title, columns in report.tables(evaluation):
            lines += [f"### {title}", "", *report.markdown(report.table_rows(evaluation, columns)), ""]
    return "\n".join([*lines, *(f"- {note}" for note in report.NOTES)]) + "\n"


def _table(results) -> Iterator[list[str]]:
    yield ["model", "neurons", "last three layers", "last quarter", "per layer"]
    for name, found in results["circuits"].items():
        shares = [f"{100 * found[where]:.0f}%" for where in ("last three layers", "last quarter")]
        yield [name, str(found["k"]), *shares, " ".join(map(str, found["per_layer"]))]
