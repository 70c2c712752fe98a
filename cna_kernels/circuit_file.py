"""The JSON file of a circuit: written, and read with every field checked. Reads the public CNA code's JSON, too."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from .errors import InputError
from .fields import Fields, is_number, is_whole, short
from .files import FilePath

SCHEMA_VERSION = 1
SITE = "mlp.down_proj.input"
_KIND = "a circuit file"
_MOST_LAYERS, _MOST_NEURONS, _MOST = 10_000, 10_000_000, (1 << 63) - 1
_SHARE = (0, 1)  # the bounds of a share
# the fields of a circuit that are texts, and the hashes inside its ``model``
_TEXTS = ("score", "k_rule", "position", "tokenizer_sha256", "chat_template_sha256", "dtype", "preset")
_HASHES = ("settings_sha256", "tensors_sha256", "decoder_sha256")
# where these are None, a file is as it was before there were such fields
_NEW = ("positive_mean", "mirrored", "experts", "made_from")
REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")  # a repository on the Hugging Face Hub
COMMIT = re.compile(r"[0-9a-f]{40}")
_OLD_HASHES = ("config_sha256", "headers_sha256", "weights_sha256", "neurons_sha256")  # of samples, before 0.2


def to_json(circuit: Any) -> str:
    """The text of a circuit's file, a line for each neuron."""
    record = {"schema_version": SCHEMA_VERSION, "site": SITE, "k": circuit.k}
    record |= {field.name: getattr(circuit, field.name) for field in dataclasses.fields(circuit)}
    if circuit.experts is not None:
        record = _renumbered(record, 2, lambda layer, index: [layer, *circuit.expert_of(layer, index)])
    neurons = record.pop("neurons")
    record = {name: value for name, value in record.items() if value is not None or name not in _NEW}
    lines = ",\n".join("    " + json.dumps(neuron, allow_nan=False) for neuron in neurons)
    head = json.dumps(record, indent=2, allow_nan=False)
    return head[: head.rindex("\n")] + ',\n  "neurons": [\n' + lines + "\n  ]\n}\n"


def fields_of(record: Any, path: FilePath, n_layers: int | None = None, n_neurons: int | None = None) -> dict[str, Any]:
    """The fields of a Circuit from the JSON of its file, or from that of the public CNA code.

    The JSON of the public code holds no model shape: the shape is the one given, or the smallest that fits.
    """
    fields = Fields(record, path)
    if is_public_code(record):
        return _from_public_code(record["neurons"], path, n_layers, n_neurons)
    return _from_record(fields)


def is_public_code(record: Any) -> bool:
    """Whether the JSON of a file is that of the public CNA code, which holds no model shape."""
    return isinstance(record, dict) and "schema_version" not in record and isinstance(record.get("neurons"), dict)


def _from_record(fields: Fields) -> dict[str, Any]:
    version = fields.record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise fields.error("schema_version", f"expected {SCHEMA_VERSION}, got {short(version)}")
    shape = fields.integer("n_layers", (1, _MOST_LAYERS)), fields.integer("n_neurons", (1, _MOST_NEURONS))
    known: dict[str, Any] = dict(n_layers=shape[0], n_neurons=shape[1])
    experts = _experts(fields, shape)
    if experts is not None:
        fields = Fields(_flat(fields, experts), fields.where)
    known["experts"] = experts
    fields.one_of("site", (SITE,))
    known |= {name: fields.text(name, None) for name in _TEXTS}
    known["fraction"] = fields.read(
        "fraction", None, "a number above 0 and at most 1", lambda x: is_number(x) and 0 < x <= 1
    )
    known["skipped_layers"] = tuple(
        fields.items("skipped_layers", lambda x: is_whole(x) and 0 <= x < shape[0], f"layers below {shape[0]}", [])
    )
    neurons = fields.items(
        "neurons",
        lambda x: (
            isinstance(x, list) and len(x) == 3 and all(map(is_whole, x[:2])) and (is_number(x[2]) or is_whole(x[2]))
        ),
        "[layer, index, contrast]",
    )
    known["neurons"] = tuple(
        (layer, index, _contrast(value, f"{fields.where}: neurons[{place}]"))
        for place, (layer, index, value) in enumerate(neurons)
    )
    k = fields.integer("k", (0, _MOST))
    if k != len(neurons):
        raise fields.error("k", f"expected {len(neurons)}, the length of neurons, got {k}")
    for name, check in _OBJECTS.items():
        inside = fields.object(name, None)
        if inside is not None:
            check(inside, shape, k)
        known[name] = None if inside is None else inside.record
    excluded = _pairs(fields, "excluded", shape, [])
    known["excluded"] = tuple((layer, index) for layer, index in excluded)
    known["positive_mean"] = _numbers(fields, "positive_mean", k, "one for each neuron", None)
    mirrored = _pairs(fields, "mirrored", shape, None)
    known["mirrored"] = None if mirrored is None else tuple((layer, index) for layer, index in mirrored)
    fields.only((*known, "schema_version", "site", "k"), _KIND)
    return known


