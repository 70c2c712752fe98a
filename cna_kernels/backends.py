"""Which implementation runs an op: explicit argument, then CNA_BACKEND, then the device's default.

The choice never falls through: a backend that cannot do the job raises and names the alternative.
"""

from __future__ import annotations

import os
from importlib import import_module

from .checks import InputError

KNOWN = ("reference", "cpu", "triton")

# Module of each backend that this version ships.
MODULES = {"reference": "cna_kernels.reference"}

# By device type; any other device gets the reference.
DEVICE_DEFAULT = {}


class BackendUnavailable(InputError):
    """The backend asked for by name cannot run here."""


def name_for(device_type: str, backend: str | None = None) -> str:
    """Return the backend's name for tensors on ``device_type`` ("cpu", "cuda", ...).

    Raises:
        InputError: the name is not one of KNOWN.
        BackendUnavailable: the backend exists by name but not in this version.
    """
    asked_by = "backend" if backend else "CNA_BACKEND"
    name = backend or os.environ.get("CNA_BACKEND") or DEVICE_DEFAULT.get(device_type, "reference")
    if name not in KNOWN:
        raise InputError(asked_by, f"expected one of {', '.join(KNOWN)}, got {name!r}")
    if name not in MODULES:
        raise BackendUnavailable(asked_by, f"{name!r} is not part of this version; use 'reference'")
    return name


def implementation(device_type: str, backend: str | None = None):
    """Return the module that implements ``gated_mlp``, ``swiglu`` and ``down_proj`` for this device."""
    return import_module(MODULES[name_for(device_type, backend)])
