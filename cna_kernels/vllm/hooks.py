"""Functions put around vLLM's own, and refused where vLLM's do not look as they did when the plug-in was tested."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

MARK = "_cna_inner"  # an attribute of a function that is put around another


class Changed(RuntimeError):
    """vLLM is not as the plug-in knows it: it raises when the engine starts, and never steers by guess."""


def around(owner: Any, name: str, parameters: Sequence[str], outer: Callable[..., Any]) -> None:
    """Put ``outer`` around a function of a class, a module or an object: it is called with the inner function first.
    Around a coroutine function stands another one.

    Args:
        parameters: the first parameters that the function must have, ``self`` left out.

    Raises:
        Changed: there is no such function, or its parameters are others.
    """
    inner = getattr(owner, name, None)
    where = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', type(owner).__name__)}.{name}"
    if inner is None:
        raise Changed(f"cna: vLLM has no {where}; see the tested versions in the plug-in's documentation")
    if hasattr(inner, MARK):
        return
    found = [each for each in inspect.signature(inner).parameters if each != "self"]
    if found[: len(parameters)] != list(parameters):
        raise Changed(f"cna: {where} has the parameters {found}, expected {list(parameters)} first")

    def run(*args: Any, **kwargs: Any) -> Any:
        return outer(inner, *args, **kwargs)

    functools.update_wrapper(run, inner)
    setattr(run, MARK, inner)
    setattr(owner, name, run)
