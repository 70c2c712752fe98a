"""Whose code runs: the forwards that the engine's ops stand for, and whether anybody changed what these call.

A forward is known by its bytecode, compared with that of the functions below, which nobody else can replace. The name
of a class says nothing: people replace the ``forward`` of a class, before or after the engine is attached.
"""

from __future__ import annotations

import functools
import sys
from importlib.util import find_spec
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import has_function_modes

# The forwards themselves. The body of each is the formula; two writings of one formula are two functions.


def apart(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def apart_in_steps(self: Any, x: Tensor) -> Tensor:
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y  # type: ignore[no-any-return]


def joined(self: Any, x: Tensor) -> Tensor:
    both = self.gate_up_proj(x)
    gate, both = both.chunk(2, dim=-1)
    both = both * self.activation_fn(gate)
    return self.down_proj(both)  # type: ignore[no-any-return]


def _silu(self: Any, input: Tensor) -> Tensor:
    return F.silu(input, inplace=self.inplace)


def _silu_of_transformers(self: Any, input: Tensor) -> Tensor:
    return nn.functional.silu(input)


def _linear(self: Any, input: Tensor) -> Tensor:
    return F.linear(input, self.weight, self.bias)


def is_one_of(function: Any, *known: Any) -> bool:
    """Whether a function has the code of one of the known functions, whatever its local variables are called."""
    return isinstance(function, FunctionType) and any(
        _parts(function.__code__, function.__doc__) == _parts(one.__code__, one.__doc__)
        and _same_globals(function, one)
        for one in known
    )


def _parts(code: CodeType, doc: str | None = None) -> tuple[Any, ...]:
    constants = tuple(x for x in code.co_consts if x is not None and x != doc)
    shape = code.co_argcount, code.co_kwonlyargcount, code.co_flags & 0x0F, code.co_freevars
    return code.co_code, code.co_names, constants, shape


def _same_globals(function: Any, known: Any) -> bool:
    names = [name for name in known.__code__.co_names if name in known.__globals__]
    return all(function.__globals__.get(name) is known.__globals__[name] for name in names)


@functools.cache
def in_file(module: str, *names: str) -> CodeType | None:
    """The code of a function as its module has it on file, whatever was done to the module since it was loaded.

    ``names`` lead to the function: classes and functions, from the outside in. None where there is no such function.
    """
    spec = find_spec(module)
    loader: Any = None if spec is None else spec.loader
    code = loader.get_code(module) if hasattr(loader, "get_code") else None
    for name in names:
        inner = () if code is None else code.co_consts
        code = next((x for x in inner if isinstance(x, CodeType) and x.co_name == name), None)
    return code


def is_in_file(function: Any, module: str, *names: str) -> bool:
    """Whether a function has the code that its module has on file."""
    known = in_file(module, *names)
    return isinstance(function, FunctionType) and known is not None and _parts(function.__code__) == _parts(known)


SILUS: list[Any] = (
    [nn.SiLU.forward] if is_one_of(nn.SiLU.forward, _silu) else []
)  # the forwards of activations that are SiLU


def learn_activations() -> None:
    """Add transformers' SiLU to SILUS, unless somebody has replaced its forward."""
    from transformers.activations import SiLUActivation

    if SiLUActivation.forward not in SILUS and is_one_of(SiLUActivation.forward, _silu_of_transformers):
        SILUS.append(SiLUActivation.forward)


# PyTorch's own functions.

_CALL, _LINEAR, _F_LINEAR, _F_SILU = nn.Module.__call__, nn.Linear.forward, F.linear, F.silu
_AS_SHIPPED = (
    is_one_of(_LINEAR, _linear)
    and _F_LINEAR is torch._C._nn.linear
    and is_in_file(_F_SILU, F.__name__, "silu")
    and is_in_file(_CALL, nn.Module.__module__, "Module", "_wrapped_call_impl")
)
_HOOKS = sys.modules[nn.Module.__module__]


def others_watch() -> bool:
    """Whether anything outside the MLPs themselves would see, or change, the calls of their layers: hooks on all
    modules, modes, replaced functions of PyTorch."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0:
        return True
    return bool(
        _HOOKS._global_forward_hooks
        or _HOOKS._global_forward_pre_hooks
        or _HOOKS._global_backward_hooks
        or _HOOKS._global_backward_pre_hooks
        or not _AS_SHIPPED
        or F.linear is not _F_LINEAR
        or F.silu is not _F_SILU
        or nn.Linear.forward is not _LINEAR
        or nn.Linear.__call__ is not _CALL
        or has_function_modes()
    )
