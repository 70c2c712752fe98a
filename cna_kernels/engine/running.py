"""What the engine does before and after every pass of the decoder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..steering import SteeringTable
from .collecting import Collecting
from .decoder import layers_of
from .forwards import others_watch
from .mlps import SteeredMLP
from .passes import ForwardPass, State
from .patch import parameters_of, plain_function
from .prompt import Prompt


class Running:
    """The passes of an attached decoder.

    Attributes:
        now: the pass at hand. collecting: the collection that waits for a pass or is in one, or None.
        places: the place of each argument of the decoder's forward.
    """

    def __init__(
        self,
        decoder: nn.Module,
        names: Sequence[str],
        mlps: Sequence[SteeredMLP],
        now: ForwardPass,
        table: SteeringTable,
        prompt: Prompt,
    ) -> None:
        self.now, self.rows, self.table, self.prompt = now, now.rows, table, prompt
        self.collecting: Collecting | None = None
        self._said: list[int] = []  # the layers of which was said that they did not run
        self.places = {name: place for place, name in enumerate(parameters_of(plain_function(decoder)))}
        self._decoder, self._mlps, self._layers = decoder, mlps, layers_of(decoder)
        self._links = [link for layer, name in zip(self._layers, names, strict=True) for link in _links(layer, name)]

    def begin(self, shape: tuple[int, int], device: torch.device, call: dict[str, Any]) -> tuple[State, int]:
        """Set what the MLPs need for a call of ``shape`` [B, S] tokens; what comes back is for ``end``.

        ``call``: the decoder's arguments by name.
        """
        self._check_in_place()
        now, compiling = self.now, torch.compiler.is_compiling()
        again = None if compiling else now.again() or now.again_as_a_whole()
        if again is not None and again.tokens is not None and len(again.tokens) == shape[0] * shape[1]:
            return now.begin(again)
        if not compiling and not self.rows.were_given and self.table.n_circuits:
            self._say_that_nothing_is_steered()
        past, prompt = call.get("past_key_values"), self.prompt
        prompt.begin_call(shape[1], past)
        tokens = self.rows.of_tokens(shape, device, call, prompt)
        collecting, token_weight = self.collecting, None
        if collecting is not None and not collecting.done and now.state.tokens is None:
            if collecting.by_prompt and call.get("cu_seq_lens_q") is not None:
                raise InputError("token_weight", "a row of several prompts has several last tokens; give [B, S, C]")
            if not (collecting.by_prompt and prompt.goes_on(shape[1], past)):
                token_weight = collecting.of_call(shape, device, call.get("attention_mask"), past, prompt)
            for mlp in self._mlps:
                mlp.runs = 0
        if self.rows.steers:
            for mlp in self._mlps:
                mlp.ran = False
        return now.begin(State(tokens, token_weight, others_watch()))

    def end(self, begun: tuple[State, int], result: Any) -> None:
        """Leave the pass. ``result`` is what the decoder returned, None if it raised."""
        if self.now.state.token_weight is not None and self.collecting is not None:
            self.collecting.end_call(result is not None)
        self.now.end(begun, result)
        if result is not None and self.rows.steers:
            self._check_steered()

    def check_all_ran(self) -> None:
        """Raise InputError unless every layer has run once in the pass that was summed."""
        runs: dict[int, list[int]] = {}
        for mlp in self._mlps:
            runs.setdefault(mlp.runs, []).append(mlp.layer)
        for times, layers in runs.items():
            if times != 1:
                how = "did not run" if times == 0 else f"ran {times} times"
                raise InputError("collect", f"{ranges(layers)} {how} in the pass, so that nothing was counted")

    def _check_in_place(self) -> None:
        """Raise InputError if the decoder no longer runs the layers or the MLPs that the engine was attached to."""
        again = "detach, and attach again"
        layers = self._decoder.layers
        if not isinstance(layers, nn.ModuleList) or len(layers) != len(self._layers):
            raise InputError("model", f"its layers were replaced after attach: {len(self._layers)} were there; {again}")
        for layer, before in zip(layers, self._layers, strict=True):
            if layer is not before:
                raise InputError("model", f"layers[{self._layers.index(before)}] was replaced after attach; {again}")
        for parent, name, child in self._links:
            if parent._modules.get(name) is not child:
                raise InputError("model", f"{name} of a layer was replaced after attach; {again}")
        compiling = torch.compiler.is_compiling()
        for mlp in self._mlps:
            if compiling or not mlp.is_in_place():
                mlp.check_in_place()

    def _check_steered(self) -> None:
        """Raise InputError if no MLP has run in a steered pass; say once which have not, if others have."""
        n_layers = getattr(getattr(self._decoder, "config", None), "num_hidden_layers", len(self._mlps))
        left = [mlp.layer for mlp in self._mlps if not mlp.ran and mlp.layer < n_layers]
        if not left:
            return
        if len(left) == min(n_layers, len(self._mlps)):
            what = "none of its MLPs ran in a pass whose rows are steered: its layers compute them without calling them"
            raise InputError("model", what)
        if not torch.compiler.is_compiling() and left != self._said:
            self._said = left
            what = f"the MLPs of {ranges(left)} did not run in a pass whose rows are steered"
            warnings.warn(f"cna_kernels: {what}; their neurons were not steered", stacklevel=4)

    def _say_that_nothing_is_steered(self) -> None:
        self.rows.were_given = True  # say it once
        what = "circuits are set, but no row uses one; call Engine.rows, or steer inside `with Engine.steer(...)`"
        warnings.warn(f"cna_kernels: {what}", stacklevel=4)


def _links(layer: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) from a layer down to its MLP."""
    for part in name.split("."):
        child = layer.get_submodule(part)
        yield layer, part, child
        layer = child


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "layers 0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer{'s' * (len(numbers) > 1)} {text}"
