"""What a program does with an engine that has the plug-in: circuits by name, sums, and circuits found in them.

``llm`` is a vLLM ``LLM``. For ``AsyncLLM`` there are :func:`add`, :func:`remove`, :func:`circuits` and, with what
``await engine.collective_rpc("cna_sums")`` returns, :func:`merged`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..circuit import Circuit
from ..errors import InputError, warn
from ..files import FilePath
from ..select import Selection
from ..sums import ActivationSums
from .registry import Registry
from .requests import COLUMN, HOW, FrontEnd, front_end_of


def add(llm: Any, name: str, circuit: Circuit | FilePath) -> None:
    """Add a circuit, or its file, under a name, or put it in the place of that name's. Running requests keep theirs.

    Raises:
        InputError: the circuit is of another model, or the name is none.
    """
    registry = _registry(llm)
    registry.put(name, circuit if isinstance(circuit, Circuit) else registry.read_file(circuit))


def remove(llm: Any, name: str) -> None:
    """Forget a circuit. Running requests keep it. Raises InputError if there is none of this name."""
    _registry(llm).remove(name)


def circuits(llm: Any) -> dict[str, Circuit]:
    """The engine's circuits by name."""
    registry = _registry(llm)
    return {name: registry.get(name) for name in registry.names()}


def report(llm: Any) -> list[dict[str, Any]]:
    """What each worker holds and has done: its layers and neurons, how many settings, how many tokens it steered."""
    found: list[dict[str, Any]] = llm.collective_rpc("cna_report")
    return found


def collect(llm: Any, *prompts: Sequence[Any]) -> ActivationSums:
    """Run prompts and sum the activations at their last tokens: one set of prompts for each column.

    Args:
        prompts: sets of prompts as ``LLM.generate`` takes them: texts, or ``{"prompt_token_ids": [...]}``. A chat
            template is not applied.

    Returns:
        sums with as many columns as sets. What was summed before is dropped.

    Raises:
        InputError: the engine has fewer columns; or a prompt's activations are not finite.
    """
    from vllm import SamplingParams

    front = _front_end(llm)
    if len(prompts) > front.options.columns:
        what = f"{len(prompts)} sets of prompts, the engine has {front.options.columns} columns"
        raise InputError("columns", f'{what}: additional_config={{"cna": {{"columns": {len(prompts)}}}}}')
    sums(llm, reset=True)
    asked = [{COLUMN: column} for column, each in enumerate(prompts) for _ in each]
    params = [SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args=extra) for extra in asked]
    llm.generate([prompt for each in prompts for prompt in each], params, use_tqdm=False)
    found = sums(llm, reset=True)
    expected = [len(each) for each in prompts]
    if found.count.tolist()[: len(expected)] != expected:
        raise InputError("prompts", f"{expected} were given and {found.count.tolist()} counted")
    return _first_columns(found, len(prompts))


def discover(llm: Any, positive: Sequence[Any], negative: Sequence[Any], **selection: Any) -> Circuit:
    """Find the neurons that differ most between the last tokens of two sets of prompts.

    Args:
        positive, negative: as :func:`collect` takes them.
        selection: arguments of :class:`cna_kernels.select.Selection`, such as ``fraction``, ``top_k`` or ``score``.
    """
    front = _front_end(llm)
    chosen = Selection([front.n_neurons] * front.n_layers, **selection)
    return chosen.circuit(collect(llm, positive, negative), position="last prompt token", **front.provenance())


def sums(llm: Any, *, reset: bool = False) -> ActivationSums:
    """What requests with ``cna_column`` have summed so far, of all workers; ``reset`` begins anew."""
    return merged(_front_end(llm), llm.collective_rpc("cna_sums", args=(reset,)))


def merged(front: FrontEnd, parts: Sequence[dict[str, Any]]) -> ActivationSums:
    """The sums of a whole model from those of its workers: each has its layers, and its neurons of them."""
    found = ActivationSums(front.n_layers, front.n_neurons, len(parts[0]["count"]))
    if any(part["count"] != parts[0]["count"] for part in parts):
        some = ", ".join(sorted({name for part in parts for name in part["refused"]})[:4])
        what = f"activations that are not finite, of some workers' neurons alone ({some or 'of no known request'})"
        raise InputError("sums", f"{what}: the sums belong to different prompts, and must begin anew (reset)")
    for part in parts:
        own = torch.from_numpy(np.frombuffer(part["total"], np.float64).copy())
        own = own.view(front.n_layers, -1, part["n"])
        layers, low, high = part["layers"], part["low"], part["low"] + part["n"]
        found.total[layers, :, low:high] = own[layers]
        if part["refused"]:
            some = ", ".join(part["refused"][:4])
            warn(f"cna: {len(part['refused'])} requests with activations that are not finite are left out: {some}")
    found.count.copy_(torch.tensor(parts[0]["count"], dtype=torch.float64))
    return found


def _first_columns(found: ActivationSums, n: int) -> ActivationSums:
    kept = ActivationSums(found.total.shape[0], found.total.shape[2], n)
    kept.total.copy_(found.total[:, :n])
    kept.count.copy_(found.count[:n])
    return kept


def _front_end(engine: Any) -> FrontEnd:
    processor = getattr(getattr(engine, "llm_engine", engine), "input_processor", None)
    front = None if processor is None else front_end_of(processor)
    if front is None:
        raise InputError("llm", f"is no vLLM engine that takes circuits: {HOW}")
    return front


def _registry(engine: Any) -> Registry:
    return _front_end(engine).registry
