"""Which implementation runs an op: explicit argument, then CNA_BACKEND, then the device's default.

The choice never falls through: a backend asked for by name that cannot do the job raises and names the alternative.
The choice is made once for each device: CNA_BACKEND is read at the first call, and again after ``plans.forget``.
"""

from __future__ import annotations

import functools
import os
import warnings
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from . import plans, reference
from .blocks import dense
from .cpu import library
from .errors import InputError
from .extras import Extras, Inputs, Run

KNOWN = ("reference", "cpu", "triton")

MODULES = {"cpu": "cna_kernels.cpu.ops", "triton": "cna_kernels.triton.ops"}


class BackendUnavailable(InputError):
    """The backend asked for by name cannot run here."""


def missing(name: str, device: torch.device) -> str | None:
    """Return why the backend cannot run on the device, or None if it can."""
    if name == "cpu":
        return library.missing() if device.type == "cpu" else f"runs on CPUs, not on {device.type}"
    if name == "triton":
        if find_spec("triton") is None:
            return "needs the package triton, which is not installed"
        if device.type == "cuda":
            return None if _capability(device) >= (8, 0) else "needs compute capability 8.0 or an AMD device"
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"runs on CUDA devices, not on {device.type} (TRITON_INTERPRET=1 interprets it there, slowly)"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def name_for(device: torch.device | str, backend: str | None = None) -> str:
    """Return the backend's name for tensors on the device.

    The default is ``cpu`` on CPUs and ``triton`` on CUDA devices, where they can run, and ``reference`` elsewhere. A
    CPU without the compiled library gets ``reference`` and one warning.

    Raises:
        InputError: the name is not one of KNOWN.
        BackendUnavailable: the backend cannot run on this device.
    """
    key = torch.device(device), backend
    name = _NAMES.get(key)
    if name is None:
        name = _NAMES[key] = _find_name(*key)
    return name


_NAMES: dict[tuple[torch.device, str | None], str] = plans.kept()


def _find_name(device: torch.device, backend: str | None) -> str:
    asked_by, name = ("backend", backend) if backend else ("CNA_BACKEND", os.environ.get("CNA_BACKEND"))
    if not name:
        return _default(device)
    if name not in KNOWN:
        raise InputError(asked_by, f"expected one of {', '.join(KNOWN)}, got {name!r}")
    if reason := missing(name, device):
        raise BackendUnavailable(asked_by, f"{name!r} {reason}; use 'reference'")
    return name


def _default(device: torch.device) -> str:
    if device.type == "cuda" and missing("triton", device) is None:
        return "triton"
    if device.type == "cpu":
        reason = missing("cpu", device)
        if reason is None:
            return "cpu"
        if os.environ.get("CNA_CPU_ISA"):  # asked for by name, like a backend
            raise BackendUnavailable("CNA_CPU_ISA", f"the CPU engine {reason}")
        warnings.warn(f"cna_kernels: the CPU engine {reason}. Using PyTorch alone.", stacklevel=2)
    return "reference"


def prepare(op: str, inputs: Inputs, extras: Extras | tuple[()], backend: str | None = None) -> Run:
    """Return the function that serves calls of an op with arguments like these: of the op's tensors, then the extras.

    A backend's module has a ``prepare``, too, without the argument ``backend``. The function that it returns may depend
    on all that ``serve.looks`` takes from a call: shapes, strides, dtypes, the device, and which arguments are None.
    """
    name = name_for(inputs[0].device, backend)
    if name == "reference":
        return plain(op)
    run: Run = import_module(MODULES[name]).prepare(op, inputs, extras)
    return run


def plain(op: str) -> Run:
    """Return the op in plain PyTorch: a function of the op's tensors, then the extras. Blocks become tensors."""
    if op == "linear":
        return lambda x, w, bias: F.linear(x, dense(w, x.dtype), bias)
    n_extras = len(Extras._fields)
    function: Run = getattr(reference, op)

    def run(*tensors: Tensor | None) -> Tensor:
        first = tensors[0]
        assert first is not None
        inputs: Inputs = tuple(dense(x, first.dtype) if x is not None else None for x in tensors[:-n_extras])
        extras = Extras(*tensors[-n_extras:])
        if op == "gated_mlp":
            x, w_gate, w_up, w_down = inputs
            inputs = x, w_gate if w_up is None else (w_gate, w_up), w_down
        return function(*inputs, **extras.keywords())

    return run