# The checks of the objects in a circuit file: functions of the object, the model's shape and k.


def _check_universal(fields: Fields, shape: tuple[int, int], k: int) -> None:
    fields.integer("prompts", (0, _MOST))
    fields.text("prompts_sha256", None)
    fields.number("fraction", _SHARE)
    fields.number("threshold", _SHARE)
    _pairs(fields, "excluded", shape)
    fields.only(("prompts", "prompts_sha256", "fraction", "threshold", "excluded"), _KIND)


def _check_model(fields: Fields, shape: tuple[int, int], k: int) -> None:
    fields.text("name")
    for name in (*_HASHES, *_OLD_HASHES):
        fields.text(name, None)
    fields.read("repo", None, "a name such as org/name", lambda x: _is(x, REPOSITORY))
    fields.read("revision", None, "a commit of 40 hex digits", lambda x: _is(x, COMMIT))
    fields.only(("name", "repo", "revision", *_HASHES, *_OLD_HASHES), _KIND)


def _is(value: Any, form: re.Pattern[str]) -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None


def _check_chat(fields: Fields, shape: tuple[int, int], k: int) -> None:
    fields.object("args", None)
    fields.text("system", None)
    fields.text("day", None)
    fields.only(("args", "system", "day"), _KIND)


def _check_prompts(fields: Fields, shape: tuple[int, int], k: int) -> None:
    for side in ("positive", "negative"):
        inside = fields.object(side)
        inside.integer("count", (0, _MOST))
        inside.text("sha256")
        inside.only(("count", "sha256"), _KIND)
    fields.only(("positive", "negative"), _KIND)


def _check_bootstrap(fields: Fields, shape: tuple[int, int], k: int) -> None:
    fields.integer("replicates", (0, _MOST))
    fields.integer("seed", (0, _MOST))
    fields.number("overlap", _SHARE)
    fields.number("pairwise_overlap", _SHARE)
    _numbers(fields, "frequency", k, "one for each neuron")
    fields.items(
        "others",
        lambda x: isinstance(x, list) and len(x) == 3 and all(map(is_number, x)),
        "[layer, index, frequency]",
    )
    fields.only(("replicates", "seed", "overlap", "pairwise_overlap", "frequency", "others"), _KIND)


def _check_folds(fields: Fields, shape: tuple[int, int], k: int) -> None:
    n = fields.integer("n", (1, _MOST))
    for name in ("overlap", "retained"):
        _numbers(fields, name, n, "one for each fold")
    fields.only(("n", "overlap", "retained"), _KIND)


def _check_made_from(fields: Fields, shape: tuple[int, int], k: int) -> None:
    fields.one_of("operation", ("union", "intersection", "difference"))
    circuits = fields.items("circuits", lambda x: isinstance(x, dict), "a JSON object")
    for place, circuit in enumerate(circuits):
        inside = Fields(circuit, fields.where, f"{fields.prefix}circuits[{place}].")
        inside.integer("k", (0, _MOST))
        inside.text("sha256")
        prompts = inside.object("prompts", None)
        if prompts is not None:
            _check_prompts(prompts, shape, k)
        made_from = inside.object("made_from", None)
        if made_from is not None:
            _check_made_from(made_from, shape, k)
        inside.only(("k", "prompts", "sha256", "made_from"), _KIND)
    fields.only(("operation", "circuits"), _KIND)


def _check_versions(fields: Fields, shape: tuple[int, int], k: int) -> None:
    """Any versions are accepted."""


_OBJECTS = {
    "universal": _check_universal, "model": _check_model, "chat": _check_chat, "prompts": _check_prompts,
    "versions": _check_versions, "bootstrap": _check_bootstrap, "folds": _check_folds,
    "made_from": _check_made_from,
}  # fmt: skip


def _pairs(fields: Fields, name: str, shape: tuple[int, int], *default: Any) -> Any:
    def inside(pair: Any) -> bool:
        whole = isinstance(pair, list) and len(pair) == 2 and all(map(is_whole, pair))
        return whole and all(0 <= value < size for value, size in zip(pair, shape, strict=True))

    return fields.items(name, inside, "[layer, index] in the model's shape", *default)


