"""Old names of arguments, which work for one minor release, with a DeprecationWarning. CHANGELOG.md lists them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[Function], Function]:
    """Let a function take keywords by their old names, too: ``@renamed(weight="token_weight")``.

    The call takes 0.4 us longer, which an op has no room for: see ``by_new_name``.

    Raises:
        TypeError: a call gives an argument by both names.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for old in names.keys() & given.keys():
                new = names[old]
                given[new] = by_new_name(old, given.pop(old), new, new in given, stacklevel=3)
            return function(*args, **given)

        return cast(Function, call)

    return decorate


def by_new_name(old: str, value: Any, new: str, both: bool, *, stacklevel: int = 4) -> Any:
    """Return the value that came by the old name of an argument.

    Raises:
        TypeError: ``both``, a value came by the new name, too.
    """
    if both:
        raise TypeError(f"{old}: is the old name of {new}, and both were given")
    if not torch.compiler.is_compiling():  # a warning would break the graph
        warnings.warn(f"cna_kernels: the argument {old} is now named {new}", DeprecationWarning, stacklevel=stacklevel)
    return value
