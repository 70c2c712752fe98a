"""The model card of a repository of circuits: what they are, from their files alone. It holds no prompt and no path."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cna_kernels.circuit import Circuit
from cna_kernels.circuit_file import REPOSITORY

TAG = "cna-kernels"
TAGS = (TAG, "circuit", "steering", "mechanistic-interpretability")
_PLAIN = re.compile(r"[\w .,()%+-]{1,80}")


def card(circuits: Mapping[str, Circuit], repo: str, revision: str | None = None) -> str:
    """The README.md of a repository, with the fields that the Hub reads.

    Args:
        circuits: by the names of their files.
        repo: the repository that the card is for; revision: its branch, None for the default one.
    """
    bases = list(dict.fromkeys(base for circuit in circuits.values() if (base := _base(circuit)[0])))
    base = f"base_model: {json.dumps(bases[0] if len(bases) == 1 else bases)}\n" if bases else ""
    tags = "".join(f"- {tag}\n" for tag in TAGS)
    at = "" if revision is None else f"@{revision}"
    sections = "\n".join(_section(name, circuit, f"{repo}:{name}{at}") for name, circuit in circuits.items())
    several = "Each file is a circuit" if len(circuits) > 1 else "The file is a circuit"
    return f"""---
{base}library_name: cna-kernels
tags:
{tags}---

# Circuits of MLP neurons

{several} of cna-kernels: MLP neurons whose activation differs most between two sets of prompts.
A multiplier scales them while the model runs: 0 ablates them, 1 changes nothing, above 1 scales them up.

    cna pull {repo}{at} -o circuits/

{sections}"""


def _section(name: str, circuit: Circuit, place: str) -> str:
    """What the file of a circuit says of it, and how it is used."""
    per_layer = {layer: count for layer, count in enumerate(circuit.per_layer()) if count}
    total = circuit.n_layers * circuit.n_neurons
    lines = [f"{circuit.k} of {total} neurons, in {len(per_layer)} of {circuit.n_layers} layers "
             f"({', '.join(f'{layer}: {count}' for layer, count in per_layer.items())})"]  # fmt: skip
    base, commit = _base(circuit)
    if base:
        lines.append(f"found in `{base}`" + (f", commit `{commit}`" if commit else ""))
    hashed = (circuit.model or {}).get("decoder_sha256") or (circuit.model or {}).get("tensors_sha256")
    if hashed:
        lines.append(f"sha256 of the model's weights, as the file has it: `{_hex(hashed)}`")
    how = {"score": circuit.score, "k_rule": circuit.k_rule, "position": circuit.position, "dtype": circuit.dtype,
           "preset": circuit.preset}  # fmt: skip
    said = [f"{field} {value}" for field, value in how.items() if value and _PLAIN.fullmatch(value)]
    if said:
        lines.append("; ".join(said))
    for side, facts in (circuit.prompts or {}).items():
        lines.append(f"{facts['count']} {side} prompts, sha256 `{_hex(facts['sha256'])}`")
    lines += _scores(circuit)
    items = "\n".join(f"- {line}" for line in lines)
    model = "MODEL" if base is None else base + ("" if commit is None else f"@{commit}")
    return f"""## {name}

{items}

    cna run {model} -c {place} -m 0 -p "..."
"""


def _scores(circuit: Circuit) -> list[str]:
    """How stable the selection is, as far as the file says so."""
    lines = []
    if circuit.bootstrap:
        facts: Any = circuit.bootstrap
        lines.append(f"bootstrap: {100 * facts['overlap']:.0f}% of the neurons are selected again when the prompts are "
                     f"drawn again ({facts['replicates']} times)")  # fmt: skip
    if circuit.folds:
        overlap, retained = (sum(circuit.folds[name]) / circuit.folds["n"] for name in ("overlap", "retained"))
        lines.append(f"{circuit.folds['n']} folds: {100 * overlap:.0f}% of the neurons are selected without a fold, "
                     f"whose prompts show {100 * retained:.0f}% of the contrast")  # fmt: skip
    return lines


def _base(circuit: Circuit) -> tuple[str | None, str | None]:
    """The repository and commit of the model that a circuit was found in; None where its file does not name them."""
    known = circuit.model or {}
    repo = known.get("repo")
    return (repo, known.get("revision")) if repo and REPOSITORY.fullmatch(repo) else (None, None)


def _hex(text: str) -> str:
    return text if re.fullmatch(r"[0-9a-f]{8,64}", text) else "not a hash"
