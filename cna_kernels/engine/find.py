"""Finding the decoder of a model and the MLP of a layer, by the code of their ``forward``."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import InputError
from .experts import Experts
from .mlps import Apart, Joined, SteeredMLP

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


def find_mlp(layer: nn.Module, where: str) -> tuple[str, type[SteeredMLP]]:
    """The name of the MLP in a layer and the kind of SteeredMLP that serves it, known by the code of its forward.

    Raises:
        InputError: the layer has no known MLP or several, or another module of the layer looks like an MLP.
    """
    named = dict(layer.named_modules())
    found = {name: kind for name, module in named.items() if (kind := _kind_for(module)) is not None}
    what = f"{where}, a {type(layer).__name__}, has"
    if len(found) != 1:
        known = "several MLPs" if found else "no MLP that is known (gate_proj or gate_up_proj with down_proj)"
        raise InputError("model", f"{what} {known}; supported: {SUPPORTED}")
    ((name, kind),) = found.items()
    for other, module in named.items():
        related = other.startswith(f"{name}.") or f"{name}.".startswith(f"{other}.") or not other
        if not related and _looks_like_an_mlp(module):
            raise InputError("model", f"{what} {other} beside {name}; supported: {SUPPORTED}")
    kind.check(named[name], where)
    return name, kind


def _kind_for(module: nn.Module) -> type[SteeredMLP] | None:
    """The kind of SteeredMLP whose module of transformers, one of three, has the code of this module's forward."""
    if not hasattr(module, "down_proj"):
        return None
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    code = _code(type(module))
    kinds: tuple[tuple[type[nn.Module], type[SteeredMLP]], ...]
    kinds = (LlamaMLP, Apart), (Phi3MLP, Joined), (MixtralExperts, Experts)
    for known, kind in kinds:
        if code == _code(known):
            return kind
    return None


def _code(kind: type[nn.Module]) -> tuple[Any, ...] | None:
    function = getattr(kind.forward, "__wrapped__", kind.forward)
    code = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_consts)


def _looks_like_an_mlp(module: nn.Module) -> bool:
    words = type(module).__name__.lower()
    stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    return stacked or any(word in words for word in ("mlp", "expert", "feedforward", "ffn"))
