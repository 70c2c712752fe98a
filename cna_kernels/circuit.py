"""Circuit: the selected neurons and where they came from."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from . import circuit_file, circuit_sets
from .circuit_frame import frame_of
from .errors import InputError, warn
from .fields import whole_number
from .files import FilePath, read_json, write_text

if TYPE_CHECKING:
    import pandas

Neuron = tuple[int, int, float]  # layer, index, contrast


@dataclass(frozen=True)
class Circuit:
    """Neurons in rank order with their contrast. A circuit holds no multiplier: steering chooses the multiplier m, and
    :meth:`multipliers` says what each neuron gets at m.

    ``len(circuit)`` is the number of neurons, iteration gives them in rank order, ``circuit[0]`` is the best one and
    ``circuit[:10]`` the circuit of the ten best; ``(layer, index) in circuit`` asks for a neuron. An empty circuit is
    false, as an empty list is. ``a | b``, ``a & b`` and ``a - b`` are circuits again:

    - A part (a slice, :meth:`top`, ``a & b``, ``a - b``) keeps the neurons, their order and the provenance of its
      circuit, or of the left one. What holds of the whole alone is left out: ``fraction``, ``bootstrap``, ``folds``.
    - A union has the neurons with the largest contrast, in size, first; equal ones go by layer and index. A neuron of
      both is as in the left one. Provenance that differs is left out; ``skipped_layers`` and ``excluded`` are what both
      left out, and model and tokenizer what either says.
    - Where nothing is left out or added, the result is the circuit itself, or the left one.
    - Circuits of different shapes, models or tokenizers are refused: InputError names the field. So is the union of an
      aligned and a plain circuit.

    Attributes:
        neurons: (layer, index, contrast) best first.
        n_layers, n_neurons: the shape of the model that the circuit was found in.
        score, fraction, k_rule, position, skipped_layers: how the circuit was selected; None where unknown.
        universal: how the universal filter was run and which neurons it left out, or None where the filter was off, and
            in a union whose circuits differ in it.
        excluded: (layer, index) of neurons that were left out by name.
        model, tokenizer_sha256, chat_template_sha256: the model, tokenizer and chat template that the circuit was found
            with. ``model`` has a name and hashes; a hash is compared with the model in hand where both have it. Of a
            model on the Hugging Face Hub it has the ``repo`` and the commit, its ``revision``, which nothing compares.
        chat: what the chats held besides template and prompt: ``args`` of the template, ``system`` message, the ``day``
            that a dated template saw. None for plain text, and where there was nothing of the kind.
        prompts: count and sha256 of both sets.
        dtype, versions, preset: how the activations were computed.
        bootstrap: how stable the selection is when prompts are drawn again: the ``overlap`` of the replicates with this
            circuit, their ``pairwise_overlap``, the ``frequency`` with which they select each neuron of this circuit,
            in rank order, and ``others``: neurons outside this circuit that at least half of the replicates select.
        folds: cross-validation. For each part of the prompts in turn, the circuit of all other prompts: its ``overlap``
            with this circuit, and the share of its contrast that is ``retained`` on the part left out.
        positive_mean: the mean activation of each neuron over the positive prompts, in rank order; None where unknown.
        mirrored: (layer, index) of the neurons that get 2 - m where the others get m, see :meth:`aligned`; None for a
            plain circuit, all of whose neurons get m.
        experts: of a mixture of experts, (number of experts, neurons of each) for each layer; a dense layer is (1, its
            neurons). Neuron i of expert e then has the index ``e * neurons of each + i``, see :meth:`expert_of`. None
            for a model without experts, and where it is not known.
        made_from: of a circuit made from others: the ``operation`` (union, intersection or difference) and the
            ``circuits``, of each ``k``, ``prompts``, the sha256 of the file that :meth:`save` writes of it, and its own
            ``made_from`` where it has one.
    """

    neurons: tuple[Neuron, ...]
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
    chat: dict[str, Any] | None = None
    prompts: dict[str, Any] | None = None
    dtype: str | None = None
    versions: dict[str, str] | None = None
    preset: str | None = None
    bootstrap: dict[str, Any] | None = None
    folds: dict[str, Any] | None = None
    excluded: tuple[tuple[int, int], ...] = ()
    positive_mean: tuple[float, ...] | None = None
    mirrored: tuple[tuple[int, int], ...] | None = None
    experts: tuple[tuple[int, int], ...] | None = None
    made_from: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.experts is not None:
            self._check_experts()
        widths = self.widths
        neurons, seen = [], set()
        for place, neuron in enumerate(self.neurons):
            try:
                layer, index, contrast = neuron
                contrast = float(contrast)
            except (TypeError, ValueError):
                raise InputError(f"neurons[{place}]", f"expected (layer, index, contrast), got {neuron!r}") from None
            layer, index = (whole_number(f"neurons[{place}]", number) for number in (layer, index))
            if not (0 <= layer < self.n_layers and 0 <= index < widths[layer]):
                of = widths[layer] if 0 <= layer < self.n_layers else self.n_neurons
                what = f"({layer}, {index}) is outside {self.n_layers} layers of {of} neurons"
                raise InputError("neurons", what)
            if (layer, index) in seen:
                raise InputError("neurons", f"({layer}, {index}) appears twice")
            seen.add((layer, index))
            neurons.append((layer, index, contrast))
        object.__setattr__(self, "neurons", tuple(neurons))  # of plain numbers, whatever they were given as
        if self.positive_mean is not None:
            means = tuple(float(mean) for mean in self.positive_mean)
            if len(means) != len(neurons) or not all(map(math.isfinite, means)):
                raise InputError("positive_mean", f"expected {len(neurons)} finite numbers, one for each neuron")
            object.__setattr__(self, "positive_mean", means)
        if self.mirrored is not None:
            places = tuple((whole_number("mirrored", layer), whole_number("mirrored", i)) for layer, i in self.mirrored)
            if len(set(places)) != len(places) or not set(places) <= seen:
                raise InputError("mirrored", "expected neurons of the circuit, each once")
            object.__setattr__(self, "mirrored", places)

    def _check_experts(self) -> None:
        """Make ``experts`` pairs of plain numbers. Raises InputError where they are none of such a model."""
        what = f"expected (experts, neurons of each) for {self.n_layers} layers, the widest of {self.n_neurons}"
        try:
            pairs = tuple((whole_number("experts", n), whole_number("experts", own)) for n, own in self.experts or ())
        except (TypeError, ValueError):
            raise InputError("experts", what) from None
        whole = len(pairs) == self.n_layers and min(map(min, pairs)) > 0
        if not whole or max(n * own for n, own in pairs) != self.n_neurons:
            raise InputError("experts", what)
        object.__setattr__(self, "experts", pairs)

    @property
    def widths(self) -> list[int]:
        """The neurons of each layer."""
        if self.experts is None:
            return [self.n_neurons] * self.n_layers
        return [n * own for n, own in self.experts]

    @property
    def n_all(self) -> int:
        """The number of neurons of the whole model."""
        return sum(self.widths)

    def expert_of(self, layer: int, index: int) -> tuple[int, int]:
        """Return (expert, index in it) of a neuron; (0, index) where the layer has no experts, or none are known."""
        own = self.n_neurons if self.experts is None else self.experts[layer][1]
        return index // own, index % own

    @property
    def k(self) -> int:
        """The number of neurons."""
        return len(self.neurons)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The neurons as (layer, index), best first."""
        return [(layer, index) for layer, index, _ in self.neurons]

    def __len__(self) -> int:
        return len(self.neurons)

    def __iter__(self) -> Iterator[Neuron]:
        return iter(self.neurons)

    def __contains__(self, neuron: object) -> bool:
        return neuron in self.neurons or neuron in self.pairs

    @overload
    def __getitem__(self, rank: int) -> Neuron: ...
    @overload
    def __getitem__(self, rank: slice) -> Circuit: ...
    def __getitem__(self, rank: int | slice) -> Neuron | Circuit:
        if not isinstance(rank, slice):
            return self.neurons[rank]
        ranks = range(self.k)[rank]
        if ranks.step < 0:
            raise InputError("circuit", "a slice keeps the rank order: expected a step above 0")
        which = f"ranks {ranks.start + 1} to {ranks.stop}" + (f" in steps of {ranks.step}" if ranks.step > 1 else "")
        return circuit_sets.part(self, ranks, f"top {len(ranks)}" if ranks == range(len(ranks)) else which)

    def __or__(self, other: Circuit) -> Circuit:
        return circuit_sets.union(self, other) if isinstance(other, Circuit) else NotImplemented

    def __and__(self, other: Circuit) -> Circuit:
        return circuit_sets.intersection(self, other) if isinstance(other, Circuit) else NotImplemented

    def __sub__(self, other: Circuit) -> Circuit:
        return circuit_sets.difference(self, other) if isinstance(other, Circuit) else NotImplemented

    def top(self, n: int) -> Circuit:
        """Return the circuit of the n best neurons: ``circuit[:n]``, but InputError where it has fewer."""
        if not 0 <= whole_number("n", n) <= self.k:
            raise InputError("n", f"expected 0 to {self.k}, the neurons of the circuit, got {n}")
        return self[:n]

    def by_layer(self) -> dict[int, list[int]]:
        """Return {layer: sorted indices} for the layers that hold a neuron of the circuit."""
        layers: dict[int, list[int]] = {}
        for layer, index in sorted(self.pairs):
            layers.setdefault(layer, []).append(index)
        return layers

    def per_layer(self) -> list[int]:
        """Return the number of neurons in each layer, length L."""
        counts = Counter(layer for layer, _ in self.pairs)
        return [counts[layer] for layer in range(self.n_layers)]

    def multipliers(self, multiplier: float) -> list[float]:
        """Return what each neuron's activation is multiplied by at the multiplier m, in rank order: m, and 2 - m where
        the neuron is mirrored."""
        mirrored = set(self.mirrored or ())
        return [2 - multiplier if pair in mirrored else multiplier for pair in self.pairs]

    def aligned(self) -> Circuit:
        """Return the circuit whose multiplier moves every neuron along its contrast: above 1 towards what the positive
        prompts have more of than the negative ones, below 1 away from it.

        A neuron whose mean over the positive prompts and whose contrast have opposite signs is mirrored: it gets 2 - m
        where the others get m. m = 1 still changes nothing; m = 0 ablates the others and doubles the mirrored ones. A
        circuit that is aligned already, or the control of one, is returned as it is.

        Raises:
            InputError: the means are not known, because the circuit was imported or found before they were recorded.
        """
        if self.mirrored is not None:
            return self
        if self.positive_mean is None:
            raise InputError("positive_mean", "is missing, which an aligned circuit needs: discover it again")
        of_means = zip(self.neurons, self.positive_mean, strict=True)
        opposite = ((layer, index) for (layer, index, delta), mean in of_means if delta < 0 < mean or mean < 0 < delta)
        return dataclasses.replace(self, mirrored=tuple(opposite))

    def random_like(self, seed: int) -> Circuit:
        """Return as many random neurons from the same layers, none of this circuit: the control for every claim.

        Of a mixture they are from the same experts, too: an expert that is seldom chosen would be no control. The
        universal neurons, which the circuit's discovery left out, are left out here, too. Of a circuit with
        mirrored neurons, as many of each layer's are mirrored.
        """
        taken = {*self.pairs, *map(tuple, (self.universal or {}).get("excluded", []))}
        generator, own = random.Random(seed), set(self.mirrored or ())
        neurons, mirrored = [], []
        by_expert: dict[tuple[int, int], list[int]] = {}
        for layer, index in sorted(self.pairs):
            by_expert.setdefault((layer, self.expert_of(layer, index)[0]), []).append(index)
        for (layer, expert), members in by_expert.items():
            n = self.n_neurons if self.experts is None else self.experts[layer][1]
            others = [index for index in range(expert * n, (expert + 1) * n) if (layer, index) not in taken]
            if len(others) < len(members):
                where = f"layer {layer}" + ("" if self.experts is None else f", expert {expert},")
                raise ValueError(f"random_like: {where} has only {len(others)} neurons outside the circuit")
            drawn = generator.sample(others, len(members))
            neurons += [(layer, index, 0.0) for index in sorted(drawn)]
            n_mirrored = sum((layer, index) in own for index in members)
            mirrored += [(layer, index) for index in sorted(drawn[:n_mirrored])]  # random ones: the draw has no order
        return Circuit(
            tuple(neurons), self.n_layers, self.n_neurons, score=f"random (seed {seed})",
            mirrored=None if self.mirrored is None else tuple(mirrored), experts=self.experts,
        )  # fmt: skip

    def positive(self) -> Circuit:
        """Return the neurons that are more active on the positive prompts. Their bootstrap and folds are left out."""
        return self._half("positive")

    def negative(self) -> Circuit:
        """Return the neurons that are less active on the positive prompts. Their bootstrap and folds are left out."""
        return self._half("negative")

    def _half(self, sign: str) -> Circuit:
        kept = [rank for rank, (*_, x) in enumerate(self.neurons) if (x > 0 if sign == "positive" else x < 0)]
        if not kept:
            raise InputError("sign", f"no neuron of the circuit has a {sign} contrast")
        return circuit_sets.part(self, kept, f"{sign} contrast")

    def to_pandas(self) -> pandas.DataFrame:
        """Return a DataFrame with a row for each neuron in rank order, the best one in row 0.

        Columns: ``layer``, ``index``, ``contrast``, and as far as the circuit knows them ``positive_mean``,
        ``frequency`` (how often the bootstrap selects the neuron, 0 to 1), ``mirrored`` (bool), and of a mixture
        ``expert`` and ``expert_index``, the index in the expert.

        Raises:
            InputError: pandas is not installed.
        """
        return frame_of(self)

    def to_json(self) -> str:
        """Return what :meth:`save` writes."""
        return circuit_file.to_json(self)

    def save(self, path: FilePath) -> None:
        """Write the circuit file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: FilePath, *, n_layers: int | None = None, n_neurons: int | None = None) -> Circuit:
        """Read a circuit file; every field is checked, and an error names the file and the field.

        The JSON of the public CNA code holds no model shape: give ``n_layers`` and ``n_neurons`` of the model in
        hand, or the smallest shape that fits is assumed.
        """
        return cls.from_record(read_json(path), path, n_layers=n_layers, n_neurons=n_neurons)

    @classmethod
    def from_record(
        cls, record: Any, path: FilePath, *, n_layers: int | None = None, n_neurons: int | None = None
    ) -> Circuit:
        """Return the circuit in the JSON of a file; as :meth:`load`, of a file that has been read from ``path``."""
        known = circuit_file.fields_of(record, path, n_layers, n_neurons)
        try:
            return cls(**known)
        except ValueError as error:  # the constructor's message names the field
            raise InputError(path, error) from None

    def __str__(self) -> str:
        lines = [f"{self.k} of {self.n_all} neurons, score {self.score or 'unknown'}"]
        lines.append("per layer: " + " ".join(str(count) for count in self.per_layer()))
        for layer, index, value in self.neurons[:10]:
            expert, own = self.expert_of(layer, index)
            where = "" if self.experts is None else f"expert {expert:3d}  "
            lines.append(f"  layer {layer:3d}  {where}neuron {own:6d}  contrast {value:+.4f}")
        return "\n".join(lines)


_HASH = "_sha256"  # how the names of hashes end


def check_found_in(circuit: Circuit, here: dict[str, Any], where: FilePath = "circuit") -> None:
    """Raise InputError, naming the field, if the circuit was found in another model than the one in hand.

    A circuit that names its model but holds no hash that the model in hand has cannot be checked, and another chat
    template changes less than another model: both are warnings.

    Args:
        here: facts about the model in hand: ``model.name``, ``model.tensors_sha256``, ``tokenizer_sha256`` and others;
            ``chat_template_sha256`` None says that prompts are plain text. A fact that the circuit or ``here`` lacks is
            not compared, nor are name, repository and commit.
    """
    known = circuit.model or {}
    hashes = {f"model.{name}": value for name, value in known.items() if name.endswith(_HASH) and value is not None}
    of_model = [field for field in here if field.startswith("model.") and field.endswith(_HASH)]
    names = f"found in {known.get('name', 'an unnamed model')!r}, this is {here.get('model.name', 'another')!r}"
    for field, got in (hashes | {"tokenizer_sha256": circuit.tokenizer_sha256}).items():
        if field in here and got is not None and got != here[field]:
            what = f"made for another model: {names} ({got[:8]}, not {str(here[field])[:8]})"
            raise InputError(
                f"{where}: {field}", f"{what}; --any-model, in Python any_model=True, takes it all the same"
            )
    if known and not hashes.keys() & of_model:
        why = "the circuit has no hash of it" if not hashes else "its hashes are of an earlier version"
        why = why if of_model else "this model's weights have no hash"
        warn(f"{where}: model: {names}: whether they are the same is not known, {why}")
    if "chat_template_sha256" in here:
        check_template(circuit, here["chat_template_sha256"], where)


def check_template(
    circuit: Circuit, now: str | None, where: FilePath = "circuit", *, any_template: bool = False
) -> None:
    """Warn if the circuit was found with another chat template than prompts go through now; None is plain text.

    A circuit without a template's and a tokenizer's hash, as imported ones, does not say how it was found.

    Args:
        any_template: two templates are not compared, as those of two models; plain text and a template are.
    """
    found = circuit.chat_template_sha256
    if found == now or (found is None and circuit.tokenizer_sha256 is None):
        return
    if found is None:
        what = f"on plain text, here prompts go through the chat template ({str(now)[:8]})"
        what += "; --no-template, in Python chat=False, follows it"
    elif now is None:
        what = f"with a chat template ({found[:8]}), here prompts are plain text"
        what += ": by --no-template, in Python chat=False, or because the model has no template"
    elif any_template:
        return
    else:
        what = f"with another chat template ({found[:8]}) than prompts go through here ({now[:8]})"
    warn(f"{where}: chat_template_sha256: found {what}")


def check_fits(circuit: Circuit, n_layers: int, n_neurons: int, where: FilePath = "circuit") -> None:
    """Raise InputError naming the field unless the circuit has the shape of the model in hand."""
    for field, expected in (("n_layers", n_layers), ("n_neurons", n_neurons)):
        got = getattr(circuit, field)
        if got != expected:
            raise InputError(f"{where}: {field}", f"made for another model: expected {expected}, got {got}")
