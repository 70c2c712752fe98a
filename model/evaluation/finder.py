"""The methods of a suite, with all that they need found on discovery prompts and chosen there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError

from ..discovery.packing import TokenPrompt
from ..language_model import LanguageModel
from . import alternatives, baselines, choosing, directions
from .interventions import Method
from .store import Store
from .suite import Suite

Say = Callable[[str], None]


class Finder:
    """Finds what the suite's methods steer by.

    Attributes:
        discovery: what the discovery prompts gave, or None where the suite has none.
        chosen: name of a method -> the record of what was tried and chosen for it.
    """

    def __init__(
        self,
        model: LanguageModel,
        circuit: Circuit,
        suite: Suite,
        store: Store,
        prompts: Mapping[str, list[TokenPrompt]],
        texts: Sequence[TokenPrompt],
        ignoring: float | None,
        *,
        note: Say,
        say: Say,
    ) -> None:
        """
        Args:
            prompts: the suite's prompt sets, as tokens; "positive" and "negative" are the discovery prompts.
            texts: neutral texts; ``ignoring``: see ``likelihood.ignoring``.
            note: called with a line for the results' notes.
        """
        self.model, self.circuit, self.suite, self.store = model, circuit, suite, store
        self.note, self.say = note, say
        self.chosen: dict[str, dict] = {}
        self._texts, self._ignoring = texts, ignoring
        self.discovery: baselines.Discovery | None = None
        if "positive" in prompts and "negative" in prompts:
            say("discovery prompts")
            sides = baselines.Sides.split(prompts["positive"], prompts["negative"])
            self.discovery = baselines.Discovery.of(model, sides, self._universal())

    def of_prompts(self) -> baselines.Discovery:
        """``discovery``, where the suite is known to have the prompts."""
        assert self.discovery is not None, "Suite asks for positive and negative prompts where this is needed"
        return self.discovery

    def rankings(self, scores: Sequence[str]) -> dict[str, Tensor]:
        """The value of every neuron by each score, ``[L, N]``; a score that the prompts do not allow is noted."""
        ranked: dict[str, Tensor] = {}
        for name in scores:
            with self._or_note(name):
                ranked |= baselines.rankings(self.model, self.of_prompts(), (name,))
        return ranked

    def methods(self, name: str) -> list[Method]:
        """The methods that a name of the suite stands for, with all that they need found and chosen."""
        model, suite, circuit = self.model, self.suite, self.circuit
        if name == "circuit":
            mirrored = "" if circuit.mirrored is None else f", {len(circuit.mirrored)} of them at 2 - m"
            return [Method(name, f"{circuit.k} neurons by {circuit.score or 'an unknown score'}{mirrored}", circuit)]
        if name == "random":
            about = "as many random neurons of the same layers"
            try:
                draws = [circuit.random_like(draw) for draw in range(suite.random_draws)]
            except ValueError as error:
                raise InputError("methods", error) from None
            return [Method(f"random {number}", about, draw) for number, draw in enumerate(draws, 1)]
        self.say(f"preparing {name}")
        found = self.of_prompts()
        if name == "activation":
            score = baselines.rankings(model, found, (name,))[name]
            top = baselines.top_circuit(name, score, found, circuit.k)
            return [Method("top activation", "as many neurons, those that fire most", top)]
        if name == "caa-released":
            about = "mean difference of every layer's MLP output, added with sign +1 as published"
            return [Method(name, about, directions.caa_as_released(found.difference), 1)]
        if name == "sae" and suite.sae is not None:
            path, feature, layer = suite.sae
            if not 0 <= layer < model.config.num_hidden_layers:
                raise InputError("sae layer", f"expected 0 to {model.config.num_hidden_layers - 1}, got {layer}")
            row = directions.read_decoder_row(path, feature, model.config.hidden_size)
            about = f"feature {feature} of {Path(path).name} after layer {layer}, as far as prompts differ along it"
            return [Method(name, about, directions.feature(found.difference, layer, row))]
        if name == "neuron":
            with self._or_note("the single neuron"):
                method, self.chosen[name] = choosing.best_neuron(self._chooser(), found)
                return [method]
            return []
        with self._or_note(name):
            method, self.chosen[name] = choosing.best_direction(self._chooser(), name, found)
            return [method]
        return []

    def _chooser(self) -> choosing.Chooser:
        most = math.inf if self._ignoring is None else self._ignoring
        texts = alternatives.evenly(self._texts, choosing.MOST_TEXTS)
        sides, suite = self.of_prompts().sides, self.suite
        of = choosing.Chooser(
            self.model, sides, next(iter(suite.refusals.values())), suite.batch, self.store, texts, most
        )
        if suite.behaviour is None:
            return of
        known = {place: text for text, place in (*suite.behaviour.positive, *suite.behaviour.negative)}
        return replace(of, measure=suite.behaviour.measure, texts_of=known)

    def _universal(self) -> Tensor:
        """``[L, N]`` bool: the neurons that the circuit's discovery left out; baselines leave them out, too."""
        config = self.model.config
        widths = torch.tensor(config.widths, dtype=torch.int64)
        excluded = torch.arange(config.intermediate_size, dtype=torch.int64) >= widths[:, None]
        for layer, index in (self.circuit.universal or {}).get("excluded", []):
            excluded[layer, index] = True
        excluded[list(self.circuit.skipped_layers)] = True
        return excluded

    @contextmanager
    def _or_note(self, name: str) -> Iterator[None]:
        """Where the prompts do not allow the baseline ``name``, leave it out and say why in the results' notes."""
        try:
            yield
        except InputError as error:
            self.note(f"{name} is left out: {error}")
