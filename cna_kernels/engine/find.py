"""Finding the decoder of a model and the MLP of a layer, by the code of its ``forward`` and by its parts."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import InputError
from .decoder import layers_of
from .dense import Apart, Joined
from .experts import Experts
from .mlps import SteeredMLP
from .patch import plain_function

SUPPORTED = "Llama, Qwen2, Qwen3, Mistral, Gemma 1 to 3, Phi-3, Qwen3-MoE, Mixtral, and models whose MLPs are the same"


def find_decoder(model: nn.Module) -> nn.Module:
    """The decoder of a model: the module whose ``layers`` are the model's layers."""
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    decoder: nn.Module = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise InputError("model", f"{type(inner).__name__} has no decoder with `layers`; supported: {SUPPORTED}")
    return decoder


def find_mlps(decoder: nn.Module) -> list[tuple[str, type[SteeredMLP], nn.Module]]:
    """The MLP of each layer: its name in the layer, the kind of SteeredMLP that serves it, and the module."""
    found = []
    for number, layer in enumerate(layers_of(decoder)):
        name, kind = find_mlp(layer, f"layers[{number}]")
        found.append((name, kind, layer.get_submodule(name)))
    return found


def layer_experts(decoder: nn.Module) -> list[tuple[int, int]]:
    """(number of experts, neurons of each) for each layer; (1, neurons) for a dense one."""
    counts = [(kind.n_experts(mlp), kind.width(mlp)) for _, kind, mlp in find_mlps(decoder)]
    return [(n, width // n) for n, width in counts]


def find_mlp(layer: nn.Module, where: str) -> tuple[str, type[SteeredMLP]]:
    """The name of the MLP in a layer and the kind of SteeredMLP that serves it.

    Raises:
        InputError: the layer has no known MLP or several, or another module of the layer looks like an MLP.
    """
    named = dict(layer.named_modules())
    found = {name: kind for name, module in named.items() if (kind := _kind_for(module)) is not None}
    what = f"{where}, a {type(layer).__name__}, has"
    if len(found) != 1:
        known = "no MLP that is known (gate_proj or gate_up_proj with down_proj)"
        known = f"several MLPs ({', '.join(found)})" if found else known
        raise InputError("model", f"{what} {known}; supported: {SUPPORTED}")
    ((name, kind),) = found.items()
    for other, module in named.items():
        related = other.startswith(f"{name}.") or f"{name}.".startswith(f"{other}.") or not other
        if not related and _looks_like_an_mlp(module):
            raise InputError("model", f"{what} {other} beside {name}; supported: {SUPPORTED}")
    kind.check(named[name], where)
    return name, kind


def _kind_for(module: nn.Module) -> type[SteeredMLP] | None:
    """The kind of SteeredMLP that serves a module: known by its forward, or by being gate, up and down and no more."""
    parts = module._modules
    if "down_proj" in parts:
        layers = {name for name, part in parts.items() if part is not None and not _is_small(part)}
        for kind in (Apart, Joined):
            if kind.knows(plain_function(module)) or layers == {*kind.LAYERS}:
                return kind if {*kind.LAYERS} <= {*parts} else None
    elif "down_proj" in module._parameters and Experts.knows(plain_function(module)):
        return Experts
    return None


def _is_small(part: nn.Module) -> bool:
    """Whether a part of an MLP is an activation or a dropout: nothing that has weights."""
    return not hasattr(part, "in_features") and not any(True for _ in (*part.parameters(), *part.buffers()))


def _looks_like_an_mlp(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):
        return False
    words = type(module).__name__.lower()
    stacked = any(
        parameter.dim() == 3 and ("proj" in name or name in ("weight", "w1", "w2", "w3"))
        for name, parameter in module.named_parameters(recurse=False)
    )
    return stacked or any(word in words for word in ("mlp", "expert", "feedforward", "ffn"))
