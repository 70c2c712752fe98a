"""The MLPs of a model that vLLM has loaded, each with what must be known of it to steer it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn

from .hooks import Changed

_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:mlp|feed_forward)$")


class MLP(NamedTuple):
    """An MLP of this worker: neurons ``low`` up to ``low + n`` of the layer."""

    module: nn.Module
    low: int
    n: int


def find(model: nn.Module, layers: range, n_neurons: int) -> dict[int, MLP]:
    """The MLP of each of this worker's layers.

    Args:
        layers: those that this rank of a pipeline holds.
        n_neurons: the width of a layer, all ranks of tensor parallelism together.

    Raises:
        Changed: a layer has no MLP whose activation feeds ``down_proj`` and nothing else.
    """
    found: dict[int, MLP] = {}
    for name, module in model.named_modules():
        match = _NAME.search(name)
        if match is None or not hasattr(module, "act_fn"):
            continue
        layer = int(match[1])
        down = getattr(module, "down_proj", None)
        down = getattr(down, "base_layer", down)  # under LoRA
        if getattr(down, "input_size", None) != n_neurons or not _feeds_down_proj(module):
            continue
        if layer in found:
            raise Changed(f"cna: {name}: layer {layer} has two MLPs")
        n = int(down.input_size_per_partition)  # type: ignore[union-attr]  # vLLM's RowParallelLinear
        rank = int(down.tp_rank) if n < n_neurons else 0  # type: ignore[union-attr]
        found[layer] = MLP(module, rank * n, n)
    if missing := [layer for layer in layers if layer not in found]:
        some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise Changed(f"cna: layers {some} have no gated MLP of {n_neurons} neurons with act_fn and down_proj")
    return found


class _Stub:
    """In an MLP's place: what its ``forward`` calls is recorded. Any other attribute is missing."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, object]] = []
        self.act_of, self.gate_up = object(), object()

    def gate_up_proj(self, x: object) -> tuple[object, None]:
        return self.gate_up, None

    def act_fn(self, x: object) -> object:
        self.seen.append(("act_fn", x))
        return self.act_of

    def down_proj(self, x: object, *_: object) -> tuple[object, None]:
        self.seen.append(("down_proj", x))
        return object(), None


def _feeds_down_proj(module: nn.Module) -> bool:
    """Whether the code of an MLP's ``forward`` hands the activation's result to ``down_proj`` as it is."""
    forward: Any = type(module).forward
    if "forward" in module.__dict__:
        return False
    stub = _Stub()
    try:
        forward(stub, object())
    except Exception:  # whatever else it needs, it is no forward of the kind we know
        return False
    return stub.seen == [("act_fn", stub.gate_up), ("down_proj", stub.act_of)]
