"""Parts of circuits, and circuits made from two others: which neurons they hold, and what is still known of these.

A part keeps what its neurons were found with. What was measured of the whole circuit (fraction, bootstrap, folds) is
left out. A union keeps of two circuits what is the same in both.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .circuit_file import to_json
from .errors import InputError

if TYPE_CHECKING:
    from .circuit import Circuit

_SAME = ("score", "position", "prompts", "dtype", "versions", "preset", "universal")  # kept where both have the same


def part(circuit: Circuit, ranks: Sequence[int], k_rule: str, **changes: Any) -> Circuit:
    """The neurons of these ranks, in this order. ``k_rule`` says which they are: "top 5" of what the circuit says.

    The circuit itself where that is all of it.
    """
    if list(ranks) == list(range(circuit.k)):
        return circuit
    neurons = tuple(circuit.neurons[rank] for rank in ranks)
    pairs = {(layer, index) for layer, index, _ in neurons}
    means, mirrored = circuit.positive_mean, circuit.mirrored
    return dataclasses.replace(
        circuit, neurons=neurons, fraction=None, k_rule=f"{k_rule} of {circuit.k_rule or f'{circuit.k} neurons'}",
        bootstrap=None, folds=None, positive_mean=None if means is None else tuple(means[rank] for rank in ranks),
        mirrored=None if mirrored is None else tuple(pair for pair in mirrored if pair in pairs), **changes,
    )  # fmt: skip


def intersection(left: Circuit, right: Circuit) -> Circuit:
    """``left & right``: the neurons of the left circuit that the right one has, too."""
    _check_same_model(left, right)
    other = set(right.pairs)
    ranks = [rank for rank, pair in enumerate(left.pairs) if pair in other]
    return part(left, ranks, "in another circuit, too,", made_from=_made_from("intersection", left, right))


def difference(left: Circuit, right: Circuit) -> Circuit:
    """``left - right``: the neurons of the left circuit that the right one does not have."""
    _check_same_model(left, right)
    other = set(right.pairs)
    ranks = [rank for rank, pair in enumerate(left.pairs) if pair not in other]
    return part(left, ranks, "not in another circuit,", made_from=_made_from("difference", left, right))


def union(left: Circuit, right: Circuit) -> Circuit:
    """``left | right``: the neurons of both, those with the largest contrast first.

    A neuron that both have is as in the left circuit. The left circuit itself where it has all of the right one's.
    """
    _check_same_model(left, right)
    if (left.mirrored is None) != (right.mirrored is None):
        raise InputError("mirrored", "one circuit is aligned and the other is not: align both, or neither")
    own = set(left.pairs)
    if own.issuperset(right.pairs):
        return left
    added = [rank for rank, pair in enumerate(right.pairs) if pair not in own]
    neurons = [*left.neurons, *(right.neurons[rank] for rank in added)]
    order = sorted(range(len(neurons)), key=lambda rank: (-abs(neurons[rank][2]), neurons[rank][:2]))
    means = None
    if left.positive_mean is not None and right.positive_mean is not None:
        both = [*left.positive_mean, *(right.positive_mean[rank] for rank in added)]
        means = tuple(both[rank] for rank in order)
    mirrored = None
    if left.mirrored is not None and right.mirrored is not None:
        mirrored = (*left.mirrored, *(pair for pair in right.mirrored if pair not in own))
    made_from = _made_from("union", left, right)
    known = {name: _if_same(getattr(left, name), getattr(right, name)) for name in _SAME}
    return dataclasses.replace(
        left, neurons=tuple(neurons[rank] for rank in order), positive_mean=means, mirrored=mirrored,
        fraction=None, k_rule=_of_union(made_from), bootstrap=None, folds=None, experts=left.experts or right.experts,
        skipped_layers=_in_both(left.skipped_layers, right.skipped_layers),
        excluded=_in_both(left.excluded, right.excluded),
        **known, **_model_of(left, right), **_text_of(left, right), made_from=made_from,
    )  # fmt: skip


def _check_same_model(left: Circuit, right: Circuit) -> None:
    """Raise InputError naming the field that says that two circuits are of different models.

    What only one of them says is no contradiction; the models' names are not compared.
    """
    for field in ("n_layers", "n_neurons", "experts", "tokenizer_sha256"):
        _require_same(field, getattr(left, field), getattr(right, field))
    for name in {*(left.model or {}), *(right.model or {})} - {"name"}:
        _require_same(f"model.{name}", (left.model or {}).get(name), (right.model or {}).get(name))


def _require_same(field: str, left: Any, right: Any) -> None:
    if left is not None and right is not None and left != right:
        shown = [value[:8] if isinstance(value, str) else value for value in (left, right)]
        raise InputError(field, f"the circuits are of different models: {shown[0]} and {shown[1]}")


def _model_of(left: Circuit, right: Circuit) -> dict[str, Any]:
    """The model of two circuits of the same model: all that either says, so that a model that either would refuse is
    refused."""
    return {"model": {**(right.model or {}), **(left.model or {})} or None}


def _text_of(left: Circuit, right: Circuit) -> dict[str, Any]:
    """How prompts became tokens: tokenizer, chat template and what the chats held.

    No template means plain text where the tokenizer is known. So of two circuits whose prompts became tokens in
    different ways nothing of it is kept.
    """
    fields = ("tokenizer_sha256", "chat_template_sha256", "chat")
    told = [c for c in (left, right) if c.tokenizer_sha256 is not None or c.chat_template_sha256 is not None]
    ways = [(c.chat_template_sha256, *((c.chat or {}).get(name) or None for name in ("args", "system"))) for c in told]
    if not told or ways[0] != ways[-1]:
        return dict.fromkeys(fields)
    tokenizers = (c.tokenizer_sha256 for c in told)
    chats, days = [c.chat for c in told if c.chat], [(c.chat or {}).get("day") for c in told]
    chat = {**chats[0], "day": _if_same(days[0], days[-1])} if chats else None
    return dict(zip(fields, (next(filter(None, tokenizers), None), ways[0][0], chat), strict=True))


def _if_same(left: Any, right: Any) -> Any:
    return left if left == right else None


def _in_both(left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(item for item in left if item in right)


def _made_from(operation: str, left: Circuit, right: Circuit) -> dict[str, Any]:
    """What a circuit says of those that it was made from. A union of unions names all their circuits."""
    circuits: list[dict[str, Any]] = []
    for circuit in (left, right):
        own = circuit.made_from
        if own is not None and operation == own["operation"] == "union" and circuit.k_rule == _of_union(own):
            circuits += own["circuits"]
        else:
            digest = hashlib.sha256(to_json(circuit).encode()).hexdigest()
            made = {} if own is None else {"made_from": own}
            circuits.append({"k": circuit.k, "prompts": circuit.prompts, "sha256": digest, **made})
    return {"operation": operation, "circuits": circuits}


def _of_union(made_from: dict[str, Any]) -> str:
    return f"union of {len(made_from['circuits'])} circuits"


def prompts_of(prompts: dict[str, Any] | None, made_from: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The ``prompts`` of a circuit with these fields and of all that it was made from, as far as they are known."""
    if prompts is not None:
        yield prompts
    for circuit in (made_from or {}).get("circuits", ()):
        yield from prompts_of(circuit.get("prompts"), circuit.get("made_from"))
