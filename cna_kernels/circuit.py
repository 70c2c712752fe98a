"""Circuit: the selected neurons and where they came from; JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .checks import InputError
from .files import FilePath, read_json, write_text

SCHEMA_VERSION = 1
SITE = "mlp.down_proj.input"


@dataclass(frozen=True)
class Circuit:
    """Neurons in rank order with their contrast. Holds no multiplier: that is chosen when steering.

    Attributes:
        neurons: (layer, index, contrast) best first.
        n_layers, n_neurons: the shape of the model it was found in.
        score, fraction, k_rule, position, skipped_layers: how it was selected; None where unknown.
        universal: how the universal filter was run and what it left out, or None where it was off.
        model, tokenizer_sha256, chat_template_sha256: what it was found in.
        prompts: count and sha256 of both sets.
        dtype, versions, preset: how the activations were computed.
        bootstrap: how stable the selection is when prompts are drawn again: ``overlap`` with this circuit and among
            the replicates, how often each neuron is selected, in rank order, and ``others`` in half of them or more.
        folds: the same for leaving out a part of the prompts, and the share of the contrast ``retained`` on that part.
    """

    neurons: tuple[tuple[int, int, float], ...]
    n_layers: int
    n_neurons: int
    score: str | None = None
    fraction: float | None = None
    k_rule: str | None = None
    position: str | None = None
    skipped_layers: tuple[int, ...] = ()
    universal: dict[str, Any] | None = None
    model: dict[str, str] | None = None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    prompts: dict[str, Any] | None = None
    dtype: str | None = None
    versions: dict[str, str] | None = None
    preset: str | None = None
    bootstrap: dict[str, Any] | None = None
    folds: dict[str, Any] | None = None

    def __post_init__(self):
        seen = set()
        for layer, index, _ in self.neurons:
            if not (0 <= layer < self.n_layers and 0 <= index < self.n_neurons):
                raise ValueError(
                    f"neurons: ({layer}, {index}) is outside {self.n_layers} layers of {self.n_neurons} neurons"
                )
            if (layer, index) in seen:
                raise ValueError(f"neurons: ({layer}, {index}) appears twice")
            seen.add((layer, index))

    @property
    def k(self) -> int:
        """How many neurons it has."""
        return len(self.neurons)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The neurons as (layer, index), best first."""
        return [(layer, index) for layer, index, _ in self.neurons]

    def by_layer(self) -> dict[int, list[int]]:
        """Return {layer: sorted indices} for the layers that hold any."""
        layers: dict[int, list[int]] = {}
        for layer, index in sorted(self.pairs):
            layers.setdefault(layer, []).append(index)
        return layers

    def per_layer(self) -> list[int]:
        """Return the number of neurons in each layer, length L."""
        counts = Counter(layer for layer, _ in self.pairs)
        return [counts[layer] for layer in range(self.n_layers)]

    def random_like(self, seed: int) -> Circuit:
        """Return as many random neurons from the same layers, none of this circuit: the control for every claim."""
        generator = random.Random(seed)
        neurons = []
        for layer, members in self.by_layer().items():
            others = sorted(set(range(self.n_neurons)) - set(members))
            if len(others) < len(members):
                raise ValueError(f"random_like: layer {layer} has only {len(others)} neurons outside the circuit")
            neurons += [(layer, index, 0.0) for index in sorted(generator.sample(others, len(members)))]
        return Circuit(tuple(neurons), self.n_layers, self.n_neurons, score=f"random (seed {seed})")

    def to_json(self) -> str:
        """Return what :meth:`save` writes."""
        record = {"schema_version": SCHEMA_VERSION, "site": SITE, "k": self.k}
        record |= {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        neurons = record.pop("neurons")
        lines = ",\n".join("    " + json.dumps(neuron, allow_nan=False) for neuron in neurons)
        head = json.dumps(record, indent=2, allow_nan=False)
        return head[: head.rindex("\n")] + ',\n  "neurons": [\n' + lines + "\n  ]\n}\n"

    def save(self, path: FilePath) -> None:
        """Write the circuit file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: FilePath, *, n_layers: int | None = None, n_neurons: int | None = None) -> Circuit:
        """Read a circuit file; every field is checked, and an error names the file and the field.

        The JSON of the public CNA code holds no model shape: give ``n_layers`` and ``n_neurons`` of the model in
        hand, or the smallest shape that fits is assumed.
        """
        record = read_json(path)
        if not isinstance(record, dict):
            raise InputError(path, "expected a JSON object")
        try:
            if "schema_version" not in record and isinstance(record.get("neurons"), dict):
                return _from_public_code(record, path, n_layers, n_neurons)
            return _from_record(record, path)
        except InputError:
            raise
        except ValueError as error:  # what the constructor refuses names its field
            raise InputError(path, error) from None

    def __str__(self):
        lines = [f"{self.k} of {self.n_layers * self.n_neurons} neurons, score {self.score or 'unknown'}"]
        lines.append("per layer: " + " ".join(str(count) for count in self.per_layer()))
        for layer, index, value in self.neurons[:10]:
            lines.append(f"  layer {layer:3d}  neuron {index:6d}  contrast {value:+.4f}")
        return "\n".join(lines)


_MOST_LAYERS, _MOST_NEURONS = 10_000, 10_000_000
# field: (required, types, what an error says was expected)
_FIELDS = {
    "n_layers": (True, int, "a whole number from 1 to 10000"),
    "n_neurons": (True, int, "a whole number from 1 to 10000000"),
    "k": (True, int, "the number of neurons"),
    "site": (True, str, repr(SITE)),
    "score": (False, str, "a name"),
    "fraction": (False, (int, float), "a number above 0 and at most 1"),
    "k_rule": (False, str, "text"),
    "position": (False, str, "text"),
    "skipped_layers": (False, list, "a list of layers"),
    "universal": (False, dict, "an object"),
    "model": (False, dict, "an object"),
    "tokenizer_sha256": (False, str, "a hash"),
    "chat_template_sha256": (False, str, "a hash"),
    "prompts": (False, dict, "an object"),
    "dtype": (False, str, "a name"),
    "versions": (False, dict, "an object"),
    "preset": (False, str, "a name"),
    "bootstrap": (False, dict, "an object"),
    "folds": (False, dict, "an object"),
    "neurons": (True, list, "a list of [layer, index, contrast]"),
}


# fields of the objects inside, all of which must be there
_NUMBER = (int, float)
_SIDE = {"count": int, "sha256": str}
_NESTED = {
    "universal": {"prompts": int, "prompts_sha256": str, "fraction": _NUMBER, "threshold": _NUMBER, "excluded": list},
    "model": {"name": str, "config_sha256": str, "headers_sha256": str, "weights_sha256": str},
    "prompts": {"positive": _SIDE, "negative": _SIDE},
    "bootstrap": {
        "replicates": int, "seed": int, "overlap": _NUMBER, "pairwise_overlap": _NUMBER, "frequency": list,
        "others": list,
    },
    "folds": {"n": int, "overlap": list, "retained": list},
}  # fmt: skip


def _check_nested(record, where, fields):
    for name, types in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if isinstance(types, dict):
            _check_nested(value, f"{where}.{name}", types)
        elif not _is(value, types):
            raise InputError(f"{where}.{name}", f"expected {_KINDS[types]}, got {_short(value)}")
        elif types is _NUMBER and not 0 <= value <= 1:
            raise InputError(f"{where}.{name}", f"expected 0 to 1, got {_short(value)}")
    unknown = set(record) - set(fields)
    if unknown:
        raise InputError(f"{where}.{sorted(unknown)[0]}", "not a field of a circuit file")


_KINDS = {int: "a whole number", str: "text", list: "a list", _NUMBER: "a number"}


def _is(value, types):
    return isinstance(value, types) and not isinstance(value, bool)


def _from_record(record, path) -> Circuit:
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version", f"expected {SCHEMA_VERSION}, got {version!r}")
    unknown = set(record) - set(_FIELDS) - {"schema_version"}
    if unknown:
        raise InputError(f"{path}: {sorted(unknown)[0]}", "not a field of a circuit file")
    for name, (required, types, expected) in _FIELDS.items():
        value = record.get(name)
        if value is None and not required:
            continue
        if not _is(value, types):
            raise InputError(f"{path}: {name}", f"expected {expected}, got {_short(value)}")
    for name, largest in (("n_layers", _MOST_LAYERS), ("n_neurons", _MOST_NEURONS)):
        if not 1 <= record[name] <= largest:
            raise InputError(f"{path}: {name}", f"expected {_FIELDS[name][2]}, got {record[name]}")
    if record["site"] != SITE:
        raise InputError(f"{path}: site", f"expected {SITE!r}, got {record['site']!r}")
    if record.get("fraction") is not None and not 0 < record["fraction"] <= 1:
        raise InputError(f"{path}: fraction", f"expected {_FIELDS['fraction'][2]}, got {record['fraction']}")
    for layer in record.get("skipped_layers") or []:
        if not _is(layer, int) or not 0 <= layer < record["n_layers"]:
            raise InputError(f"{path}: skipped_layers", f"expected layers below {record['n_layers']}, got {layer!r}")
    for place, neuron in enumerate(record["neurons"]):
        well_formed = isinstance(neuron, list) and len(neuron) == 3 and all(_is(v, int) for v in neuron[:2])
        if not well_formed or not _is(neuron[2], (int, float)):
            raise InputError(f"{path}: neurons[{place}]", f"expected [layer, index, contrast], got {_short(neuron)}")
    for name, fields in _NESTED.items():
        if record.get(name) is not None:
            _check_nested(record[name], f"{path}: {name}", fields)
    _check_stability(record, path)
    if record["k"] != len(record["neurons"]):
        raise InputError(f"{path}: k", f"expected {len(record['neurons'])}, the length of neurons, got {record['k']}")
    known = {name: value for name, value in record.items() if name not in ("schema_version", "site", "k")}
    known["neurons"] = tuple(
        (layer, index, _contrast(value, f"{path}: neurons[{place}]"))
        for place, (layer, index, value) in enumerate(record["neurons"])
    )
    known["skipped_layers"] = tuple(record.get("skipped_layers") or ())
    return Circuit(**known)


def _check_stability(record, path):
    """The lists inside ``bootstrap`` and ``folds``."""

    def expect(good, field, expected):
        if not good:
            raise InputError(f"{path}: {field}", f"expected {expected}")

    def numbers(values, n):
        return len(values) == n and all(_is(value, _NUMBER) for value in values)

    bootstrap, folds, universal = record.get("bootstrap"), record.get("folds"), record.get("universal")
    if universal is not None:
        shape = record["n_layers"], record["n_neurons"]
        inside = all(
            isinstance(pair, list) and len(pair) == 2 and all(_is(v, int) for v in pair)
            and all(0 <= v < n for v, n in zip(pair, shape, strict=True))
            for pair in universal["excluded"]
        )  # fmt: skip
        expect(inside, "universal.excluded", "a list of [layer, index] in the model's shape")
    if bootstrap is not None:
        k = len(record["neurons"])
        expect(numbers(bootstrap["frequency"], k), "bootstrap.frequency", f"{k} numbers, one for each neuron")
        others = bootstrap["others"]
        whole = all(isinstance(other, list) and numbers(other, 3) for other in others)
        expect(whole, "bootstrap.others", "a list of [layer, index, frequency]")
    if folds is not None:
        expect(folds["n"] > 0, "folds.n", "a number above 0")
        for name in ("overlap", "retained"):
            expect(numbers(folds[name], folds["n"]), f"folds.{name}", f"{folds['n']} numbers, one for each fold")


def _from_public_code(record, path, n_layers, n_neurons) -> Circuit:
    """Read ``{"neurons": {"layer,position,index": delta}, ...}``, strongest first; the position is not kept."""
    neurons = []
    for key, value in record["neurons"].items():
        parts = key.split(",")
        if len(parts) != 3 or not all(part.strip().lstrip("-").isdecimal() for part in parts):
            raise InputError(f"{path}: neurons", f"expected keys 'layer,position,index', got {_short(key)}")
        if not _is(value, (int, float)):
            raise InputError(f"{path}: neurons[{key}]", f"expected a number, got {_short(value)}")
        neurons.append((int(parts[0]), int(parts[2]), _contrast(value, f"{path}: neurons[{key}]")))
    for layer, index, _ in neurons:
        if not (0 <= layer < _MOST_LAYERS and 0 <= index < _MOST_NEURONS):
            raise InputError(f"{path}: neurons", f"({layer}, {index}) is no layer and neuron of a model")
    neurons.sort(key=lambda neuron: (-abs(neuron[2]), neuron[0], neuron[1]))
    n_layers = n_layers or 1 + max((layer for layer, _, _ in neurons), default=0)
    n_neurons = n_neurons or 1 + max((index for _, index, _ in neurons), default=0)
    return Circuit(tuple(neurons), n_layers, n_neurons, score="abs-delta", preset="imported")


def _contrast(value, where) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        raise InputError(where, f"expected a number that a double holds, got {_short(value)}") from None


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def made_elsewhere(path: FilePath, field: str, expected: object, got: object) -> InputError:
    """The error for a circuit that belongs to another model."""
    return InputError(f"{path}: {field}", f"made for another model: expected {expected}, got {got}")


def check_fits(circuit: Circuit, n_layers: int, n_neurons: int, where: FilePath = "circuit") -> None:
    """Raise InputError naming the field unless the circuit has the shape of the model in hand."""
    for field, expected in (("n_layers", n_layers), ("n_neurons", n_neurons)):
        got = getattr(circuit, field)
        if got != expected:
            raise made_elsewhere(where, field, expected, got)
