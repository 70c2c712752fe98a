"""Which implementation runs an op: explicit argument, then CNA_BACKEND, then the device's default.

The choice never falls through: a backend asked for by name that cannot do the job raises and names the alternative.
"""

from __future__ import annotations

import functools
import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from .checks import InputError
from .cpu import library

KNOWN = ("reference", "cpu", "triton")

MODULES = {"reference": "cna_kernels.reference", "cpu": "cna_kernels.cpu.mlp", "triton": "cna_kernels.triton.mlp"}


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
    device = torch.device(device)
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


def implementation(device: torch.device, backend: str | None = None) -> ModuleType:
    """Return the module that implements ``gated_mlp``, ``swiglu`` and ``down_proj`` for this device."""
    return import_module(MODULES[name_for(device, backend)])
