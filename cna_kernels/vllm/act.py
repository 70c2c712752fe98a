"""What stands in the place of an MLP's activation: vLLM's own, then sums and steering in place.

The activation's output is the input of ``down_proj``, whatever LoRA or quantisation does behind it. A compiled or
captured graph holds one operation more a layer, ``cna_kernels::vllm_steer``, and none of its state: this is
looked up when the operation runs, as vLLM does for attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, ops
from ..extras import Extras, Run
from ..op_checks import check
from ..steering import SteeringTable
from ..sums import ActivationSums

_MOST = 1 << 14  # kinds of steps that are remembered, layer by layer


class StepState:
    """What the layers of one worker read in a step.

    Attributes:
        table: the settings of running requests, by number.
        row_circuit: ``[rows]`` int32, the setting of each token of the step; -1 for none.
        token_weight: ``[rows, C]`` fp32, and ``sums``: what is counted; None where nothing ever is.
        steers, counts: whether the step at hand has any such token. On a GPU the kernels run in any case, because
            a captured graph cannot leave them out.
    """

    def __init__(self, table: SteeringTable, n_rows: int, sums: ActivationSums | None, device: torch.device) -> None:
        self.table, self.sums, self.device = table, sums, device
        with torch.inference_mode(False):
            self.row_circuit = torch.full((n_rows,), -1, dtype=torch.int32, device=device)
            self.token_weight = (
                None if sums is None else torch.zeros((n_rows, sums.count.shape[0]), dtype=torch.float32, device=device)
            )
        self.steers = self.counts = False
        self.skips = device.type == "cpu"
        self._ready: dict[Any, tuple[Run, Extras]] = {}
        self._scales = [table.layer(layer) for layer in range(table.n_layers)]
        self._sums = [{} if sums is None else sums.layer(layer) for layer in range(table.n_layers)]

    def run(self, act: Tensor, layer: int) -> None:
        """Sum and scale the activations ``[T, N]`` of a layer in place."""
        steers, counts = self.steers or not self.skips, self.sums is not None and (self.counts or not self.skips)
        if not steers and not counts:
            return
        key = steers, counts, layer, act.shape, act.stride(), act.dtype
        found = self._ready.get(key)
        if found is None or ops.is_observed():
            found = self._prepare(act, layer, steers, counts, None if found else key)
        run, extras = found
        run(act, *extras)

    def _prepare(self, act: Tensor, layer: int, steers: bool, counts: bool, key: Any) -> tuple[Run, Extras]:
        """What serves the layer in steps of as many tokens: looked up by ``ops`` once, not in every step."""
        n_tokens, extras = act.shape[0], Extras()
        if counts and self.token_weight is not None:
            extras = extras._replace(token_weight=self.token_weight[:n_tokens], **self._sums[layer])
        if steers:
            extras = Extras(*extras[:3], *self._scales[layer], self.row_circuit[:n_tokens])
        if ops.is_observed() or key is None:
            return lambda act, *extras: ops.call("steer_act_", (act,), Extras(*extras)), extras
        check("steer_act_", (act,), extras)
        if len(self._ready) >= _MOST:
            self._ready.clear()
        found = self._ready[key] = backends.prepare("steer_act_", (act,), extras), extras
        return found


class _Current:
    """The state of the worker that runs; another engine of the same process sets its own before each of its steps."""

    state: StepState | None = None


def use(state: StepState) -> None:
    """Let the layers of this process read this state."""
    _Current.state = state


def _steer(act: Tensor, layer: int) -> None:
    state = _Current.state
    if state is not None:
        state.run(act, layer)


_LIBRARY = torch.library.Library("cna_kernels", "FRAGMENT")
_LIBRARY.define("vllm_steer(Tensor(a!) act, int layer) -> ()")
_LIBRARY.impl("vllm_steer", _steer, "CompositeExplicitAutograd")
torch.library.register_fake("cna_kernels::vllm_steer", lambda act, layer: None, lib=_LIBRARY)


class SteeredAct(nn.Module):
    """An activation ``[T, 2N] -> [T, N]``, summed and steered. Its class also keeps vLLM from fusing the activation
    with what follows it."""

    def __init__(self, act: Callable[[Tensor], Tensor], layer: int) -> None:
        super().__init__()
        self.act, self.layer = act, layer

    def forward(self, x: Tensor) -> Tensor:
        act = self.act(x)
        if torch.compiler.is_compiling():
            torch.ops.cna_kernels.vllm_steer(act, self.layer)
        else:
            _steer(act, self.layer)
        return act
