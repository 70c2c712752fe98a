"""What stands in the place of an MLP's activation, with sums and steering.

The activation's output is the input of ``down_proj``, whatever LoRA or quantisation does behind it. On a GPU,
``ops.swiglu`` stands in the place of ``SiluAndMul``: one kernel, as before. Elsewhere vLLM's own activation runs, then
``ops.steer_act_`` in place. A compiled or captured graph holds an operation of ours in each layer, ``vllm_swiglu`` or
``vllm_steer``, and none of its state: this is looked up when the operation runs, as vLLM does for attention. A layer's
number goes in as a tensor on the host: as a constant it would make the graphs of equal layers different ones, and each
would be compiled.
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

_ACTIVATIONS = "vllm.model_executor.layers.activation"
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

    def run(self, op: str, inputs: tuple[Tensor, ...], layer: int) -> Tensor:
        """Call ``op`` on a layer's ``[T, N]`` tensors, with what the step at hand sums and steers in this layer."""
        steers, counts = self.steers or not self.skips, self.sums is not None and (self.counts or not self.skips)
        if op == "steer_act_" and not steers and not counts:
            return inputs[0]
        key = op, steers, counts, layer, inputs[0].shape, inputs[0].stride(), inputs[0].dtype
        found = self._ready.get(key)
        if found is None or ops.is_observed():
            found = self._prepare(op, inputs, layer, steers, counts, None if found else key)
        run, extras = found
        return run(*inputs, *extras)

    def _prepare(
        self, op: str, inputs: tuple[Tensor, ...], layer: int, steers: bool, counts: bool, key: Any
    ) -> tuple[Run, Extras]:
        """What serves the layer in steps of as many tokens: looked up by ``ops`` once, not in every step."""
        n_tokens, extras = inputs[0].shape[0], Extras()
        if counts and self.token_weight is not None:
            extras = extras._replace(token_weight=self.token_weight[:n_tokens], **self._sums[layer])
        if steers:
            extras = Extras(*extras[:3], *self._scales[layer], self.row_circuit[:n_tokens])
        if ops.is_observed() or key is None:
            return lambda *given: ops.call(op, given[: len(inputs)], Extras(*given[len(inputs) :])), extras
        check(op, inputs, extras)
        if len(self._ready) >= _MOST:
            self._ready.clear()
        found = self._ready[key] = backends.prepare(op, inputs, extras), extras
        return found


class _Current:
    """The state of the worker that runs; another engine of the same process sets its own before each of its steps."""

    state: StepState | None = None


def use(state: StepState) -> None:
    """Let the layers of this process read this state."""
    _Current.state = state


def _steer(act: Tensor, layer: int) -> None:
    if _Current.state is not None:
        _Current.state.run("steer_act_", (act,), layer)


def _swiglu(gate_up: Tensor, layer: int) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return ops.swiglu(gate, up) if _Current.state is None else _Current.state.run("swiglu", (gate, up), layer)


_LIBRARY = torch.library.Library("cna_kernels", "FRAGMENT")
_LIBRARY.define("vllm_steer(Tensor(a!) act, Tensor layer) -> ()")
_LIBRARY.impl("vllm_steer", lambda act, layer: _steer(act, int(layer)), "CompositeExplicitAutograd")
torch.library.register_fake("cna_kernels::vllm_steer", lambda act, layer: None, lib=_LIBRARY)
_LIBRARY.define("vllm_swiglu(Tensor gate_up, Tensor layer) -> Tensor")
_LIBRARY.impl("vllm_swiglu", lambda gate_up, layer: _swiglu(gate_up, int(layer)), "CompositeExplicitAutograd")
torch.library.register_fake(
    "cna_kernels::vllm_swiglu", lambda x, layer: x.new_empty(x.shape[0], x.shape[1] // 2), lib=_LIBRARY
)


def is_fused(act: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    """Whether ``ops.swiglu`` takes the activation's place: on a GPU with our kernels, for ``SiluAndMul``."""
    kind = type(act)
    its_own = (kind.__module__, kind.__name__) == (_ACTIVATIONS, "SiluAndMul")
    return its_own and device.type == "cuda" and backends.name_for(device) == "triton"


class SteeredAct(nn.Module):
    """An activation ``[T, 2N] -> [T, N]``, summed and steered. Its class also keeps vLLM from fusing the activation
    with what follows it."""

    def __init__(self, act: Callable[[Tensor], Tensor], layer: int, device: torch.device) -> None:
        super().__init__()
        self.act, self.layer, self.fused = act, layer, is_fused(act, device)
        with torch.inference_mode(False):
            self.register_buffer("number", torch.tensor(layer, dtype=torch.int64, device="cpu"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            traced = torch.compiler.is_compiling()
            return torch.ops.cna_kernels.vllm_swiglu(x, self.number) if traced else _swiglu(x, self.layer)
        act = self.act(x)
        if torch.compiler.is_compiling():
            torch.ops.cna_kernels.vllm_steer(act, self.number)
        else:
            _steer(act, self.layer)
        return act