def _numbers(fields: Fields, name: str, n: int, what: str, *default: Any) -> Any:
    values = fields.items(name, is_number, "a number", *default)
    if values is not None and len(values) != n:
        raise fields.error(name, f"expected {n} numbers, {what}, got {len(values)}")
    return values


def _from_public_code(
    found: dict[str, Any], path: FilePath, n_layers: int | None, n_neurons: int | None
) -> dict[str, Any]:
    """The fields from ``{"layer,position,index": delta, ...}``: neurons strongest first, without their position."""
    neurons = []
    for key, value in found.items():
        parts = key.split(",")
        if len(parts) != 3 or not all(re.fullmatch(r"-?[0-9]{1,18}", part.strip()) for part in parts):
            raise InputError(f"{path}: neurons", f"expected keys 'layer,position,index', got {short(key)}")
        if not is_number(value) and not is_whole(value):
            raise InputError(f"{path}: neurons[{key}]", f"expected a number, got {short(value)}")
        neurons.append((int(parts[0]), int(parts[2]), _contrast(value, f"{path}: neurons[{key}]")))
    for layer, index, _ in neurons:
        if not (0 <= layer < _MOST_LAYERS and 0 <= index < _MOST_NEURONS):
            raise InputError(f"{path}: neurons", f"({layer}, {index}) is no layer and neuron of a model")
    neurons.sort(key=lambda neuron: (-abs(neuron[2]), neuron[0], neuron[1]))
    n_layers = n_layers or 1 + max((layer for layer, _, _ in neurons), default=0)
    n_neurons = n_neurons or 1 + max((index for _, index, _ in neurons), default=0)
    return dict(neurons=tuple(neurons), n_layers=n_layers, n_neurons=n_neurons, score="abs-delta", preset="imported")


# The neurons of a mixture: [layer, expert, index, ...] in a file, (layer, index, ...) in a Circuit.

_PLACES = (("neurons",), ("excluded",), ("mirrored",), ("universal", "excluded"), ("bootstrap", "others"))


def _experts(fields: Fields, shape: tuple[int, int]) -> tuple[tuple[int, int], ...] | None:
    """The number of experts and the neurons of each, layer by layer; None where the file has no experts."""
    pairs = fields.items(
        "experts",
        lambda x: isinstance(x, list) and len(x) == 2 and all(is_whole(n) and 0 < n <= _MOST_NEURONS for n in x),
        "[experts, neurons of each]",
        None,
    )
    if pairs is None:
        return None
    if len(pairs) != shape[0] or max(n * own for n, own in pairs) != shape[1]:
        raise fields.error("experts", f"expected one for each of {shape[0]} layers, the widest of {shape[1]} neurons")
    return tuple((n, own) for n, own in pairs)


def _flat(fields: Fields, experts: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """The fields of a mixture's circuit with (layer, index) in place of (layer, expert, index)."""
    for path in _PLACES:
        part: Any = fields.record
        for name in path:
            part = part.get(name) if isinstance(part, dict) else None
        for place, entry in enumerate(part if isinstance(part, list) else ()):
            whole = isinstance(entry, list) and len(entry) >= 3 and all(map(is_whole, entry[:3]))
            n, own = experts[entry[0]] if whole and 0 <= entry[0] < len(experts) else (0, 0)
            if not (whole and 0 <= entry[1] < n and 0 <= entry[2] < own):
                what = f"expected [layer, expert, index, ...] in the model's shape, got {short(entry)}"
                raise fields.error(f"{'.'.join(path)}[{place}]", what)
    return _renumbered(fields.record, 3, lambda layer, expert, index: [layer, expert * experts[layer][1] + index])


def _renumbered(record: dict[str, Any], n: int, change: Callable[..., list[int]]) -> dict[str, Any]:
    """A copy of a record whose neurons have other numbers; ``change``: the ``n`` old numbers -> the new."""
    record = {name: dict(value) if isinstance(value, dict) else value for name, value in record.items()}
    for *above, name in _PLACES:
        inside = record.get(above[0]) if above else record
        if isinstance(inside, dict) and isinstance(inside.get(name), (list, tuple)):
            inside[name] = [[*change(*entry[:n]), *entry[n:]] for entry in inside[name]]
    return record


def _contrast(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        raise InputError(where, f"expected a number that a double holds, got {short(value)}") from None
