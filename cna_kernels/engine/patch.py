"""Replacing a module's ``forward``, and putting it back.

The function in its place is called "forward", so that pickle takes the ``forward`` of the module's class for it.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn

STEERED, BEFORE = "_cna_mlp", "_cna_before"  # attributes of a module whose forward was replaced


def slot(module: nn.Module) -> str:
    """The attribute with a module's forward; accelerate keeps it behind a hook, which moves or loads weights first."""
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def replace_forward(module: nn.Module, function: Any) -> None:
    current = module.__dict__.get(slot(module))
    if getattr(current, "__func__", None) is not function:  # a copy of an attached module has the function already
        setattr(module, BEFORE, current)
        setattr(module, slot(module), types.MethodType(function, module))


def is_replaced(module: nn.Module, function: Any) -> bool:
    return getattr(module.__dict__.get(slot(module)), "__func__", None) is function


def restore_forward(module: nn.Module) -> None:
    before, place = module.__dict__.pop(BEFORE), slot(module)
    if before is None and place == "_old_forward":  # accelerate's hook came after attach, and calls it
        before = types.MethodType(type(module).forward, module)
    if before is None:
        delattr(module, place)
    else:
        setattr(module, place, before)


def call_plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that the module had before it was replaced."""
    before = getattr(module, BEFORE, None)
    return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)


def mlp_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    steered = getattr(self, STEERED, None)
    return call_plain(self, *args, **kwargs) if steered is None else steered.run(*args, **kwargs)


def apply_gate(self: Any, gate_up: Tensor) -> Any:
    steered = getattr(self, STEERED, None)
    return type(self)._apply_gate(self, gate_up) if steered is None else steered.act(gate_up)


mlp_forward.__name__, apply_gate.__name__ = "forward", "_apply_gate"
