"""Replacing a module's ``forward``, and putting it back.

The function in its place is called "forward", so that pickle takes the ``forward`` of the module's class for it, and
has the signature of that forward, by which transformers decides what to pass.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from typing import Any

from torch import Tensor, nn

STEERED, BEFORE = "_cna_mlp", "_cna_before"  # attributes of a module whose forward was replaced


def slot(module: nn.Module) -> str:
    """The attribute with a module's forward; accelerate keeps it behind a hook, which moves or loads weights first."""
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def replace_forward(module: nn.Module, function: Any) -> None:
    if not is_replaced(module, function):  # a copy of an attached module has the function already
        current = module.__dict__.get(slot(module))
        setattr(module, BEFORE, current)
        dressed = _dressed(function, type(module).forward) if current is None else _dressed_anew(function, current)
        setattr(module, slot(module), types.MethodType(dressed, module))


def is_replaced(module: nn.Module, function: Any) -> bool:
    current = module.__dict__.get(slot(module))
    if not isinstance(current, types.MethodType):
        return False
    # No default for __func__: the compiler of PyTorch 2.11 takes it though the attribute is there.
    return getattr(current.__func__, "__code__", None) is function.__code__


def restore_forward(module: nn.Module) -> None:
    before, place = module.__dict__.pop(BEFORE), slot(module)
    if before is None and place == "_old_forward":  # accelerate's hook came after attach, and calls it
        before = types.MethodType(type(module).forward, module)
    if before is None:
        delattr(module, place)
    else:
        setattr(module, place, before)


def plain_function(module: nn.Module) -> Any:
    """The function that a module's forward is, or was before it was replaced.

    The bound method itself where that belongs to another module.
    """
    current = module.__dict__.get(slot(module))
    if BEFORE in module.__dict__:
        current = module.__dict__[BEFORE]
    if current is None:
        return type(module).forward
    return current.__func__ if getattr(current, "__self__", None) is module else current


def call_plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that the module had before it was replaced."""
    before = getattr(module, BEFORE, None)
    return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)


def parameters_of(function: Any) -> tuple[str, ...]:
    """The names of a forward's parameters, in order, without ``self``."""
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        return ()
    return names if inspect.ismethod(function) else names[1:]


def _dressed_anew(function: Any, original: Any) -> Any:
    """A copy of a function with the signature and the docstring of another one."""
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    original = getattr(original, "__func__", original)
    copy.__doc__, copy.__module__ = getattr(original, "__doc__", None), function.__module__
    with contextlib.suppress(TypeError, ValueError):  # written in C
        copy.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return copy


_dressed = functools.cache(_dressed_anew)  # for the functions of classes: the layers of a model share one


def mlp_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    steered = getattr(self, STEERED, None)
    if steered is None:
        return call_plain(self, *args, **kwargs)
    if steered.now.state.tokens is None and steered.is_off():
        return steered.plain(*args, **kwargs)
    if kwargs:
        args, kwargs = steered.in_order(args, kwargs)
    return steered.run(*args, **kwargs)


def down_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    steered = getattr(self, STEERED, None)
    if steered is not None:
        args, kwargs = steered.steer_argument(args, kwargs)
    return call_plain(self, *args, **kwargs)


def apply_gate(self: Any, gate_up: Tensor) -> Any:
    steered = getattr(self, STEERED, None)
    return type(self)._apply_gate(self, gate_up) if steered is None else steered.act(gate_up)


mlp_forward.__name__ = down_forward.__name__ = "forward"
apply_gate.__name__ = "_apply_gate"
